"""Which class a whole picture is of, where no mask says it: what a classifier learns from.

table     ``labels.csv`` beside the data, with columns ``key`` and ``label`` and maybe ``split`` and
          ``stratum``; a picture whose label is empty is left out
column    ``label`` of a Parquet table of pictures (pipeline/pairing.py reads these two)
member    ``NAME.cls`` beside ``NAME.jpg`` in a tar, as WebDataset has it
folder    the innermost folder that a picture lies in: ``cat/1.jpg``, ``train/cat/1.jpg``,
          ``train-0.tar#cat/1.jpg``

A label is the name of a class, or its id.
"""

import csv
import io
from collections.abc import Iterable, Mapping

from pipeline.errors import RunRefused, StorageMissing
from pipeline.keys import printable, unescape
from pipeline.storage import Store

TABLE = "labels.csv"
COLUMNS = ("key", "label", "split", "stratum")

Row = Mapping[str, str]
"""What labels.csv says of a picture: the columns it has."""


def table_of(store: Store) -> dict[str, Row] | None:
    """The rows of labels.csv by key; None where there is none.

    Raises:
        RunRefused: it is no such table, or names a key twice.
    """
    where = f"{store.uri}/{TABLE}"
    try:
        text = store.read(TABLE).decode("utf-8-sig")
    except StorageMissing:
        return None
    except UnicodeDecodeError as error:
        raise RunRefused(f"{where} is not UTF-8: {error}") from error
    found: dict[str, Row] = {}
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        names = reader.fieldnames or ()
        if not {"key", "label"} <= set(names):
            raise RunRefused(
                f"{where} has the columns {printable(', '.join(names), 200)}; it needs key and "
                "label, and may have split and stratum"
            )
        for row in reader:
            said = {name: (row.get(name) or "").strip() for name in COLUMNS if name in names}
            if said["key"] in found:
                raise RunRefused(f"{where} names {printable(said['key'])} twice")
            found[said["key"]] = said
    except csv.Error as error:
        raise RunRefused(f"{where} is no CSV: {error}") from error
    return found


def by_folder(keys: Iterable[str], not_classes: Iterable[str]) -> dict[str, str] | None:
    """The folder of each picture; None unless all lie in folders, and in two or more.

    Args:
        keys: of the pictures.
        not_classes: names of folders that say something else.
    """
    found = {key: _folder(key) for key in keys}
    names = set(found.values())
    plain = any(name is None or name.lower() in not_classes for name in names)
    return None if plain or len(names) < 2 else {k: name for k, name in found.items() if name}


def _folder(key: str) -> str | None:
    parts = key.rpartition("#")[2].split("/")
    return unescape(parts[-2]) if len(parts) > 1 else None
