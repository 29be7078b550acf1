"""Multi-head attention with the parameters of `torch.nn.MultiheadAttention`, spelt out.

Same state dict, same order of random draws, same numbers as torch with `need_weights=False`; but
the weights can be looked at, and no fused kernel decides by batch size how it rounds.

Shapes: B batch, Q queries, T tokens, D width, H heads, d width of a head.
"""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Queries look up values by keys; width and heads as configured, no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"a latent width of {width} cannot be shared by {heads} heads; "
                f"try {math.gcd(width, heads)} heads or a width of {heads * -(-width // heads)}"
            )
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)  # drawn before the in-projection, as torch does
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query_BQD: Tensor,
        key_BTD: Tensor,
        value_BTD: Tensor,
        outside_BT: Tensor | None = None,
    ) -> Tensor:
        """What the queries found; tokens marked outside are not looked at."""
        weights_BHQT = self.weights(query_BQD, key_BTD, outside_BT)
        value_BHTd = self._heads(self._projected(value_BTD, part=2))
        found_BQHd = (weights_BHQT @ value_BHTd).transpose(1, 2)
        return self.out_proj(found_BQHd.flatten(2))

    def weights(
        self, query_BQD: Tensor, key_BTD: Tensor, outside_BT: Tensor | None = None
    ) -> Tensor:
        """How much every query takes of every token, per head: weights_BHQT."""
        query_BHQd = self._heads(self._projected(query_BQD, part=0))
        key_BHTd = self._heads(self._projected(key_BTD, part=1))
        scores_BHQT = query_BHQd * query_BHQd.shape[-1] ** -0.5 @ key_BHTd.transpose(2, 3)
        if outside_BT is not None:
            scores_BHQT = scores_BHQT.masked_fill(outside_BT[:, None, None], -torch.inf)
        return scores_BHQT.softmax(dim=-1)

    def _projected(self, x_BTD: Tensor, *, part: int) -> Tensor:
        weight_DD = self.in_proj_weight.chunk(3)[part]
        return nn.functional.linear(x_BTD, weight_DD, self.in_proj_bias.chunk(3)[part])

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)
