"""Check that batches that do not fit into memory are run in portions, with the same rows, and end no run of images."""

import numpy as np
import pytest
import torch

import featcli
from featcli import open_dump
from featcli.backbones.backbone import Backbone
from featcli.dump.folder import Dump
from featcli.errors import MachineError

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 8, "threads": 1, "out_indices": "all"}


class Full:
    """A device on which only so many images fit."""

    def __init__(self, most, error):
        self.most = most
        self.error = error
        self.tried = []
        self.real = Backbone.run

    def __call__(self, backbone, pixels, **more):
        self.tried.append(len(pixels))
        if len(pixels) > self.most:
            raise self.error
        return self.real(backbone, pixels, **more)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_batch_is_halved_until_it_fits(tmp_path, photos, monkeypatch, cli, error):
    """The rows equal those of whole batches, and the portion is found once, reported once and recorded."""
    featcli.extract(photos, output=tmp_path / "whole", **OPTIONS)
    full = Full(2, error)
    monkeypatch.setattr(Backbone, "run", lambda *arguments, **more: full(*arguments, **more))
    given = ("-c", "test_resnet", "--random-init", "--batch-size", 8, "--threads", 1, "--out-indices", "all")
    run = cli("extract", photos, "-o", tmp_path / "d", *given)
    assert run.code == 0, run.err
    assert full.tried == [8, 4, 2, 2, 2, 2, 2, 2]
    assert [line for line in run.err.splitlines() if "fit into the memory" in line] == [
        "warning: 8 images do not fit into the memory of cpu: 4 are computed at once",
        "warning: 4 images do not fit into the memory of cpu: 2 are computed at once",
    ]
    one, other = open_dump(tmp_path / "whole"), open_dump(tmp_path / "d")
    for stage in one.stages:
        assert np.array_equal(one[stage][:], other[stage][:])
    assert Dump.existing(tmp_path / "d").record_of(0)["batch_size"] == 2
    assert "batch_size" not in Dump.existing(tmp_path / "whole").record_of(0)


def test_not_even_one_image(tmp_path, photos, monkeypatch, cli):
    """If one image is too much, the run says so with exit code 7, and commits nothing."""
    full = Full(0, ERRORS[0])
    monkeypatch.setattr(Backbone, "run", lambda *arguments, **more: full(*arguments, **more))
    run = cli("extract", photos, "-o", tmp_path / "d", "-c", "test_resnet", "--random-init", "--batch-size", 4, "-q")
    assert (run.code, full.tried) == (7, [4, 2, 1])
    assert "error: one image does not fit into the memory of cpu" in run.err
    assert len(run.err.splitlines()) == 3  # one line says how many images are safe
    assert not list((tmp_path / "d" / "shards").iterdir())


def test_other_errors_are_not_taken_for_memory(tmp_path, photos, monkeypatch):
    """An error of another kind in the forward pass is a bug, and is shown."""
    full = Full(0, RuntimeError("shapes do not match"))
    monkeypatch.setattr(Backbone, "run", lambda *arguments, **more: full(*arguments, **more))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    assert full.tried == [8]
    with pytest.raises(MachineError):
        featcli.extract(photos, output="/proc/nowhere", **OPTIONS)
