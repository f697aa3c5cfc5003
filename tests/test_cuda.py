"""Check that a GPU gives the rows of the CPU.

Tests are skipped without a GPU, except those in which the CPU stands in.
"""

import numpy as np
import pytest
import torch

import featcli
from conftest import draw, tree
from featcli import open_dump
from featcli.backbones.backbone import Backbone

has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=has_gpu)]
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 8, "out_indices": "all"}


@pytest.fixture
def pictures(tmp_path):
    """Make eighteen pictures, one of them broken: three shards, and a short last batch."""
    for i in range(18):
        draw(tmp_path / "pictures" / f"{i:02d}.png", i)
    (tmp_path / "pictures" / "05.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def assert_close(one, other, tolerance):
    """Compare every stage by its largest number; both must have the same failed rows."""
    assert one.valid.tolist() == other.valid.tolist()
    assert one.stages == other.stages
    for stage in one.stages:
        maps, found = (dump[stage].tensor().float().numpy() for dump in (one, other))
        assert np.isnan(found[~one.valid]).all()
        np.testing.assert_allclose(found, maps, rtol=0, atol=tolerance * np.nanmax(np.abs(maps)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-4),
        ({"layout": "channels-last", "fold": True}, 1e-4),
        ({"pool": "2x2", "dtype": "float16"}, 1e-3),
        ({"precision": "bf16", "dtype": "bfloat16"}, 5e-2),
        ({"precision": "fp16", "pool": "avg"}, 1e-2),
    ],
    ids=str,
)
def test_the_rows_of_the_cpu(pictures, tmp_path, device, options, tolerance):
    """A GPU gives the rows of the CPU, however the network is run and maps are reduced."""
    kept = {name: options[name] for name in ("pool", "dtype") if name in options}
    featcli.extract(pictures, output=tmp_path / "cpu", device="cpu", **OPTIONS, **kept)
    outcome = featcli.extract(pictures, output=tmp_path / "d", device=device, **OPTIONS, **options)
    assert (outcome.written, outcome.failed) == (17, 1)
    assert_close(open_dump(tmp_path / "cpu"), open_dump(tmp_path / "d"), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bytes_again(pictures, tmp_path, device):
    """Shards made by two runs have the bytes of one run."""
    options = {**OPTIONS, "device": device}
    featcli.extract(pictures, output=tmp_path / "whole", **options)
    featcli.extract(pictures, output=tmp_path / "d", part="1/3", **options)
    featcli.extract(pictures, output=tmp_path / "d", **options)
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_runs_out_in_the_middle_of_a_batch(pictures, tmp_path, device, monkeypatch):
    """Rows that were already on their way are overwritten in their places when their batch is computed again."""
    featcli.extract(pictures, output=tmp_path / "whole", device=device, **OPTIONS)
    run, tried = Backbone.run, []

    def less_and_less(backbone, pixels, **more):
        tried.append(len(pixels))
        if len(pixels) > (2 if len(tried) < 5 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(backbone, pixels, **more)

    monkeypatch.setattr(Backbone, "run", less_and_less)
    featcli.extract(pictures, output=tmp_path / "d", device=device, **OPTIONS)
    assert tried[:9] == [4, 2, 2, 2, 2, 1, 1, 1, 1]  # the fifth is the second half of the second batch
    assert_close(open_dump(tmp_path / "whole"), open_dump(tmp_path / "d"), 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_another_gpu_alone(pictures, tmp_path):
    """A run on the second GPU takes no memory of the first."""
    free = torch.cuda.mem_get_info(0)[0]
    featcli.extract(pictures, output=tmp_path / "d", device="cuda:1", **OPTIONS)
    assert torch.cuda.memory_reserved(0) == 0
    assert torch.cuda.mem_get_info(0)[0] == free
