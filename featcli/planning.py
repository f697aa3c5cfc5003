"""Options -> a job: images found, backbone loaded, every choice made and said with its reason. Writes nothing."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featcli
from featcli import inputs
from featcli.backbones import resolve
from featcli.backbones.backbone import Backbone
from featcli.backbones.source import Source, ready
from featcli.config import MAX_SHARD_ROWS, SHARD_BYTES, ExtractConfig
from featcli.device import Resolved, available_cores, memory_errors, resolve_device
from featcli.dump import Dump
from featcli.errors import UsageError, shown
from featcli.images import RULES
from featcli.inputs import ImageList
from featcli.plan import Plan, StoredStage, digest_images, digest_keys, image_bytes
from featcli.pooling import Pooling, pooling
from featcli.progress import Report, silent
from featcli.target import check_target, existing_parent


@dataclass(frozen=True)
class Job:
    """All that a run needs, resolved: nothing is guessed after this."""

    images: ImageList
    backbone: Backbone
    plan: Plan
    pooling: Pooling
    threads: int
    decode_threads: int


def prepare(config: ExtractConfig, report: Report = silent) -> Job:
    """Find the images, load the backbone, make the plan. Writes nothing. Raises FeatcliError."""
    existing = None if config.overwrite else Dump.existing(Path(config.output))
    listing, source, positions, device = _resolve(config, report)
    stages = _stored_stages(config, source, positions)
    with memory_errors(device.value, config.batch_size):
        backbone = ready(source, positions, device.value, config.precision)
    threads = _threads(config, existing)
    report("choice", name="weights", value=backbone.weights.summary())
    report("choice", name="preprocessing", value=backbone.preprocessing.summary, reason=backbone.preprocessing.origin)
    report("choice", name="computes", value=f"{backbone.share:.0%} of the model", reason="up to the deepest stage")
    settings = _settings(config, backbone, threads.value)
    provenance = {
        "checkpoint": backbone.name,
        "weights": backbone.weights.summary(),
        "weights_files": dict(backbone.weights.files),
        "preprocessing": backbone.preprocessing.origin,
    }
    plan = _plan(config, listing.images, stages, settings, provenance, _environment(device.value, source.library))
    decode_threads = config.decode_threads or available_cores()
    report("choice", name="threads", value=threads.value, reason=f"{threads.reason}; {decode_threads} decode")
    return Job(listing.images, backbone, plan, pooling(config.pool), threads.value, decode_threads)


def dry_run(config: ExtractConfig, report: Report = silent) -> Plan:
    """Say what `extract` would do, with stages, shapes and bytes. Loads no weights and writes nothing."""
    listing, source, positions, _ = _resolve(config, report)
    stages = _stored_stages(config, source, positions)
    plan = _plan(config, listing.images, stages, {}, {}, {})
    total = image_bytes(plan.stages) * plan.num_images
    free = shutil.disk_usage(existing_parent(Path(config.output))).free
    _report_existing(config, plan, report)
    report(
        "dry_run",
        stages=plan.to_json()["stages"],
        images=plan.num_images,
        shards=plan.num_shards,
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
    listing = inputs.find(config.inputs, config.files_from, config.null, config.root)
    source = resolve(config.request())
    positions = source.select(config.out_features, config.out_indices)
    if pooling(config.pool).of_class_token and source.build(positions, "meta").class_tokens is None:
        raise UsageError(f"--pool cls: {source.name} gives no class token", "use --pool avg for one vector per image")
    report("choice", name="checkpoint", value=f"{source.name} ({source.library})")
    names = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in (source.stages[i] for i in positions))
    default = config.out_features is None and config.out_indices is None
    reason = _stages_reason(source, positions) if default else "as asked"
    report("choice", name="stages", value=names, reason=reason)
    report("choice", name="norm", value=source.norm, reason=source.norm_reason)
    report("choice", name="device", value=str(device.value), reason=device.reason)
    report(
        "choice",
        name="precision",
        value=config.precision,
        reason="default" if config.precision == "fp32" else "as asked",
    )
    passed_over = sum(listing.ignored.values())
    notes = [f"{passed_over:,} other file{'s' * (passed_over > 1)} passed over"] if passed_over else []
    notes += [f"{listing.repeated:,} name{'s' * (listing.repeated > 1)} listed again"] if listing.repeated else []
    report("choice", name="images", value=f"{len(listing.images):,}", reason="; ".join(notes))
    return listing, source, positions, device


def _stages_reason(source: Source, positions: Sequence[int]) -> str:
    if tuple(positions) == (len(source.stage_names) - 1,):
        return "default: the last"
    return "those the model uses" if source.inside else "those its configuration names"


def _threads(config: ExtractConfig, existing: Dump | None) -> Resolved[int]:
    """Threads of the forward pass. They can move the last bits, so a dump keeps those it was begun with."""
    if config.threads is not None:
        return Resolved(config.threads, "as asked")
    if existing is not None and "threads" in existing.plan.settings:
        return Resolved(existing.plan.settings["threads"], "as this dump was begun")
    return Resolved(torch.get_num_threads(), "auto: torch's own choice")


def _stored_stages(config: ExtractConfig, source: Source, positions: Sequence[int]) -> tuple[StoredStage, ...]:
    shape = pooling(config.pool).shape
    return tuple(
        StoredStage(s.name, s.index, s.module, s.stride, s.shape, shape(s.shape), config.dtype)
        for s in (source.stages[i] for i in positions)
    )


def _settings(config: ExtractConfig, backbone: Backbone, threads: int) -> dict[str, Any]:
    """All that can change a byte of the result, besides stages and images."""
    return {
        "backbone": dict(backbone.settings),
        "weights_digest": backbone.digest,
        "preprocessing": {**backbone.preprocessing.settings, **RULES},
        "precision": config.precision,
        "batch_size": config.batch_size,
        "threads": threads,
        "pool": config.pool,
        "format": config.format,
    }


def _plan(
    config: ExtractConfig,
    images: ImageList,
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
        shard_rows=shard_rows(config, image_bytes(stages)),
        provenance=provenance,
        environment=environment,
    )


def shard_rows(config: ExtractConfig, bytes_per_image: int) -> int:
    """Images per shard: as asked, or about SHARD_BYTES; always whole batches, so that batches do not span shards."""
    wanted = config.shard_size or min(SHARD_BYTES // bytes_per_image, MAX_SHARD_ROWS)
    num_batches = max(1, -(-wanted // config.batch_size) if config.shard_size else wanted // config.batch_size)
    return num_batches * config.batch_size


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
        **({"transformers": sys.modules["transformers"].__version__} if library == "transformers" else {}),
        **({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _report_existing(config: ExtractConfig, plan: Plan, report: Report) -> None:
    """What is there where a dry run would write."""
    existing = Dump.existing(Path(config.output))
    if existing is None:
        return
    done = existing.plan.num_shards - len(existing.unfinished())
    there = f"{shown(config.output)} is a dump with {done:,} of {existing.plan.num_shards:,} shards"
    same = existing.plan.stages == plan.stages and existing.plan.keys_digest == plan.keys_digest
    if config.overwrite:
        report("warning", text=f"{there}: it would be deleted")
    elif same:
        report("warning", text=f"{there}: it would be gone on with, if weights and settings are the same")
    else:
        report("warning", text=f"{there}, of other stages or images: it would be refused")
