"""A whole run on a GPU is the run on a CPU, but for pixels that lie on the fence."""

import numpy as np
import pytest
import torch

from pipeline import open_run
from pipeline.config import Compute
from pipeline.errors import EXIT_REJECTIONS
from pipeline.here import Here
from tests import archives
from tests.archives import problems, segment
from tests.gpu.test_device import DISAGREEMENT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return archives.mixed(tmp_path_factory.mktemp("archive"))


def run_on(device, source, out, model, **knobs):
    compute = {"device": device, "workers": 3, "decode_threads": 2}
    place = Here(Compute(**compute))
    outcome = segment(source, out, model, place, compute=compute, **knobs)
    assert outcome.exit_code == EXIT_REJECTIONS  # one picture is broken
    assert problems(out) == []
    return open_run(str(out))


@pytest.mark.parametrize("mix", [False, True])
def test_masks_tables_and_rejections_are_those_of_a_cpu(source, tiny_bundle, tmp_path, mix):
    knobs = {"confidence": True, "tile": {"size": 32, "overlap": 8}, "batch": {"mix": mix}}
    here = run_on("cpu", source, tmp_path / "cpu", tiny_bundle, **knobs)
    there = run_on("cuda", source, tmp_path / "cuda", tiny_bundle, **knobs)

    wrong = total = 0
    assert there.images["key"].to_pylist() == here.images["key"].to_pylist()
    assert there.images["status"].to_pylist() == here.images["status"].to_pylist()
    for row in here.images.to_pylist():
        if row["status"] == "done":
            one, other = here.mask(row["key"]), there.mask(row["key"])
            wrong += int(np.not_equal(one, other).sum())
            total += one.size
    assert wrong <= DISAGREEMENT * total


def test_the_receipt_knows_the_gpu(source, tiny_bundle, tmp_path):
    compute = Compute(device="cuda", workers=2)
    outcome = segment(
        source, tmp_path / "run", tiny_bundle, Here(compute), compute=compute.model_dump()
    )

    call = outcome.receipt["this_call"]
    assert call["gpus"] == 1
    assert call["busy_seconds_per_stage"]["device"] > 0
