"""Read the folder of a dump: where things are in it, what it says about itself, and whether it fits what is asked.

Nothing here writes: see featcli.dump.writer.
"""

from __future__ import annotations

import json
import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcli.dump.atomic_file import PARTIAL_NAME
from featcli.dump.checksummed_json import read_checksummed, why_refused
from featcli.dump.columns import COLUMNS, read_columns
from featcli.dump.formats import FORMATS
from featcli.dump.formats.layout import ITEM_BYTES, SHAPES, Layout, read_rows, starts_of
from featcli.dump.plan import OtherVersionError, Plan, other_images, refuse_other_plan
from featcli.dump.records import COMPARE_PLANS, CommittedShards, read_record
from featcli.dump.shard import hash_rest
from featcli.dump.unfinished import RECORD_NAME, Unfinished, read_unfinished, unfinished_in
from featcli.errors import ConflictError, DamagedError, MachineError, UsageError, counted, shown
from featcli.inputs.image_list import MISSING, ImageList
from featcli.inputs.keys import MANY, Keys
from featcli.system.faults import RESUMES, machine_errors
from featcli.system.files import identity, is_there, names_in, open_regular, reading, state_at

PLAN, IMAGES, SHARDS, FAILURES, MANIFEST = "plan.json", "images.jsonl", "shards", "failures.jsonl", "manifest.json"
ASIDE = ".damaged"  # end of the names of files that verify --repair has put aside
# featcli writes files with these endings into SHARDS.
_SUFFIXES = "|".join(re.escape(suffix) for suffix in (".json", *(one.SUFFIX for one in FORMATS.values())))
SHARD_FILE = re.compile(rf"\d{{5,}}({_SUFFIXES})(\.damaged|\.before)?")
OURS = re.compile(f"{SHARD_FILE.pattern}|{PARTIAL_NAME.pattern}|{RECORD_NAME.pattern}")
BEFORE = ".before"  # end of the name of a record while its shard is made again
LONGEST_LINE = 1 << 16  # bytes of a line of images.jsonl: names have up to 255 bytes, paths up to 4096
RELIST = "run its extract command again: it lists the images anew, if they are as they were"


class Dump:
    """A folder with a plan: a dump, complete or not."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.plan = plan
        self.format = FORMATS[plan.settings.format]

    @cached_property
    def found(self) -> CommittedShards:
        """The shards that were committed when this was first used."""
        return self.committed()

    @property
    def packages(self) -> dict[str, str]:
        """The packages that the dump was begun with or that one of its shards was made with, and their versions."""
        return {**self.found.packages, **self.plan.environment}

    @classmethod
    def existing(cls, path: Path) -> Dump | None:
        """Return the dump in a folder, or None.

        Raises DamagedError if the plan is damaged or gone, and MachineError.
        """
        if state_at(path / PLAN, follow_links=False) is not None:
            return cls(path, cls.plan_in(path))
        if is_there(path / MANIFEST) or any(SHARD_FILE.fullmatch(name) for name in names_in(path / SHARDS)):
            raise DamagedError(f"dump {shown(path)}: plan.json is gone", _way_out(path))
        return None

    @classmethod
    def at(cls, path: Path) -> Dump:
        """Return the dump in a folder for reading. Raises UsageError if there is none, and what `existing` raises."""
        dump = cls.existing(path)
        if dump is None:
            raise no_dump(path)
        dump.refuse_short_list()
        return dump

    def refuse_short_list(self) -> None:
        """Raise DamagedError if images.jsonl is gone, or too short to be what was planned."""
        listed = state_at(self.path / IMAGES)
        if listed is None or not stat.S_ISREG(listed.st_mode) or self.plan.num_images > listed.st_size:
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is gone, or too short for its plan", RELIST)

    @staticmethod
    def plan_in(path: Path) -> Plan:
        """Return the plan in a folder. Raises DamagedError and MachineError."""
        try:
            plan = Plan.from_json(read_checksummed(path / PLAN))
            if plan.settings.format not in FORMATS or any(stage.dtype not in ITEM_BYTES for stage in plan.outputs):
                raise ValueError("a format or a type that this featcli does not know")
            return plan
        except OtherVersionError as error:
            raise ConflictError(f"dump {shown(path)}: {error}", "use the featcli that made it") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedError(
                f"dump {shown(path)}: plan.json is damaged ({why_refused(error)})", _way_out(path)
            ) from error

    def refuse_other_plan(self, plan: Plan, images: ImageList) -> None:
        """Raise ConflictError if the plan is not this one. The error names what differs."""
        if (
            plan.keys_digest != self.plan.keys_digest
            and replace(plan, keys_digest=self.plan.keys_digest, num_images=self.plan.num_images).fingerprint
            == self.plan.fingerprint
        ):
            with suppress(DamagedError):
                raise other_images(shown(self.path), self.packed_keys(), images.keys)
        refuse_other_plan(shown(self.path), self.plan, plan)
        if self.plan.is_in_memory != plan.is_in_memory:
            before, now = ("in memory", "files") if self.plan.is_in_memory else ("files", "in memory")
            raise ConflictError(
                f"dump {shown(self.path)}: its pictures were {before}, and now they are {now}",
                "give them as before, or use another -o",
            )

    def refuse_in_memory(self) -> None:
        """Raise ConflictError if the pictures were in memory: no file holds them."""
        if self.plan.is_in_memory:
            raise ConflictError(
                f"dump {shown(self.path)}: its pictures were in the memory of a Python program, in no file",
                "extract the same pictures to another dump, and compare the two: featcli verify DUMP --against OTHER",
            )

    def refuse_changed_images(self, plan: Plan, images: ImageList, retry_failed: bool) -> dict[int, int]:
        """Return row -> size now, for images whose size has changed since they were listed.

        `plan` is the plan of these images. Its keys are those of the dump, or its fingerprint would differ. Raises
        ConflictError for a changed image, unless it failed before and `retry_failed` is true, or a record already has
        its new size.
        """
        sizes, failed = self.found.sizes, self.found.failed_rows
        if plan.images_digest == self.plan.images_digest and not sizes:
            return {}
        planned = array("q", (size for _, size in self.images()))
        resized = {row: now for row, now in enumerate(images.sizes) if planned[row] != now}
        for row, size in sizes.items():
            planned[row] = size
        may_differ = failed if retry_failed else ()
        pairs = enumerate(zip(planned, images.sizes, strict=True))
        changed = [row for row, (before, now) in pairs if before != now and row not in may_differ]
        if changed:
            row = changed[0]
            raise ConflictError(
                f"dump {shown(self.path)}: {counted(len(changed), 'image')} changed since its plan was made, first"
                f" {shown(images.keys[row])}: {_size(planned[row])} there, {_size(images.sizes[row])} now",
                "put the images back, use another -o, or --overwrite to start anew"
                if not failed.issuperset(changed)
                else "they failed before: --retry-failed tries such images again",
            )
        return resized

    def images(self) -> Iterator[tuple[str, int]]:
        """Yield (key, size in bytes when listed) of each row.

        Raises DamagedError if it is not the planned list, and MachineError.
        """
        digest, count = xxhash.xxh3_128(), 0
        try:
            with reading(self.path / IMAGES, "image list", strict=True) as file:
                while lines := [*islice(iter(partial(file.readline, LONGEST_LINE), b""), MANY)]:
                    images = _parsed(lines)
                    digest.update(b"".join(lines))
                    count += len(images)
                    yield from images
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is damaged ({error})", RELIST) from error
        if (digest.hexdigest(), count) != (self.plan.images_digest, self.plan.num_images):
            raise DamagedError(f"dump {shown(self.path)}: images.jsonl is not the list that was planned", RELIST)

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield the cells of each row by column, as columns.jsonl holds them. There are none without columns.

        Raises DamagedError if they are not the planned ones, and MachineError.
        """
        if self.plan.columns is None:
            return
        try:
            yield from read_columns(self.path, self.plan.columns, self.plan.num_images)
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"dump {shown(self.path)}: {COLUMNS} is damaged ({error})", RELIST) from error

    def has_its_list(self) -> bool:
        """Return whether images.jsonl is what was planned, to the byte."""
        return self._is_file(IMAGES, self.plan.images_digest)

    def has_its_columns(self) -> bool:
        """Return whether columns.jsonl is what was planned, to the byte. True without columns."""
        return self.plan.columns is None or self._is_file(COLUMNS, self.plan.columns.digest)

    def _is_file(self, name: str, digest: str) -> bool:
        try:
            with machine_errors("file", self.path / name, strict=True):
                descriptor = open_regular(self.path / name)
                try:
                    return hash_rest(descriptor, os.fstat(descriptor).st_size, ()) == digest
                finally:
                    os.close(descriptor)
        except (OSError, ValueError, EOFError):
            return False

    def keys(self) -> list[str]:
        """Return the key of each row. Raises DamagedError and MachineError."""
        return [key for key, _ in self.images()]

    def packed_keys(self) -> Keys:
        """Return the key of each row in a fourth of the memory. Raises DamagedError and MachineError."""
        return Keys(key for key, _ in self.images())

    def shard_path(self, number: int) -> Path:
        """Return the path that the file of a shard has, or will have."""
        return self.path / SHARDS / f"{number:05d}{self.format.SUFFIX}"

    def record_path(self, number: int) -> Path:
        """Return the path that the record of a shard has, or will have."""
        return self.path / SHARDS / f"{number:05d}.json"

    def committed(self, records: Iterable[Mapping[str, Any]] | None = None) -> CommittedShards:
        """Return what is committed, by `records` if they have been read already, or after one look at every record.

        Raises DamagedError for a record that is damaged or foreign, and for a foreign shard file without a record.
        """
        found = CommittedShards(self.plan.num_shards)
        with unmoved(self.path):
            for number in self.unrecorded():
                self.refuse_foreign_file(number)
            found.remember(self._records_before())
            for record in self.records() if records is None else records:
                found.add(record, self._is_damaged(record))
            names = self.names()
            there = {*self.numbered(".json", names)}
            kept = [one for one in self.unfinished(names) if one.number not in there]
            found.remember(one.content for one in kept if one.content is not None)
        return found

    def names(self) -> list[str]:
        """Return the names in the folder of shards. Raises MachineError.

        Methods with the argument `names` take them from there, and list the folder themselves without it.
        """
        return names_in(self.path / SHARDS)

    def unfinished(self, names: Sequence[str] | None = None) -> list[Unfinished]:
        """Return the shards that were begun and not finished, also those that were committed since."""
        return unfinished_in(self.path / SHARDS, self.plan, self.names() if names is None else names)

    def unfinished_shard(self, number: int) -> Unfinished | None:
        """Return what was begun of a shard, or None."""
        return read_unfinished(self.path / SHARDS, self.plan, number)

    def unfinished_shards(self, names: Sequence[str] | None = None) -> list[dict[str, int]]:
        """Return the shards that were begun and not finished, with how many of their `rows` are `kept` on the disk."""
        kept = self.rows_kept(names).items()
        return [{"shard": shard, "kept": rows, "rows": len(self.plan.shard(shard))} for shard, rows in sorted(kept)]

    def rows_kept(self, names: Sequence[str] | None = None) -> dict[int, int]:
        """Return how many rows are on the disk, for each unfinished shard that is not committed."""
        names = self.names() if names is None else names
        there = {*self.numbered(".json", names)}
        begun = [one for one in self.unfinished(names) if one.rows and one.number not in there]
        return {one.number: one.rows for one in begun if self._has_its_rows(one)}

    def _has_its_rows(self, one: Unfinished) -> bool:
        """Return whether the file of an unfinished shard exists. A kill may have left it under its final name."""
        return one.partial is not None and (is_there(one.partial) or is_there(self.shard_path(one.number)))

    def _is_damaged(self, record: Mapping[str, Any]) -> bool:
        found = state_at(self.shard_path(record["shard"]))
        return found is None or found.st_size != record["bytes"]

    def attributes(self, number: int) -> dict[str, str]:
        """Return what the file of a shard says about itself."""
        return {
            "featcli_format_version": "1",
            "fingerprint": self.plan.fingerprint,
            "shard": str(number),
            "first_row": str(self.plan.shard(number).start),
        }

    def checked_shapes(
        self, number: int, descriptor: int, layout: Layout
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return (rows, 3) shapes, and where each map begins, for the stages of a shard whose maps differ in size.

        `descriptor` and `layout` are those of its file. Raises DamagedError if its arrays are not those of the plan.
        """
        shapes: dict[str, np.ndarray] = {}
        starts: dict[str, np.ndarray] = {}
        try:
            for stage in self.plan.outputs:
                if stage.is_ragged:
                    array = layout.arrays[stage.name + SHAPES]
                    if array.dtype != "uint32" or array.shape != (len(self.plan.shard(number)), 3):
                        raise ValueError("shapes that are none")
                    shapes[stage.name] = read_rows(descriptor, array, 0, array.shape[0])
                    if (shapes[stage.name][:, 0] != stage.shape[0]).any():
                        raise ValueError("shapes of other channels")
                    starts[stage.name] = starts_of(shapes[stage.name], layout.arrays[stage.name].shape[0])
            found = {name: (array.dtype, array.shape) for name, array in layout.arrays.items()}
            if found != self.plan.arrays(number, shapes):
                raise ValueError("other arrays")
        except (KeyError, IndexError, ValueError, EOFError) as error:
            raise DamagedError(
                f"shard {shown(self.shard_path(number))}: its arrays are not as planned",
                "delete its record, and the next extract makes the shard again",
            ) from error
        return shapes, starts

    def numbered(self, suffix: str, names: Sequence[str] | None = None) -> list[int]:
        """Return the numbers of shards that have a file of this kind, in order."""
        of_kind = re.compile(r"(\d{5,})" + re.escape(suffix))
        found = map(of_kind.fullmatch, self.names() if names is None else names)
        numbers = {int(name[1]) for name in found if name and name[1] == f"{int(name[1]):05d}"}
        return sorted(number for number in numbers if number < self.plan.num_shards)

    def refuse_damaged_shards(self) -> None:
        """Raise DamagedError if the header of a committed shard shows that it is damaged, or of another dump."""
        damaged = sorted(self.committed().damaged)
        if damaged:
            raise DamagedError(
                f"dump {shown(self.path)}: {counted(len(damaged), 'shard file')}"
                f" {'is' if len(damaged) == 1 else 'are'} gone or of another size, first"
                f" {self.shard_path(damaged[0]).name}",
                "run its extract command again, which makes them anew",
            )
        for number in self.numbered(".json"):
            self.refuse_foreign_file(number)

    def unrecorded(self, names: Sequence[str] | None = None) -> list[int]:
        """Return the shards with a file and no record: a kill came between the two, or somebody copied the file."""
        names = self.names() if names is None else names
        return sorted({*self.numbered(self.format.SUFFIX, names)} - {*self.numbered(".json", names)})

    def refuse_foreign_file(self, number: int) -> None:
        """Raise DamagedError if the file of a shard is complete and says that it belongs to another dump."""
        path = self.shard_path(number)
        try:
            attributes = self.format.read_layout(str(path), None).attributes
        except DamagedError:  # it belongs to no dump, so it is made again
            return
        if attributes != self.attributes(number):
            raise DamagedError(f"shard {shown(path)}: it belongs to another dump", COMPARE_PLANS)

    def _records_before(self) -> Iterator[dict[str, Any]]:
        """Yield the former records of shards that are made again, if they can be read.

        They know which images failed.
        """
        names = self.names()
        committed = {*self.numbered(".json", names)}
        for suffix in (".json" + ASIDE, ".json" + BEFORE):
            for number in {*self.numbered(suffix, names)} - committed:
                path = self.path / SHARDS / f"{number:05d}{suffix}"
                with suppress(DamagedError):
                    yield read_record(path, self.plan, number, self.shard_path(number).name)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in the order of shards. Raises DamagedError for one that is damaged or foreign."""
        for number in self.numbered(".json"):
            yield self.record_of(number)

    def record_of(self, number: int) -> dict[str, Any]:
        """Return the record of a shard. Raises DamagedError if it is damaged or foreign."""
        return read_record(self.record_path(number), self.plan, number, self.shard_path(number).name)

    def is_committed(self, number: int) -> bool:
        """Return whether a shard has a record, and a file that fits the record."""
        return is_there(self.record_path(number)) and not self._is_damaged(self.record_of(number))

    def is_complete(self) -> bool:
        """Return whether the manifest exists."""
        return is_there(self.path / MANIFEST)


def _parsed(lines: Sequence[bytes]) -> list[tuple[str, int]]:
    """Return (key, size) of each line of images.jsonl. Raises KeyError, TypeError and ValueError."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # at once, which takes a third of the time
    except ValueError as error:  # it names a line of these, not of the file
        raise ValueError("a line that is no JSON") from error
    if len(found) != len(lines):
        raise ValueError("a line is none")
    images = [(image["key"], image["bytes"]) for image in found]
    if not all(isinstance(key, str) and type(size) is int for key, size in images):
        raise ValueError("a key or a size that is none")
    os.fsencode("".join(key for key, _ in images))  # raises for a name that no file can have
    return images


@contextmanager
def unmoved(path: Path) -> Iterator[None]:
    """Raise MachineError if the dump's folder is another one when the block ends: nothing is known about the dump then.

    A mount that goes away leaves an empty folder, in which everything is missing.
    """
    before = [identity(folder) for folder in (path, path / SHARDS)]
    yield
    if [identity(folder) for folder in (path, path / SHARDS)] != before:
        raise MachineError(f"dump {shown(path)}: it is no longer there, or another folder is in its place", RESUMES)


def _way_out(path: Path) -> str:
    """Return what can be done if the plan cannot be read."""
    if is_there(path / MANIFEST):
        return "featcli verify --repair writes it anew from manifest.json"
    return "start anew with --overwrite: what cannot be trusted cannot be resumed"


def no_dump(path: str | os.PathLike[str]) -> UsageError:
    """Return the error for a path that was named as a dump and is none."""
    what = (
        "there is no plan.json in it" if state_at(path, follow_links=False) is not None else "there is no such folder"
    )
    return UsageError(f"dump {shown(path)}: {what}", "give the folder that extract -o made")


def in_use(path: Path) -> ConflictError:
    """Return the error for a dump that another process works on, in a way that forbids what was asked."""
    return ConflictError(
        f"dump {shown(path)}: it is in use by another process", "wait until it has ended, or use another -o"
    )


def _size(num_bytes: int) -> str:
    return "no file" if num_bytes == MISSING else f"{num_bytes} bytes"
