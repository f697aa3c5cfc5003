"""Take a run from its options to its outcome: plan it, claim its shards, have them made, and write the manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

from featcli.backbones.backbone import Backbone
from featcli.dump.atomic_file import disk_errors, remove_stale
from featcli.dump.folder import Dump, in_use
from featcli.dump.generations import MORE, all_generations, commit, has_grown
from featcli.dump.lock import FolderLock
from featcli.dump.plan import Plan, environment_changes
from featcli.dump.records import pictures_of, said_of_pictures, totals_of
from featcli.dump.target import existing_parent, make_folder, stored_bytes
from featcli.dump.writer import finalize, reopen
from featcli.errors import NOTHING_READ, SOME_FAILED, FeatcliError, MachineError, counted, shown, size
from featcli.events import Report, silent
from featcli.extraction.claim import BegunMeanwhileError, claim, in_part, shards_to_make
from featcli.extraction.growing import Growth, Step, next_step, refuse_generation, report_growth, steps_of_all
from featcli.extraction.planning import Extension, Job, prepare
from featcli.extraction.sharding import DEFAULT, SIZE_AS_BEGUN, Sharers, too_few
from featcli.inputs.listing import Listing, find
from featcli.pixels.memory import listed
from featcli.run.loading import Setup
from featcli.run.pooling import remark_on_clamped
from featcli.run.progress import ProgressReport
from featcli.run.stats import RunStats, Throughput
from featcli.spec.calls import ExtractCall
from featcli.spec.commands import ExtractSpec
from featcli.spec.option import narrowed, takes
from featcli.system.device import device_names
from featcli.system.faults import machine_errors
from featcli.system.scheduler import Part, part_of
from featcli.workers.engine import Engine, LocalEngine, WorkOrder
from featcli.workers.processes import ProcessEngine

BEGUN_MEANWHILE = "another run has begun this dump meanwhile: its choices are taken"


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `failed` and `written` count the dump or its part; `extracted` counts this run alone."""

    dump: str
    written: int
    failed: int
    failed_by_reason: Mapping[str, int]
    extracted: int
    is_complete: bool  # the dump has its manifest; for a part, other parts may still be missing
    pace: Throughput
    pictures: Mapping[str, int]  # `read`, and how many of these have each trait, in the dump or the part
    part: str | None = None  # the part, if only that was made

    @property
    def seconds(self) -> float:
        """Seconds from the first image to the manifest."""
        return self.pace.seconds

    @property
    def exit_code(self) -> int:
        """3 if images failed, 9 if every image of the dump failed, else 0. A part gives at most 3."""
        if not self.failed:
            return 0
        return SOME_FAILED if self.written or self.part is not None else NOTHING_READ


@takes(ExtractCall)
def extract(asked: ExtractCall) -> Outcome:
    """Dump the feature maps of images: `featcli extract` from Python.

    The keywords are the options that `featcli extract -h` describes, except those under Report: `report` takes their
    place, and is called with every event of the run. Returns an `Outcome`.

    `inputs` may also be pictures in memory, with their `keys`: pictures of Pillow, arrays or tensors (H, W), (H, W, C)
    or (C, H, W) of uint8 or uint16, in a list or as the values of a mapping from keys. `files_from` may be a list of
    paths. `checkpoint` may be a backbone of `load_backbone` or of a dump, whose options are then those of the run.

    Raises UsageError, ConflictError, CheckpointError, MachineError, DamagedError, WorkerError and IncompleteError, all
    of which are FeatcliError.
    """
    try:
        named, report = asked.named(), silent if asked.report is None else asked.report
        if named.pictures is None:
            return run(narrowed(named, ExtractSpec), report, loaded=asked.backbone)
        listing = Listing(listed(named.picture_keys, named.pictures))
        return run(named, report, listing=listing, loaded=asked.backbone)
    except KeyboardInterrupt as interrupt:
        raise interrupt from None  # has one traceback, however often Ctrl-C came during the cleanup


def run(
    asked: ExtractSpec,
    report: Report = silent,
    if_there: ExtractSpec | None = None,
    listing: Listing | None = None,
    loaded: Backbone | None = None,
) -> Outcome:
    """Dump the feature maps of the images, or those that are missing. Raises FeatcliError.

    `if_there` is asked instead if the dump exists already, or if another process begins it meanwhile. `listing` are
    pictures in memory. `loaded` is a backbone of the checkpoint that is asked for.
    """
    progress = ProgressReport(report)
    path = asked.dump_path
    refuse_generation(path)
    is_there = not asked.overwrite and Dump.existing(path) is not None
    may_differ = asked.extend or asked.retry_failed  # the images, from those of the dump
    if not (is_there and (may_differ or has_grown(path))):
        try:
            ended = _run_one(asked, if_there or asked, progress, listing, loaded)
        except BegunMeanwhileError as begun:
            is_there, listing = True, begun.listing
    if is_there and (may_differ or has_grown(path)):
        ended = _run_all(if_there or asked, progress, listing, loaded)
    _report_end(ended, progress)
    return ended.outcome


@dataclass(frozen=True)
class _Ended:
    """The outcome of a run, and what else its last event says."""

    outcome: Outcome
    shards: int = 0
    missing_shards: int = 0


def _run_all(asked: ExtractSpec, report: ProgressReport, listing: Listing | None, loaded: Backbone | None) -> _Ended:
    """Resume generations, and with --extend add one, until nothing is left that this run can do. Raises FeatcliError.

    The folder of the first generation is locked while another one is made, so that nobody deletes or repairs the dump.
    """
    path, listing = asked.dump_path, listing or find(asked)
    ended: list[_Ended] = []
    steps: list[Step] | None = None
    is_told = False
    while True:
        with FolderLock(path) as lock:
            others_work = not lock.alone()
            if not lock.together() or (root := Dump.existing(path)) is None:
                raise in_use(path)
            _remove_stale(path)
            if asked.extend or steps is None:
                growth = Growth.of(root, listing)
                if asked.extend and not is_told and not any(growth.is_unfinished):
                    report_growth(growth, asked, report)
                    is_told = True
                steps = _steps(growth, asked, others_work, report)
            step = steps.pop(0) if steps else None
            if step is not None and step.path != path:
                one = _run_added(asked, step, report, loaded)
                if one is None:
                    continue
                ended.append(one)
        if step is not None and step.path == path:  # which locks it itself
            ended.append(_run_step(asked, step, report, loaded))
        if step is None and not ended:
            _refuse_other_options(asked, growth, loaded)
        if step is None or (asked.extend and not ended[-1].outcome.is_complete):  # other parts have to complete it
            return _together(root, ended)


def _steps(growth: Growth, asked: ExtractSpec, others_work: bool, report: Report) -> list[Step]:
    """Return all that is left to do, or the next of it with --extend, because other runs may add generations."""
    if not asked.extend:
        return steps_of_all(growth, asked.retry_failed, report)
    step = next_step(growth, others_work)
    return [] if step is None else [step]


def _refuse_other_options(asked: ExtractSpec, growth: Growth, loaded: Backbone | None) -> None:
    """Raise what a generation of other options would raise, also if there is nothing new to make one of."""
    one = growth.begin_any()
    prepare(one.options(asked), None, silent, one.listing, loaded, one.extension)


def _remove_stale(path: Path) -> None:
    """Remove files that a kill left while a generation was begun or became part of the dump. Raises MachineError."""
    with disk_errors(path):
        remove_stale(path)
        remove_stale(path / MORE)


def _run_added(asked: ExtractSpec, step: Step, report: ProgressReport, loaded: Backbone | None) -> _Ended | None:
    """Make or resume a generation that was added, and commit it. Returns None if another run has begun it meanwhile."""
    try:
        ended = _run_step(asked, step, report, loaded)
    except BegunMeanwhileError:
        report("warning", text=BEGUN_MEANWHILE)
        return None
    if ended.outcome.is_complete:
        commit(step.root, Dump.at(step.path))
    return ended


def _run_step(asked: ExtractSpec, step: Step, report: ProgressReport, loaded: Backbone | None) -> _Ended:
    step.tell(report)
    own = step.options(asked)
    return _run_one(own, own, report, step.listing, loaded, step.extension)


def _together(root: Dump, ended: Sequence[_Ended]) -> _Ended:
    """Return the outcome of all generations. What this run extracted is added up."""
    generations = all_generations(root)
    dumps = generations.dumps
    totals = totals_of(record for dump in dumps for record in dump.records())
    missing = sum(len(dump.committed().missing) for dump in dumps)
    outcomes = [one.outcome for one in ended]
    paths = {str(dump.path) for dump in dumps}  # a generation that other parts have to complete is none of these yet
    apart = [one for one in ended if not one.outcome.is_complete and one.outcome.dump not in paths]
    paces = [one.pace for one in outcomes] or [RunStats().timings.pace(1, 1, root.plan)]
    outcome = Outcome(
        dump=str(root.path),
        written=totals["written"],
        failed=totals["failed"],
        failed_by_reason=totals["failed_by_reason"],
        extracted=sum(one.extracted for one in outcomes),
        is_complete=generations.are_complete and not apart,
        pace=reduce(Throughput.followed_by, paces),
        pictures=pictures_of(record for dump in dumps for record in dump.records()),
        part=next((one.part for one in outcomes), None),
    )
    shards = sum(dump.plan.num_shards for dump in dumps) + sum(one.shards for one in apart)
    return _Ended(outcome, shards, missing + sum(one.missing_shards for one in apart))


def _run_one(
    asked: ExtractSpec,
    if_there: ExtractSpec,
    report: ProgressReport,
    listing: Listing | None,
    loaded: Backbone | None,
    extension: Extension | None = None,
) -> _Ended:
    """Make or resume one generation. `if_there` is asked instead if it exists already. Raises FeatcliError.

    Raises BegunMeanwhileError if another run began it, unless this one can resume it without a look at its keys.
    """
    while True:
        existing = None if asked.overwrite else Dump.existing(asked.dump_path)
        try:
            return _run_once(asked if existing is None else if_there, existing, report, listing, loaded, extension)
        except BegunMeanwhileError as begun:
            if asked.extend or extension is not None:  # what is new has to be found out anew
                raise
            listing = begun.listing
        report("warning", text=BEGUN_MEANWHILE)


def _run_once(
    asked: ExtractSpec,
    existing: Dump | None,
    report: ProgressReport,
    listing: Listing | None,
    loaded: Backbone | None,
    extension: Extension | None = None,
) -> _Ended:
    """Plan the run, claim the dump, and make its shards. Raises BegunMeanwhileError, and FeatcliError.

    `existing` is the dump that is resumed. `listing` are the images, if they were found before. `loaded` is a backbone
    that is taken if it is what the run needs.
    """
    began, path = time.perf_counter(), asked.dump_path
    part = part_of(asked.part)
    job, setup = prepare(asked, existing, report, listing, loaded, None if existing is not None else extension)
    if existing is not None:
        existing.refuse_other_plan(job.plan, job.images)
        shards = shards_to_make(existing, asked.retry_failed, part).all
    else:
        shards = list(in_part(range(job.plan.num_shards), part))
    _refuse_if_too_large(path, job, shards, asked.overwrite, existing)
    with (
        _told_if_stopped(path, job.plan, part, report),  # comes last, when no worker runs any more
        closing(_engine(asked, job.plan, setup, report)) as engine,
    ):
        del setup  # an engine that needs it holds it
        if shards:
            engine.start()
        make_folder(path)
        with FolderLock(path) as lock:
            order = claim(job, asked, existing, lock)
            if not lock.is_real:
                text = "this file system has no locks, so nobody may delete or repair this dump during the run"
                report("warning", text=text)
            return _make(order, engine, part, job.shard_rows.reason, time.perf_counter() - began, report)


def _refuse_if_too_large(path: Path, job: Job, shards: Sequence[int], overwrite: bool, existing: Dump | None) -> None:
    """Raise MachineError if the shards to make do not fit into the free space, before anything is deleted or made."""
    needed = sum(job.plan.shard_bytes(number, job.pictures.sizes) for number in shards)
    if existing is not None:  # space that they already have is not needed again
        needed -= sum(one.stored_bytes for one in existing.unfinished() if one.number in shards)
    # Space of files that will be deleted first counts as free.
    with machine_errors("dump", path, strict=True):
        free = shutil.disk_usage(existing_parent(path)).free + (stored_bytes(path) if overwrite else 0)
    if needed > free:
        raise MachineError(
            f"dump {shown(path)}: it needs {size(needed)}, and {size(free)} are free",
            "free some space" + (", or store less: --dtype float16, --pool, fewer stages" if existing is None else ""),
        )


def _engine(asked: ExtractSpec, plan: Plan, setup: Setup, report: Report) -> Engine:
    devices = device_names(asked.device)
    if asked.engine == "ray":
        from featcli.workers.ray import RayEngine

        return RayEngine(asked, setup.backbone.device.type, plan, report)
    if len(devices) > 1:
        return ProcessEngine(asked, devices, setup.decoder.threads, report)
    return LocalEngine(setup, report)


def _make(
    order: WorkOrder, engine: Engine, part: Part | None, shard_size: str, preparation: float, report: Report
) -> _Ended:
    """Make the shards, write the manifest if all are there by then, and return the outcome.

    `shard_size` says where the number of rows comes from.
    """
    dump, plan = order.dump, order.dump.plan
    if changed := environment_changes(plan.environment, order.into.environment):
        text = f"this dump was begun elsewhere, so its last bits may differ: {', '.join(changed)}"
        report("warning", text=text)
    if order.shards:
        reopen(dump)
    _report_dump(order, part, shard_size, report)
    stats = RunStats()
    stats.timings.preparation = preparation
    mine = in_part(range(plan.num_shards), part)
    workers = min(engine.workers, max(1, len(order.shards)))  # a shard is never divided
    few = too_few(plan, plan.settings.batch_size, Sharers(1 if part is None else part.count, engine.workers))
    if few is not None and (order.shards or not mine):
        report("warning", text=few)
    if order.shards:
        stats.add(engine.run(order))
    missing = [] if part is None else dump.committed().missing
    manifest = finalize(dump, order.into.retry_failed) if not missing else {}
    records = manifest["shards"] if part is None else [dump.record_of(number) for number in mine]
    totals = manifest["totals"] if part is None else totals_of(records)
    pictures = pictures_of(records) or stats.pictures  # of this run alone, if no record has them
    _warn_of_maps(stats, plan, report)
    for text in said_of_pictures(plan, pictures):
        report("warning", text=text)
    outcome = Outcome(
        dump=str(dump.path),
        written=totals["written"],
        failed=totals["failed"],
        failed_by_reason=totals["failed_by_reason"],
        extracted=stats.images,
        is_complete=not missing,
        pace=stats.timings.pace(workers, workers * engine.decode_threads, plan),
        pictures=pictures,
        part=None if part is None else str(part),
    )
    # No row was lost, and none was counted twice.
    assert outcome.written + outcome.failed == sum(len(plan.shard(number)) for number in mine)
    return _Ended(outcome, plan.num_shards, len(missing))


def _report_end(ended: _Ended, report: Report) -> None:
    outcome = ended.outcome
    report(
        "end",
        **asdict(outcome),
        shards=ended.shards,
        missing_shards=ended.missing_shards,
        seconds=round(outcome.pace.seconds, 3),
        images_per_second=round(outcome.extracted / outcome.pace.seconds, 3) if outcome.pace.seconds else None,
        exit_code=outcome.exit_code,
    )


@contextmanager
def _told_if_stopped(path: Path, plan: Plan, part: Part | None, report: ProgressReport) -> Iterator[None]:
    """Say how many images are safe if a run ends before its time, once it has begun."""
    try:
        yield
    except (KeyboardInterrupt, FeatcliError):
        with suppress(OSError, FeatcliError):  # the reader of these lines may be gone, too
            dump = Dump.existing(path) if report.progress.has_started else None
            if dump is not None:
                mine = in_part(range(plan.num_shards), part)
                rows = dump.rows_kept()  # before the shards, because another process may commit one meanwhile
                rows |= {number: len(plan.shard(number)) for number in dump.numbered(".json")}
                safe = sum(rows.get(number, 0) for number in mine)
                report("stopped", images=sum(len(plan.shard(number)) for number in mine), safe=safe)
        raise


def _report_dump(order: WorkOrder, part: Part | None, shard_size: str, report: Report) -> None:
    plan, again, shards = order.dump.plan, order.into.again, {*order.shards}
    mine = in_part(range(plan.num_shards), part)
    if part is not None:
        value = f"{part}: {counted(len(mine), 'shard')} of {plan.num_shards:,}"
        report("choice", name="part", value=value, reason=part.reason, index=part.index, count=part.count)
    done = len(mine) - len(shards - again)
    value = f"{counted(plan.num_shards, 'shard')} of up to {plan.shard_rows:,} images"
    unfinished = [one for one in order.dump.unfinished_shards() if one["shard"] in shards]
    kept = sum(one["kept"] for one in unfinished)
    reasons = [f"{done:,} of them there already"] if done else []
    reasons += [f"{counted(kept, 'image')} of unfinished ones there already"] if kept else []
    reasons = reasons or (["new"] if order.is_new else [] if shard_size == SIZE_AS_BEGUN else ["begun already"])
    reasons += [f"{len(again):,} of those with failures and done again"] if again else []
    reasons += [] if shard_size == DEFAULT else [shard_size]
    facts = {"shards": plan.num_shards, "shard_rows": plan.shard_rows}
    report("choice", name="dump", value=value, reason="; ".join(reasons), **facts)
    images, left = (sum(len(plan.shard(number)) for number in some) for some in (mine, shards))
    num_bytes = sum(plan.shard_bytes(number, order.pictures.sizes) for number in shards)
    facts = {"images": images, "done": images - left, "shards": len(shards), "bytes": num_bytes}
    report("start", **facts, unfinished_shards=unfinished)


def _warn_of_maps(stats: RunStats, plan: Plan, report: Report) -> None:
    images = stats.images - stats.failed
    for name, shares in sorted(stats.clamped.items()):
        if images and (text := remark_on_clamped(name, shares / images)):
            report("warning", text=text)
    for stage, count in sorted(stats.overflown.items()):
        dtype = next(stored.dtype for stored in plan.outputs if stored.name == stage)
        help_ = "float16 ends at 65,504, so use another --dtype" if dtype == "float16" else "look at its maps"
        report("warning", text=f"{count:,} values of {stage} are infinite or undefined: {help_}")
