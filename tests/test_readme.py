"""Exactly what README.md shows about reading a run is run here, in a folder that holds `my-run`."""

import re
from pathlib import Path

import pytest

from tests.archives import segment
from tests.bundles import tiny_bundle

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCED = re.compile(r"^```(python|sql)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
READERS = {"polars", "zarr", "xarray", "duckdb"}

if not README.exists():
    pytest.skip("README.md is not written yet", allow_module_level=True)


def section(title: str) -> str:
    lines = README.read_text().partition(f"\n## {title}\n")[2]
    return lines.partition("\n## ")[0]


SNIPPETS = [
    pytest.param(language, code, id=f"{title}-{number}".replace(" ", "-"))
    for title in ("Read a run", "Read a run without us")
    for number, (language, code) in enumerate(FENCED.findall(section(title)))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run over the pictures that come with the project, called `my-run`."""
    made = tmp_path_factory.mktemp("readme")
    model = tiny_bundle(made / "model")
    segment(ROOT / "docs/pictures", made / "my-run", model, fragment={"images": 16})
    return made


@pytest.mark.parametrize(("language", "code"), SNIPPETS)
def test_a_snippet_of_the_readme_runs_as_it_stands(folder, language, code, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    if language == "sql":
        import duckdb

        assert duckdb.sql(code).fetchall()
    else:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
        assert capsys.readouterr().out.strip()  # each shows something


def test_every_promised_reader_has_a_snippet_that_needs_nothing_of_ours():
    codes = [code for _, code in FENCED.findall(section("Read a run without us"))]

    imported = {word for code in codes for word in re.findall(r"^import (\w+)", code, re.MULTILINE)}

    assert imported >= READERS
    assert not any(re.search(r"\b(pipeline|models|jobs)\b", code) for code in codes)


def test_the_first_two_blocks_are_the_two_commands():
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)

    assert [block.count("\n") for block in blocks[:2]] == [1, 1]
    assert "segment docs/pictures --out my-run" in blocks[0]
    assert "pytest" in blocks[1]


def test_every_page_the_readme_links_is_there():
    for target in re.findall(r"\]\(([^)#]+)", README.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target
