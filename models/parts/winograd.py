"""3 x 3 convolutions with half of the multiplications, for CPUs.

Source: Winograd's minimal filtering F(4, 3), as in Lavin and Gray 2016 (arXiv 1509.09308), over the
height alone: four rows of outputs from six rows of inputs take six 1 x 3 convolutions, where they
would take twelve. What comes before and after are sums of whole rows, which a core adds eight or
sixteen values at a time; over both sides (a quarter of the multiplications) the sums are of short
pieces: up to 128 channels that is slower, with 512 faster by a tenth.

It rounds otherwise than the direct sum, by some 4e-6 of the largest value instead of 1e-6: for
float32 alone, half precision has no digits to spare.

Shapes: B batch, C input channels, F output channels, H W grid, n groups of four rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from models.parts.strips import pays, spans

STRIP = 1024**2  # bytes of one of the six planes at a time, or twice that (measured: 1 to 4 equal)
ROWS = 4
"""Rows of outputs that are computed from each other's sums."""
CHANNELS = 128
"""From so many on a whole convolution is faster this way: 1.25 times with 128, 1.7 with 512, none
with 64 (one thread, 2026-11-29); with fewer it pays where what follows reads the rows at once."""

# The rows of G in Lavin and Gray, for the points 0, 1, -1, 2, -2 and infinity.
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class RowWinograd(nn.Module):
    """A 3 x 3 convolution of stride 1 with a border of one zero."""

    kernel_6FyxC: Tensor
    bias_F: Tensor | None

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not winnable(conv):
            raise ValueError(f"only 3 x 3, stride 1, padding 1, without groups: {conv}")
        points_63 = torch.tensor(KERNEL, dtype=torch.float64, device=conv.weight.device)
        kernel = torch.einsum("py,fcyx->pfxc", points_63, conv.weight.double())
        self.register_buffer("kernel_6FyxC", kernel.unsqueeze(2).to(conv.weight), persistent=False)
        bias = None if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("bias_F", bias, persistent=False)

    def groups_at_once(self, batch: int, width: int) -> int:
        """How many groups of four rows stay near a core."""
        kernel = self.kernel_6FyxC
        return STRIP // (batch * width * kernel.shape[1] * kernel.element_size())

    def forward(self, x_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Every first, second, third and fourth row of n groups: four y_BnWF.

        Args:
            x_BHWC: the 4 n rows that the groups lie on, and the ones above and below (zeros at the
                border); contiguous.
        """
        last = x_BHWC.shape[1] - 2
        planes = _mixed(*(x_BHWC[:, i : last + i : ROWS] for i in range(6)))
        kernels = self.kernel_6FyxC.permute(0, 1, 4, 2, 3).unbind()
        biases = (None, self.bias_F, None, None, None, None)  # point 1 counts once in all four
        zero, one, minus_one, two, minus_two, infinity = (
            conv2d(v.permute(0, 3, 1, 2), kernel, bias, padding=(0, 1)).permute(0, 2, 3, 1)
            for v, kernel, bias in zip(planes, kernels, biases, strict=True)
        )
        ones, twos = one + minus_one, two + minus_two
        one_less, two_less = one.sub_(minus_one), two.sub_(minus_two)
        return (
            zero.add_(ones).add_(twos),
            torch.add(one_less, two_less, alpha=2),
            ones.add_(twos, alpha=4),
            one_less.add_(two_less, alpha=8).add_(infinity),
        )


def _mixed(r0: Tensor, r1: Tensor, r2: Tensor, r3: Tensor, r4: Tensor, r5: Tensor) -> list[Tensor]:
    """What the six kernels see of six rows: B^T of Lavin and Gray; sums that recur, once."""
    even4, odd4 = torch.sub(r4, r2, alpha=4), torch.sub(r3, r1, alpha=4)
    even, odd = r4 - r2, r3 - r1
    return [
        torch.add(even, r0 - r2, alpha=4),
        even4 + odd4,
        even4.sub_(odd4),
        torch.add(even, odd, alpha=2),
        even.sub_(odd, alpha=2),
        torch.sub(r5 - r3, odd, alpha=4),
    ]


def row_winograd(conv: nn.Conv2d) -> RowWinograd | None:
    """The convolution's six kernels, where they are of use: not on a GPU."""
    return RowWinograd(conv) if winnable(conv) and conv.weight.device.type == "cpu" else None


def faster(conv: nn.Conv2d) -> nn.Module:
    """The convolution, by this way on a CPU if that is the faster one.

    Its weights then take three times the memory: other number types and torch.compile want the
    direct ones.
    """
    by_rows = row_winograd(conv) if conv.in_channels >= CHANNELS else None
    return conv if by_rows is None else ByRows(conv, by_rows)


class ByRows(nn.Module):
    """A convolution that takes this way where it can."""

    def __init__(self, conv: nn.Conv2d, by_rows: RowWinograd) -> None:
        super().__init__()
        self.conv, self.by_rows = conv, by_rows

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BFHW."""
        if not pays(x_BCHW) or x_BCHW.dtype != torch.float32:
            return self.conv(x_BCHW)
        height = x_BCHW.shape[2]
        more = -height % ROWS
        x_BHWC = pad(x_BCHW, (0, 0, 1, 1 + more)).permute(0, 2, 3, 1).contiguous()
        batch, groups, width = len(x_BCHW), (height + more) // ROWS, x_BCHW.shape[3]
        out_BniWF = x_BHWC.new_empty(batch, groups, ROWS, width, self.conv.out_channels)
        for first, last in spans(groups, self.by_rows.groups_at_once(batch, width)):
            for i, row_BnWF in enumerate(self.by_rows(x_BHWC[:, ROWS * first : ROWS * last + 2])):
                out_BniWF[:, first:last, i] = row_BnWF
        return out_BniWF.flatten(1, 2)[:, :height].permute(0, 3, 1, 2)


def winnable(conv: nn.Conv2d) -> bool:
    """Whether it is of the form that `RowWinograd` computes."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
