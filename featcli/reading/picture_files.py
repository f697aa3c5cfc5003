"""Find the files of a dump's pictures again by their keys: below a given folder, or where extract found them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from featcli.dump.folder import Dump
from featcli.dump.picture_folders import remembered_pictures
from featcli.errors import UsageError, counted, shown
from featcli.pixels.failure import UnreadableError
from featcli.system.files import is_folder, state_at

if TYPE_CHECKING:
    from featcli.reading.reader import DumpReader

CHANGED = "not the file that was extracted"
IN_MEMORY = "extracted from the memory of a Python program, in no file"


class PictureFiles:
    """Paths of pictures by row.

    `root` is the folder that keys are relative to. By default it is where the last run of `extract` found the pictures,
    or the current folder if that was not noted or is gone. A key that leads out of the folder is only followed with
    `allow_outside`, because a dump may come from anybody. Raises UsageError if `root` is no folder.
    """

    def __init__(self, dump: DumpReader, root: str | None = None, allow_outside: bool = False) -> None:
        self._dump = dump
        self._root = root
        self._allow_outside = allow_outside
        self._noted: dict[Path, list[tuple[str, str]]] = {}  # what dumps remember, as far as it was needed
        if root is not None and not is_folder(root):
            raise UsageError(f"--root {shown(root)}: there is no such folder", "give the folder that extract was given")

    def _folders(self, dump: Dump) -> tuple[list[tuple[str, str]], bool]:
        """Return (lead of the keys, folder) of each folder to look in, and whether the dump remembers them."""
        if self._root is None and dump.path not in self._noted:
            self._noted[dump.path] = remembered_pictures(dump.path)
        noted = self._noted.get(dump.path, [])
        return noted or [("", self._root or os.curdir)], bool(noted)

    @property
    def are_noted(self) -> bool:
        """Whether the dumps have notes of all folders."""
        return all(self._folders(dump)[1] for dump in self._dump.along_rows.dumps)

    def _path(self, dump: Dump, row: int, key: str) -> str:
        """Return the path of a row below its folder: its key, or a cell where keys are no paths."""
        planned = dump.plan.columns
        if planned is None or planned.path_column is None:
            return key
        return str(self._dump.columns[planned.path_column][row] or key)

    @property
    def where(self) -> str:
        """The folder for people, or how many folders there are."""
        dumps = self._dump.along_rows.dumps
        if all(dump.plan.is_in_memory for dump in dumps):
            return "this dump"
        folders = sorted({folder for dump in dumps for _, folder in self._folders(dump)[0]})
        if len(folders) > 1:
            return counted(len(folders), "folder")
        return shown(min(folders[0], os.path.relpath(folders[0]), key=len) if self.are_noted else folders[0])

    def find(self, row: int) -> tuple[str, str]:
        """Return the path of the picture of a row, and the folder that it was found in. Raises UnreadableError."""
        key, reason = self._dump.keys[row], "not there (see --root)"
        dump = self._dump.along_rows.dump_of(row)
        if dump.plan.is_in_memory:
            raise UnreadableError(IN_MEMORY, key)
        of_row = self._path(dump, row, key)
        for lead, folder in self._folders(dump)[0]:
            rest = of_row[len(lead) :]
            if not of_row.startswith(lead):
                continue
            if (os.path.isabs(rest) or ".." in rest.split("/")) and not self._allow_outside:
                raise UnreadableError("outside of it (see --allow-outside)", key)
            path = os.path.join(folder, rest)
            found = state_at(path)
            if found is None or not stat.S_ISREG(found.st_mode):
                continue
            if found.st_size == self._dump.sizes[row]:
                return path, folder
            reason = CHANGED
        raise UnreadableError(reason, key)
