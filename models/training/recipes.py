"""How to train, as one value: every knob with its sentence, JSON both ways, and a few by name.

A recipe names no model, no data and no machine. `batch` is what one step of the weights sees,
however many workers share it and into however many parts each of them cuts its share: the same
recipe gives the same curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from models.training.augment import Augment, unchanged
from models.training.rates import Rate
from models.training.reading import (
    STRICT,
    from_json,
    refuse_below,
    refuse_no_share,
    refuse_unknown,
    to_json,
)

if TYPE_CHECKING:
    from models.parts.configs import Json
    from models.training.balance import ClassCounts

Unit = Literal["steps", "epochs"]
Optimizer = Literal["adamw", "adam", "sgd"]
Balance = Literal["none", "median_frequency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is to become small: a sum of terms, each with its share."""

    __pydantic_config__ = STRICT

    cross_entropy: float = 1.0
    """Of each pixel; a classifier's picture counts as one pixel."""
    focal: float = 0.0
    """Cross-entropy that hardly looks at what is right already (Lin et al. 2017)."""
    dice: float = 0.0
    """One minus the overlap of each class a picture shows (Milletari et al. 2016)."""
    lovasz: float = 0.0
    """A stand-in for IoU that has slopes (Berman et al. 2018); slow, as it sorts all pixels."""
    focal_gamma: float = 2.0
    """How fast focal looks away; 0 is cross-entropy."""
    label_smoothing: float = 0.0
    """Share of certainty spread over all classes; cross_entropy only."""
    class_weights: Balance | tuple[float, ...] = "none"
    """Of the pixels of each class: none, median_frequency of the labels, or one number a class."""
    heaviest: float = 10.0
    """No class weighs more by median_frequency."""

    def __post_init__(self) -> None:
        terms = ("cross_entropy", "focal", "dice", "lovasz")
        refuse_below(0, self, *terms, "focal_gamma", of="loss.")
        refuse_below(1, self, "heaviest", of="loss.")
        refuse_no_share(self, "label_smoothing", of="loss.")
        if not any(getattr(self, name) for name in terms):
            raise ValueError("all terms of the loss are 0; set loss.cross_entropy to 1")
        if isinstance(self.class_weights, str):
            refuse_unknown("loss.class_weights", self.class_weights, get_args(Balance))
        elif not self.class_weights or not all(weight >= 0 for weight in self.class_weights):
            raise ValueError(
                f"loss.class_weights must be one number of at least 0 for each class, "
                f"they are {self.class_weights}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train; the defaults are a fair start for any segmenter."""

    __pydantic_config__ = STRICT

    length: int = 1000
    """How long, in `unit`."""
    unit: Unit = "steps"
    """Steps, or epochs: rounds through all pictures."""
    batch: int = 8
    """Pictures in a step, of all workers and parts together."""
    accumulate: int = 1
    """Parts that a worker cuts its share of a batch into, to save memory."""
    optimizer: Optimizer = "adamw"
    """AdamW, Adam or SGD, as torch has them."""
    momentum: float = 0.9
    """Share of the past in a step; sgd."""
    nesterov: bool = False
    """Look ahead before each step; sgd."""
    weight_decay: float = 0.01
    """Of the weights of layers; biases, norms, and what has no layer (latents, positions) stay."""
    rate: Rate = field(default_factory=Rate)
    """Learning rate, step by step."""
    head_factor: float = 1.0
    """The head learns this many times faster than the rest."""
    heads: tuple[str, ...] = ("head", "decoder", "decode_head", "classifier", "expert_seg")
    """Parts of a model that are its head, by name."""
    clip_norm: float = 1.0
    """Longest gradient that is followed in full; 0: any."""
    loss: Terms = field(default_factory=Terms)
    """What is to become small."""
    average: float = 0.99
    """Share of the past in the running mean of the weights (0.99 looks back 100 steps); 0: none."""
    frozen_statistics: bool = False
    """Leave means and variances of batch norms as they are; for tiny batches."""
    bf16: bool = False
    """Multiply in bfloat16 where torch thinks it safe."""
    patience: int = 0
    """Reports without a gain after which training ends, the best weights kept; 0: to the end."""
    augment: Augment = field(default_factory=Augment)
    """How far pictures may stray."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Taken off each channel, white being 1; one number stands for all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """What each channel is divided by then."""
    ignore_id: int = 255
    """Pixels with this label teach nothing."""
    keep_every: int = 50
    """Steps between two copies of a state known to be good."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        refuse_unknown("unit", self.unit, get_args(Unit))
        refuse_unknown("optimizer", self.optimizer, get_args(Optimizer))
        refuse_below(1, self, "length", "batch", "accumulate", "keep_every")
        refuse_below(0, self, "weight_decay", "clip_norm", "patience", "seed")
        for name in ("momentum", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, it is {getattr(self, name)}; try 0.9"
                )
        if not self.head_factor > 0:
            raise ValueError(f"head_factor must be above 0, it is {self.head_factor}")
        self._check_together()

    def _check_together(self) -> None:
        if self.unit == "steps" and self.rate.warmup > self.length:
            raise ValueError(
                f"rate.warmup {self.rate.warmup} must not exceed the length of {self.length} steps"
            )
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError("nesterov needs optimizer sgd and a momentum above 0")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must be one of each per channel")

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Recipe:
        """A recipe of some fields, nested like it.

        Raises:
            ValueError: naming every key it does not have and every value it cannot have.
        """
        return from_json(cls, values, where="recipe")

    def to_json(self) -> dict[str, Json]:
        """In types that JSON knows."""
        return to_json(self)

    def part(self, workers: int = 1) -> int:
        """Pictures that a worker puts through the model at once."""
        part, rest = divmod(self.batch, workers * self.accumulate)
        if rest:
            raise ValueError(
                f"batch {self.batch} cannot be shared by {workers} workers in {self.accumulate} "
                f"parts each; try batch {(part + 1) * workers * self.accumulate}"
            )
        return part

    def balanced(self, counts: ClassCounts) -> Recipe:
        """With median_frequency as numbers, from labels that were counted."""
        if self.loss.class_weights != "median_frequency":
            return self
        weights = counts.median_frequency(self.loss.heaviest)
        return replace(self, loss=replace(self.loss, class_weights=weights))


def default() -> Recipe:
    """A fair start for any segmenter."""
    return Recipe()


def street() -> Recipe:
    """Street scenes of the CamVid kind: few pictures, rare thin things, long trainings."""
    return Recipe(
        length=7000,
        batch=8,
        # With a peak of 3e-3 it came apart after 1,000 steps, in bfloat16 at least.
        rate=Rate(peak=1e-3, warmup=100, final_share=0.0),
        loss=Terms(class_weights="median_frequency"),
        augment=Augment(size=(288, 384), zoom=(0.6, 1.8), balanced=0.5),
        mean=(0.4119, 0.4251, 0.4327),  # of the train split (MODELS.md section 7.1)
        std=(0.3071, 0.3116, 0.3072),
    )


def synthetic() -> Recipe:
    """The latent-attention document's: noise, 100 iterations of Adam (MODELS.md section 1.3)."""
    return Recipe(
        length=100,
        batch=4,
        optimizer="adam",
        weight_decay=0.0,
        rate=Rate(peak=1e-3, course="constant", warmup=0),
        clip_norm=0.0,
        average=0.0,
        augment=unchanged((128, 128)),
        mean=(0.0,),
        std=(1.0,),
        seed=42,
    )


def pets() -> Recipe:
    """The ViT segmenter's article on Oxford-IIIT Pet (MODELS.md section 2.5).

    Its first layer is a batch norm, so pixels are 0 to 1 as they come.
    """
    return Recipe(
        length=50,
        unit="epochs",
        batch=64,
        optimizer="adam",
        weight_decay=0.0,
        rate=Rate(peak=4e-4, course="step", gamma=0.8, every=12, warmup=0),
        clip_norm=0.0,
        average=0.0,
        augment=replace(unchanged((128, 128)), flip=0.5, contrast=(0.7, 1.3)),
        mean=(0.0,),
        std=(1.0,),
    )


NAMED: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "street": street,
    "synthetic": synthetic,
    "pets": pets,
}
