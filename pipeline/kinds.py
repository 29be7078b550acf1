"""What an object of the archive is, by its name: the one rule for sidecars.

skip       any part of the path starts with ``.``; ends with ``/``; a sidecar suffix or name:
           counted, never rejected
mask       ``NAME.mask.png`` or ``NAME.seg.png``, a label that lies beside its picture: nothing to
           segment, counted; those who read labelled data (pairing.py) look for it
webdataset ``.tar``
parquet    ``.parquet``, ``.pq``
image      a picture suffix, ours or foreign (``.svg``, ``.heic``, …), or no suffix at all: decode
           decides, foreign ones end as rejected rows
unknown    any other suffix: its first bytes decide between image, shard and skip
"""

from typing import Literal

Kind = Literal["image", "mask", "webdataset", "parquet", "skip", "unknown"]

OURS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".tif", ".tiff", ".webp", ".bmp", ".dib",
    ".gif",
])  # fmt: skip
FOREIGN = frozenset([
    ".svg", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".psd", ".eps", ".ps",
    ".ico", ".icns", ".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".xcf", ".wmf", ".emf", ".fits", ".fit",
    ".dds", ".sgi", ".rgb", ".im", ".msp", ".fli", ".flc", ".cur", ".qoi", ".pdf",
])  # fmt: skip
"""Picture formats outside the allow-list: images that will be rejected as unsupported_format."""
SIDECARS = frozenset([
    ".json", ".jsonl", ".ndjson", ".txt", ".md", ".rst", ".csv", ".tsv", ".xml", ".yaml",
    ".yml", ".toml", ".html", ".htm", ".log", ".lst", ".idx", ".index", ".cls", ".names",
    ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".pyd", ".bin", ".h5", ".hdf5", ".mat",
    ".db", ".ini", ".cfg", ".xmp", ".aux", ".prj", ".tfw", ".jgw", ".pgw", ".wld", ".kml",
    ".geojson", ".shp", ".shx", ".dbf", ".cpg", ".qml", ".vrt", ".ovr", ".md5", ".sha1",
    ".sha256", ".sha512", ".crc", ".sig", ".asc", ".tmp", ".temp", ".part", ".partial",
    ".crdownload", ".bak", ".swp", ".lock", ".err", ".out", ".py", ".ipynb", ".sh", ".bat",
    ".mp4", ".mov", ".avi", ".mkv", ".wav", ".mp3", ".doc", ".docx", ".xls", ".xlsx", ".ppt",
    ".pptx", ".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tgz",
])  # fmt: skip
"""Never images: counted as skipped. Compressed archives too: they have no offsets to read by."""
SIDECAR_NAMES = frozenset([
    "readme", "license", "licence", "copying", "authors", "changelog", "notice", "makefile",
    "manifest", "thumbs.db", "desktop.ini", "_success", "_metadata", "_common_metadata",
    "checksums", "md5sums", "sha256sums", "dockerfile",
])  # fmt: skip

MASK_ENDINGS = (".mask.png", ".seg.png")
_OF_SUFFIX: dict[str, Kind] = {
    **dict.fromkeys(OURS | FOREIGN, "image"),
    **dict.fromkeys(SIDECARS, "skip"),
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def kind_of_name(path: str) -> Kind:
    """The kind a path (or a member name) suggests."""
    if path.endswith("/") or (("/." in path or path.startswith(".")) and _hidden(path)):
        return "skip"
    name = path.rpartition("/")[2].lower()
    if name in SIDECAR_NAMES:
        return "skip"
    if name.endswith(MASK_ENDINGS):
        return "mask"
    _, dot, suffix = name.rpartition(".")
    return _OF_SUFFIX.get(dot + suffix, "unknown") if dot else "image"


def is_mask(path: str) -> bool:
    """Whether it is named as the mask of a picture beside it."""
    return path.lower().endswith(MASK_ENDINGS)


def picture_of_mask(path: str) -> str | None:
    """The picture, less its suffix, that a mask of this name is of; None for all other names."""
    endings = (end for end in MASK_ENDINGS if path.lower().endswith(end))
    return next((path[: -len(end)] for end in endings), None)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in {".", ".."} for part in path.split("/"))
