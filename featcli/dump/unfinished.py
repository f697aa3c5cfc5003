"""Know the shards that a run began and did not finish: their rows on the disk, and what is known about these.

The rows lie in a partial file of the shard. A record beside it names that file and says how many rows are on the disk.
It is written after the rows, and replaced when there are more. Whoever resumes the shard reads these rows again and
compares their hashes, so that nothing rests on the record alone. If several processes make one shard at the same time,
the one with most rows has the record.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcli.dump.atomic_file import PARTIAL_NAME, remove_stale, take_partial
from featcli.dump.checksummed_json import read_checksummed, why_refused
from featcli.dump.plan import Plan
from featcli.dump.records import ForeignRecordError, check_record, record_content, split_digests
from featcli.dump.shard import ShardSummary
from featcli.pixels.failure import Failure
from featcli.pixels.traits import Trait
from featcli.system.files import allocated_bytes, is_there, names_in

RECORD_NAME = re.compile(r"\.(\d{5,})\.unfinished\.json")


@dataclass
class RowsMade:
    """What is known about the rows of a shard that are written so far, whoever wrote them."""

    count: int = 0
    failures: list[Failure] = field(default_factory=list)
    traits: list[tuple[int, Counter[Trait]]] = field(default_factory=list)  # of a batch, and the row where it stops
    overflown: list[tuple[int, Counter[str]]] = field(default_factory=list)  # values not finite by stage, likewise
    digests: list[str] = field(default_factory=list)  # of the file of each row, hex
    least_batch: int | None = None  # images that went through the backbone together, where memory allowed no more
    environments: list[Mapping[str, str]] = field(default_factory=list)  # of other processes that made some of them

    def add(
        self,
        rows: range,
        failures: Sequence[Failure],
        traits: Counter[Trait],
        overflown: Counter[str],
        digests: Sequence[str],
    ) -> None:
        """Note that the rows of a batch are written."""
        self.count += len(rows)
        self.digests += digests
        self.failures += failures
        if overflown:
            self.overflown.append((rows.stop, overflown))
        if traits:
            self.traits.append((rows.stop, traits))

    def cut(self, rows: range) -> None:
        """Forget what is known about rows after these, which are the first of the shard."""
        self.count = len(rows)
        del self.digests[len(rows) :]
        self.failures = [failure for failure in self.failures if failure.row < rows.stop]
        self.traits = [(stop, traits) for stop, traits in self.traits if stop <= rows.stop]
        self.overflown = [(stop, overflown) for stop, overflown in self.overflown if stop <= rows.stop]

    @property
    def all_traits(self) -> Counter[Trait]:
        """How many pictures have each trait."""
        return sum((traits for _, traits in self.traits), Counter())

    @property
    def all_overflown(self) -> Counter[str]:
        """How many values of each stage are not finite."""
        return sum((overflown for _, overflown in self.overflown), Counter())

    def to_json(self, plan: Plan, number: int, written: ShardSummary) -> dict[str, Any]:
        """Return the content of the record."""
        return {
            **record_content(plan, number, written, self.failures, self.digests),
            "rows": self.count,
            "traits": [[stop, dict(traits)] for stop, traits in self.traits],
            "overflown": [[stop, dict(overflown)] for stop, overflown in self.overflown],
            "least_batch": self.least_batch,
            "environments": [dict(environment) for environment in self.environments],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RowsMade:
        """Return what a record says that `read` has checked."""
        return cls(
            count=record["rows"],
            failures=[Failure(**failure) for failure in record["failures"]],
            traits=[(stop, Counter(traits)) for stop, traits in record["traits"]],
            overflown=[(stop, Counter(overflown)) for stop, overflown in record["overflown"]],
            digests=split_digests(record.get("digests", "")),
            least_batch=record["least_batch"],
            environments=record["environments"],
        )


@dataclass(frozen=True)
class Unfinished:
    """The record of an unfinished shard: its `content`, or why it has none."""

    path: Path
    number: int
    content: Mapping[str, Any] | None
    problem: str = ""
    is_foreign: bool = False  # it is complete, but of another plan or another shard

    @property
    def rows(self) -> int:
        """How many rows are on the disk."""
        return 0 if self.content is None else int(self.content["rows"])

    @property
    def partial(self) -> Path | None:
        """The file with the rows.

        It may have its final name, if the process stopped just before it wrote the shard's record.
        """
        return None if self.content is None else self.path.with_name(self.content["file"])

    @property
    def stored_bytes(self) -> int:
        """The bytes that the file takes on the disk. Rows that are not written take nothing; 0 if it is gone."""
        return 0 if self.partial is None else allocated_bytes(self.partial)

    def remove(self) -> None:
        """Delete the record, and the file as `remove_partial` does."""
        self.path.unlink(missing_ok=True)
        self.remove_partial()

    def remove_partial(self) -> None:
        """Delete the file, unless its writer lives or nobody can tell: without the file a writer cannot commit."""
        if self.partial is not None:
            _remove_partial(self.partial)


def record_path(shards: Path, number: int) -> Path:
    """Return the path of the record of an unfinished shard."""
    return shards / f".{number:05d}.unfinished.json"


def read_unfinished(shards: Path, plan: Plan, number: int) -> Unfinished | None:
    """Return the record of an unfinished shard, or None. Raises MachineError."""
    path = record_path(shards, number)
    if not is_there(path):
        return None
    try:
        record = read_checksummed(path)
        _check(record, plan, number)
    except ForeignRecordError as error:
        return Unfinished(path, number, None, str(error), is_foreign=True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Unfinished(path, number, None, f"its record is damaged ({why_refused(error)})")
    return Unfinished(path, number, record)


def unfinished_in(shards: Path, plan: Plan, names: Iterable[str]) -> list[Unfinished]:
    """Return the unfinished shards in a folder that holds these names, in order. Raises MachineError."""
    records = map(RECORD_NAME.fullmatch, names)
    numbers = sorted({int(name[1]) for name in records if name and int(name[1]) < plan.num_shards})
    found = (read_unfinished(shards, plan, number) for number in numbers)
    return [one for one in found if one is not None]


def remove_partials(final: Path) -> None:
    """Remove the partial files of a committed shard, except those whose writers are known to live.

    On a file system without locks nobody can tell who lives, so partial files stay until their shard is committed.
    """
    for name in names_in(final.parent):
        named = PARTIAL_NAME.fullmatch(name)
        if named is not None and named[1] == final.name:
            _remove_partial(final.with_name(name), even_unlocked=True)


def _remove_partial(path: Path, even_unlocked: bool = False) -> None:
    with suppress(PermissionError):  # it belongs to another user
        taken = take_partial(path)
        if taken is None:
            return
        descriptor, is_locked = taken
        try:
            if is_locked or even_unlocked:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def remove_unused(shards: Path) -> None:
    """Remove the partial files of dead processes, except those that the record of an unfinished shard names."""
    named = {named_file(shards / name) for name in names_in(shards) if RECORD_NAME.fullmatch(name)}
    remove_stale(shards, keep=named)


def named_file(record: Path) -> str:
    """Return the name of the file with the rows by a record that anybody may have written; "" if it names none."""
    with suppress(ValueError):
        return str(read_checksummed(record).get("file"))
    return ""


def _check(record: Mapping[str, Any], plan: Plan, number: int) -> None:
    """Raise ValueError, TypeError or KeyError if a field is not what its readers rely on."""
    count = record["rows"]
    check_record(record, plan, number, record["file"], count)  # first: another plan's record may be right in itself
    if type(count) is not int or not 0 < count <= len(plan.shard(number)):
        raise ValueError("a number of rows that is none")
    named = PARTIAL_NAME.fullmatch(record["file"])
    if named is None or os.sep in named[1] or Path(named[1]).stem != f"{number:05d}":
        raise ValueError("a file that is none")
    counted = [*record["traits"], *record["overflown"]]
    stops = [stop for stop, _ in counted]
    counts = [count for _, of_batch in counted for count in of_batch.values()]
    if not all(type(one) is int and one >= 0 for one in (*stops, *counts, record["least_batch"] or 0)):
        raise ValueError("counts that are none")
    if any(type(text) is not str for environment in record["environments"] for text in environment.values()):
        raise ValueError("environments that are none")
