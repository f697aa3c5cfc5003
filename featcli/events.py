"""What a run reports: events for whoever listens, and the choices that were made, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Report(Protocol):
    """Anything that can be called as `report(kind, **facts)`: `featcli.extract` tells it what happens, event by event.

    Events may come from two threads at once. A later version may add events, and facts to an event: take those that you
    do not need as `**facts`. What a report raises ends the run.

        choice    name, value, reason: what was chosen, and why. The value of `images` is a number, that of `stages` a
                  list with the name and shape of each; `dump` has the numbers shards and shard_rows, too
        warning   text: what may not be as you expect it
        start     images, done, shards, bytes, unfinished_shards: images of the dump, or of the part; how many of them
                  are in committed shards; shards that are to be made, and the bytes that these will have; of which of
                  these so many of the `rows` are `kept` on the disk: a list with `shard`, `kept` and `rows` of each
        resumed   shard, rows: an unfinished shard is taken up, and so many of its rows are on the disk: they are done,
                  but not computed by this run. 0 where none of them can be taken up. Less than 0 where a worker died at
                  that shard, which is taken up again
        batch     images: so many more are computed. Less than 0 where a worker died: those are computed again
        failure   key, row, reason, detail: an image that cannot be read
        kept      shard, rows: so many rows of an unfinished shard are on the disk now. 0 where they were of no use
        shard     shard, file, rows, bytes, failed: a shard is committed
        there     shard, rows, images: another process has committed a shard meanwhile. images: those of its rows that
                  were not counted as done before
        estimate  images, seconds, bytes, images_per_second: what is left to do, at the pace of the first batches; once,
                  in a run that is expected to take more than a minute
        progress  images, done, safe, failed, images_per_second, seconds, seconds_left: how far the run is, with the
                  first batch after each minute. safe: images that a kill does not lose. seconds: since `start`.
                  Images are those of the dump, or of the part
        stopped   images, safe: the run ends before its time, by Ctrl-C, SIGTERM or an error. Images are those of the
                  dump, or of the part
        end       dump, written, failed, failed_by_reason, extracted, is_complete, pace, pictures, part, shards,
                  missing_shards, exit_code: what came of it; most is what `featcli.extract` returns
        dry_run   stages, images, shards, bytes, free_bytes, workers, seconds: with --dry-run, in place of all from
                  `start` on
    """

    def __call__(self, kind: str, **facts: Any) -> None:
        """Hear of an event."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value and why it is that value."""

    value: T
    reason: str


def silent(kind: str, **facts: Any) -> None:
    """Say nothing."""


def tee(*reports: Report) -> Report:
    """Tell several."""

    def report(kind: str, **facts: Any) -> None:
        for one in reports:
            one(kind, **facts)

    return report
