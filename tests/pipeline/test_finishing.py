"""Who wins a pixel, and how surely: as torch's own operations say, which are slower."""

import pytest
import torch
from torch.nn.functional import interpolate

from pipeline.finishing import OCTAVE, decided, heightened_each, widened_each


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
