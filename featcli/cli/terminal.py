"""Say what a run does: events for programs, lines and a bar for people. Everything but results goes to stderr."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from featcli.errors import NOTHING_READ, counted, duration, most_first, printable, shown, shown_shape, size
from featcli.run.progress import MINUTE, ProgressBar, progress_line, shown_rate, stopped_line
from featcli.run.stats import Throughput

FAILURES_SHOWN = 5
A_KILL = "a kill costs"
LABEL = re.compile(r"[a-z_ ]{14} (?=\S)")  # the beginning of a line that says what was chosen
_one_line_at_a_time = threading.Lock()


class JsonLines:
    """Prints each event as a line of JSON on stdout: results for programs.

    The run continues if nobody reads them any more.
    """

    def __init__(self) -> None:
        self.is_read = sys.stdout is not None  # the parent may have closed it

    def __call__(self, kind: str, **facts: Any) -> None:
        """Print an event."""
        if kind != "batch" and self.is_read:
            with _one_line_at_a_time:  # events come from the main thread and the writer thread
                try:
                    sys.stdout.write(json.dumps({"type": kind, **facts}) + "\n")
                    sys.stdout.flush()
                except BrokenPipeError:
                    self.is_read = False


class Terminal:
    """Prints choices, a bar if stderr is a terminal, the first failures, and a summary."""

    def __init__(
        self, verbose: bool = False, stream: TextIO | None = None, work: str = "extracting", unit: str = "images"
    ) -> None:
        self._stream = stream or sys.stderr or io.StringIO()  # the parent may have closed it
        self._bar = ProgressBar(self._stream, work, unit, leave=False)
        self._verbose = verbose
        self._failures = 0

    def __call__(self, kind: str, **facts: Any) -> None:
        """Handle an event with the method of its name, if there is one."""
        self._bar.hear(kind, **facts)
        handle = getattr(self, f"_on_{kind}", None)
        if handle is not None:
            handle(**facts)

    def close(self) -> None:
        """Leave the terminal as it was, whatever happened."""
        self._bar.close()

    def _on_choice(self, name: str, value: Any, reason: str = "", **_: Any) -> None:
        if reason != "default" or self._verbose:  # a default needs no line
            self._say(f"{name:<14} {_shown_value(value)}{f'  ({reason})' if reason else ''}")

    def _on_warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _on_estimate(self, images: int, seconds: float, bytes: int, images_per_second: float) -> None:
        what = f"{counted(images, 'more image')} in {duration(seconds)}, {size(bytes)}"
        is_long = seconds >= 2 * MINUTE  # if the run is shorter, a minute is most of it
        cost = f"{A_KILL} at most a minute of it and the batches at hand" if is_long else "Ctrl-C keeps what is done"
        self._say(f"{'expected':<14} {what}  ({shown_rate(images_per_second)}; {cost})")

    def _on_start(self, shards: int = 0, **_: Any) -> None:
        if shards and self._verbose:
            self._say_what_a_kill_costs()

    def _on_progress(self, **facts: Any) -> None:
        if not self._bar.is_shown:
            self._say(progress_line(facts))

    def _on_failure(self, key: str, reason: str, detail: str, **_: Any) -> None:
        self._failures += 1
        if self._verbose or self._failures <= FAILURES_SHOWN:
            self._say(f"failed {shown(key)}: {reason} ({detail})")
        elif self._failures == FAILURES_SHOWN + 1:
            self._say("more images failed: failures.jsonl will name all, -v shows them here")

    def _on_shard(self, shard: int, rows: int, file: str, **_: Any) -> None:
        if self._verbose:
            self._say(f"committed {file}: {counted(rows, 'image')}")

    def _say_what_a_kill_costs(self) -> None:
        cost = "those of the last minute at most, and the batches at hand"
        self._say(f"{'safety':<14} rows are put on the disk every minute: {A_KILL} {cost}")

    def _on_resumed(self, shard: int, rows: int) -> None:
        if self._verbose and rows > 0:
            self._say(f"resumed shard {shard}: {counted(rows, 'image')} of it were on the disk")

    def _on_stopped(self, **facts: Any) -> None:
        self._say(stopped_line(facts))

    def _on_end(self, **facts: Any) -> None:
        self._say(summary(facts))

    def _on_dry_run(
        self, bytes: int, free_bytes: int, shards: int, images: int, workers: int, seconds: float | None, **_: Any
    ) -> None:
        self._say(
            f"{'would write':<14} {counted(images, 'image')} in {counted(shards, 'shard')}, {size(bytes)}"
            f"; {size(free_bytes)} free"
        )
        if seconds is not None:
            self._say(f"{'would take':<14} {duration(seconds)} with {counted(workers, 'worker')}")
        if self._verbose or (seconds or 0) > MINUTE:
            self._say_what_a_kill_costs()

    def _say(self, text: str) -> None:
        self._bar.say(folded(printable(text), self._stream))


def quiet(kind: str, **facts: Any) -> None:
    """Print only what -q allows: how many images failed, or are safe after a run was stopped."""
    if kind == "end" and facts["failed"] and facts["exit_code"] != NOTHING_READ:
        print(printable(some_failed(**facts)), file=sys.stderr or io.StringIO())
    elif kind == "stopped":
        print(stopped_line(facts), file=sys.stderr or io.StringIO())


def some_failed(
    dump: str, written: int, failed: int, failed_by_reason: Mapping[str, int], part: str | None = None, **_: Any
) -> str:
    """Return one line about a dump, or a part, in which some images failed."""
    which = f"{_part_of(dump, part)}: {failed:,} of {counted(written + failed, 'image')}"
    return f"{which} failed ({_reasons(failed_by_reason)})"


def _part_of(dump: str, part: str | None) -> str:
    """Return what the counts of a run are about: the dump or its part."""
    return dump if part is None else f"part {part} of {dump}"


def _shown_value(value: Any) -> str:
    """Return a value that was chosen, for people."""
    if isinstance(value, list):  # stages
        return ", ".join(f"{one['name']} {shown_shape(one['shape'])}" for one in value)
    return f"{value:,}" if type(value) is int else str(value)


def summary(end: dict[str, Any]) -> str:
    """Return the last lines of a run, for people."""
    lines = []
    is_idle = end["part"] and not end["written"] + end["failed"]
    failed = f", {end['failed']:,} failed ({_reasons(end['failed_by_reason'])})"
    if end["extracted"]:
        pace = Throughput(**end["pace"])
        rate = f"{end['extracted'] / pace.seconds:.1f} images/s"
        before = f" after {pace.preparation:.1f} s of preparation"
        lines.append(f"extracted {counted(end['extracted'], 'image')} in {pace.seconds:.1f} s{before}, {rate}")
        lines += [f"  {line}" for line in pace.lines()]
    else:
        lines.append("nothing left to do: every shard was there")
    if is_idle:
        lines = [_without_shards(end["part"], end["shards"])]
    else:
        which = _part_of(end["dump"], end["part"])
        lines.append(f"{which}: {counted(end['written'], 'image')}{failed if end['failed'] else ''}")
    if not end["is_complete"]:
        missing = f"{end['missing_shards']:,} of {counted(end['shards'], 'shard')}"
        lines.append(f"other parts have to make {missing}; the last of them writes the manifest")
    elif end["part"] and not is_idle:
        all_are = (
            "the only shard of the dump is" if end["shards"] == 1 else f"all {end['shards']:,} shards of the dump are"
        )
        lines.append(f"this was the last part: {all_are} there")
    if end["failed"] and end["is_complete"]:
        lines.append(f"see {_failure_files(end['dump'])}")
    return "\n".join(lines)


def _without_shards(part: str, shards: int) -> str:
    """Say for a part without shards which parts have them: there are fewer shards than parts."""
    count = part.partition("/")[2]
    first, last = f"0/{count}", f"{shards - 1}/{count}"
    if shards == 1:
        whose = f"the only one of this dump belongs to part {first}"
    else:
        whose = f"the {shards:,} of this dump belong to parts {first} {'and' if shards == 2 else 'to'} {last}"
    return f"part {part} has no shards: {whose}"


def nothing_read(dump: str, failed_by_reason: Mapping[str, int]) -> str:
    """Return what is said, also with -q, about a complete dump in which every image failed."""
    failed = sum(failed_by_reason.values())
    which = f"none of the {failed:,} images" if failed > 1 else "the only image"
    could = "could" if failed > 1 else "could not"
    hint = "--retry-failed reads repaired images again"
    if set(failed_by_reason) == {"not_found"}:
        hint = "names in a list are relative to this folder, or to --root; corrected names need another -o"
    return (
        f"featcli: error: {which} {could} be read: {_reasons(failed_by_reason)}\n"
        f"hint: see {_failure_files(dump)}; {hint}"
    )


def _failure_files(dump: str) -> str:
    """Return which files name the failures of a dump: each generation has its own."""
    from featcli.dump.folder import FAILURES
    from featcli.dump.generations import all_folders
    from featcli.system.files import bytes_at

    folders = [Path(dump), *reversed(all_folders(Path(dump)))]
    first, *others = [str(one / FAILURES) for one in folders if bytes_at(one / FAILURES) > 0] or [f"{dump}/{FAILURES}"]
    if len(others) < 2:
        return " and ".join([first, *others])
    return f"{first} and {len(others):,} more of that name in {dump}/more"


def _reasons(counts: Mapping[str, int]) -> str:
    """Return why images failed, the most frequent reason first."""
    return ", ".join(f"{number:,} {reason}" for reason, number in most_first(counts).items())


def folded(text: str, stream: TextIO) -> str:
    """Return the text folded for a terminal, each line under what it says. For a file or a pipe it stays as it is."""
    if not stream.isatty():
        return text
    width = max(40, shutil.get_terminal_size().columns)
    lines = text.split("\n")
    return "\n".join(line if len(line) <= width else _folded_line(line, width) for line in lines)


def _folded_line(line: str, width: int) -> str:
    label = LABEL.match(line)
    return textwrap.fill(
        line, width, subsequent_indent=" " * (label.end() if label else 2), replace_whitespace=False,
        drop_whitespace=True, break_on_hyphens=False,
    )  # fmt: skip
