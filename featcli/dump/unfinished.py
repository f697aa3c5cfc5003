"""Shards that a run began and did not end: their rows that are on the disk, and what is known of them.

The rows lie in the partial file of the shard. A record beside it says how many are on the disk: it is written after
them, and another takes its place when there are more. Whoever takes the shard up reads these rows again and compares
their hashes, so that nothing rests on the record alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcli.dump.atomic_file import PARTIAL_NAME, RECORD, record_of_partial, take_partial
from featcli.dump.checksummed_json import read_checksummed
from featcli.dump.plan import Plan
from featcli.dump.records import check_record, record_content
from featcli.dump.shard import ShardSummary
from featcli.pixels.failure import Failure
from featcli.pixels.traits import Trait
from featcli.system.files import allocated_bytes, is_there, names_in


@dataclass
class RowsMade:
    """What is known of the rows of a shard that are written so far, by whomever."""

    count: int = 0
    failures: list[Failure] = field(default_factory=list)
    traits: list[tuple[int, Counter[Trait]]] = field(default_factory=list)  # of a batch, and the row where it stops
    overflown: Counter[str] = field(default_factory=Counter)  # values that are not finite, by stage
    least_batch: int | None = None  # images that went through the backbone together, where memory allowed no more
    environments: list[Mapping[str, str]] = field(default_factory=list)  # of other processes that made some of them

    def add(self, rows: range, failures: Sequence[Failure], traits: Counter[Trait], overflown: Counter[str]) -> None:
        """The rows of a batch are written."""
        self.count += len(rows)
        self.failures += failures
        self.overflown.update(overflown)
        if traits:
            self.traits.append((rows.stop, traits))

    def cut(self, rows: range) -> None:
        """Forget what is known of rows behind these, which are the first of the shard."""
        self.count = len(rows)
        self.failures = [failure for failure in self.failures if failure.row < rows.stop]
        self.traits = [(stop, traits) for stop, traits in self.traits if stop <= rows.stop]

    @property
    def all_traits(self) -> Counter[Trait]:
        """Of how many pictures each trait is true."""
        return sum((traits for _, traits in self.traits), Counter())

    def to_json(self, plan: Plan, number: int, written: ShardSummary) -> dict[str, Any]:
        """The content of the record."""
        return {
            **record_content(plan, number, written, self.failures),
            "rows": self.count,
            "traits": [[stop, dict(traits)] for stop, traits in self.traits],
            "overflown": dict(self.overflown),
            "least_batch": self.least_batch,
            "environments": [dict(environment) for environment in self.environments],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RowsMade:
        """What a record says that `read` has checked."""
        return cls(
            count=record["rows"],
            failures=[Failure(**failure) for failure in record["failures"]],
            traits=[(stop, Counter(traits)) for stop, traits in record["traits"]],
            overflown=Counter(record["overflown"]),
            least_batch=record["least_batch"],
            environments=record["environments"],
        )


@dataclass(frozen=True)
class Unfinished:
    """The partial file of a shard, and the record beside it: None where it is damaged or foreign, and why.

    The file may have got its name already: the record of the shard was to come next.
    """

    partial: Path
    number: int
    record: Mapping[str, Any] | None
    problem: str = ""

    @property
    def rows(self) -> int:
        """That are on the disk."""
        return 0 if self.record is None else int(self.record["rows"])

    @property
    def stored_bytes(self) -> int:
        """What the file takes of the disk: rows that are not written take nothing. 0 where it is gone."""
        return allocated_bytes(self.partial)

    def remove(self) -> None:
        """Delete both, the record first, unless the one who writes the file lives."""
        taken = take_partial(self.partial)
        if taken is None and is_there(self.partial):
            return
        record_of_partial(self.partial).unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)
        if taken is not None:
            os.close(taken[0])


def unfinished_in(shards: Path, plan: Plan, suffix: str) -> list[Unfinished]:
    """The unfinished shards in a folder, those of which most rows are on the disk first. Raises MachineError.

    `suffix`: of shard files. A partial file without a record is of no use to anybody, and left out.
    """
    found = []
    for name in sorted(names_in(shards)):
        named = PARTIAL_NAME.fullmatch(name.removesuffix(RECORD)) if name.endswith(RECORD) else None
        number = named[1].removesuffix(suffix) if named is not None and named[1].endswith(suffix) else ""
        if number.isdecimal() and int(number) < plan.num_shards and number == f"{int(number):05d}":
            found.append(_read(shards / name.removesuffix(RECORD), plan, int(number)))
    return sorted(found, key=lambda one: -one.rows)


def _read(partial: Path, plan: Plan, number: int) -> Unfinished:
    try:
        record = read_checksummed(record_of_partial(partial))
        _check(record, plan, number, partial.name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Unfinished(partial, number, None, str(error))
    return Unfinished(partial, number, record)


def _check(record: Mapping[str, Any], plan: Plan, number: int, file_name: str) -> None:
    """Raise ValueError, TypeError or KeyError where a field is not what its readers rely on."""
    rows, count = plan.shard(number), record["rows"]
    if type(count) is not int or not 0 < count <= len(rows):
        raise ValueError("a number of rows that is none")
    check_record(record, plan, number, file_name, count)
    stops = [stop for stop, _ in record["traits"]]
    counts = [count for _, traits in record["traits"] for count in traits.values()]
    counts += record["overflown"].values()
    if not all(type(one) is int and one >= 0 for one in (*stops, *counts, record["least_batch"] or 0)):
        raise ValueError("counts that are none")
    if any(type(text) is not str for environment in record["environments"] for text in environment.values()):
        raise ValueError("environments that are none")
