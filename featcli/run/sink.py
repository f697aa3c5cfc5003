"""Turn rows into committed shards. Only the writer thread writes; the thread that started it cleans up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from featcli.dump.formats.layout import SHAPES, VALID
from featcli.dump.writer import BegunShard, DumpWriter
from featcli.errors import FeatcliError
from featcli.events import Report
from featcli.run.forward import BatchRows
from featcli.run.source import Shard, ShardBatch
from featcli.run.stats import RunStats

KEEP_SECONDS = 60.0  # seconds between two times that unfinished rows are put on the disk: what a kill costs


class Sink:
    """Writes the rows of shards, one shard after another, and commits each after its last row.

    `count` gets the statistics of each shard. After an error the rows of the shard are kept, so that they can be
    resumed.
    """

    def __init__(self, into: DumpWriter, report: Report, count: Callable[[RunStats], None]) -> None:
        self.compute_seconds = 0.0
        self.waited_seconds = 0.0  # for a device that was still at work
        self._into = into
        self._report = report
        self._count = count
        self._at_work: BegunShard | None = None
        self._made = RunStats()  # what this run did for the current shard
        self._kept_rows = 0  # rows of the current shard that are on the disk
        self._kept_at = 0.0
        self._written_at = time.monotonic()  # when the last rows were written, or when this began
        self._one_at_a_time = threading.Lock()  # `keep` may come from any thread

    def write(self, batch: ShardBatch, rows: BatchRows, micro_batch: int) -> None:
        """Write the next rows of a shard, and commit it after the last. It is dropped if another process was faster.

        `micro_batch` is how many images went through the backbone together.
        """
        maps = rows.finished()
        self.compute_seconds += rows.compute_seconds
        self.waited_seconds += rows.waited_seconds
        with self._one_at_a_time:
            self._write(batch, rows, maps, micro_batch)

    def _write(self, batch: ShardBatch, rows: BatchRows, maps: Mapping[str, np.ndarray], micro_batch: int) -> None:
        if self._at_work is None:
            self._at_work = self._begin(batch)
        self._at_work.file.write(maps)
        rows.release()
        made, stats = self._at_work.made, self._made
        made.add(batch.rows, batch.failures, batch.traits, rows.overflown, batch.digests)
        if micro_batch < self._into.dump.plan.settings.batch_size:
            made.least_batch = min(micro_batch, made.least_batch or micro_batch)
        stats.images, stats.failed = stats.images + len(batch.rows), stats.failed + len(batch.failures)
        stats.traits.update(batch.traits)
        stats.clamped.update(rows.clamped)
        if batch.ends_shard:
            self._commit(batch.shard)
        elif self._is_time_to_keep():
            self._keep()
        self._written_at = time.monotonic()

    def _is_time_to_keep(self) -> bool:
        """Return whether rows would wait too long for the next batch, if that takes as long as this one did."""
        now = time.monotonic()
        return now - self._kept_at + (now - self._written_at) >= KEEP_SECONDS

    def _begin(self, batch: ShardBatch) -> BegunShard:
        shard, stages = batch.shard, self._into.dump.plan.outputs
        begun = batch.begun or self._into.start(shard.number, shard.keys, shard.shapes(stages))
        self._made, self._kept_rows, self._kept_at = RunStats(), begun.made.count, time.monotonic()
        return begun

    def keep(self) -> None:
        """Put the written rows of the unfinished shard on the disk now. Raises OSError."""
        with self._one_at_a_time:
            self._keep_what_is_new()

    def _keep_what_is_new(self) -> None:
        if self._at_work is not None and self._at_work.made.count > self._kept_rows:
            self._keep()

    def _keep(self) -> None:
        """Put the rows of the unfinished shard on the disk."""
        assert self._at_work is not None
        self._kept_at = time.monotonic()
        if self._into.keep(self._at_work):
            self._kept_rows = self._at_work.made.count
            self._report("kept", shard=self._at_work.number, rows=self._kept_rows)

    def _commit(self, shard: Shard) -> None:
        """Commit a shard whose rows are all written."""
        assert self._at_work is not None
        begun, failures = self._at_work, self._at_work.made.failures
        valid = np.ones(len(shard.rows), np.uint8)
        valid[[failure.row - shard.rows.start for failure in failures]] = 0
        shapes = shard.shapes(self._into.dump.plan.outputs)
        record = self._into.commit(begun, {VALID: valid, **{name + SHAPES: found for name, found in shapes.items()}})
        self._at_work = None
        if record is None:
            # The images of this shard were counted batch by batch.
            self._report("there", shard=shard.number, rows=len(shard.rows), images=0)
            return
        self._made.overflown = begun.made.all_overflown
        self._count(self._made)
        self._report("shard", **{k: record[k] for k in ("shard", "file", "rows", "bytes")}, failed=len(failures))

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        with self._one_at_a_time:
            if self._at_work is None:
                return
            # An error stopped the shard half way, because a commit would have set it to None.
            try:
                with suppress(OSError, EOFError, FeatcliError):  # the error that stopped it matters more
                    self._keep_what_is_new()
            finally:  # also after a second Ctrl-C: the lock on the file would keep this process from resuming it
                self._into.leave(self._at_work)
                self._at_work = None
