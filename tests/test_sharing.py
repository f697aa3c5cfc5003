"""Check one dump with several processes, or moved, linked or taken apart: nothing is mixed, nothing is deleted."""

import os
import shutil

import pytest

import featcli
from conftest import draw, tree
from featcli import open_dump
from featcli.dump.folder import Dump
from featcli.dump.lock import FolderLock
from featcli.dump.verify import repair, verify
from featcli.errors import ConflictError, DamagedError, IncompleteError
from featcli.views.inspection import inspect_dump

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4}


@pytest.fixture
def dump(photos, tmp_path):
    """Make a complete dump of twelve pictures in three shards."""
    featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    return tmp_path / "d"


@pytest.fixture
def mended(photos, tmp_path):
    """Return a dump in which 01.png failed, although the picture is good by now, and the number of its shard."""
    good = (photos / "01.png").read_bytes()
    (photos / "01.png").write_bytes(b"broken")
    again(photos, tmp_path / "d")
    (photos / "01.png").write_bytes(good)
    return tmp_path / "d", open_dump(tmp_path / "d").rows["01.png"] // 4


def again(photos, dump, **options):
    return featcli.extract(photos, output=dump, **{**OPTIONS, **options})


@pytest.mark.parametrize("options", [{"overwrite": True}, {"overwrite": True, "seed": 5}], ids=["same", "other"])
def test_overwriting_beside_another_process(dump, photos, options):
    """A dump that another process works on is not deleted."""
    before = tree(dump)
    with FolderLock(dump) as other:
        assert other.together()
        with pytest.raises(ConflictError, match="in use by another process"):
            again(photos, dump, **options)
    assert tree(dump) == before
    again(photos, dump, **options)


def test_repair_and_retry_beside_another_process(photos, tmp_path):
    """Only one process alone makes committed shards again."""
    draw(photos / "00.png", 3).write_bytes(b"broken")
    dump = tmp_path / "d"
    again(photos, dump)
    with FolderLock(dump) as other:
        assert other.together()
        with pytest.raises(ConflictError, match="in use"):
            again(photos, dump, retry_failed=True)
        Dump.existing(dump).shard_path(1).unlink()
        with pytest.raises(ConflictError, match="in use"):
            again(photos, dump)
        with pytest.raises(ConflictError, match="in use"):
            repair(verify(dump))
    again(photos, dump, retry_failed=True)


def test_a_process_that_holds_a_dump_alone(dump, photos, monkeypatch, cli):
    """While one process holds a dump alone, others are refused with exit code 5, and succeed once it has ended."""
    monkeypatch.setattr("featcli.dump.lock.PATIENCE", 0.1)
    given = ("-c", "test_resnet", "--random-init", "--batch-size", 4, "--shard-size", 4)
    with FolderLock(dump) as other:
        assert other.alone()
        run = cli("extract", photos, *given, "-o", dump, "-q")
        assert (run.code, "in use by another process" in run.err) == (5, True)
        assert cli("finalize", dump).code == 5
        assert other.together()
        assert again(photos, dump).extracted == 0
    assert again(photos, dump, overwrite=True).extracted == 12


def test_work_is_shared(photos, tmp_path):
    """A shard that another process has committed is not made again by one that had it on its list."""
    done = []

    def report(kind, **facts):
        if kind == "shard" and not done:  # in the middle of the first run, a second run makes the rest
            done.append(again(photos, tmp_path / "d", batch_size=1, shard_size=1).extracted)

    first = featcli.extract(
        photos, output=tmp_path / "d", report=report, **{**OPTIONS, "batch_size": 1, "shard_size": 1}
    )
    assert done[0] >= 6
    assert first.extracted + done[0] == 12
    assert verify(tmp_path / "d").state == "whole"


def test_what_was_put_aside_forgives_nothing(photos, tmp_path):
    """A record that repair put aside says nothing about images once its shard has been made again."""
    good = (photos / "01.png").read_bytes()
    (photos / "01.png").write_bytes(b"broken")
    dump = tmp_path / "d"
    again(photos, dump)
    path = Dump.existing(dump).shard_path(open_dump(dump).rows["01.png"] // 4)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    repair(verify(dump))
    again(photos, dump)
    (photos / "01.png").write_bytes(good)
    again(photos, dump, retry_failed=True)
    draw(photos / "01.png", 99, (200, 210))
    for options in ({}, {"retry_failed": True}):
        with pytest.raises(ConflictError, match="1 image changed"):
            again(photos, dump, **options)


def test_repair_looks_again(dump, photos):
    """A shard that was made again between the look and the repair is not put aside."""
    path = Dump.existing(dump).shard_path(1)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    verdict = verify(dump)
    path.write_bytes(content)
    before = tree(dump)
    assert repair(verdict) == []
    assert tree(dump) == before


def test_a_file_system_without_locks(dump, photos, monkeypatch, cli):
    """If folders cannot be locked, the run says so, and does its work."""
    import fcntl

    def refused(*_):
        raise OSError(9, "Bad file descriptor")

    Dump.existing(dump).shard_path(1).unlink()
    monkeypatch.setattr(fcntl, "flock", refused)
    given = ("-c", "test_resnet", "--random-init", "--batch-size", 4, "--shard-size", 4)
    run = cli("extract", photos, *given, "-o", dump)
    assert (run.code, "this file system has no locks" in run.err) == (0, True)
    assert verify(dump).state == "whole"


def test_a_lost_shard_of_failed_images_is_made_again(photos, tmp_path):
    """A shard whose file is lost is made again with a new record, although its images are read differently now."""
    picture = (photos / "01.png").read_bytes()
    (photos / "01.png").write_bytes(bytes(len(picture)))  # of the same size, so that nothing else could tell
    dump = tmp_path / "d"
    assert again(photos, dump).failed == 1
    row = open_dump(dump).rows["01.png"]
    Dump.existing(dump).shard_path(row // 4).unlink()
    (photos / "01.png").write_bytes(picture)
    assert again(photos, dump).failed == 0
    assert verify(dump).state == "whole"


def test_a_kill_between_two_records(photos, mended):
    """While a shard is made again its record is put aside, and what it knows about repaired images still counts."""
    dump, shard = mended
    record = Dump.existing(dump).record_path(shard)
    record.rename(f"{record}.before")
    assert again(photos, dump, retry_failed=True).failed == 0
    assert verify(dump).state == "whole"
    assert not list(dump.rglob("*.before"))


def test_repair_after_a_retry(photos, mended):
    """A shard that was tried again and damaged later is put aside, and made again by the plain command."""
    dump, shard = mended
    again(photos, dump, retry_failed=True)
    before = tree(dump)
    path = Dump.existing(dump).shard_path(shard)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    repair(verify(dump))
    again(photos, dump)
    assert {name: content for name, content in tree(dump).items() if not name.endswith(".damaged")} == before


def test_a_shard_that_is_a_dangling_link(dump, photos):
    """Shards on a disk that is not mounted are missing, whatever the links to them say."""
    path = Dump.existing(dump).shard_path(1)
    path.unlink()
    path.symlink_to("/nowhere/00001.h5")
    again(photos, dump)
    assert verify(dump).state == "whole"
    assert not path.is_symlink()


def test_a_plan_that_is_gone(dump, photos, cli):
    """Shards without a plan are never taken into another one, and the manifest gives the plan back."""
    before = tree(dump)
    (dump / "plan.json").unlink()
    for read in (lambda: again(photos, dump), lambda: inspect_dump(dump), lambda: open_dump(dump)):
        with pytest.raises(DamagedError, match=r"plan\.json is gone") as refused:
            read()
        assert "verify --repair" in refused.value.hint
    assert cli("verify", dump, "--repair").code == 0  # with the plan everything else is whole
    assert tree(dump) == before
    for name in ("plan.json", "manifest.json"):
        (dump / name).unlink()
    with pytest.raises(DamagedError) as refused:
        again(photos, dump)
    assert "--overwrite" in refused.value.hint
    again(photos, dump, overwrite=True, seed=1)
    assert verify(dump).state == "whole"


def test_an_image_list_that_is_gone(dump, photos):
    """The same command lists the images again if they are unchanged; else the dump is refused."""
    before = tree(dump)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"{}\n")):
        damage(dump / "images.jsonl")
        with pytest.raises(DamagedError, match=r"images\.jsonl"):
            open_dump(dump).keys  # noqa: B018  (it is read when asked for)
        again(photos, dump)
        assert tree(dump) == before
    (dump / "images.jsonl").unlink()
    draw(photos / "01.png", 77)
    with pytest.raises(DamagedError):
        again(photos, dump)


def test_folders_of_others(tmp_path, photos):
    """A folder with other files is not written into, whatever their names."""
    for number, names in enumerate((["images.jsonl"], ["shards/notes.txt"], ["images.jsonl", "shards/x.tar"])):
        for name in names:
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
        for overwrite in (False, True):
            with pytest.raises(ConflictError):
                again(photos, tmp_path / str(number), overwrite=overwrite)
        assert set(tree(tmp_path / str(number)).values()) == {b"mine"}


def test_shards_that_are_a_link(dump, photos, tmp_path):
    """Overwriting or repairing a dump whose shards are a link deletes nothing behind the link."""
    shutil.copytree(dump, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "shards")
    (tmp_path / "other" / "shards").symlink_to(dump / "shards")
    before = tree(dump)
    with pytest.raises(ConflictError, match="is a link"):
        again(photos, tmp_path / "other", overwrite=True)
    (tmp_path / "other" / "manifest.json").write_text("{")
    with pytest.raises(ConflictError, match="is a link"):
        repair(verify(tmp_path / "other"))
    assert tree(dump) == before


def test_what_inspect_sees_of_the_last_files(dump, cli):
    """inspect names missing or damaged files beside the shards, and does not call the dump complete."""
    for name in ("images.jsonl", "failures.jsonl", "manifest.json"):
        content = (dump / name).read_bytes()
        (dump / name).write_bytes(b"{") if name == "manifest.json" else (dump / name).unlink()
        shown = cli("inspect", dump)
        assert (shown.code, f"gone or damaged: {name}" in shown.out) == (8, True), name
        (dump / name).write_bytes(content)
    (dump / "manifest.json").unlink()
    assert "featcli finalize" in cli("inspect", dump).out
    assert cli("finalize", dump, "-q").out == ""
    assert cli("inspect", dump).code == 0


def test_a_start_without_a_plan(tmp_path, cli):
    """A start that was stopped before it wrote a plan is an incomplete dump, and no unknown model."""
    (tmp_path / "d" / "shards").mkdir(parents=True)
    with pytest.raises(IncompleteError, match=r"no plan\.json yet"):
        inspect_dump(tmp_path / "d")
    assert cli("inspect", tmp_path / "d").code == 8


def test_files_that_never_end(dump):
    """Pipes and devices in place of files of a dump are damage, for which nobody waits and no memory fills."""
    for name in ("images.jsonl", "plan.json", "shards/00000.json", "shards/00000.h5"):
        content = (dump / name).read_bytes()
        for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
            (dump / name).unlink()
            make(dump / name)
            assert verify(dump).state == "damaged", name
            with pytest.raises(DamagedError):
                open_dump(dump)["stage4"][:]
            (dump / name).unlink()
            (dump / name).write_bytes(content)
    assert verify(dump).state == "whole"


def test_recompute_says_what_it_cannot_do(dump, photos, cli):
    """--recompute says what it skips, and no hint leads to the deletion of a good dump."""
    given = (photos, "-c", "test_resnet", "--random-init")
    assert cli("verify", dump, *given, "--recompute", -1).code == 2
    refused = cli("verify", dump, *given, "--seed", 3, "--recompute", 2)
    assert (refused.code, "--overwrite" in refused.err) == (5, False)
    Dump.existing(dump).record_path(0).unlink()
    (dump / "manifest.json").unlink()
    shown = cli("verify", dump, *given, "--recompute", 2)
    assert (shown.code, "nothing was extracted anew" in shown.err) == (8, True)


def test_names_on_the_terminal(tmp_path, photos, cli):
    """Whatever a folder or a plan is called, everything that is printed is safe for a terminal."""
    dump = os.fsencode(tmp_path) + b"/nonutf\xff\x1b]0;x"
    again(photos, os.fsdecode(dump))
    for command in ("inspect", "verify", "finalize"):
        shown = cli(command, os.fsdecode(dump))
        assert shown.code == 0
        assert "nonutf\\xff\\x1b]0;x" in shown.out


def test_what_an_index_may_be(dump):
    """An index may be rows, keys, slices or masks, from numpy, torch or plain lists; anything else is refused."""
    import numpy as np
    import torch

    reader = open_dump(dump)
    maps = reader["stage4"]
    mask = np.arange(12) % 3 == 0
    for index in (list(mask), mask, torch.from_numpy(mask), mask.tolist()):
        assert np.array_equal(maps[index], maps[[0, 3, 6, 9]])
    assert np.array_equal(maps[torch.tensor(4)], maps[4])
    assert np.array_equal(maps[np.array([reader.keys[4], reader.keys[2]])], maps[[4, 2]])
    assert maps[[]].shape[0] == 0
    for index in (True, b"2", 1.0, [1.9], np.array([1.0]), [b"2"], [None], torch.ones(12), [[1, 2]]):
        with pytest.raises(TypeError):
            maps[index]
    with pytest.raises(IndexError):
        maps[mask[:5]]


def test_a_shard_that_is_open_elsewhere(dump):
    """A shard that the same process has open in h5py can be read."""
    import h5py

    with h5py.File(Dump.existing(dump).shard_path(0)) as file:
        assert (open_dump(dump)["stage4"][0] == file["stage4"][0]).all()
        assert verify(dump).state == "whole"


def test_a_list_is_read_once_though_another_run_begins_the_dump(photos, tmp_path, monkeypatch):
    """If another run has begun the dump meanwhile, the images that were found are kept, because stdin is read once."""
    from featcli.extraction import extract, planning

    found, claimed, said = [], [], []
    real_find, real_claim = planning.find, extract.claim

    def find(asked):
        found.append(real_find(asked))
        return found[-1]

    def claim(job, *rest):
        claimed.append(job)
        if len(claimed) == 1:
            raise extract.BegunMeanwhileError(job.listing)
        return real_claim(job, *rest)

    monkeypatch.setattr(planning, "find", find)
    monkeypatch.setattr(extract, "claim", claim)
    options = {"checkpoint": "test_resnet", "random_init": True, "output": tmp_path / "d"}
    outcome = featcli.extract(photos, **options, report=lambda kind, **facts: said.append(facts.get("text")))
    assert (len(found), len(claimed), outcome.is_complete) == (1, 2, True)
    assert claimed[1].listing is found[0]
    assert "another run has begun this dump meanwhile: its choices are taken" in said
