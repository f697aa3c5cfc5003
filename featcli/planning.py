"""Options -> a job: images found, backbone loaded, every choice made and said with its reason. Writes nothing."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featcli
from featcli import inputs
from featcli.backbones.backbone import Backbone
from featcli.backbones.checkpoint import resolve
from featcli.backbones.execution import Execution
from featcli.backbones.fitting import NATIVE
from featcli.backbones.source import Source, ready
from featcli.batches import Pictures
from featcli.config import AUTO, DEFAULT_BATCH_SIZE, MAX_SHARD_ROWS, MOST, SHARD_BYTES, ExtractConfig
from featcli.decoding import Decoding
from featcli.device import Resolved, memory_errors, resolve_device, settled_arithmetic
from featcli.dump import Dump
from featcli.errors import UsageError, counted, shown
from featcli.images import plugin_versions
from featcli.inputs import ImageList
from featcli.machine import available_cores
from featcli.plan import Plan, StoredStage, digest_images, digest_keys
from featcli.pooling import Pooling, pooling
from featcli.progress import Report, silent, size
from featcli.sizes import Sizes, native_sizes
from featcli.target import check_target, existing_parent
from featcli.tuning import AS_BEGUN, Trials, Tuning, named, reason_for, tune


@dataclass(frozen=True)
class Job:
    """All that a run needs, resolved: nothing is guessed after this."""

    pictures: Pictures
    backbone: Backbone
    plan: Plan
    pooling: Pooling
    threads: int
    decode_threads: int

    @property
    def images(self) -> ImageList:
        """In row order."""
        return self.pictures.images


def prepare(config: ExtractConfig, existing: Dump | None, report: Report = silent) -> Job:
    """Find the images, load the backbone, make the plan. Writes nothing. Raises FeatcliError.

    `existing`: the dump that is to be gone on with. What may be chosen is chosen as it was for that one.
    """
    listing, source, positions, device = _resolve(config, report)
    stages = _stored_stages(config, source, positions)
    begun = None if existing is None else existing.plan.settings
    threads = _threads(config, begun)
    with memory_errors("the backbone does", device.value), settled_arithmetic(threads.value):
        trials = Trials(source, positions, stages, device.value, partial(_report_trials, report))
        tuning = tune(config, trials, len(listing.images), begun)
        backbone = ready(source, positions, device.value, tuning.execution)
    _report_tuning(device.value, backbone.execution, tuning, report)
    if config.fold and not backbone.execution.folded:
        report("warning", text="no norms were folded: there are none that can be without moving the maps")
    report("choice", name="weights", value=backbone.weights.summary())
    report("choice", name="preprocessing", value=backbone.preprocessing.summary, reason=backbone.preprocessing.origin)
    share = f"{source.share(positions):.0%} of the model"
    report("choice", name="computes", value=share, reason="up to the deepest stage")
    rules, decode_threads = config.decoding(), config.decode_threads or available_cores()
    report("choice", name="pictures", value=rules.summary, reason="default" if rules == Decoding() else "as asked")
    sizes = _sizes(source, listing.images, rules, decode_threads, report)
    settings = _settings(config, backbone, rules, threads.value, tuning.batch_size)
    provenance = {
        "checkpoint": backbone.name,
        "weights": backbone.weights.summary(),
        "weights_files": dict(backbone.weights.files),
        "preprocessing": backbone.preprocessing.origin,
    }
    environment = _environment(device.value, source.library)
    rows = _shard_rows(config, tuning.batch_size, stages, sizes, len(listing.images), existing)
    plan = _plan(listing.images, rows, stages, settings, provenance, environment)
    report("choice", name="threads", value=threads.value, reason=f"{threads.reason}; {decode_threads} decode")
    pictures = Pictures(listing.images, sizes, rules, backbone.preprocessing)
    return Job(pictures, backbone, plan, pooling(config.pool), threads.value, decode_threads)


def dry_run(config: ExtractConfig, report: Report = silent) -> Plan:
    """Say what `extract` would do, with stages, shapes and bytes. Loads no weights and writes nothing."""
    listing, source, positions, _ = _resolve(config, report)
    stages = _stored_stages(config, source, positions)
    sizes = _sizes(source, listing.images, config.decoding(), config.decode_threads or available_cores(), report)
    existing = None if config.overwrite else Dump.existing(Path(config.output))
    for name, value in (("precision", config.precision), ("layout", config.layout), ("batch_size", config.batch_size)):
        reason = "a run of many images measures" if value == AUTO else reason_for(name, value)
        report("choice", name=name.replace("_", " "), value=value, reason=reason)
    if config.batch_size == AUTO and existing is None:
        report("warning", text=f"batches of {DEFAULT_BATCH_SIZE} are assumed: only a run measures")
    rows = _shard_rows(config, _batch_size(config, existing), stages, sizes, len(listing.images), existing)
    plan = _plan(listing.images, rows, stages, {}, {}, {})
    is_same = existing is not None and _seems_same(existing.plan, plan)
    todo = existing.unfinished() if existing is not None and is_same else list(range(plan.num_shards))
    _report_existing(config, existing, plan.num_shards - len(todo) if is_same else None, report)
    total = sum(sizes.stored_bytes(plan.stages, plan.shard(number)) for number in todo)
    free = shutil.disk_usage(existing_parent(Path(config.output))).free
    if total > free:
        report("warning", text=f"{size(total)} needed, {size(free)} free: it would be refused")
    report(
        "dry_run",
        stages=plan.to_json()["stages"],
        images=sum(len(plan.shard(number)) for number in todo),
        shards=len(todo),
        bytes=total,
        free_bytes=free,
    )
    return plan


def _resolve(
    config: ExtractConfig, report: Report
) -> tuple[inputs.Listing, Source, tuple[int, ...], Resolved[torch.device]]:
    """What is cheap to find out, before any weight is read."""
    if not config.checkpoint or not config.output:
        raise UsageError("checkpoint and output are needed", "give -c/--checkpoint and -o/--output")
    check_target(Path(config.output), config.overwrite)
    device = resolve_device(config.device)
    listing = inputs.find(config.given())
    source = resolve(config.request())
    positions = source.select(config.out_features, config.out_indices)
    if config.fit == NATIVE:
        source.refuse_other_sizes(positions)
    if pooling(config.pool).of_class_token and source.build(positions, "meta").class_tokens is None:
        raise UsageError(f"--pool cls: {source.name} gives no class token", "use --pool avg for one vector per image")
    report("choice", name="checkpoint", value=f"{source.name} ({source.library})")
    names = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in (source.stages[i] for i in positions))
    default = config.out_features is None and config.out_indices is None
    reason = _stages_reason(source, positions) if default else "as asked"
    report("choice", name="stages", value=names, reason=reason)
    report("choice", name="norm", value=source.norm, reason=source.norm_reason)
    report("choice", name="device", value=str(device.value), reason=device.reason)
    linked = listing.ignored.pop(inputs.LINKED, 0)
    passed_over = sum(listing.ignored.values())
    notes = [f"{counted(passed_over, 'other file')} passed over"] if passed_over else []
    notes += [f"{counted(linked, 'linked folder')} not looked into: --follow-links would"] if linked else []
    notes += [f"{counted(listing.repeated, 'name')} listed again"] if listing.repeated else []
    report("choice", name="images", value=f"{len(listing.images):,}", reason="; ".join(notes))
    return listing, source, positions, device


def _stages_reason(source: Source, positions: Sequence[int]) -> str:
    if tuple(positions) == (len(source.stage_names) - 1,):
        return "default: the last"
    return "those the model uses" if source.inside else "those its configuration names"


def _report_trials(report: Report) -> None:
    report("choice", name="trying", value="ways to run the network", reason="for as long as about 100 images take")


def _report_tuning(device: torch.device, execution: Execution, tuning: Tuning, report: Report) -> None:
    reasons = tuning.reasons
    report("choice", name="precision", value=execution.precision, reason=reasons["precision"])
    report("choice", name="layout", value=named(execution), reason=reasons["layout"])
    if device.type == "cpu" and execution.precision == "fp16":
        report("warning", text="fp16 is slow on most CPUs; bf16 is what newer ones are built for")
    if execution.compiled:
        report("choice", name="compile", value="yes", reason="as asked; takes its time before the first batch")
    report("choice", name="batch size", value=tuning.batch_size, reason=reasons["batch_size"])


def _threads(config: ExtractConfig, begun: Mapping[str, Any] | None) -> Resolved[int]:
    """Threads of the forward pass. They can move the last bits, so a dump keeps those it was begun with."""
    if config.threads is not None:
        return Resolved(config.threads, "as asked")
    if begun is not None:
        return Resolved(begun["threads"], AS_BEGUN)
    cores = available_cores()
    if torch.get_num_threads() > cores:  # torch does not know of quotas
        return Resolved(cores, "auto: the cores that may be used")
    return Resolved(torch.get_num_threads(), "auto: torch's own choice")


def _batch_size(config: ExtractConfig, existing: Dump | None) -> int:
    """What a dry run goes by, which measures nothing."""
    if config.batch_size != AUTO:
        return int(config.batch_size)
    return DEFAULT_BATCH_SIZE if existing is None else int(existing.plan.settings["batch_size"])


def _stored_stages(config: ExtractConfig, source: Source, positions: Sequence[int]) -> tuple[StoredStage, ...]:
    stored = pooling(config.pool).shape
    stages = [source.stages[i] for i in positions]
    for stage in stages if config.fit != NATIVE else ():
        if any((edge or 0) > own for edge, own in zip(stored(stage.shape), stage.shape, strict=False)):
            raise UsageError(
                f"--pool {config.pool}: the maps of {stage.name} have {stage.shape[1]}x{stage.shape[2]} cells only",
                "use a smaller grid, or --pool none",
            )
    shapes = [(s.channels, None, None) if config.fit == NATIVE else s.shape for s in stages]
    return tuple(
        StoredStage(s.name, s.index, s.module, s.stride, shape, stored(shape), config.dtype)
        for s, shape in zip(stages, shapes, strict=True)
    )


def _sizes(source: Source, images: ImageList, rules: Decoding, threads: int, report: Report) -> Sizes:
    if source.fitting is None or not source.fitting.is_native:
        return Sizes(source.input_size)
    with memory_errors("the headers of the images do", torch.device("cpu")):
        sizes = native_sizes(images, rules, source.fitting, source.input_size, threads)
    report("choice", name="sizes", value=sizes.summary, reason="each picture's own, from its header")
    return sizes


def _settings(
    config: ExtractConfig, backbone: Backbone, rules: Decoding, threads: int, batch_size: int
) -> dict[str, Any]:
    """All that can change a byte of the result, besides stages and images."""
    return {
        "backbone": dict(backbone.settings),
        "weights_digest": backbone.digest,
        "preprocessing": {**backbone.preprocessing.settings, **rules.settings},
        **backbone.execution.settings,
        "batch_size": batch_size,
        "threads": threads,
        "pool": config.pool,
        "format": config.format,
    }


def _plan(
    images: ImageList,
    shard_rows: int,
    stages: tuple[StoredStage, ...],
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Plan:
    return Plan(
        settings=settings,
        stages=stages,
        num_images=len(images),
        keys_digest=digest_keys(images.keys),
        images_digest=digest_images(images),
        shard_rows=shard_rows,
        provenance=provenance,
        environment=environment,
    )


def _shard_rows(
    config: ExtractConfig,
    batch_size: int,
    stages: Sequence[StoredStage],
    sizes: Sizes,
    num_images: int,
    existing: Dump | None,
) -> int:
    if sizes.own is not None and existing is not None and config.shard_size is None:
        return existing.plan.shard_rows  # an average, which one repaired picture can move
    return shard_rows(config.shard_size, batch_size, sizes.stored_bytes(stages, range(num_images)) // num_images)


def shard_rows(asked: int | None, batch_size: int, bytes_per_image: int) -> int:
    """Images per shard: as asked, or about SHARD_BYTES; always whole batches, so that batches do not span shards."""
    wanted = asked or min(SHARD_BYTES // max(1, bytes_per_image), MAX_SHARD_ROWS)
    num_batches = max(1, -(-wanted // batch_size) if asked else wanted // batch_size)
    return min(num_batches, max(1, MOST // batch_size)) * batch_size


def _environment(device: torch.device, library: str) -> dict[str, str]:
    """What can move the last bits of a result and cannot be repeated at will."""
    import h5py
    import PIL
    import timm

    return {
        "featcli": featcli.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        **plugin_versions(),
        **({"transformers": sys.modules["transformers"].__version__} if library == "transformers" else {}),
        **({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _report_existing(config: ExtractConfig, existing: Dump | None, done: int | None, report: Report) -> None:
    """What is there where a dry run would write; `done` shards of it, None where it is of other work."""
    if config.overwrite and Path(config.output).exists():
        report("warning", text=f"{shown(config.output)}: the dump that is there would be deleted")
    if existing is None:
        return
    count = len(existing.numbered(".json")) if done is None else done
    there = f"{shown(config.output)} is a dump with {count:,} of {existing.plan.num_shards:,} shards"
    if done is None:
        report("warning", text=f"{there}, of other stages or images: it would be refused")
    else:
        report("warning", text=f"{there}: it would be gone on with, if weights and settings are the same")


def _seems_same(one: Plan, other: Plan) -> bool:
    """Whether two plans are of the same work, so far as that is known without weights."""
    return (one.stages, one.keys_digest, one.shard_rows) == (other.stages, other.keys_digest, other.shard_rows)
