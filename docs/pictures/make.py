# ruff: noqa: INP001  (a script beside what it makes, not a package)
"""Make the pictures of the README demo from the nuclei set: `python docs/pictures/make.py DATA`.

Twelve pictures of the test split, which the demo model never saw, in the three ways an archive may
hold them: a folder of loose files, a tar shard, a table with a column of image bytes. Equal inputs
and library versions give equal bytes.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).parent
ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""

LOOSE = {
    "fluorescence-small": "4d4ebfcae4374165",
    "fluorescence-dense": "03f583ec5018739f",
    "fluorescence-large": "0ea221716cf13710",
    "histology": "2dd3356f2dcf470a",
}
GRAY_JPEG = ("brightfield", "1a11552569160f0b")
TURNED_JPEG = ("histology-held-sideways", "65c8527c16a01619")
SHARD = ("c3bec1066aae20f4", "a31deaf0ac279d5f", "20c37b1ad2f510ed")
TABLE = ("f487cc82271cf84b", "3441821ebea04fac", "ed5be4b63e9506ad")


def main() -> None:
    """Run as a program."""
    images = Path(sys.argv[1]) / "images"
    loose = HERE / "loose"
    loose.mkdir(exist_ok=True)
    for name, key in LOOSE.items():
        (loose / f"{name}.png").write_bytes((images / f"{key}.png").read_bytes())
    name, key = GRAY_JPEG
    (loose / f"{name}.jpg").write_bytes(gray_jpeg(images / f"{key}.png"))
    name, key = TURNED_JPEG
    (loose / f"{name}.jpg").write_bytes(turned_jpeg(images / f"{key}.png"))
    write_shard(HERE / "shard-000000.tar", [images / f"{key}.png" for key in SHARD])
    write_table(HERE / "table.parquet", [images / f"{key}.png" for key in TABLE])


def gray_jpeg(path: Path) -> bytes:
    """The picture as a JPEG of one band."""
    with Image.open(path) as picture:
        return encoded(picture.convert("L"), {})


def turned_jpeg(path: Path) -> bytes:
    """The picture lying on its left side, with the EXIF tag that stands it up again."""
    with Image.open(path) as picture:
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        lying = picture.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        return encoded(lying, {"exif": exif})


def encoded(picture: Image.Image, options: dict[str, Image.Exif]) -> bytes:
    """JPEG bytes."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88, **options)
    return data.getvalue()


def write_shard(path: Path, pictures: list[Path]) -> None:
    """A WebDataset shard: members of one picture share a stem."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for picture in pictures:
            note = {"key": picture.stem, "source": "dsb2018 stage1_train", "licence": "CC0-1.0"}
            add(shard, f"{picture.stem}.png", picture.read_bytes())
            add(shard, f"{picture.stem}.json", json.dumps(note, sort_keys=True).encode())


def add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without a date or an owner."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def write_table(path: Path, pictures: list[Path]) -> None:
    """A Parquet table with the columns `key` and `image`."""
    table = pa.table(
        {
            "key": pa.array([picture.stem for picture in pictures], pa.string()),
            "image": pa.array([picture.read_bytes() for picture in pictures], pa.binary()),
        }
    )
    pq.write_table(table, path, compression="none")


if __name__ == "__main__":
    main()
