"""The images of a run in row order: what names each in the dump, where it is, and how large it was when listed."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from featcli.inputs.storage import Ground, Storage

# What is collected from a folder. The content decides how a file is read (pixels/formats.py); a suffix only says that
# somebody meant it as a picture, so suffixes that cannot be read are collected too and end as recorded failures.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .tif .tiff .btf .tf8 .bmp .dib .gif .ppm .pgm .pbm .pnm .pfm"
    " .avif .avifs .jp2 .j2k .jpx .jpf .jpm .j2c .jpc .ico .tga .tpic .heic .heif .heics .heifs .hif .jxl".split()
)
MISSING = -1  # the size of an image that is not there, or that nobody told
BESIDE = 4  # rows before an image and behind it that are tried, to tell that it alone may not be read
WHOLE = -1  # the place of an image that is a file by itself


class Image(NamedTuple):
    """One input picture. `key` names it in the dump, `path` finds it here, `bytes` is its size when listed.

    `folder` is the input that it was found through, empty for the current folder. In a tar file, `path` is that
    file, `place` is where in it the picture begins, and `tar_state` what told it from others when it was listed.
    `grounds` are the folders that it can be missed in: where one of them is gone, no image is. `beside` are URLs of
    others on its server: where none of them may be read either, it is no fault of its own.
    """

    key: str
    path: str
    bytes: int
    folder: str = ""
    place: int = WHOLE
    tar_state: str = ""
    grounds: tuple[Ground, ...] = ()
    beside: tuple[str, ...] = ()


class Origin(NamedTuple):
    """Where images were found: a folder or a tar file, and what leads their keys."""

    folder: str  # a path or a URL; empty for the current folder
    leads: str = ""
    tar: str = ""  # its path or URL
    tar_state: str = ""  # size and time of the last change, or what a file system elsewhere has for that
    storage: Storage | None = None  # of files of this machine


class ListedImage(NamedTuple):
    """An image as it was found."""

    key: str
    origin: int
    bytes: int
    place: int = WHOLE


class ImageList:
    """The images in row order. About 150 bytes an image beside its key.

    That is the order of their keys (by bytes, whatever the locale); those in tar files come after them, tar by tar,
    in the order in which they lie there.
    """

    def __init__(self, found: Sequence[ListedImage], origins: Sequence[Origin]) -> None:
        is_in_tar = any(origin.tar for origin in origins)
        ordered = sorted(found, key=_tar_order if is_in_tar else lambda image: os.fsencode(image.key))
        self.keys = [image.key for image in ordered]
        self.sizes = array("q", [image.bytes for image in ordered])
        self._origin = array("L", [image.origin for image in ordered])
        self._places = array("q", [image.place for image in ordered] if is_in_tar else [])
        self._origins = origins

    @property
    def folders(self) -> list[tuple[str, str]]:
        """(what leads the keys, the folder) for images that are files of this machine by themselves; each pair once."""
        local = (origin for origin in self._origins if origin.storage is not None and not origin.tar)
        return [*dict.fromkeys((origin.leads, origin.folder) for origin in local)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Image:
        key = self.keys[row]
        origin = self._origins[self._origin[row]]
        if origin.tar:
            return Image(key, origin.tar, self.sizes[row], origin.folder, self._places[row], origin.tar_state)
        path = self._path(row)
        if is_url(path):
            return Image(key, path, self.sizes[row], origin.folder, beside=self._beside(row))
        grounds = () if origin.storage is None else origin.storage.grounds
        return Image(key, path, self.sizes[row], origin.folder, grounds=grounds)

    def _path(self, row: int) -> str:
        """Of an image that is a file by itself."""
        origin = self._origins[self._origin[row]]
        return joined(origin.folder, self.keys[row][len(origin.leads) :])

    def _beside(self, row: int) -> tuple[str, ...]:
        """The nearest rows on the same server."""
        near = [one for step in range(1, BESIDE + 1) for one in (row - step, row + step) if 0 <= one < len(self)]
        paths = [self._path(one) for one in near if not self._origins[self._origin[one]].tar]
        return tuple(path for path in paths if server_of(path) == server_of(self._path(row)))


def is_url(name: str) -> bool:
    """Whether it names something behind a file system of fsspec's."""
    return "://" in name


def server_of(url: str) -> str:
    """The beginning of a URL that names the server, or the bucket."""
    protocol, _, rest = url.partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"


def joined(folder: str, rest: str) -> str:
    """A path below a folder; below a URL as text, so that nothing leads out of it."""
    if not is_url(folder):
        return os.path.join(folder, rest)
    return folder + rest if folder.endswith("/") else f"{folder}/{rest}"


def without_dots(path: str) -> str:
    """An absolute path without `.` and `..`; where links make `link/..` another folder than it looks, the system's."""
    plain = os.path.normpath(path)
    folder, name = os.path.split(path)
    if os.pardir not in path.split(os.sep) or os.path.realpath(folder) == os.path.realpath(os.path.dirname(plain)):
        return plain
    return os.path.join(os.path.realpath(folder), name)


def _tar_order(image: ListedImage) -> tuple[int, Any]:
    return (0, os.fsencode(image.key)) if image.place == WHOLE else (1 + image.origin, image.place)
