"""What is to become small, in shares that add up.

A step may see its pictures in parts, on several workers. Each part therefore says its sum and is
divided by what all of them hold: pixel terms by the pixels that teach, picture terms by the
pictures that have any. Dice and Lovász are taken picture by picture for that reason.

Pixels with the ignored label give neither loss nor gradient; where nothing is left both are 0.

Shapes: B batch, K classes, C classes that a picture shows, H W picture, P its pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

if TYPE_CHECKING:
    from models.training.recipes import Terms

SMALL = 1e-12


class Loss:
    """The terms of a recipe, ready to be called."""

    def __init__(self, terms: Terms, ignore_id: int = 255) -> None:
        if terms.class_weights == "median_frequency":
            raise ValueError(
                "loss.class_weights median_frequency needs the labels to be counted: "
                "call recipe.balanced(counts), or give one number a class"
            )
        self.terms = terms
        self.ignore_id = ignore_id
        weights = terms.class_weights
        self.weights_K = None if isinstance(weights, str) else torch.tensor(weights)

    def counts(self, labels: Tensor) -> Tensor:
        """counts_2: the pixels of these labels that teach, and the pictures that have any."""
        counted_BP = (labels != self.ignore_id).reshape(len(labels), -1)
        return torch.stack((counted_BP.sum(), counted_BP.any(1).sum()))

    def __call__(self, logits: Tensor, labels: Tensor, counts_2: Tensor | None = None) -> Tensor:
        """The share of these pictures in the loss.

        Args:
            logits: B K H W, or B K from a classifier.
            labels: int64 class indexes, B H W or B.
            counts_2: what the whole step holds; None: these pictures alone.
        """
        terms = self.terms
        if logits.ndim == 2 and (terms.dice or terms.lovasz):
            raise ValueError("loss.dice and loss.lovasz need masks; set both to 0 for a classifier")
        counts_2 = self.counts(labels) if counts_2 is None else counts_2
        pixels, pictures = counts_2.clamp(min=1)
        parts = (
            (terms.cross_entropy, self._cross_entropy, pixels),
            (terms.focal, self._focal, pixels),
            (terms.dice, self._dice, pictures),
            (terms.lovasz, self._lovasz, pictures),
        )
        shares = [share * total(logits, labels) / count for share, total, count in parts if share]
        return torch.stack(shares).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            self._weights_for(logits),
            ignore_index=self.ignore_id,
            label_smoothing=self.terms.label_smoothing,
            reduction="sum",
        )

    def _focal(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-w_y (1 - p_y)^gamma log p_y."""
        weights_K = self._weights_for(logits)
        surprise = cross_entropy(logits, labels, ignore_index=self.ignore_id, reduction="none")
        # At p = 1 the power has no slope if gamma is below 1.
        doubt = (-torch.expm1(-surprise)).clamp(min=SMALL)
        each = doubt**self.terms.focal_gamma * surprise
        if weights_K is not None:
            each = each * weights_K[labels.where(labels != self.ignore_id, 0)]
        return each.sum()

    def _dice(self, logits: Tensor, labels: Tensor) -> Tensor:
        p_BKP, labels_BP = softmax(logits.flatten(2), 1), labels.flatten(1)
        counted_B1P = (labels_BP != self.ignore_id)[:, None]
        classes_K1 = torch.arange(p_BKP.shape[1], device=p_BKP.device)[:, None]
        truth_BKP = (labels_BP[:, None] == classes_K1) & counted_B1P
        both_BK = (p_BKP * truth_BKP).sum(2)
        either_BK = (p_BKP * counted_B1P).sum(2) + truth_BKP.sum(2)
        shown_BK = truth_BKP.any(2)
        lost_BK = (1 - 2 * both_BK / either_BK.clamp(min=1)) * shown_BK  # 1 at least where shown
        return (lost_BK.sum(1) / shown_BK.sum(1).clamp(min=1)).sum()

    def _lovasz(self, logits: Tensor, labels: Tensor) -> Tensor:
        p_BKP, labels_BP = softmax(logits.flatten(2), 1), labels.flatten(1)
        counted_BP = labels_BP != self.ignore_id
        of_pictures = [
            _lovasz_of_picture(p_KP[:, counted_P], labels_P[counted_P])
            for p_KP, labels_P, counted_P in zip(p_BKP, labels_BP, counted_BP, strict=True)
        ]
        return torch.stack(of_pictures).sum()

    def _weights_for(self, logits: Tensor) -> Tensor | None:
        if self.weights_K is not None and len(self.weights_K) != logits.shape[1]:
            raise ValueError(
                f"loss.class_weights are {len(self.weights_K)} numbers, "
                f"the model has {logits.shape[1]} classes"
            )
        return None if self.weights_K is None else self.weights_K.to(logits)


def _lovasz_of_picture(p_KP: Tensor, labels_P: Tensor) -> Tensor:
    """The mean over the classes that the picture shows."""
    shown_C = labels_P.unique()
    if not len(shown_C):
        return p_KP.sum()  # of nothing, with its gradient
    truth_CP = labels_P == shown_C[:, None]
    error_CP, order_CP = (truth_CP.to(p_KP) - p_KP[shown_C]).abs().sort(dim=1, descending=True)
    truth_CP = truth_CP.gather(1, order_CP)
    size_C1 = truth_CP.sum(1, keepdim=True)
    both_CP = size_C1 - truth_CP.cumsum(1)  # if all pixels so far were wrong
    either_CP = size_C1 + (~truth_CP).cumsum(1)
    lost_CP = 1 - both_CP.to(p_KP) / either_CP
    slope_CP = lost_CP.diff(dim=1, prepend=torch.zeros_like(lost_CP[:, :1]))
    return (error_CP * slope_CP).sum(1).mean()
