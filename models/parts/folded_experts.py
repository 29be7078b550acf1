"""Latent experts multiplied out: what depends on weights alone is computed once, not per picture.

Exact in real arithmetic (MODELS.md section 1.6). Two facts carry it: a constant added to all scores
of a softmax changes nothing, and a softmax's weights sum to 1, so that a linear layer before a
weighted mean may as well come after it.

Shapes: B batch, T tokens, F features, D latent width, M experts, E heads, d width of a head,
O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.parts.kernels import operations

if TYPE_CHECKING:
    from models.parts.attention import Attention
    from models.parts.folding import Affine


class FoldedReading(nn.Module):
    """Constant queries read tokens.

    score(e,m,t) = q_em . Wk_e (Wkey x_t + b) = x_t . a_em + what is equal for all t,
    so one product of the tokens with A replaces both key projections and the scores. The mean is
    taken over raw tokens, and only M means per head are projected instead of T tokens.
    """

    score_PF: Tensor
    value_EDF: Tensor
    bias_D: Tensor

    def __init__(self, query_MD: Tensor, key: Affine, value: Affine, attention: Attention) -> None:
        super().__init__()
        heads = self.heads = attention.heads
        (query, keys, values), (bias, _, value_bias) = _parts(attention)
        query_MEd = (query_MD @ query.mT + bias).unflatten(1, (heads, -1))
        query_MEd = query_MEd * query_MEd.shape[-1] ** -0.5
        key_EdF = (keys @ key[0]).unflatten(0, (heads, -1))
        score_EMF = torch.einsum("med,edf->emf", query_MEd, key_EdF)
        self.register_buffer("score_PF", score_EMF.flatten(0, 1).contiguous(), persistent=False)
        out_DEd = attention.out_proj.weight.unflatten(1, (heads, -1))
        value_EdF = (values @ value[0]).unflatten(0, (heads, -1))
        value_EDF = torch.einsum("oed,edf->eof", out_DEd, value_EdF)
        self.register_buffer("value_EDF", value_EDF, persistent=False)
        bias_D = attention.out_proj.weight @ (values @ value[1] + value_bias)
        self.register_buffer("bias_D", bias_D + attention.out_proj.bias, persistent=False)

    def forward(self, x_BTF: Tensor, outside_BT: Tensor | None) -> Tensor:
        """experts_BMD; tokens marked outside are not read."""
        mean_BPF = self._read(x_BTF, outside_BT)
        mean_BEMF = mean_BPF.unflatten(1, (self.heads, -1))
        return (mean_BEMF @ self.value_EDF.mT).sum(1) + self.bias_D

    def _read(self, x_BTF: Tensor, outside_BT: Tensor | None) -> Tensor:
        if outside_BT is None and operations.serves(x_BTF):
            return operations.read(x_BTF.contiguous(), self.score_PF)
        scores_BPT = self.score_PF @ x_BTF.mT
        if outside_BT is not None:
            scores_BPT = scores_BPT.masked_fill(outside_BT[:, None], -torch.inf)
        return scores_BPT.softmax(2) @ x_BTF


class FoldedAsking(nn.Module):
    """Tokens ask experts, and a linear layer follows (or none).

    Per picture the experts become two small matrices, one from tokens to scores and one from shares
    to outputs: the projections of the tokens, the scores, the mix and the output projection are two
    products with them.
    """

    query_EdF: Tensor
    query_Ed1: Tensor
    key_DD: Tensor
    key_D: Tensor
    value_EdD: Tensor
    value_E1d: Tensor
    out_EdO: Tensor
    bias_O: Tensor

    def __init__(self, pixel: Affine, attention: Attention, head: Affine | None) -> None:
        super().__init__()
        heads = self.heads = attention.heads
        (query, key, value), (query_bias, key_bias, value_bias) = _parts(attention)
        query_EdF = (query @ pixel[0]).unflatten(0, (heads, -1))
        scale = query_EdF.shape[1] ** -0.5
        query_Ed1 = (query @ pixel[1] + query_bias).unflatten(0, (heads, -1)).unsqueeze(2)
        out_OD, bias_O = attention.out_proj.weight, attention.out_proj.bias
        if head is not None:
            out_OD, bias_O = head[0] @ out_OD, head[0] @ bias_O + head[1]
        out_OEd = out_OD.unflatten(1, (heads, -1))
        buffers = {
            "query_EdF": query_EdF * scale,
            "query_Ed1": query_Ed1 * scale,
            "key_DD": key,
            "key_D": key_bias,
            "value_EdD": value.unflatten(0, (heads, -1)),
            "value_E1d": value_bias.unflatten(0, (heads, -1)).unsqueeze(1),
            "out_EdO": out_OEd.permute(1, 2, 0),
            "bias_O": bias_O,
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.clone(), persistent=False)

    def prepared(self, experts_BMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two matrices of a picture (scores with a bias), for any number of its tokens."""
        key_BEMd = self._heads(experts_BMD @ self.key_DD.mT + self.key_D)
        score_BPF = (key_BEMd @ self.query_EdF).flatten(1, 2)
        score_BP1 = (key_BEMd @ self.query_Ed1).flatten(1, 2)
        value_BEMd = experts_BMD.unsqueeze(1) @ self.value_EdD.mT + self.value_E1d
        answer_BPO = (value_BEMd @ self.out_EdO).flatten(1, 2)
        return score_BPF, score_BP1, answer_BPO.mT.contiguous()

    def forward(
        self, x_BTF: Tensor, score_BPF: Tensor, score_BP1: Tensor, answer_BOP: Tensor
    ) -> Tensor:
        """told_BTO: what the tokens are told by the experts that were prepared."""
        shares_BPT = self._shares(x_BTF, score_BPF, score_BP1)
        return torch.baddbmm(self.bias_O, shares_BPT.mT, answer_BOP.mT)

    def by_output(
        self, x_BTF: Tensor, score_BPF: Tensor, score_BP1: Tensor, answer_BOP: Tensor
    ) -> Tensor:
        """told_BOT: the same with outputs first, which is faster where they are few.

        11 of 10,800 tokens: 0.6 instead of 1.5 ms (one thread, 2026-11-29).
        """
        if operations.serves(x_BTF):
            prepared = score_BPF, score_BP1, answer_BOP
            return operations.ask(x_BTF.contiguous(), *prepared, self.bias_O, self.heads)
        shares_BPT = self._shares(x_BTF, score_BPF, score_BP1)
        return torch.baddbmm(self.bias_O[:, None], answer_BOP, shares_BPT)

    def _shares(self, x_BTF: Tensor, score_BPF: Tensor, score_BP1: Tensor) -> Tensor:
        """shares_BPT: tokens lie beside each other, so a core takes as many as it has lanes."""
        scores_BPT = torch.baddbmm(score_BP1, score_BPF, x_BTF.mT)
        return scores_BPT.unflatten(1, (self.heads, -1)).softmax(2).flatten(1, 2)

    def _heads(self, x_BMD: Tensor) -> Tensor:
        return x_BMD.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _parts(attention: Attention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Query, key and value: three weights, three biases."""
    return attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
