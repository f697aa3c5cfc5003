"""Rows -> committed shards. The writer thread alone uses it; whoever started that thread cleans up after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from featcli.dump.formats.layout import SHAPES, VALID
from featcli.dump.shard import ShardWriter
from featcli.dump.writer import DumpWriter
from featcli.events import Report
from featcli.pixels.failure import Failure
from featcli.pixels.traits import Trait
from featcli.run.forward import BatchRows
from featcli.run.source import Shard
from featcli.run.stats import RunStats


@dataclass
class _OpenShard:
    """The shard whose rows are coming in."""

    file: ShardWriter
    failures: list[Failure] = field(default_factory=list)
    traits: Counter[Trait] = field(default_factory=Counter)
    overflown: Counter[str] = field(default_factory=Counter)


class Sink:
    """Writes the rows of shards, one shard after the other, and commits each once its last row is there.

    `count` is given what was done, shard by shard.
    """

    def __init__(self, into: DumpWriter, report: Report, count: Callable[[RunStats], None]) -> None:
        self.compute_seconds = 0.0
        self.waited_seconds = 0.0  # for a device that was still at work
        self._into = into
        self._report = report
        self._count = count
        self._at_work: _OpenShard | None = None

    def write(self, shard: Shard, rows: BatchRows, failures: Sequence[Failure], traits: Counter[Trait]) -> None:
        """Write the next rows of a shard."""
        maps = rows.finished()
        self.compute_seconds += rows.compute_seconds
        self.waited_seconds += rows.waited_seconds
        if self._at_work is None:
            keys = [shard.pictures.images[row].key for row in shard.rows]
            self._at_work = _OpenShard(self._into.start_shard(shard.number, keys, self._shapes(shard)))
        self._at_work.file.write(maps)
        rows.release()
        self._at_work.failures += failures
        self._at_work.traits.update(traits)
        self._at_work.overflown.update(rows.overflown)

    def commit(self, shard: Shard, micro_batch: int) -> None:
        """Commit a shard of which every row is written. It is dropped where another process was first."""
        assert self._at_work is not None
        done = self._at_work
        valid = np.ones(len(shard.rows), np.uint8)
        valid[[failure.row - shard.rows.start for failure in done.failures]] = 0
        beside = {VALID: valid, **{name + SHAPES: shapes for name, shapes in self._shapes(shard).items()}}
        record = self._into.commit(shard.number, done.file, beside, done.failures, micro_batch, done.traits)
        self._at_work = None
        if record is None:
            self._report("there", shard=shard.number, images=0)  # its batches were counted while they were made
            return
        failed = len(done.failures)
        self._count(RunStats(len(shard.rows), failed, traits=done.traits, overflown=done.overflown))
        self._report("shard", **{k: record[k] for k in ("shard", "file", "rows", "bytes")}, failed=failed)

    def _shapes(self, shard: Shard) -> dict[str, np.ndarray]:
        """(rows, 3) of each stage whose maps differ in size."""
        ragged = [stage for stage in self._into.dump.plan.stages if stage.is_ragged]
        return {stage.name: stage.shapes(shard.pictures.sizes.own_of(shard.rows)) for stage in ragged}

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self._at_work is not None:  # an error stopped it half way: else its commit would have set this to None
            self._at_work.file.abort()
