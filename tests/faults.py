"""Run a small extraction in its own process, killed or refused at the n-th call that changes the disk or reads.

Reads are those of images, the dump and the checkpoint. A read fails once, or all reads after it fail, too, as they do
when a share goes away.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "truncate", "pwrite", "fsync", "link", "replace", "rename", "unlink", "rmdir")
READS = ("open", "read", "pread", "preadv", "stat", "lstat", "fstat", "scandir", "listdir")
FAULTS = {"kill": None, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
READ_FAULTS = {"EIO once": errno.EIO, "ESTALE from then on": errno.ESTALE}
OPTIONS = {
    "checkpoint": "test_resnet",
    "random_init": True,
    "batch_size": 2,
    "shard_size": 2,
    "threads": 1,
    "decode_threads": 1,
}


@dataclass
class Ended:
    """How a run ended: its exit code (-9 if killed), and the calls that it made."""

    code: int
    calls: list[str]
    said: str = ""


@dataclass
class Scene:
    """What is on the disk before a run, and what is run. `expected` is what it leaves if nothing happens to it."""

    photos: Any  # images that are extracted
    format_name: str
    start: Path | None = None  # a dump to begin with
    options: dict[str, Any] = field(default_factory=dict)
    links: bool = True  # False: the file system refuses hard links, as some network shares and memory cards do
    locks: bool = True  # False: the file system refuses locks
    keeps: bool = False  # rows of an unfinished shard are kept after each batch, and computed images are counted
    readable: tuple[int, ...] = ()  # how many rows readers may see after a fault, if the dump is complete all the time
    calls: list[str] = field(default_factory=list)
    expected: dict[str, bytes] = field(default_factory=dict)

    def rehearse(self, dump: Path, names: tuple[str, ...] = CALLS) -> None:
        """Run without a fault."""
        from conftest import tree

        ended = self.run(dump, names=names)
        assert ended.code in (0, 3), ended
        self.calls, self.expected = ended.calls, tree(dump)

    def run(self, dump: Path, fault: str = "", at: int = -1, names: tuple[str, ...] = CALLS) -> Ended:
        """Extract in a forked child, beginning with `start`. Call number `at` (from 0) meets the fault."""
        if self.start is not None and not dump.exists():
            shutil.copytree(self.start, dump)
        below = dump if names == CALLS else dump.parents[1]
        return forked(lambda: self._extract(dump), below, fault, at, names)

    def _extract(self, dump: Path) -> int:
        from featcli import extract
        from featcli.run import sink

        if not self.links:
            os.link = _refused
        if not self.locks:
            fcntl.flock = _refused
        if self.keeps:
            sink.KEEP_SECONDS = 0.0
        options = {**OPTIONS, **self.options, "format": self.format_name}
        _events_of(dump).parent.mkdir(parents=True, exist_ok=True)
        with open(_events_of(dump), "ab", buffering=0) as told:

            def report(kind: str, **facts: Any) -> None:
                told.write(f"{json.dumps([kind, facts])}\n".encode())

            return extract(self.photos, output=dump, report=report, **options).exit_code

    def loses(self, first: str, again: str) -> str:
        """Say which images the second run computed although the first had them on the disk; "" if there are none.

        The last batch of a shard is always computed, because it commits the shard.
        """
        from featcli.dump.folder import Dump

        batch, size = OPTIONS["batch_size"], self.options["shard_size"]
        safe = {} if self.start is None else Dump.at(self.start).rows_kept()
        events = [*_events(first), *_events(again)]
        images = next((facts["images"] for kind, facts in events if kind == "start"), 0)
        shards = [min(size, images - begin) for begin in range(0, images, size)]
        for kind, facts in _events(first):
            if kind in ("resumed", "kept"):
                safe[facts["shard"]] = min(facts["rows"], (shards[facts["shard"]] - 1) // batch * batch)
            if kind == "shard":
                safe[facts["shard"]] = facts["rows"]
        computed = sum(facts["images"] for kind, facts in _events(again) if kind == "batch")
        needed = images - sum(safe.values())
        return "" if computed <= needed else f"{computed} images computed, though {safe} were on the disk"

    def survives_reading(self, dump: Path, fault: str, at: int) -> str:
        """Say what is wrong after a read that failed, or after one more run of the same command; "" if nothing is.

        A run that does not end with the machine's fault has done all its work, so it did not need what it could not
        read.
        """
        from conftest import tree
        from featcli.dump.verify import verify

        ended = self.run(dump, fault, at, READS)
        first = _events_of(dump).read_text() if self.keeps else ""
        where = f"{self.format_name}, {fault} at read {at} ({ended.calls[at] if at < len(ended.calls) else 'none'})"
        if ended.code != 7 and not (ended.code in (0, 3) and tree(dump) == self.expected):
            return f"{where}: ended in {ended.code} {ended.said}"
        if (dump / "plan.json").exists():
            damages = [damage for damage in verify(dump).damages if damage.what not in self._known()]
            if damages:
                return f"{where}: {damages}"
        again = self.run(dump)
        if again.code not in (0, 3):
            return f"{where}: the next run ended in {again.code} {again.said}"
        if tree(dump) != self.expected:
            return f"{where}: other bytes"
        lost = self.loses(first, _events_of(dump).read_text()[len(first) :]) if self.keeps else ""
        return f"{where}: {lost}" if lost else ""

    def survives(self, dump: Path, fault: str, at: int) -> str:
        """Say what is wrong after a fault, or after one more run of the same command; "" if nothing is."""
        from conftest import tree

        ended = self.run(dump, fault, at)
        first = _events_of(dump).read_text() if self.keeps else ""
        where = f"{self.format_name}, {fault} at call {at} ({ended.calls[at] if at < len(ended.calls) else 'none'})"
        # A file that is no longer needed may stay if it cannot be removed. On a full disk a record is tried twice.
        goes_on = fault != "kill" and ended.code in (0, 3)
        if goes_on and ended.calls[at] != "unlink" and tree(dump) != self.expected:
            return f"{where}: other bytes at once"
        if ended.code != (-9 if fault == "kill" else 7) and not goes_on:
            return f"{where}: ended in {ended.code}"
        if (dump / "plan.json").exists() and (wrong := self._damages(dump) or self._read_wrongly(dump)):
            return f"{where}: {wrong}"
        may_leave = fault == "kill" or ended.calls[at] == "unlink" or not self.locks  # the writer of the file may live
        records = "".join(one.read_text() for one in dump.rglob("*.unfinished.json"))
        left = [one for one in dump.rglob("*.partial") if one.name not in records]  # nobody resumes these
        if left and not may_leave:
            return f"{where}: left {left}"
        again = self.run(dump)
        if again.code not in (0, 3):
            return f"{where}: the next run ended in {again.code}"
        made = tree(dump)
        if not self.locks:  # small files stay, because nobody can tell whether they are being written
            made = {name: content for name, content in made.items() if ".json" not in name or name[-8:] != ".partial"}
        if made != self.expected:
            return f"{where}: other bytes"
        lost = self.loses(first, _events_of(dump).read_text()[len(first) :]) if self.keeps else ""
        return f"{where}: {lost}" if lost else ""

    def _damages(self, dump: Path) -> str:
        """Say which damage there is that was not there before the run; "" if there is none."""
        from featcli.dump.verify import verify
        from featcli.errors import FeatcliError

        try:
            damages = verify(dump).damages
        except FeatcliError as error:
            return str(error)
        new = [damage for damage in damages if damage.what not in self._known()]
        return str(new) if new else ""

    def _read_wrongly(self, dump: Path) -> str:
        """Say what readers see that is neither the dump as it was nor as it will be; "" if they see one of these."""
        from featcli import open_dump
        from featcli.errors import FeatcliError

        if not self.readable:
            return ""
        try:
            with open_dump(dump) as found, open_dump(dump.parent / "whole") as whole:
                rows = len(found)
                is_same = all(found[name][:].tobytes() == whole[name][:rows].tobytes() for name in whole.stages)
                if is_same and rows in self.readable and found.keys == whole.keys[:rows]:
                    return ""
                return f"readers see {found.keys}, with {'their' if is_same else 'other'} maps"
        except FeatcliError as error:
            return f"readers see: {error}"

    def _known(self) -> set[str]:
        """Return the damages that are there before the run."""
        from featcli.dump.verify import verify

        return {damage.what for damage in verify(self.start).damages} if self.start is not None else set()


def _events_of(dump: Path) -> Path:
    """Return the file beside the dump, out of reach of faults, in which runs note their events line by line."""
    return dump.with_name(f"events of {dump.name}")


def _events(told: str) -> list[tuple[str, dict[str, Any]]]:
    return [json.loads(line) for line in told.splitlines()]


def forked(work: Callable[[], int], below: Path, fault: str, at: int, names: tuple[str, ...]) -> Ended:
    """Run in a forked child, in which one call of these `names` for paths below a folder meets the fault."""
    from featcli.errors import FeatcliError

    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        code = 1
        try:
            with _watched(str(below), send, fault, at, names), contextlib.redirect_stderr(sys.stdout):
                try:
                    code = work()
                except FeatcliError as error:
                    code = error.exit_code
                    os.write(send, f"\n{error}".encode())
        except BaseException as error:
            os.write(send, f"\n{error!r}".encode())
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as told:
        calls, _, said = told.read().partition("\n")
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls.split(), said)


def checks(dump: Path, fault: str = "", at: int = -1) -> tuple[Ended, str]:
    """Verify and repair a dump.

    Returns how that ended, and what is wrong: damage found, or a file moved, though all is well.
    """
    from conftest import tree
    from featcli.dump.verify import repair, verify

    def work() -> int:
        verdict = verify(dump)
        if verdict.damages:
            repair(verdict)
        return 4 if verdict.damages else 0

    before = tree(dump)
    ended = forked(work, dump, fault, at, READS)
    where = f"verify, {fault} at read {at}"
    if ended.code not in (0, 7):
        return ended, f"{where}: ended in {ended.code} {ended.said}"
    return ended, "" if tree(dump) == before else f"{where}: files were moved"


def reading_scenes(folder: Path, format_name: str) -> Iterator[tuple[str, Scene]]:
    """Yield scenes: a new dump; a resumed one; one of a tar and a list; one of a transformers folder."""
    import timm
    import torch
    from safetensors.torch import save_file

    found = dict(scenes(folder, format_name))
    photos, weights = folder / "photos", folder / "weights"
    weights.mkdir()
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, weights / "w.safetensors")
    torch.save(state, weights / "w.pth")
    of_file = {"random_init": False, "arch": "test_resnet"}
    yield "new", Scene(photos, format_name, options={**of_file, "checkpoint": weights / "w.safetensors"})
    yield "mended", found["mended"]
    kept = dict(keeping_scenes(folder / "keeping", format_name))
    yield "taken up", kept["taken up, one"]
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(photos / "0.png", "in/0.png")
        tar.add(photos / "1.png", "in/1.png")
    (folder / "list").write_text("2.png\n4.png\n")
    listed = {"files_from": folder / "list", "root": photos, "checkpoint": weights / "w.pth", **of_file}
    yield "tar and list", Scene([folder / "photos.tar"], format_name, options=listed)
    transformers = _tiny_transformers(folder / "tiny")
    if transformers is not None:
        yield "transformers", Scene(photos, format_name, options={"random_init": False, "checkpoint": transformers})


def _tiny_transformers(folder: Path) -> Path | None:
    try:
        import transformers
    except ImportError:
        return None
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    transformers.ResNetModel(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def scenes(folder: Path, format_name: str, links: bool = True) -> Iterator[tuple[str, Scene]]:
    """Yield scenes in which dumps are made, mended and overwritten.

    These are: a new dump; one of large rows, which go past the page cache; one of several outputs; one with a repaired
    image and a lost shard, which is mended; one of another seed, which is overwritten.
    """
    from conftest import draw
    from featcli import extract

    for i in range(5):
        draw(folder / "photos" / f"{i}.png", i, (32, 32))
    yield "new", Scene(folder / "photos", format_name, links=links)
    if not links:
        return
    yield "large", Scene(folder / "photos", format_name, options={"out_features": ("stem",)})
    several = {"out_features": ("stage4", "embedding"), "pool": ("none", "avg")}
    yield "several", Scene(folder / "photos", format_name, options=several)
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


def keeping_scenes(
    folder: Path, format_name: str, links: bool = True, locks: bool = True
) -> Iterator[tuple[str, Scene]]:
    """Yield scenes whose rows are kept after each batch.

    These are: a new dump of one shard; the same, begun by an earlier run; two shards of maps that differ in size, the
    first of which is begun.
    """
    from conftest import draw
    from featcli import extract

    class Stop(BaseException):
        """Stands for anything that stops a run."""

    def stop(kind: str, **_: object) -> None:
        if kind == "batch":
            raise Stop

    for i in range(7):
        draw(folder / "photos" / f"{i}.png", i, (32, 32 + 8 * (i % 2)))
    (folder / "photos" / "1.png").write_bytes(b"broken")
    how: dict[str, Any] = {"links": links, "locks": locks, "keeps": True}
    kinds = {
        "one": {"shard_size": 7, "out_indices": "1,-1"},
        "two": {"shard_size": 4, "fit": "native", "image_size": 32},
    }
    yield "kept", Scene(folder / "photos", format_name, options=kinds["one"], **how)
    for name, options in kinds.items():
        begun = folder / f"begun {name}"
        with contextlib.suppress(Stop):
            extract(folder / "photos", output=begun, report=stop, **{**OPTIONS, **options, "format": format_name})
        yield f"taken up, {name}", Scene(folder / "photos", format_name, begun, options, **how)


def _grown(folder: Path, output: Path, names: str, **options: Any) -> None:
    """Draw images, and extract all of the folder."""
    from conftest import draw
    from featcli import extract

    for name in names:
        draw(folder / f"{name}.png", ord(name), (32, 32))
    extract(folder, output=output, extend=True, **{**OPTIONS, **options})


def growing_scenes(folder: Path, format_name: str, links: bool = True) -> Iterator[tuple[str, Scene]]:
    """Yield scenes in which a dump grows, and readers see rows all the time.

    These are: a second generation; one that was begun and is finished, and another one behind it; one that is complete
    and no part of the dump yet.
    """
    from featcli.extraction import extract as module

    class Stop(BaseException):
        """Stands for anything that stops a run."""

    def stop(*_: object) -> None:
        raise Stop

    def stop_at_shard(kind: str, **_: object) -> None:
        if kind == "shard":
            raise Stop

    photos, form = folder / "photos", {"format": format_name}
    _grown(photos, folder / "one", "bdf", **form)
    begun, named = (Path(shutil.copytree(folder / "one", folder / name)) for name in ("begun", "named"))
    with contextlib.suppress(Stop):
        _grown(photos, begun, "ace", report=stop_at_shard, **form)
    commit, module.commit = module.commit, stop
    with contextlib.suppress(Stop):
        _grown(photos, named, "", **form)
    module.commit = commit
    how: dict[str, Any] = {"options": {"extend": True}, "links": links}
    yield "another generation", Scene(photos, format_name, folder / "one", readable=(3, 6), **how)
    more = Path(shutil.copytree(photos, folder / "more photos"))
    shutil.copy(photos / "a.png", more / "0.png")
    yield "begun", Scene(more, format_name, begun, readable=(3, 6, 7), **how)
    yield "not named", Scene(photos, format_name, named, readable=(3, 6), **how)


def grown_scenes(folder: Path, format_name: str) -> Iterator[tuple[str, Scene]]:
    """Yield scenes in which a dump that grew is mended or removed.

    These are: failures tried again in all generations; the same with shards that were set aside in two of them; another
    run that overwrites it.
    """
    from conftest import draw
    from featcli.dump.generations import folder_of
    from featcli.dump.verify import repair, verify

    photos, lossy, good = folder / "photos", folder / "three", {}
    for names in ("bdf", "ac", "eg"):
        for name in names:
            draw(photos / f"{name}.png", ord(name), (32, 32))
        broken = photos / f"{names[0]}.png"
        good[broken] = broken.read_bytes()
        broken.write_bytes(b"broken")
        _grown(photos, lossy, "", format=format_name)
    for path, content in good.items():
        path.write_bytes(content)
    yield "tried again", Scene(photos, format_name, lossy, {"retry_failed": True})
    aside = Path(shutil.copytree(lossy, folder / "aside"))
    for below in (aside, folder_of(aside, 1)):
        shard = next(path for path in (below / "shards").glob("00000.*") if path.suffix != ".json")
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    repair(verify(aside))
    yield "set aside", Scene(photos, format_name, aside, {"retry_failed": True})
    yield "overwritten", Scene(photos, format_name, lossy, {"overwrite": True})


def _refused(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def _is_ours(below, names, name, first, rest, options) -> bool:
    if isinstance(first, int):
        return names is CALLS or os.readlink(f"/proc/self/fd/{first}").startswith(below)
    if not os.fsdecode(first).startswith(below):
        return False
    if name != "open":
        return True
    how = rest[0] if rest else options.get("mode", "r")
    writes = how & (os.O_CREAT | os.O_WRONLY) if isinstance(how, int) else {*how} & {*"wax+"}
    return bool(writes) == (names is CALLS)


@contextlib.contextmanager
def _watched(below: str, send: int, fault: str, at: int, names: tuple[str, ...]):
    """Count the calls of these names for paths below a folder inside the block. One of them meets the fault.

    For `open`, only calls count that write, or only those that read, as the other names do.
    """
    numbers, write = itertools.count(), os.write  # threads share the numbers
    number = {**FAULTS, **READ_FAULTS}.get(fault)

    def watched(name, plain):
        def call(first, *rest, **options):
            if _is_ours(below, names, name, first, rest, options):
                write(send, f"{name} ".encode())
                now = next(numbers)
                if now == at or (now > at >= 0 and fault.endswith("from then on")):
                    if number is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(number, os.strerror(number))
            return plain(first, *rest, **options)

        return call

    accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps functions of `os` there
    for name in names:
        replaced = watched(name, getattr(os, name))
        setattr(os, name, replaced)
        if accessor is not None and hasattr(accessor, name) and name != "open":
            setattr(accessor, name, staticmethod(replaced))
    if names is READS:
        builtins.open = io.open = watched("open", io.open)
    yield
