"""3 x 3 convolutions for CPUs, in C (models/parts/kernels); where that is not compiled, torch's.

`Winograd` is for many channels: minimal filtering F(4 x 4, 3 x 3), as in Lavin and Gray 2016 (arXiv
1509.09308), 16 outputs from 36 inputs by 36 multiplications instead of 144. `HalvedTwice` is how a
stem may begin: from a picture's few channels to many, at a quarter of its side, in one pass; of the
first convolution only columns go that way, 4 outputs by 6 multiplications instead of 12 for each of
a kernel's columns. Both round otherwise than the direct sum, but by as little: some 1e-6 of the
largest value.

Both are for float32 alone: half precision has no digits to spare.

Shapes: B batch, C input channels, F output channels, H W grid, n packed numbers.
"""

import math

import torch
from torch import Tensor, nn

from models.parts import kernels
from models.parts.kernels import operations

CHANNELS = 16
"""From so many on it is the faster way: 1.5 times with 16, 2.4 with 64 (one thread, 2026-11-30)."""

POINTS = (0, 0.625, -0.625, 1.5, -1.5)
"""Where the polynomials meet, beside infinity (conv3x3.h has the same). Their powers are exact, and
the largest error is a fifth of that with the usual 0, 1, -1, 2, -2: of ten sets tried one of the
two best (2026-11-30; Barabasz et al. 2018, arXiv 1803.10986, on why)."""


def _transform() -> Tensor:
    """G of Lavin and Gray for these points: points_63."""
    rows = []
    for point in POINTS:
        apart = math.prod(point - other for other in POINTS if other != point)
        rows.append([point**power / apart for power in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


class _Packed(nn.Module):
    """A convolution's kernel, as its own way wants it, and bias as C reads them."""

    kernel_n: Tensor
    bias_F: Tensor

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not computed(conv):
            raise ValueError(f"only 3 x 3, stride 1, padding 1, without groups: {conv}")
        self.features = conv.out_channels
        kernel_n = operations.packed(self._kernel(conv.weight.detach().cpu()))
        self.register_buffer("kernel_n", kernel_n, persistent=False)
        bias_F = operations.packed_bias(conv.bias, self.features)
        self.register_buffer("bias_F", bias_F, persistent=False)

    def _kernel(self, weight_FCyx: Tensor) -> Tensor:
        """kernel_NCF."""
        raise NotImplementedError


class _ByColumns(_Packed):
    """F(4, 3): of four rows at a time. Few channels would lose more by F(4 x 4, 3 x 3) than win."""

    def _kernel(self, weight_FCyx: Tensor) -> Tensor:
        kernel_6xCF = torch.einsum("py,fcyx->pxcf", _transform(), weight_FCyx.double())
        return kernel_6xCF.flatten(1, 2)


class Winograd(_Packed):
    """A 3 x 3 convolution of stride 1 with a border of one zero."""

    def _kernel(self, weight_FCyx: Tensor) -> Tensor:
        points_63 = _transform()
        kernel_66CF = torch.einsum("py,fcyx,qx->pqcf", points_63, weight_FCyx.double(), points_63)
        return kernel_66CF.flatten(0, 1)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """out_BHWF of contiguous maps."""
        return operations.winograd(x_BHWC, self.kernel_n, self.bias_F, self.features)


class HalvedTwice(nn.Module):
    """Two such convolutions, each followed by its 2 x 2 maximum and ReLU.

    The first by columns, the second as `Winograd`. Of what lies between there are never more than
    six rows.
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second = _ByColumns(first), Winograd(second)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """out_BhwF of contiguous maps."""
        about = [
            part
            for each in (self.first, self.second)
            for part in (each.kernel_n, each.bias_F, each.features)
        ]
        return operations.halved_twice(x_BHWC, *about)


def compiled(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be done in C here."""
    here = kernels.LIBRARY is not None and conv.weight.device.type == "cpu"
    return here and computed(conv)


def faster(conv: nn.Conv2d) -> nn.Module:
    """The convolution, by `Winograd` on a CPU if that is the faster way.

    Its weights then take five times the memory: other number types and torch.compile want the
    direct ones.
    """
    wins = conv.in_channels >= CHANNELS and compiled(conv)
    return ByTiles(conv, Winograd(conv)) if wins else conv


class ByTiles(nn.Module):
    """A convolution that takes this way where it can."""

    def __init__(self, conv: nn.Conv2d, by_tiles: Winograd) -> None:
        super().__init__()
        self.conv, self.by_tiles = conv, by_tiles

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x_BFHW."""
        if not operations.serves(x_BCHW):
            return self.conv(x_BCHW)
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
        return self.by_tiles(x_BHWC).permute(0, 3, 1, 2)


def computed(conv: nn.Conv2d) -> bool:
    """Whether it is of the form that is computed here."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
