"""Decide where a command may write, the folder of a dump or a file, and what it may delete."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from featcli.dump.atomic_file import (
    PARTIAL,
    PARTIAL_NAME,
    create_partial,
    disk_errors,
    publish,
    remove_stale,
    sync_folder,
)
from featcli.dump.columns import COLUMNS
from featcli.dump.folder import FAILURES, IMAGES, MANIFEST, OURS, PLAN, SHARDS, Dump, in_use
from featcli.dump.generations import MORE, all_folders
from featcli.dump.lock import FolderLock
from featcli.dump.unfinished import remove_unused
from featcli.errors import ConflictError, MachineError, UsageError, shown
from featcli.system.files import allocated_bytes, is_file, is_folder, is_link, is_there, names_in

# Suffixes of files that people want a dump to be.
FILES = {".h5", ".hdf5", ".safetensors", ".npy", ".npz", ".jsonl", ".json", ".csv", ".parquet", ".pt", ".pth", ".pkl"}


def check_target(path: Path, overwrite: bool) -> None:
    """Check whether a dump may be made at `path`. Changes nothing.

    Raises UsageError, ConflictError, DamagedError and MachineError. Whether a file can be made there is left to
    `try_to_write`.
    """
    if is_there(path) and not is_folder(path):
        raise ConflictError(f"dump {shown(path)}: there is a file of that name", "use another -o")
    if path.suffix.lower() in FILES and not is_folder(path):
        raise UsageError(
            f"-o {shown(path)}: a dump is a folder, not a {path.suffix} file",
            f"use -o {shown(path.with_suffix(''))}; featcli export writes one file from it",
        )
    if is_folder(path) and not overwrite:
        Dump.existing(path)  # an unreadable plan is reported before anything is loaded
    if is_folder(path) and not _is_ours(path):
        raise ConflictError(
            f"dump {shown(path)}: the folder holds other files and no plan.json",
            "use another -o: featcli writes only into an empty folder, or a dump of its own",
        )
    link = next((one for one in _folders_in(path) if is_link(one)), None) if overwrite else None
    if link is not None:
        raise ConflictError(
            f"dump {shown(path)}: its {link.name} folder is a link, and what it leads to may be somebody else's",
            "remove that link first",
        )
    folder = existing_parent(path)
    if not is_folder(folder):
        raise _not_writable(path, errno.ENOTDIR)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(path, errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES)


def _folders_in(path: Path) -> list[Path]:
    """Return the folders in a dump that are emptied if it is overwritten."""
    generations = all_folders(path)
    return [path / SHARDS, path / MORE, *generations, *(one / SHARDS for one in generations)]


def try_to_write(path: Path) -> None:
    """Create a file where a dump will be, and remove it, because some folders only seem to take files.

    Raises MachineError.
    """
    probe = existing_parent(path) / f".featcli-probe.{secrets.token_hex(8)}{PARTIAL}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error.errno or 0) from error


def _not_writable(path: Path, error: int) -> MachineError:
    folder = existing_parent(path)
    return MachineError(
        f"dump {shown(path)}: featcli cannot write in {shown(folder)}: {os.strerror(error)}", "use another -o"
    )


def _is_ours(path: Path) -> bool:
    """Return whether a folder is empty, a dump, or what is left of a start that was killed before it wrote a plan."""
    if is_there(path / PLAN):
        return True
    names = {name for name in names_in(path) if not PARTIAL_NAME.fullmatch(name)}
    if not names:
        return True
    shards = names_in(path / SHARDS) if is_folder(path / SHARDS) else [""]  # it is made before any file
    known = {IMAGES, COLUMNS, SHARDS, MANIFEST, FAILURES, *([MORE] if SHARDS in names else [])}
    return names <= known and all(map(OURS.fullmatch, shards))


def make_folder(path: Path) -> None:
    """Create the folder of a dump and the one for its shards, on the disk. Raises MachineError."""
    with disk_errors(path):
        above, folder = existing_parent(path), path / SHARDS
        if not is_folder(folder):
            folder.mkdir(parents=True, exist_ok=True)
        while folder != above.parent and folder != folder.parent:
            with suppress(PermissionError):  # a folder above may belong to another user, who lets us in but not list it
                sync_folder(folder)
            folder = folder.parent


def occupy(path: Path, lock: FolderLock, overwrite: bool) -> bool:
    """Take the folder for a run. Returns whether nobody else works in it. Deletes what is there with `overwrite`.

    Raises ConflictError if another process makes that impossible, and MachineError.
    """
    is_alone = lock.alone()
    if overwrite and not is_alone:
        raise in_use(path)
    if not is_alone and not lock.together():
        raise in_use(path)
    with disk_errors(path), ExitStack() as others:
        if overwrite:
            for folder in all_folders(path):  # a worker may have outlived the run that held the dump
                if not others.enter_context(FolderLock(folder)).alone():
                    raise in_use(path)
            remove_dump(path)
        remove_stale(path)
        remove_unused(path / SHARDS)
    return is_alone


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return path if is_there(path) else existing_parent(path.parent)


def stored_bytes(path: Path) -> int:
    """Return the bytes of the shard files of a dump, of all generations, whatever state it is in."""
    folders = [folder / SHARDS for folder in (path, *all_folders(path))]
    return sum(
        allocated_bytes(folder / name) for folder in folders for name in names_in(folder) if OURS.fullmatch(name)
    )


def remove_dump(path: Path) -> None:
    """Delete the files of a dump, and nothing else, in the reverse of the order in which they were made.

    If that is interrupted, an incomplete dump is left, or what an interrupted start leaves.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    for generation in all_folders(path):  # of a dump that grew, the last one first
        remove_dump(generation)
        for folder in (generation / SHARDS, generation, path / MORE):
            with suppress(OSError):  # it is not there, or somebody keeps other things in it
                folder.rmdir()
    for name in sorted(names_in(path / SHARDS), key=lambda name: ".json" not in name):  # records first
        if OURS.fullmatch(name):
            (path / SHARDS / name).unlink()
    for name in (FAILURES, PLAN, COLUMNS, IMAGES):
        (path / name).unlink(missing_ok=True)


Write = Callable[[Path], object]  # fills the empty file at a path


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ConflictError for a path inside a dump, and for one that exists and may not be replaced."""
    refuse_inside(path)
    if is_folder(path):
        raise ConflictError(f"-o {shown(path)}: there is a folder of that name", "name a file")
    if is_there(path) and not is_file(path):
        raise ConflictError(f"-o {shown(path)}: this is not a regular file", "name another file; -o - writes to stdout")
    if is_there(path) and not overwrite:
        raise _there(path)


def refuse_inside(path: Path) -> None:
    """Raise ConflictError for a path inside a dump, whose files must not be overwritten by an export of it."""
    for folder in (path.resolve(), *path.resolve().parents):
        if is_file(folder / PLAN) and is_folder(folder / SHARDS):
            raise ConflictError(
                f"-o {shown(path)}: this is inside the dump {shown(folder)}", "name a place outside of it"
            )


def write_files(files: Mapping[Path, Write], overwrite: bool = False) -> None:
    """Fill files of one folder, and give them their names, in this order, when all of them are on the disk.

    With `overwrite`, the last file is removed before any other is replaced, so it never lies beside files that belong
    to another. Raises ConflictError if a name is taken by then, and MachineError.
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
    return ConflictError(f"-o {shown(path)}: this file is there already", "name another file, or give --overwrite")
