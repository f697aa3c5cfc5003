"""Turn folders, images, lists and stdin into the list of images in row order.

Only names and sizes are looked at, and the first bytes of files that were named by themselves, which may be no
pictures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from featcli.errors import UsageError, counted, most_first, shown
from featcli.inputs.archives import SUFFIX, Member, is_tar, members, state_of
from featcli.inputs.columns import ListedColumns, listed_columns
from featcli.inputs.folders import LINKED, LOOP, Walk
from featcli.inputs.image_list import SUFFIXES, WHOLE, ImageList, Origin, is_url
from featcli.inputs.keys import KeyPattern, first_rows
from featcli.inputs.leads import FILE, FOLDER, TAR, Input, is_only_one, leads_of, older_lead
from featcli.inputs.lists import NameList
from featcli.inputs.sidecars import Sidecars, Spool
from featcli.inputs.signatures import START, Signature, by_suffix, foreign, foreign_file
from featcli.inputs.storage import Storage
from featcli.inputs.tables import Table
from featcli.inputs.urls import CHAINED, Remote
from featcli.spec.groups import InputSpec
from featcli.system.files import is_file, is_folder, is_there, reading, state_at

INPUTS = "give a folder, a tar file, an image or a URL"
MOST_KINDS = 3  # kinds of other files that a message counts by suffix


@dataclass
class Listing:
    """The images that were found, and what was skipped."""

    images: ImageList
    ignored: Counter[str] = field(default_factory=Counter)  # files that are no pictures, by suffix
    repeated: int = 0  # names that were listed more than once
    excluded: int = 0  # names that fit a pattern of --exclude
    apart: int = 0  # files of pictures in tars that do not stand beside them
    idle: list[str] = field(default_factory=list)  # patterns of --exclude that no name fits
    total: int = 0  # images before --limit
    leads: dict[str, str] = field(default_factory=dict)  # the kind of each input, by what leads its keys
    older: Callable[[], ImageList | None] = lambda: None  # the list with the keys of older versions, if those differ

    def columns(self, label_level: int | None) -> ListedColumns | None:
        """Return the columns of the images. See `listed_columns`."""
        return listed_columns(self.images, self.leads, label_level)

    @property
    def remarks(self) -> list[str]:
        """What to say about patterns that exclude nothing, and about files beside pictures that have no effect."""
        found = []
        if self.idle:
            patterns = ", ".join(map(shown, self.idle))
            found.append(f"--exclude {patterns}: no key is like that, so it excludes nothing")
        if self.apart:
            files = f"{counted(self.apart, 'file')} {'is' if self.apart == 1 else 'are'}"
            found.append(f"{files} left out, not being beside the picture of that name: pack with tar --sort=name")
        return found


def find(asked: InputSpec) -> Listing:
    """Return the images of folders (with all below), tar files, image files, and a list of names.

    Rows are in this order: files, sorted by their keys, also if they were given by themselves; then tar by tar the
    images in it, in the order of the tar; then the listed names in the order of the list.

    A key is the path below the input folder or in the tar file. With several inputs it is led by the name of the
    folder, or of the tar without suffix; if two inputs have one name, longer parts of their paths tell them apart. The
    key of an image given by itself is its name. The key of a listed name is its path below `root`, or its whole path if
    it is outside.

    Links to files are followed. Links to folders are followed if that is asked for, but never back into a folder above.
    Names that begin with a dot are skipped. Raises UsageError if nothing is found, if an input is missing or no
    picture, if a folder cannot be read, if a name is outside `root`, or if two files have one key. Raises MachineError
    if the machine cannot tell.
    """
    inputs, has_list = asked.input_names, asked.files_from is not None or asked.table is not None
    images, exclusion = ImageList(), Exclusion(asked.exclude)
    listing = Listing(images)
    _refuse_foreign(inputs)
    spool = Spool()
    sources = [
        (_remote if is_url(name) else _local)(name, asked.follow_links, listing.ignored, spool) for name in inputs
    ]
    if asked.follow_links and not any(not is_url(name) and is_folder(Path(name)) for name in inputs):
        raise UsageError("--follow-links is only for folders", "leave --follow-links out: no INPUT is a local folder")
    named = [Input(name, source.kind) for name, source in zip(inputs, sources, strict=True)]
    is_one = not has_list and is_only_one(inputs)
    for source, lead in zip(sources, [""] * len(inputs) if is_one else leads_of(named), strict=True):
        origin = images.add_origin(source.origin._replace(leads=lead))
        for name, size, place in source.images(partial(exclusion.leaves, lead=lead)):
            images.add(lead + name, origin, size, place)
        listing.leads |= {lead.removesuffix("/"): source.kind} if lead else {}
    num_unlisted = len(images)
    table = None if asked.table is None else Table(asked)
    names = table or (NameList(asked) if has_list else None)
    if names is not None:
        names.add_to(images, exclusion.leaves)
    listing.apart = spool.apart
    listing.excluded, listing.idle = exclusion.count, exclusion.idle
    if not len(images):
        raise _nothing_found(asked, listing)
    listing.images, listing.repeated = _in_row_order(images, num_unlisted, table)
    listing.total = len(listing.images)
    if asked.limit is not None and asked.limit < listing.total:
        listing.images = listing.images.taken(np.arange(asked.limit))
    if names is not None:
        names.look_at(listing.images)  # only now, because no other file has to be there
    older = ["" if not has_list and len(inputs) == 1 else older_lead(one) for one in named]
    older += [""] * (len(images.origins) - len(older))
    if older != [origin.leads for origin in images.origins]:
        listing.older = partial(_with_leads, listing.images, older)
    if all(one.kind == FILE for one in named):
        _refuse_if_none_is_a_picture(listing.images)
    return listing


Wanted = Callable[[str], bool]  # whether an image is not excluded, by its key without its lead
Names = Iterable[tuple[str, int, int]]  # (key without its lead, size, place)


class _Source(NamedTuple):
    """The kind of an input, and the images in it that are wanted."""

    kind: str
    origin: Origin
    images: Callable[[Wanted], Names]


class Exclusion:
    """The patterns of --exclude, and how many keys fit them."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [KeyPattern(pattern) for pattern in patterns]
        self._used: set[str] = set()
        self.count = 0  # of keys

    def leaves(self, name: str, lead: str = "") -> bool:
        """Return whether the key of an image, which is led by `lead`, fits no pattern. Counts those that fit one."""
        fits = [pattern.text for pattern in self._patterns if pattern.fits(lead + name)] if self._patterns else ()
        self._used.update(fits)
        self.count += bool(fits)
        return not fits

    @property
    def idle(self) -> list[str]:
        """The patterns that no key fits."""
        return [pattern.text for pattern in self._patterns if pattern.text not in self._used]


def _local(name: str, follow_links: bool, ignored: Counter[str], spool: Spool) -> _Source:
    path = Path(name)
    if is_folder(path):
        storage = Storage(str(path))
        walk = Walk(follow_links, ignored, storage)
        return _Source(
            FOLDER,
            Origin(str(path), storage=storage),
            lambda wanted: ((key, size, WHOLE) for key, size in walk.images(str(path), wanted)),
        )
    if state_at(path, follow_links=False) is None:
        hint = "give --files-from -, which reads names from stdin" if name == "-" else INPUTS
        raise UsageError(f"input {shown(name)}: there is no such file or folder", hint)
    if is_there(path) and not is_file(path):
        raise UsageError(f"input {shown(name)}: it is a device, pipe or socket", INPUTS)
    if not is_tar(name):
        storage = Storage(str(path.parent))
        origin = Origin(str(path.parent), storage=storage)
        return _Source(FILE, origin, partial(_alone, path.name, lambda: storage.size_of(str(path))))
    try:
        with reading(path, "input") as file:
            origin = Origin(str(path.parent), "", name, state_of(file.regular.state()))
            sidecars = Sidecars(name, spool, ignored)
            inside = [*members(name, file, SUFFIXES, ignored, sidecars)]
            origin = origin._replace(columns=sidecars if sidecars.end() else None)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        cause = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(f"input {shown(name)}: {cause}", "make it readable, or leave it out") from error
    return _Source(TAR, origin, partial(_of_tar, inside))


def _remote(name: str, follow_links: bool, ignored: Counter[str], spool: Spool) -> _Source:
    remote, base = Remote(name), name.rstrip("/")
    folder, _, last = base.rpartition("/")
    if remote.is_folder():
        return _Source(FOLDER, Origin(base), partial(_pictures, name, remote.files, ignored))
    if not is_tar(name):
        return _Source(FILE, Origin(folder), partial(_alone, last, remote.size))
    origin = Origin(folder, "", name, remote.state())
    inside, others, sidecars = remote.read(partial(_inside, name, spool))
    origin = origin._replace(columns=sidecars if sidecars.end() else None)
    ignored.update(others)  # only now, because the last of the sidecars may have no picture
    return _Source(TAR, origin, partial(_of_tar, inside))


def _alone(name: str, size: Callable[[], int], wanted: Wanted) -> Names:
    if wanted(name):
        yield name, size(), WHOLE


def _of_tar(inside: Iterable[Member], wanted: Wanted) -> Names:
    return ((member.name, member.bytes, member.place) for member in inside if wanted(member.name))


def _inside(name: str, spool: Spool, file: IO[bytes]) -> tuple[list[Member], Counter[str], Sidecars]:
    """Return the images in a tar file, the counts of what else is in it, and the sidecars of the images."""
    ignored: Counter[str] = Counter()
    sidecars = Sidecars(name, spool, ignored)
    return [*members(name, file, SUFFIXES, ignored, sidecars)], ignored, sidecars


def _with_leads(images: ImageList, leads: Sequence[str]) -> ImageList | None:
    """Return the same images with other leads, one for each origin; None if two files would have one key."""
    led = images.led_by(leads)
    try:
        first = _first_rows(led)
    except UsageError:
        return None
    return led.taken(np.flatnonzero(first == np.arange(len(first))))


def _refuse_foreign(inputs: Sequence[str]) -> None:
    """Raise UsageError for inputs that are something else than pictures.

    A suffix of pictures makes a file a picture here.
    """
    found = [(name, what) for name in inputs if (what := _foreign_input(name)) is not None and not what.may_be_read]
    if found:
        name, what = found[0]
        more = f", and {counted(len(found) - 1, 'other input')} like it" if len(found) > 1 else ""
        hint = what.hint if len(found) == len(inputs) else f"name the others alone; {what.hint}"
        raise UsageError(f"input {shown(name)}: {what.refused}{more}", hint)


def _foreign_input(name: str) -> Signature | None:
    """Return what an input is if it is no folder, no tar and no picture, and has no suffix of pictures; else None."""
    last = name.rstrip("/").rpartition("/")[2]
    if os.path.splitext(last)[1].lower() in SUFFIXES or is_tar(name):
        return None
    if not is_url(name):
        return foreign_file(name) if is_file(name) else None
    remote = Remote(name)
    return None if remote.is_folder() else foreign(remote.start(START), last)


def _refuse_if_none_is_a_picture(images: ImageList) -> None:
    """Raise UsageError if all images are files that have a suffix of pictures and hold something else."""
    first = None
    for image in map(images.__getitem__, range(len(images))):
        if image.place != WHOLE:
            return
        suffix = os.path.splitext(image.path)[1].lower()
        found = by_suffix(suffix) if is_url(image.path) else foreign_file(image.path)
        if found is None or found.may_be_read:
            return
        if suffix in SUFFIXES and (found.is_picture or found.is_text):  # a picture with a wrong suffix; an error page
            return
        first = first or (image, found)
    if first is not None:
        image, found = first
        more = len(images) - 1
        others = f", and none of the {more:,} others is one" if more > 1 else ", nor is the other one" if more else ""
        what = f"{found.what}, which is not read" if found.is_picture else found.what
        raise UsageError(f"nothing here is a picture: {shown(image.path)} is {what}{others}", found.hint)


def kinds_of(ignored: Mapping[str, int]) -> str:
    """Return the suffixes of what was skipped with their counts, the most frequent first."""
    named = [f"{count:,} {suffix}" for suffix, count in most_first(ignored).items()]
    return ", ".join([*named[:MOST_KINDS], *(["..."] if len(named) > MOST_KINDS else [])])


def _nothing_found(asked: InputSpec, listing: Listing) -> UsageError:
    """Return the error that says what the inputs hold instead of images, and what may help."""
    if listing.excluded:
        what = f"--exclude leaves no image: {counted(listing.excluded, 'image')} would be there without it"
        return UsageError(what, "give a narrower pattern: * also stands for slashes")
    inputs, ignored = asked.input_names, listing.ignored
    listed = [] if asked.files_from is None else [shown(asked.list_name) if asked.list_name else "the list"]
    listed += [] if asked.table is None else ["the table"]
    where = ", ".join([*map(shown, inputs), *listed])
    others = {suffix: count for suffix, count in most_first(ignored).items() if suffix not in (LINKED, LOOP)}
    beside = [f"{counted(sum(others.values()), 'file')} of other kinds: {kinds_of(others)}"] if others else []
    beside += [f"{counted(ignored[LINKED], 'linked folder')} not looked into"] if ignored[LINKED] else []
    message = f"there are no images in {where}" + (f" ({'; '.join(beside)})" if beside else "")
    found = by_suffix(next(iter(others), ""))
    if not inputs:
        hint = "is the list empty?"
    elif ignored[LINKED]:
        hint = "give --follow-links, which looks into folders that are links"
    elif ignored[SUFFIX]:
        hint = "name the tar files themselves, such as FOLDER/*.tar"
    elif found is not None and not found.is_text:
        hint = found.hint
    else:
        hint = f"give files whose names end in {' '.join(sorted(SUFFIXES))}"
    return UsageError(message, hint)


def _pictures(
    name: str, files: Callable[[], Iterable[tuple[str, int]]], ignored: Counter[str], wanted: Wanted
) -> Names:
    for key, size in files():
        if "" in key.split("/") or CHAINED in key:
            raise UsageError(
                f"input {shown(name)}: the object {shown(key)} has a name that no file can have",
                "rename it, or list the others with --files-from",
            )
        suffix = os.path.splitext(key)[1].lower()
        if any(part.startswith(".") for part in key.split("/")):
            ignored["hidden"] += 1
        elif suffix not in SUFFIXES:
            ignored[suffix or "no suffix"] += 1
        elif wanted(key):
            yield key, size, WHOLE


def _in_row_order(images: ImageList, num_unlisted: int, table: Table | None) -> tuple[ImageList, int]:
    """Return the images as a dump has them, and how many names were repeated.

    Raises UsageError if two files have one key.
    """
    first = _first_rows(images, table)
    is_first = first == np.arange(len(first))
    order = images.row_order(num_unlisted)
    order = order[is_first[order]]
    is_in_order = len(order) == len(images) and bool((order[1:] > order[:-1]).all())
    return (images if is_in_order else images.taken(order)), len(images) - len(order)


def _first_rows(images: ImageList, table: Table | None = None) -> np.ndarray:
    """Return (N,) int64: the first row with the same key. Raises UsageError if two files have one key."""
    first = first_rows(images.keys)
    for row in np.flatnonzero(first != np.arange(len(first))).data:
        before = int(first[row])
        if table is not None and images.origin(row).columns is table:
            table.refuse_repeated(images, before, row)
            continue
        one, two = images.path(before), images.path(row)
        if os.path.abspath(one) != os.path.abspath(two) or images.place_of(before) != images.place_of(row):
            is_in_tar = images.origin(before).tar or images.origin(row).tar
            raise UsageError(
                f"images {shown(one)} and {shown(two)} would both have the key {shown(images.keys[row])}",
                "give one of them another name"
                if is_in_tar
                else "give the folder that holds both, or a list with --files-from and --root",
            )
    return first
