"""Read lists of names, from a file or stdin. Each name becomes a key below the folder or URL that it is relative to."""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from collections.abc import Iterator

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import MISSING, is_url, without_dots
from featcli.inputs.signatures import START, foreign
from featcli.inputs.storage import Storage, refuse_if_gone
from featcli.inputs.urls import CHAINED, Remote
from featcli.spec.groups import InputSpec
from featcli.system.faults import machine_errors
from featcli.system.files import is_folder, read_at


def read_list(asked: InputSpec, storage: Storage) -> dict[str, list[tuple[str, int]]]:
    """Return (key, size) of the listed names, grouped by the folder, or the beginning of a URL, that they are below.

    `storage` is that of local names. Raises UsageError and MachineError.
    """
    root = asked.root_name or ""
    if root and not is_url(root) and not is_folder(root):
        raise UsageError(
            f"--root {shown(root)}: there is no such folder",
            "give the folder to which the names in the list are relative",
        )
    found: dict[str, list[tuple[str, int]]] = {}
    files_from, names = asked.list_name, asked.listed_names or ()
    content = b"" if files_from is None else _read_names(files_from)
    for name in names if files_from is None else _names(asked, files_from, content):
        is_remote = is_url(root) or is_url(name)
        folder, key, size = _listed_url(root, name) if is_remote else _listed_path(asked, name, storage)
        found.setdefault(folder, []).append((key, size))
    refuse_if_gone(storage.grounds)
    if files_from is not None and not any(
        size != MISSING or is_url(folder) for folder, listed in found.items() for _, size in listed
    ):
        _refuse_table(files_from, content)
    for folder in filter(is_url, found):
        Remote(folder)  # raises now if a package or an option is missing, before anything is planned
    return found


def _listed_url(root: str, name: str) -> tuple[str, str, int]:
    """Return what a listed URL is below, its key and its size.

    The size is MISSING: to ask for it takes as long as to read.
    """
    base = root.rstrip("/")
    if is_url(root) and (not is_url(name) or name.startswith(base + "/")):
        folder, key = base, name.removeprefix(base + "/")
    else:
        protocol, _, path = name.partition("://")
        key = path.lstrip("/")
        folder = f"{protocol}://" + "/" * (len(path) - len(key))
        if protocol in ("file", "local"):
            raise UsageError(f"listed image {shown(name)}: it is a file of this machine", "write it as a path")
    if {os.pardir, ""} & {*key.split("/")} or CHAINED in key:
        raise UsageError(
            f"listed image {shown(name)}: '..', '//' or '{CHAINED}' is in its URL", "write the URL without it"
        )
    return folder, key, MISSING


def _listed_path(asked: InputSpec, name: str, storage: Storage) -> tuple[str, str, int]:
    base = os.path.abspath(asked.root_name or os.curdir)
    key = os.path.relpath(without_dots(os.path.join(base, name)), base)
    if key == os.pardir or key.startswith(os.pardir + os.sep) or os.path.isabs(key):
        if not asked.allow_outside:
            raise UsageError(
                f"listed image {shown(name)}: it is outside {shown(asked.root_name or os.curdir)}",
                "give a folder that holds all listed images with --root (keys are relative to it), or --allow-outside",
            )
        key = without_dots(os.path.join(base, name))
    return asked.root_name or "", key.replace(os.sep, "/"), storage.size_of(os.path.join(base, key))


def _names(asked: InputSpec, files_from: str, content: bytes) -> Iterator[str]:
    if b"\0" in content and not asked.null:
        what = foreign(content[:START], files_from)
        if what is not None and not what.is_text:
            raise UsageError(f"--files-from {shown(files_from)}: it is {what.what}, not a list of names", what.hint)
        raise UsageError(
            f"--files-from {shown(files_from)}: the list has zero bytes in it",
            "give -0 for a list from find -print0; any other list has to be UTF-8 text without zero bytes",
        )
    for line in content.removeprefix(codecs.BOM_UTF8).split(b"\0" if asked.null else b"\n"):
        name = os.fsdecode(line if asked.null else line.removesuffix(b"\r"))
        if name:
            yield name


def _refuse_table(files_from: str, content: bytes) -> None:
    """Raise UsageError for a list that names no existing file and whose first line has columns or brackets."""
    first = content.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0]
    what = "JSON" if first[:1] in (b"{", b"[") else "a table" if re.search(rb"[,;\t]", first) else ""
    if what:
        column = "; the first column of a table: cut -d, -f1 TABLE | featcli extract --files-from -"
        raise UsageError(
            f"--files-from {shown(files_from)}: it is {what}, not a list of names: no line of it"
            " names a file that is there",
            f"give the paths alone, one a line{column if what != 'JSON' else ''}",
        )


def _read_names(files_from: str) -> bytes:
    try:
        with machine_errors("--files-from", files_from):
            return sys.stdin.buffer.read() if files_from == "-" else _whole(files_from)
    except OSError as error:
        raise UsageError(
            f"--files-from {shown(files_from)}: {error.strerror}", "give a file, or - for stdin"
        ) from error


def _whole(path: str) -> bytes:
    """Return all bytes of a file or of a pipe, such as a shell's `<(...)`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return read_at(descriptor, os.fstat(descriptor).st_size + 1, 0)
        pieces = []
        while piece := os.read(descriptor, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)
