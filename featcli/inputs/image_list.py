"""Hold the images of a run in row order: their names in the dump, their places, and their sizes when listed."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from featcli.inputs.columns import ColumnSource
    from featcli.inputs.storage import Ground, Storage

# A folder gives the files with these suffixes. How a file is read depends on its content (pixels/formats.py). A suffix
# only says that somebody meant it as a picture, so files that cannot be read are listed too, and become recorded
# failures.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .tif .tiff .btf .tf8 .bmp .dib .gif .ppm .pgm .pbm .pnm .pfm"
    " .avif .avifs .jp2 .j2k .jpx .jpf .jpm .j2c .jpc .ico .tga .tpic .heic .heif .heics .heifs .hif .jxl".split()
)
MISSING = -1  # the size of an image that is not there, or whose size nobody asked for
BESIDE = 4  # rows on either side that are tried, to tell whether one image alone may not be read
WHOLE = -1  # the place of an image that is a file by itself


class Image(NamedTuple):
    """One input picture. `key` names it in the dump, `path` finds it here, `bytes` is its size when listed.

    `folder` is the input that it was found in, empty for the current folder. For an image in a tar file, `path` is the
    tar, `place` is the offset of the picture, and `tar_state` tells the tar from others. `grounds` are folders that
    hold all images: if one of them is gone, no image can be found. `beside` are URLs of other images on its server: if
    none of these may be read either, this image is not at fault. `picture` is a picture in memory, of Pillow, numpy or
    torch: then `bytes` are those of its pixels, and there is no path.
    """

    key: str
    path: str
    bytes: int
    folder: str = ""
    place: int = WHOLE
    tar_state: str = ""
    grounds: tuple[Ground, ...] = ()
    beside: tuple[str, ...] = ()
    picture: Any = None


class Origin(NamedTuple):
    """A folder or tar file in which images were found, and what leads their keys."""

    folder: str  # a path or a URL; empty for the current folder
    leads: str = ""
    tar: str = ""  # path or URL of the tar
    tar_state: str = ""  # size and time of the last change, or what a remote file system has instead
    storage: Storage | None = None  # for files of this machine
    columns: ColumnSource | None = None  # where the cells of its images are


class ListedImage(NamedTuple):
    """An image as it was found."""

    key: str
    origin: int
    bytes: int
    place: int = WHOLE


class ImageList:
    """The images in row order. They take about 150 bytes each, and the key.

    Files are in the order of their keys (compared by bytes, whatever the locale). Images in tar files follow, tar by
    tar, in the order of the tar.
    """

    are_in_memory = False

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
        """The (lead of the keys, folder) of local images that are files by themselves, each pair once."""
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

    def column_source(self, row: int) -> ColumnSource | None:
        """Return where the cells of an image are."""
        return self._origins[self._origin[row]].columns

    def place_of(self, row: int) -> int:
        """Return the place of an image in its tar or table."""
        return self._places[row]

    def found_order(self) -> Sequence[int] | None:
        """Return the rows in the order in which they were found; None if that is their order."""
        return None

    def _path(self, row: int) -> str:
        """Return the path of an image that is a file by itself."""
        origin = self._origins[self._origin[row]]
        return joined(origin.folder, self.keys[row][len(origin.leads) :])

    def _beside(self, row: int) -> tuple[str, ...]:
        """Return the paths of the nearest rows that are on the same server."""
        near = [one for step in range(1, BESIDE + 1) for one in (row - step, row + step) if 0 <= one < len(self)]
        paths = [self._path(one) for one in near if not self._origins[self._origin[one]].tar]
        return tuple(path for path in paths if server_of(path) == server_of(self._path(row)))


class PicturesInMemory(ImageList):
    """Pictures that a caller of Python has in memory, in the caller's order. `sizes` are the bytes of their pixels."""

    are_in_memory = True

    def __init__(self, keys: Sequence[str], pictures: Sequence[Any], sizes: Sequence[int]) -> None:
        super().__init__((), ())
        self.keys, self.sizes = [*keys], array("q", sizes)
        self._pictures = pictures

    def __getitem__(self, row: int) -> Image:
        return Image(self.keys[row], "", self.sizes[row], picture=self._pictures[row])


def is_url(name: str) -> bool:
    """Return whether a name is a URL, which a file system of fsspec opens."""
    return "://" in name


def server_of(url: str) -> str:
    """Return the beginning of a URL, which names the server or the bucket."""
    protocol, _, rest = url.partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"


def joined(folder: str, rest: str) -> str:
    """Return a path below a folder. A URL is joined as text, so that nothing leads out of it."""
    if not is_url(folder):
        return os.path.join(folder, rest)
    return folder + rest if folder.endswith("/") else f"{folder}/{rest}"


def without_dots(path: str) -> str:
    """Return an absolute path without `.` and `..`. If links make `link/..` another folder, it is the system's."""
    plain = os.path.normpath(path)
    folder, name = os.path.split(path)
    if os.pardir not in path.split(os.sep) or os.path.realpath(folder) == os.path.realpath(os.path.dirname(plain)):
        return plain
    return os.path.join(os.path.realpath(folder), name)


def _tar_order(image: ListedImage) -> tuple[int, Any]:
    return (0, os.fsencode(image.key)) if image.place == WHOLE else (1 + image.origin, image.place)
