"""A small extraction in a process of its own, killed or refused at the n-th call that changes the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "truncate", "pwrite", "fsync", "link", "replace", "rename", "unlink")
FAULTS = {"kill": None, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 2, "shard_size": 2, "threads": 1}


@dataclass
class Ended:
    """How a run ended: its exit code (-9: killed), and which calls it made."""

    code: int
    calls: list[str]


@dataclass
class Scene:
    """What is there before the run, and what is run; `expected` is what it leaves when nothing happens to it."""

    photos: Path
    format_name: str
    start: Path | None = None  # a dump to begin with
    options: dict[str, Any] = field(default_factory=dict)
    links: bool = True  # False: the file system refuses hard links, as some network shares and memory cards do
    calls: list[str] = field(default_factory=list)
    expected: dict[str, bytes] = field(default_factory=dict)

    def rehearse(self, dump: Path) -> None:
        """Run undisturbed."""
        from conftest import tree

        ended = self.run(dump)
        assert ended.code in (0, 3), ended
        self.calls, self.expected = ended.calls, tree(dump)

    def run(self, dump: Path, fault: str = "", at: int = -1) -> Ended:
        """Extract in a forked child, beginning with `start`; the call number `at` (from 0) meets the fault."""
        if self.start is not None and not dump.exists():
            shutil.copytree(self.start, dump)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            code = 1
            try:
                if not self.links:
                    os.link = _refused
                with _watched(dump, send, fault, at):
                    code = self._extract(dump)
            finally:
                os._exit(code)
        os.close(send)
        with os.fdopen(receive) as names:
            calls = names.read().split()
        return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls)

    def _extract(self, dump: Path) -> int:
        from featcli import extract
        from featcli.errors import FeatcliError

        options = {**OPTIONS, **self.options, "format": self.format_name}
        with contextlib.redirect_stderr(sys.stdout):
            try:
                return extract(self.photos, output=dump, **options).exit_code
            except FeatcliError as error:
                return error.exit_code

    def survives(self, dump: Path, fault: str, at: int) -> str:
        """What is wrong after a fault, or after one more run of the same command; empty where nothing is."""
        from conftest import tree
        from featcli.dump.verify import verify
        from featcli.errors import FeatcliError

        ended = self.run(dump, fault, at)
        where = f"{self.format_name}, {fault} at call {at} ({ended.calls[at] if at < len(ended.calls) else 'none'})"
        if ended.code != (-9 if fault == "kill" else 7):
            return f"{where}: ended in {ended.code}"
        if (dump / "plan.json").exists():
            try:
                verdict = verify(dump)
            except FeatcliError as error:
                return f"{where}: {error}"
            if [damage for damage in verdict.damages if damage.what not in self._known()]:
                return f"{where}: {verdict.damages}"
        may_leave = fault == "kill" or ended.calls[at] == "unlink"
        if not may_leave and list(dump.rglob("*.partial")):
            return f"{where}: left {list(dump.rglob('*.partial'))}"
        again = self.run(dump)
        if again.code not in (0, 3):
            return f"{where}: the next run ended in {again.code}"
        return "" if tree(dump) == self.expected else f"{where}: other bytes"

    def _known(self) -> set[str]:
        """The damages that are there before the run."""
        from featcli.dump.verify import verify

        return {damage.what for damage in verify(self.start).damages} if self.start is not None else set()


def scenes(folder: Path, format_name: str, links: bool = True) -> Iterator[tuple[str, Scene]]:
    """A new dump; one of large rows, which go past the page cache; one with a repaired image and a lost shard, mended;
    one of another seed, overwritten.
    """
    from conftest import draw
    from featcli import extract

    for i in range(5):
        draw(folder / "photos" / f"{i}.png", i, (32, 32))
    yield "new", Scene(folder / "photos", format_name, links=links)
    if not links:
        return
    yield "large", Scene(folder / "photos", format_name, options={"out_features": ("stem",)})
    shutil.copytree(folder / "photos", folder / "mended")
    good = (folder / "mended" / "1.png").read_bytes()
    (folder / "mended" / "1.png").write_bytes(b"broken")
    options = {**OPTIONS, "format": format_name}
    extract(folder / "mended", output=folder / "lossy", **options)
    (folder / "mended" / "1.png").write_bytes(good)
    next(path for path in (folder / "lossy" / "shards").glob("00002.*") if path.suffix != ".json").unlink()
    yield "mended", Scene(folder / "mended", format_name, folder / "lossy", {"retry_failed": True})
    extract(folder / "photos", output=folder / "other", **{**options, "seed": 1})
    yield "overwritten", Scene(folder / "photos", format_name, folder / "other", {"overwrite": True})


def _refused(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@contextlib.contextmanager
def _watched(dump: Path, send: int, fault: str, at: int):
    """Inside the block every call in CALLS that touches the dump is counted, and one of them meets the fault."""
    count, write = 0, os.write

    def watched(name, plain):
        def call(first, *rest, **options):
            nonlocal count
            is_ours = isinstance(first, int) or os.fspath(first).startswith(str(dump))
            if name == "open" and is_ours and not rest[0] & (os.O_CREAT | os.O_WRONLY):
                is_ours = False  # it only reads, or looks whether a file is locked
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
