"""Count from events how far a run is (images done and safe, pace, time left), and show it each minute or as a bar."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from featcli.errors import counted, duration, printable
from featcli.events import Report

GRACE = 10.0  # seconds that a `progress` event waits for rows that are being put on the disk
MINUTE = 60.0  # seconds between two `progress` events; a run that takes longer begins with an estimate
SETTLED = 5.0  # seconds of computing after which the pace is good enough for an estimate
WINDOW = 5  # minutes over which the pace is measured
Clock = Callable[[], float]  # returns seconds


class Progress:
    """Counts of a run. It is told all events of the run, in any thread.

    `images` are all images of the run. `done` are those that are on the disk, also in unfinished shards, that others
    make, or that were computed. `computed` are those that this run computed. `safe` are those that a kill does not
    lose, or None if no shards are made.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.has_started = self.makes_shards = False
        self.images = self.done = self.computed = self.failed = 0
        self._bytes = self._to_do = 0  # of the shards to be made; the images of these shards
        self._clock = clock
        self._committed = 0
        self._kept: dict[int, int] = {}  # unfinished shard -> its rows on the disk
        self._found: dict[int, int] = {}  # the same for shards that are still to be resumed; `done` includes these rows
        self._started = 0.0
        self._paces: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)  # (time, computed by then), a minute apart
        self._lock = threading.Lock()

    @property
    def safe(self) -> int | None:
        """Images whose rows are on the disk."""
        return self._committed + sum(self._kept.values()) if self.makes_shards else None

    @property
    def bytes_left(self) -> int:
        """The bytes of the images that are not done."""
        return self._bytes * max(0, self.images - self.done) // max(1, self._to_do)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return self._clock() - self._started

    @property
    def seconds_of_pace(self) -> float:
        """Seconds over which the pace is measured; 0 before the second batch."""
        return self._clock() - self._paces[0][0] if self._paces else 0.0

    @property
    def rate(self) -> float | None:
        """Images computed per second over the last minutes; None before the first batch."""
        now = self._clock()
        since, before = self._paces[0] if self._paces else (now, 0)
        if now <= since or self.computed <= before:  # only the first batch is computed, so its loading counts, too
            since, before = self._started, 0
        return (self.computed - before) / (now - since) if self.computed > 0 and now > since else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this pace; None if the pace is unknown."""
        rate = self.rate
        return None if rate is None else max(0, self.images - self.done) / rate

    def hear(self, kind: str, **facts: Any) -> int:
        """Count an event. Returns how many more images are done."""
        with self._lock:
            before = self.done
            if kind == "start":
                self._start(**facts)
            elif kind == "batch":
                self.done += facts["images"]
                self.computed += facts["images"]
                if not self._paces:  # time before the first batch, such as the loading of workers, does not count
                    self.mark()
            elif kind == "resumed":
                self.done += facts["rows"] - self._found.pop(facts["shard"], 0)
                if facts["rows"] > 0:
                    self._kept[facts["shard"]] = facts["rows"]
            elif kind == "kept":
                self._kept[facts["shard"]] = facts["rows"]
            elif kind in ("shard", "there"):
                self._kept.pop(facts["shard"], None)
                self._committed += facts["rows"]
                self.done += facts.get("images", 0) - self._found.pop(facts["shard"], 0)
            elif kind == "failure":
                self.failed += 1
            return self.done - before

    def mark(self) -> None:
        """Note how far the run is now, to measure the pace from."""
        self._paces.append((self._clock(), self.computed))

    def facts(self) -> dict[str, Any]:
        """Return the facts of a `progress` event."""
        rate, left = self.rate, self.seconds_left
        return {
            "images": self.images,
            "done": self.done,
            "safe": self.safe,
            "failed": self.failed,
            "images_per_second": None if rate is None else round(rate, 3),
            "seconds": round(self.seconds, 3),
            "seconds_left": None if left is None else round(left, 3),
        }

    def _start(
        self,
        images: int,
        done: int,
        shards: int | None = None,
        bytes: int = 0,
        unfinished_shards: Iterable[Mapping[str, int]] = (),
    ) -> None:
        self.has_started, self.makes_shards, self._started = True, shards is not None, self._clock()
        self._found = {one["shard"]: one["kept"] for one in unfinished_shards}
        self._kept = dict(self._found)
        self.images, self.done, self._committed = images, done + sum(self._found.values()), done
        self._bytes, self._to_do = bytes, images - done


class ProgressReport:
    """A report that passes every event on to another, and adds `estimate` and `progress` when they are due."""

    def __init__(self, report: Report, clock: Clock = time.monotonic) -> None:
        self.progress = Progress(clock)
        self._report = report
        self._due = MINUTE  # in seconds of the run
        self._has_estimated = False

    def __call__(self, kind: str, **facts: Any) -> None:
        """Pass an event on."""
        self.progress.hear(kind, **facts)
        self._report(kind, **facts)
        if kind == "batch" and not self._has_estimated and self.progress.seconds_of_pace >= SETTLED:
            self._estimate()
        waits = {"kept": 0.0, "shard": 0.0, "batch": GRACE if self.progress.makes_shards else 0.0}
        if kind in waits and self.progress.seconds >= self._due + waits[kind]:
            self._report("progress", **self.progress.facts())
            self.progress.mark()
            self._due = self.progress.seconds + MINUTE

    def _estimate(self) -> None:
        self._has_estimated = True
        facts = self.progress.facts()
        if self.progress.makes_shards and (facts["seconds_left"] or 0) > MINUTE:
            self._report(
                "estimate",
                images=facts["images"] - facts["done"],
                seconds=facts["seconds_left"],
                bytes=self.progress.bytes_left,
                images_per_second=facts["images_per_second"],
            )


class ProgressBar:
    """A bar for the events of a run, in a terminal or a notebook. It shows nothing anywhere else."""

    def __init__(self, stream: TextIO, work: str = "extracting", unit: str = "images", leave: bool = True) -> None:
        self._stream, self._work, self._unit, self._leave = stream, work, unit, leave
        self._progress = Progress()
        self._bar: Any = None

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar now."""
        return self._bar is not None

    def hear(self, kind: str, **facts: Any) -> None:
        """Move the bar by an event."""
        done = self._progress.hear(kind, **facts)
        if kind == "start":
            self._open()
        elif kind in ("end", "stopped"):
            self.close()
        elif self._bar is not None:
            self._move(kind, done)

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open(self) -> None:
        if self._stream.isatty():
            from tqdm import tqdm
        elif "ipykernel" in sys.modules:
            from tqdm.auto import tqdm
        else:
            return
        self._bar = tqdm(
            total=self._progress.images, initial=self._progress.done, desc=self._work, unit=f" {self._unit}",
            file=self._stream, leave=self._leave, dynamic_ncols=True,
        )  # fmt: skip

    def _move(self, kind: str, done: int) -> None:
        if kind == "batch":
            self._bar.update(done)
            return
        self._bar.initial += done  # these were not computed, so they must not count for the pace of the bar
        self._bar.last_print_n += done
        self._bar.n += done
        if kind in ("resumed", "there", "kept", "shard", "failure"):
            failed = f", {self._progress.failed:,} failed" if self._progress.failed else ""
            self._bar.set_postfix_str(f"{self._progress.safe:,} safe{failed}")


def progress_bar(stream: TextIO | None = None) -> Report:
    """Return a report for scripts and notebooks: `featcli.extract(..., report=featcli.progress_bar())`.

    It shows a bar with the images that are done and safe, and prints warnings. If `stream` (by default stderr) is no
    terminal and this is no notebook, it prints a line a minute instead. Make a new one for each run.
    """
    bar = ProgressBar(sys.stderr if stream is None else stream)

    def report(kind: str, **facts: Any) -> None:
        bar.hear(kind, **facts)
        if kind == "warning":
            bar.say(printable(f"warning: {facts['text']}"))
        elif kind == "progress" and not bar.is_shown:
            bar.say(progress_line(facts))
        elif kind == "stopped":
            bar.say(stopped_line(facts))

    return report


def progress_line(facts: Mapping[str, Any]) -> str:
    """Return one line about a `progress` event for people."""
    share = f" ({facts['done'] / facts['images']:.0%})" if facts["images"] else ""
    failed = f", {facts['failed']:,} failed" if facts["failed"] else ""
    rate, left = facts["images_per_second"], facts["seconds_left"]
    pace = "" if rate is None else f", {shown_rate(rate)}, {duration(left)} left"
    safe = "" if facts["safe"] is None else f", {facts['safe']:,} safe"
    return f"{facts['done']:,} of {counted(facts['images'], 'image')}{share}{safe}{failed}{pace}"


def stopped_line(facts: Mapping[str, Any]) -> str:
    """Return one line about a `stopped` event for people."""
    return f"stopped: {facts['safe']:,} of {counted(facts['images'], 'image')} are safe"


def shown_rate(rate: float) -> str:
    """Return images per second for people. Slow rates have three digits."""
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"
