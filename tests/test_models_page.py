"""docs/models.md says what the models are now."""

import re
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
CLASSES = 19  # as the page says


def rows():
    """The cells of every row, by model and variant."""
    text = PAGE.read_text()
    return {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 9
    }


VARIANTS = [(name, variant) for name in models.names() for variant in models.about(name).variants]


def test_the_page_has_a_row_for_every_variant_and_no_other():
    found = {name for name in rows() if name.split(" ")[0] in models.names()}

    assert found == {f"{name} {variant}" for name, variant in VARIANTS}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_what_can_be_counted_is_as_the_page_says(name, variant):
    facts = models.facts(name, **{"classes": CLASSES, **models.about(name).variants[variant]})

    parameters, gflop, stride, least, multiple, field, *_ = rows()[f"{name} {variant}"]

    assert parameters == f"{facts.parameters:,}"
    assert gflop == f"{facts.gflop:.1f}"
    assert (stride, least, multiple) == tuple(
        str(value) for value in (facts.stride, facts.min_side, facts.multiple)
    )
    seen = "everything" if facts.receptive_field is None else f"{facts.receptive_field} px"
    assert field == seen


def test_every_model_has_its_picture():
    shown = set(re.findall(r"\(models/(\w+)\.png\)", PAGE.read_text()))

    assert shown == set(models.names())
    assert all((PAGE.parent / "models" / f"{name}.png").stat().st_size > 1000 for name in shown)
