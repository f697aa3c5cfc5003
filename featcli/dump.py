"""The dump folder: plan first, then a file and a record for each shard, the manifest last.

    plan.json  images.jsonl  shards/00000.h5  shards/00000.json  failures.jsonl  manifest.json

A record is published after its shard file, the manifest after all records: what exists is complete.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcli.errors import ConflictError, DamagedError, MachineError, shown
from featcli.images import Failure
from featcli.inputs import MISSING, ImageList
from featcli.plan import KeysDigest, Plan, StoredStage, refuse_other_plan, with_fingerprint
from featcli.writers import FORMATS
from featcli.writers.layout import ITEM_BYTES
from featcli.writers.publish import PARTIAL, disk_errors, publish_json, publish_lines, remove_stale, sync_folder
from featcli.writers.shard import ShardWriter, Written

PLAN, IMAGES, SHARDS, FAILURES, MANIFEST = "plan.json", "images.jsonl", "shards", "failures.jsonl", "manifest.json"
OURS = re.compile(r"\d{5,}\.(json|h5|safetensors)|\..*\.partial")  # what featcli writes into SHARDS
REPAIR = "start anew with --overwrite: what cannot be trusted cannot be gone on with"


class Dump:
    """A dump folder with a plan, complete or not."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.format = FORMATS[plan.settings["format"]]

    @classmethod
    def existing(cls, path: Path) -> Dump | None:
        """The dump in a folder, or None where there is no plan. Raises DamagedError for a plan that is damaged."""
        if not (path / PLAN).exists():
            return None
        try:
            return cls(path, Plan.from_json(read_json(path / PLAN)))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"dump {shown(path)}: plan.json is damaged ({error})", REPAIR) from error

    @classmethod
    def create_or_resume(cls, path: Path, plan: Plan, images: ImageList) -> Dump:
        """Freeze the plan, or find the same one there. Raises ConflictError and MachineError."""
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
                if not publish_lines(path / IMAGES, _image_lines(images)) and not (path / PLAN).exists():
                    # A start that was killed left its list; nobody goes on from a list without a plan.
                    publish_lines(path / IMAGES, _image_lines(images), replace=True)
                publish_json(path / PLAN, with_fingerprint(plan))
        dump = cls.existing(path)
        assert dump is not None
        refuse_other_plan(shown(path), dump.plan, plan)
        dump._refuse_changed_images(images)
        return dump

    def _refuse_changed_images(self, images: ImageList) -> None:
        """The keys are those of the plan, or its fingerprint would differ; the files behind them may be others."""
        planned = [size for _, size in self.images()]
        changed = [row for row, (before, now) in enumerate(zip(planned, images.sizes, strict=True)) if before != now]
        if changed:
            row = changed[0]
            raise ConflictError(
                f"dump {shown(self.path)}: {len(changed)} images changed since its plan was made, first"
                f" {shown(images.keys[row])}: {_size(planned[row])} there, {_size(images.sizes[row])} now",
                "put the images back, use another -o, or --overwrite to start anew",
            )

    def images(self) -> Iterator[tuple[str, int]]:
        """(key, size in bytes when listed) of each row. Raises DamagedError if it is not the list that was planned."""
        digest = KeysDigest()
        try:
            with (self.path / IMAGES).open(encoding="ascii") as file:
                for line in file:
                    image = json.loads(line)
                    digest.add(image["key"])
                    yield image["key"], image["bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is damaged ({error})", REPAIR) from error
        if digest.hex() != self.plan.keys_digest:
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

    def _is_damaged(self, record: Mapping[str, Any]) -> bool:
        try:
            return bool(self.shard_path(record["shard"]).stat().st_size != record["bytes"])
        except OSError:
            return True

    def start_shard(self, number: int, keys: Sequence[str]) -> ShardWriter:
        """A writer for one shard, under a partial name."""
        attributes = {
            "featcli_format_version": "1",
            "fingerprint": self.plan.fingerprint,
            "shard": str(number),
            "first_row": str(self.plan.shard(number).start),
        }
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
        if environment != self.plan.environment:
            record["environment"] = dict(environment)
        if not publish_json(self.record_path(number), record) and self._record(number)["hashes"] != record["hashes"]:
            raise ConflictError(
                f"dump {shown(self.path)}: shard {number} was committed by another process with other bytes",
                "run extract again by itself",
            )
        return record

    def records(self) -> Iterator[dict[str, Any]]:
        """The records there are, in shard order. Raises DamagedError for one that is damaged or foreign."""
        for number in range(self.plan.num_shards):
            if self.record_path(number).exists():
                yield self._record(number)

    def _record(self, number: int) -> dict[str, Any]:
        path = self.record_path(number)
        try:
            record = read_json(path)
            if record["fingerprint"] != self.plan.fingerprint or record["shard"] != number:
                raise ValueError("it belongs to another dump")
            _ = record["rows"], record["first_row"], record["hashes"], record["bytes"], record["failures"]
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"record {shown(path)}: damaged ({error})", "delete it: its shard is redone") from error
        return record

    def is_committed(self, number: int) -> bool:
        """Whether a shard has a record, and its file is as the record says."""
        return self.record_path(number).exists() and not self._is_damaged(self._record(number))

    def reopen(self) -> None:
        """There is work to do: what says that the dump is complete goes first."""
        with disk_errors(self.path):
            (self.path / MANIFEST).unlink(missing_ok=True)

    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return (self.path / MANIFEST).exists()

    def finalize(self) -> dict[str, Any]:
        """Write failures.jsonl, then the manifest, from the records. Every shard must have one."""
        records = list(self.records())
        assert len(records) == self.plan.num_shards
        failures = [failure for record in records for failure in record["failures"]]
        manifest = {
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
        with disk_errors(self.path):
            lines = (json.dumps(failure).encode() + b"\n" for failure in failures)
            publish_lines(self.path / FAILURES, lines, replace=True)
            publish_json(self.path / MANIFEST, manifest, replace=True)
        return manifest


def row_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of what is stored of one image for one stage."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def image_bytes(stages: Iterable[StoredStage]) -> int:
    """Bytes of what is stored of one image over all stages."""
    return sum(row_bytes(stage.shape, stage.dtype) for stage in stages)


def stored_bytes(path: Path) -> int:
    """Bytes of the shard files in a folder, whatever state the dump is in."""
    return sum(file.stat().st_size for file in (path / SHARDS).glob("*") if OURS.fullmatch(file.name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a dump. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _size(num_bytes: int) -> str:
    return "no file" if num_bytes == MISSING else f"{num_bytes} bytes"


def _image_lines(images: ImageList) -> Iterator[bytes]:
    for key, size in zip(images.keys, images.sizes, strict=True):
        yield json.dumps({"key": key, "bytes": size}).encode("ascii") + b"\n"


def check_target(path: Path, overwrite: bool) -> None:
    """Whether a dump may come to be at `path`; looks only. Raises ConflictError and MachineError."""
    if path.exists() and not path.is_dir():
        raise ConflictError(f"dump {shown(path)}: there is a file of that name", "use another -o")
    foreign = {name for name in os.listdir(path) if not name.endswith(PARTIAL)} if path.is_dir() else set()
    if not (path / PLAN).exists() and foreign - {IMAGES, SHARDS}:
        raise ConflictError(
            f"dump {shown(path)}: the folder holds other files and no plan.json",
            "use another -o: featcli only writes into an empty folder or a dump of its own",
        )
    folder = existing_parent(path)
    probe = folder / f".featcli-probe-{os.getpid()}{PARTIAL}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"dump {shown(path)}: cannot write in {shown(folder)}: {error.strerror}", "use another -o"
        ) from error


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return path if path.exists() else existing_parent(path.parent)


def remove_dump(path: Path) -> None:
    """Delete the files of a dump, and nothing else; the plan last, so that a dump cut short is still known as one."""
    with disk_errors(path):
        if not (path / PLAN).exists():
            return
        (path / MANIFEST).unlink(missing_ok=True)
        for file in [*(path / SHARDS).iterdir()] if (path / SHARDS).is_dir() else []:
            if OURS.fullmatch(file.name):
                file.unlink()
        for name in (FAILURES, IMAGES, PLAN):
            (path / name).unlink(missing_ok=True)
