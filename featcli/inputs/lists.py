"""Read lists of names, from a file or stdin. Each name becomes a key below the folder or URL that it is relative to.

They may have many millions of lines, so no more than the text of the list itself is held beside the rows.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from array import array
from collections.abc import Callable, Iterator

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import MISSING, ImageList, Origin, is_url, without_dots
from featcli.inputs.signatures import START, foreign
from featcli.inputs.storage import Storage, refuse_if_gone
from featcli.inputs.urls import CHAINED, Remote
from featcli.spec.groups import InputSpec
from featcli.system.faults import machine_errors
from featcli.system.files import is_folder, read_at

BEGINS = 1 << 16  # bytes from the beginning of a list that are kept, to tell a table by its first line


class NameList:
    """The names that --files-from lists. Raises UsageError if the folder that they are relative to is not there."""

    def __init__(self, asked: InputSpec) -> None:
        root = asked.root_name or ""
        if root and not is_url(root) and not is_folder(root):
            raise UsageError(
                f"--root {shown(root)}: there is no such folder",
                "give the folder to which the names in the list are relative",
            )
        self._asked = asked
        self._storage = Storage("" if is_url(root) else root)
        self._begins = b""  # the first bytes of the list, if it is a file
        self._first = 0  # number of its first origin

    def add_to(self, images: ImageList, wanted: Callable[[str], bool]) -> None:
        """Add the wanted images, in the order of the list, without their sizes. Raises UsageError and MachineError."""
        root, numbers = self._asked.root_name or "", dict[str, int]()
        self._first = len(images.origins)
        for name in self._names():
            is_remote = is_url(root) or is_url(name)
            folder, key = (
                listed_url(root, name) if is_remote else (root, listed_path(root, name, self._asked.allow_outside))
            )
            if not wanted(key):
                continue
            if folder not in numbers:
                storage = None if is_remote else self._storage
                numbers[folder] = images.add_origin(Origin(folder, storage=storage))
            images.add(key, numbers[folder])
        for folder in filter(is_url, numbers):
            Remote(folder)  # raises now if a package or an option is missing, before anything is planned

    def look_at(self, images: ImageList) -> None:
        """Note the sizes of the listed files of this machine. Raises UsageError and MachineError."""
        sizes = note_sizes(images, self._first)
        refuse_if_gone(self._storage.grounds)
        if self._asked.list_name is not None and sizes and max(sizes) == MISSING:
            _refuse_table(self._asked.list_name, self._begins)

    def _names(self) -> Iterator[str]:
        asked = self._asked
        if asked.list_name is None:
            return iter(asked.listed_names or ())
        content = _read_names(asked.list_name)
        self._begins = content[:BEGINS]
        return _lines(asked, asked.list_name, content)


def note_sizes(images: ImageList, origin: int) -> array[int]:
    """Note the sizes of the files of this origin and later ones, and return those of files of this machine.

    Raises UsageError and MachineError.
    """
    sizes = array("q")
    if all(one.storage is None for one in images.origins[origin:]):
        return sizes  # to ask for the size of a URL takes as long as to read it
    for row, (number, path) in enumerate(zip(images.numbers, images.paths(), strict=True)):
        storage = images.origins[number].storage if number >= origin else None
        if storage is not None:
            images.sizes[row] = storage.size_of(path)
            sizes.append(images.sizes[row])
    return sizes


def listed_url(root: str, name: str) -> tuple[str, str]:
    """Return what a listed URL is below, and its key. Raises UsageError."""
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
    return folder, key


def listed_path(root: str, name: str, allow_outside: bool) -> str:
    """Return the key of a listed path: its path below the root, or all of it for one outside. Raises UsageError."""
    if not {"", os.curdir, os.pardir} & {*name.split("/")}:
        return name  # as it is, which saves most of the time that a long list takes
    base = os.path.abspath(root or os.curdir)
    key = os.path.relpath(without_dots(os.path.join(base, name)), base)
    if key == os.pardir or key.startswith(os.pardir + os.sep) or os.path.isabs(key):
        if not allow_outside:
            raise UsageError(
                f"listed image {shown(name)}: it is outside {shown(root or os.curdir)}",
                "give a folder that holds all listed images with --root (keys are relative to it), or --allow-outside",
            )
        key = without_dots(os.path.join(base, name))
    return key.replace(os.sep, "/")


def _lines(asked: InputSpec, files_from: str, content: bytes) -> Iterator[str]:
    if b"\0" in content and not asked.null:
        what = foreign(content[:START], files_from)
        if what is not None and not what.is_text:
            raise UsageError(f"--files-from {shown(files_from)}: it is {what.what}, not a list of names", what.hint)
        raise UsageError(
            f"--files-from {shown(files_from)}: the list has zero bytes in it",
            "give -0 for a list from find -print0; any other list has to be UTF-8 text without zero bytes",
        )
    end, first = b"\0" if asked.null else b"\n", len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)
    while first < len(content):
        stop = content.find(end, first)
        line = content[first : stop if stop >= 0 else None]
        name = os.fsdecode(line if asked.null else line.removesuffix(b"\r"))
        if name:
            yield name
        first = stop + 1 if stop >= 0 else len(content)


def _refuse_table(files_from: str, begins: bytes) -> None:
    """Raise UsageError for a list that names no existing file and whose first line has columns or brackets."""
    first = begins.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0]
    what = "JSON" if first[:1] in (b"{", b"[") else "a table" if re.search(rb"[,;\t]", first) else ""
    if what:
        raise UsageError(
            f"--files-from {shown(files_from)}: it is {what}, not a list of names: no line of it"
            " names a file that is there",
            "give a table with --table, which has a column of paths and may have others; a list has paths alone",
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
