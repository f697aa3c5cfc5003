"""A run from its options to its outcome: what is to do, who does it, and what came of it.

inputs -> sizes -> [engine: batches (images) -> forward (backbones, pooling) -> writers -> records] -> manifest
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from featcli.dump.folder import Dump, in_use
from featcli.dump.lock import FolderLock
from featcli.dump.plan import Plan
from featcli.dump.records import totals_of
from featcli.dump.target import existing_parent, make_folder, occupy, stored_bytes
from featcli.errors import FeatcliError, MachineError, counted, shown, size
from featcli.events import Report, silent
from featcli.extraction.planning import Job, prepare
from featcli.inputs.listing import Listing
from featcli.run.loading import Setup
from featcli.run.pipeline import RunStats
from featcli.run.stats import Throughput
from featcli.spec.commands import ExtractCall, ExtractSpec
from featcli.spec.option import narrowed, takes
from featcli.system.device import device_names
from featcli.system.scheduler import Part, part_of
from featcli.workers.engine import Engine, LocalEngine, WorkOrder
from featcli.workers.processes import ProcessEngine


@dataclass(frozen=True)
class Outcome:
    """What a run did. `failed` and `written` count the dump, or the part of it; `extracted` this run alone."""

    dump: str
    written: int
    failed: int
    failed_by_reason: Mapping[str, int]
    extracted: int
    is_complete: bool  # the dump, with its manifest: other parts may still be missing
    pace: Throughput

    @property
    def seconds(self) -> float:
        """From the first image to the manifest."""
        return self.pace.seconds

    @property
    def exit_code(self) -> int:
        """3 where images failed, else 0."""
        return 3 if self.failed else 0


@takes(ExtractCall)
def extract(asked: ExtractCall) -> Outcome:
    """Dump the feature maps of images: `featcli extract` from Python.

    The keywords are the options of the command line. `report` is called with every event of the run. Raises
    FeatcliError.
    """
    return run(narrowed(asked, ExtractSpec), asked.report)


def run(config: ExtractSpec, report: Report = silent, listing: Listing | None = None) -> Outcome:
    """Dump the feature maps of the images, or what is missing of them. Raises FeatcliError.

    `listing`: the images, where they were found before.
    """
    began, path = time.perf_counter(), config.dump_path
    part = part_of(config.part)
    existing = None if config.overwrite else Dump.existing(path)
    job, loaded = prepare(config, existing, report, listing)
    if existing is not None:
        existing.refuse_other_plan(job.plan, job.images)
    shards = _refuse_if_too_large(path, job, existing, config, part)
    with (
        _told_if_interrupted(path, job.plan, report),  # when no worker is at work any more
        closing(_engine(config, job.plan, loaded, report)) as engine,
    ):
        del loaded  # an engine that needs it has it
        if shards:
            engine.start()
        make_folder(path)
        with FolderLock(path) as lock:
            is_alone = occupy(path, lock, config.overwrite)
            if existing is not None or Dump.existing(path) is None:
                todo = _claimed(path, job, lock, is_alone, config, part)
                if todo is not None and not lock.is_real:
                    text = (
                        "this file system knows no locks: see to it that nobody deletes or repairs this dump meanwhile"
                    )
                    report("warning", text=text)
                if todo is not None:
                    return _run_claimed(todo, job, engine, part, time.perf_counter() - began, report)
    listing = job.listing
    del job, engine  # their memory
    report("warning", text="another run has begun this dump meanwhile: its choices are taken")
    return run(config, report, listing)


def _engine(config: ExtractSpec, plan: Plan, loaded: Setup, report: Report) -> Engine:
    devices = device_names(config.device)
    if config.engine == "ray":
        from featcli.workers.ray import RayEngine

        return RayEngine(config, loaded.backbone.device.type, plan, report)
    if len(devices) > 1:
        return ProcessEngine(config, devices, loaded.reading.threads, report)
    return LocalEngine(loaded, report)


def _claimed(
    path: Path, job: Job, lock: FolderLock, is_alone: bool, config: ExtractSpec, part: Part | None
) -> WorkOrder | None:
    """The dump, held as it has to be for what there is to do, and the shards to do; None where another has begun it.

    Raises ConflictError where another process is in the way.
    """
    if Dump.existing(path) is None:
        if not is_alone:
            raise in_use(path)
        if not Dump.create(path, job.plan, job.images):
            return None
    if is_alone and not lock.together():  # others may help, and need not wait while the records are read
        raise in_use(path)
    dump, unfinished, again = _left(path, job, config, part)
    if again or dump.found.damaged & {*unfinished}:
        if not lock.alone():
            raise in_use(path)  # what is committed is made again by one process alone
        dump, unfinished, again = _left(path, job, config, part)  # as it is now
    dump.again = frozenset(again)
    shards = sorted({*unfinished, *again})
    if shards and not is_alone:  # another begins at the first: begin elsewhere
        start = random.randrange(len(shards))
        shards = shards[start:] + shards[:start]
    return WorkOrder(dump, shards, job.pictures, lock.descriptor)


def _left(path: Path, job: Job, config: ExtractSpec, part: Part | None) -> tuple[Dump, list[int], list[int]]:
    """The dump, and the shards that are not there and those that are to be made again."""
    dump = Dump.resume(path, job.plan, job.images, config.retry_failed)
    return dump, *_to_do(dump, config.retry_failed, part)


def _run_claimed(
    todo: WorkOrder, job: Job, engine: Engine, part: Part | None, preparation: float, report: Report
) -> Outcome:
    dump, plan = todo.dump, todo.dump.plan
    _warn_of_environment(plan.environment, job.plan.environment, report)
    if todo.shards:
        dump.reopen()
    _report_dump(todo, part, report)
    tally = RunStats()
    tally.clock.preparation = preparation
    mine = _in_part(range(plan.num_shards), part)
    workers = min(engine.workers, max(1, len(todo.shards)))  # a shard is not divided
    if todo.shards:
        if len(mine) < engine.workers:
            too_few = f"{counted(len(mine), 'shard')} for {engine.workers} workers"
            report("warning", text=f"{too_few}: with a smaller --shard-size all have work")
        tally.add(engine.run(todo))
    missing = [] if part is None else dump.committed().unfinished
    is_complete = not missing
    totals = dump.finalize()["totals"] if is_complete else {}
    if part is not None:
        totals = totals_of(dump.record_of(number) for number in mine)
    _warn_of_overflow(tally.overflown, plan, report)
    if tally.with_more_frames:
        report("warning", text=f"{tally.with_more_frames:,} files have several frames or pages: the first was used")
    outcome = Outcome(
        dump=str(dump.path),
        written=totals["written"],
        failed=totals["failed"],
        failed_by_reason=totals["failed_by_reason"],
        extracted=tally.images,
        is_complete=is_complete,
        pace=tally.clock.pace(workers, workers * engine.decode_threads, plan),
    )
    # Nothing was dropped, nothing counted twice.
    assert outcome.written + outcome.failed == sum(len(plan.shard(number)) for number in mine)
    report(
        "end",
        **asdict(outcome),
        part=None if part is None else str(part),
        shards=plan.num_shards,
        missing_shards=len(missing),
        exit_code=outcome.exit_code,
    )
    return outcome


@contextmanager
def _told_if_interrupted(path: Path, plan: Plan, report: Report) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError, FeatcliError):  # whoever reads what is said may be gone too
            dump = Dump.existing(path)
            if dump is not None:
                made = len(dump.numbered(".json"))
                less = "" if made else ": with --overwrite and a smaller --shard-size less would be lost"
                report("warning", text=f"{made:,} of {counted(plan.num_shards, 'shard')} are there{less}")
        raise


def _report_dump(todo: WorkOrder, part: Part | None, report: Report) -> None:
    plan, again, shards = todo.dump.plan, todo.dump.again, {*todo.shards}
    mine = _in_part(range(plan.num_shards), part)
    if part is not None:
        value = f"{part}: {counted(len(mine), 'shard')} of {plan.num_shards:,}"
        report("choice", name="part", value=value, reason=part.reason)
    done = len(mine) - len(shards - again)
    value = f"{counted(plan.num_shards, 'shard')} of up to {plan.shard_rows:,} images"
    reason = f"{done:,} of them there already" if done else "new"
    reason += f", {len(again):,} of those with failures and done again" if again else ""
    report("choice", name="dump", value=value, reason=reason)
    images, left = (sum(len(plan.shard(number)) for number in some) for some in (mine, shards))
    report("start", images=images, done=images - left, shards=len(shards))


def _warn_of_environment(before: Mapping[str, str], now: Mapping[str, str], report: Report) -> None:
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed:
        report("warning", text=f"this dump was begun elsewhere, its last bits may differ: {', '.join(changed)}")


def _warn_of_overflow(overflown: Counter[str], plan: Plan, report: Report) -> None:
    for stage, count in sorted(overflown.items()):
        dtype = next(stored.dtype for stored in plan.stages if stored.name == stage)
        help_ = "float16 ends at 65,504, use another --dtype" if dtype == "float16" else "look at its maps"
        report("warning", text=f"{count:,} values of {stage} are infinite or undefined: {help_}")


def _to_do(dump: Dump, retry_failed: bool, part: Part | None) -> tuple[list[int], list[int]]:
    """The shards that are not there, and those with failures that are to be made again."""
    unfinished = dump.found.unfinished
    again = sorted(dump.found.failed - {*unfinished}) if retry_failed else []
    return _in_part(unfinished, part), _in_part(again, part)


def _in_part(shards: Iterable[int], part: Part | None) -> list[int]:
    return list(shards) if part is None else part.of(shards)


def _refuse_if_too_large(
    path: Path, job: Job, existing: Dump | None, config: ExtractSpec, part: Part | None
) -> list[int]:
    """Before anything is deleted or made: whether the shards to do, which are returned, fit into what is free."""
    plan = job.plan
    if existing:
        unfinished, again = _to_do(existing, config.retry_failed, part)
        shards = [*unfinished, *again]
    else:
        shards = _in_part(range(plan.num_shards), part)
    needed = sum(job.pictures.sizes.stored_bytes(plan.stages, plan.shard(number)) for number in shards)
    # What is to be deleted first will be free.
    free = shutil.disk_usage(existing_parent(path)).free + (stored_bytes(path) if config.overwrite else 0)
    if needed > free:
        raise MachineError(
            f"dump {shown(path)}: {size(needed)} needed, {size(free)} free",
            "free some space" + ("" if existing else ", or store less: --dtype float16, --pool, fewer stages"),
        )
    return shards
