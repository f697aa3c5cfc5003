"""Where the last run found the pictures of a dump, relative to it: an extended attribute of its folder, no file in it.

So equal work gives equal bytes wherever it lies, and nobody who is given the files learns where their maker keeps
pictures, or has pictures of his own opened by them. Where a file system knows no such attributes nothing is remembered.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from featcli.inputs.image_list import ImageList, without_dots

ATTRIBUTE = "user.featcli.pictures"
MOST_BYTES = 2000  # ext4 has some 4,000 for all attributes of a folder


def remember_pictures(path: Path, images: ImageList) -> None:
    """Note at the folder of a dump where its images lie, if that can be: the pictures can be named without it."""
    if not hasattr(os, "setxattr"):
        return
    with suppress(OSError):
        here = os.path.realpath(path)
        places = [(lead, os.path.relpath(_absolute(folder), here)) for lead, folder in images.folders]
        content = json.dumps(places).encode("ascii")
        if places and len(content) <= MOST_BYTES:
            os.setxattr(path, ATTRIBUTE, content)
        else:
            os.removexattr(path, ATTRIBUTE)


def remembered_pictures(path: Path) -> list[tuple[str, str]]:
    """(what leads the keys of the images in it, a folder) for each that is still there, the longest lead first."""
    if not hasattr(os, "getxattr"):
        return []
    here = os.path.realpath(path)
    try:
        noted = json.loads(os.getxattr(path, ATTRIBUTE))
        places = [(str(lead), os.path.normpath(os.path.join(here, str(folder)))) for lead, folder in noted]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return sorted((place for place in places if os.path.isdir(place[1])), key=lambda place: -len(place[0]))


def _absolute(folder: str) -> str:
    """The path of a folder with its own name, a link's too, below the real path of the one that holds it."""
    above, name = os.path.split(without_dots(os.path.join(os.getcwd(), folder)))
    return os.path.join(os.path.realpath(above), name)
