"""Note where the last run found the pictures, relative to the dump, in an extended attribute of its folder.

It is in no file of the dump, so equal work gives equal bytes wherever it lies. Nobody who gets the files learns where
their maker keeps pictures, or has his own pictures opened by them. On a file system without such attributes nothing is
noted.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from featcli.inputs.image_list import ImageList, without_dots

ATTRIBUTE = "user.featcli.pictures"
MOST_BYTES = 2000  # ext4 has about 4,000 for all attributes of a folder


def remember_pictures(path: Path, images: ImageList) -> None:
    """Note at the folder of a dump where its images lie, if that is possible: users can also name the place."""
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
    """Return (lead of the keys, folder) for each folder that still exists, the longest lead first."""
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
    """Return the path of a folder with its own name, also a link's, below the real path of the folder that holds it."""
    above, name = os.path.split(without_dots(os.path.join(os.getcwd(), folder)))
    return os.path.join(os.path.realpath(above), name)
