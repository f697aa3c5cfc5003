"""What is committed of a dump, from one look at all its records: a large one has very many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Committed:
    """Shards with a record, and what those records say that matters to a run that goes on."""

    num_shards: int  # of the plan
    damaged: set[int] = field(default_factory=set)  # their file is gone, or of another size than the record says
    failed: set[int] = field(default_factory=set)  # they have images that could not be read
    failed_rows: set[int] = field(default_factory=set)  # those images, and those of shards that are being made again
    sizes: dict[int, int] = field(default_factory=dict)  # row -> bytes, of images that failed, and were read later
    _there: set[int] = field(default_factory=set)

    def add(self, record: Mapping[str, Any], is_damaged: bool) -> None:
        """A shard that is there."""
        self._there.add(record["shard"])
        if is_damaged:
            self.damaged.add(record["shard"])
        if record["failures"]:
            self.failed.add(record["shard"])
        self.remember((record,))

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """What is said of images, by records of shards that need not be there any more."""
        for record in records:
            self.failed_rows.update(failure["row"] for failure in record["failures"])
            self.sizes.update((int(row), size) for row, size in record.get("sizes", {}).items())

    @property
    def unfinished(self) -> list[int]:
        """The shards that are not there whole, in order."""
        whole = self._there - self.damaged
        return [number for number in range(self.num_shards) if number not in whole]
