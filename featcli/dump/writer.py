"""How a dump comes to be: plan first, then a file and a record for each shard, the manifest last.

A record is published after its shard file, the manifest after all records: what exists is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump.atomic_file import disk_errors, publish_lines, sync_folder
from featcli.dump.checksummed_json import publish_checksummed
from featcli.dump.folder import BEFORE, FAILURES, IMAGES, MANIFEST, PLAN, SHARDS, Dump
from featcli.dump.lock import one_at_a_time
from featcli.dump.plan import Plan, image_lines, with_fingerprint
from featcli.dump.records import failure_lines, manifest_content, record_content
from featcli.dump.shard import ShardSummary, ShardWriter
from featcli.errors import IncompleteError, counted, shown
from featcli.inputs.image_list import ImageList
from featcli.pixels.failure import Failure
from featcli.pixels.traits import Trait
from featcli.system.files import is_there


def create(path: Path, plan: Plan, images: ImageList) -> bool:
    """Freeze the plan; False where another is there by now, as can be where there are no locks. Raises MachineError."""
    with disk_errors(path):
        # The list before the plan: where there is a plan, the list it froze is there.
        publish_lines(path / IMAGES, image_lines(images), replace=True)
        return publish_checksummed(path / PLAN, with_fingerprint(plan))


def resume(dump: Dump, plan: Plan, images: ImageList, retry_failed: bool = False) -> dict[int, int]:
    """Make a dump ready to be resumed. Returns row -> size in bytes now, of images that are not as they were listed.

    `plan` is what is asked for now. Raises ConflictError where it differs from the plan of the dump, or where an image
    has changed. Images that failed may have changed where `retry_failed` is true.
    """
    dump.refuse_other_plan(plan, images)
    if plan.images_digest == dump.plan.images_digest and not dump.has_its_list():
        with disk_errors(dump.path):
            publish_lines(dump.path / IMAGES, image_lines(images), replace=True)
    resized = dump.refuse_changed_images(plan, images, retry_failed)
    for number in dump.numbered(".json" + BEFORE):
        if dump.is_committed(number):  # a kill left it: what has come in its place was there already
            _before(dump, number).unlink(missing_ok=True)
    return resized


@dataclass(frozen=True)
class DumpWriter:
    """Makes shards of a dump, and commits them."""

    dump: Dump
    environment: Mapping[str, str]  # of this process
    again: frozenset[int] = frozenset()  # committed shards that are to be made again
    # row -> size in bytes, of images that are not as they were listed
    resized: Mapping[int, int] = field(default_factory=dict)

    def is_done(self, number: int) -> bool:
        """Whether a shard is committed, by whomever, and stays as it is."""
        return number not in self.again and self.dump.is_committed(number)

    def start_shard(self, number: int, keys: Sequence[str], shapes: Mapping[str, np.ndarray]) -> ShardWriter:
        """A writer for one shard, under a partial name. `shapes`: (rows, 3) of stages whose maps differ in size."""
        dump, plan = self.dump, self.dump.plan
        arrays = plan.arrays(number, shapes)
        return ShardWriter(dump.shard_path(number), dump.format, arrays, keys, dump.attributes(number))

    def commit(
        self,
        number: int,
        writer: ShardWriter,
        beside: Mapping[str, np.ndarray],
        failures: Sequence[Failure],
        micro_batch: int,
        traits: Mapping[Trait, int],
    ) -> dict[str, Any] | None:
        """Commit a shard whose rows are written: name its file, then publish its record. Returns the record.

        None where another process was first. `beside`: the arrays that are not of stages. `micro_batch`: how many
        images went through the backbone together, where memory did not allow for a whole batch. `traits`: of how many
        pictures each is true.
        """
        record = self._record(number, writer.finish(beside), failures, micro_batch, traits)
        path, before = self.dump.record_path(number), _before(self.dump, number)
        with one_at_a_time(self.dump.path / SHARDS):
            if self.is_done(number):
                writer.abort()
                return None
            if is_there(path):  # from here on the shard is not committed; what it says of failed images is kept
                path.replace(before)
                sync_folder(self.dump.path / SHARDS)
            writer.publish()
            publish_checksummed(path, record, replace=True)
            before.unlink(missing_ok=True)
        return record

    def _record(
        self,
        number: int,
        written: ShardSummary,
        failures: Sequence[Failure],
        micro_batch: int,
        traits: Mapping[Trait, int],
    ) -> dict[str, Any]:
        plan = self.dump.plan
        record = record_content(plan, number, written, failures)
        if plan.counts_traits:
            record["pictures"] = {"read": len(plan.shard(number)) - len(failures), **dict(sorted(traits.items()))}
        if sizes := {str(row): size for row, size in self.resized.items() if row in plan.shard(number)}:
            record["sizes"] = sizes
        if micro_batch < plan.settings.batch_size:
            record["batch_size"] = micro_batch
        if self.environment != plan.environment:
            record["environment"] = dict(self.environment)
        return record


def reopen(dump: Dump) -> None:
    """There is work to do: what says that the dump is complete goes first. Raises MachineError."""
    with disk_errors(dump.path):
        (dump.path / MANIFEST).unlink(missing_ok=True)
        sync_folder(dump.path)  # before any shard that it speaks of is another


def finalize(dump: Dump) -> dict[str, Any]:
    """Write failures.jsonl, then manifest.json, from the records. Returns the content of the manifest.

    Raises IncompleteError while a record is missing, and MachineError.
    """
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
        publish_checksummed(dump.path / MANIFEST, manifest, replace=True)
    return manifest


def _before(dump: Dump, number: int) -> Path:
    """Where the record of a shard lies while the shard is made again."""
    path = dump.record_path(number)
    return path.with_name(path.name + BEFORE)
