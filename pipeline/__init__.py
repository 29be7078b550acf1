"""From a bucket of images to a bucket of masks.

Open in this order: run (the legs), listing, plan, formats/, pictures, decode (headers), tile (cut),
batch, infer, tile (stitch), measure, packing, fragment, ledger, finalize.
classify is the short way, for models that answer with one class per picture.
archive puts a whole call together, create founds a run, here and cluster are the places it runs,
careful finds an image that kills and foreign_table reads a table that may, both in a child (apart);
reader opens what was made. records, config, errors, keys, kinds, layout and line are the nouns they
share; storage is where bytes lie. room and memory bound what is held, bound binds a process to its
parent.

How a model gets there: labels (pairing, ontology, splits) reads labelled pictures, evaluate and
scoring measure a model on them; train (train_config, training_plan) has training do the steps, over
a trainset, with checkpoints and a history, here or in train_on_ray; registry (versions) keeps what
came of it, gate (promotion, decision) says whether it may replace the champion, retrain is a whole
round. schedule, scheduler, timetable, lease, submission and children run any command in time.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.reader import Run

__all__ = ["open_run"]


def open_run(uri: str) -> "Run":
    """Open a run folder to read it.

    ``open_run(uri).mask(key)`` is a mask; ``.images``, ``.class_stats``, ``.rejected`` are tables.
    Of a classifier's run ``.prediction(key)`` is a class and ``.predictions`` the table.
    """
    from pipeline.reader import open_run  # pyarrow and zarr: not needed to import a sibling

    return open_run(uri)
