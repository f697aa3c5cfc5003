"""Read and write what the disk says about shards: their records, what is committed, failures.jsonl and manifest.json.

A shard is committed when it has a record. The dump is complete when it has the manifest, which is written from all
records.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcli.dump.checksummed_json import read_checksummed, why_refused
from featcli.dump.plan import Plan, with_fingerprint
from featcli.dump.shard import REST, ShardSummary
from featcli.errors import DamagedError, UsageError, shown
from featcli.pixels.failure import NOT_READ, Failure
from featcli.pixels.traits import TRAITS, lines

AND_AGAIN = "run featcli verify --repair: it sets the record aside, and the next extract makes its shard again"
NOT_IN_MANIFEST = ("fingerprint", "failures", "digests")  # of the fields of records
DIGEST_LENGTH = len(NOT_READ)
NOT_HEXADECIMAL = re.compile(r"[^0-9a-f]")
COMPARE_PLANS = f"compare the plan.json of both; or {AND_AGAIN}"


class ForeignRecordError(ValueError):
    """The record of another dump for a shard of this number."""


def split_digests(text: str) -> list[str]:
    """The digests of files that a record has in one text, which is read much faster than a list is."""
    return [text[begin : begin + DIGEST_LENGTH] for begin in range(0, len(text), DIGEST_LENGTH)]


def record_content(
    plan: Plan, number: int, written: ShardSummary, failures: Sequence[Failure], digests: Sequence[str]
) -> dict[str, Any]:
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
        **({"digests": "".join(digests)} if plan.has_digests else {}),
    }


def read_record(path: Path, plan: Plan, number: int, file_name: str) -> dict[str, Any]:
    """Return the record of a shard whose file has this name. Raises DamagedError if it is damaged or foreign."""
    try:
        record = read_checksummed(path)
        check_record(record, plan, number, file_name, len(plan.shard(number)))
    except ForeignRecordError as error:
        raise DamagedError(f"record {shown(path)}: {error}", COMPARE_PLANS) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"record {shown(path)}: it is damaged ({why_refused(error)})", AND_AGAIN) from error
    return record


def check_record(record: Mapping[str, Any], plan: Plan, number: int, file_name: str, num_rows: int) -> None:
    """Raise ValueError if a field is not what its readers rely on: anybody may have written the file."""
    if record["fingerprint"] != plan.fingerprint:
        raise ForeignRecordError(
            f"it belongs to another dump: its fingerprint is {shown(record['fingerprint'])}, that of plan.json is"
            f" {shown(plan.fingerprint)}"
        )
    rows = plan.shard(number)[:num_rows]
    planned = {"shard": number, "file": file_name, "first_row": rows.start, "rows": len(rows)}
    if {name: record[name] for name in planned} != planned:
        raise ForeignRecordError("it is of another shard")
    if any(type(record[name]) is not type(value) for name, value in planned.items()):  # 0.0 and false are equal to 0
        raise ValueError("a number in it is not a whole one")
    if record["hashes"].keys() != {*(stage.name for stage in plan.outputs), REST}:
        raise ValueError("it has not the hashes of these stages")
    if type(record["bytes"]) is not int or not all(isinstance(text, str) for text in record["hashes"].values()):
        raise ValueError("its size or its hashes are none")
    _check_digests(record, plan, num_rows)
    sizes = record.get("sizes", {})
    if not all(row.isdecimal() and int(row) in rows and type(size) is int for row, size in sizes.items()):
        raise ValueError("the sizes of images in it are none")
    if not all(type(count) is int and 0 <= count <= len(rows) for count in record.get("pictures", {}).values()):
        raise ValueError("the counts of pictures in it are none")
    for failure in record["failures"]:
        texts = [failure[name] for name in ("key", "reason", "detail")]
        if type(failure["row"]) is not int or failure["row"] not in rows or not all(map(str.__instancecheck__, texts)):
            raise ValueError("a failure in it is of no image of its")


def _check_digests(record: Mapping[str, Any], plan: Plan, num_rows: int) -> None:
    digests = record["digests"] if plan.has_digests else ""
    if len(digests) != DIGEST_LENGTH * num_rows * plan.has_digests or NOT_HEXADECIMAL.search(digests):
        raise ValueError("it has not the digests of these images")


@dataclass
class CommittedShards:
    """The shards that have a record, and what the records say that a resumed run needs."""

    num_shards: int  # in the plan
    damaged: set[int] = field(default_factory=set)  # shards whose file is gone, or not of the recorded size
    failed: set[int] = field(default_factory=set)  # shards with images that could not be read
    failed_rows: set[int] = field(default_factory=set)  # those images, also of shards that are being made again
    sizes: dict[int, int] = field(default_factory=dict)  # row -> bytes, for images that failed and were read later
    packages: dict[str, str] = field(default_factory=dict)  # of shards, if the plan does not name them
    _there: set[int] = field(default_factory=set)

    def add(self, record: Mapping[str, Any], is_damaged: bool) -> None:
        """Add a shard that has a record."""
        self._there.add(record["shard"])
        if is_damaged:
            self.damaged.add(record["shard"])
        if record["failures"]:
            self.failed.add(record["shard"])
        self.remember((record,))

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add what records say about images. Their shards need not exist any more."""
        for record in records:
            self.failed_rows.update(failure["row"] for failure in record["failures"])
            self.sizes.update((int(row), size) for row, size in record.get("sizes", {}).items())
            for environment in (record.get("environment", {}), *record.get("environments", ())):
                self.packages.update(environment)

    @property
    def missing(self) -> list[int]:
        """The shards that are missing or damaged, in order."""
        whole = self._there - self.damaged
        return [number for number in range(self.num_shards) if number not in whole]


def manifest_content(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what manifest.json says if these are all records."""
    return {
        **with_fingerprint(plan),
        "shards": [{k: v for k, v in record.items() if k not in NOT_IN_MANIFEST} for record in records],
        "totals": totals_of(records),
    }


def totals_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of the records: images, written and failed ones, bytes."""
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


def pictures_of(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many pictures were read, and how many of them have each trait; {} if that was not counted.

    `records` may also be what the manifest has of them.
    """
    counted = [record["pictures"] for record in records if "pictures" in record]
    counts: Counter[str] = Counter()
    for pictures in counted:
        counts.update(pictures)
    return {"read": counts["read"], **{trait: counts[trait] for trait in TRAITS}} if counted else {}


def said_of_pictures(plan: Plan, pictures: Mapping[str, int]) -> list[str]:
    """Return lines for people about these counts: what the rules of the plan did to such pictures."""
    try:
        return list(lines(pictures, pictures.get("read", 0), plan.settings.pixel_rules))
    except (KeyError, TypeError, UsageError):  # the rules are of another version
        return []


def failure_lines(records: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """Return the lines of failures.jsonl."""
    return [json.dumps(failure).encode("ascii") + b"\n" for record in records for failure in record["failures"]]
