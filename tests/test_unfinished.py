"""Check that a run that is stopped keeps the rows of its unfinished shard, and the next command resumes it exactly."""

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcli
from conftest import draw, tree
from featcli.dump import lock as lock_module
from featcli.dump import writer
from featcli.dump.checksummed_json import checksummed, read_checksummed
from featcli.dump.folder import Dump
from featcli.dump.lock import FolderLock
from featcli.dump.records import split_digests
from featcli.dump.shard import ShardWriter
from featcli.dump.unfinished import RowsMade
from featcli.dump.writer import DumpWriter
from featcli.errors import IncompleteError, MachineError
from featcli.pixels.failure import Failure
from featcli.run import progress, sink
from featcli.run.pipeline import ShardRunner

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 2, "threads": 1, "decode_threads": 1}
KINDS = {
    "maps": {"out_indices": "1,-1"},
    "vectors": {"pool": "avg", "dtype": "float16"},
    "native": {"fit": "native", "image_size": 64},
}


needs_locks = pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system has no list of locks")


class Stop(BaseException):
    """Stands for anything outside that stops a run."""


@pytest.fixture
def pictures(tmp_path):
    """Make nine pictures of three sizes, one of them broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(9):
        draw(folder / f"{i}.png", 20 + i, (64, 48) if i < 4 else (48 + 8 * (i % 2), 64))
    (folder / "3.png").write_bytes(b"broken")
    return folder


def run(pictures, output, stop_after=None, events=None, error=Stop, **options):
    """Extract, and stop after so many batches."""
    batches = []

    def report(kind, **facts):
        if events is not None:
            events.append((kind, facts))
        if kind == "batch":
            batches.append(facts["images"])
            if len(batches) == stop_after:
                raise error

    return featcli.extract(str(pictures), output=output, report=report, **{**OPTIONS, **options})


def records(dump):
    return sorted((dump / "shards").glob(".*.unfinished.json"))


def test_a_second_interruption_lets_the_shard_go(pictures, tmp_path):
    """Ctrl-C while rows are being kept after Ctrl-C leaves no lock, so that the same process can resume the shard."""
    options = OPTIONS | {"image_size": 32, "pool": "avg"}

    def interrupt(kind, **_):
        if kind in ("batch", "kept"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featcli.extract(pictures, output=tmp_path / "d", report=interrupt, **options)
    events = []
    run(pictures, tmp_path / "d", events=events, **options)
    assert [facts["rows"] for kind, facts in events if kind == "resumed"] == [2]


def partials(dump):
    return sorted((dump / "shards").glob(".*.partial"))


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [("maps", "hdf5"), ("maps", "safetensors"), ("vectors", "hdf5"), ("native", "safetensors")],
)
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bytes(pictures, tmp_path, kind, format_name):
    """A run that is stopped after each batch makes no batch twice, and its dump is that of an uninterrupted run."""
    options = {**KINDS[kind], "format": format_name}
    whole, dump, computed = tmp_path / "whole", tmp_path / "d", 0
    run(pictures, whole, **options)
    for _ in range(9):
        events = []
        try:
            outcome = run(pictures, dump, stop_after=1, events=events, **options)
        except Stop:
            outcome = None
        resumed = [facts["rows"] for name, facts in events if name == "resumed"]
        assert resumed == ([computed] if 0 < computed < 9 else [])
        computed += sum(facts["images"] for name, facts in events if name == "batch")
        assert len(partials(dump)) == len(records(dump)) == (computed < 9)  # the last batch commits the shard
        if outcome is not None:
            break
    assert computed == 9
    assert (outcome.written, outcome.failed) == (8, 1)
    assert tree(dump) == tree(whole)


def test_rows_are_kept_every_so_often(pictures, tmp_path, monkeypatch):
    """Each time a minute is over, all rows so far are on the disk, before anything is stopped."""
    monkeypatch.setattr(sink, "KEEP_SECONDS", 0.0)
    seen, dump = [], tmp_path / "d"

    def report(kind, **facts):
        if kind == "kept":
            (record,) = records(dump)
            seen.append((facts["rows"], read_checksummed(record)["rows"]))

    featcli.extract(str(pictures), output=dump, report=report, **OPTIONS)
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]
    assert not records(dump)


def test_rows_are_kept_when_another_thread_asks_for_it(pictures, tmp_path, monkeypatch):
    """Written rows are put on the disk at once if another thread asks for it, as before the end of a Ray actor."""
    runners, seen, dump, begin = [], [], tmp_path / "d", ShardRunner.__init__
    monkeypatch.setattr(ShardRunner, "__init__", lambda self, *rest: (begin(self, *rest), runners.append(self))[0])

    def report(kind, **facts):
        if kind == "batch" and len(seen) < 4:
            seen.append(0)
            runners[-1].keep()  # in the thread that feeds the backbone, while the writer is at work
            seen[-1] = sum(read_checksummed(record)["rows"] for record in records(dump))

    run(pictures, tmp_path / "whole")
    featcli.extract(str(pictures), output=dump, report=report, **OPTIONS)
    assert seen == sorted(seen)
    assert seen[-1] in (2, 4, 6, 8)  # a few batches may wait to be written
    runners[-1].keep()  # no new row is left to keep
    assert tree(dump) == tree(tmp_path / "whole")


def test_rows_of_all_unfinished_shards_are_safe(pictures, tmp_path, monkeypatch):
    """A run counts rows that two others have left in two unfinished shards as safe from its first line on."""
    monkeypatch.setattr(progress, "MINUTE", 0.0)
    monkeypatch.setattr(progress, "GRACE", 0.0)
    for part in ("0/2", "1/2"):
        with pytest.raises(Stop):
            run(pictures, tmp_path / "d", stop_after=1, shard_size=6, part=part)
    events = []
    run(pictures, tmp_path / "d", events=events, shard_size=6)
    (start,) = [facts for kind, facts in events if kind == "start"]
    assert start["unfinished_shards"] == [{"shard": 0, "kept": 2, "rows": 6}, {"shard": 1, "kept": 2, "rows": 3}]
    said = [(facts["done"], facts["safe"]) for kind, facts in events if kind == "progress"]
    assert said[0] == (6, 4)  # with the first batch of this run
    assert said[-1] == (9, 9)
    assert said == sorted(said)


def test_nothing_can_be_read_before_a_shard_is_finished(pictures, tmp_path, cli):
    """`export` and `show` of a dump with only unfinished shards end with exit code 8 and a way out."""
    dump = tmp_path / "d"
    with pytest.raises(Stop):
        run(pictures, dump, stop_after=1)
    hint = "hint: run its extract command again"
    for command, name in (("export", "o.h5"), ("export", "-"), ("show", "o.png"), ("show", "o.html")):
        refused = cli(command, dump, "-o", name if name == "-" else tmp_path / name)
        assert (refused.code, refused.out) == (8, "")
        assert refused.err == f"featcli: error: dump '{dump}': it is not complete and has 0 of 1 shard\n{hint}\n"
        refused = cli(command, dump, "--incomplete", "-o", name if name == "-" else tmp_path / name)
        assert (refused.code, refused.out) == (8, "")
        said = "none of its 1 shard is finished yet: 2 images kept in unfinished ones"
        rest = ": rows can be read when their shard is finished"
        assert refused.err == f"featcli: error: dump '{dump}': {said}\n{hint}{rest}\n"
    assert not [*tmp_path.glob("o.*")]


def test_what_is_missing_of_an_export(pictures, tmp_path, cli):
    """An export says how many of the missing images lie in unfinished shards."""
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4, shard_size=6)
    said = cli("export", tmp_path / "d", "--incomplete", "-o", tmp_path / "o.h5").out
    assert said.endswith("; 1 failed image left out; 3 images not there yet (2 of them in unfinished shards)\n")


@needs_locks
def test_a_look_at_a_dump_that_is_in_use(pictures, tmp_path, cli):
    """`inspect` and `verify` say that a run is at work, and take no lock, so that others can continue."""
    dump, seen = tmp_path / "d", []

    def report(kind, **_):
        if kind == "batch" and not seen:
            for command in ("inspect", "verify"):
                said, facts = cli(command, dump).out, cli(command, dump, "--json").events[0]
                seen.append((said.splitlines()[-1], facts["in_use"]))

    featcli.extract(str(pictures), output=dump, report=report, **OPTIONS)
    assert seen == 2 * [("a process is at work in it now: what was found may have changed since", True)]
    for command in ("inspect", "verify"):
        assert not cli(command, dump, "--json").events[0]["in_use"]
        assert "at work" not in cli(command, dump).out


@needs_locks
def test_a_look_takes_no_lock(tmp_path, monkeypatch):
    """A process that begins during a look gets the folder; without a list of locks nothing is said."""
    with FolderLock(tmp_path) as lock:
        assert lock.alone()
        monkeypatch.setattr(fcntl, "flock", None)
        assert lock_module.is_in_use(tmp_path)
        assert not lock_module.is_in_use(tmp_path.parent)
        for answer in ([], ["ino:\t5"], ["mnt_id:\t1", "ino:\tx"]):
            monkeypatch.setattr(lock_module, "_lines", lambda _, answer=answer: answer)
            assert not lock_module.is_in_use(tmp_path)

        def refuse(_):
            raise FileNotFoundError

        monkeypatch.setattr(lock_module, "_lines", refuse)
        assert not lock_module.is_in_use(tmp_path)


def test_a_file_that_loses_its_name(pictures, tmp_path, monkeypatch):
    """If another machine sees no locks and removes the file of a shard, the run ends within a minute."""
    monkeypatch.setattr(sink, "KEEP_SECONDS", 0.0)
    start, dump, events = DumpWriter.start, tmp_path / "d", []

    def removed(into, *rest):
        begun = start(into, *rest)
        begun.file.partial.unlink()
        return begun

    monkeypatch.setattr(DumpWriter, "start", removed)
    with pytest.raises(MachineError, match="it was removed while it was being written"):
        run(pictures, dump, events=events)
    assert not records(dump)
    assert "kept" not in [kind for kind, _ in events]
    monkeypatch.setattr(sink, "KEEP_SECONDS", 60.0)
    with pytest.raises(
        MachineError, match="it was removed while it was being written"
    ):  # when it would get its final name
        run(pictures, dump)
    monkeypatch.undo()
    assert run(pictures, dump).is_complete


OF_FILES = ("a row", "the file is shorter", "the file is empty", "other hashes")


@pytest.mark.parametrize("format_name", ["hdf5", "safetensors"])
def test_what_does_not_fit_is_thrown_away(pictures, tmp_path, format_name):
    """A record, a row or a header that was changed costs the rows, is reported, and never reaches a dump."""
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    run(pictures, whole, format=format_name)
    with pytest.raises(Stop):
        run(pictures, kept, stop_after=3, format=format_name)
    (partial,), size = partials(kept), partials(kept)[0].stat().st_size
    layout = Dump.at(whole).format.read_layout(str(next((whole / "shards").glob("00000.*[!n]"))), None)
    row = layout.arrays["stage4"]

    def flip(place):
        def damage(path, _):
            with open(path, "r+b") as file:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))

        return damage

    def say(**changes):
        def damage(_, record):
            content = json.loads(record.read_text())
            del content["checksum"]
            record.write_bytes(checksummed({**content, **changes}))

        return damage

    damages = {
        "a row": flip(row.offset + 3 * row.row_bytes),
        **({"a byte between arrays": flip(row.offset - 1)} if format_name == "hdf5" else {}),  # otherwise there is none
        "the file is shorter": lambda path, _: os.truncate(path, size - 1),
        "the file is empty": lambda path, _: os.truncate(path, 0),
        "the record": lambda _, record: record.write_bytes(record.read_bytes()[:-9]),
        "no JSON": lambda _, record: record.write_bytes(b"\0" * 99),
        "more rows": say(rows=8),
        "fewer rows": say(rows=4),
        "no rows": say(rows=0),
        "rows that are none": say(rows="6"),
        "another plan": say(fingerprint="0" * 32),
        "another shard": say(shard=1),
        "other hashes": say(hashes={"stage4": "0" * 32, "rest": "0" * 32}),
        "another file": say(file=".00000.h5.0000000000000000.partial"),
        "a failure of nobody": say(failures=[{"key": "a", "row": 77, "reason": "empty", "detail": ""}]),
        "traits of nobody": say(traits=[["2", {"deep": 1}]]),
    }
    tried = damages if format_name == "hdf5" else OF_FILES  # the content of a record is the same for both
    for name in tried:
        dump, events = tmp_path / name, []
        shutil.copytree(kept, dump)
        damages[name](partials(dump)[0], records(dump)[0])
        assert run(pictures, dump, events=events, format=format_name).extracted == 9, name
        assert [facts["text"] for kind, facts in events if kind == "warning" and "unfinished" in facts["text"]], name
        assert tree(dump) == tree(whole), name
    assert partial.exists()


@pytest.mark.parametrize("format_name", ["hdf5", "safetensors"])
def test_a_shard_that_was_nearly_committed(pictures, tmp_path, monkeypatch, format_name):
    """A kill between the end of the file and its name, or an error of the disk there, loses no kept row."""
    monkeypatch.setattr(sink, "KEEP_SECONDS", 0.0)
    run(pictures, tmp_path / "whole", format=format_name)
    finish, left = ShardWriter.finish, tmp_path / "as a kill leaves it"

    def copied(file, beside):
        written = finish(file, beside)
        shutil.copytree(tmp_path / "d", left)
        return written

    monkeypatch.setattr(ShardWriter, "finish", copied)
    run(pictures, tmp_path / "d", format=format_name)
    monkeypatch.undo()
    assert run(pictures, left, format=format_name).extracted == 1
    assert tree(left) == tree(tmp_path / "whole")


def test_rows_behind_those_that_are_kept_do_not_matter(pictures, tmp_path, monkeypatch):
    """Rows written after the record and before a kill are written again, because they are not trusted."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=2)
    (partial,) = partials(tmp_path / "d")
    array = (
        Dump.at(tmp_path / "whole").format.read_layout(str(tmp_path / "whole/shards/00000.h5"), None).arrays["stage4"]
    )
    with open(partial, "r+b") as file:
        file.seek(array.offset + 4 * array.row_bytes)
        file.write(os.urandom(2 * array.row_bytes))
    assert run(pictures, tmp_path / "d").extracted == 5
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_locks_rows_are_copied(pictures, tmp_path, monkeypatch, error):
    """If nobody can tell whether a file's writer lives, its rows are copied, and the file goes with the commit."""
    run(pictures, tmp_path / "whole")

    def no_locks(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=3)
    (before,) = partials(tmp_path / "d")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=1)
    assert before in partials(tmp_path / "d")
    assert read_checksummed(records(tmp_path / "d")[0])["file"] != before.name
    assert run(pictures, tmp_path / "d").extracted == 1
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_a_shard_whose_writer_lives_is_not_taken_up(pictures, tmp_path):
    """While another process holds the file, its rows are left alone, and the shard is made beside it."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=3)
    (partial,) = partials(tmp_path / "d")
    with open(partial, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert run(pictures, tmp_path / "d").extracted == 9
        assert partials(tmp_path / "d") == [partial]
    run(pictures, tmp_path / "d")
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@pytest.fixture
def beside(pictures, tmp_path):
    """Make two processes of the same shard, with `writer` and `batches` of each, which take turns here."""
    run(pictures, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "d")
    for path in (tmp_path / "d" / "manifest.json", *(tmp_path / "d" / "shards").iterdir()):
        path.unlink()
    whole, dump = Dump.at(tmp_path / "whole"), Dump.at(tmp_path / "d")
    made, keys, starts = whole.record_of(0), whole.keys(), range(0, 9, 2)
    whole_digests = split_digests(made["digests"])
    stage, valid = (
        featcli.open_dump(tmp_path / "whole")["stage4"][:],
        np.array([1, 1, 1, 0, 1, 1, 1, 1, 1], np.uint8),
    )

    class Process:
        """Makes batches of the shard, and keeps or commits them, when a test says so."""

        def __init__(self, takes_up=False):
            self.into = DumpWriter(dump, dump.plan.environment)
            self.begun = self.into.take_up(0, keys, {}, starts) if takes_up else self.into.start(0, keys, {})

        def make(self, batches):
            """Make so many batches, and try to keep the rows."""
            for _ in range(batches):
                first = self.begun.made.count
                rows = range(first, min(first + 2, 9))
                failures = [Failure(**one) for one in made["failures"] if one["row"] in rows]
                self.begun.file.write({"stage4": stage[rows.start : rows.stop]})
                digests = whole_digests[rows.start : rows.stop]
                self.begun.made.add(rows, failures, Counter(), Counter(), digests)
            return self.into.keep(self.begun)

        def commit(self):
            """Commit the shard, and return whether this process was first."""
            return self.into.commit(self.begun, {"valid": valid}) is not None

        def leave(self):
            """End without a commit."""
            self.into.leave(self.begun)

        def dies(self):
            """End by a kill, which drops the lock on the file."""
            self.begun.file.close()

    Process.dump = tmp_path / "d"
    Process.is_whole = lambda: tree(tmp_path / "d" / "shards") == tree(tmp_path / "whole" / "shards")
    return Process


def test_of_two_processes_the_one_with_most_rows_has_the_record(beside):
    """Fewer rows never replace more, and a process that is overtaken loses no file while it lives, and leaves none."""
    one, other = beside(), beside()
    assert one.make(2)
    assert not other.make(1)
    assert Dump.at(beside.dump).rows_kept() == {0: 4}
    assert other.make(2)
    assert Dump.at(beside.dump).rows_kept() == {0: 6}
    assert len(partials(beside.dump)) == 2
    one.leave()  # it is stopped with fewer rows than are kept
    assert len(partials(beside.dump)) == 1
    other.dies()
    third = beside(takes_up=True)
    third.make(2)
    assert third.commit()
    assert beside.is_whole()


def test_a_process_that_is_stopped_after_another_has_committed(beside):
    """A process that stops after another has committed leaves nothing, although it had kept rows."""
    one, other = beside(), beside()
    one.make(2)
    other.make(5)
    assert other.commit()
    assert not one.make(1)
    one.leave()
    assert beside.is_whole()


def test_a_record_that_is_another_by_now_stays(beside, monkeypatch):
    """If rows to resume are gone because another process has more, that process's record is left alone."""
    one = beside()
    one.make(1)
    one.dies()
    other, take = beside(), writer.take_partial

    def overtaken(path):
        assert other.make(3)  # between a look at the record and one at the file
        return take(path)

    monkeypatch.setattr(writer, "take_partial", overtaken)
    assert beside(takes_up=True).begun is None
    assert Dump.at(beside.dump).rows_kept() == {0: 6}


def test_two_processes_without_locks(beside, monkeypatch):
    """Neither process deletes a file that the other may be writing, and the one that commits leaves none behind."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    dead = beside()
    dead.make(1)
    dead.dies()
    one, other = beside(takes_up=True), beside(takes_up=True)
    assert one.make(1)
    assert other.make(2)
    assert one.make(3)
    assert one.commit()
    assert not other.make(2)
    assert not other.commit()
    assert beside.is_whole()


@pytest.mark.parametrize("links", [True, False])
def test_a_shard_that_got_its_name_and_no_record(pictures, tmp_path, monkeypatch, links):
    """If the disk refuses the record of a shard whose file has its name, the kept rows are resumed."""
    monkeypatch.setattr(sink, "KEEP_SECONDS", 0.0)
    run(pictures, tmp_path / "whole")

    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def full(final, content, replace=False):
        if final.name == "00000.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return publish(final, content, replace)

    publish = featcli.dump.writer.publish_checksummed
    with monkeypatch.context() as patched, pytest.raises(MachineError):
        patched.setattr("featcli.dump.writer.publish_checksummed", full)
        if not links:
            patched.setattr(os, "link", refused)
        run(pictures, tmp_path / "d")
    assert run(pictures, tmp_path / "d").extracted == 1
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_two_names_of_one_file(pictures, tmp_path):
    """A file that is also the shard, as a kill between two calls leaves it, is copied and never written to."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    (partial,) = partials(tmp_path / "d")
    os.link(partial, tmp_path / "other name")
    before = (tmp_path / "other name").read_bytes()
    assert run(pictures, tmp_path / "d").extracted == 1
    assert (tmp_path / "other name").read_bytes() == before
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_rows_of_images_that_failed_are_tried_again_where_that_is_asked_for(pictures, tmp_path):
    """With retry_failed no row after the start of the first failed image's batch is resumed."""
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert run(pictures, tmp_path / "e").failed == 1
    draw(pictures / "3.png", 77, (64, 48))
    outcome = run(pictures, tmp_path / "d", retry_failed=True)
    assert (outcome.extracted, outcome.failed) == (7, 0)
    run(pictures, tmp_path / "whole")
    mine, theirs = featcli.open_dump(tmp_path / "d"), featcli.open_dump(tmp_path / "whole")
    assert np.array_equal(mine["stage4"][:], theirs["stage4"][:])


def test_an_image_that_was_read_since_is_read_again_when_it_changes(pictures, tmp_path):
    """Rows of a stopped run with retry_failed are not resumed from where an image has changed."""
    run(pictures, tmp_path / "d", shard_size=10)
    draw(pictures / "3.png", 77, (64, 48))
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=3, retry_failed=True, shard_size=10)
    assert len(records(tmp_path / "d")) == 1
    draw(pictures / "3.png", 78, (64, 44))
    assert run(pictures, tmp_path / "d", retry_failed=True, shard_size=10).failed == 0
    run(pictures, tmp_path / "whole")
    mine, theirs = featcli.open_dump(tmp_path / "d"), featcli.open_dump(tmp_path / "whole")
    assert np.array_equal(mine["stage4"][:], theirs["stage4"][:])


def test_a_record_of_a_finished_shard_goes_with_the_next_run(pictures, tmp_path):
    """A record that a kill left after the commit is removed, also with retry_failed if no image failed."""
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4, shard_size=6)
    (record,) = records(tmp_path / "d")  # of the second shard
    left = record.read_bytes()
    run(pictures, tmp_path / "d", shard_size=6)
    record.write_bytes(left)
    run(pictures, tmp_path / "d", shard_size=6, retry_failed=True)
    assert not records(tmp_path / "d")


def test_a_finished_dump_has_no_unfinished_shards(pictures, tmp_path, cli):
    """Whoever finishes a dump removes what a kill, or a copy of the folder, has left of committed shards."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    for path in (tmp_path / "whole" / "shards").iterdir():
        shutil.copy(path, tmp_path / "d" / "shards")
    (tmp_path / "d" / "shards" / ".00000.h5.0123456789abcdef.partial").touch()  # no record names it
    assert cli("finalize", tmp_path / "d", "-q").code == 0
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_rows_of_another_user_are_copied(pictures, tmp_path, monkeypatch):
    """Rows in a file that may only be read are copied, and the file goes; one that may not be read is named."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    theirs, opened = partials(tmp_path / "d")[0], os.open

    def denied(*modes):
        def open_(path, flags, *rest, **others):
            if Path(path) == theirs and flags & os.O_ACCMODE in modes:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, flags, *rest, **others)

        return open_

    with monkeypatch.context() as patched, pytest.raises(MachineError, match=f"{theirs.name}'?: Permission denied"):
        patched.setattr(os, "open", denied(os.O_RDWR, os.O_RDONLY))
        run(pictures, tmp_path / "d")
    monkeypatch.setattr(os, "open", denied(os.O_RDWR))
    assert run(pictures, tmp_path / "d").extracted == 1
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_what_is_not_taken_up_is_forgotten():
    """Failures, traits and NaN of a batch that is made again do not count twice."""
    made, failures = RowsMade(), [Failure("a", row, "empty", "") for row in (11, 13)]
    for first, failure in zip((10, 12), failures, strict=True):
        made.add(range(first, first + 2), [failure], Counter(deep=1), Counter(stage4=first), [f"{first:032}"] * 2)
    made.cut(range(10, 12))
    assert (made.count, made.failures, made.all_traits, made.all_overflown, made.digests) == (
        2, failures[:1], {"deep": 1}, {"stage4": 10}, [f"{10:032}"] * 2
    )  # fmt: skip


def test_what_is_known_of_the_rows_is_kept_with_them(tmp_path):
    """Failures, traits and sizes of a shard that two runs made are those of one run."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGBA", (40, 40), (200, 30 * i, 9, 0 if i in (1, 4) else 255)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"")
    for name, stops in {"whole": (None,), "d": (2, None)}.items():
        for stop in stops:
            with suppress(Stop):
                outcome = run(folder, tmp_path / name, stop_after=stop)
        assert (outcome.pictures["transparent"], outcome.pictures["read"], outcome.failed) == (2, 5, 1)
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_rows_of_another_environment_are_named_in_the_record(pictures, tmp_path, monkeypatch):
    """The record of a shard that two environments made names both."""
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=2)
    (record,) = records(tmp_path / "d")
    content = read_checksummed(record)
    content["environments"][0]["processor"] = "another"
    record.write_bytes(checksummed(content))
    run(pictures, tmp_path / "d")
    made = Dump.at(tmp_path / "d").record_of(0)
    assert [made["environment"]["processor"] == "another", [one["processor"] for one in made["environments"]]] == [
        False,
        ["another"],
    ]


def test_a_fault_of_the_machine_keeps_the_rows(pictures, tmp_path, monkeypatch):
    """If the disk refuses a row, no earlier row is lost, even if nothing was kept until then."""
    from featcli.dump.shard import DirectFile

    write, written = DirectFile.write, []

    def full(file, rows, offset):
        written.append(offset)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, rows, offset)

    run(pictures, tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(MachineError):
        patched.setattr(DirectFile, "write", full)
        run(pictures, tmp_path / "d")
    assert Dump.at(tmp_path / "d").rows_kept() == {0: 6}
    assert run(pictures, tmp_path / "d").extracted == 3
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_a_failed_sync_is_not_believed_the_second_time(pictures, tmp_path, monkeypatch):
    """After the disk once failed to keep rows, no later record says that they are kept."""
    monkeypatch.setattr(sink, "KEEP_SECONDS", 0.0)
    sync, refused = os.fsync, []

    def refused_once(descriptor):
        if not refused and Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.endswith(".partial"):
            refused.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            if "shards" in refused[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            refused.clear()
        sync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(MachineError):
        patched.setattr(os, "fsync", refused_once)
        run(pictures, tmp_path / "d")
    assert refused
    assert not records(tmp_path / "d")
    assert not partials(tmp_path / "d")


def test_a_copy_of_the_folder_is_gone_on_with(pictures, tmp_path):
    """Another machine's copy of an unfinished dump resumes with its rows."""
    run(pictures, tmp_path / "whole")
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    shutil.copytree(tmp_path / "d", tmp_path / "copy")
    assert run(pictures, tmp_path / "copy").extracted == 1
    assert tree(tmp_path / "copy") == tree(tmp_path / "whole")


def test_overwrite_removes_what_is_kept(pictures, tmp_path):
    """A dump that is started again with --overwrite resumes no rows of the old one."""
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4)
    assert run(pictures, tmp_path / "d", overwrite=True).extracted == 9
    assert not records(tmp_path / "d")
    assert not partials(tmp_path / "d")


def test_everybody_knows_unfinished_shards(pictures, tmp_path, cli, monkeypatch):
    """inspect and verify say how many rows are kept and call none damaged, and readers say why a row is missing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stop):
        run(pictures, tmp_path / "d", stop_after=4, shard_size=6)
    expected = [{"shard": 1, "kept": 2, "rows": 3}]
    inspected = cli("inspect", "d", "--json")
    assert (inspected.code, inspected.events[0]["state"]) == (8, "incomplete")
    assert (inspected.events[0]["unfinished_shards"], inspected.events[0]["written"]) == (expected, 5)
    assert inspected.events[0]["safe"] == 8  # 5 written, 1 failed, 2 kept
    assert "unfinished     2 of 3 rows of shard 1 are kept\n" in cli("inspect", "d").out
    verified = cli("verify", "d", "--json")
    assert (verified.code, verified.events[0]["damages"], verified.events[0]["unfinished_shards"]) == (8, [], expected)
    dump = featcli.open_dump("d", incomplete=True)
    assert dump["stage4"][5].shape
    with pytest.raises(
        IncompleteError, match="row 6 is not extracted yet: shard 1 is unfinished, 2 of its rows are kept"
    ):
        dump["stage4"][6]
    run(pictures, tmp_path / "d", shard_size=6)
    assert cli("inspect", "d", "--json").events[0]["unfinished_shards"] == []


def test_a_full_disk_has_room_for_the_record(pictures, tmp_path, monkeypatch):
    """On a full disk the space that was reserved for the record is given back, so that rows are kept."""
    from featcli.dump.shard import DirectFile, ShardWriter

    run(pictures, tmp_path / "whole")
    write, make_room, publish, written = DirectFile.write, ShardWriter.make_room, writer.publish_checksummed, []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def third_is_refused(file, rows, offset):
        written.append("rows")
        if written.count("rows") == 3:
            raise full
        write(file, rows, offset)

    def noted(file):
        written.append("room")
        make_room(file)

    def only_with_room(path, *rest, **more):
        if "unfinished" in path.name and "room" not in written:
            raise full
        return publish(path, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(MachineError, match="no space left"):
        patched.setattr(DirectFile, "write", third_is_refused)
        patched.setattr(ShardWriter, "make_room", noted)
        patched.setattr(writer, "publish_checksummed", only_with_room)
        run(pictures, tmp_path / "d")
    assert Dump.at(tmp_path / "d").rows_kept() == {0: 4}
    assert run(pictures, tmp_path / "d").extracted == 5
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


def test_rows_of_slow_batches_are_kept_at_once(pictures, tmp_path, monkeypatch):
    """Rows are kept before the next batch begins if that would end after the minute."""
    now, kept = [0.0], []
    monkeypatch.setattr(sink.time, "monotonic", lambda: now[0])

    def report(kind, **facts):
        if kind == "batch":
            kept.append(None)
        if kind == "kept":
            kept.append(facts["rows"])

    from featcli.run.forward import BatchRows

    finished = BatchRows.finished

    def slow(rows):
        now[0] += 40
        return finished(rows)

    monkeypatch.setattr(BatchRows, "finished", slow)
    featcli.extract(str(pictures), output=tmp_path / "d", report=report, **OPTIONS)
    assert [rows for rows in kept if rows] == [4, 6, 8]
