"""Hold the images of a run in row order: their names in the dump, their places, and their sizes when listed."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from featcli.errors import UsageError, shown
from featcli.inputs.keys import Keys, first_rows

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


class ImageList:
    """The images in row order. They take about 40 bytes each, and the key.

    Whoever finds images adds them one by one; `find` in featcli.inputs.listing then brings them into row order.
    """

    are_in_memory = False

    def __init__(self, origins: Sequence[Origin] = ()) -> None:
        self.keys = Keys()
        self.sizes = array("q")
        self._origins = [*origins]
        self._origin = array("I")
        self._places = array("q")
        self._paths: Keys | None = None  # below the folders of their origins; None if their keys say it

    def add_origin(self, origin: Origin) -> int:
        """Add a folder or tar file, and return its number."""
        self._origins.append(origin)
        return len(self._origins) - 1

    def add(self, key: str, origin: int, size: int = MISSING, place: int = WHOLE, path: str | None = None) -> None:
        """Add an image as the last.

        Its path below the folder of its origin is `path`, or by default what follows the lead in its key. Raises
        UsageError for a key that no file can have.
        """
        try:
            self.keys.append(key)
        except UnicodeEncodeError as error:
            raise UsageError(
                f"image {shown(key)}: it has a character that no name can have", "leave it out, or mend its name"
            ) from error
        self.sizes.append(size)
        self._origin.append(origin)
        self._places.append(place)
        if path is not None and self._paths is None:
            self._paths = Keys(map(self._rest, range(len(self) - 1)))
        if self._paths is not None:
            self._paths.append(self._rest(len(self) - 1) if path is None else path)

    def taken(self, rows: np.ndarray) -> ImageList:
        """Return the images of some rows, (n,) int64, in the order of these."""
        found = copy(self)
        found.keys = self.keys.taken(rows.data)
        found._paths = None if self._paths is None else self._paths.taken(rows.data)
        for name in ("sizes", "_origin", "_places"):
            values = getattr(self, name)
            setattr(found, name, array(values.typecode, np.asarray(values)[rows].tobytes()))
        return found

    def in_order_of(self, keys: Keys) -> ImageList | None:
        """Return these images in the order of the same keys; None if those are other keys."""
        if len(keys) != len(self):
            return None
        rows = first_rows(self.keys, keys)[len(self) :]
        return None if (rows >= len(self)).any() else self.taken(rows)

    def sorted(self) -> ImageList:
        """Return these images in the order of their keys, compared by bytes."""
        return self.taken(np.array(sorted(range(len(self)), key=self.keys.bytes_of), np.int64))

    def led_by(self, leads: Sequence[str]) -> ImageList:
        """Return the same images in the same order with other leads, one for each origin."""
        led = ImageList([origin._replace(leads=lead) for origin, lead in zip(self._origins, leads, strict=True)])
        for row, key in enumerate(self.keys):
            number = self._origin[row]
            path = None if self._paths is None else self._paths[row]
            new = leads[number] + key[len(self._origins[number].leads) :]
            led.add(new, number, self.sizes[row], self._places[row], path)
        return led

    def row_order(self, count: int) -> np.ndarray:
        """Return (N,) int64: these rows in the order that a dump has them in.

        The first `count` are those of folders, images and tars. Files come first, in the order of their keys (compared
        by bytes, whatever the locale), then tar by tar the images in it, in the order of the tar. All rows after them
        were listed, and stay as they are.
        """
        places, rows = np.asarray(self._places)[:count], np.arange(len(self))
        files, inside = rows[:count][places == WHOLE], rows[:count][places != WHOLE]
        by_key = sorted(files.data, key=self.keys.bytes_of)
        by_place = np.lexsort((places[inside], np.asarray(self._origin)[inside]))
        return np.concatenate([np.array(by_key, np.int64), inside[by_place], rows[count:]])

    def origin(self, row: int) -> Origin:
        """Return the folder or tar file in which the image of a row was found."""
        return self._origins[self._origin[row]]

    @property
    def numbers(self) -> Sequence[int]:
        """The number of the origin of each image."""
        return self._origin

    def rows_since(self, origin: int) -> np.ndarray:
        """Return the rows of this origin and those that were added after it, (n,) int64."""
        return np.flatnonzero(np.asarray(self._origin) >= origin)

    @property
    def origins(self) -> Sequence[Origin]:
        """All folders and tar files, by number."""
        return self._origins

    @property
    def num_missing(self) -> int:
        """How many files of this machine were not there when their sizes were asked for."""
        is_local = np.array([origin.storage is not None for origin in self._origins], bool)
        return int((is_local[np.asarray(self._origin)] & (np.asarray(self.sizes) == MISSING)).sum())

    @property
    def folders(self) -> list[tuple[str, str]]:
        """The (lead of the keys, folder) of local images that are files by themselves, each pair once."""
        local = (origin for origin in self._origins if origin.storage is not None and not origin.tar)
        return [*dict.fromkeys((origin.leads, origin.folder) for origin in local)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Image:
        key, origin = self.keys[row], self.origin(row)
        if origin.tar:
            return Image(key, origin.tar, self.sizes[row], origin.folder, self._places[row], origin.tar_state)
        path = self.path(row)
        if is_url(path):
            return Image(key, path, self.sizes[row], origin.folder, beside=self._beside(row))
        grounds = () if origin.storage is None else origin.storage.grounds
        return Image(key, path, self.sizes[row], origin.folder, grounds=grounds)

    def place_of(self, row: int) -> int:
        """Return the place of an image in its tar, or its row in its table; WHOLE for any other."""
        return self._places[row]

    def found_order(self) -> Sequence[int] | None:
        """Return the rows in the order in which the sources of their columns hold them; None if that is their order."""
        numbers = {id(one.columns): number for number, one in enumerate(self._origins, 1) if one.columns is not None}
        if not numbers:
            return None
        sources = np.array([numbers.get(id(one.columns), 0) for one in self._origins])[np.asarray(self._origin)]
        places = np.where(sources > 0, np.asarray(self._places), np.arange(len(self)))
        by_source = np.argsort(sources, kind="stable")
        is_same = np.diff(sources[by_source]) == 0
        if (np.diff(places[by_source])[is_same] >= 0).all():
            return None
        return np.lexsort((places, sources)).data

    def path(self, row: int) -> str:
        """Return the path or URL of an image; for one in a tar file a path in that, as if it were a folder."""
        origin = self.origin(row)
        return joined(origin.tar or origin.folder, self._rest(row) if self._paths is None else self._paths[row])

    def paths(self) -> Iterator[str]:
        """Yield the path or URL of each image, as `path` returns it."""
        above = [(one.tar or one.folder, len(one.leads) if self._paths is None else 0) for one in self._origins]
        for rest, number in zip(self.keys if self._paths is None else self._paths, self._origin, strict=True):
            folder, led = above[number]
            yield joined(folder, rest[led:])

    def _rest(self, row: int) -> str:
        """Return what follows the lead in the key of a row."""
        return self.keys[row][len(self.origin(row).leads) :]

    def _beside(self, row: int) -> tuple[str, ...]:
        """Return the paths of the nearest rows that are on the same server."""
        near = [one for step in range(1, BESIDE + 1) for one in (row - step, row + step) if 0 <= one < len(self)]
        paths = [self.path(one) for one in near if not self.origin(one).tar]
        return tuple(path for path in paths if server_of(path) == server_of(self.path(row)))


class PicturesInMemory(ImageList):
    """Pictures that a caller of Python has in memory, in the caller's order. `sizes` are the bytes of their pixels."""

    are_in_memory = True

    def __init__(self, keys: Sequence[str], pictures: Sequence[Any], sizes: Sequence[int]) -> None:
        super().__init__()
        self._pictures = pictures
        origin = self.add_origin(Origin(""))
        for key, size in zip(keys, sizes, strict=True):
            self.add(key, origin, size)

    def taken(self, rows: np.ndarray) -> PicturesInMemory:
        """Return the pictures of some rows in the order of these. See ImageList."""
        keys, sizes = self.keys.taken(rows.data), np.asarray(self.sizes)[rows].tolist()
        return PicturesInMemory(keys, [self._pictures[row] for row in rows.data], sizes)

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
