"""Folders, images, lists and stdin -> the sorted list of images. Looks at names and sizes, never into a file."""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from featcli.errors import UsageError, counted, shown
from featcli.inputs.archives import SUFFIX, is_tar, members, state_of
from featcli.inputs.image_list import MISSING, WHOLE, ImageList, ListedImage, Origin, is_url, joined
from featcli.inputs.urls import CHAINED, Remote, out_of_reach
from featcli.spec.groups import InputSpec
from featcli.system.files import open_regular

# What is collected from a folder. The content decides how a file is read (images.py); a suffix only says that
# somebody meant it as a picture, so suffixes that cannot be read are collected too and end as recorded failures.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm .avif .jp2 .j2k .jpx .ico .tga"
    " .heic .heif .jxl".split()
)
LINKED, LOOP = "linked folders", "links back"  # kinds of what is passed over


@dataclass
class Listing:
    """What was found: the images, and what was passed over."""

    images: ImageList
    ignored: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by suffix
    repeated: int = 0  # names listed more than once


def find(asked: InputSpec) -> Listing:
    """The images of folders (recursive), tar files, image files, and a list of names.

    A key is the path below the input folder, or in the tar file, led by the folder's name or the tar's without suffix
    where there are several inputs; for an image given by itself its name; for a listed name its path below `root`,
    and for one outside its whole path.
    Links to files are followed, links to folders where that was asked for, but never back into a folder above;
    names that begin with a dot are passed over. Raises UsageError: nothing found, an input that is not there, a
    folder that cannot be read, names outside `root`, two files with one key.
    """
    inputs, files_from = asked.input_names, asked.files_from
    origins: list[Origin] = []
    listing = Listing(ImageList([], []))
    found: list[ListedImage] = []
    is_one = len(inputs) == 1 and files_from is None
    for name in inputs:
        origin, images = (_remote if is_url(name) else _local)(name, is_one, asked.follow_links, listing.ignored)
        found += (ListedImage(origin.leads + key, len(origins), size, place) for key, size, place in images)
        origins.append(origin)
    if files_from is not None:
        for folder, names in _listed(asked, files_from).items():
            found += (ListedImage(key, len(origins), size) for key, size in names)
            origins.append(Origin(folder))
    found, listing.repeated = _unique(found, origins)
    if not found:
        passed_over = f" ({counted(sum(listing.ignored.values()), 'file')} of other kinds)" if listing.ignored else ""
        where = ", ".join(shown(name) for name in [*inputs, *([files_from] if files_from else [])])
        suffixes = f"pictures end in {' '.join(sorted(SUFFIXES))}"
        if listing.ignored[SUFFIX]:
            suffixes = "name the tar files themselves, such as FOLDER/*.tar"
        raise UsageError(f"no images in {where}{passed_over}", suffixes if inputs else "is the list empty?")
    listing.images = ImageList(found, origins)
    return listing


Names = Iterable[tuple[str, int, int]]  # what follows the lead of a key, size, place


def _local(name: str, is_one: bool, follow_links: bool, ignored: Counter[str]) -> tuple[Origin, Names]:
    path = Path(name)
    if path.is_dir():
        leads = "" if is_one else path.resolve().name + "/"
        walk = _Walk(follow_links, ignored)
        return Origin(str(path), leads), ((key, size, WHOLE) for key, size in walk.images(str(path)))
    if not os.path.lexists(path):
        raise UsageError(
            f"input {shown(name)}: no such file or folder", "an input is a folder, a tar file, an image or a URL"
        )
    if not is_tar(name):
        return Origin(str(path.parent)), [(path.name, _size(str(path)), WHOLE)]
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            origin = Origin(str(path.parent), "" if is_one else path.stem + "/", name, state_of(file))
            inside = [*members(name, file, SUFFIXES, ignored)]
    except (OSError, ValueError) as error:
        cause = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(f"input {shown(name)}: {cause}", "make it readable, or leave it out") from error
    return origin, ((member.name, member.bytes, member.place) for member in inside)


def _remote(name: str, is_one: bool, follow_links: bool, ignored: Counter[str]) -> tuple[Origin, Names]:
    remote, base = Remote(name), name.rstrip("/")
    folder, _, last = base.rpartition("/")
    if remote.is_folder():
        return Origin(base, "" if is_one else last + "/"), _pictures(name, remote.files(), ignored)
    if not is_tar(name):
        return Origin(folder), [(last, remote.size(), WHOLE)]
    origin = Origin(folder, "" if is_one else last[: -len(SUFFIX)] + "/", name, remote.state())
    try:
        with remote.open() as file:
            inside = [*members(name, file, SUFFIXES, ignored)]
    except OSError as error:
        raise out_of_reach(name, error) from error
    return origin, ((member.name, member.bytes, member.place) for member in inside)


def _pictures(name: str, files: Iterable[tuple[str, int]], ignored: Counter[str]) -> Names:
    for key, size in files:
        if "" in key.split("/") or CHAINED in key:
            raise UsageError(
                f"input {shown(name)}: the object {shown(key)} has a name that no file can have",
                "rename it, or list the others with --files-from",
            )
        suffix = os.path.splitext(key)[1].lower()
        if any(part.startswith(".") for part in key.split("/")):
            ignored["hidden"] += 1
        elif suffix in SUFFIXES:
            yield key, size, WHOLE
        else:
            ignored[suffix or "no suffix"] += 1


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


def _listed(asked: InputSpec, files_from: str) -> dict[str, list[tuple[str, int]]]:
    """(key, size) of the names in a list, by the folder that they are below: a path or, of URLs, what leads them."""
    root = asked.root or ""
    if root and not is_url(root) and not os.path.isdir(root):
        raise UsageError(f"--root {shown(root)}: no such folder", "names in the list are relative to it")
    found: dict[str, list[tuple[str, int]]] = {}
    for name in _names(asked, files_from):
        folder, key, size = _listed_url(root, name) if is_url(root) or is_url(name) else _listed_path(asked, name)
        found.setdefault(folder, []).append((key, size))
    for folder in filter(is_url, found):
        Remote(folder)  # whatever it needs is said before anything is planned
    return found


def _listed_url(root: str, name: str) -> tuple[str, str, int]:
    """What a URL in a list is below, its key and its size, which is not asked for: that would take as long as it."""
    base = root.rstrip("/")
    if is_url(root) and (not is_url(name) or name.startswith(base + "/")):
        folder, key = base, name.removeprefix(base + "/")
    else:
        protocol, _, path = name.partition("://")
        key = path.lstrip("/")
        folder = f"{protocol}://" + "/" * (len(path) - len(key))
        if protocol in ("file", "local"):
            raise UsageError(f"listed image {shown(name)}: a file of this machine", "write it as a path")
    if {os.pardir, ""} & {*key.split("/")} or CHAINED in key:
        raise UsageError(f"listed image {shown(name)}: '..', '//' or '{CHAINED}' in a URL", "write it without")
    return folder, key, MISSING


def _listed_path(asked: InputSpec, name: str) -> tuple[str, str, int]:
    base = os.path.abspath(asked.root or os.curdir)
    key = os.path.relpath(_without_dots(os.path.join(base, name)), base)
    if key == os.pardir or key.startswith(os.pardir + os.sep) or os.path.isabs(key):
        if not asked.allow_outside:
            raise UsageError(
                f"listed image {shown(name)}: outside {shown(asked.root or os.curdir)}",
                "give a folder that holds all listed images with --root (keys are relative to it), or --allow-outside",
            )
        key = _without_dots(os.path.join(base, name))
    return asked.root or "", key.replace(os.sep, "/"), _size(os.path.join(base, key))


def _names(asked: InputSpec, files_from: str) -> Iterator[str]:
    names = _read_names(files_from)
    if b"\0" in names and not asked.null:
        raise UsageError(
            f"--files-from {shown(files_from)}: zero bytes in the list",
            "for a list from find -print0 give -0; otherwise it is no list of names in UTF-8",
        )
    for line in names.removeprefix(b"\xef\xbb\xbf").split(b"\0" if asked.null else b"\n"):
        name = os.fsdecode(line if asked.null else line.removesuffix(b"\r"))
        if name:
            yield name


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


def _unique(found: list[ListedImage], origins: Sequence[Origin]) -> tuple[list[ListedImage], int]:
    """One of each key, and how many names were repeated. Raises UsageError where two files share a key."""
    first: dict[str, ListedImage] = {}
    kept = []
    for image in found:
        before = first.setdefault(image.key, image)
        if before is image:
            kept.append(image)
            continue
        one, two = (_named(each, origins[each.origin]) for each in (before, image))
        if os.path.abspath(one) != os.path.abspath(two) or before.place != image.place:
            is_in_tar = origins[before.origin].tar or origins[image.origin].tar
            raise UsageError(
                f"images {shown(one)} and {shown(two)} would both have the key {shown(image.key)}",
                "give one of them another name"
                if is_in_tar
                else "give the folder that holds both, or a list with --files-from and --root",
            )
    return kept, len(found) - len(kept)


def _named(image: ListedImage, origin: Origin) -> str:
    return joined(origin.tar or origin.folder, image.key[len(origin.leads) :])
