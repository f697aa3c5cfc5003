"""The file that `-o` names, of commands that write one: whole under its name or not there, nothing lost to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from featcli.dump import PLAN, SHARDS
from featcli.errors import ConflictError, shown
from featcli.writers.publish import create_partial, disk_errors, publish


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ConflictError where something is there that may not be replaced, and inside any dump."""
    refuse_inside(path)
    if path.is_dir():
        raise ConflictError(f"-o {shown(path)}: there is a folder of that name", "name a file")
    if path.exists() and not overwrite:
        raise _there(path)


def refuse_inside(path: Path) -> None:
    """Raise ConflictError where a path leads into a dump: what is there must not be overwritten by what it holds."""
    for folder in (path.resolve(), *path.resolve().parents):
        if (folder / PLAN).is_file() and (folder / SHARDS).is_dir():
            raise ConflictError(f"-o {shown(path)}: inside the dump {shown(folder)}", "name a place outside of it")


def write_file(path: Path, write: Callable[[Path], object], overwrite: bool = False) -> None:
    """Let `write` fill an empty file, and give it its name when all of it is on the disk.

    Raises ConflictError where the name is taken by then, and MachineError.
    """
    with disk_errors(path, "-o"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = create_partial(path)
        try:
            write(partial)
            os.fsync(descriptor)
            if not publish(partial, path, overwrite):
                raise _there(path)
        finally:
            partial.unlink(missing_ok=True)
            os.close(descriptor)


def _there(path: Path) -> ConflictError:
    return ConflictError(f"-o {shown(path)}: it is there already", "name another file, or give --overwrite")
