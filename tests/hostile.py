"""What an archive holds that is no good picture, or looks like none: names, bytes, expectation.

Expectations: ``done`` (it must get a mask), ``rejected`` (it must not), ``either`` (both are right,
a crash is not). For a shard the word is about its members as a whole; ``shards()`` has them singly.
"""

import gzip
import io
import random
import struct
import tarfile
import zlib
from functools import cache

import numpy as np
from PIL import Image

from tests.pictures import blobs, encoded, exif_of, parquet_of, saved, tar_of

DONE, REJECTED, EITHER = "done", "rejected", "either"
Cases = dict[str | bytes, tuple[bytes, str]]

PICTURE = blobs(96, 128, seed=7)
JPEG = encoded(PICTURE, "JPEG", quality=90)
PNG = encoded(PICTURE, "PNG")


def cases() -> Cases:
    """Every case by its path below the archive's root."""
    return dict(_cases())


@cache
def _cases() -> Cases:
    found: Cases = {}
    groups = (
        not_pictures, other_pictures, wrong_names, cut_short, damaged, lying_headers, bombs,
        modes, structures, exif, names,
    )  # fmt: skip
    for group in groups:
        found |= group()
    for name, (content, members) in shards().items():
        found[name] = content, DONE if DONE in members.values() else REJECTED
    return found


def not_pictures() -> Cases:
    noise = random.Random(7).randbytes(5000)
    contents = {
        "empty.jpg": b"",
        "one_byte.png": b"\x89",
        "two_bytes.jpg": b"\xff\xd8",
        "magic_only.jpg": b"\xff\xd8\xff",
        "magic_only.png": PNG[:8],
        "text.jpg": b"this is not a picture\n" * 40,
        "bmw.txt.jpg": b"BMW is a maker of cars, and this is a text",
        "404.jpg": b"<html><body>404 Not Found</body></html>",
        "slowdown.png": b'<?xml version="1.0"?><Error><Code>SlowDown</Code></Error>',
        "noise.jpg": b"\x13" + noise,
        "zeros.png": bytes(4096),
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "program.jpg": b"MZ" + bytes(200),
        "elf.png": b"\x7fELF" + bytes(200),
        "document.jpg": b"%PDF-1.7\n1 0 obj<<>>endobj",
        "gzipped.png": gzip.compress(PNG),
        "zipped.jpg": b"PK\x03\x04" + bytes(60),
        "._appledouble.jpg": b"\x00\x05\x16\x07" + bytes(100),
        "thumbs.db.png": b"\xd0\xcf\x11\xe0" + bytes(500),
        "pickle.png": b"cos\nsystem\n(S'touch pwned'\ntR.",
        "slow_regex.svg": b"<?xml" * 200,
    }
    return {f"not/{name}": (content, REJECTED) for name, content in contents.items()}


def other_pictures() -> Cases:
    script = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    contents = {
        "script.svg": script,
        "declared.svg": b'<?xml version="1.0"?>\n<!-- made by hand -->\n' + script,
        "ghostscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "layers.psd": b"8BPS\0\1" + bytes(40),
        "favicon.ico": saved(Image.fromarray(PICTURE), "ICO"),
        "plain.ppm": saved(Image.fromarray(PICTURE), "PPM"),
        "plain.tga": saved(Image.fromarray(PICTURE), "TGA"),
        "rle.pcx": saved(Image.fromarray(PICTURE), "PCX"),
        "codestream.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    }
    return {f"other/{name}": (content, REJECTED) for name, content in contents.items()}


def wrong_names() -> Cases:
    return {
        "png_as.jpg": (PNG, DONE),
        "jpeg_as.png": (JPEG, DONE),
        "webp_as.bmp": (encoded(PICTURE, "WEBP"), DONE),
        "noextension": (JPEG, DONE),
        "UPPER.JPG": (JPEG, DONE),
    }


def cut_short() -> Cases:
    whole = {
        "jpg": JPEG,
        "png": PNG,
        "tif": encoded(PICTURE, "TIFF"),
        "lzw.tif": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
        "webp": encoded(PICTURE, "WEBP"),
        "bmp": encoded(PICTURE, "BMP"),
        "gif": encoded(PICTURE, "GIF"),
    }
    found: Cases = {}
    for suffix, content in whole.items():
        for percent in (25, 50, 90):
            part = content[: len(content) * percent // 100]
            found[f"cut/at_{percent}.{suffix}"] = part, REJECTED
    start = JPEG.index(b"\xff\xda")
    return found | {
        "cut/no_eoi.jpg": (JPEG[:-2], EITHER),
        "cut/in_iend.png": (PNG[:-6], EITHER),
        "cut/before_the_scan.jpg": (JPEG[:start], REJECTED),
        "cut/zero_tail.jpg": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), REJECTED),
        "tail/garbage.jpg": (JPEG + bytes(range(256)) * 20, DONE),
        "tail/zip.png": (PNG + b"PK\x03\x04" + bytes(60), DONE),
        "tail/twice.jpg": (JPEG + JPEG, DONE),
        "head/newlines.jpg": (b"\n" * 7 + JPEG, REJECTED),
    }


def damaged() -> Cases:
    middle = len(JPEG) // 2
    scan = bytearray(JPEG)
    scan[middle : middle + 40] = bytes(byte ^ 0xFF for byte in scan[middle : middle + 40])
    data = bytearray(PNG)
    data[len(PNG) // 2] ^= 1
    signature = bytearray(PNG)
    signature[5] ^= 4
    return {
        "damage/scan.jpg": (bytes(scan), EITHER),  # garbage without an error: only a hash tells
        "damage/one_bit.png": (bytes(data), REJECTED),
        "damage/header_crc.png": (PNG[:29] + bytes(4) + PNG[33:], REJECTED),
        "damage/signature.png": (bytes(signature), REJECTED),
        "damage/ascii_transfer.png": (PNG.replace(b"\r\n", b"\n"), REJECTED),
        "damage/utf8_transfer.jpg": (JPEG.decode("latin1").encode(), REJECTED),
    }


def lying_headers() -> Cases:
    rows = zlib.compress(b"\0" * 1000)
    frame = JPEG.index(b"\xff\xc0")
    huge = JPEG[: frame + 5] + struct.pack(">HH", 65500, 65500) + JPEG[frame + 9 :]
    tall = JPEG[: frame + 5] + struct.pack(">H", 9600) + JPEG[frame + 7 :]
    twelve_bits = JPEG[: frame + 4] + b"\x0c" + JPEG[frame + 5 :]
    lossless = JPEG[: frame + 1] + b"\xc3" + JPEG[frame + 2 :]
    contents = {
        "zero_width.png": png(0, 10, rows),
        "negative.png": png(0x80000001, 10, rows),
        "astronomic.png": png(2_000_000_000, 2_000_000_000, rows),
        "no_idat.png": png(10, 10, None),
        "short_idat.png": png(500, 500, rows),
        "bad_type.png": png(8, 8, rows, depth=3, colour=7),
        "huge.jpg": huge,
        "taller_than_it_is.jpg": tall,
        "twelve_bits.jpg": twelve_bits,
        "lossless.jpg": lossless,
        "huge.gif": gif(65535, 65535),
        "frame_beyond.gif": gif(10, 10, frame=(65535, 65535)),
        "zero.gif": gif(0, 0),
        "huge.bmp": bmp(60000, 60000),
        "negative.bmp": bmp(-60, 60),
        "empty.bmp": bmp(0, 0),
        "huge.webp": b"RIFF\x16\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff\xff\xff" * 2,
        "huge.tif": tiff({256: 60000, 257: 60000}),
        "no_size.tif": tiff({}),
        "beyond.tif": tiff({256: 8, 257: 8, 273: 0x7FFFFFFF}),
    }
    found: Cases = {f"lies/{name}": (content, REJECTED) for name, content in contents.items()}
    indexed = zlib.compress((b"\0" + b"\1" * 8) * 8)
    return found | {"lies/no_palette.png": (png(8, 8, indexed, colour=3), EITHER)}


def bombs() -> Cases:
    pixels = zlib.compress((b"\0" + b"\1" * 12) * 4)
    deflated = zlib.compress(bytes(20_000_000), 9)
    long_row = encoded(np.zeros((1, 60000, 3), np.uint8), "PNG")
    too_long = png(70_000, 1, zlib.compress(bytes(70_001)), colour=0)
    frames = [Image.new("P", (64, 64), index % 255) for index in range(300)]
    many = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    markers = JPEG[:2] + b"\xff\xfe\x00\x02" * 100_000 + JPEG[2:]
    fill = JPEG[:2] + b"\xff" * 200_000 + JPEG[3:]
    comments = gif(10, 10)[:19] + b"!\xfe" + b"\1x" * 200_000
    chunks = png(4, 4, pixels, extra=chunk(b"prVt", b"") * 20_000)
    return {
        "bomb/900_mpx.png": (bomb(), REJECTED),
        "bomb/text.png": (png(4, 4, pixels, extra=chunk(b"zTXt", b"k\0\0" + deflated)), REJECTED),
        "bomb/icc.png": (png(4, 4, pixels, extra=chunk(b"iCCP", b"k\0\0" + deflated)), EITHER),
        "bomb/row.png": (long_row, EITHER),
        "bomb/longer_row.png": (too_long, REJECTED),
        "bomb/frames.gif": (many, DONE),
        "bomb/markers.jpg": (markers, EITHER),
        "bomb/fill_bytes.jpg": (fill, EITHER),
        "bomb/dispose.gif": (gif(10, 10, frame=(65535, 65535), disposal=2), REJECTED),
        "bomb/comments.gif": (comments, REJECTED),
        "bomb/chunks.png": (chunks, DONE),
        "bomb/tile.tif": (
            tiff({256: 16, 257: 16, 322: 48000, 323: 48000, 324: 8, 325: 64}),
            REJECTED,
        ),
    }


def modes() -> Cases:
    image = Image.fromarray(PICTURE)
    rng = np.random.default_rng(7)
    deep = Image.fromarray(rng.integers(0, 65535, (96, 128)).astype(np.uint16))
    real = Image.fromarray(rng.random((96, 128)).astype(np.float32))
    lab = Image.frombytes("LAB", (128, 96), rng.bytes(128 * 96 * 3))
    cmyk = saved(image.convert("CMYK"), "JPEG")
    at = cmyk.index(b"\xff\xee")
    plain_cmyk = cmyk[:at] + cmyk[at + 2 + int.from_bytes(cmyk[at + 2 : at + 4], "big") :]
    colour16 = png(8, 8, zlib.compress((b"\0" + b"\1\2" * 24) * 8), depth=16)
    contents = {
        f"{mode}.png": saved(image.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")
    }
    contents |= {
        f"{mode}.tif": saved(image.convert(mode), "TIFF")
        for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")
    }
    contents |= {f"{mode}.bmp": saved(image.convert(mode), "BMP") for mode in ("1", "L", "P")}
    contents |= {
        "deep.png": saved(deep, "PNG"),
        "deep.tif": saved(deep, "TIFF"),
        "real.tif": saved(real, "TIFF"),
        "lab.tif": saved(lab, "TIFF"),
        "colour16.png": colour16,
        "key.png": saved(image.convert("P"), "PNG", transparency=0),
        "invisible.png": saved(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), "PNG"),
        "gray.jpg": saved(image.convert("L"), "JPEG"),
        "cmyk.jpg": cmyk,
        "cmyk_without_adobe.jpg": plain_cmyk,
        "ycbcr.jpg": saved(image.convert("YCbCr"), "JPEG"),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "quality_1.jpg": saved(image, "JPEG", quality=1),
        "restarts.jpg": saved(image, "JPEG", restart_marker_blocks=1),
        "lossless.webp": saved(image, "WEBP", lossless=True),
        "alpha.webp": saved(image.convert("RGBA"), "WEBP"),
        "one_pixel.png": saved(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"),
        "one_wide.jpg": saved(Image.new("RGB", (1, 300)), "JPEG"),
        "uint32.tif": tiff({256: 4, 257: 4, 258: 32}),
        "double.tif": tiff({256: 2, 257: 4, 258: 64, 339: 3}),
    }
    return {f"modes/{name}": (content, DONE) for name, content in contents.items()}


def structures() -> Cases:
    image = Image.fromarray(PICTURE)
    other = image.rotate(90, expand=True)
    plain = encoded(PICTURE, "TIFF")
    (at,) = struct.unpack_from("<I", plain, 4)
    (count,) = struct.unpack_from("<H", plain, at)
    after = at + 2 + 12 * count
    both = {"save_all": True, "append_images": [other]}
    same_size = {"save_all": True, "append_images": [image.rotate(180)]}
    return {
        "built/cycle.tif": (plain[:after] + struct.pack("<I", at) + plain[after + 4 :], EITHER),
        "built/no_directory.tif": (plain[:4] + struct.pack("<I", 1 << 30) + plain[8:], REJECTED),
        "built/five_bands.tif": (tiff({256: 4, 257: 4, 277: 5, 258: 8}, bytes(80)), EITHER),
        "built/lzw.tif": (encoded(PICTURE, "TIFF", compression="tiff_lzw"), DONE),
        "built/two_pages.tif": (saved(image, "TIFF", **both), DONE),
        "built/animated.webp": (saved(image, "WEBP", **same_size), DONE),
        "built/animated.png": (saved(image, "PNG", **same_size), DONE),
        "built/garbage_icc.jpg": (saved(image, "JPEG", icc_profile=b"garbage" * 50), DONE),
    }


def exif() -> Cases:
    found: Cases = {}
    for n in (*range(1, 9), 0, 99):
        found[f"exif/{n}.jpg"] = encoded(PICTURE, "JPEG", exif=exif_of(n)), DONE
    title = Image.Exif()
    title[270] = '<script>alert("x")</script>'
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"A" * 24
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    return found | {
        "exif/script.jpg": (encoded(PICTURE, "JPEG", exif=title), DONE),
        "exif/broken.jpg": (JPEG[:2] + segment + JPEG[2:], DONE),
        "exif/broken.png": (encoded(PICTURE, "PNG", exif=broken), DONE),
    }


def names() -> Cases:
    strange = (
        "sp ace.jpg", "ünïcødé-日本語-😀.jpg", "e\u0301.jpg", "\u00e9.jpg", "pct%2e%2e%2fx.jpg",
        "plus+amp&.jpg", "quote'\".jpg", "<img src=x onerror=alert(1)>.jpg", "$(touch pwned).jpg",
        "-rf.jpg", "~.jpg", "a;b|c.jpg", "new\nline.jpg", "tab\tx.jpg", "trailing .jpg",
        "back\\slash.jpg", "#frag?q=1.jpg", "glob*[a-z]?.jpg", "x" * 240 + ".jpg", "con.jpg",
        "CaseA.jpg", "casea.jpg", "same/a/name.jpg", "same/b/name.jpg", b"latin1-\xe9.jpg",
    )  # fmt: skip
    found: Cases = {}
    for index, name in enumerate(strange):
        content = encoded(np.full((16, 16, 3), index * 8, np.uint8), "JPEG")
        path = b"names/" + name if isinstance(name, bytes) else "names/" + name
        found[path] = content, EITHER if isinstance(name, bytes) else DONE
    return found


def shards() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Shards, each with what must become of its members; one not named is no image."""
    good = tar_of({"a.jpg": JPEG, "b.png": PNG})
    second = len(JPEG) + 511 & ~511  # where the next member's header lies, after the first's 512
    lie = good[:124] + b"77777777777\0" + good[136:148] + b"        " + good[156:]
    total = sum(lie[:512])
    lie = lie[:148] + b"%06o\0 " % total + lie[156:]
    return {
        "shards/hostile_members.tar": (_hostile_members(), {"ok.jpg": DONE}),
        "shards/duplicates.tar": (_duplicates(), {"a.jpg": EITHER, "b/a.jpg": DONE}),
        "shards/cut_in_a_member.tar": (
            good[: 512 + second + 600],
            {"a.jpg": DONE, "b.png": REJECTED},
        ),
        "shards/cut_in_a_header.tar": (good[: 512 + second + 100], {"a.jpg": DONE}),
        "shards/no_end_blocks.tar": (good.rstrip(b"\0"), {"a.jpg": DONE, "b.png": DONE}),
        "shards/empty.tar": (b"", {}),
        "shards/end_blocks_only.tar": (bytes(10240), {}),
        "shards/pickles.tar": (
            tar_of({"a.pkl": b"cos\nsystem\n(S'touch pwned'\ntR.", "a.pt": b"x", "a.jpg": JPEG}),
            {"a.jpg": DONE},
        ),
        "shards/size_lie.tar": (lie, {"a.jpg": REJECTED}),
        "shards/header_checksum.tar": (good[:148] + b"000000\0 " + good[156:], {}),
        "shards/empty_members.tar": (
            tar_of({f"{index:04}.jpg": b"" for index in range(500)}),
            {f"{index:04}.jpg": REJECTED for index in range(500)},
        ),
        "shards/text.tar": (b"not a tar at all\n" * 100, {}),
        "shards/ends_its_reader.parquet": (ends_its_reader(), {}),
    }


def ends_its_reader() -> bytes:
    """A table of one flipped bit at whose footer Parquet's reader aborts (pyarrow 26).

    Its column says that it has no nulls, and its sizes tell how many it has.
    """
    table = parquet_of([JPEG, PNG])
    footer = len(table) - 8 - int.from_bytes(table[-8:-4], "little")
    optional = table.index(b"\x25\x02", footer)  # field 3 of the column, repetition_type: 1
    return table[: optional + 1] + b"\0" + table[optional + 2 :]


def _hostile_members() -> bytes:
    buffer = io.BytesIO()
    kinds = {
        "symlink.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
        "hardlink.jpg": (tarfile.LNKTYPE, "../../etc/passwd"),
        "device.jpg": (tarfile.CHRTYPE, ""),
        "block.jpg": (tarfile.BLKTYPE, ""),
        "fifo.jpg": (tarfile.FIFOTYPE, ""),
        "folder.jpg": (tarfile.DIRTYPE, ""),
    }
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../../evil.jpg", "/abs/evil.jpg", "a/../../evil.jpg", "ok.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(JPEG)
            tar.addfile(entry, io.BytesIO(JPEG))
        for name, (kind, target) in kinds.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
    return buffer.getvalue()


def _duplicates() -> bytes:
    buffer = io.BytesIO()
    turned = encoded(PICTURE[::-1].copy(), "JPEG")
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.jpg", JPEG), ("a.jpg", turned), ("b/a.jpg", PNG)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# ------------------------------------------------------------- files that no library would write


def chunk(kind: bytes, content: bytes) -> bytes:
    """One PNG chunk."""
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(
    width: int, height: int, idat: bytes | None, *, depth: int = 8, colour: int = 2,
    extra: bytes = b"",
) -> bytes:  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", idat) if idat is not None else b""
    return PNG[:8] + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """30,000 x 30,000 honest pixels of one bit in about 110 KB."""
    return png(30_000, 30_000, zlib.compress(bytes(3751 * 30_000), 9), depth=1, colour=0)


def gif(width: int, height: int, frame: tuple[int, int] | None = None, disposal: int = 0) -> bytes:
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    control = b"!\xf9\4" + struct.pack("<BHB", disposal << 2, 0, 0) + b"\0"
    place = b"," + struct.pack("<HHHH", 0, 0, *(frame or (width, height)))
    return screen + control + place + b"\0\2\2\x44\1\0;"


def bmp(width: int, height: int) -> bytes:
    file_header = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
    return file_header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def tiff(tags: dict[int, int], data: bytes = bytes(64)) -> bytes:
    """An uncompressed gray TIFF of one strip (at byte 8) unless the tags say otherwise."""
    defaults = {258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1 << 16, 279: len(data)}
    if 322 in tags:
        del defaults[273], defaults[278], defaults[279]
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted((defaults | tags).items())
    )
    count = struct.pack("<H", len(entries) // 12)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + count + entries + bytes(4)
