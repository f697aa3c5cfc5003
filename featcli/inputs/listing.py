"""Folders, images, lists and stdin -> the sorted list of images.

Looks at names and sizes, and into files that were named by themselves, for what cannot be a picture.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcli.errors import UsageError, counted, most_first, shown
from featcli.inputs.archives import SUFFIX, is_tar, members, state_of
from featcli.inputs.folders import LINKED, LOOP, Walk
from featcli.inputs.image_list import (
    SUFFIXES,
    WHOLE,
    ImageList,
    ListedImage,
    Origin,
    is_url,
    joined,
)
from featcli.inputs.lists import read_list
from featcli.inputs.signatures import START, Signature, by_suffix, foreign, foreign_file
from featcli.inputs.storage import Storage
from featcli.inputs.urls import CHAINED, Remote, out_of_reach
from featcli.spec.groups import InputSpec
from featcli.system.files import is_file, is_folder, reading, state_at

MOST_KINDS = 3  # of other files that a message counts by suffix


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
    names that begin with a dot are passed over. Raises UsageError: nothing found, an input that is not there or is no
    picture, a folder that cannot be read, names outside `root`, two files with one key.
    """
    inputs, files_from = asked.input_names, asked.list_name
    origins: list[Origin] = []
    listing = Listing(ImageList([], []))
    found: list[ListedImage] = []
    is_one = len(inputs) == 1 and files_from is None
    _refuse_foreign(inputs)
    for name in inputs:
        origin, images = (_remote if is_url(name) else _local)(name, is_one, asked.follow_links, listing.ignored)
        found += (ListedImage(origin.leads + key, len(origins), size, place) for key, size, place in images)
        origins.append(origin)
    if files_from is not None:
        root = asked.root_name or ""
        storage = Storage("" if is_url(root) else root)
        for folder, names in read_list(asked, files_from, storage).items():
            found += (ListedImage(key, len(origins), size) for key, size in names)
            origins.append(Origin(folder, storage=None if is_url(folder) else storage))
    found, listing.repeated = _unique(found, origins)
    if not found:
        raise _nothing_found(asked, listing.ignored)
    listing.images = ImageList(found, origins)
    _refuse_if_none_is_a_picture(listing.images)
    return listing


Names = Iterable[tuple[str, int, int]]  # what follows the lead of a key, size, place


def _local(name: str, is_one: bool, follow_links: bool, ignored: Counter[str]) -> tuple[Origin, Names]:
    path = Path(name)
    if is_folder(path):
        leads = "" if is_one else path.resolve().name + "/"
        storage = Storage(str(path))
        walk = Walk(follow_links, ignored, storage)
        return Origin(str(path), leads, storage=storage), ((key, size, WHOLE) for key, size in walk.images(str(path)))
    if state_at(path, follow_links=False) is None:
        raise UsageError(
            f"input {shown(name)}: no such file or folder", "an input is a folder, a tar file, an image or a URL"
        )
    if not is_tar(name):
        storage = Storage(str(path.parent))
        return Origin(str(path.parent), storage=storage), [(path.name, storage.size_of(str(path)), WHOLE)]
    try:
        with reading(path, "input") as file:
            origin = Origin(str(path.parent), "" if is_one else path.stem + "/", name, state_of(file.regular.state()))
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


def _refuse_foreign(inputs: Sequence[str]) -> None:
    """Raise UsageError where inputs are something else than pictures. A suffix of pictures says that one was meant."""
    found = [(name, what) for name in inputs if (what := _foreign_input(name)) is not None and not what.is_picture]
    if found:
        name, what = found[0]
        more = f", and {counted(len(found) - 1, 'other input')} likewise" if len(found) > 1 else ""
        hint = what.hint if len(found) == len(inputs) else f"name the others alone; {what.hint}"
        raise UsageError(f"input {shown(name)}: {what.what}, no picture{more}", hint)


def _foreign_input(name: str) -> Signature | None:
    """What an input is that is neither a folder, nor a tar, nor named as a picture, nor one."""
    last = name.rstrip("/").rpartition("/")[2]
    if os.path.splitext(last)[1].lower() in SUFFIXES or is_tar(name):
        return None
    if not is_url(name):
        return foreign_file(name) if is_file(name) else None
    remote = Remote(name)
    return None if remote.is_folder() else foreign(remote.start(START), last)


def _refuse_if_none_is_a_picture(images: ImageList) -> None:
    """Raise UsageError where every image is a file that was named for one and holds something else."""
    first = None
    for image in map(images.__getitem__, range(len(images))):
        if image.place != WHOLE:
            return
        suffix = os.path.splitext(image.path)[1].lower()
        found = by_suffix(suffix) if is_url(image.path) else foreign_file(image.path)
        if found is None or found.is_picture or (found.is_text and suffix in SUFFIXES):  # a page of an error, say
            return
        first = first or (image, found)
    if first is not None:
        image, found = first
        others = f", and none of the {len(images) - 1:,} others is one" if len(images) > 1 else ""
        raise UsageError(f"no picture: {shown(image.path)} is {found.what}{others}", found.hint)


def _nothing_found(asked: InputSpec, ignored: Counter[str]) -> UsageError:
    """What the inputs hold instead of images, with what may help."""
    inputs, files_from = asked.input_names, asked.list_name
    where = ", ".join(shown(name) for name in [*inputs, *([files_from] if files_from else [])])
    others = {suffix: count for suffix, count in most_first(ignored).items() if suffix not in (LINKED, LOOP)}
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in [*others.items()][:MOST_KINDS])
    kinds += ", ..." if len(others) > MOST_KINDS else ""
    beside = [f"{counted(sum(others.values()), 'file')} of other kinds: {kinds}"] if others else []
    beside += [f"{counted(ignored[LINKED], 'linked folder')} not looked into"] if ignored[LINKED] else []
    message = f"no images in {where}" + (f" ({'; '.join(beside)})" if beside else "")
    found = by_suffix(next(iter(others), ""))
    if not inputs:
        hint = "is the list empty?"
    elif ignored[LINKED]:
        hint = "--follow-links looks into folders that are links"
    elif ignored[SUFFIX]:
        hint = "name the tar files themselves, such as FOLDER/*.tar"
    elif found is not None and not found.is_text:
        hint = found.hint
    else:
        hint = f"pictures end in {' '.join(sorted(SUFFIXES))}"
    return UsageError(message, hint)


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
