"""A small extraction in a process of its own, killed or refused at the n-th call that changes the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

CALLS = ("open", "mkdir", "truncate", "pwrite", "fsync", "link", "replace", "rename", "unlink")
FAULTS = {"kill": None, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 2, "shard_size": 2, "threads": 1}


@dataclass
class Ended:
    """How a run ended: its exit code (-9: killed), and which call the fault met."""

    code: int
    calls: list[str]


def run(photos: Path, dump: Path, format_name: str, fault: str = "", at: int = -1, links: bool = True) -> Ended:
    """Extract in a forked child; the call number `at` (from 0) meets the fault. Its calls come back through a pipe.

    Without `links` the file system refuses hard links, as some network shares and memory cards do.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        code = 1
        try:
            if not links:
                os.link = _refused
            code = _extract(photos, dump, format_name, send, fault, at)
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as names:
        calls = names.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, calls)


def _refused(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _extract(photos: Path, dump: Path, format_name: str, send: int, fault: str, at: int) -> int:
    with _watched(dump, send, fault, at):
        return extract_quietly(photos, dump, format_name)


def extract_quietly(photos: Path, dump: Path, format_name: str) -> int:
    """The exit code of a small extraction."""
    from featcli import extract
    from featcli.errors import FeatcliError

    with contextlib.redirect_stderr(sys.stdout):
        try:
            return extract(photos, output=dump, format=format_name, **OPTIONS).exit_code
        except FeatcliError as error:
            return error.exit_code


@contextlib.contextmanager
def _watched(dump: Path, send: int, fault: str, at: int):
    """Inside the block every call in CALLS that touches the dump is counted, and one of them meets the fault."""
    count, write = 0, os.write

    def watched(name, plain):
        def call(first, *rest, **options):
            nonlocal count
            is_ours = isinstance(first, int) or os.fspath(first).startswith(str(dump))
            if name == "open" and is_ours and not rest[0] & os.O_CREAT:
                is_ours = False  # it only reads
            if is_ours:
                write(send, f"{name} ".encode())
                count += 1
                if count - 1 == at:
                    if FAULTS[fault] is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))
            return plain(first, *rest, **options)

        return call

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    yield


def survives(
    photos: Path, expected: dict[str, bytes], dump: Path, format_name: str, fault: str, at: int, links: bool = True
) -> str:
    """What is wrong after a fault and one more run of the same command; empty where nothing is."""
    ended = run(photos, dump, format_name, fault, at, links)
    where = f"{format_name}, {fault} at call {at} ({ended.calls[at] if at < len(ended.calls) else 'none'})"
    if ended.code != (-9 if fault == "kill" else 7):
        return f"{where}: ended in {ended.code}"
    may_leave = fault == "kill" or ended.calls[at] == "unlink"
    return recovers(photos, expected, dump, format_name, where, may_leave)


def recovers(
    photos: Path, expected: dict[str, bytes], dump: Path, format_name: str, where: str, may_leave: bool
) -> str:
    """What is wrong with what a run left, or after one more run of the same command; empty where nothing is.

    `may_leave`: whether partial files may be there, for the next run to remove.
    """
    from conftest import tree
    from featcli.errors import FeatcliError
    from featcli.verify import verify

    if (dump / "plan.json").exists():
        try:
            verdict = verify(dump)
        except FeatcliError as error:
            return f"{where}: {error}"
        if verdict.damages:
            return f"{where}: {verdict.damages}"
    if not may_leave and dump.exists() and list(dump.rglob("*.partial")):
        return f"{where}: left {list(dump.rglob('*.partial'))}"
    again = run(photos, dump, format_name)
    if again.code != 0:
        return f"{where}: the next run ended in {again.code}"
    return "" if tree(dump) == expected else f"{where}: other bytes"
