"""Check the parts of the pipeline, each by itself: the source of batches, and the sink that makes files from rows."""

import errno
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import featcli
from conftest import draw, tree
from featcli import open_dump
from featcli.dump.atomic_file import PARTIAL
from featcli.dump.folder import Dump
from featcli.dump.target import make_folder
from featcli.dump.verify import verify
from featcli.dump.writer import DumpWriter, create, finalize
from featcli.inputs.listing import find
from featcli.pixels.batches import AHEAD, SizedImages
from featcli.pixels.decoder import Decoder
from featcli.pixels.failure import NOT_READ, Failure
from featcli.pixels.sizes import Sizes
from featcli.run.sink import Sink
from featcli.run.source import Shard, ShardBatch, Source
from featcli.spec.groups import InputSpec, PixelSpec

SIZE, ROWS, BATCH = (8, 10), 5, 2


class Pixels:
    channels, dtype, is_native = 3, "uint8", False

    def fit(self, picture):
        return np.asarray(picture.resize(SIZE[::-1])).transpose(2, 0, 1)

    def fit_for(self, decode):
        return self.fit


class Into:
    """Stands for the writer of a dump that has some shards."""

    dump = SimpleNamespace(plan=SimpleNamespace(settings=SimpleNamespace(batch_size=BATCH), outputs=()))

    def __init__(self, done=()):
        self.done = {*done}

    def is_done(self, number):
        return number in self.done

    def take_up(self, *_):
        return None


@pytest.fixture
def pictures(tmp_path):
    for i in range(13):
        draw(tmp_path / "p" / f"{i:02d}.png", i)
    (tmp_path / "p" / "06.png").write_bytes(b"broken")
    return SizedImages(find(InputSpec((str(tmp_path / "p"),))).images, Sizes(SIZE))


def shards_of(pictures, asked=None):
    for number in range(-(-len(pictures.images) // ROWS)):
        if asked is not None:
            asked.append(number)
        yield Shard(number, range(number * ROWS, min((number + 1) * ROWS, len(pictures.images))), pictures)


def source(into, told=None):
    return Source(Decoder(PixelSpec(), Pixels(), 2), into, lambda kind, **facts: told.append((kind, facts)))


def test_batches_know_their_shard(pictures):
    """Every row comes once and in order, in batches that span no two shards, and the last of each says so."""
    found = [
        (batch.shard.number, batch.rows, batch.ends_shard, [failure.row for failure in batch.failures])
        for batch in source(Into()).batches(shards_of(pictures))
    ]
    assert found == [
        (0, range(2), False, []),
        (0, range(2, 4), False, []),
        (0, range(4, 5), True, []),
        (1, range(5, 7), False, [6]),
        (1, range(7, 9), False, []),
        (1, range(9, 10), True, []),
        (2, range(10, 12), False, []),
        (2, range(12, 13), True, []),
    ]


def test_shards_that_are_there_are_passed_over(pictures):
    """A shard that another process has committed by then is reported, and not decoded."""
    told, into = [], Into({1})
    batches = source(into, told).batches(shards_of(pictures))
    assert next(batches).shard.number == 0
    into.done.add(2)  # meanwhile
    assert {batch.shard.number for batch in batches} == {0}
    assert told == [("there", {"shard": 1, "rows": 5, "images": 5}), ("there", {"shard": 2, "rows": 3, "images": 3})]


def test_shards_are_asked_for_late(pictures):
    """Only as many shards are asked for as the batches ahead need, so that others may do the rest."""
    asked = []
    batches = source(Into()).batches(shards_of(pictures, asked))
    next(batches)
    assert AHEAD + 1 == -(-ROWS // BATCH)  # the first shard has this many batches
    assert asked == [0]
    batches.close()


@pytest.fixture
def whole(tmp_path, photos):
    """Make a dump of twelve pictures in three shards, one of them broken."""
    (photos / "01.png").write_bytes(b"broken")
    options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4}
    featcli.extract(photos, output=tmp_path / "whole", **options)
    return open_dump(tmp_path / "whole")


@pytest.fixture
def begun(tmp_path, photos, whole):
    """Return the writer of another dump with the same plan, which has nothing yet, and its shards."""
    images = find(InputSpec((str(photos),))).images
    make_folder(tmp_path / "d")
    assert create(tmp_path / "d", whole.plan, images)
    dump = Dump.existing(tmp_path / "d")
    pictures = SizedImages(images, Sizes(whole.plan.settings.input_size))
    shards = [Shard(number, dump.plan.shard(number), pictures) for number in range(dump.plan.num_shards)]
    return DumpWriter(dump, whole.plan.environment), shards


def rows_of(whole, rows, **more):
    """Return what the forward pass would give for these rows."""
    released = []
    maps = {name: np.ascontiguousarray(whole[name][rows.start : rows.stop]) for name in whole.stages}
    facts = {"compute_seconds": 0.5, "waited_seconds": 0.25, "overflown": Counter(), "clamped": Counter(), **more}
    return SimpleNamespace(finished=lambda: maps, release=lambda: released.append(rows), released=released, **facts)


def failures_in(whole, rows):
    return [Failure(**failure) for failure in whole.failures if failure["row"] in rows]


def make(sink, shard, whole, micro_batch=4, traits=(), **more):
    for first in range(shard.rows.start, shard.rows.stop, 2):
        rows = range(first, first + 2)
        given = rows_of(whole, rows, **more)
        sink.write(batch_of(shard, rows, whole, traits), given, micro_batch)
        assert given.released == [rows]


def batch_of(shard, rows, whole, traits=(), begun=None):
    """Return a batch of that shard whose pixels nobody needs."""
    failures, digests = failures_in(whole, rows), [whole.digests[row] or NOT_READ for row in rows]
    return ShardBatch(rows, torch.empty(0), failures, Counter(traits), digests, shard=shard, begun=begun)


def test_rows_become_a_dump(begun, whole, tmp_path):
    """From the rows of a dump, however they are cut, the sink makes its shards and records, to the byte."""
    (into, shards), told, counted = begun, [], []
    with Sink(into, lambda kind, **facts: told.append((kind, facts["shard"], facts["failed"])), counted.append) as sink:
        for shard in shards:
            make(sink, shard, whole, overflown=Counter({"stage4": shard.number}))
    finalize(into.dump)
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")
    row = whole.rows["01.png"]
    assert told == [("shard", number, int(row in whole.plan.shard(number))) for number in range(3)]
    assert [(stats.images, stats.traits) for stats in counted] == [(4, {})] * 3
    assert [stats.overflown["stage4"] for stats in counted] == [0, 2, 4]
    assert (sink.compute_seconds, sink.waited_seconds) == (3.0, 1.5)


def test_a_smaller_micro_batch_is_recorded(begun, whole):
    """If memory did not allow a whole batch, the record says how many images went together."""
    into, shards = begun
    with Sink(into, lambda *_, **__: None, lambda _: None) as sink:
        make(sink, shards[0], whole, micro_batch=2)
        make(sink, shards[1], whole)
    assert [into.dump.record_of(number).get("batch_size") for number in (0, 1)] == [2, None]


def test_a_shard_that_another_process_has_made(begun, whole, tmp_path):
    """A shard that another process has made stays as it is, and useless rows are neither counted nor left behind."""
    (into, shards), told, counted = begun, [], []
    with Sink(into, lambda *_, **__: None, lambda _: None) as other:
        make(other, shards[1], whole)
    before = tree(tmp_path / "d")
    with Sink(into, lambda kind, **facts: told.append((kind, facts)), counted.append) as sink:
        make(sink, shards[1], whole, micro_batch=1)
    assert (told, counted) == ([("there", {"shard": 1, "rows": 4, "images": 0})], [])
    assert tree(tmp_path / "d") == before


def test_a_shard_that_is_given_up(begun, whole, tmp_path, monkeypatch):
    """If the disk keeps nothing of a shard, nothing of it is left, and the other shards are."""
    into, shards = begun
    with pytest.raises(KeyboardInterrupt), Sink(into, lambda *_, **__: None, lambda _: None) as sink:
        make(sink, shards[0], whole)
        sink.write(batch_of(shards[1], range(4, 6), whole), rows_of(whole, range(4, 6)), 4)
        assert [path.name.endswith(PARTIAL) for path in (tmp_path / "d" / "shards").iterdir()].count(True) == 1
        monkeypatch.setattr("os.fsync", refused)
        raise KeyboardInterrupt
    assert sorted(path.name for path in (tmp_path / "d" / "shards").iterdir()) == ["00000.h5", "00000.json"]
    assert verify(tmp_path / "d").state == "incomplete"


def refused(_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_shard_that_is_made_again(begun, whole):
    """A committed shard is replaced if that was asked for, and its record has the repaired images."""
    (into, shards), row = begun, whole.rows["01.png"]
    number = row // 4
    with Sink(into, lambda *_, **__: None, lambda _: None) as sink:
        make(sink, shards[number], whole)
    again = DumpWriter(into.dump, {**into.environment, "torch": "0"}, again=frozenset({number}), resized={row: 77})
    assert (into.is_done(number), again.is_done(number)) == (True, False)
    with Sink(again, lambda *_, **__: None, lambda _: None) as sink:
        make(sink, shards[number], whole)
    record = into.dump.record_of(number)
    assert (record["sizes"], record["environment"]["torch"]) == ({str(row): 77}, "0")
