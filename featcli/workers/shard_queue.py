"""Know which shards are left, also those whose worker died. Every engine with several workers asks here."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

from featcli.errors import WorkerError, counted

TRIES = 3  # for a shard that gets no further, and for starting workers


def at_shards(numbers: Iterable[int]) -> str:
    """Say for messages which shard a worker was making; "" if there is none."""
    one_of = " or ".join(map(str, sorted(numbers)))
    return f" at shard {one_of}" if one_of else ""


class ShardQueue:
    """Shards in order, then those whose worker died, each of which is given to a worker alone.

    A worker may have several shards at once. If it has only one, the next death says which shard it was. `given_up`
    holds the shards at which workers died again and again without getting further, with the last words about each.
    `rows_kept` returns how many rows of each unfinished shard are on the disk now.
    """

    def __init__(self, shards: Iterable[int], rows_kept: Callable[[], Mapping[int, int]]) -> None:
        self.given_up: dict[int, str] = {}
        self._new = deque(shards)
        self._again: deque[int] = deque()
        self._at_work: set[int] = set()
        self._rows_kept = rows_kept
        self._most_kept = Counter(rows_kept())  # of each shard, before any death that counts
        self._deaths: Counter[int] = Counter()  # of each shard, since rows of it were last kept
        self._failed_starts = 0  # in a row

    @property
    def num_new(self) -> int:
        """How many shards were not tried yet."""
        return len(self._new)

    @property
    def has_waiting(self) -> bool:
        """Whether there is a shard that nobody is making."""
        return bool(self._new or self._again)

    @property
    def is_over(self) -> bool:
        """Whether every shard is done or given up."""
        return not (self.has_waiting or self._at_work)

    @property
    def wants_workers(self) -> bool:
        """Whether another worker would have work, and the last ones did not all die while they started."""
        return self.has_waiting and self._failed_starts < TRIES

    def worker_started(self) -> None:
        """Note that a worker has loaded the backbone."""
        self._failed_starts = 0

    def take_new(self) -> int | None:
        """Return a shard that was not tried before, or None."""
        return self._taken(self._new) if self._new else None

    def take_again(self) -> int | None:
        """Return a shard that was tried before, or None. Its worker must make nothing else meanwhile."""
        return self._taken(self._again) if self._again and not self._new else None

    def _taken(self, waiting: deque[int]) -> int:
        number = waiting.popleft()
        self._at_work.add(number)
        return number

    def done(self, number: int) -> None:
        """Note that a shard is committed."""
        self._at_work.discard(number)

    def died(self, shards: Iterable[int], why: str, had_started: bool, is_last: bool) -> None:
        """Note that the worker of these shards is gone. Raises WorkerError if it was the last and none can start."""
        shards, kept = list(shards), self._rows_kept()
        got_further = any(kept.get(number, 0) > self._most_kept[number] for number in shards)
        for number in shards:
            self._at_work.discard(number)
            self._most_kept[number] = max(self._most_kept[number], kept.get(number, 0))
            self._deaths[number] = 0 if got_further else self._deaths[number] + 1
            if self._deaths[number] < TRIES:
                self._again.append(number)
            else:
                self.given_up[number] = why
        self._failed_starts = 0 if had_started else self._failed_starts + 1
        if self._failed_starts >= TRIES and is_last:
            raise WorkerError(
                f"{TRIES} workers died before they could begin, the last one {why}", "read the messages above"
            )

    def refuse_given_up(self) -> None:
        """Raise WorkerError if shards were given up."""
        if self.given_up:
            number, why = next(iter(self.given_up.items()))
            others = "" if len(self.given_up) == 1 else f" (and {counted(len(self.given_up) - 1, 'other shard')})"
            raise WorkerError(
                f"shard {number}{others} was given up after {TRIES} workers died at it without keeping more rows,"
                f" the last one {why}",
                "all other shards are committed; the same command tries again: with one --device it says more",
            )
