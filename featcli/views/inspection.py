"""Collect what `featcli inspect` shows: the stages of a checkpoint before anything runs, or the state of a dump."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcli.dump.checksummed_json import read_checksummed
from featcli.dump.columns import COLUMNS
from featcli.dump.folder import FAILURES, IMAGES, MANIFEST, SHARDS, Dump
from featcli.dump.foreign import foreign_files
from featcli.dump.formats.layout import ITEM_BYTES
from featcli.dump.generations import all_generations, begun_generation
from featcli.dump.lock import is_in_use
from featcli.dump.records import pictures_of, said_of_pictures, totals_of
from featcli.errors import CheckpointError, IncompleteError, UsageError, most_first, shown
from featcli.inputs.image_list import SUFFIXES
from featcli.spec.groups import CheckpointSpec, StageSpec
from featcli.spec.words import DEFAULT_DTYPE, Dtype
from featcli.system.files import is_file, is_folder, is_there, names_in

MOST_FOLDERS = 100  # folders that are looked into, inside a folder that is no dump


def inspect_checkpoint(checkpoint: CheckpointSpec, stages: StageSpec, dtype: Dtype = DEFAULT_DTYPE) -> dict[str, Any]:
    """Return the stages, which of them are selected, their size, and their share of the computation. Reads no weights.

    Raises UsageError and CheckpointError.
    """
    from featcli.backbones.checkpoint import resolve

    with _neither(checkpoint.checkpoint_name):
        model = resolve(checkpoint)
    chosen = model.choose(stages.features, stages.indices)
    model.refuse_idle_arguments()
    model.refuse_idle_norm(chosen.positions)
    try:
        found = model.preprocessing()
        preprocessing = {"summary": found.summary, "origin": found.origin, "settings": dict(found.settings)}
    except (CheckpointError, UsageError) as error:  # the stages can be shown without it; extract will refuse
        preprocessing = {"summary": f"none: {error.message}", "origin": "", "settings": {}}
    listed = [
        {
            "index": stage.index,
            "name": stage.name,
            "module": stage.module,
            "channels": stage.channels,
            "stride": list(stage.stride),
            "shape": list(stage.shape),
            "bytes_per_image": math.prod(stage.shape) * ITEM_BYTES[dtype],
            "selected": position in chosen.positions,
        }
        for position, stage in enumerate(model.stages)
    ]
    vectors = [
        {
            "name": vector.name,
            "module": vector.module,
            "shape": list(vector.shape),
            "remark": vector.remark,
            "bytes_per_image": math.prod(vector.shape) * ITEM_BYTES[dtype],
            "selected": vector.name in chosen.vectors,
        }
        for vector in model.vectors
    ]
    return {
        "type": "checkpoint",
        "name": model.name,
        "library": model.library,
        "inside": model.inside,
        "norm": model.norm,
        "num_channels": model.channels,
        "parameters": model.num_parameters,
        "input_size": list(model.input_size),
        "dtype": dtype,
        "stages": listed,
        "vectors": vectors,
        "bytes_per_image": sum(one["bytes_per_image"] for one in (*listed, *vectors) if one["selected"]),
        "share_computed": model.share(chosen),
        "preprocessing": preprocessing,
    }


@contextmanager
def _neither(name: str) -> Iterator[None]:
    """Say that a name is neither a dump nor a checkpoint, if the block finds that it is no checkpoint."""
    try:
        yield
    except (CheckpointError, UsageError) as error:
        path = Path(name)
        if _holds_pictures(path):
            what = "a folder of pictures" if is_folder(path) else "a picture"
            raise UsageError(
                f"{shown(name)}: this is {what}, neither a dump nor a checkpoint",
                "run featcli extract INPUT -c CHECKPOINT -o DUMP, which makes a dump of pictures",
            ) from error
        if not is_there(path) and error.message.startswith("checkpoint "):
            raise type(error)(f"there is no dump {shown(name)}, and no {error.message}", error.hint) from error
        raise


def _holds_pictures(path: Path) -> bool:
    """Return whether it is a picture, or a folder with pictures in it or one level below, by their suffixes."""
    if is_file(path):
        return path.suffix.lower() in SUFFIXES
    inside = [path / name for name in names_in(path)]
    below = (one / name for one in inside[:MOST_FOLDERS] if is_folder(one) for name in names_in(one))
    return any(one.suffix.lower() in SUFFIXES for one in (*inside, *below))


def inspect_dump(path: Path) -> dict[str, Any] | None:
    """Return the state of a dump: stages, rows, failures, and what is missing. Returns None if there is no dump.

    Raises DamagedError and MachineError.
    """
    dump = Dump.existing(path)
    if dump is None:
        if is_folder(path / SHARDS):
            raise IncompleteError(f"dump {shown(path)}: it has no plan.json yet", "run its extract command again")
        return None
    generations = all_generations(dump)
    dumps = generations.dumps
    begun = [(each, one) for each in dumps for one in each.unfinished_shards()]  # before records: one may be committed
    of_each = [list(each.records()) for each in dumps]
    records = [record for of_one in of_each for record in of_one]
    totals, pictures = totals_of(records), pictures_of(records)
    settings, there = dump.plan.settings, {(record["fingerprint"], record["shard"]) for record in records}
    unfinished = [one for each, one in begun if (each.plan.fingerprint, one["shard"]) not in there]
    num_shards, num_images = sum(one.plan.num_shards for one in dumps), sum(one.plan.num_images for one in dumps)
    both = zip(dumps, of_each, strict=True)
    damaged = [name for each, of_one in both for name in _below(dump, each, _damaged(each, of_one))]
    whole = len(records) == num_shards and generations.are_complete
    return {
        "type": "dump",
        "path": str(path),
        "state": "damaged" if damaged else "complete" if whole else "incomplete",
        "in_use": any(is_in_use(one.path) for one in dumps),
        "images": num_images,
        "written": totals["written"],
        "failed": totals["failed"],
        "failed_by_reason": most_first(totals["failed_by_reason"]),
        "pictures": pictures,
        "said_of_pictures": said_of_pictures(dump.plan, pictures),
        "shards": num_shards,
        "committed_shards": len(records),
        "unfinished_shards": unfinished,
        "safe": totals["images"] + sum(one["kept"] for one in unfinished),
        "damaged_files": damaged,
        "foreign_files": [
            vars(one) | {"file": _below(dump, each, [one.file])[0]} for each in dumps for one in foreign_files(each)
        ],
        "bytes": totals["bytes"],
        "format": settings.format,
        "checkpoint": dump.plan.provenance["checkpoint"],
        "weights": dump.plan.provenance["weights"],
        "pool": dump.plan.reductions,
        "fingerprint": dump.plan.fingerprint,
        "stages": [one.as_stage() for one in dump.plan.outputs if one.is_of_stage],
        "outputs": [one.to_json() for one in dump.plan.outputs],
        "columns": {name: kind for one in dumps if one.plan.columns for name, kind in one.plan.columns.kinds.items()},
        "generations": [_generation(*one) for one in zip(dumps, of_each, strict=True) if len(dumps) > 1],
        "begun": begun_generation(dump),
    }


def _generation(dump: Dump, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what one generation of a dump that grew holds."""
    number = 0 if dump.plan.extends is None else dump.plan.extends.generation
    totals = totals_of(records)
    return {"generation": number, **{name: totals[name] for name in ("images", "written", "failed", "bytes")}}


def _below(dump: Dump, generation: Dump, files: Sequence[str]) -> list[str]:
    """Return files of a generation with its folder below the dump."""
    if generation is dump:
        return list(files)
    return [str(generation.path.relative_to(dump.path) / file) for file in files]


def _damaged(dump: Dump, records: Sequence[Mapping[str, Any]]) -> list[str]:
    damaged = sorted(dump.committed(records).damaged)
    return [f"{SHARDS}/{dump.shard_path(number).name}" for number in damaged] + _damaged_files(dump)


def _damaged_files(dump: Dump) -> list[str]:
    """Return which files, other than shards, are missing or damaged. No shard is read."""
    wrong = [] if is_file(dump.path / IMAGES) else [IMAGES]
    wrong += [] if dump.plan.columns is None or is_file(dump.path / COLUMNS) else [COLUMNS]
    if dump.is_complete():
        wrong += [] if is_file(dump.path / FAILURES) else [FAILURES]
        try:
            is_ours = read_checksummed(dump.path / MANIFEST).get("fingerprint") == dump.plan.fingerprint
        except ValueError:
            is_ours = False
        wrong += [] if is_ours else [MANIFEST]
    return wrong
