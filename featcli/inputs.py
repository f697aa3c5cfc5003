"""Folders, images, lists and stdin -> the sorted list of images. Looks at names and sizes, never into a file."""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from featcli.errors import UsageError, counted, shown

# What is collected from a folder. The content decides how a file is read (images.py); a suffix only says that
# somebody meant it as a picture, so suffixes that cannot be read are collected too and end as recorded failures.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm .avif .jp2 .j2k .jpx .ico .tga"
    " .heic .heif .jxl".split()
)
LINKED, LOOP = "linked folders", "links back"  # kinds of what is passed over
MISSING = -1  # the size of an image that is not there


class Image(NamedTuple):
    """One input picture. `key` names it in the dump, `path` finds it here, `bytes` is its size when listed.

    `folder` is the input that it was found through, empty for the current folder.
    """

    key: str
    path: str
    bytes: int
    folder: str = ""


class ImageList:
    """The images in key order (bytes of the key, whatever the locale). About 150 bytes an image beside its key."""

    def __init__(self, found: Sequence[tuple[str, int, int]], origins: Sequence[tuple[str, str]]) -> None:
        """`found` has (key, origin, size); an origin is (folder, what leads its keys)."""
        ordered = sorted(found, key=lambda image: os.fsencode(image[0]))
        self.keys = [key for key, _, _ in ordered]
        self.sizes = array("q", [size for _, _, size in ordered])
        self._origin = array("L", [origin for _, origin, _ in ordered])
        self._origins = origins

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Image:
        key = self.keys[row]
        folder, prefix = self._origins[self._origin[row]]
        return Image(key, os.path.join(folder, key[len(prefix) :]), self.sizes[row], folder)


@dataclass
class Listing:
    """What was found: the images, and what was passed over."""

    images: ImageList
    ignored: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by suffix
    repeated: int = 0  # names listed more than once


@dataclass(frozen=True)
class Given:
    """Where images are looked for."""

    inputs: Sequence[str]  # folders and images
    files_from: str | None = None  # a list of names; - is stdin
    null: bool = False  # names in the list end in a zero byte
    root: str | None = None  # what they are relative to; None is the current folder
    allow_outside: bool = False  # whether a listed name may lead out of it
    follow_links: bool = False  # whether folders that are links are looked into


def find(given: Given) -> Listing:
    """The images of folders (recursive), image files, and a list of names.

    A key is the path below the input folder, led by the folder's name where there are several inputs; for an
    image given by itself its name; for a listed name its path below `root`, and for one outside its whole path.
    Links to files are followed, links to folders where that was asked for, but never back into a folder above;
    names that begin with a dot are passed over. Raises UsageError: nothing found, an input that is not there, a
    folder that cannot be read, names outside `root`, two files with one key.
    """
    inputs, files_from, root = given.inputs, given.files_from, given.root
    origins: list[tuple[str, str]] = []
    listing = Listing(ImageList([], []))
    found: list[tuple[str, int, int]] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            leads = "" if len(inputs) == 1 and files_from is None else path.resolve().name + "/"
            origins.append((str(path), leads))
            walk = _Walk(given.follow_links, listing.ignored)
            found += ((leads + key, len(origins) - 1, size) for key, size in walk.images(str(path)))
        elif os.path.lexists(path):
            origins.append((str(path.parent), ""))
            found.append((path.name, len(origins) - 1, _size(str(path))))
        else:
            raise UsageError(f"input {shown(name)}: no such file or folder", "an input is a folder or an image")
    if files_from is not None:
        if root is not None and not os.path.isdir(root):
            raise UsageError(f"--root {shown(root)}: no such folder", "names in the list are relative to it")
        origins.append((root or "", ""))
        found += ((key, len(origins) - 1, size) for key, size in _listed(given, files_from))
    found, listing.repeated = _unique(found, origins)
    if not found:
        passed_over = f" ({counted(sum(listing.ignored.values()), 'file')} of other kinds)" if listing.ignored else ""
        where = ", ".join(shown(name) for name in [*inputs, *([files_from] if files_from else [])])
        suffixes = f"pictures end in {' '.join(sorted(SUFFIXES))}"
        raise UsageError(f"no images in {where}{passed_over}", suffixes if inputs else "is the list empty?")
    listing.images = ImageList(found, origins)
    return listing


class _Folder(NamedTuple):
    """A folder to look into."""

    path: str
    below: str  # what leads its keys
    above: tuple[tuple[int, int], ...]  # the folders (device, inode) that lead to it, where links are followed


@dataclass(frozen=True)
class _Walk:
    """Through a folder and those below."""

    follow_links: bool
    ignored: Counter[str]

    def images(self, top: str) -> Iterator[tuple[str, int]]:
        """(key, size) of the images in a folder and those below."""
        left: list[_Folder] = [_Folder(top, "", ())]
        while left:
            folder = left.pop()
            try:
                yield from self._in_one(folder, left)
            except OSError as error:
                raise UsageError(
                    f"folder {shown(folder.path)}: {error.strerror}",
                    "make it readable, or leave it out: its images would be missing",
                ) from error

    def _in_one(self, folder: _Folder, left: list[_Folder]) -> Iterator[tuple[str, int]]:
        here = os.stat(folder.path)
        if (place := (here.st_dev, here.st_ino)) in folder.above:
            self.ignored[LOOP] += 1
            return
        above = (*folder.above, place) if self.follow_links else ()
        with os.scandir(folder.path) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    self.ignored["hidden"] += 1
                elif _is_folder(entry, self.follow_links):
                    left.append(_Folder(entry.path, f"{folder.below}{entry.name}/", above))
                elif _is_folder(entry, True):
                    self.ignored[LINKED] += 1
                elif suffix in SUFFIXES:
                    yield folder.below + entry.name, _size(entry.path)
                else:
                    self.ignored[suffix or "no suffix"] += 1


def _is_folder(entry: os.DirEntry[str], through_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=through_links)
    except OSError:  # a link that leads to itself
        return False


def _size(path: str) -> int:
    """The size of a regular file; MISSING for anything else, which decoding will then explain."""
    try:
        found = os.stat(path)
    except OSError:
        return MISSING
    return found.st_size if stat.S_ISREG(found.st_mode) else MISSING


def _listed(given: Given, files_from: str) -> Iterator[tuple[str, int]]:
    base = os.path.abspath(given.root or os.curdir)
    names = _read_names(files_from)
    if b"\0" in names and not given.null:
        raise UsageError(
            f"--files-from {shown(files_from)}: zero bytes in the list",
            "for a list from find -print0 give -0; otherwise it is no list of names in UTF-8",
        )
    for line in names.removeprefix(b"\xef\xbb\xbf").split(b"\0" if given.null else b"\n"):
        name = os.fsdecode(line if given.null else line.removesuffix(b"\r"))
        if not name:
            continue
        key = os.path.relpath(_without_dots(os.path.join(base, name)), base)
        if key == os.pardir or key.startswith(os.pardir + os.sep) or os.path.isabs(key):
            if not given.allow_outside:
                raise UsageError(
                    f"listed image {shown(name)}: outside {shown(given.root or os.curdir)}",
                    "give a folder that holds all listed images with --root (keys are relative to it),"
                    " or --allow-outside",
                )
            key = _without_dots(os.path.join(base, name))
        yield key.replace(os.sep, "/"), _size(os.path.join(base, key))


def _without_dots(path: str) -> str:
    """An absolute path without `.` and `..`; where links make `link/..` another folder than it looks, the system's."""
    plain = os.path.normpath(path)
    folder, name = os.path.split(path)
    if os.pardir not in path.split(os.sep) or os.path.realpath(folder) == os.path.realpath(os.path.dirname(plain)):
        return plain
    return os.path.join(os.path.realpath(folder), name)


def _read_names(files_from: str) -> bytes:
    if files_from == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(files_from).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--files-from {shown(files_from)}: {error.strerror}", "give a file, or - for stdin"
        ) from error


def _unique(
    found: list[tuple[str, int, int]], origins: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, int, int]], int]:
    """One of each key, and how many names were repeated. Raises UsageError where two files share a key."""
    first: dict[str, int] = {}
    kept = []
    for image in found:
        key, origin, _ = image
        if key not in first:
            first[key] = origin
            kept.append(image)
            continue
        one, two = (os.path.join(origins[o][0], key[len(origins[o][1]) :]) for o in (first[key], origin))
        if os.path.abspath(one) != os.path.abspath(two):
            raise UsageError(
                f"images {shown(one)} and {shown(two)} would both have the key {shown(key)}",
                "give the folder that holds both, or a list with --files-from and --root",
            )
    return kept, len(found) - len(kept)
