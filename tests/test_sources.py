"""What no source of ours may hold, and that every one of them can be imported."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("pipeline", "models", "jobs", "benchmarks", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and (path.suffix in {".py", ".sh"} or path.parent.name == ".ci")
)
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in {"pipeline", "models", "jobs"}
]

FORBIDDEN = {
    "loads what may run code": r"""(?x)
        \bpickle\.loads?\( | \bUnpickler\( | \bcloudpickle\.loads?\( | \bdill\.loads?\(
        | \bjoblib\.load\( | \bmarshal\.loads?\( | \bshelve\.open\( | allow_pickle\s*=\s*True
        | \btorch\.load\( | \btorch\.jit\.load\( | \btorch\.export\.load\( | \btorch\.hub\b
        | weights_only\s*=\s*False | trust_remote_code
        | \byaml\.(?:load|load_all|full_load|unsafe_load)\(
        | (?<![\w.])eval\( | (?<![\w.])exec\( | \bextractall\( | \.extract\(
        | from\ (?:pickle|cloudpickle|dill)\ import | \ballow_unsafe\b | AUTOLOAD_PYEXTENSIONTYPE
        | LOAD_TRUNCATED_IMAGES
    """,
    "listens to the world": r"0\.0\.0\.0",
    "asks a shell": r"shell\s*=\s*(?:True|1)|\bos\.system\(|\bos\.popen\(|subprocess\.getoutput\(",
    "fetches from a registry": r"""(?x)
        huggingface\.co | \bhf\.co\b | hf_hub_download | download\.pytorch\.org
        | dl\.fbaipublicfiles | pypi\.org | files\.pythonhosted\.org | kaggle\.com
        | conda\.anaconda\.org
    """,
    "names a folder of one machine": r"""(?<![\w.])/(?:work|root|home|Users|mnt/data)/\w""",
    "turns a check off": r"(?:verify|check_hostname)\s*=\s*False|_create_unverified_context",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_does_what_is_forbidden(path):
    text = path.read_text()
    for what, pattern in FORBIDDEN.items():
        found = re.search(pattern, text)
        assert found is None, (
            f"{what}: {found.group()!r} in line {text.count(chr(10), 0, found.start()) + 1}"
        )


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)", "torch.load(path)", "yaml.load(text)", "x = eval(text)",
        "shard.extractall()", "run(x, shell=True)", "torch.load(f, weights_only=False)",
        "from pickle import loads", "serve(host='0.0.0.0')",
        "https://huggingface.co/x", "/root/data", "requests.get(u, verify=False)",
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_are_for(line):
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())


@pytest.mark.parametrize(
    "line", ["model.eval()", "yaml.safe_load(x)", "re.compile(x)", "s3://b/home/x"]
)
def test_the_patterns_leave_the_innocent_alone(line):
    assert not any(re.search(pattern, line) for pattern in FORBIDDEN.values())


def test_what_comes_from_outside_is_opened_as_the_kind_it_may_be():
    """Pillow alone would try 43 decoders, Ghostscript among them."""
    opened = [
        line
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in {"pipeline", "jobs"}
        for line in path.read_text().splitlines()
        if "Image.open(" in line
    ]
    assert len(opened) == 2
    assert all("formats=[" in line for line in opened)


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 40
    assert {"pipeline.run", "models", "models.latent_attention", "jobs.segment"} <= set(MODULES)


def test_every_module_can_be_imported_on_its_own_terms():
    """In one fresh process; none says anything on the way."""
    code = "\n".join(["import importlib", *(f"importlib.import_module({m!r})" for m in MODULES)])

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_help_and_refusals_need_neither_torch_nor_ray():
    code = (
        "import sys; from jobs import segment, status, verify\n"
        "assert segment.main(['/nowhere', '--out', '/nowhere-else']) == 2\n"
        "heavy = {'torch', 'ray', 's3fs', 'botocore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
