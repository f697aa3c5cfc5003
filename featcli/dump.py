"""The dump folder: plan first, then a file and a record for each shard, the manifest last.

    plan.json  images.jsonl  shards/00000.h5  shards/00000.json  failures.jsonl  manifest.json

A record is published after its shard file, the manifest after all records: what exists is complete.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from featcli.errors import ConflictError, DamagedError, IncompleteError, UsageError, shown
from featcli.images import Failure
from featcli.inputs import MISSING, ImageList
from featcli.plan import Plan, image_lines, refuse_other_plan, with_fingerprint
from featcli.writers import FORMATS
from featcli.writers.layout import ITEM_BYTES
from featcli.writers.publish import disk_errors, publish_lines, remove_stale, sync_folder
from featcli.writers.sealed import publish_sealed, read_sealed
from featcli.writers.shard import REST, ShardWriter, Written

PLAN, IMAGES, SHARDS, FAILURES, MANIFEST = "plan.json", "images.jsonl", "shards", "failures.jsonl", "manifest.json"
ASIDE = ".damaged"  # ends the name of what verify --repair has put aside
OURS = re.compile(r"\d{5,}\.(json|h5|safetensors)(\.damaged)?|\..*\.partial")  # what featcli writes into SHARDS
REPAIR = "start anew with --overwrite: what cannot be trusted cannot be gone on with"


class Dump:
    """A dump folder with a plan, complete or not."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.format = FORMATS[plan.settings["format"]]
        self.resized: dict[int, int] = {}  # row -> size in bytes, of images that are not as they were listed

    @classmethod
    def existing(cls, path: Path) -> Dump | None:
        """The dump in a folder, or None where there is no plan. Raises DamagedError for a plan that is damaged."""
        if not (path / PLAN).exists():
            return None
        plan = cls.plan_in(path)
        if (path / IMAGES).exists() and plan.num_images > (path / IMAGES).stat().st_size:
            raise DamagedError(f"dump {shown(path)}: images.jsonl is too short for its plan", REPAIR)
        return cls(path, plan)

    @classmethod
    def at(cls, path: Path) -> Dump:
        """The dump in a folder. Raises UsageError where there is none, DamagedError as `existing` does."""
        dump = cls.existing(path)
        if dump is None:
            raise no_dump(path)
        return dump

    @staticmethod
    def plan_in(path: Path) -> Plan:
        """The plan in a folder. Raises DamagedError."""
        try:
            plan = Plan.from_json(read_sealed(path / PLAN))
            if plan.settings["format"] not in FORMATS or any(stage.dtype not in ITEM_BYTES for stage in plan.stages):
                raise ValueError("a format or a type that this featcli does not know")
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedError(f"dump {shown(path)}: plan.json is damaged ({error})", REPAIR) from error

    @classmethod
    def create_or_resume(cls, path: Path, plan: Plan, images: ImageList, retry_failed: bool = False) -> Dump:
        """Freeze the plan, or find the same one there. Raises ConflictError and MachineError.

        Images may not have changed since, but for those that failed where they are to be tried again.
        """
        with disk_errors(path):
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
            for folder in (path / SHARDS, path):
                sync_folder(folder)
            with suppress(PermissionError):  # the folder above may be somebody else's, who lets us in but not look
                sync_folder(path.parent)
            remove_stale(path)
            remove_stale(path / SHARDS)
            if not (path / PLAN).exists():
                # The list before the plan: where there is a plan, the list it froze is there.
                if not publish_lines(path / IMAGES, image_lines(images)) and not (path / PLAN).exists():
                    # A start that was killed left its list; nobody goes on from a list without a plan.
                    publish_lines(path / IMAGES, image_lines(images), replace=True)
                publish_sealed(path / PLAN, with_fingerprint(plan))
        dump = cls.at(path)
        refuse_other_plan(shown(path), dump.plan, plan)
        dump.resized = dump.refuse_changed_images(images, retry_failed)
        return dump

    def refuse_changed_images(self, images: ImageList, retry_failed: bool) -> dict[int, int]:
        """The keys are those of the plan, or its fingerprint would differ; the files behind them may be others.

        Returns row -> size now, of the images that are not as they were listed: repaired ones.
        """
        planned = [size for _, size in self.images()]
        sizes = zip(planned, images.sizes, strict=True)
        resized = {row: now for row, (before, now) in enumerate(sizes) if before != now}
        failed: set[int] = set()
        for record in self.records():
            failed |= {failure["row"] for failure in record["failures"]}
            for row, size in record.get("sizes", {}).items():  # of images that failed, and were read later
                planned[int(row)] = size
        may_differ = failed if retry_failed else ()
        pairs = enumerate(zip(planned, images.sizes, strict=True))
        changed = [row for row, (before, now) in pairs if before != now and row not in may_differ]
        if changed:
            row = changed[0]
            raise ConflictError(
                f"dump {shown(self.path)}: {len(changed)} images changed since its plan was made, first"
                f" {shown(images.keys[row])}: {_size(planned[row])} there, {_size(images.sizes[row])} now",
                "put the images back, use another -o, or --overwrite to start anew"
                if not failed.issuperset(changed)
                else "they failed before: --retry-failed tries such images again",
            )
        return resized

    def images(self) -> Iterator[tuple[str, int]]:
        """(key, size in bytes when listed) of each row. Raises DamagedError if it is not the list that was planned."""
        digest, count = xxhash.xxh3_128(), 0
        try:
            with (self.path / IMAGES).open("rb") as file:
                for line in file:
                    image = json.loads(line)
                    if not isinstance(image["key"], str) or type(image["bytes"]) is not int:
                        raise ValueError("a key or a size that is none")
                    digest.update(line)
                    count += 1
                    yield image["key"], image["bytes"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is damaged ({error})", REPAIR) from error
        if (digest.hexdigest(), count) != (self.plan.images_digest, self.plan.num_images):
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is not the list that was planned", REPAIR)

    def keys(self) -> list[str]:
        """The key of each row. Raises FeatcliError."""
        return [key for key, _ in self.images()]

    def shard_path(self, number: int) -> Path:
        """Where the file of a shard is, or will be."""
        return self.path / SHARDS / f"{number:05d}{self.format.SUFFIX}"

    def record_path(self, number: int) -> Path:
        """Where the record of a shard is, or will be."""
        return self.path / SHARDS / f"{number:05d}.json"

    def unfinished(self) -> list[int]:
        """The shards without a record, or whose file is gone or of another size than its record says."""
        whole = {record["shard"] for record in self.records() if not self._is_damaged(record)}
        return [number for number in range(self.plan.num_shards) if number not in whole]

    def damaged(self) -> list[int]:
        """The committed shards whose file is gone or of another size than its record says."""
        return [record["shard"] for record in self.records() if self._is_damaged(record)]

    def failed(self) -> list[int]:
        """The committed shards with images that could not be read."""
        return [record["shard"] for record in self.records() if record["failures"]]

    def _is_damaged(self, record: Mapping[str, Any]) -> bool:
        try:
            return bool(self.shard_path(record["shard"]).stat().st_size != record["bytes"])
        except OSError:
            return True

    def attributes(self, number: int) -> dict[str, str]:
        """What the file of a shard says about itself."""
        return {
            "featcli_format_version": "1",
            "fingerprint": self.plan.fingerprint,
            "shard": str(number),
            "first_row": str(self.plan.shard(number).start),
        }

    def start_shard(self, number: int, keys: Sequence[str]) -> ShardWriter:
        """A writer for one shard, under a partial name."""
        attributes = self.attributes(number)
        stages = {stage.name: (stage.dtype, stage.shape) for stage in self.plan.stages}
        return ShardWriter(self.shard_path(number), self.plan.settings["format"], stages, keys, attributes)

    def record(
        self, number: int, written: Written, failures: Sequence[Failure], environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Publish the record of a shard whose file is on the disk: from here on the shard is committed."""
        rows = self.plan.shard(number)
        record: dict[str, Any] = {
            "shard": number,
            "file": written.file,
            "fingerprint": self.plan.fingerprint,
            "first_row": rows.start,
            "rows": len(rows),
            "bytes": written.bytes,
            "hashes": dict(written.hashes),
            "failures": [failure.to_json() for failure in failures],
        }
        if sizes := {str(row): size for row, size in self.resized.items() if row in rows}:
            record["sizes"] = sizes
        if environment != self.plan.environment:
            record["environment"] = dict(environment)
        if (
            not publish_sealed(self.record_path(number), record)
            and self.record_of(number)["hashes"] != record["hashes"]
        ):
            raise ConflictError(
                f"dump {shown(self.path)}: shard {number} was committed by another process with other bytes",
                "run extract again by itself",
            )
        return record

    def release(self, number: int) -> None:
        """Take a shard's record away, so that another file of it can be committed. The file stays until then."""
        self.record_path(number).unlink(missing_ok=True)
        sync_folder(self.path / SHARDS)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records there are, in shard order. Raises DamagedError for one that is damaged or foreign."""
        for number in range(self.plan.num_shards):
            if self.record_path(number).exists():
                yield self.record_of(number)

    def record_of(self, number: int) -> dict[str, Any]:
        """The record of a shard. Raises DamagedError for one that is damaged or foreign."""
        path = self.record_path(number)
        try:
            record = read_sealed(path)
            self._check_record(record, number)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"record {shown(path)}: damaged ({error})", "delete it: its shard is redone") from error
        return record

    def _check_record(self, record: Mapping[str, Any], number: int) -> None:
        """Raise ValueError where a field is not what its readers rely on: the file may be anybody's."""
        rows = self.plan.shard(number)
        planned = {
            "shard": number,
            "file": self.shard_path(number).name,
            "fingerprint": self.plan.fingerprint,
            "first_row": rows.start,
            "rows": len(rows),
        }
        if {name: record[name] for name in planned} != planned:
            raise ValueError("it belongs to another dump")
        if record["hashes"].keys() != {*(stage.name for stage in self.plan.stages), REST}:
            raise ValueError("it has not the hashes of these stages")
        if type(record["bytes"]) is not int or not all(isinstance(text, str) for text in record["hashes"].values()):
            raise ValueError("its size or its hashes are none")
        sizes = record.get("sizes", {})
        if not all(row.isdecimal() and int(row) in rows and type(size) is int for row, size in sizes.items()):
            raise ValueError("the sizes of images in it are none")
        for failure in record["failures"]:
            texts = [failure[name] for name in ("key", "reason", "detail")]
            if (
                type(failure["row"]) is not int
                or failure["row"] not in rows
                or not all(map(str.__instancecheck__, texts))
            ):
                raise ValueError("a failure in it is of no image of its")

    def is_committed(self, number: int) -> bool:
        """Whether a shard has a record, and its file is as the record says."""
        return self.record_path(number).exists() and not self._is_damaged(self.record_of(number))

    def reopen(self) -> None:
        """There is work to do: what says that the dump is complete goes first."""
        with disk_errors(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)

    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return (self.path / MANIFEST).exists()

    def finalize(self) -> dict[str, Any]:
        """Write failures.jsonl, then the manifest, from the records. Raises IncompleteError while one is missing."""
        records = list(self.records())
        if len(records) < self.plan.num_shards:
            raise IncompleteError(
                f"dump {shown(self.path)}: {self.plan.num_shards - len(records):,} of {self.plan.num_shards:,} shards"
                " are missing",
                "run its extract command again to complete it",
            )
        manifest = self.manifest(records)
        with disk_errors(self.path):
            publish_lines(self.path / FAILURES, failure_lines(records), replace=True)
            publish_sealed(self.path / MANIFEST, manifest, replace=True)
        return manifest

    def manifest(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The content of manifest.json once these are all records."""
        failures = [failure for record in records for failure in record["failures"]]
        return {
            **with_fingerprint(self.plan),
            "shards": [{k: v for k, v in record.items() if k not in ("fingerprint", "failures")} for record in records],
            "totals": {
                "images": self.plan.num_images,
                "written": self.plan.num_images - len(failures),
                "failed": len(failures),
                "failed_by_reason": dict(sorted(Counter(failure["reason"] for failure in failures).items())),
                "bytes": sum(record["bytes"] for record in records),
            },
        }


def no_dump(path: object) -> UsageError:
    """Where a dump was named and none is."""
    return UsageError(f"dump {shown(path)}: no plan.json there", "a dump is the folder that extract -o made")


def failure_lines(records: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """The lines of failures.jsonl."""
    return [json.dumps(failure).encode("ascii") + b"\n" for record in records for failure in record["failures"]]


def _size(num_bytes: int) -> str:
    return "no file" if num_bytes == MISSING else f"{num_bytes} bytes"
