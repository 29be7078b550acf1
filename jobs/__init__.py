"""Commands: every file here is one, ``maskfleet NAME`` or ``python -m jobs.NAME``.

What they share: one logger, and the one place where an exception becomes an exit code.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable
from pkgutil import iter_modules

from pipeline.errors import (
    EXIT_BUG,
    EXIT_REFUSED,
    EXIT_UNFINISHED,
    MaskfleetError,
    RunStuck,
    RunUnfinished,
    StorageBusy,
)
from pipeline.heap import one_arena

log = logging.getLogger("maskfleet")

one_arena()  # here, for a command imports pyarrow next, and that has a thread of its own

INTERRUPTED = "interrupted: what is committed stays; run the same command again to go on"

OUT_OF_MEMORY = (
    "not finished: memory ran out (%r); what is committed stays. Run the same command again with "
    "fewer --compute.workers (beside a GPU, --compute.decode-threads), or where there is more "
    "memory; a smaller --batch.window-mb needs another --out"
)

QUIET = (
    "botocore",
    "aiobotocore",
    "s3fs",
    "urllib3",
    "fsspec",
)  # at DEBUG they print keys and signatures


def names() -> list[str]:
    """The commands: the files of this folder."""
    return sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))


def nearest(name: str) -> str:
    """What to say of a command that is none."""
    near = difflib.get_close_matches(name, names(), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no command {name!r}{hint} ({', '.join(names())})"


def ended(command: Callable[[], int]) -> int:
    """Run a command and turn how it ended into an exit code (DESIGN: 0 1 2 3 4)."""
    set_up_logging()
    try:
        return command()
    except RunStuck as error:
        log.error("not finished: %s", error)  # noqa: TRY400
        os._exit(EXIT_UNFINISHED)  # its threads hang: the interpreter would wait for them
    except (RunUnfinished, StorageBusy) as error:
        log.error("not finished: %s", error)  # noqa: TRY400 - a sentence, not a trace
        return EXIT_UNFINISHED
    except MaskfleetError as error:
        log.error("refused: %s", error)  # noqa: TRY400 - as above
        return EXIT_REFUSED
    except MemoryError as error:
        log.error(OUT_OF_MEMORY, error)  # noqa: TRY400 - as above
        return EXIT_UNFINISHED
    except KeyboardInterrupt:
        log.error(INTERRUPTED)  # noqa: TRY400 - as above
        return EXIT_UNFINISHED
    except BrokenPipeError:  # somebody closed our output, as `| head` does
        return EXIT_UNFINISHED
    except Exception:
        log.exception("a bug; please report it with what is above. What is committed stays")
        return EXIT_BUG


def set_up_logging() -> None:
    """Plain lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.INFO)
