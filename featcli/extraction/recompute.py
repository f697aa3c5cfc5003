"""Extract a few images of a dump again, and compare them with what it holds."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcli.backbones.backbone import Backbone
from featcli.dump.folder import Dump
from featcli.dump.formats.layout import values_of
from featcli.dump.generations import all_generations
from featcli.dump.plan import Plan
from featcli.errors import ConflictError, shown
from featcli.events import Report, silent
from featcli.extraction.growing import Growth
from featcli.extraction.planning import Job, prepare, refuse_without_extras
from featcli.inputs.listing import Listing, find
from featcli.pixels import batches
from featcli.reading.plan_backbone import checkpoint_options
from featcli.reading.reader import reader_of
from featcli.run.forward import Forward
from featcli.run.loading import Setup
from featcli.spec.commands import ExtractSpec, VerifyCommand
from featcli.spec.groups import InputSpec
from featcli.spec.option import narrowed, shared_options
from featcli.system.device import memory_errors, settled_arithmetic

LARGEST = 1e300  # JSON has no infinity
# Largest difference that another machine may cause, as a share of the largest number in the row.
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. `largest` is the largest difference, as a share of the largest number in its row."""

    images: int
    equal: int  # bit for bit
    largest: float
    tolerance: float
    off: tuple[str, ...]  # keys of the images that differ by more than the tolerance


@dataclass(frozen=True)
class Sample:
    """How many images of a generation are to be extracted again, and the job that extracts them."""

    dump: Dump
    count: int
    job: Job
    setup: Setup
    rows: Sequence[int] | None = None  # of these images; None if any that was read will do


def samples_of(root: Dump, asked: VerifyCommand, report: Report = silent) -> list[Sample]:
    """Return what is to be extracted again: images drawn from all generations alike. No shard is read.

    Raises what `same_job` raises.
    """
    dumps = all_generations(root).dumps
    if len(dumps) == 1:
        return [Sample(root, asked.recompute, *same_job(root, asked, report))]
    growth = Growth.of(root, find(narrowed(asked, InputSpec)))
    there = np.flatnonzero(reader_of(dumps).valid & (growth.places >= 0)).tolist()
    if not there:
        raise ConflictError(
            f"dump {shown(root.path)}: none of its images is given", "give the images that it was extracted from"
        )
    drawn = np.array(sorted(random.SystemRandom().sample(there, min(asked.recompute, len(there)))))
    found: list[Sample] = []
    first = 0
    for number, dump in enumerate(dumps):
        own = drawn[(drawn >= first) & (drawn < first + dump.plan.num_images)] - first
        first += dump.plan.num_images
        if len(own):
            loaded = found[-1].setup.backbone if found else None
            job, setup = same_job(dump, asked, report, growth.frozen(number), loaded)
            found.append(Sample(dump, len(own), job, setup, own.tolist()))
    return found


def recompute(samples: Sequence[Sample]) -> Comparison:
    """Extract randomly drawn images again, each in the batch that it was in, and compare.

    Raises what `extract` raises.
    """
    found = [_recomputed(sample) for sample in samples]
    return Comparison(
        images=sum(one.images for one in found),
        equal=sum(one.equal for one in found),
        largest=max(one.largest for one in found),
        tolerance=found[0].tolerance,
        off=tuple(key for one in found for key in one.off),
    )


def _recomputed(sample: Sample) -> Comparison:
    dump, job, setup = sample.dump, sample.job, sample.setup
    reader = reader_of([dump])
    valid = np.flatnonzero(reader.valid).tolist()
    if not valid:
        raise ConflictError(f"dump {shown(dump.path)}: it holds no image that could be extracted again", "")
    chosen = sorted(sample.rows or random.SystemRandom().sample(valid, min(sample.count, len(valid))))
    wanted: dict[range, list[int]] = {}
    for row in chosen:
        wanted.setdefault(_batch(job, row), []).append(row)
    decoder = replace(setup.decoder, processes=0)  # which would take longer to start than these images take
    decoded = batches.read(decoder, ((job.pictures, rows) for rows in wanted))
    forward = Forward(setup)
    equal, largest, off = 0, 0.0, []
    limit = TOLERANCES[dump.plan.settings.precision]
    device = setup.backbone.device
    with settled_arithmetic(setup.threads, device), memory_errors("the images do", device), closing(decoded):
        if setup.backbone.execution.compiled:
            forward.compile()
        for batch in decoded:
            shard = batch.rows.start // dump.plan.shard_rows
            forward.micro_batch = reader.records[shard].get("batch_size", dump.plan.settings.batch_size)
            rows = forward(batch)
            maps = rows.finished()
            for row in wanted[batch.rows]:
                stored = {name: reader[name][row] for name in reader.outputs}
                difference = _difference(stored, maps, row - batch.rows.start)
                equal += difference == 0
                largest = max(largest, difference)
                off += [reader.keys[row]] if not difference <= limit else []
            rows.release()
    return Comparison(images=len(chosen), equal=equal, largest=largest, tolerance=limit, off=tuple(off))


def _batch(job: Job, row: int) -> range:
    """Return the rows that went through the backbone together with this one."""
    shard = job.plan.shard(row // job.plan.shard_rows)
    batches_of_shard = job.pictures.sizes.batches(shard, job.plan.settings.batch_size)
    return next(batch for batch in batches_of_shard if row in batch)


def same_job(
    dump: Dump,
    asked: VerifyCommand,
    report: Report = silent,
    listing: Listing | None = None,
    loaded: Backbone | None = None,
) -> tuple[Job, Setup]:
    """Return the job of the dump's plan, with its backbone loaded. No shard is read.

    `asked` says where the images are, and the checkpoint if the plan cannot find it. `listing` are the images of a
    generation, and `loaded` is the backbone of another one. The input size may be the checkpoint's own or asked for, so
    both are tried. Raises ConflictError if images or checkpoint are not those of the plan, or if the images were in
    memory, and what `extract` raises.
    """
    plan, settings = dump.plan, dump.plan.settings
    dump.refuse_in_memory()
    if not settings.can_be_repeated:
        raise ConflictError(
            f"dump {shown(dump.path)}: it was made by another version of featcli", "use the version that made it"
        )
    with tempfile.TemporaryDirectory() as elsewhere:  # nothing may be written into the dump
        same = ExtractSpec(
            **shared_options(asked, ExtractSpec) | _checkpoint(plan, asked),
            **settings.options(),
            **plan.options(),
            output=str(Path(elsewhere) / "dump"),
            shard_size=plan.shard_rows,
        )
        job, setup = prepare(same, dump, report, listing, loaded)
        backbone = job.plan.settings.backbone
        if not settings.is_native and (backbone != settings.backbone or job.plan.outputs != plan.outputs):
            job, setup = prepare(replace(same, image_size=settings.input_size), dump, report, listing, loaded)
    refuse_without_extras(dump, job.images, True)
    try:
        dump.refuse_other_plan(job.plan, job.images)
        dump.refuse_changed_images(job.plan, job.images, retry_failed=True)
    except ConflictError as error:
        raise ConflictError(
            error.message, "give the images, checkpoint, seed and --model-arg that the dump was made with"
        ) from error
    return job, setup


def _checkpoint(plan: Plan, asked: VerifyCommand) -> dict[str, Any]:
    """Return the options that ask for the checkpoint: those of the plan if none is given."""
    hint = "give it with -c/--checkpoint"
    return {
        name: value
        for name, value in checkpoint_options(plan, asked.checkpoint, hint).items()
        if not asked.is_given(name)
    }


def _difference(stored: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray], place: int) -> float:
    """Return the largest difference over all stages of an image, as a share of the largest number; LARGEST for NaN."""
    largest = 0.0
    for name, before in stored.items():
        now = values_of(maps[name][place])
        if now.shape != before.shape:  # the picture has other edges now
            return LARGEST
        same = (before == now) | (np.isnan(before) & np.isnan(now))  # infinity equals itself
        if same.all():
            continue
        off = np.abs(before[~same].astype(np.float64) - now[~same]).max() / max(float(np.abs(before).max()), 1e-30)
        largest = max(largest, float(off) if np.isfinite(off) else LARGEST)
    return largest
