"""Kill a run, or refuse a call, at some calls that change the disk or read it. `make torture` tries all."""

from functools import cache

import faults
import pytest
import torch

from featcli.dump.verify import verify

SOME = 3  # of about a hundred calls, spread over them


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Return a function that gives a scene of a format by name, which was run once without a fault."""
    import timm  # noqa: F401  (before the fork, so that no child has to import it)

    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent

    @cache
    def scenes(format_name):
        return dict(faults.scenes(tmp_path_factory.mktemp("scenes"), format_name))

    @cache
    def scene(format_name, name):
        folder = tmp_path_factory.mktemp("rehearsed") / "dump"
        scenes(format_name)[name].rehearse(folder)
        assert verify(folder).state == "whole"
        return scenes(format_name)[name]

    return scene


@pytest.mark.parametrize("fault", faults.FAULTS)
@pytest.mark.parametrize(
    ("format_name", "name"),
    [
        ("hdf5", "new"),
        ("safetensors", "new"),
        pytest.param("hdf5", "mended", marks=pytest.mark.long),
        pytest.param("safetensors", "large", marks=pytest.mark.long),
        ("hdf5", "overwritten"),
    ],
)
def test_a_fault_at_any_call(rehearsed, tmp_path, format_name, name, fault):
    """After any fault each file is whole or absent, and the same command gives the dump the same bytes."""
    scene = rehearsed(format_name, name)
    assert {"pwrite", "fsync", "link", "unlink", "truncate"} <= set(scene.calls)
    places = range(list(faults.FAULTS).index(fault), len(scene.calls), max(1, len(scene.calls) // SOME))
    wrong = [scene.survives(tmp_path / str(at), fault, at) for at in places]
    assert [text for text in wrong if text] == []


@pytest.mark.parametrize("format_name", ["hdf5", "safetensors"])
def test_a_fault_while_rows_are_kept(tmp_path, format_name):
    """No fault loses a kept row: the next run makes only the others, and the dump has the same bytes."""
    import timm  # noqa: F401  (before the fork)

    torch.set_num_threads(1)
    scenes = dict(faults.keeping_scenes(tmp_path, format_name))
    wrong = []
    for name in {"hdf5": ["kept", "taken up, two"], "safetensors": ["kept"]}[format_name]:
        scenes[name].rehearse(tmp_path / f"rehearsed {name}")
        calls = len(scenes[name].calls)
        for number, fault in enumerate(faults.FAULTS):
            wrong += [scenes[name].survives(tmp_path / f"{name} {fault}", fault, (number + 1) * calls // 4 + number)]
    assert [text for text in wrong if text] == []


def test_a_read_that_fails(tmp_path):
    """A read that fails ends the run with exit code 7, or was not needed, and the same command gives equal bytes.

    Meanwhile a verification finds no damage, and moves no file.
    """
    import timm  # noqa: F401  (before the fork)

    torch.set_num_threads(1)
    scenes = dict(faults.reading_scenes(tmp_path, "safetensors"))
    scene, kept = scenes["new"], scenes["taken up"]
    scene.rehearse(tmp_path / "swept" / "whole", faults.READS)
    whole = tmp_path / "swept" / "whole"
    calls, ended = scene.calls, faults.checks(whole)[0]
    assert {"open", "stat", "fstat", "pread", "listdir", "scandir"} <= {*calls}
    assert {"open", "stat", "fstat", "pread", "preadv", "listdir"} <= {*ended.calls}
    assert ended.code == 0
    kept.rehearse(tmp_path / "kept" / "whole", faults.READS)
    rows = next(at for at, call in enumerate(kept.calls) if call == "pread")  # those that are resumed
    wrong = [kept.survives_reading(tmp_path / "kept" / fault, fault, rows) for fault in faults.READ_FAULTS]
    for number, fault in enumerate(faults.READ_FAULTS, 1):
        wrong += [scene.survives_reading(tmp_path / "swept" / fault, fault, number * len(calls) // 3)]
        wrong += [
            faults.checks(tmp_path / "swept" / "whole", fault, at)[1] for at in range(number, len(ended.calls), 20)
        ]
    assert [text for text in wrong if text] == []


def test_a_fault_while_a_dump_grows(tmp_path):
    """After any fault readers see the dump as it was or with a whole generation more, and the same command ends it."""
    import timm  # noqa: F401  (before the fork)

    torch.set_num_threads(1)
    scenes = [*faults.growing_scenes(tmp_path / "grows", "hdf5"), *faults.grown_scenes(tmp_path / "grown", "hdf5")]
    wrong = []
    for number, (name, scene) in enumerate(scenes[:2] + scenes[-2:]):
        folder = tmp_path / f"swept {name}"
        folder.mkdir()
        scene.rehearse(folder / "whole")
        assert verify(folder / "whole").state == "whole"
        fault = [*faults.FAULTS][number % 3]
        wrong += [scene.survives(folder / fault, fault, (number + 1) * len(scene.calls) // 7)]
    assert [text for text in wrong if text] == []
