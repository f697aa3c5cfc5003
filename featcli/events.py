"""Define what a run reports: events, and the choices that were made, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Report(Protocol):
    """Anything that can be called as `report(kind, **facts)`. `featcli.extract` calls it with every event.

    Events may come from two threads at once. A later version may add events and facts, so take those that you do not
    need as `**facts`. An error that a report raises ends the run.

        choice    name, value, reason: what was chosen, and why. The value of `images` is a number; that of `stages`
                  is a list with the name and shape of each. Some have more facts: `images` has skipped, linked_folders,
                  repeated, excluded and missing; `columns` has kinds; `device` has devices; `weights` has loaded and
                  tensors; `computes` has share; `threads` has decode_threads and decode_processes; `stored` has pool,
                  dtype, format, bytes and bytes_per_image; `dump` and `shards` have shards and shard_rows; `part` has
                  index and count
        warning   text: what may not be as you expect it
        start     images, done, shards, bytes, unfinished_shards: images of the dump, or of the part; how many of them
                  are in committed shards; shards that are to be made, and the bytes that these will have; those of
                  them with rows on the disk, a list with `shard`, `kept` and `rows` of each
        resumed   shard, rows: the run resumes an unfinished shard that has this many rows on the disk. They count as
                  done, but this run did not compute them. 0 if none of them can be used. Less than 0 if a worker died
                  at that shard, which is then resumed again
        batch     images: how many more images are computed. Less than 0 if a worker died: those are computed again
        failure   key, row, reason, detail: of an image that cannot be read
        kept      shard, rows: how many rows of an unfinished shard are on the disk now. 0 if they were of no use
        shard     shard, file, rows, bytes, failed: a shard is committed
        there     shard, rows, images: another process has committed a shard meanwhile. images: how many of its rows
                  did not count as done before
        estimate  images, seconds, bytes, images_per_second: what is left to do, at the pace of the first batches; once,
                  in a run that is expected to take more than a minute
        progress  images, done, safe, failed, images_per_second, seconds, seconds_left: how far the run is, with the
                  first batch after each minute. safe: images that a kill does not lose. seconds: since `start`.
                  Numbers are for the dump, or for the part
        stopped   images, safe: Ctrl-C, SIGTERM or an error ends the run before its time. Numbers are for the dump, or
                  for the part
        end       dump, written, failed, failed_by_reason, extracted, is_complete, pace, pictures, part, shards,
                  missing_shards, seconds, images_per_second, exit_code: the result; most of it is what
                  `featcli.extract` returns. seconds: those of `pace`, without the preparation
        dry_run   stages, outputs, images, shards, bytes, free_bytes, workers, seconds: with --dry-run, in place of all
                  events from `start` on
    """

    def __call__(self, kind: str, **facts: Any) -> None:
        """Take an event."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value, and why it was chosen."""

    value: T
    reason: str


def silent(kind: str, **facts: Any) -> None:
    """Ignore every event."""


def tee(*reports: Report) -> Report:
    """Return a report that passes every event on to several others."""

    def report(kind: str, **facts: Any) -> None:
        for one in reports:
            one(kind, **facts)

    return report
