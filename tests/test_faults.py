"""Killed, or refused by the disk, at any call that changes it: `make torture` tries every one, this some of them."""

import faults
import pytest
import torch

from featcli.dump.verify import verify

SOME = 4  # of about a hundred calls, spread over them


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def rehearsed(request, tmp_path_factory):
    """Scenes by name, each run once with nothing happening to it."""
    import timm  # noqa: F401  (before the fork: a child need not import it)

    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
    folder = tmp_path_factory.mktemp("scenes")
    scenes = dict(faults.scenes(folder, request.param))
    for name, scene in scenes.items():
        scene.rehearse(folder / f"rehearsed {name}")
        assert verify(folder / f"rehearsed {name}").state == "whole"
    return scenes


@pytest.mark.parametrize("fault", faults.FAULTS)
@pytest.mark.parametrize("name", ["new", "large", "mended", "overwritten"])
def test_a_fault_at_any_call(rehearsed, tmp_path, name, fault):
    """Whatever a fault leaves is whole or nothing, and the same command brings the dump to the same bytes."""
    scene = rehearsed[name]
    assert {"pwrite", "fsync", "link", "unlink", "truncate"} <= set(scene.calls)
    places = range(list(faults.FAULTS).index(fault), len(scene.calls), max(1, len(scene.calls) // SOME))
    wrong = [scene.survives(tmp_path / str(at), fault, at) for at in places]
    assert [text for text in wrong if text] == []
