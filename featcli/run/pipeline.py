"""Shards -> shard files, one after the other, in one process: the unit of work of every engine.

batches (images) -> forward (backbone, pooling) -> writers -> records
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from featcli.dump.atomic_file import disk_errors
from featcli.dump.folder import Dump
from featcli.dump.formats.layout import SHAPES, VALID
from featcli.dump.shard import ShardWriter
from featcli.events import Report
from featcli.pixels import batches
from featcli.pixels.batches import Batch, SizedImages
from featcli.pixels.decode import Failure
from featcli.run.background import Background
from featcli.run.forward import BatchRows, Forward
from featcli.run.loading import Setup
from featcli.run.stats import Timings
from featcli.system.device import memory_errors, settled_arithmetic
from featcli.system.machine import give_memory_back, kept_memory

QUEUED_BATCHES = 2  # that may wait for the writer
TIDY_SECONDS = 30.0  # after which memory that is free goes back to the system: seldom, since it is taken again


@dataclass(frozen=True)
class Shard:
    """A shard that is to be made, and its images; what an engine gives to a worker."""

    number: int
    pictures: SizedImages  # of its rows at least


@dataclass
class RunStats:
    """What was done, to be added up over processes."""

    images: int = 0  # in shards that were committed
    with_more_frames: int = 0  # images of which a frame or page was left out
    overflown: Counter[str] = field(default_factory=Counter)  # values that are not finite, by stage
    clock: Timings = field(default_factory=Timings)

    def add(self, other: RunStats) -> None:
        """What another process has done."""
        self.images += other.images
        self.with_more_frames += other.with_more_frames
        self.overflown.update(other.overflown)
        self.clock.add(other.clock)


class ShardRunner:
    """Makes shards of a dump with what is loaded. Used for any number of them."""

    def __init__(self, loaded: Setup, report: Report) -> None:
        self._loaded = loaded
        self._report = report
        self._forward = Forward(loaded, report)

    def compile(self) -> None:
        """Let torch.compile do its work now, before anything is written. Raises MachineError."""
        if self._loaded.backbone.execution.compiled:
            with settled_arithmetic(self._loaded.threads, self._loaded.backbone.device):
                self._forward.compile()

    def run(self, dump: Dump, shards: Iterable[Shard], count: Callable[[RunStats], None]) -> None:
        """Extract these shards and commit each; those that another process has committed meanwhile are passed over.

        The next ones are asked for while those before are still at work. `count` is given what was done, shard by
        shard as each is committed, and the times at the end. Raises FeatcliError.
        """
        tally, device = RunStats(), self._loaded.backbone.device
        into = _Files(dump, self._report, self._forward.overflown, count)
        decoded = batches.read(self._loaded.reading, into.batches(shards))
        with (
            settled_arithmetic(self._loaded.threads, device),
            kept_memory(),
            memory_errors("the images do", device),
            disk_errors(dump.path),
            closing(decoded),
            into,  # outermost of the two: it cleans up when the writer has stopped
            Background(into.queued_bytes) as writer,
        ):
            self._stream(decoded, into, writer, tally)
        tally.clock.compute, tally.clock.waited_for_compute = into.compute_seconds, into.waited_seconds
        tally.clock.write = writer.busy_seconds - into.waited_seconds
        # What the writer waited for the device is no wait of the device for the writer.
        tally.clock.waited_for_write = max(0.0, writer.waited_seconds - into.waited_seconds)
        count(tally)

    def _stream(self, decoded: Iterator[Batch], into: _Files, writer: Background, tally: RunStats) -> None:
        began = tidied = time.perf_counter()
        for batch in decoded:
            ready = time.perf_counter()
            tally.clock.waited_for_decode += ready - began
            tally.clock.decode += batch.decode_seconds
            into.write(batch, self._forward(batch), self._forward.at_once, writer)
            self._report("batch", images=len(batch.rows))
            began = time.perf_counter()
            if began - tidied > TIDY_SECONDS:
                give_memory_back()
                tidied = began


class _Files:
    """The shard files that batches go to, one after the other, all work on files done by the writer thread."""

    def __init__(self, dump: Dump, report: Report, overflown: Counter[str], count: Callable[[RunStats], None]) -> None:
        """`overflown`: what the writer thread counts on as it finishes rows."""
        self.compute_seconds = 0.0
        self.waited_seconds = 0.0  # that the writer waited for a device that was still at work
        self._dump = dump
        self._report = report
        self._overflown = overflown
        self._count = count
        self._with_more_frames = 0
        self._shards: dict[int, SizedImages] = {}  # that are at work
        self._file: ShardWriter | None = None
        self._failures: list[Failure] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # something went wrong on the way: a whole shard has been committed by now
            self._file.abort()

    @property
    def queued_bytes(self) -> int:
        """How much may wait for the writer."""
        plan = self._dump.plan
        size = tuple(plan.settings["backbone"]["input_size"])
        batch_size: int = plan.settings["batch_size"]
        row_bytes = sum(s.row_bytes((size[0], size[1])) for s in plan.stages)
        return QUEUED_BATCHES * batch_size * row_bytes

    def batches(self, shards: Iterable[Shard]) -> Iterator[tuple[SizedImages, range]]:
        """The batches of the shards, without those that another process has committed by the time they are reached."""
        plan = self._dump.plan
        for shard in shards:
            rows = plan.shard(shard.number)
            if shard.number not in self._dump.again and self._dump.is_committed(shard.number):
                self._report("there", shard=shard.number, images=len(rows))
                continue
            self._shards[shard.number] = shard.pictures
            for some in shard.pictures.sizes.batches(rows, plan.settings["batch_size"]):
                yield shard.pictures, some

    def write(self, batch: Batch, rows: BatchRows, at_once: int, writer: Background) -> None:
        """Queue the rows of a batch; where it ends its shard, the commit too."""
        number = batch.rows.start // self._dump.plan.shard_rows
        for failure in batch.failures:
            self._report("failure", **failure.to_json())
        writer.give(partial(self._write, number, rows), rows.nbytes)
        self._failures += batch.failures
        self._with_more_frames += batch.with_more_frames
        if batch.rows.stop == self._dump.plan.shard(number).stop:
            writer.give(partial(self._commit, number, self._failures, self._with_more_frames, at_once))
            self._failures, self._with_more_frames = [], 0

    def _write(self, number: int, rows: BatchRows) -> None:
        maps = rows.finished()
        self.waited_seconds += rows.waited_seconds
        self.compute_seconds += rows.compute_seconds
        if self._file is None:
            keys = [self._shards[number].images[row].key for row in self._dump.plan.shard(number)]
            self._file = self._dump.start_shard(number, keys, self._shapes(number))
        self._file.write(maps)
        rows.release()

    def _shapes(self, number: int) -> dict[str, np.ndarray]:
        """(rows, 3) of each stage whose maps differ in size."""
        sizes, rows = self._shards[number].sizes, self._dump.plan.shard(number)
        return {stage.name: sizes.shapes(stage, rows) for stage in self._dump.plan.stages if stage.is_ragged}

    def _commit(self, number: int, failures: Sequence[Failure], with_more_frames: int, at_once: int) -> None:
        assert self._file is not None
        rows = self._dump.plan.shard(number)
        valid = np.ones(len(rows), np.uint8)
        valid[[failure.row - rows.start for failure in failures]] = 0
        beside = {VALID: valid, **{name + SHAPES: shapes for name, shapes in self._shapes(number).items()}}
        record = self._dump.commit(number, self._file, beside, failures, at_once)
        self._file = None
        del self._shards[number]
        overflown = Counter(self._overflown)
        self._overflown.clear()
        if record is None:  # another process was first
            self._report("there", shard=number, images=0)
            return
        self._count(RunStats(len(rows), with_more_frames, overflown))
        self._report("shard", **{k: record[k] for k in ("shard", "file", "rows", "bytes")}, failed=len(failures))
