"""``maskfleet COMMAND …``: list the folder, hand over to the command."""

import ast
import sys
from importlib import import_module
from pathlib import Path

import jobs
from jobs import names, nearest
from pipeline.errors import EXIT_DONE, EXIT_REFUSED


def _first_line(name: str) -> str:
    """What a command says of itself, without importing it."""
    source = (Path(jobs.__path__[0]) / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main() -> int:
    """Run the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help"}:
        lines = (f"  {name:<10} {_first_line(name)}" for name in names())
        sys.stdout.write(
            "maskfleet COMMAND … (COMMAND --help says more)\n\n" + "\n".join(lines) + "\n"
        )
        return EXIT_DONE if arguments else EXIT_REFUSED
    if arguments[0] not in names():
        sys.stderr.write(f"{nearest(arguments[0])}\n")
        return EXIT_REFUSED
    return import_module(f"jobs.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
