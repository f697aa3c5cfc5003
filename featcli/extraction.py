"""The pipeline, and the only place where its stages meet.

inputs -> sizes -> batches (images) -> forward (backbones, pooling) -> writers -> records
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcli import batches
from featcli.backbones.stages import given_features, given_indices
from featcli.batches import Batch
from featcli.config import ExtractConfig
from featcli.device import memory_errors, settled_arithmetic
from featcli.dump import Dump, in_use
from featcli.errors import MachineError, counted, shown
from featcli.forward import Forward, Rows
from featcli.images import Failure
from featcli.machine import give_memory_back, kept_memory
from featcli.manifest import finalize
from featcli.pace import Clock, Pace
from featcli.plan import Plan
from featcli.planning import Job, prepare
from featcli.progress import Report, silent, size
from featcli.target import existing_parent, make_folder, occupy, stored_bytes
from featcli.writers.background import Background
from featcli.writers.layout import SHAPES, VALID
from featcli.writers.lock import FolderLock
from featcli.writers.publish import disk_errors
from featcli.writers.shard import ShardWriter

QUEUED_BATCHES = 2  # that may wait for the writer


@dataclass(frozen=True)
class Outcome:
    """What a run did. `failed` and `written` count the whole dump, `extracted` this run alone."""

    dump: str
    written: int
    failed: int
    failed_by_reason: Mapping[str, int]
    extracted: int
    pace: Pace

    @property
    def seconds(self) -> float:
        """From the first image to the manifest."""
        return self.pace.seconds

    @property
    def exit_code(self) -> int:
        """3 where images failed, else 0."""
        return 3 if self.failed else 0


def extract(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    checkpoint: Any,
    output: str | os.PathLike[str],
    report: Report = silent,
    **options: Any,
) -> Outcome:
    """Dump the feature maps of images: `featcli extract` from Python.

    `options` are the fields of `featcli.config.ExtractConfig`, named as on the command line. `report` is
    called with every event of the run. Raises FeatcliError.
    """
    names = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    for choice, given in (("out_indices", given_indices), ("out_features", given_features)):
        asked = given(options.get(choice))
        options[choice] = tuple(asked) if isinstance(asked, list | range) else asked
    config = ExtractConfig(
        inputs=tuple(os.fspath(name) for name in names), checkpoint=checkpoint, output=os.fspath(output), **options
    )
    return run(config, report)


def run(config: ExtractConfig, report: Report = silent) -> Outcome:
    """Dump the feature maps of the images, or what is missing of them. Raises FeatcliError."""
    began, path = time.perf_counter(), Path(config.output)
    existing = None if config.overwrite else Dump.existing(path)
    job = prepare(config, existing, report)
    if existing is not None:
        existing.refuse_other_plan(job.plan, job.images)
    shards = _refuse_if_too_large(path, job, existing, config)
    forward = Forward(job, report)
    if job.backbone.execution.compiled and shards:
        with settled_arithmetic(job.threads):
            forward.compile()
    make_folder(path)
    with FolderLock(path) as lock, kept_memory():
        is_alone = occupy(path, lock, config.overwrite)
        if existing is not None or Dump.existing(path) is None:
            dump, todo = _claimed(path, job, lock, is_alone, config)
            if not lock.is_real:
                report(
                    "warning", text="this file system knows no locks: see to it that no other run works on this dump"
                )
            return _run_claimed(dump, todo, forward, Clock(preparation=time.perf_counter() - began), report)
    del job, forward  # their memory
    report("warning", text="another run has begun this dump meanwhile: its choices are taken")
    return run(config, report)


def _claimed(path: Path, job: Job, lock: FolderLock, is_alone: bool, config: ExtractConfig) -> tuple[Dump, list[int]]:
    """The dump, held as it has to be for what there is to do, and the shards to do.

    Raises ConflictError where another process is in the way.
    """
    if Dump.existing(path) is None:
        if not is_alone:
            raise in_use(path)
        Dump.create(path, job.plan, job.images)
    dump = Dump.resume(path, job.plan, job.images, config.retry_failed)
    unfinished, again = _to_do(dump, config.retry_failed)
    dump.again = frozenset(again)
    shards = sorted({*unfinished, *again})
    if again or dump.damaged():
        if not is_alone:
            raise in_use(path)  # what is committed is made again by one process alone
    elif is_alone:
        if not lock.together():  # others may help
            raise in_use(path)
    elif shards:  # another begins at the first: begin elsewhere
        start = random.randrange(len(shards))
        shards = shards[start:] + shards[:start]
    return dump, shards


def _run_claimed(dump: Dump, shards: Sequence[int], forward: Forward, clock: Clock, report: Report) -> Outcome:
    job = forward.job
    _warn_of_environment(dump.plan.environment, job.plan.environment, report)
    if shards:
        dump.reopen()
    num_images = sum(len(dump.plan.shard(n)) for n in shards)
    _report_dump(dump, shards, report)
    report("start", images=len(job.images), done=len(job.images) - num_images, shards=len(shards))
    into = _Shards(dump, job, report)
    with settled_arithmetic(job.threads):
        if shards:
            _run_shards(into, shards, forward, clock)
    manifest = finalize(dump)
    _warn_of_overflow(forward.overflown, dump.plan, report)
    if clock.with_more_frames:
        report("warning", text=f"{clock.with_more_frames:,} files have several frames or pages: the first was used")
    outcome = Outcome(
        dump=str(dump.path),
        written=manifest["totals"]["written"],
        failed=manifest["totals"]["failed"],
        failed_by_reason=manifest["totals"]["failed_by_reason"],
        extracted=into.committed,
        pace=clock.pace(job.decode_threads, dump.plan.settings, dump.plan.stages[0].dtype),
    )
    assert outcome.written + outcome.failed == dump.plan.num_images  # nothing was dropped, nothing counted twice
    report("end", **asdict(outcome), exit_code=outcome.exit_code)
    return outcome


def _report_dump(dump: Dump, shards: Sequence[int], report: Report) -> None:
    again = dump.again
    total, done = dump.plan.num_shards, dump.plan.num_shards - len({*shards} - again)
    value = f"{counted(total, 'shard')} of up to {dump.plan.shard_rows:,} images"
    reason = f"{done:,} of them there already" if done else "new"
    reason += f", {len(again):,} of those with failures and done again" if again else ""
    report("choice", name="dump", value=value, reason=reason)


def _warn_of_environment(before: Mapping[str, str], now: Mapping[str, str], report: Report) -> None:
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed:
        report("warning", text=f"this dump was begun elsewhere, its last bits may differ: {', '.join(changed)}")


def _warn_of_overflow(overflown: Counter[str], plan: Plan, report: Report) -> None:
    for stage, count in sorted(overflown.items()):
        dtype = next(stored.dtype for stored in plan.stages if stored.name == stage)
        help_ = "float16 ends at 65,504, use another --dtype" if dtype == "float16" else "look at its maps"
        report("warning", text=f"{count:,} values of {stage} are infinite or undefined: {help_}")


def _to_do(dump: Dump, retry_failed: bool) -> tuple[list[int], list[int]]:
    """The shards that are not there, and those with failures that are to be made again."""
    unfinished = dump.unfinished()
    return unfinished, sorted({*dump.failed()} - {*unfinished}) if retry_failed else []


def _refuse_if_too_large(path: Path, job: Job, existing: Dump | None, config: ExtractConfig) -> list[int]:
    """Before anything is deleted or made: whether the shards to do, which are returned, fit into what is free."""
    todo = _to_do(existing, config.retry_failed) if existing else (range(job.plan.num_shards), [])
    shards = [*todo[0], *todo[1]]
    plan = job.plan
    needed = sum(job.pictures.sizes.stored_bytes(plan.stages, plan.shard(number)) for number in shards)
    # What is to be deleted first will be free.
    free = shutil.disk_usage(existing_parent(path)).free + (stored_bytes(path) if config.overwrite else 0)
    if needed > free:
        raise MachineError(
            f"dump {shown(path)}: {size(needed)} needed, {size(free)} free",
            "free some space" + ("" if existing else ", or store less: --dtype float16, --pool, fewer stages"),
        )
    return shards


def _run_shards(into: _Shards, shards: Sequence[int], forward: Forward, clock: Clock) -> None:
    """Extract these shards."""
    job, path, plan = into.job, into.dump.path, into.dump.plan
    sizes, batch_size = job.pictures.sizes, plan.settings["batch_size"]
    runs = (run for number in into.still_to_do(shards) for run in sizes.batches(plan.shard(number), batch_size))
    decoded = batches.read(job.pictures, runs, job.decode_threads, pinned=job.backbone.device.type == "cuda")
    limit = QUEUED_BATCHES * batch_size * sum(stage.row_bytes(sizes.common) for stage in plan.stages)
    with (
        memory_errors("the images do", job.backbone.device),
        disk_errors(path),
        closing(decoded),
        into,  # outermost of the two: it cleans up when the writer has stopped
        Background(limit) as writer,
    ):
        began = time.perf_counter()
        for batch in decoded:
            ready = time.perf_counter()
            clock.waited_for_decode += ready - began
            clock.decode += batch.decode_seconds
            clock.with_more_frames += batch.with_more_frames
            into.write(batch, forward(batch), forward.at_once, writer)
            into.report("batch", images=len(batch.rows))
            if batch.rows.stop % plan.shard_rows == 0:
                give_memory_back()
            began = time.perf_counter()
    clock.compute, clock.waited_for_compute = into.compute_seconds, into.waited_seconds
    clock.write = writer.busy_seconds - into.waited_seconds
    clock.waited_for_write = writer.waited_seconds


class _Shards:
    """The shard file that batches go to, one after the other, all work on files done by the writer thread."""

    def __init__(self, dump: Dump, job: Job, report: Report) -> None:
        self.dump = dump
        self.job = job
        self.report = report
        self.committed = 0  # images
        self.compute_seconds = 0.0
        self.waited_seconds = 0.0  # that the writer waited for a device that was still at work
        self._file: ShardWriter | None = None
        self._failures: list[Failure] = []

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # something went wrong on the way: a whole shard has been committed by now
            self._file.abort()

    def still_to_do(self, shards: Sequence[int]) -> Iterator[int]:
        """The shards, without those that another process has committed by the time that they are reached."""
        for number in shards:
            if number in self.dump.again or not self.dump.is_committed(number):
                yield number
            else:
                self.report("batch", images=len(self.dump.plan.shard(number)))

    def write(self, batch: Batch, rows: Rows, at_once: int, writer: Background) -> None:
        """Queue the rows of a batch; where it ends its shard, the commit too."""
        number = batch.rows.start // self.dump.plan.shard_rows
        for failure in batch.failures:
            self.report("failure", **failure.to_json())
        writer.give(partial(self._write, number, rows), rows.nbytes)
        self._failures += batch.failures
        if batch.rows.stop == self.dump.plan.shard(number).stop:
            writer.give(partial(self._commit, number, self._failures, at_once))
            self._failures = []

    def _write(self, number: int, rows: Rows) -> None:
        maps = rows.finished()
        self.waited_seconds += rows.waited_seconds
        self.compute_seconds += rows.compute_seconds
        if self._file is None:
            keys = [self.job.images.keys[i] for i in self.dump.plan.shard(number)]
            self._file = self.dump.start_shard(number, keys, self._shapes(number))
        self._file.write(maps)
        rows.release()

    def _shapes(self, number: int) -> dict[str, np.ndarray]:
        """(rows, 3) of each stage whose maps differ in size."""
        sizes, rows = self.job.pictures.sizes, self.dump.plan.shard(number)
        return {stage.name: sizes.shapes(stage, rows) for stage in self.dump.plan.stages if stage.is_ragged}

    def _commit(self, number: int, failures: Sequence[Failure], at_once: int) -> None:
        assert self._file is not None
        rows = self.dump.plan.shard(number)
        valid = np.ones(len(rows), np.uint8)
        valid[[failure.row - rows.start for failure in failures]] = 0
        beside = {VALID: valid, **{name + SHAPES: shapes for name, shapes in self._shapes(number).items()}}
        record = self.dump.commit(number, self._file, beside, failures, at_once)
        self._file = None
        if record is None:
            return
        self.committed += len(rows)
        self.report("shard", **{k: record[k] for k in ("shard", "file", "rows", "bytes")}, failed=len(failures))
