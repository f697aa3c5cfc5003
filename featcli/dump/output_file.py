"""The file that `-o` names, of commands that write one: whole under its name or not there, nothing lost to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from featcli.dump.atomic_file import create_partial, disk_errors, publish, remove_stale
from featcli.dump.folder import PLAN, SHARDS
from featcli.errors import ConflictError, shown

Write = Callable[[Path], object]  # fills the empty file at a path


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ConflictError where something is there that may not be replaced, and inside any dump."""
    refuse_inside(path)
    if path.is_dir():
        raise ConflictError(f"-o {shown(path)}: there is a folder of that name", "name a file")
    if path.exists() and not path.is_file():
        raise ConflictError(f"-o {shown(path)}: not a regular file", "name another; export streams with -o -")
    if path.exists() and not overwrite:
        raise _there(path)


def refuse_inside(path: Path) -> None:
    """Raise ConflictError where a path leads into a dump: what is there must not be overwritten by what it holds."""
    for folder in (path.resolve(), *path.resolve().parents):
        if (folder / PLAN).is_file() and (folder / SHARDS).is_dir():
            raise ConflictError(f"-o {shown(path)}: inside the dump {shown(folder)}", "name a place outside of it")


def write_files(files: Mapping[Path, Write], overwrite: bool = False) -> None:
    """Fill files of one folder, and give them their names, in this order, when all of them are on the disk.

    With `overwrite` the last one that is there goes before any other is replaced: it never lies beside what belongs to
    another. Raises ConflictError where a name is taken by then, and MachineError.
    """
    *beside, last = files
    with disk_errors(last, "-o"), ExitStack() as stack:
        last.parent.mkdir(parents=True, exist_ok=True)
        partials = {}
        for path, write in files.items():
            remove_stale(path.parent, path.name)
            descriptor, partials[path] = create_partial(path)
            stack.callback(os.close, descriptor)
            stack.callback(partials[path].unlink, missing_ok=True)
            write(partials[path])
            os.fsync(descriptor)
        if beside and overwrite:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            if not publish(partial, path, overwrite):
                raise _there(path)


def _there(path: Path) -> ConflictError:
    return ConflictError(f"-o {shown(path)}: it is there already", "name another file, or give --overwrite")
