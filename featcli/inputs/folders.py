"""Find the pictures in local folders and those below, by names and sizes alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import SUFFIXES
from featcli.inputs.storage import Storage, refuse_if_gone
from featcli.system.faults import is_of_machine, machine_error

LINKED, LOOP = "linked folders", "links back"  # kinds of names that are skipped


class _Folder(NamedTuple):
    """A folder to look into."""

    path: str
    below: str  # leads the keys of its images
    above: tuple[tuple[int, int], ...]  # (device, inode) of the folders that lead to it, if links are followed


@dataclass(frozen=True)
class Walk:
    """A walk through a folder and those below it."""

    follow_links: bool
    ignored: Counter[str]
    storage: Storage

    def images(self, top: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
        """Yield (key, size) of the wanted images in a folder and those below. Nothing is asked about other images.

        Raises UsageError and MachineError.
        """
        left: list[_Folder] = [_Folder(top, "", ())]
        while left:
            folder = left.pop()
            try:
                yield from self._in_one(folder, left, wanted)
            except OSError as error:
                if is_of_machine(error):
                    raise machine_error(f"folder {shown(folder.path)}", error) from error
                refuse_if_gone(self.storage.grounds)
                raise UsageError(
                    f"folder {shown(folder.path)}: {error.strerror}",
                    "make it readable, or leave it out: its images would be missing",
                ) from error
        refuse_if_gone(self.storage.grounds)  # else images may be missing that were never listed

    def _in_one(self, folder: _Folder, left: list[_Folder], wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
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
                elif suffix not in SUFFIXES:
                    self.ignored[suffix or "no suffix"] += 1
                elif wanted(folder.below + entry.name):
                    yield folder.below + entry.name, self.storage.size_of(entry.path)


def _is_folder(entry: os.DirEntry[str], through_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=through_links)
    except OSError as error:
        if is_of_machine(error):
            raise
        return False  # a link that leads to itself
