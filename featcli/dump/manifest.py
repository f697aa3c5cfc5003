"""The last files of a dump, written from its records: failures.jsonl, then manifest.json, which says it is complete."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from featcli.dump.atomic_file import disk_errors, publish_lines
from featcli.dump.checksummed_json import publish_sealed
from featcli.dump.folder import FAILURES, MANIFEST, Dump
from featcli.dump.plan import Plan, with_fingerprint
from featcli.errors import IncompleteError, counted, shown


def finalize(dump: Dump) -> dict[str, Any]:
    """Write both files; the manifest's content. Raises IncompleteError while a record is missing, MachineError."""
    records = list(dump.records())
    if len(records) < dump.plan.num_shards:
        raise IncompleteError(
            f"dump {shown(dump.path)}: {dump.plan.num_shards - len(records):,} of"
            f" {counted(dump.plan.num_shards, 'shard')} missing",
            "run its extract command again to complete it",
        )
    manifest = manifest_content(dump.plan, records)
    with disk_errors(dump.path):
        publish_lines(dump.path / FAILURES, failure_lines(records), replace=True)
        publish_sealed(dump.path / MANIFEST, manifest, replace=True)
    return manifest


def manifest_content(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What manifest.json says once these are all records."""
    return {
        **with_fingerprint(plan),
        "shards": [{k: v for k, v in record.items() if k not in ("fingerprint", "failures")} for record in records],
        "totals": totals_of(records),
    }


def totals_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the records come to: images, written and failed ones, bytes."""
    images = num_bytes = 0
    reasons: Counter[str] = Counter()
    for record in records:
        images += record["rows"]
        num_bytes += record["bytes"]
        reasons.update(failure["reason"] for failure in record["failures"])
    return {
        "images": images,
        "written": images - reasons.total(),
        "failed": reasons.total(),
        "failed_by_reason": dict(sorted(reasons.items())),
        "bytes": num_bytes,
    }


def failure_lines(records: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """The lines of failures.jsonl."""
    return [json.dumps(failure).encode("ascii") + b"\n" for record in records for failure in record["failures"]]
