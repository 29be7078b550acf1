"""A `transformers` checkpoint for semantic segmentation, as its folder holds it.

Source: the package transformers (Wolf et al. 2020), whose own classes are built here and nothing
else: no code of the checkpoint's, no network, weights from safetensors alone, strictly by name.

Unusual: of config.json only what the family's config class declares is used. Pictures are not
resized as the checkpoint's processor would; they are read at native resolution, normalised as it
says. The head that only helps training is left out. Two families read blue first, red last.

Shapes: B batch, C input channels, H W padded input, K classes, h w native grid.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors import torch as tensors
from torch import Tensor, nn

from models.foreign.guest import (
    IMAGENET,
    IMAGENET_GRAY,
    Guest,
    GuestConfig,
    colour,
    sizes_read,
)
from models.parts.bundle import Bundle, ClassInfo, InputInfo, TileInfo
from models.parts.configs import did_you_mean
from models.parts.saved import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import ModuleType

    from models.parts.network import Size

    Read = Callable[[str], bytes | None]

HALVINGS = 32  # hierarchical nets halve a side five times
SWAPPED = frozenset({"mobilevit", "mobilevitv2"})
"""Families whose processors, unless told, put blue first and do not normalise."""
FETCHED = ("backbone", "use_timm_backbone", "use_pretrained_backbone")
"""Options that name a part which is not in the checkpoint."""
LEGACY = frozenset(
    {"id2label", "num_labels", "out_features", "out_indices", "segmentation_indices"}
)
"""Options that config classes take without declaring them."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Config(GuestConfig):
    """A checkpoint's network."""

    checkpoint: str = ""
    """What the family declares of the checkpoint's config.json, as JSON."""
    blue_first: bool = False
    """Whether it reads channels in the order blue, green, red."""


def build(config: Config) -> Guest:
    """The net of this config, freshly initialised."""
    return HuggingFace(config)


class HuggingFace(Guest):
    """A net of transformers."""

    def __init__(self, config: Config, net: nn.Module | None = None) -> None:
        super().__init__(config)
        self.blue_first = config.blue_first
        if net is None:
            about = _about(_json(config.checkpoint.encode(), "the card's checkpoint"))
            net = _made(_family(about), about)
        self.net: Any = net

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Logits_BKhw."""
        if self.blue_first:
            x_BCHW = x_BCHW.flip(1)
        return _logits(self.net, x_BCHW)


def _logits(net: Any, x_BCHW: Tensor) -> Tensor:  # noqa: ANN401 - a class of transformers
    if net.config.model_type == "upernet":  # would only stretch them to H W, as is done later
        features = net.backbone.forward_with_filtered_kwargs(x_BCHW).feature_maps
        return net.decode_head(features)
    return net(pixel_values=x_BCHW).logits


# ------------------------------------------------------------------------------------- conversion


def bundle_of(
    config_json: bytes, read: Read, names: Callable[[], Iterable[str]]
) -> tuple[bytes, bytes]:
    """`model.json` and `weights.safetensors` of a checkpoint folder.

    Args:
        config_json: its config.json.
        read: reads its other files.
        names: what files it has; for the message if the weights are not among them.

    Raises:
        ValueError: it is no such checkpoint, not a whole one, or one that cannot be used.
    """
    raw = _json(config_json, "config.json")
    about = _about(raw)
    classes = _classes(about.id2label)
    processor = _json(read("preprocessor_config.json") or b"{}", "preprocessor_config.json")
    net = _loaded(about, _weights(read, names))
    pixels, blue_first, normalised = _input(processor, about)
    config = Config(
        channels=pixels.channels,
        classes=len(classes),
        checkpoint=json.dumps(_declared(raw), sort_keys=True),
        blue_first=blue_first,
        **_sizes(net),
    )
    model = HuggingFace(config, net)
    card = Bundle(
        architecture="huggingface",
        config=model.config.to_json(),
        classes=classes,
        input=pixels,
        stride=model.stride,
        receptive_field=None,
        tile=_tile(processor, model),
        ignore_id=_ignored(about),
        provenance={
            "from": "a transformers checkpoint",
            "family": raw["model_type"],
            "transformers_version": str(raw.get("transformers_version")),
            "normalisation": normalised,
            "resize": "none: pictures are read at native resolution",
            "reduced_labels": bool(
                processor.get("do_reduce_labels", processor.get("reduce_labels"))
            ),
        },
        metrics={},
    )
    return as_bytes(model, card)


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{name} is not JSON: {problem}") from problem
    if type(found) is not dict:
        raise ValueError(f"{name} must hold an object, it holds {type(found).__name__}")
    return found


def _transformers() -> ModuleType:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a transformers checkpoint needs {error.name}, which is not installed here: "
            "pip install 'maskfleet[huggingface]', on every machine that segments"
        ) from error
    return transformers


def _family(about: Any) -> Any:  # noqa: ANN401 - a config of transformers, and its class of nets
    return _transformers().MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING[type(about)]


def _about(raw: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a config of transformers
    """The config object of config.json, from what its class declares.

    Raises:
        ValueError: the checkpoint is not for semantic segmentation, or needs what it does not hold.
    """
    transformers = _transformers()
    known = {c.model_type: c for c in transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING}
    family = raw.get("model_type")
    if family not in known:
        raise ValueError(
            f"config.json: transformers has no semantic segmentation for model_type {family!r}"
            f"{did_you_mean(str(family), known)}"
        )
    nets = raw.get("architectures") or []
    expected = transformers.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING[known[family]].__name__
    if nets and expected not in nets:
        raise ValueError(
            f"config.json: the checkpoint is a {nets[0]}, only semantic segmentation can be used; "
            f"bring one of {expected}"
        )
    try:
        return known[family](**_declared(raw))
    except Exception as problem:  # its validation has errors of its own, of no common kind
        raise ValueError(f"config.json cannot be used: {problem}") from problem


def _declared(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the config class of `model_type` declares itself, and no other.

    Whatever else transformers would look for in a config (code to run, kernels to fetch, the kind
    of attention, quantisation) is thereby left out.
    """
    transformers = _transformers()
    _refuse_parts_elsewhere(raw)
    family = raw.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config.json: transformers knows no model_type {family!r}")
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    own = {field.name for field in fields(transformers.CONFIG_MAPPING[family])} - common
    kept = {
        key: _declared(value) if key == "backbone_config" and isinstance(value, dict) else value
        for key, value in raw.items()
        if key in own | LEGACY
    }
    if "use_auxiliary_head" in own:  # it helps training only
        kept["use_auxiliary_head"] = False
    return {"model_type": family, **kept}


def _refuse_parts_elsewhere(raw: Mapping[str, Any]) -> None:
    for key in FETCHED:
        if raw.get(key):
            raise ValueError(
                f"config.json: {key} {raw[key]!r} names a backbone outside of the checkpoint; only "
                "those with a backbone_config are built, and nothing is fetched"
            )
    if str(raw.get("model_type")).startswith("timm"):
        raise ValueError(
            "config.json: the backbone is one of timm, which is not used (it brings torchvision); "
            "export the net to ONNX"
        )
    if raw.get("quantization_config"):
        raise ValueError(
            "config.json: the weights are quantised (quantization_config); "
            "save the checkpoint again in float32"
        )


def _weights(read: Read, names: Callable[[], Iterable[str]]) -> dict[str, Tensor]:
    """Weights by name."""
    whole = read(WHOLE)
    if whole is not None:
        return _tensors(whole, WHOLE)
    index = read(INDEX)
    if index is None:
        found = sorted(names())
        pickled = next((name for name in found if name.endswith((".bin", ".pt", ".pth"))), None)
        raise ValueError(
            (
                f"{pickled} is a pickle: opening it would run what it holds; "
                if pickled
                else f"config.json is there, {WHOLE} is not; "
            )
            + "where the checkpoint can be trusted, load it with transformers and call "
            "model.save_pretrained(folder), which writes safetensors"
        )
    parts = _json(index, INDEX).get("weight_map")
    if type(parts) is not dict:
        raise ValueError(f"{INDEX} has no weight_map; fetch the checkpoint again")
    state: dict[str, Tensor] = {}
    for part in sorted({str(part) for part in parts.values()}):
        data = None if "/" in part or not part.endswith(".safetensors") else read(part)
        if data is None:
            raise ValueError(
                f"{INDEX} names {part!r}, which is no safetensors file of the folder; "
                "fetch the checkpoint again"
            )
        state |= _tensors(data, part)
    return state


def _tensors(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        return tensors.load(data)
    except safetensors.SafetensorError as problem:
        raise ValueError(f"{name} is no safetensors file: {problem}") from problem


def _loaded(about: Any, state: dict[str, Tensor]) -> nn.Module:  # noqa: ANN401 - as above
    """The net with these weights, in float32; transformers knows the names older versions gave."""
    state = {key: value for key, value in state.items() if not key.startswith("auxiliary_head.")}
    with _quiet(), torch.random.fork_rng(devices=[]):
        net, found = _made(
            _family(about).from_pretrained,
            None,
            config=about,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in found[f"{what}_keys"])
        if keys:
            raise ValueError(
                f"the weights do not fit config.json: {len(keys)} {what} ({', '.join(keys[:3])}"
                f"{', ...' if len(keys) > 3 else ''}); fetch the checkpoint again"
            )
    return net.eval()


def _made(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
    """What transformers makes of this, or why it cannot."""
    try:
        return make(*arguments, **options)
    except Exception as problem:  # options that do not go together end in all kinds of errors
        raise ValueError(f"transformers cannot make this net: {problem}") from problem


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of names; what is wrong is raised."""
    log = _transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _sizes(net: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """What sizes the net reads."""
    about = net.config

    def cells(height: int, width: int) -> Size:
        with torch.no_grad():
            h, w = _logits(net, torch.zeros(1, _channels(about), height, width)).shape[-2:]
        return h, w

    patch = _side(_option(about, "patch_size")) or 1
    multiple = patch
    while multiple < HALVINGS:  # a multiple of both in most nets, and not 224 for patches of 14
        multiple *= 2
    side = _side(_option(about, "image_size"))
    return sizes_read(cells, multiple, (side, side) if side else None)


def _option(about: Any, name: str) -> Any:  # noqa: ANN401 - as above
    """An option of the net or of its backbone."""
    found = getattr(about, name, None)
    return getattr(getattr(about, "backbone_config", None), name, None) if found is None else found


def _side(value: object) -> int:
    """One side of a size as transformers writes it: 512, [512, 512] or by name; else 0."""
    if isinstance(value, dict):
        value = list(value.values())
    sides = value if isinstance(value, list | tuple) else [value]
    return min((side for side in sides if type(side) is int), default=0)


def _channels(about: Any) -> int:  # noqa: ANN401 - as above
    return _option(about, "num_channels") or 3


def _input(processor: Mapping[str, Any], about: Any) -> tuple[InputInfo, bool, str]:  # noqa: ANN401
    """How pixels are normalised, whether blue is first, and who says so."""
    try:
        return _normalised(processor, about)
    except (TypeError, ValueError, ZeroDivisionError) as problem:
        raise ValueError(f"preprocessor_config.json cannot be used: {problem}") from problem


def _normalised(
    processor: Mapping[str, Any],
    about: Any,  # noqa: ANN401 - as above
) -> tuple[InputInfo, bool, str]:
    channels, swapped = _channels(about), about.model_type in SWAPPED
    blue_first = bool(processor.get("do_flip_channel_order", swapped))
    white = 255.0  # what a white pixel of 8 bits becomes
    if processor.get("do_rescale", True):
        white *= processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_normalize", not swapped):
        mean, std, source = [0.0] * channels, [1.0] * channels, "none"
    elif "image_mean" in processor and "image_std" in processor:
        mean, std = processor["image_mean"], processor["image_std"]
        source = "preprocessor_config.json"
    else:
        mean, std = IMAGENET_GRAY if channels == 1 else IMAGENET
        source = "ImageNet's mean and deviation; the checkpoint names none"
    if blue_first:  # they are said in the order that the net reads
        mean, std = mean[::-1], std[::-1]
    mean, std = (tuple(float(part) / white for part in values) for values in (mean, std))
    return InputInfo(channels, mean, std), blue_first, source


def _classes(names: Mapping[int, str]) -> tuple[ClassInfo, ...]:
    numbers = sorted(names)
    if len(numbers) < 2 or numbers != list(range(len(numbers))):
        raise ValueError(
            "config.json: id2label must name every score, counted from 0, and at least 2, "
            f"it names {numbers}"
        )
    return tuple(ClassInfo(i, str(names[i]), colour(i)) for i in numbers)


def _tile(processor: Mapping[str, Any], model: Guest) -> TileInfo | None:
    """Tiles of the size that the processor makes: what the net was shown."""
    side = model.max_side or _side(processor.get("size"))
    side -= 0 if model.max_side else side % model.multiple
    return TileInfo(side, side // 8) if side >= 2 * model.multiple else None


def _ignored(about: Any) -> int:  # noqa: ANN401 - as above
    """The label that was left out of training, if masks can hold it beside the classes."""
    said = getattr(about, "semantic_loss_ignore_index", getattr(about, "loss_ignore_index", 255))
    free = isinstance(said, int) and about.num_labels <= said <= 65_535
    return said if free else 255 if about.num_labels <= 255 else 65_535
