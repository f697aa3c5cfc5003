"""The record of a shard: what it says, and whether one that is read can be trusted. It makes its shard committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcli.dump.checksummed_json import read_sealed
from featcli.dump.plan import Plan
from featcli.dump.shard import REST, Written
from featcli.errors import DamagedError, shown
from featcli.pixels.decode import Failure


def record_content(plan: Plan, number: int, written: Written, failures: Sequence[Failure]) -> dict[str, Any]:
    """What every record says."""
    rows = plan.shard(number)
    return {
        "shard": number,
        "file": written.file,
        "fingerprint": plan.fingerprint,
        "first_row": rows.start,
        "rows": len(rows),
        "bytes": written.bytes,
        "hashes": dict(written.hashes),
        "failures": [failure.to_json() for failure in failures],
    }


def read_record(path: Path, plan: Plan, number: int, file_name: str) -> dict[str, Any]:
    """The record of a shard whose file has this name. Raises DamagedError for one that is damaged or foreign."""
    try:
        record = read_sealed(path)
        _check(record, plan, number, file_name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"record {shown(path)}: damaged ({error})",
            "featcli verify --repair puts it aside, and the next extract makes its shard again",
        ) from error
    return record


def _check(record: Mapping[str, Any], plan: Plan, number: int, file_name: str) -> None:
    """Raise ValueError where a field is not what its readers rely on: the file may be anybody's."""
    rows = plan.shard(number)
    planned = {
        "shard": number,
        "file": file_name,
        "fingerprint": plan.fingerprint,
        "first_row": rows.start,
        "rows": len(rows),
    }
    if {name: record[name] for name in planned} != planned:
        raise ValueError("it belongs to another dump")
    if record["hashes"].keys() != {*(stage.name for stage in plan.stages), REST}:
        raise ValueError("it has not the hashes of these stages")
    if type(record["bytes"]) is not int or not all(isinstance(text, str) for text in record["hashes"].values()):
        raise ValueError("its size or its hashes are none")
    sizes = record.get("sizes", {})
    if not all(row.isdecimal() and int(row) in rows and type(size) is int for row, size in sizes.items()):
        raise ValueError("the sizes of images in it are none")
    for failure in record["failures"]:
        texts = [failure[name] for name in ("key", "reason", "detail")]
        if type(failure["row"]) is not int or failure["row"] not in rows or not all(map(str.__instancecheck__, texts)):
            raise ValueError("a failure in it is of no image of its")
