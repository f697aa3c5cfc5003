"""The pipeline, and the only place where its stages meet.

inputs -> images -> batches -> backbones -> pooling -> writers -> records
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcli import batches
from featcli.backbones.stages import parse_features, parse_indices
from featcli.batches import Batch
from featcli.config import ExtractConfig
from featcli.device import memory_errors, settled_arithmetic
from featcli.dump import Dump
from featcli.errors import MachineError, shown
from featcli.images import Failure
from featcli.plan import Plan, image_bytes
from featcli.planning import Job, prepare
from featcli.progress import Report, silent, size
from featcli.target import existing_parent, remove_dump, stored_bytes
from featcli.writers.background import Background
from featcli.writers.publish import disk_errors
from featcli.writers.shard import ShardWriter

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUEUED_BATCHES = 2  # that may wait for the writer


@dataclass(frozen=True)
class Outcome:
    """What a run did. `failed` and `written` count the whole dump, `extracted` this run alone."""

    dump: str
    written: int
    failed: int
    failed_by_reason: Mapping[str, int]
    extracted: int
    seconds: float
    busy: Mapping[str, float]  # share of the run in which decode, compute and write were at work

    @property
    def exit_code(self) -> int:
        """3 where images failed, else 0."""
        return 3 if self.failed else 0


@dataclass
class Clock:
    """Seconds at work, by part of the pipeline."""

    started: float = field(default_factory=time.perf_counter)
    decode: float = 0.0
    compute: float = 0.0
    overflown: Counter[str] = field(default_factory=Counter)  # stage -> values that are not finite


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
    for choice, parse in (("out_indices", parse_indices), ("out_features", parse_features)):
        asked = options.get(choice)
        asked = parse(asked) if isinstance(asked, str) else asked
        options[choice] = tuple(asked) if isinstance(asked, list | range) else asked
    config = ExtractConfig(
        inputs=tuple(os.fspath(name) for name in names), checkpoint=checkpoint, output=os.fspath(output), **options
    )
    return run(config, report)


def run(config: ExtractConfig, report: Report = silent) -> Outcome:
    """Dump the feature maps of the images, or what is missing of them. Raises FeatcliError."""
    path = Path(config.output)
    job = prepare(config, report)
    existing = None if config.overwrite else Dump.existing(path)
    unfinished = list(range(job.plan.num_shards)) if existing is None else existing.unfinished()
    again = sorted({*existing.failed()} - {*unfinished}) if existing is not None and config.retry_failed else []
    _refuse_if_too_large(path, job.plan, [*unfinished, *again], config.overwrite)
    if config.overwrite:
        remove_dump(path)  # not before everything else is known to be right
    dump = Dump.create_or_resume(path, job.plan, job.images, config.retry_failed)
    _warn_of_environment(dump.plan.environment, job.plan.environment, report)
    shards = sorted({*unfinished, *again})
    if shards:
        dump.reopen()
    num_images = sum(len(dump.plan.shard(n)) for n in shards)
    _report_dump(dump, unfinished, again, report)
    report("start", images=len(job.images), done=len(job.images) - num_images, shards=len(shards))
    clock = Clock()
    with settled_arithmetic(job.threads):
        write_seconds = _run_shards(dump, shards, frozenset(again), job, clock, report) if shards else 0.0
    manifest = dump.finalize()
    _warn_of_overflow(clock.overflown, dump.plan, report)
    seconds = time.perf_counter() - clock.started
    outcome = Outcome(
        dump=str(path),
        written=manifest["totals"]["written"],
        failed=manifest["totals"]["failed"],
        failed_by_reason=manifest["totals"]["failed_by_reason"],
        extracted=num_images,
        seconds=seconds,
        busy={
            "decode": clock.decode / job.decode_threads / seconds,
            "compute": clock.compute / seconds,
            "write": write_seconds / seconds,
        },
    )
    assert outcome.written + outcome.failed == dump.plan.num_images  # nothing was dropped, nothing counted twice
    report("end", **vars(outcome), exit_code=outcome.exit_code)
    return outcome


def _report_dump(dump: Dump, unfinished: Sequence[int], again: Sequence[int], report: Report) -> None:
    total, done = dump.plan.num_shards, dump.plan.num_shards - len(unfinished)
    value = f"{total:,} shard{'s' * (total > 1)} of up to {dump.plan.shard_rows:,} images"
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


def _refuse_if_too_large(path: Path, plan: Plan, shards: Sequence[int], overwrite: bool) -> None:
    """Before anything is deleted or made: whether these shards fit into what is free, or will be."""
    needed = image_bytes(plan.stages) * sum(len(plan.shard(number)) for number in shards)
    free = shutil.disk_usage(existing_parent(path)).free + (stored_bytes(path) if overwrite else 0)
    if needed > free:
        raise MachineError(
            f"dump {shown(path)}: {size(needed)} needed, {size(free)} free",
            "free some space, or store less: --dtype float16, --pool, fewer stages",
        )


def _run_shards(
    dump: Dump, shards: Sequence[int], again: frozenset[int], job: Job, clock: Clock, report: Report
) -> float:
    """Extract these shards; those in `again` are committed, until the new file is there. Returns seconds of writing."""
    forward = job.backbone.class_tokens if job.pooling.of_class_token else job.backbone.forward
    runs = (run for number in shards for run in _cut_batches(dump.plan, number))
    decoded = batches.read(
        job.images,
        runs,
        job.backbone.preprocessing,
        job.decode_threads,
        pinned=job.backbone.device.type == "cuda",
    )
    limit = QUEUED_BATCHES * dump.plan.settings["batch_size"] * image_bytes(dump.plan.stages)
    with (
        memory_errors(job.backbone.device, dump.plan.settings["batch_size"]),
        disk_errors(dump.path),
        closing(decoded),
        _Shards(dump, again, job, report) as into,  # outermost of the two: it cleans up when the writer has stopped
        Background(limit) as writer,
    ):
        for batch in decoded:
            clock.decode += batch.decode_seconds
            began = time.perf_counter()
            maps = stored_maps(forward(batch.pixels), batch, job, clock.overflown)
            clock.compute += time.perf_counter() - began
            into.write(batch, maps, writer)
            report("batch", images=len(batch.rows))
    return writer.busy_seconds


def _cut_batches(plan: Plan, number: int) -> Iterator[range]:
    rows, batch_size = plan.shard(number), plan.settings["batch_size"]
    return (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))


def stored_maps(
    found: Mapping[str, torch.Tensor], batch: Batch, job: Job, overflown: Counter[str] | None = None
) -> dict[str, np.ndarray]:
    """Maps on the device -> the rows as they are stored: pooled, cast, NaN where there was no image.

    `overflown` counts the values that are not finite, by stage.
    """
    failed = [failure.row - batch.rows.start for failure in batch.failures]
    stored = {}
    for stage in job.plan.stages:
        rows = job.pooling.reduce(found[stage.name]).to(TORCH_DTYPES[stage.dtype])
        if overflown is not None and not (finite := torch.isfinite(rows)).all():
            finite[failed] = True
            overflown[stage.name] += int((~finite).sum())
        rows = rows.cpu().contiguous()
        if rows.shape != (len(batch.rows), *stage.shape):
            raise AssertionError(f"{stage.name} yields {tuple(rows.shape)}, planned {(len(batch.rows), *stage.shape)}")
        if failed:
            rows = rows.clone() if rows.is_inference() else rows
            rows[failed] = torch.nan
        # numpy has no bfloat16: the same bytes under another name
        stored[stage.name] = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return stored


class _Shards:
    """The shard file that batches go to, one after the other, all work on files done by the writer thread."""

    def __init__(self, dump: Dump, again: frozenset[int], job: Job, report: Report) -> None:
        self._dump = dump
        self._again = again
        self._job = job
        self._report = report
        self._file: ShardWriter | None = None
        self._failures: list[Failure] = []

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:  # something went wrong on the way: a whole shard has been committed by now
            self._file.abort()

    def write(self, batch: Batch, maps: Mapping[str, np.ndarray], writer: Background) -> None:
        """Queue the rows of a batch; where it ends its shard, the commit too."""
        number = batch.rows.start // self._dump.plan.shard_rows
        rows = self._dump.plan.shard(number)
        for failure in batch.failures:
            self._report("failure", **failure.to_json())
        num_bytes = sum(array.nbytes for array in maps.values())
        writer.give(partial(self._write, number, batch.rows.start - rows.start, maps), num_bytes)
        self._failures += batch.failures
        if batch.rows.stop == rows.stop:
            writer.give(partial(self._commit, number, self._failures))
            self._failures = []

    def _write(self, number: int, row: int, maps: Mapping[str, np.ndarray]) -> None:
        if self._file is None:
            keys = [self._job.images.keys[i] for i in self._dump.plan.shard(number)]
            self._file = self._dump.start_shard(number, keys)
        self._file.write(row, maps)

    def _commit(self, number: int, failures: Sequence[Failure]) -> None:
        assert self._file is not None
        rows = self._dump.plan.shard(number)
        valid = np.ones(len(rows), np.uint8)
        valid[[failure.row - rows.start for failure in failures]] = 0
        release = partial(self._dump.release, number) if number in self._again else None
        if release is None and self._dump.is_committed(number):  # by another process meanwhile: the first wins
            self._file.abort()
            self._file = None
            return
        written = self._file.commit(valid, before_naming=release)
        self._file = None
        record = self._dump.record(number, written, failures, self._job.plan.environment)
        self._report("shard", **{k: record[k] for k in ("shard", "file", "rows", "bytes")}, failed=len(failures))
