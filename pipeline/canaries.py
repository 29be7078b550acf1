"""How much two models differ on pictures that nobody has labelled: two runs over them, compared."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.errors import RunRefused
from pipeline.reader import Run, open_run
from pipeline.records import Array
from pipeline.scoretable import CANARIES


def flips(before: str, after: str) -> pa.Table:
    """One row (`CANARIES`) per picture that both runs answer; its class is one pixel.

    Args:
        before: a finished run.
        after: one of another model over the same pictures.

    Raises:
        RunRefused: they have no picture in common.
    """
    rows = list(_compared(open_run(before), open_run(after)))
    if not rows:
        raise RunRefused(f"{before} and {after} have no pictures in common")
    return pa.Table.from_pylist(rows, CANARIES)


def _compared(old: Run, new: Run) -> Iterator[dict[str, object]]:
    for key in sorted(_keys(old) & _keys(new)):
        old_HW, new_HW = _answer(old, key), _answer(new, key)
        changed = int(np.count_nonzero(old_HW != new_HW))
        yield {"key": key, "changed": changed, "pixels": old_HW.size}


def _answer(run: Run, key: str) -> Array:
    if run.ledger.layout.has_masks:
        return run.mask(key)
    return np.array([[run.prediction(key)["label"]]])


def _keys(run: Run) -> set[str]:
    table = run.images
    done = [state == "done" for state in table["status"].to_pylist()]
    return set(table["key"].filter(pa.array(done)).to_pylist())
