"""Encoded bytes to upright pixels, or the reason why not.

What is admitted is decided by content, never by name, and before a pixel is decoded:

======================================= ===================== ====================================
content                                 verdict               decided by
======================================= ===================== ====================================
0 bytes                                 empty                 length
too many bytes, pixels, or a side too   too_large             length; the size in the header, and
long for ``DecodeLimits``                                     again what the decoder makes of it
JPEG PNG TIFF WEBP BMP GIF              decoded               magic bytes; frame or page 0 only
another kind of picture                 unsupported_format    magic bytes (``_OTHER_PICTURES``)
anything else                           not_an_image          no magic bytes of a picture
one of the six, its end missing         truncated             no IEND, EOI or trailer; RIFF length;
                                                              strips beyond the end
one of the six, coded as nobody here    unsupported_format    e.g. lossless JPEG, TIFF of 5 bands
can read
JPEG, its scan shorter than its size    corrupt               simplejpeg, where Pillow fills in gray
one of the six, otherwise refused       corrupt               the decoder's exception
======================================= ===================== ====================================

A JPEG that lacks nothing but its EOI is truncated too: where one byte is missing more may be.
Pixels are what the file stores, made upright (EXIF orientation 1-8; an illegal or unreadable one
counts as 1, XMP is not asked; ICC profiles are not applied):

================================ ======================================== =========================
stored                           values_HWC                               nodata_HW is True where
================================ ======================================== =========================
1 bit                            C=1 uint8, 0 or 255                      the tRNS colour
gray, 2 to 8 bits                C=1 uint8, stretched to 0..255           alpha 0, the tRNS colour
gray, 9 to 16 bits               C=1 uint16 as stored                     the tRNS colour
gray with alpha, 16 bits         C=1 uint8, the high byte                 alpha 0
gray, 32 bits; signed            C=1 uint16, clipped to 0..65535          never
float                            uint16, [0, 1] to 0..65535, clipped      NaN
RGB, RGBA                        C=3 uint8, colours as stored             alpha 0, the tRNS colour
RGB, RGBA, 16 bits               C=3 uint8, the high byte                 alpha 0
RGBA, premultiplied              C=3 uint8, divided by alpha              alpha 0
palette                          C=3 uint8 (C=1: a BMP or GIF gray ramp)  alpha 0
CMYK, YCbCr, LAB                 C=3 uint8, converted to RGB              never
================================ ======================================== =========================

simplejpeg reads JPEG, strictly; whatever it refuses Pillow decides, as it does for all else; a TIFF
that Pillow refuses is tried with tifffile where that needs no codec library.

Memory: the decoder's own picture (Pillow keeps RGB in 4 bytes) plus the answer, which is filled
strip by strip. WebP takes Pillow up to 16 bytes a pixel, but its sides end at 16,383. From 64 Mpx
on, a rotated JPEG is answered as a view and not as a contiguous copy.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import simplejpeg

# Named so that they are registered: Image.open would import all 43 plug-ins to find a missing one.
from PIL import (  # noqa: F401 - importing a plug-in registers it
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.errors import ImageRejected
from pipeline.headers import (
    FIRST_LYING,
    Header,
    foreign_picture,
    orientation_of,
    read_header,
    sniff,
)
from pipeline.records import Array, Pixels
from pipeline.scaling import Size

# Once for the process, because per call neither can be done safely in threads: our limits replace
# Pillow's two, and what a decoder wants to say about a picture is said by its verdict.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_HEAD = 1024  # bytes looked at for magic; SVG may start with comments, ustar lies at 257
_STRIP = 1 << 20  # pixels converted at a time
_VIEW_FROM = 64_000_000  # pixels from which a rotated JPEG is not copied


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused as too large, before a pixel is decoded."""

    max_bytes: int = 512 << 20
    """Encoded size of one image."""
    max_pixels: int = 256_000_000
    """Height times width."""
    max_side: int = 65_535
    """Height, and width."""

    def admit(self, height: int, width: int) -> bool:
        """Whether a picture of this size is not too large."""
        return max(height, width) <= self.max_side and height * width <= self.max_pixels


Reads = Callable[[Size], Size]
"""The size at which an upright picture of this one is read."""
Decoder = Callable[[bytes, Header | None, DecodeLimits, Reads | None], Pixels]


# ------------------------------------------------------------------------------ what is let in


def _admitted(data: bytes, limits: DecodeLimits) -> str:
    """Name the kind of picture, or reject what is none of ours."""
    if not data:
        raise ImageRejected("decode", "empty", "0 bytes")
    if len(data) > limits.max_bytes:
        detail = f"{len(data)} bytes, above the limit of {limits.max_bytes}"
        raise ImageRejected("decode", "too_large", detail)
    head = bytes(data[:_HEAD])
    kind = sniff(head)
    if kind is not None and kind in _DECODERS:
        return kind
    other = foreign_picture(head)
    if other or data[-18:-2] == b"TRUEVISION-XFILE":
        raise ImageRejected("decode", "unsupported_format", f"{other or 'TGA'} is not decoded")
    detail = f"begins with {head[:16]!r}, which no picture does"
    raise ImageRejected("decode", "not_an_image", detail)


def _check_size(height: int, width: int, limits: DecodeLimits) -> None:
    if height <= 0 or width <= 0:
        raise ImageRejected("decode", "corrupt", f"{width} x {height} pixels")
    if not limits.admit(height, width):
        detail = f"{width} x {height} pixels, above the limit of {limits.max_pixels} in all "
        raise ImageRejected("decode", "too_large", f"{detail}or {limits.max_side} a side")


# ---------------------------------------------------------------------------------- decoding


def decode(data: bytes, limits: DecodeLimits, reads: Reads | None = None) -> Pixels:
    """Decode one picture by the rules above.

    Args:
        data: the whole file.
        limits: what is refused as too large.
        reads: the size to which it will be scaled down. A JPEG much larger than that is decoded
            smaller, by its own cosines: to a half, a quarter or less, yet twice that size at least.

    Returns:
        The upright picture.

    Raises:
        ImageRejected: whatever is wrong with the picture.
    """
    kind = _admitted(data, limits)
    header = read_header(data, kind)
    if header is not None:
        _check_size(header.height, header.width, limits)
    elif kind == "GIF":
        raise _verdict(data, kind, header, ["no frame among the first blocks"])
    refusals = []
    for decoder in _DECODERS[kind]:
        try:
            return decoder(data, header, limits, reads)
        except (ImageRejected, MemoryError):
            raise
        except Exception as refusal:  # noqa: BLE001 Pillow alone has nine classes of refusal
            refusals.append(f"{type(refusal).__name__}: {refusal}")
    raise _verdict(data, kind, header, refusals)


def _verdict(data: bytes, kind: str, header: Header | None, refusals: list[str]) -> ImageRejected:
    """Find the reason behind what the decoders of this kind had to say."""
    said = re.sub(r"<_io\.BytesIO[^>]*>", kind, "; ".join(refusals))  # has an address in it
    if "Decompressed data too large" in said:
        return ImageRejected("decode", "too_large", said)
    if header is not None and header.needs:
        return ImageRejected("decode", "unsupported_format", f"{header.needs}; {said}")
    if re.search("unsupported", said, re.IGNORECASE) or _is_beyond(said):
        return ImageRejected("decode", "unsupported_format", said)
    if _IS_CUT[kind](data) or (kind in _SAID_CUT and re.search("truncat", said, re.IGNORECASE)):
        return ImageRejected("decode", "truncated", f"{kind} ends early; {said}")
    return ImageRejected("decode", "corrupt", said)


def _is_beyond(said: str) -> bool:
    """Whether no decoder knows this coding; libtiff's own "decoder error" means that it does."""
    return "NotImplementedError" in said and "decoder error" not in said


_SAID_CUT = ("BMP", "TIFF")  # no end to look for, so the decoder's word is taken
_IS_CUT: dict[str, Callable[[bytes], bool]] = {
    "JPEG": lambda data: data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"),  # EOI after SOS
    "PNG": lambda data: b"IEND" not in data,
    "TIFF": lambda data: _tiff_directory(data) >= len(data),
    "WEBP": lambda data: int.from_bytes(data[4:8], "little") + 8 > len(data),
    "BMP": lambda data: len(data) < 54,
    "GIF": lambda data: not data.rstrip(b"\0").endswith(b";"),
}


def _tiff_directory(data: bytes) -> int:
    return int.from_bytes(data[4:8], "big" if data[:1] == b"M" else "little")


def _by_simplejpeg(
    data: bytes, header: Header | None, limits: DecodeLimits, reads: Reads | None
) -> Pixels:
    stored_height, stored_width, colours, _ = simplejpeg.decode_jpeg_header(data)
    height, width = int(stored_height), int(stored_width)
    _check_size(height, width, limits)
    if colours not in _SIMPLE_COLOURS:
        raise ValueError(f"{colours} is left to Pillow")
    orientation = header.orientation if header else 1
    try:
        least = _least((height, width), orientation, reads)
        values = simplejpeg.decode_jpeg(
            data,
            _SIMPLE_COLOURS[colours],
            min_height=least[0],
            min_width=least[1],
            min_factor=1 if least == _ALL else 2,
        )
    except ValueError as refusal:
        if _RAN_OUT in str(refusal):
            raise ImageRejected("decode", "corrupt", f"ValueError: {refusal}") from refusal
        raise
    upright = _turned(values, orientation)
    if height * width < _VIEW_FROM:
        upright = np.ascontiguousarray(upright)
    if values.shape[:2] == (height, width):
        return Pixels(upright, None)
    return Pixels(
        upright, None, (width, height) if orientation in _ON_ITS_SIDE else (height, width)
    )


def _least(stored: Size, orientation: int, reads: Reads | None) -> Size:
    """What a JPEG must keep of its size, so that a triangle still has two pixels a side to weigh.

    Twice the wanted size is what Pillow's `thumbnail` keeps, too (its `reducing_gap`).
    """
    if reads is None:
        return _ALL
    turned = orientation in _ON_ITS_SIDE
    height, width = reads((stored[1], stored[0]) if turned else stored)
    if turned:
        height, width = width, height
    least = GAP * height, GAP * width
    if min(stored[0] / least[0], stored[1] / least[1]) < 2:
        return _ALL
    return least


GAP = 2
_ALL = (0, 0)  # no less than everything
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})


_RAN_OUT = "premature end of data segment"  # Pillow would answer with gray for what is missing
_SIMPLE_COLOURS = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}


def _by_pillow(kind: str) -> Decoder:
    def decoder(
        data: bytes, header: Header | None, limits: DecodeLimits, _: Reads | None
    ) -> Pixels:
        with Image.open(BytesIO(data), formats=[kind]) as image:
            _check_size(image.height, image.width, limits)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                tile = image.tag_v2.get(_TILE_HEIGHT, 1), image.tag_v2.get(_TILE_WIDTH, 1)
                _check_size(*tile, limits)  # a small picture may lie in a huge tile
            meaning = _meaning(image)
            image.load()
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                orientation = 1  # Pillow has applied it
            elif kind == "JPEG":
                orientation = header.orientation if header else 1
            else:
                orientation = orientation_of(_exif(image))
            strips = (_separated(strip, meaning) for strip in _strips(image))
            return _assembled(strips, image.height, image.width, orientation)

    return decoder


def _exif(image: Image.Image) -> bytes:
    """Find the EXIF of a PNG or WebP, be it a chunk or, as ImageMagick had it, hex in a text."""
    exif = image.info.get("exif")
    lines = str(image.info.get("Raw profile type exif", "")).split("\n")[3:]
    try:
        return exif if isinstance(exif, bytes) else bytes.fromhex("".join(lines))
    except ValueError:  # broken EXIF is none
        return b""


def _by_tifffile(
    data: bytes, _header: Header | None, limits: DecodeLimits, _reads: Reads | None
) -> Pixels:
    import tifffile  # 0.2 s, and only a TIFF that Pillow refuses needs it

    with tifffile.TiffFile(BytesIO(data)) as tiff:
        page = tiff.pages.first
        _check_size(page.imagelength, page.imagewidth, limits)
        _check_size(page.tilelength or 1, page.tilewidth or 1, limits)
        ends = (
            at + count for at, count in zip(page.dataoffsets, page.databytecounts, strict=False)
        )
        if max(ends, default=0) > len(data):
            raise ImageRejected("decode", "truncated", "TIFF strips lie beyond the end")
        _check_layout(page)
        stored = page.asarray()
        if "S" in page.axes:
            stored = np.moveaxis(stored, page.axes.index("S"), -1)
        stored_HWC = stored.reshape(page.imagelength, page.imagewidth, -1)
        with_alpha = bool(page.extrasamples) and page.extrasamples[0] in (1, 2)
    height, width = stored_HWC.shape[:2]
    strips = (
        _scaled(stored_HWC[top:end], with_alpha=with_alpha) for top, end in _rows(height, width)
    )
    return _assembled(strips, height, width, orientation_of(data))


def _check_layout(page) -> None:  # noqa: ANN001 a tifffile.TiffPage, which is not imported here
    """Let through what needs no codec library, so that the answer does not depend on one."""
    plain = page.compression in (1, 8, 32946) and page.predictor in (1, 2)  # none, deflate; delta
    bands = {1: (1, 2), 2: (3, 4)}.get(page.photometric, ())  # gray from black, RGB
    shaped = page.samplesperpixel in bands and page.axes in ("YX", "YXS", "SYX")
    if plain and shaped and page.dtype is not None and page.dtype.kind in "buif":
        return
    detail = (
        f"TIFF of {page.samplesperpixel} x {page.dtype}, photometric {page.photometric}, "
        f"compression {page.compression}, predictor {page.predictor}"
    )
    known = "" if page.compression in _LIBTIFF_CODECS else "unsupported "
    raise NotImplementedError(known + detail)


_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags
_LIBTIFF_CODECS = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32809, 32946, 34676, 34677, 34925, 50000}

_DECODERS: dict[str, tuple[Decoder, ...]] = {
    "JPEG": (_by_simplejpeg, _by_pillow("JPEG")),
    "PNG": (_by_pillow("PNG"),),
    "TIFF": (_by_pillow("TIFF"), _by_tifffile),
    "WEBP": (_by_pillow("WEBP"),),
    "BMP": (_by_pillow("BMP"),),
    "GIF": (_by_pillow("GIF"),),
}
"""The decoders of a kind, in order: the first that succeeds answers."""


# ------------------------------------------------------------------------ samples to channels


def _rows(height: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        yield top, min(height, top + step)


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Cut a loaded picture, so that converting it costs a strip and not a copy."""
    for top, end in _rows(image.height, image.width):
        whole = end - top == image.height
        yield image if whole else image.crop((0, top, image.width, end))


_CONVERTED = {
    "1": "L", "LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA",
    "RGBX": "RGB", "RGB": "RGB", "CMYK": "RGB", "YCbCr": "RGB",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Meaning:
    """How samples are to be read that Pillow hands out as they lie in the file."""

    key: tuple[int, ...] | None
    """The one transparent value of a picture without alpha (PNG tRNS)."""
    unsigned: bool
    """Whether 32-bit samples, which Pillow takes as signed, are not."""


def _meaning(image: ImageFile.ImageFile) -> _Meaning:
    """Ask a picture that is not yet loaded; loading forgets how samples are stored."""
    args = image.tile[0].args if image.tile else None
    stored = str(args[0] if isinstance(args, tuple) and args else args)
    key = image.info.get("transparency") if image.mode in ("1", "L", "I;16", "RGB") else None
    if isinstance(key, int):
        # Pillow stretches 2 and 4 bits to 8, but leaves their key as it is.
        key = (key * {"L;2": 85, "L;4": 17}.get(stored, 1),)
    if stored.startswith("RGB;16"):
        key = None  # means 16 bits, of which 8 are left
    return _Meaning(key, stored == "I;32N")


def _separated(strip: Image.Image, meaning: _Meaning) -> Pixels:
    """Part the colours of a strip from what says that there are none."""
    if strip.mode == "P":
        strip = strip.convert("RGBA" if strip.has_transparency_data else "RGB")
    elif strip.mode == "LAB":
        strip = _rgb_of_lab(strip)
    elif _CONVERTED.get(strip.mode, strip.mode) != strip.mode:
        strip = strip.convert(_CONVERTED[strip.mode])
    samples = np.asarray(strip)
    if meaning.unsigned:
        samples = samples.view(np.uint32)
    samples_HWC = samples.reshape(strip.height, strip.width, -1)
    pixels = _scaled(samples_HWC, with_alpha=strip.mode.endswith("A"))
    if meaning.key is None:
        return pixels
    return Pixels(pixels.values_HWC, (pixels.values_HWC == meaning.key).all(axis=2))


def _rgb_of_lab(strip: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB").apply(strip)


def _scaled(samples_HWC: Array, *, with_alpha: bool) -> Pixels:
    """Bring samples of any type to the uint8 or uint16 of the table above."""
    nodata_HW: Array | None = None
    deep_colour = samples_HWC.dtype.kind == "u" and samples_HWC.dtype.itemsize == 2  # 16 bits
    deep_colour = deep_colour and samples_HWC.shape[2] > 1
    if with_alpha:
        nodata_HW = samples_HWC[..., -1] == 0
        samples_HWC = samples_HWC[..., :-1]
    if deep_colour:
        values_HWC = (samples_HWC >> 8).astype(np.uint8)
    elif samples_HWC.dtype.kind == "b":
        values_HWC = samples_HWC * np.uint8(255)
    elif samples_HWC.dtype.kind == "f":
        missing_HWC = np.isnan(samples_HWC)
        missing_HW = np.logical_or.reduce(missing_HWC, axis=2)
        nodata_HW = missing_HW if nodata_HW is None else missing_HW | nodata_HW
        unit_HWC = np.clip(np.where(missing_HWC, 0, samples_HWC), 0, 1).astype(np.float64)
        values_HWC = np.rint(unit_HWC * 65535).astype(np.uint16)
    elif samples_HWC.dtype in (np.uint8, np.dtype("<u2"), np.dtype(">u2")):
        values_HWC = samples_HWC
    else:
        values_HWC = np.clip(samples_HWC, 0, 65535).astype(np.uint16)
    return Pixels(values_HWC, nodata_HW)


# -------------------------------------------------------------------------------- orientation

_UNDONE_BY = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # quarter turns undo each other


def _turned(stored_HW: Array, orientation: int) -> Array:
    """View a stored picture upright, by its EXIF orientation."""
    if orientation >= FIRST_LYING:
        stored_HW = stored_HW.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        stored_HW = stored_HW[::-1]
    if orientation in (2, 3, 6, 7):
        stored_HW = stored_HW[:, ::-1]
    return stored_HW


def _assembled(strips: Iterable[Pixels], height: int, width: int, orientation: int) -> Pixels:
    """Write strips, top to bottom as stored, into an upright picture."""
    undo = _UNDONE_BY[orientation]
    size = (width, height) if orientation >= FIRST_LYING else (height, width)
    values_HWC = nodata_HW = None
    top = 0
    for strip in strips:
        end = top + strip.height
        if values_HWC is None:
            dtype = strip.values_HWC.dtype.newbyteorder("=")
            values_HWC = np.empty((*size, strip.values_HWC.shape[2]), dtype)
        _turned(values_HWC, undo)[top:end] = strip.values_HWC
        if strip.nodata_HW is not None and strip.nodata_HW.any():
            nodata_HW = np.zeros(size, bool) if nodata_HW is None else nodata_HW
            _turned(nodata_HW, undo)[top:end] = strip.nodata_HW
        top = end
    if values_HWC is None:
        raise ImageRejected("decode", "corrupt", f"{width} x {height} pixels")
    return Pixels(values_HWC, nodata_HW)
