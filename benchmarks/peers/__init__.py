"""The same work by others: what a good engineer writes in an afternoon, each a script of its own.

    python -m benchmarks.peers.plain_loop SOURCE OUT [--model BUNDLE] [--batch N] [--threads N] …

Same weights, a mask of native resolution for every picture, and class statistics (pixels, fraction,
mean confidence) in Parquet. The scripts differ in what brings pictures to the model: `plain_loop`,
`torch_loader`, `ray_data`, `daft_frame`. What they do not differ in is shared, so that all do the
same: `command` (their words), `reading` (files, shards, Pillow), `work` (model, mask, statistics)
and `outcome` (the line they print). `python -m benchmarks.peers` races them against
`maskfleet segment`: see `__main__`.

What is done in their favour, or left out for all:

* masks are single files of zstd level 1 (their sizes stand in the statistics): 0.13 ms a picture
  where PNG takes 0.7 at its fastest; no fsync, no hashes, no resume, no picture of the outcome;
* pictures of one size share a batch, never resized; on mixed sizes a batch falls into groups of
  equal size, down to one picture, as no framework here pads and masks them;
* orientation is not applied and pictures are read whole: the corpora hold none that is turned.
"""
