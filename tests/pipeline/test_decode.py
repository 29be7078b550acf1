"""Bytes to upright pixels, or one of the reasons why not."""

import io
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import DecodeLimits, decode
from pipeline.errors import REASONS, ImageRejected
from pipeline.headers import probe, sniff
from tests import hostile
from tests.pictures import (
    blobs,
    encoded,
    exif_of,
    parquet_of,
    saved,
    tar_of,
    turned,
    with_orientation,
)

# What Pillow says about odd pictures: ignored by pipeline.decode, made errors again by pytest.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LIMITS = DecodeLimits()
PICTURE = blobs(48, 64, seed=1)
BLOCKS = np.kron(
    np.arange(24, dtype=np.uint8).reshape(4, 6)[..., None] * [7, 9, 10], np.ones((8, 8, 1))
)
BLOCKS = BLOCKS.astype(np.uint8)  # constant in every 8 x 8 block, so that JPEG keeps it exactly
IMAGE = Image.fromarray(PICTURE)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")


def rejection(data, limits=LIMITS):
    with pytest.raises(ImageRejected) as caught:
        decode(data, limits)
    return caught.value


def outcome(data) -> str:
    """``done``, or the reason of the rejection; anything else that is raised fails the test."""
    try:
        pixels = decode(data, LIMITS)
    except ImageRejected as refused:
        return refused.reason
    assert pixels.values_HWC.dtype in (np.uint8, np.uint16)
    assert pixels.values_HWC.shape[2] in (1, 3)
    return "done"


# -------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_known_by_its_content(kind):
    data = encoded(PICTURE, kind)
    assert sniff(data[:18]) == kind
    assert probe(data[:65536]) == (48, 64)
    assert decode(data, LIMITS).values_HWC.shape == (48, 64, 3)


def test_containers_are_known_by_their_content():
    assert sniff(tar_of({"a.jpg": b"x"})[:512]) == "TAR"
    assert sniff(parquet_of([b"x", None])[:16]) == "PARQUET"


@pytest.mark.parametrize("head", [b"", b"\x89", b"BMW is a maker of cars", b"GIF", bytes(300)])
def test_what_is_no_picture_has_no_kind_and_no_size(head):
    assert sniff(head) is None
    assert probe(head) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_probing_a_cut_head_never_raises(kind):
    data = encoded(PICTURE, kind)
    sizes = {probe(data[:length]) for length in range(min(len(data), 400))}
    assert sizes <= {None, (48, 64)}


@pytest.mark.parametrize("options", [{"lossless": True}, {"exif": exif_of(1)}, {}])
def test_every_kind_of_webp_tells_its_size(options):
    assert probe(encoded(PICTURE, "WEBP", **options)[:64]) == (48, 64)


def test_a_jpeg_with_a_long_preamble_tells_no_size_but_decodes():
    data = encoded(PICTURE, "JPEG")
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    data = data[:2] + comment * 2 + data[2:]
    assert probe(data[:65536]) is None
    assert decode(data, LIMITS).values_HWC.shape == (48, 64, 3)


REFUSED = {
    "nothing": (b"", "empty"),
    "text": (b"hello, this is a text", "not_an_image"),
    "pdf": (b"%PDF-1.7\n1 0 obj", "not_an_image"),
    "tar": (tar_of({"a.jpg": encoded(PICTURE, "JPEG")}), "not_an_image"),
    "svg": (b"<?xml version='1.0'?><svg xmlns='x'></svg>", "unsupported_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
    "psd": (b"8BPS\0\1" + bytes(40), "unsupported_format"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "unsupported_format"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "unsupported_format"),
    "ico": (saved(IMAGE, "ICO"), "unsupported_format"),
    "tga": (saved(IMAGE, "TGA"), "unsupported_format"),
    "ppm": (saved(IMAGE, "PPM"), "unsupported_format"),
    "12-bit jpeg": (hostile.cases()["lies/twelve_bits.jpg"][0], "unsupported_format"),
    "lossless jpeg": (hostile.cases()["lies/lossless.jpg"][0], "unsupported_format"),
    "five bands": (hostile.cases()["built/five_bands.tif"][0], "unsupported_format"),
    "flipped bit": (hostile.cases()["damage/one_bit.png"][0], "corrupt"),
    "no IDAT": (hostile.cases()["lies/no_idat.png"][0], "corrupt"),
    "zero width": (hostile.cases()["lies/zero_width.png"][0], "corrupt"),
    "too few rows": (hostile.cases()["lies/taller_than_it_is.jpg"][0], "corrupt"),
    "text bomb": (hostile.cases()["bomb/text.png"][0], "too_large"),
    "tile bomb": (hostile.cases()["bomb/tile.tif"][0], "too_large"),
    "long row": (hostile.cases()["bomb/longer_row.png"][0], "too_large"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_names_its_reason(data, reason):
    refused = rejection(data)
    assert (refused.station, refused.reason) == ("decode", reason)
    assert refused.detail


CUT = {
    "JPEG": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "PNG": encoded(PICTURE, "PNG"),
    "TIFF": encoded(PICTURE, "TIFF"),
    "LZW": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "WEBP": encoded(PICTURE, "WEBP"),
    "lossless WEBP": encoded(PICTURE, "WEBP", lossless=True),
    "BMP": encoded(PICTURE, "BMP"),
    "GIF": encoded(PICTURE, "GIF"),
}


@pytest.mark.parametrize("percent", [25, 50, 90])
@pytest.mark.parametrize("kind", CUT)
def test_cut_data_are_truncated(kind, percent):
    data = CUT[kind]
    assert rejection(data[: len(data) * percent // 100]).reason == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_wherever_it_is_cut_it_is_refused_or_whole(kind):
    data = CUT[kind]
    whole = decode(data, LIMITS).values_HWC
    for length in range(1, len(data), 1 + len(data) // 150):
        answer = outcome(data[:length])
        assert answer in CUT_ANSWERS
        assert answer != "done" or np.array_equal(decode(data[:length], LIMITS).values_HWC, whole)


CUT_ANSWERS = {"done", "truncated", "not_an_image", "unsupported_format"}


def test_a_jpeg_without_its_last_marker_is_truncated():
    assert rejection(CUT["JPEG"][:-2]).reason == "truncated"


def test_a_refusal_says_the_same_every_time():
    data = CUT["PNG"][:40] + bytes(100)
    assert rejection(data).detail == rejection(bytes(bytearray(data))).detail


# ------------------------------------------------------------------------------ samples, modes


def test_a_plain_jpeg_is_what_pillow_would_have_said():
    options = [{"subsampling": n, "progressive": p} for n in range(3) for p in (False, True)]
    for option in options:
        data = encoded(blobs(51, 67, seed=2), "JPEG", **option)
        assert np.array_equal(
            decode(data, LIMITS).values_HWC, np.asarray(Image.open(io.BytesIO(data)))
        )


GRAY = PICTURE[..., :1]
ALPHA = np.zeros((48, 64, 1), np.uint8)
ALPHA[10:, 5:] = 1  # barely visible is visible
ALPHA[20:] = 255
HOLES = ALPHA[..., 0] == 0
KEY = int(GRAY[0, 0, 0])
RGBA = np.concatenate([PICTURE, ALPHA], axis=2)
DEEP = (GRAY.astype(np.uint16) * 257)[..., 0]
CMYK, YCBCR = IMAGE.convert("CMYK"), IMAGE.convert("YCbCr")
PALETTE = IMAGE.quantize(16)
BILEVEL = np.where(GRAY > 60, np.uint8(255), np.uint8(0))
KEYED = Image.new("P", (64, 48), 1)
KEYED.putpalette([9, 9, 9, 200, 100, 50])
KEYED.paste(0, (0, 0, 10, 48))
KEYED_RGB = np.full((48, 64, 3), [200, 100, 50], np.uint8)
KEYED_RGB[:, :10] = 9
LEFT = np.zeros((48, 64), bool)
LEFT[:, :10] = True

MODES = {
    "gray png": (encoded(GRAY, "PNG"), GRAY, None),
    "gray bmp": (encoded(GRAY, "BMP"), GRAY, None),  # a palette that is a gray ramp
    "rgb png": (encoded(PICTURE, "PNG"), PICTURE, None),
    "rgb bmp": (encoded(PICTURE, "BMP"), PICTURE, None),
    "rgb tiff": (encoded(PICTURE, "TIFF"), PICTURE, None),
    "rgb lzw tiff": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE, None),
    "rgb webp": (encoded(PICTURE, "WEBP", lossless=True), PICTURE, None),
    "gray alpha png": (encoded(np.concatenate([GRAY, ALPHA], 2), "PNG"), GRAY, HOLES),
    "rgba png": (encoded(RGBA, "PNG"), PICTURE, HOLES),
    "rgba tiff": (encoded(RGBA, "TIFF"), PICTURE, HOLES),
    "rgba webp": (encoded(RGBA, "WEBP", lossless=True, exact=True), PICTURE, HOLES),
    "opaque rgba": (saved(IMAGE.convert("RGBA"), "PNG"), PICTURE, None),
    "palette png": (saved(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), None),
    "palette gif": (saved(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), None),
    "palette bmp": (saved(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB")), None),
    "palette tiff": (saved(PALETTE, "TIFF"), np.asarray(PALETTE.convert("RGB")), None),
    "palette tRNS index": (saved(KEYED, "PNG", transparency=0), KEYED_RGB, LEFT),
    "palette tRNS bytes": (saved(KEYED, "PNG", transparency=b"\0\x80"), KEYED_RGB, LEFT),
    "gif transparency": (saved(KEYED, "GIF", transparency=0), KEYED_RGB, LEFT),
    "gray tRNS": (encoded(GRAY, "PNG", transparency=KEY), GRAY, GRAY[..., 0] == KEY),
    "rgb tRNS": (
        saved(KEYED.convert("RGB"), "PNG", transparency=(9, 9, 9)), KEYED_RGB, LEFT,
    ),
    "1 bit png": (saved(Image.fromarray(BILEVEL[..., 0]).convert("1"), "PNG"), BILEVEL, None),
    "1 bit tiff": (saved(Image.fromarray(BILEVEL[..., 0]).convert("1"), "TIFF"), BILEVEL, None),
    "16 bit png": (encoded(DEEP, "PNG"), DEEP[..., None], None),
    "16 bit tiff": (encoded(DEEP, "TIFF"), DEEP[..., None], None),
    "16 bit big-endian tiff": (
        saved(Image.frombytes("I;16B", (64, 48), DEEP.astype(">u2").tobytes()), "TIFF"),
        DEEP[..., None], None,
    ),
    "32 bit tiff": (
        encoded((DEEP.astype(np.int32) - 9000) * 2, "TIFF"),
        np.clip((DEEP[..., None].astype(np.int32) - 9000) * 2, 0, 65535).astype(np.uint16), None,
    ),
    "cmyk tiff": (
        saved(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB")), None,
    ),
    "ycbcr tiff": (
        saved(YCBCR, "TIFF"), np.asarray(YCBCR.convert("RGB")), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "values_HWC", "nodata_HW"), MODES.values(), ids=MODES.keys())
def test_every_mode_becomes_what_the_table_says(data, values_HWC, nodata_HW):
    pixels = decode(data, LIMITS)
    assert pixels.values_HWC.dtype == values_HWC.dtype
    assert pixels.values_HWC.flags.c_contiguous
    assert np.array_equal(pixels.values_HWC, values_HWC)
    assert (pixels.nodata_HW is None) == (nodata_HW is None)
    assert nodata_HW is None or np.array_equal(pixels.nodata_HW, nodata_HW)


@pytest.mark.parametrize(("depth", "stretch"), [(1, 255), (2, 85), (4, 17)])
def test_the_transparent_value_of_few_bits_is_stretched_with_the_picture(depth, stretch):
    per_byte = 8 // depth
    row = b"\0" + bytes([0b01 << (8 - depth) if depth > 1 else 0b1000_0000])
    key = hostile.chunk(b"tRNS", b"\0\1")
    data = hostile.png(per_byte, 1, zlib.compress(row), depth=depth, colour=0, extra=key)
    pixels = decode(data, LIMITS)
    assert pixels.values_HWC[0, 0, 0] == stretch
    assert pixels.nodata_HW.tolist() == [[True] + [False] * (per_byte - 1)]


def test_colour_of_16_bits_keeps_the_high_byte():
    row = b"\0" + struct.pack(">6H", 0x0102, 0x8081, 0xFFFE, 0, 255, 256)
    data = hostile.png(2, 1, zlib.compress(row), depth=16)
    assert decode(data, LIMITS).values_HWC.tolist() == [[[1, 0x80, 0xFF], [0, 0, 1]]]


def test_real_numbers_from_0_to_1_become_16_bits_and_nan_is_no_data():
    array = np.array([[0, 0.5, 1], [-3, np.inf, np.nan]], np.float32)
    pixels = decode(encoded(array, "TIFF"), LIMITS)
    assert pixels.values_HWC[..., 0].tolist() == [[0, 32768, 65535], [0, 65535, 0]]
    assert pixels.nodata_HW.tolist() == [[False, False, False], [False, False, True]]


def test_unsigned_numbers_of_32_bits_do_not_turn_negative():
    data = hostile.tiff({256: 2, 257: 1, 258: 32}, struct.pack("<2I", 0xFFFF_FFFF, 7))
    assert decode(data, LIMITS).values_HWC.ravel().tolist() == [65535, 7]


def test_double_precision_is_read_although_pillow_cannot():
    tags = {256: 2, 257: 2, 258: 64, 339: 3, 274: 6}
    data = hostile.tiff(tags, struct.pack("<4d", 0, 0.25, 1, np.nan))
    pixels = decode(data, LIMITS)
    assert pixels.values_HWC[..., 0].tolist() == [[65535, 0], [0, 16384]]
    assert pixels.nodata_HW.tolist() == [[False, False], [True, False]]


def test_a_cmyk_jpeg_is_not_inverted():
    data = saved(Image.new("RGB", (32, 32), (200, 60, 20)).convert("CMYK"), "JPEG", quality=95)
    assert np.allclose(decode(data, LIMITS).values_HWC[16, 16], (200, 60, 20), atol=6)


def test_lab_becomes_rgb():
    lab = Image.frombytes("LAB", (8, 8), bytes([137, 0, 0]) * 64)  # L* 53.7 of 100, no colour
    assert np.allclose(decode(saved(lab, "TIFF"), LIMITS).values_HWC, 128, atol=3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_only_the_first_of_many_frames_is_decoded(kind):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    data = saved(first, kind, save_all=True, append_images=[second])
    assert np.allclose(decode(data, LIMITS).values_HWC, (255, 0, 0), atol=4)


# -------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_same_upright_jpeg(orientation):
    data = with_orientation(BLOCKS, orientation)
    upright = decode(with_orientation(BLOCKS, 1), LIMITS).values_HWC
    pixels = decode(data, LIMITS)
    assert np.array_equal(pixels.values_HWC, upright)
    assert pixels.values_HWC.flags.c_contiguous
    assert probe(data) == (pixels.height, pixels.width) == (32, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_every_orientation_turns_values_and_holes(kind, options, orientation):
    data = encoded(turned(RGBA, orientation), kind, exif=exif_of(orientation), **options)
    pixels = decode(data, LIMITS)
    assert np.array_equal(pixels.values_HWC, PICTURE)
    assert np.array_equal(pixels.nodata_HW, HOLES)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_every_orientation_of_a_tiff_is_applied_once(compression, orientation):
    options = {"compression": compression, "tiffinfo": {274: orientation}}
    data = encoded(turned(PICTURE, orientation), "TIFF", **options)
    assert np.array_equal(decode(data, LIMITS).values_HWC, PICTURE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_that_pillow_decodes_is_turned_too(orientation):
    image = Image.fromarray(turned(BLOCKS, orientation)).convert("CMYK")
    data = saved(image, "JPEG", quality=100, exif=exif_of(orientation))
    assert np.abs(decode(data, LIMITS).values_HWC.astype(int) - BLOCKS).max() <= 3


def test_a_picture_of_many_strips_is_turned_as_a_whole(monkeypatch):
    monkeypatch.setattr("pipeline.decode._STRIP", 7 * 64)
    for orientation in range(1, 9):
        data = encoded(turned(RGBA, orientation), "PNG", exif=exif_of(orientation))
        pixels = decode(data, LIMITS)
        assert np.array_equal(pixels.values_HWC, PICTURE)
        assert np.array_equal(pixels.nodata_HW, HOLES)


@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
def test_an_illegal_orientation_is_ignored(orientation):
    data = encoded(BLOCKS, "JPEG", exif=exif_of(orientation), quality=100, subsampling=0)
    assert np.array_equal(
        decode(data, LIMITS).values_HWC, decode(with_orientation(BLOCKS, 1), LIMITS).values_HWC
    )


@pytest.mark.parametrize("name", ["exif/broken.jpg", "exif/broken.png"])
def test_broken_exif_is_ignored(name):
    assert decode(hostile.cases()[name][0], LIMITS).values_HWC.shape == hostile.PICTURE.shape


# ------------------------------------------------------------------------------------- limits

SMALL = DecodeLimits(max_bytes=1 << 20, max_pixels=48 * 64 - 1, max_side=65_535)


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel_too_many_is_too_large(kind):
    assert rejection(encoded(PICTURE, kind), SMALL).reason == "too_large"
    assert decode(encoded(PICTURE[1:], kind), SMALL).height == 47


def test_one_byte_too_many_is_too_large():
    data = encoded(PICTURE, "PNG")
    assert rejection(data, DecodeLimits(max_bytes=len(data) - 1)).reason == "too_large"
    assert decode(data, DecodeLimits(max_bytes=len(data))).height == 48


def test_a_side_too_long_is_too_large():
    limits = DecodeLimits(max_side=63)
    assert rejection(encoded(PICTURE, "PNG"), limits).reason == "too_large"


HUGE = (
    "lies/huge.jpg", "lies/huge.gif", "lies/huge.bmp", "lies/huge.webp", "lies/huge.tif",
    "lies/astronomic.png", "lies/frame_beyond.gif", "bomb/900_mpx.png", "bomb/tile.tif",
    "bomb/dispose.gif",
)  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_a_bomb_is_refused_before_a_pixel_is_decoded(name):
    data, _ = hostile.cases()[name]
    tracemalloc.start()
    start = time.perf_counter()
    refused = rejection(data)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.reason == "too_large"
    assert seconds < 1
    assert peak < len(data) + (8 << 20)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "bytes_a_pixel"), [("JPEG", 3), ("PNG", 4 + 3), ("TIFF", 4 + 3)])
def test_a_large_picture_takes_no_more_than_the_decoders_copy_and_the_answer(kind, bytes_a_pixel):
    side = 4000  # 16 Mpx
    data = encoded(np.kron(BLOCKS, np.ones((125, 84, 1), np.uint8))[:side, :side], kind)
    before, samples, done = resident(), [], threading.Event()

    def watch():
        while not done.wait(0.001):
            samples.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    pixels = decode(data, LIMITS)
    done.set()
    watcher.join()
    assert pixels.values_HWC.shape == (side, side, 3)
    assert max(samples) - before < side * side * bytes_a_pixel + (24 << 20)


# ---------------------------------------------------------------------------------- all of it


@pytest.mark.parametrize("threads", [8])
def test_eight_threads_decode_as_one_does(threads):
    files = [data for data, *_ in MODES.values()] + [
        with_orientation(BLOCKS, n) for n in range(1, 9)
    ]
    alone = [decode(data, LIMITS) for data in files]

    def all_of_them(_):
        return [decode(data, LIMITS) for data in files]

    with ThreadPoolExecutor(threads) as pool:
        for answers in pool.map(all_of_them, range(threads)):
            for pixels, expected in zip(answers, alone, strict=True):
                assert np.array_equal(pixels.values_HWC, expected.values_HWC)
                assert np.array_equal(pixels.nodata_HW, expected.nodata_HW)


ANSWERS = {"done": {"done"}, "rejected": {*REASONS}, "either": {"done", *REASONS}}


def test_every_hostile_case_is_decoded_or_rejected_for_a_reason():
    cases = hostile.cases()
    assert len(cases) >= 90
    outcomes = {name: outcome(data) for name, (data, _) in cases.items()}
    files = cases.keys() - hostile.shards().keys()
    wrong = {
        name: outcomes[name] for name in files if outcomes[name] not in ANSWERS[cases[name][1]]
    }
    assert wrong == {}
    assert {outcomes[name] for name in hostile.shards()} == {"empty", "not_an_image"}


@pytest.mark.parametrize("kind", [*FORMATS, "LZW", "progressive"])
def test_flipped_bytes_are_decoded_or_rejected_for_a_reason(kind):
    whole = {**{kind: encoded(PICTURE, kind) for kind in FORMATS}, **CUT}[kind]
    rng = np.random.default_rng(3)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        assert outcome(bytes(data)) in ANSWERS["either"]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_flipped_bit_in_png_data_goes_unnoticed(bits):
    data = encoded(PICTURE, "PNG", compress_level=0)  # nothing but its checksum guards it
    start = data.index(b"IDAT") + 50
    rng = np.random.default_rng(bits)
    for at in rng.integers(start, start + len(PICTURE.tobytes()) - 200, 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bits
        assert rejection(bytes(damaged)).reason == "corrupt"
