"""Report what a worker in another process does as one run: nothing twice if a worker dies and another begins again."""

from __future__ import annotations

from typing import Any

from featcli.dump.plan import Plan
from featcli.events import Report


class ShardProgress:
    """Passes the events of one worker on to the user. Failures are held back until their shard is committed."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self._plan = plan
        self._report = report
        self._images = 0  # images that were computed and reported, of shards that are not committed
        self._resumed: dict[int, int] = {}  # shard -> rows that were on the disk, of such shards
        self._kept: dict[int, int] = {}  # shard -> rows that are on the disk now, of such shards
        self._failures: list[dict[str, Any]] = []  # failures of such shards, which are not reported yet

    def hear(self, kind: str, facts: dict[str, Any]) -> int | None:
        """Pass an event on if it is due. Returns the number of the shard if one is committed now."""
        if kind == "failure":
            self._failures.append(facts)
            return None
        if kind == "batch":
            self._images += facts["images"]
        elif kind == "resumed":
            self._resumed[facts["shard"]] = facts["rows"]
        elif kind == "kept":
            self._kept[facts["shard"]] = facts["rows"]
        is_there = kind in ("shard", "there")
        if is_there:
            rows = self._plan.shard(facts["shard"])
            resumed = self._resumed.pop(facts["shard"], 0)
            self._kept.pop(facts["shard"], None)
            mine = [failure for failure in self._failures if failure["row"] in rows]
            self._failures = [failure for failure in self._failures if failure["row"] not in rows]
            if kind == "shard" or not facts["images"]:
                self._images -= len(rows) - resumed
            for failure in mine if kind == "shard" else ():
                self._report("failure", **failure)
        self._report(kind, **facts)
        return facts["shard"] if is_there else None

    def take_back(self) -> int:
        """Take back what a lost worker reported but did not commit: another resumes it or makes it again.

        Returns how many images it made whose rows are kept, so that they are resumed.
        """
        made = sum(rows - self._resumed.get(shard, 0) for shard, rows in self._kept.items())
        if self._images:
            self._report("batch", images=-self._images)
        for shard, rows in self._resumed.items():
            self._report("resumed", shard=shard, rows=-rows)
        self._images = 0
        self._resumed.clear()
        self._kept.clear()
        self._failures.clear()
        return made
