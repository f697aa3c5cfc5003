"""Turn options into a job: find images, load the backbone, make every choice and say its reason. Writes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from featcli.backbones.backbone import Backbone
from featcli.backbones.folding import has_norms, nothing_to_fold
from featcli.backbones.model_spec import ModelSpec
from featcli.dump.folder import Dump
from featcli.dump.plan import (
    COUNTED,
    FORMAT_VERSION,
    IN_MEMORY,
    LABEL_LEVEL,
    Extends,
    Outline,
    Output,
    Plan,
    digest_images,
    digest_keys,
    refuse_other_plan,
)
from featcli.dump.target import check_target, existing_parent, try_to_write
from featcli.errors import ConflictError, DamagedError, UsageError, counted, shown, size
from featcli.events import Choice, Report, silent
from featcli.extraction.columns_again import as_known, planned_columns
from featcli.extraction.sharding import Rows, choose_shard_rows, sharers_of, too_few
from featcli.inputs.columns import ListedColumns
from featcli.inputs.folders import LINKED
from featcli.inputs.image_list import ImageList
from featcli.inputs.listing import Listing, find, kinds_of
from featcli.pixels import extras
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.batches import SizedImages
from featcli.pixels.colour import summary_of
from featcli.pixels.memory import refuse_bands
from featcli.pixels.sizes import Sizes, native_sizes
from featcli.pixels.traits import TRAITS
from featcli.run.loading import (
    THREADS_OF_INTERPRETER,
    Selection,
    Setup,
    decode_threads_of,
    load_selected,
    num_workers,
    select,
    threads_of,
)
from featcli.run.tuning import expected
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import PixelSpec
from featcli.spec.option import narrowed
from featcli.spec.words import AUTO, DEFAULT_BATCH_SIZE
from featcli.system.device import device_names, memory_errors, resolve_device
from featcli.system.files import is_there
from featcli.system.scheduler import local_rank, part_of

POOLED = ("avg", "cls", "cls+avg")  # models make these of their last maps


@dataclass(frozen=True)
class Job:
    """All that a run needs. Every choice is made, so nothing is guessed afterwards."""

    listing: Listing
    pictures: SizedImages
    plan: Plan
    shard_rows: Choice[int]
    columns: ListedColumns | None  # of the images, if the plan has columns

    @property
    def images(self) -> ImageList:
        """The images in row order."""
        return self.listing.images


@dataclass(frozen=True)
class Extension:
    """A generation that a run makes of a dump that is there."""

    root: Dump
    extends: Extends

    def refuse_other_settings(self, plan: Plan) -> None:
        """Raise ConflictError if the generation would differ in what all rows of a dump have in common.

        The number of threads, the batch size and the shard size may differ.
        """
        before = self.root.plan
        alike = replace(
            plan,
            settings=replace(plan.settings, threads=before.settings.threads, batch_size=before.settings.batch_size),
            num_images=before.num_images,
            keys_digest=before.keys_digest,
            shard_rows=before.shard_rows,
            extends=None,
        )
        refuse_other_plan(shown(self.root.path), before, alike, is_extended=True)


def prepare(
    asked: ExtractSpec,
    existing: Dump | None,
    report: Report = silent,
    listing: Listing | None = None,
    loaded: Backbone | None = None,
    extension: Extension | None = None,
) -> tuple[Job, Setup]:
    """Find the images, load the backbone, and make the plan. Writes nothing. Raises FeatcliError.

    `existing` is the dump that is resumed; choices that are open are made as they were for it. `listing` are the
    images, if they were found before, because stdin can be read only once. `loaded` is a backbone of the same
    checkpoint, which is taken if it is what the run needs. `extension` says which generation of which dump the plan is
    of; choices that are open are made as they were for that dump.
    """
    model_dump = existing if extension is None else extension.root  # whose choices are taken
    listing, selection = _resolve(asked, model_dump, report, listing, is_real=True, is_extension=extension is not None)
    begun = None if model_dump is None else model_dump.plan
    loading = load_selected(asked, selection, len(listing.images), begun, report, loaded)
    backbone, model = loading.backbone, selection.model
    if asked.fold and not backbone.execution.folded:
        raise nothing_to_fold(model.name)
    weights = backbone.weights
    report("choice", name="weights", value=weights.summary(), loaded=weights.matched, tensors=weights.total)
    is_by_torch = asked.decode == "fast" and backbone.preprocessing.fast is not None
    value = backbone.preprocessing.summary + (", resized by torch" if is_by_torch else "")
    report("choice", name="preprocessing", value=value, reason=backbone.preprocessing.origin)
    share = round(model.share(selection.points), 4)
    report("choice", name="computes", value=f"{share:.0%} of the model", reason="up to the deepest stage", share=share)
    rules, decode_threads, processes = loading.decoder.rules, loading.decoder.threads, loading.decoder.processes
    report("choice", name="pictures", value=summary_of(rules), reason="default" if rules == PixelSpec() else "as asked")
    sizes = _sizes(model, listing.images, rules, decode_threads, report)
    threads, outputs, batch_size = loading.threads, selection.outputs, loading.settings.batch_size
    sharers = sharers_of(asked, threads.value, selection.device.value)
    rows = Rows(listing.images, sizes, outputs)
    shard_rows = choose_shard_rows(asked, begun, rows, batch_size, sharers, extension is not None)
    keys_digest = digest_keys(listing.images.keys)
    of_dump = existing if existing is not None and existing.plan.keys_digest == keys_digest else None
    label_level = _label_level(asked, model_dump)
    planned, columns = planned_columns(of_dump, as_known(model_dump, listing.columns(label_level)))
    plan = Plan(
        settings=loading.settings,
        outputs=outputs,
        num_images=len(listing.images),
        keys_digest=keys_digest,
        images_digest=digest_images(listing.images),
        shard_rows=shard_rows.value,
        provenance=_provenance(label_level, listing, selection, backbone),
        environment=loading.environment,
        columns=planned,
        extends=extension.extends if extension is not None else None if begun is None else begun.extends,
        format_version=FORMAT_VERSION if begun is None else begun.format_version,
    )
    if extension is not None:
        extension.refuse_other_settings(plan)
    reason = f"{threads.reason}; {counted(decode_threads, 'thread')} decode" + _said_of_processes(asked, processes)
    facts = {"decode_threads": decode_threads, "decode_processes": processes}
    report("choice", name="threads", value=threads.value, reason=reason, **facts)
    _report_stored(asked, plan, sizes, report)
    return Job(listing, SizedImages(listing.images, sizes), plan, shard_rows, columns), loading.setup(asked, plan)


def _said_of_processes(asked: ExtractSpec, processes: int) -> str:
    if not processes:
        return ""
    why = f" (auto: more than {THREADS_OF_INTERPRETER} in one would wait for each other)"
    return f", in {processes} {'process' if processes == 1 else 'processes'}" + why * (asked.decode_processes == AUTO)


def _provenance(label_level: int | None, listing: Listing, selection: Selection, backbone: Backbone) -> dict[str, Any]:
    """Return the names for people, and what follows from the rest of the plan. See docs/format.md."""
    model = selection.model
    provenance: dict[str, Any] = {
        "checkpoint": backbone.name,
        "weights": backbone.weights.summary(),
        "weights_files": dict(backbone.weights.files),
        "preprocessing": backbone.preprocessing.origin,
        "leads": listing.leads,
        COUNTED: list(TRAITS),
    }
    if listing.images.are_in_memory:
        provenance[IN_MEMORY] = True
    if label_level is not None:
        provenance[LABEL_LEVEL] = label_level
    if model.licence:
        provenance["licence"] = model.licence
    if "logits" in selection.points.vectors and (names := model.class_names()):
        provenance["class_names"] = list(names)
    return provenance


def dry_run(
    asked: ExtractSpec,
    report: Report = silent,
    rate: float | None = None,
    listing: Listing | None = None,
    extension: Extension | None = None,
) -> Outline:
    """Say what `extract` would do, with stages, shapes and bytes. Loads no weights and writes nothing.

    `rate` is the images per second of one worker, to tell how long it would take. `listing` and `extension` are as for
    `prepare`. Raises FeatcliError.
    """
    existing = None if asked.overwrite else Dump.existing(asked.dump_path)
    model_dump = existing if extension is None else extension.root
    listing, selection = _resolve(asked, model_dump, report, listing, is_extension=extension is not None)
    outputs = selection.outputs
    sizes = _sizes(selection.model, listing.images, narrowed(asked, PixelSpec), decode_threads_of(asked), report)
    begun = None if model_dump is None else model_dump.plan
    settings = None if begun is None else begun.settings
    device = selection.device.value.type
    choices = expected(asked, selection.model, selection.points, device, len(listing.images), settings)
    for name, choice in choices.items():
        report("choice", name=name, value=choice.value, reason=choice.reason)
    if choices["batch size"].value == AUTO and existing is None:
        report("warning", text=f"this assumes batches of {DEFAULT_BATCH_SIZE}: only a run measures the fastest")
    batch_size = _batch_size(asked, existing)
    sharers = sharers_of(asked, threads_of(asked, settings).value, selection.device.value)
    rows = Rows(listing.images, sizes, outputs)
    shard_rows = choose_shard_rows(asked, begun, rows, batch_size, sharers, extension is not None)
    plan = Outline(
        outputs=outputs,
        num_images=len(listing.images),
        keys_digest=digest_keys(listing.images.keys),
        shard_rows=shard_rows.value,
    )
    is_same = existing is not None and _seems_same(existing.plan, plan)
    todo = list(range(plan.num_shards))
    if existing is not None and is_same:
        found = existing.found
        todo = sorted({*found.missing, *(found.failed if asked.retry_failed else ())})
        refuse_without_extras(existing, listing.images, bool(todo))
    if extension is None:
        _report_existing(asked, existing, plan.num_shards - len(todo) if is_same else None, report)
    else:
        otherwise = f"{shown(extension.root.path)} would be extended, if weights and settings are the same"
        report("warning", text=refusal_of(extension.root, outputs) or otherwise)
    part = part_of(asked.part)
    if part is not None:
        todo = part.of(todo)
        report("choice", name="part", value=str(part), reason=part.reason, index=part.index, count=part.count)
    shards = f"{counted(plan.num_shards, 'shard')} of up to {plan.shard_rows:,} images"
    facts = {"shards": plan.num_shards, "shard_rows": plan.shard_rows}
    report("choice", name="shards", value=shards, reason=shard_rows.reason, **facts)
    _report_stored(asked, plan, sizes, report)
    if (few := too_few(plan, batch_size, sharers)) and (todo or part is not None):
        report("warning", text=few)
    _report_dry_run(asked, plan, todo, sizes, rate, report)
    return plan


def _report_dry_run(
    asked: ExtractSpec, plan: Outline, todo: Sequence[int], sizes: Sizes, rate: float | None, report: Report
) -> None:
    """Say what these shards would hold and take."""
    total = sum(plan.shard_bytes(number, sizes) for number in todo)
    free = shutil.disk_usage(existing_parent(asked.dump_path)).free
    if total > free:
        report("warning", text=f"the run would be refused: it needs {size(total)}, and {size(free)} are free")
    images = sum(len(plan.shard(number)) for number in todo)
    workers = asked.workers or num_workers(asked)
    report(
        "dry_run",
        stages=[one.as_stage() for one in plan.outputs if one.is_of_stage],
        outputs=[one.to_json() for one in plan.outputs],
        images=images,
        shards=len(todo),
        bytes=total,
        free_bytes=free,
        workers=workers,
        # Shards are not divided: several workers make one shard, or the last of an odd number, no faster than one does.
        seconds=None if rate is None else round(min(images, -(-len(todo) // workers) * plan.shard_rows) / rate, 3),
    )


def _resolve(
    asked: ExtractSpec,
    existing: Dump | None,
    report: Report,
    listing: Listing | None = None,
    is_real: bool = False,
    is_extension: bool = False,
) -> tuple[Listing, Selection]:
    """Find out what is cheap, before any weight is read. `is_real` says that something will be written.

    `is_extension` says that the images are not those of `existing`. Raises UsageError for options that have no effect
    with this model.
    """
    if existing is None or is_extension:  # else the dump says what it needs
        extras.refuse_without_fast(asked.decode)
    check_target(asked.dump_path, asked.overwrite)
    if is_real:
        try_to_write(asked.dump_path)
    rank = local_rank() if asked.part == AUTO else None
    devices = [resolve_device(name, rank) for name in device_names(asked.device)]
    listing = with_keys_of(None if is_extension else existing, listing or find(asked))
    selection = select(asked, devices[0])
    if listing.images.are_in_memory and selection.model.channels in OF_COLOURS:
        refuse_bands(listing.images)
    _refuse_idle_fast(asked, listing, selection.model)
    if existing is not None:
        selection = selection.worded_as(existing.plan)
    model, positions = selection.model, selection.points.positions
    # Older versions refused less, and whoever began such a dump may resume it.
    if existing is None or existing.plan.settings.norm != model.norm:
        model.refuse_idle_norm(positions)
    if asked.model_arg and (existing is None or not model.is_of(existing.plan.settings.backbone)):
        model.refuse_idle_arguments()
    if asked.fold and not has_norms(model.build(selection.points, "meta")):
        raise nothing_to_fold(model.name)
    report("choice", name="checkpoint", value=f"{model.name} ({model.library})")
    chosen: list[dict[str, Any]] = [
        {"name": s.name, "shape": list(s.shape)} for s in (model.stages[i] for i in positions)
    ]
    chosen += [{"name": o.name, "shape": list(o.shape)} for o in selection.outputs if not o.is_of_stage]
    default = asked.out_features is None and asked.out_indices is None
    reason = _stages_reason(model, positions) if default else "as asked"
    report("choice", name="stages", value=chosen, reason=reason)
    report("choice", name="norm", value=model.norm, reason=model.norm_reason)
    names = [str(device.value) for device in devices]
    reason = devices[0].reason + (": a process for each" if len(devices) > 1 else "")
    report("choice", name="device", value=", ".join(names), reason=reason, devices=names)
    _report_vectors(asked, selection, report)
    _report_images(listing, report)
    _report_columns(asked, existing, listing, report)
    for text in listing.remarks:
        report("warning", text=text)
    for text in () if listing.images.are_in_memory else extras.missing(listing.images.keys, extras.versions()):
        report("warning", text=text)
    return listing, selection


def _refuse_idle_fast(asked: ExtractSpec, listing: Listing, model: ModelSpec) -> None:
    """Raise UsageError for --decode fast if pictures are in memory, in no JPEG, and torch resizes none of them."""
    if asked.decode == "fast" and listing.images.are_in_memory and model.preprocessing().fast is None:
        raise UsageError(
            "--decode fast changes nothing for these pictures in memory: they are in no JPEG, and torch does not resize"
            " them as this checkpoint, its filter or its --fit asks",
            "leave it out",
        )


def refuse_without_extras(dump: Dump, images: ImageList, is_to_be_read: bool) -> None:
    """Raise ConflictError if images will be read, and packages are missing with which the dump has read images."""
    if is_to_be_read and not images.are_in_memory:
        extras.refuse_without(dump.packages, images.keys, extras.versions(), str(dump.path))


def _report_vectors(asked: ExtractSpec, selection: Selection, report: Report) -> None:
    """Say if vectors are made from maps before the norm that the model itself applies before it pools."""
    model, last = selection.model, selection.model.stage_names[-1][0]
    pooled = [one.reduction for one in selection.outputs if one.point == last and one.reduction in POOLED]
    if asked.norm is not None or not pooled:
        return
    norms = model.norms_before_pooling(of_class_token=any(one != "avg" for one in pooled))
    if norms:
        has_embedding = "embedding" in selection.points.vectors
        ways = ["--out-features embedding gives its own vector"] if _has_embedding(model) and not has_embedding else []
        ways += ["--norm model gives maps after it"] if model.can_apply(norms) else []
        text = f"{last} is pooled before the model's final norm, and {model.name} itself pools after it"
        otherwise = "its embedding is chosen, too" if has_embedding else "no option gives maps after it"
        report("warning", text=f"{text}: {', '.join(ways) or otherwise}")


def _report_images(listing: Listing, report: Report) -> None:
    """Say how many images there are, and what was left out."""
    linked = listing.ignored.pop(LINKED, 0)
    skipped = sum(listing.ignored.values())
    notes = [f"{counted(skipped, 'other file')} skipped: {kinds_of(listing.ignored)}"] if skipped else []
    notes += [f"{counted(linked, 'linked folder')} not looked into: --follow-links would"] if linked else []
    notes += [f"{counted(listing.repeated, 'name')} listed again"] if listing.repeated else []
    notes += [f"{listing.excluded:,} excluded"] if listing.excluded else []
    notes += [f"the first of {listing.total:,}"] if listing.total > len(listing.images) else []
    missing = listing.images.num_missing
    notes += [f"{counted(missing, 'file')} not there"] if missing else []
    facts = {"skipped": skipped, "linked_folders": linked, "repeated": listing.repeated, "excluded": listing.excluded}
    facts["missing"] = missing
    report("choice", name="images", value=len(listing.images), reason="; ".join(notes), **facts)


def _report_columns(asked: ExtractSpec, existing: Dump | None, listing: Listing, report: Report) -> None:
    """Say which columns come with the images. Raises ConflictError for another level of labels than that of a dump."""
    level = asked.label_level or 1
    if existing is not None and asked.label_level is not None and level != existing.plan.label_level:
        raise ConflictError(
            f"dump {shown(existing.path)}: it was made with --label-level {existing.plan.label_level}",
            "leave --label-level out, or use another -o",
        )
    columns = listing.columns(_label_level(asked, existing))
    if columns is not None:
        value = ", ".join(f"{name} ({kind})" for name, kind in columns.kinds.items())
        report("choice", name="columns", value=value, reason=columns.origin, kinds=dict(columns.kinds))


def _label_level(asked: ExtractSpec, existing: Dump | None) -> int | None:
    """Return the level of labels that was asked for, now or when the dump was made; None for the default."""
    if asked.label_level is not None or existing is None:
        return asked.label_level
    level: int | None = existing.plan.provenance.get(LABEL_LEVEL)
    return level


def _has_embedding(model: ModelSpec) -> bool:
    return any(vector.name == "embedding" for vector in model.vectors)


def with_keys_of(existing: Dump | None, listing: Listing) -> Listing:
    """Return the listing in the order of a dump, if these are its images, in whatever order they were found.

    An older dump, whose plan names no leads, may have other keys for them.
    """
    if existing is None or digest_keys(listing.images.keys) == existing.plan.keys_digest:
        return listing
    found = [listing.images, *([listing.older()] if existing.plan.leads is None else [])]
    ordered = (_in_order_of(existing, images) for images in found if images is not None)
    same = next((images for images in ordered if images is not None), None)
    return listing if same is None else replace(listing, images=same)


def _in_order_of(existing: Dump, images: ImageList) -> ImageList | None:
    """Return the images in the order of a dump; None if its images are others."""
    if len(images) != existing.plan.num_images:
        return None
    try:
        return images.in_order_of(existing.packed_keys())
    except DamagedError:  # a run may write the list anew, if it finds the order without it
        by_key = images.sorted()
        found = [one for one in (images, by_key) if digest_keys(one.keys) == existing.plan.keys_digest]
        return next(iter(found), None)


def _stages_reason(model: ModelSpec, positions: Sequence[int]) -> str:
    if tuple(positions) == (len(model.stage_names) - 1,):
        return "default: the last"
    return "those the model uses" if model.inside else "those its configuration names"


def _batch_size(asked: ExtractSpec, existing: Dump | None) -> int:
    """Return the batch size that a dry run counts with; it measures nothing."""
    if isinstance(asked.batch_size, int):
        return asked.batch_size
    return DEFAULT_BATCH_SIZE if existing is None else existing.plan.settings.batch_size


def _sizes(model: ModelSpec, images: ImageList, rules: PixelSpec, threads: int, report: Report) -> Sizes:
    if model.resize_mode is None or not model.resize_mode.is_native:
        return Sizes(model.input_size)
    with memory_errors("the headers of the images do", torch.device("cpu")):
        sizes = native_sizes(images, rules, model.resize_mode, model.input_size, threads, model.channels)
    report("choice", name="sizes", value=sizes.summary, reason="each picture's own, from its header")
    return sizes


def _report_stored(asked: ExtractSpec, plan: Outline, sizes: Sizes, report: Report) -> None:
    """Say what the dump will hold of each image, and how many bytes that is."""
    total = sum(plan.shard_bytes(number, sizes) for number in range(plan.num_shards))
    each = total / plan.num_images
    is_ragged = any(one.is_ragged for one in plan.outputs)
    reductions = dict.fromkeys(one.reduction for one in plan.outputs if one.is_of_stage)
    what = ["whole maps" if name == "none" else name for name in reductions]
    what += [one.name for one in plan.outputs if not one.is_of_stage]
    value = f"{', '.join(what)}, {asked.dtype}, {asked.format}"
    reason = f"{size(each)} an image{' on average' if is_ragged else ''}, {size(total)} in all"
    facts = {"pool": plan.reductions, "dtype": asked.dtype, "format": asked.format}
    report("choice", name="stored", value=value, reason=reason, **facts, bytes=total, bytes_per_image=round(each, 3))


def _report_existing(asked: ExtractSpec, existing: Dump | None, done: int | None, report: Report) -> None:
    """Say what a dry run finds in the folder: `done` committed shards, or None for a dump of other work."""
    if asked.overwrite and is_there(asked.dump_path):
        report("warning", text=f"{shown(asked.output)}: the dump that is there would be deleted")
    if existing is None:
        return
    count = len(existing.numbered(".json")) if done is None else done
    there = f"{shown(asked.output)} is a dump with {count:,} of {existing.plan.num_shards:,} shards"
    if done is None:
        report("warning", text=f"{there}, of other stages or images: it would be refused")
    else:
        report("warning", text=f"{there}: it would be resumed, if weights and settings are the same")


def refusal_of(root: Dump, outputs: Sequence[Output]) -> str:
    """Say that a dump cannot get a generation with these outputs; "" if weights and settings decide that."""
    is_same = outputs == root.plan.outputs
    return "" if is_same else f"{shown(root.path)} is a dump of other stages: --extend would be refused"


def _seems_same(one: Outline, other: Outline) -> bool:
    """Return whether two plans are of the same work, as far as it is known without weights."""
    return (one.outputs, one.keys_digest, one.shard_rows) == (other.outputs, other.keys_digest, other.shard_rows)
