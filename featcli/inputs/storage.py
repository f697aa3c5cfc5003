"""Know the folders that images lie on: if one is gone, a missing image is not at fault.

A mount that goes away leaves an empty folder in its place. Device and inode tell one from the other.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from featcli.errors import MachineError, UsageError, shown
from featcli.inputs.image_list import MISSING
from featcli.system.faults import RESUMES, is_of_machine, machine_error
from featcli.system.files import identity, names_in


class Ground(NamedTuple):
    """A folder, with what told it from others when images were listed."""

    path: str
    identity: tuple[int, int] | None  # device and inode; None on a machine where the numbers are others


class Storage:
    """The folder that images are listed below, and the top of each further file system on which some were found."""

    def __init__(self, folder: str) -> None:
        """Look at the folder. Raises MachineError."""
        path = folder or os.curdir
        found = identity(path)
        self._grounds = {} if found is None else {found[0]: Ground(path, found)}

    @property
    def grounds(self) -> tuple[Ground, ...]:
        """All folders of this storage, the listed one first."""
        return tuple(self._grounds.values())

    def size_of(self, path: str) -> int:
        """Return the size of a regular file in bytes; MISSING for anything else, which is explained when it is read.

        Raises MachineError if the machine cannot tell, and UsageError for a folder that may not be entered.
        """
        try:
            found = os.stat(path)
        except OSError as error:
            if is_of_machine(error):
                raise machine_error(f"image {shown(path)}", error) from error
            if error.errno == errno.EACCES and may_not_be_entered(path):
                raise UsageError(
                    f"folder {shown(os.path.dirname(path) or os.curdir)}: {error.strerror}",
                    "make it readable, or leave it out: its images would be missing",
                ) from error
            return MISSING
        except ValueError:  # no file can have such a name
            return MISSING
        if found.st_dev not in self._grounds:
            self._grounds[found.st_dev] = _top_of(path)
        return found.st_size if stat.S_ISREG(found.st_mode) else MISSING


def may_not_be_entered(path: str) -> bool:
    """Return whether the rights of a folder above forbid a path. Those of a link's target do not count."""
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _top_of(path: str) -> Ground:
    """Return the top folder of the file system that a file is on. Raises MachineError."""
    top = os.path.dirname(os.path.realpath(path))
    found = identity(top)
    while (above := os.path.dirname(top)) != top:
        other = identity(above)
        if found is None or other is None or other[0] != found[0]:
            break
        top, found = above, other
    return Ground(top, found)


def refuse_if_gone(grounds: tuple[Ground, ...]) -> None:
    """Raise MachineError unless every ground is still the same folder."""
    for path, before in grounds:
        now = identity(path)
        if now is None or (now != before if before is not None else not names_in(path)):
            what = "it is no longer there" if now is None else "it is empty, or not the folder that was listed"
            raise MachineError(f"input folder {shown(path)}: {what}", f"bring it back; {RESUMES}")
