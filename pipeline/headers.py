"""What the first bytes of a file say: its kind, size and orientation, without decoding a pixel."""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_MOST_SEGMENTS = 10_000  # JPEG markers before the picture; a hostile file could have 10^8
_MOST_BLOCKS = 100_000  # GIF blocks before the first frame; 25 MB of comments


FIRST_LYING = 5
"""Orientations from here to 8 swap height and width."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes say, without a decoder."""

    height: int
    width: int
    orientation: int = 1
    needs: str = ""
    """What the picture needs that no decoder here offers."""


# --------------------------------------------------------------------------- what kind is it?

_ADMITTED = (
    (0, rb"\xff\xd8\xff", "JPEG"),
    (0, rb"\x89PNG\r\n\x1a\n", "PNG"),
    (0, rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0", "TIFF"),
    (0, rb"RIFF.{4}WEBP", "WEBP"),
    (0, rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    (0, rb"GIF8[79]a", "GIF"),
    (257, rb"ustar", "TAR"),
    (0, rb"PAR1", "PARQUET"),
)
_OTHER_PICTURES = (
    (0, rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (0, rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
    (0, rb"II\xbc\x01", "JPEG XR"),
    (4, rb"ftyp(?:hei[cfsxm]|hev[cx]|mif1|msf1|avi[fs])", "HEIC or AVIF"),
    (0, rb"8BPS", "PSD"),
    (0, rb"gimp xcf", "XCF"),
    (0, rb"%!PS|\xc5\xd0\xd3\xc6", "EPS"),
    (0, rb"\0\0[\x01\x02]\0[^\0]\0", "ICO or CUR"),
    (0, rb"icns", "ICNS"),
    (0, rb"P[1-7Ff]\s|Pf\s", "PNM"),
    (0, rb"\x0a[\0\x02-\x05][\0\x01][\x01\x02\x04\x08]", "PCX"),
    (0, rb"DDS ", "DDS"),
    (0, rb"qoif", "QOI"),
    (0, rb"v/1\x01", "OpenEXR"),
    (0, rb"#\?R(?:ADIANCE|GBE)", "Radiance HDR"),
    (0, rb"SIMPLE  =", "FITS"),
    (0, rb"\x01\xda[\0\x01][\x01\x02]", "SGI"),
    (0, rb"\x59\xa6\x6a\x95", "Sun raster"),
    (0, rb"[\x8a\x8b][MJ]NG\r\n", "MNG or JNG"),
    (0, rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "WMF or EMF"),
    (4, rb"[\x11\x12]\xaf", "FLI"),
    (0, rb"AT&TFORM", "DjVu"),
    (0, rb"BLP[12]", "BLP"),
    (0, rb"/\* XPM \*/|#define \S+_width ", "XPM or XBM"),
    (128, rb"DICM", "DICOM"),
    (0, rb"(?:\xef\xbb\xbf)?\s*<(?:svg|[?!].*?<svg)[\s>]", "SVG"),
    (0, rb"BM.{4}\0\0\0\0", "BMP with an unknown header"),
    (0, rb"\x28\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0", "DIB"),
    (0, rb".(?:\x01[\x01\x09]|\0[\x02\x03\x0a\x0b]).{13}[\x08\x0f\x10\x18\x20]", "TGA"),
)


def sniff(head: bytes) -> str | None:
    """Name the kind of file from its first bytes.

    Args:
        head: at least 18 bytes; 262 to recognise a tar.

    Returns:
        JPEG, PNG, TIFF, WEBP, BMP, GIF, TAR or PARQUET; None for anything else.
    """
    return _named(head, _ADMITTED)


def foreign_picture(head: bytes) -> str | None:
    """Name the kind of picture that no decoder here reads, from its first bytes."""
    return _named(head, _OTHER_PICTURES)


def _named(head: bytes, table: tuple[tuple[int, bytes, str], ...]) -> str | None:
    for offset, magic, name in table:
        if re.compile(magic, re.DOTALL).match(head, offset):  # compiled once, by re's own cache
            return name
    return None


# ------------------------------------------------------------------------ what the header says


def probe(head: bytes) -> tuple[int, int] | None:
    """Read height and width cheaply, to choose a slot; nothing is promised about the rest.

    Args:
        head: the first bytes of the file, 64 KiB at most.

    Returns:
        Height and width, upright for JPEG and TIFF and as stored for the others; None where the
        head does not say.
    """
    kind = sniff(head)
    header = read_header(head, kind) if kind is not None and kind in _PARSERS else None
    if header is None or header.height <= 0 or header.width <= 0:
        return None
    if header.orientation >= FIRST_LYING:
        return header.width, header.height
    return header.height, header.width


def read_header(data: bytes, kind: str) -> Header | None:
    """Read the header of a picture of one of the six kinds; None where it ends too early."""
    try:
        return _PARSERS[kind](data)
    except struct.error:  # the bytes end before the header does
        return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of the segments before the first scan."""
    at = 2
    for _ in range(_MOST_SEGMENTS):
        if data[at : at + 1] != b"\xff":
            return
        marker = data[at + 1] if at + 1 < len(data) else _START_OF_SCAN
        if marker == _START_OF_SCAN:
            return
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


_START_OF_SCAN = 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}  # SOF0-15, JPEG-LS
_COMMON_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; arithmetic


def jpeg_header(data: bytes) -> Header | None:
    """Read size, orientation and coding of a JPEG."""
    orientation = 1
    for marker, content in _jpeg_segments(data):
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            orientation = orientation_of(content)
        elif marker in _FRAMES:
            bits, height, width = struct.unpack_from(">BHH", content)
            common = bits == 8 and marker in _COMMON_FRAMES
            needs = "" if common else f"JPEG process {marker:#x} with {bits} bits"
            return Header(height, width, orientation, needs)
    return None


def _png_header(data: bytes) -> Header | None:
    if data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return Header(height, width)


def _gif_header(data: bytes) -> Header | None:
    """Walk to the first frame: it may exceed the screen, and Pillow fills it when opening."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    within = False  # an extension, whose blocks begin with their length and end with an empty one
    for _ in range(_MOST_BLOCKS):
        (byte,) = struct.unpack_from("B", data, at)
        if within:
            at, within = at + 1 + byte, byte > 0
        elif byte == _GIF_FRAME:
            left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
            return Header(max(height, top + down), max(width, left + across))
        else:
            within = byte == _GIF_EXTENSION
            at += 2 if within else 1
    return None


_GIF_FRAME, _GIF_EXTENSION = 0x2C, 0x21


def _bmp_header(data: bytes) -> Header:
    old = data[14] == 12  # OS/2
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return Header(abs(height), width)


def _webp_header(data: bytes) -> Header | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return Header((high_h << 16 | low_h) + 1, (high_w << 16 | low_w) + 1)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(height & 0x3FFF, width & 0x3FFF)
    return None


def _tiff_header(data: bytes) -> Header | None:
    tags = _tags(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        return None
    return Header(tags[_HEIGHT], tags[_WIDTH], orientation_of(data))


_PARSERS: dict[str, Callable[[bytes], Header | None]] = {
    "JPEG": jpeg_header,
    "PNG": _png_header,
    "TIFF": _tiff_header,
    "WEBP": _webp_header,
    "BMP": _bmp_header,
    "GIF": _gif_header,
}

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274  # TIFF tags
_LAST_ORIENTATION = 8
_TAG_TYPES = {3: "H", 4: "I"}  # SHORT and LONG; nothing else holds a size or an orientation


def _tags(tiff: bytes) -> dict[int, int]:
    """Read the single-valued tags of the first directory, as far as the bytes go."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    tags: dict[int, int] = {}
    if order is None:
        return tags
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", tiff, at)
            if number == 1 and kind in _TAG_TYPES:
                (tags[tag],) = struct.unpack_from(order + _TAG_TYPES[kind], tiff, at + 8)
    except struct.error:  # a directory that leads nowhere says nothing more
        return tags
    return tags


def orientation_of(exif: bytes) -> int:
    """Read the EXIF orientation; 1 where there is none, or none that is legal."""
    tag = _tags(exif.removeprefix(b"Exif\0\0")).get(_ORIENTATION, 1)
    return tag if 1 <= tag <= _LAST_ORIENTATION else 1
