"""Killed, or refused by the disk, at any call that changes it: `make torture` tries every one, this some of them."""

import faults
import pytest
import torch

from conftest import draw, tree
from featcli.verify import verify

SOME = 6  # of about a hundred calls, spread over them


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def undisturbed(request, tmp_path_factory):
    """(photos, format, the tree of a run that nothing happened to, its calls)."""
    import timm  # noqa: F401  (before the fork: a child need not import it)

    folder = tmp_path_factory.mktemp("undisturbed")
    for i in range(5):
        draw(folder / "photos" / f"{i}.png", i, (32, 32))
    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
    ended = faults.run(folder / "photos", folder / "d", request.param)
    assert ended.code == 0
    assert verify(folder / "d").state == "whole"
    return folder / "photos", request.param, tree(folder / "d"), ended.calls


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_fault_at_any_call(undisturbed, tmp_path, fault):
    """Whatever a fault leaves is whole or nothing, and the same command brings the dump to the same bytes."""
    photos, format_name, expected, calls = undisturbed
    assert {"pwrite", "fsync", "link", "unlink", "mkdir", "truncate"} <= set(calls)
    places = range(0, len(calls), max(1, len(calls) // SOME))
    wrong = [faults.survives(photos, expected, tmp_path / str(at), format_name, fault, at) for at in places]
    assert [text for text in wrong if text] == []
