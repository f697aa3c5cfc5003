"""A few images of a dump extracted anew, and compared with what it holds."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcli import batches
from featcli.config import ExtractConfig
from featcli.device import memory_errors, settled_arithmetic
from featcli.dump import Dump
from featcli.errors import ConflictError, shown
from featcli.extraction import stored_maps
from featcli.plan import refuse_other_plan
from featcli.planning import Job, prepare
from featcli.progress import Report, silent
from featcli.reader import DumpReader
from featcli.writers.rows import values_of

# How far a number may be off on another machine, as a share of the largest number in its row.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """What came of it. `largest` is the largest difference, as a share of the largest number in its row."""

    images: int
    equal: int  # bit for bit
    largest: float
    tolerance: float
    off: tuple[str, ...]  # the keys of images that are further off than the tolerance


def recompute(dump: Dump, config: ExtractConfig, count: int, report: Report = silent) -> Comparison:
    """Extract `count` images again, drawn by chance, in the very batches that they were in, and compare.

    `config` says where the images and the checkpoint are, all else is the plan's. Raises ConflictError where they
    are not those of the plan, and what `extract` raises.
    """
    job = _same_job(dump, config, report)
    reader = DumpReader(dump)
    valid = np.flatnonzero(reader.valid).tolist()
    if not valid:
        raise ConflictError(f"dump {shown(dump.path)}: it holds no image that could be extracted again", "")
    chosen = sorted(random.SystemRandom().sample(valid, min(count, len(valid))))
    wanted: dict[int, list[int]] = {}
    for row in chosen:
        wanted.setdefault(_batch(dump, row).start, []).append(row)
    runs = [_batch(dump, rows[0]) for rows in wanted.values()]
    decoded = batches.read(job.images, runs, job.backbone.preprocessing, job.decode_threads)
    forward = job.backbone.class_tokens if job.pooling.of_class_token else job.backbone.forward
    equal, largest, off = 0, 0.0, []
    limit = TOLERANCES[dump.plan.settings["precision"]]
    with settled_arithmetic(job.threads), memory_errors(job.backbone.device, len(runs[0])), closing(decoded):
        for batch in decoded:
            maps = stored_maps(forward(batch.pixels), batch, job)
            for row in wanted[batch.rows.start]:
                stored = {name: reader[name][row] for name in reader.stages}
                difference = _difference(stored, maps, row - batch.rows.start)
                equal += difference == 0
                largest = max(largest, difference)
                off += [reader.keys[row]] if not difference <= limit else []
    return Comparison(len(chosen), equal, largest, limit, tuple(off))


def _batch(dump: Dump, row: int) -> range:
    """The rows that went through the backbone together with this one."""
    shard = dump.plan.shard(row // dump.plan.shard_rows)
    size = dump.plan.settings["batch_size"]
    first = row - (row - shard.start) % size
    return range(first, min(first + size, shard.stop))


def _same_job(dump: Dump, config: ExtractConfig, report: Report) -> Job:
    """The job that the dump's plan is of. Its input size is the checkpoint's own, or was asked for: either will do."""
    plan = dump.plan
    backbone: Mapping[str, Any] = plan.settings["backbone"]
    with tempfile.TemporaryDirectory() as elsewhere:  # nothing is written, least of all into the dump
        same = replace(
            config,
            output=str(Path(elsewhere) / "dump"),
            out_indices=tuple(stage.index for stage in plan.stages),
            norm=backbone["norm"],
            num_channels=backbone.get("options", {}).get("in_chans", backbone.get("config", {}).get("num_channels")),
            precision=plan.settings["precision"],
            batch_size=plan.settings["batch_size"],
            threads=plan.settings["threads"],
            pool=plan.settings["pool"],
            dtype=plan.stages[0].dtype,
            format=plan.settings["format"],
            shard_size=plan.shard_rows,
        )
        job = prepare(same, report)
        if job.plan.settings["backbone"] != backbone or job.plan.stages != plan.stages:
            job = prepare(replace(same, image_size=tuple(backbone["input_size"])), report)
    refuse_other_plan(shown(dump.path), plan, job.plan)
    dump.refuse_changed_images(job.images, retry_failed=True)
    return job


def _difference(stored: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray], place: int) -> float:
    """The largest difference over the stages of one image, as a share of the largest number; infinite where NaN is."""
    largest = 0.0
    for name, before in stored.items():
        now = values_of(maps[name][place])
        if np.array_equal(before, now, equal_nan=True):
            continue
        off = np.abs(before.astype(np.float64) - now).max() / max(float(np.abs(before).max()), 1e-30)
        largest = max(largest, float(off) if np.isfinite(off) else float("inf"))
    return largest
