"""What `featcli inspect` shows: the stages of a checkpoint before anything is run, or the state of a dump."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcli.dump import Dump
from featcli.errors import CheckpointError, UsageError
from featcli.plan import row_bytes

if TYPE_CHECKING:
    from featcli.backbones import Request


def inspect_checkpoint(
    request: Request,
    *,
    out_features: Sequence[str] | None = None,
    out_indices: Sequence[int] | str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Stages, what would be selected, its size and its share of the computation. Reads no weights.

    Raises UsageError and CheckpointError.
    """
    from featcli.backbones import resolve

    source = resolve(request)
    chosen = source.select(out_features, out_indices)
    try:
        found = source.preprocessing()
        preprocessing = {"summary": found.summary, "origin": found.origin, "settings": dict(found.settings)}
    except (CheckpointError, UsageError) as error:  # the stages can be shown without; extract will refuse
        preprocessing = {"summary": f"none: {error.message}", "origin": "", "settings": {}}
    stages = [
        {
            "index": stage.index,
            "name": stage.name,
            "module": stage.module,
            "channels": stage.channels,
            "stride": list(stage.stride),
            "shape": list(stage.shape),
            "bytes_per_image": row_bytes(stage.shape, dtype),
            "selected": position in chosen,
        }
        for position, stage in enumerate(source.stages)
    ]
    return {
        "type": "checkpoint",
        "name": source.name,
        "library": source.library,
        "inside": source.inside,
        "norm": source.norm,
        "num_channels": source.channels,
        "parameters": source.num_parameters,
        "input_size": list(source.input_size),
        "dtype": dtype,
        "stages": stages,
        "bytes_per_image": sum(s["bytes_per_image"] for s in stages if s["selected"]),
        "share_computed": source.share(chosen),
        "preprocessing": preprocessing,
    }


def inspect_dump(path: Path) -> dict[str, Any] | None:
    """The state of a dump: stages, rows, failures, what is missing. None where there is no dump."""
    dump = Dump.existing(path)
    if dump is None:
        return None
    records = list(dump.records())
    failures = [failure for record in records for failure in record["failures"]]
    settings = dump.plan.settings
    damaged = dump.damaged()
    is_complete = dump.is_complete() and len(records) == dump.plan.num_shards
    return {
        "type": "dump",
        "path": str(path),
        "state": "damaged" if damaged else "complete" if is_complete else "incomplete",
        "images": dump.plan.num_images,
        "written": sum(record["rows"] for record in records) - len(failures),
        "failed": len(failures),
        "failed_by_reason": dict(Counter(failure["reason"] for failure in failures).most_common()),
        "shards": dump.plan.num_shards,
        "committed_shards": len(records),
        "damaged_shards": [dump.shard_path(number).name for number in damaged],
        "bytes": sum(record["bytes"] for record in records),
        "format": settings["format"],
        "checkpoint": dump.plan.provenance["checkpoint"],
        "weights": dump.plan.provenance["weights"],
        "pool": settings["pool"],
        "fingerprint": dump.plan.fingerprint,
        "stages": dump.plan.to_json()["stages"],
    }
