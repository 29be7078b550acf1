"""Who wins a pixel, and how surely: as torch's own operations say, which are slower."""

import pytest
import torch
from torch.nn.functional import interpolate

from models.parts import kernels
from pipeline.finishing import OCTAVE, Finisher, decided, heightened_each, widened_each

CPU = torch.device("cpu")


def by_torch(ids, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "LIBRARY", None)
        return Finisher(ids, CPU)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("ids", [range(2), range(11), [7, 3, 254], [300, 1, 65535], range(300)])
@pytest.mark.parametrize(
    ("cells", "size", "width"),
    [
        ((16, 12), (64, 48), 48),
        ((16, 33), (67, 131), 129),
        ((1, 1), (4, 4), 3),
        ((7, 3), (7, 3), 3),
        ((5, 34), (5, 34), 34),  # neighbours lie a whole cell apart
        ((5, 34), (6, 37), 36),  # some of them more than a register's cells
        ((9, 70), (5, 33), 33),  # fewer pixels than cells
    ],
)
@pytest.mark.parametrize("blank", [False, True])
def test_c_says_what_torchs_operations_say(ids, cells, size, width, blank, monkeypatch):
    ids = list(ids)
    draws = torch.Generator().manual_seed(0)
    scores_Khw = torch.randn(len(ids), *cells, generator=draws) * 8
    blank_1HW = torch.rand(1, size[0], width, generator=draws) < 0.3 if blank else None
    given = scores_Khw, 0, cells, size, (0, size[0]), width, blank_1HW, True

    found = Finisher(ids, CPU).finished(*given)

    expected = by_torch(ids, monkeypatch).finished(*given)
    assert found.labels_BHW.dtype == expected.labels_BHW.dtype
    same = found.labels_BHW == expected.labels_BHW
    assert same.float().mean() > 0.9995  # where two classes are level up to rounding
    assert blank_1HW is None or same[blank_1HW].all()
    unsure = (found.certainty_BHW.int() - expected.certainty_BHW.int()).abs()
    assert unsure.max() <= 1
    assert unsure.float().mean() < 0.001
    moved = (~same).sum()
    assert (found.counts_BK - expected.counts_BK).abs().sum() <= 2 * moved
    # Torch knows a place among 70 cells to 4e-6 of one, and scores there are some 10 apart.
    rounding = 1e-4 if cells > size else 1e-5
    close = {"rtol": rounding, "atol": float(moved) + 1e-6}
    torch.testing.assert_close(found.sums_BK, expected.sums_BK, **close)


@pytest.mark.usefixtures("instructions")
def test_c_gives_any_rows_from_the_scores_around_them_alone():
    cells, size, width = (16, 12), (67, 51), 50
    scores_Khw = torch.randn(5, *cells, generator=torch.Generator().manual_seed(0))
    finisher = Finisher(list(range(5)), CPU)
    whole = finisher.finished(scores_Khw, 0, cells, size, (0, 67), width, None, confidence=True)

    around = [((0, 10), 0, 4), ((10, 11), 1, 4), ((11, 50), 2, 13), ((50, 67), 11, 16)]
    for span, first, last in around:
        near_Khw = scores_Khw[:, first:last]
        part = finisher.finished(near_Khw, first, cells, size, span, width, None, confidence=True)
        assert torch.equal(part.labels_BHW, whole.labels_BHW[:, slice(*span)])
        assert torch.equal(part.certainty_BHW, whole.certainty_BHW[:, slice(*span)])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("none", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_go_torchs_way(none, monkeypatch):
    scores_Khw = torch.zeros(3, 4, 4)
    scores_Khw[1, 2, 2] = none
    given = scores_Khw, 0, (4, 4), (16, 16), (0, 16), 16, None, False

    found = Finisher([0, 1, 2], CPU).finished(*given)

    expected = by_torch([0, 1, 2], monkeypatch).finished(*given)
    assert torch.equal(found.labels_BHW, expected.labels_BHW)
    assert torch.equal(found.sums_BK.isnan(), expected.sums_BK.isnan())


@pytest.mark.usefixtures("instructions")
def test_of_classes_that_are_level_the_first_wins_in_c():
    scores_Khw = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])[:, None, None].expand(-1, 2, 5).clone()
    done = Finisher([9, 8, 7, 6, 5], CPU).finished(
        scores_Khw, 0, (2, 5), (8, 20), (0, 8), 20, None, confidence=True
    )

    assert done.labels_BHW.unique().tolist() == [8]
    assert done.counts_BK.tolist() == [[0, 160, 0, 0, 0]]
    share = 1 / (3 + torch.tensor([-2.0, -3.0]).exp().sum().item())
    assert done.sums_BK[0, 1].item() == pytest.approx(160 * share, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 11, 150, 300])
@pytest.mark.parametrize("spread", [1e-6, 0.1, 5.0, 1000.0])
def test_the_winner_and_its_softmax_are_those_of_torch(classes, spread):
    draws = torch.Generator().manual_seed(classes)
    logits_KHW = torch.randn(classes, 37, 53, generator=draws) * spread
    octaves_KHW = logits_KHW * OCTAVE

    index_HW, sure_HW = decided(octaves_KHW.clone())

    assert torch.equal(index_HW.long(), octaves_KHW.max(0).indices)
    rounding = 1e-5 + 1e-7 * logits_KHW.abs().max().item()  # that of the product with `OCTAVE`
    torch.testing.assert_close(sure_HW, logits_KHW.softmax(0).amax(0), rtol=rounding, atol=0)


def test_of_classes_that_are_level_the_first_wins():
    octaves_KHW = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])[:, None, None].expand(-1, 9, 20).clone()
    octaves_KHW[:, 0] = 0.0

    index_HW, sure_HW = decided(octaves_KHW)

    assert index_HW.unique(dim=1).flatten().tolist() == [0.0] + [1.0] * 8
    torch.testing.assert_close(sure_HW[0], torch.full((20,), 0.2))


def test_what_is_no_number_is_some_class_and_not_sure():
    octaves_KHW = torch.zeros(3, 4, 16)
    octaves_KHW[1, 2, 5] = torch.nan

    index_HW, sure_HW = decided(octaves_KHW)

    assert index_HW.unique().tolist() == [0.0]
    assert sure_HW.isnan().nonzero().tolist() == [[2, 5]]


def test_pictures_of_several_sizes_are_stretched_each_by_its_own_measure():
    draws = torch.Generator().manual_seed(0)
    cells, sizes = [(16, 12), (9, 1), (1, 5)], [(67, 51), (38, 4), (4, 20)]
    scores_BKhw = torch.randn(3, 2, 16, 12, generator=draws)
    cells_B2, sizes_B2 = torch.tensor(cells), torch.tensor(sizes)

    wide_BKhW = widened_each(scores_BKhw, cells_B2, sizes_B2, 51)
    whole_KBHW = torch.cat(
        [heightened_each(wide_BKhW, cells_B2, sizes_B2, (y, y + 1)) for y in range(67)], 2
    )

    for (h, w), (height, width), scores, found in zip(
        cells, sizes, scores_BKhw, whole_KBHW.transpose(0, 1), strict=True
    ):
        expected = interpolate(scores[None, :, :h, :w], size=(height, width), mode="bilinear")[0]
        torch.testing.assert_close(found[:, :height, :width], expected, rtol=1e-5, atol=1e-5)
