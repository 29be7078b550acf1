"""A network in an ONNX file, run by onnxruntime.

Source: onnx.ai, operators as onnxruntime knows them; none of anybody's own.

Unusual: the weights of the bundle are the file itself, as one tensor of bytes, so that a run folder
holds all it needs. The file must be whole: tensors that lie in other files would be read from
wherever it says. It scores [N, C, H, W] float32 pictures as [N, K, h, w]; what it does not say of
itself are defaults (`Said`). On the CPU it has one thread, like every other model here.

Shapes: B batch, C input channels, H W padded input, K classes, h w native grid.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

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
    from collections.abc import Iterator, Mapping

    from models.parts.network import Size

HALVINGS = 32  # most encoders halve a side five times
PREFIX = "maskfleet."
EXTERNAL = 1  # TensorProto.DataLocation.EXTERNAL


@dataclass(frozen=True, kw_only=True)
class Config(GuestConfig):
    """A file's network."""

    nbytes: int = 0
    """Bytes of the file."""


def build(config: Config) -> Guest:
    """A net without a file: `load_state_dict` gives it one."""
    return Onnx(config)


class Onnx(Guest):
    """A net that onnxruntime runs."""

    compiles = False

    onnx: Tensor
    """The file, uint8."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("onnx", torch.zeros(config.nbytes, dtype=torch.uint8))
        self._sessions: dict[str, Any] = {}

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Logits_BKhw, from its own float32 whatever the pictures are in."""
        session = self._sessions.get(str(x_BCHW.device))
        if session is None:  # two threads may both open one: the second stays, both are right
            session = _session(self.onnx.cpu().numpy().tobytes(), x_BCHW.device)
            self._sessions[str(x_BCHW.device)] = session
        return _answer(session, x_BCHW)

    def __getstate__(self) -> dict[str, Any]:  # copies open their own
        return {**self.__dict__, "_sessions": {}}


def _answer(session: Any, x_BCHW: Tensor) -> Tensor:  # noqa: ANN401 - onnxruntime's session
    """The first output for pictures of one size."""
    given = session.get_inputs()[0]
    pictures = x_BCHW.detach().float().cpu().contiguous().numpy()
    step = given.shape[0] if isinstance(given.shape[0], int) else len(pictures)
    if step not in (1, len(pictures)):
        raise ValueError(
            f"the file reads batches of {step} and nothing else; export it with a batch of 1 or "
            "with a dynamic first axis"
        )
    name = session.get_outputs()[0].name
    try:
        answers = [
            session.run([name], {given.name: pictures[start : start + step]})[0]
            for start in range(0, len(pictures), step)
        ]
    except Exception as problem:
        if "allocate memory" in str(problem):  # onnxruntime has no type for it
            raise MemoryError(str(problem)) from problem
        raise
    return torch.from_numpy(np.concatenate(answers)).to(x_BCHW)


def _session(data: bytes, device: torch.device) -> Any:  # noqa: ANN401 - onnxruntime's session
    """The file, ready to run.

    Raises:
        ValueError: it is not one, or not whole.
    """
    _parsed(data)
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.enable_mem_pattern = False  # its plans are kept for every size that is seen
    options.log_severity_level = 4  # only what ends it; errors are raised as well
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return runtime.InferenceSession(data, options, providers=providers)
    except Exception as problem:
        raise ValueError(f"onnxruntime cannot run the file: {problem}") from problem


def _needed(package: str) -> Any:  # noqa: ANN401 - a module
    from importlib import import_module

    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"an ONNX file needs {error.name}, which is not installed here: "
            "pip install 'maskfleet[onnx]', on every machine that segments"
        ) from error


def _parsed(data: bytes) -> Any:  # noqa: ANN401 - onnx.ModelProto
    """What the file says.

    Raises:
        ValueError: it is no ONNX file, or its tensors lie in other files.
    """
    onnx = _needed("onnx")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as problem:
        raise ValueError(f"this is no ONNX file: {problem}") from problem
    for tensor in _tensors(model, onnx.TensorProto):
        if tensor.data_location == EXTERNAL or tensor.external_data:
            raise ValueError(
                f"tensor {tensor.name!r} lies in another file, which is not read; save the model "
                "in one file (onnx.save_model(model, path, save_as_external_data=False))"
            )
    return model


def _tensors(message: Any, kind: type) -> Iterator[Any]:  # noqa: ANN401 - protobuf messages
    """Every tensor in a message, however deep: in graphs, functions and attributes of nodes."""
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "append") else [value]:
                yield from _tensors(part, kind)


# ------------------------------------------------------------------------------------- conversion


@dataclass(frozen=True, slots=True)
class Said:
    """What a file says of itself, in its metadata_props, each as JSON."""

    classes: tuple[ClassInfo, ...] | None = None
    """`maskfleet.classes`: a name for each score, or {"id", "name", "color"}."""
    mean: tuple[float, ...] | None = None
    """`maskfleet.mean`: per channel, where black is 0 and white is 1; default: ImageNet's."""
    std: tuple[float, ...] | None = None
    """`maskfleet.std`: the same."""
    multiple: int = HALVINGS
    """`maskfleet.multiple`: what sides are padded to multiples of."""


def bundle_of(data: bytes) -> tuple[bytes, bytes]:
    """`model.json` and `weights.safetensors` of an ONNX file.

    Raises:
        ValueError: it is not one, or not one of scores for every pixel.
    """
    model = _parsed(data)
    said = _said({entry.key: entry.value for entry in model.metadata_props})
    session = _session(data, torch.device("cpu"))
    channels, fixed = _reads(session)
    classes: set[int] = set()

    def cells(height: int, width: int) -> Size:
        scores = _answer(session, torch.zeros(1, channels, height, width))
        if scores.ndim != 4:
            raise ValueError(f"the first output has shape {tuple(scores.shape)}, not [N, K, h, w]")
        classes.add(scores.shape[1])
        return scores.shape[2], scores.shape[3]

    sizes: dict[str, Any] = sizes_read(cells, said.multiple, fixed)
    if len(classes) != 1:
        raise ValueError(f"the file gives {sorted(classes)} scores, depending on the size")
    config = Config(channels=channels, classes=classes.pop(), nbytes=len(data), **sizes)
    net = Onnx(config)
    net.load_state_dict({"onnx": torch.frombuffer(bytearray(data), dtype=torch.uint8)})
    side, named = net.max_side, _named(said.classes, config.classes)
    card = Bundle(
        architecture="onnx",
        config=config.to_json(),
        classes=named,
        input=_input(said, channels),
        stride=net.stride,
        receptive_field=None,
        tile=None if side is None else TileInfo(side, side // 8),
        ignore_id=255 if all(entry.id < 255 for entry in named) else 65_535,
        provenance={
            "from": "an ONNX file",
            "producer": f"{model.producer_name} {model.producer_version}".strip(),
            "normalisation": (
                "the file's metadata"
                if said.mean and said.std
                else "ImageNet's mean and deviation; the file names none"
            ),
        },
        metrics={},
    )
    return as_bytes(net, card)


def _reads(session: Any) -> tuple[int, Size | None]:  # noqa: ANN401 - onnxruntime's session
    """Channels, and height and width if they are fixed."""
    inputs = session.get_inputs()
    shape, kind = (inputs[0].shape, inputs[0].type) if len(inputs) == 1 else ([], "")
    if len(shape) != 4 or kind != "tensor(float)" or shape[1] not in (1, 3):
        said = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
        raise ValueError(
            f"the file reads {said}; it must read one float32 [N, C, H, W] of 1 or 3 channels"
        )
    height, width = (side if isinstance(side, int) else None for side in shape[2:])
    if (height is None) != (width is None):
        raise ValueError(f"the file reads {shape}; export it with both sides dynamic, or both not")
    return shape[1], None if height is None or width is None else (height, width)


def _said(metadata: Mapping[str, str]) -> Said:
    """The keys that are meant for us, checked."""
    values: dict[str, Any] = {}
    for key, text in metadata.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            if name not in KEYS:
                raise ValueError(f"metadata: there is no key {key!r}{did_you_mean(name, KEYS)}")
            try:
                values[name] = KEYS[name](json.loads(text))
            except (AttributeError, KeyError, TypeError, ValueError) as problem:
                raise ValueError(f"metadata: {key} is {text!r}: {problem}") from problem
    return Said(**values)


def _numbers(value: Any) -> tuple[float, ...]:  # noqa: ANN401 - raw JSON
    return tuple(float(part) for part in value)


def _count(value: Any) -> int:  # noqa: ANN401 - raw JSON
    if type(value) is not int or value < 1:
        raise ValueError("it must be a whole number, 1 or more")
    return value


def _classes(value: Any) -> tuple[ClassInfo, ...]:  # noqa: ANN401 - raw JSON
    return tuple(_class(number, entry) for number, entry in enumerate(value))


def _class(number: int, entry: Any) -> ClassInfo:  # noqa: ANN401 - raw JSON
    if isinstance(entry, str):
        return ClassInfo(number, entry, colour(number))
    red, green, blue = entry.get("color", colour(number))
    return ClassInfo(int(entry.get("id", number)), str(entry["name"]), (red, green, blue))


KEYS = {"classes": _classes, "mean": _numbers, "std": _numbers, "multiple": _count}


def _named(said: tuple[ClassInfo, ...] | None, count: int) -> tuple[ClassInfo, ...]:
    if said is None:
        return tuple(ClassInfo(i, f"class {i}", colour(i)) for i in range(count))
    if len(said) != count:
        raise ValueError(
            f"metadata: {PREFIX}classes names {len(said)}, the file gives {count} scores"
        )
    return said


def _input(said: Said, channels: int) -> InputInfo:
    mean, std = IMAGENET_GRAY if channels == 1 else IMAGENET
    return InputInfo(channels, said.mean or mean, said.std or std)
