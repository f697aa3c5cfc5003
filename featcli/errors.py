"""Define every error that a user can meet, every exit code with its meaning, and how messages show names.

    FeatcliError            1
    ├── WorkerError         1   workers died too often
    ├── UsageError          2
    ├── DamagedError        4
    ├── ConflictError       5
    ├── CheckpointError     6
    ├── MachineError        7
    └── IncompleteError     8

Exit codes 3 and 9 are no errors, but results of a run. EXIT_CODES is the one table of all codes; the help and the pages
in `docs/` are written from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

SOME_FAILED, NOTHING_READ = 3, 9  # results of a run, not errors


class ExitCode(NamedTuple):
    """What a command has to say when it ends with one of these codes."""

    codes: tuple[int, ...]
    means: str
    to_do: str  # what the user can do, in Markdown, with links inside docs/troubleshooting.md
    again: str  # whether a program that ran the command should try again


NO_NEED, AGAIN, IN_VAIN = "not needed", "yes", "no: it would end the same way"
EXIT_CODES = (
    ExitCode((0,), "done", "", NO_NEED),
    ExitCode(
        (1,),
        "unexpected: a bug, or workers that died too often",
        "report it, with the traceback; see [workers](#workers-that-die)",
        "yes, a few times",
    ),
    ExitCode(
        (2,),
        "usage: a bad option, no images, an unknown stage or checkpoint name",
        "do what the hint says",
        IN_VAIN,
    ),
    ExitCode(
        (SOME_FAILED,), "done, but some images failed and are recorded", "see [failures](#images-that-failed)", NO_NEED
    ),
    ExitCode(
        (4,),
        "the dump is damaged, or --recompute or --against found other values",
        "see [damage](#the-dump-is-damaged)",
        IN_VAIN,
    ),
    ExitCode(
        (5,),
        "a dump of another plan, or in use; or a file that is there already",
        "use another `-o`, or wait",
        'only where it says "in use"',
    ),
    ExitCode((6,), "the checkpoint is refused", "see [checkpoints](#the-checkpoint)", IN_VAIN),
    ExitCode((7,), "disk, device, memory or network", "see [the machine](#the-machine)", AGAIN),
    ExitCode(
        (8,),
        "the dump is incomplete, or shards of it are gone",
        "run the same `extract` command again",
        "yes, of `extract`",
    ),
    ExitCode(
        (NOTHING_READ,),
        "done, but not one image could be read",
        "see [failures](#images-that-failed): was something else named than pictures?",
        IN_VAIN,
    ),
    ExitCode(
        (130, 143), "interrupted, terminated: the same command resumes", "run the same `extract` command again", AGAIN
    ),
    ExitCode((141,), "whoever read stdout went away", "nothing to do", NO_NEED),
)

LONGEST = 300  # characters of a library's message, because some list all that they know


class FeatcliError(Exception):
    """An error that says in one line what went wrong, and in one more (`hint`) what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[FeatcliError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # pickled, because errors go from one process to another


class WorkerError(FeatcliError):
    """Workers died too often, and shards were given up."""

    exit_code = 1


class UsageError(FeatcliError, ValueError):
    """An option or an input cannot be used."""

    exit_code = 2


class DamagedError(FeatcliError):
    """A file of a dump is not as it was written."""

    exit_code = 4


class ConflictError(FeatcliError):
    """A folder holds something other than what was asked for, or another process is at work in it."""

    exit_code = 5


class CheckpointError(FeatcliError):
    """A checkpoint cannot be read, or cannot be trusted."""

    exit_code = 6


class MachineError(FeatcliError):
    """The machine lacks something: space, rights, a device, memory."""

    exit_code = 7


class IncompleteError(FeatcliError):
    """A dump lacks shards."""

    exit_code = 8


def shown(name: object) -> str:
    """Return a name in quotes, with control characters and undecodable bytes escaped, fit for a terminal."""
    text = str(name)
    return "'" + "".join(c if c.isprintable() and c not in "'\\" else _escaped(c) for c in text) + "'"


def _escaped(char: str) -> str:
    if char in "'\\":
        return "\\" + char
    if "\udc80" <= char <= "\udcff":  # surrogateescape: a byte that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless the value of an option is one of `known`."""
    if value not in known:
        raise UsageError(f"{option} cannot be {shown(value)}", f"use {any_of(known)}")


def any_of(words: Sequence[str]) -> str:
    """Return words as `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def did_you_mean(names: Sequence[str], otherwise: str = "") -> str:
    """Return a hint with the names that may have been meant, or `otherwise` if there are none."""
    return f"did you mean {any_of(names)}?" if names else otherwise


def counted(number: int, what: str) -> str:
    """Return a count with its noun: `1 image`, `2,000 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Return bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds for people: `40 s`, `12 min`, `3.5 hours`, `2.1 days`."""
    for unit, length, least in (("days", 86400, 2), ("hours", 3600, 2), ("min", 60, 2)):
        if seconds >= least * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def shown_shape(shape: Sequence[int | None]) -> str:
    """Return a shape for people, such as 2048x7x7, or 2048x*x* if maps differ in size."""
    return "x".join("*" if edge is None else str(edge) for edge in shape)


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts with the largest first, and equal ones by name."""
    return dict(sorted(counts.items(), key=lambda count: (-count[1], count[0])))


def one_line(error: BaseException, count: int = 1) -> str:
    """Return the first `count` lines of a library's message as one line for a terminal, or its type if it is empty."""
    message = f"there is no {error}" if isinstance(error, KeyError) else str(error)  # str of a KeyError is only the key
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = printable(" ".join(lines[:count]))
    return (text if len(text) <= LONGEST else text[: LONGEST - 3] + "...") or type(error).__name__


def printable(text: str) -> str:
    """Return the text with every character escaped that would control a terminal. Lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return the known names that are most like `name`, best first, if difflib's ratio is at least `cutoff`."""
    import difflib  # rarely needed

    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
