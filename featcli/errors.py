"""Every error a user can meet, with the exit code it ends in, and how names are shown in messages.

    FeatcliError            1   unexpected
    ├── WorkerError         1   a worker died too often
    ├── UsageError          2   bad option, no images, unknown stage or checkpoint name
    ├── DamagedError        4   a file of a dump is damaged
    ├── ConflictError       5   the dump exists with another plan, or is in use
    ├── CheckpointError     6   the checkpoint is refused
    ├── MachineError        7   disk, device, memory
    └── IncompleteError     8   the dump is not complete

Exit code 3 (finished, some images failed) is no error: it is the result of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

LONGEST = 300  # characters of a library's message: some list all that they know


class FeatcliError(Exception):
    """What went wrong, in one line, and one line on what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[FeatcliError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # from one process to another


class WorkerError(FeatcliError):
    """Workers died, and shards were given up."""

    exit_code = 1


class UsageError(FeatcliError):
    """An option or an input that cannot be used."""

    exit_code = 2


class DamagedError(FeatcliError):
    """A file of a dump that is not what it was."""

    exit_code = 4


class ConflictError(FeatcliError):
    """A folder that holds something other than what was asked for."""

    exit_code = 5


class CheckpointError(FeatcliError):
    """A checkpoint that cannot be trusted or read."""

    exit_code = 6


class MachineError(FeatcliError):
    """Something the machine lacks: space, rights, a device, memory."""

    exit_code = 7


class IncompleteError(FeatcliError):
    """A dump that misses shards."""

    exit_code = 8


def shown(name: object) -> str:
    """The name in quotes, with control characters and undecodable bytes escaped, fit for a terminal."""
    text = str(name)
    return "'" + "".join(c if c.isprintable() and c not in "'\\" else _escaped(c) for c in text) + "'"


def _escaped(char: str) -> str:
    if char in "'\\":
        return "\\" + char
    if "\udc80" <= char <= "\udcff":  # surrogateescape: a byte that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless the value of an option is one of those."""
    if value not in known:
        raise UsageError(f"{option} {shown(value)}: no such choice", f"use {', '.join(known)}")


def counted(number: int, what: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def duration(seconds: float) -> str:
    """For people: `40 s`, `12 min`, `3.5 hours`, `2.1 days`."""
    for unit, length, least in (("days", 86400, 2), ("hours", 3600, 2), ("min", 60, 2)):
        if seconds >= least * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def shown_shape(shape: Sequence[int | None]) -> str:
    """A shape for people, such as 2048x7x7, or 2048x*x* where maps differ in size."""
    return "x".join("*" if edge is None else str(edge) for edge in shape)


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts, the largest first, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda count: (-count[1], count[0])))


def one_line(error: Exception, count: int = 1) -> str:
    """The first `count` lines of a library's message as one, fit for a terminal; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(" ".join(lines[:count]))
    return (text if len(text) <= LONGEST else text[: LONGEST - 3] + "...") or type(error).__name__


def printable(text: str) -> str:
    """The text with everything escaped that could write to a terminal what was not meant; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first; empty when nothing is near."""
    import difflib  # for the rare case

    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
