"""Hold what featcli uses of Pillow, its plugins and libtiff although nobody promises it.

If one of them changes, this is the place to mend. tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from typing import IO, Any, NamedTuple

from PIL import Image, ImageFile

from featcli.system.borrowed import Borrowed, unheard
from featcli.system.files import is_file

OPAQUE_WHITE = 255  # of a picture of one bit


def exif_of_header(picture: Image.Image) -> Image.Exif:
    """Return the EXIF that the header of the file holds. No pixel is unpacked.

    The method of PngImageFile unpacks the picture first, because EXIF may follow its pixels. The method of the base
    class, which it overrides, does not.
    """
    return Image.Image.getexif(picture)


def file_of(picture: Image.Image) -> IO[bytes] | None:
    """Return the file from which an opened picture is read, or None once it is closed."""
    return getattr(picture, "fp", None)


def untouched_file(picture: Image.Image) -> str:
    """Return the path that `Image.open` was given if the picture is as it was then, else "".

    It is so if no pixel has been unpacked and the picture is at its first frame.
    """
    path, is_packed = getattr(picture, "filename", None), bool(getattr(picture, "tile", None))
    is_as_opened = isinstance(path, str) and is_packed and file_of(picture) is not None and picture.tell() == 0
    return path if isinstance(path, str) and is_as_opened and is_file(path) else ""


def was_unpacked(picture: Image.Image) -> bool:
    """Return whether the pixels of a picture are in memory: what is left to be unpacked stands in `tile`."""
    return not getattr(picture, "tile", None)


@contextmanager
def decoder_of(picture: Image.Image) -> Iterator[Callable[[bytes], int]]:
    """Yield Pillow's decoder of a picture of one tile, to be fed by hand. After the block the picture is loaded.

    The function takes bytes and returns how many it used, or -1 at the end of the picture. Bytes that it did not use
    must come again at the next call. Raises OSError as `load` does.
    """
    tiles: Any = picture
    name, extents, _, arguments = tiles.tile[0]
    tiles.load_prepare()
    decoder = Image._getdecoder(picture.mode, name, arguments, tiles.decoderconfig)

    def decode(data: bytes) -> int:
        used, code = decoder.decode(data)
        if code < 0:
            raise ImageFile._get_oserror(code, encoder=False)
        return int(used)

    try:
        decoder.setimage(picture.im, extents)
        yield decode
    finally:
        decoder.cleanup()
    tiles.tile = []


def marked(picture: Image.Image, row: int, pattern: bytes) -> bytes:
    """Write a pattern into a row of a picture before it is unpacked, and return the bytes of the row.

    Pillow leaves a row as it is if the file has no data for it.
    """
    tiles: Any = picture
    ImageFile.ImageFile.load_prepare(tiles)  # not the picture's own method, which counts its calls
    strip = Image.new(picture.mode, (picture.width, 1))
    length = len(strip.tobytes())
    strip.frombytes((pattern * (length // len(pattern) + 1))[:length])
    tiles.im.paste(strip.im, (0, row, picture.width, row + 1))
    return strip.tobytes()


def still_marked(picture: Image.Image, row: int, mark: bytes) -> bool:
    """Return whether a row of an unpacked picture is still as it was marked."""
    return picture.crop((0, row, picture.width, row + 1)).tobytes() == mark


def transformations_of(picture: Image.Image) -> list[tuple[Any, ...]] | None:
    """Return the turns, mirrorings and crops that pillow-heif applied, in order; None if it does not say."""
    with suppress(AttributeError):
        plugin: Any = picture
        return list(plugin._heif_file[0]._c_image.transformations)
    return None


def is_as_stored(picture: Image.Image) -> bool:
    """Return whether pillow-jxl-plugin left a picture unturned: it does so for a JPEG packed as JPEG XL."""
    return bool(getattr(picture, "jpeg", False))


def register_plugin(module: str) -> None:
    """Import a plugin of Pillow, and register it: some register on import, pillow_heif only by a call."""
    plugin: Any = import_module(module)
    if hasattr(plugin, "register_heif_opener"):
        plugin.register_heif_opener()


class _Pillow(NamedTuple):
    """The settings of Pillow's modules that decide which pictures it reads and what it logs."""

    most_pixels: int | None  # None: any number
    takes_truncated: bool
    level: int  # the level of its logger


def _pillow() -> _Pillow:
    return _Pillow(Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, _logger.level)


def _set_pillow(wanted: _Pillow) -> None:
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = wanted.most_pixels, wanted.takes_truncated
    _logger.setLevel(wanted.level)


def _largest(before: _Pillow, wanted: Sequence[_Pillow]) -> _Pillow:
    """Return the widest limit of all that read pictures now. Pillow's limit only guards frames inside of files."""
    limits = [one.most_pixels for one in (before, *wanted)]
    return wanted[-1]._replace(most_pixels=None if None in limits else max(one for one in limits if one is not None))


_logger = logging.getLogger("PIL")
_PILLOW = Borrowed(_pillow, _set_pillow, _largest)


@contextmanager
def pillow_set_up(max_pixels: int) -> Iterator[None]:
    """Have Pillow read only whole pictures of at most `max_pixels`, and log nothing: what matters becomes a failure."""
    with unheard.set_to(("PIL",)), _PILLOW.set_to(_Pillow(max_pixels, False, logging.CRITICAL)):
        yield


def mend_ycbcr(picture: Image.Image) -> None:
    """Make Pillow 12 read the three bytes of each pixel of an uncompressed YCbCr TIFF; by itself it looks for four."""
    is_mistaken = [tile[0] == "raw" and tile[3][0] == "RGBX" for tile in picture.tile]  # type: ignore[attr-defined]
    if all(is_mistaken) and is_mistaken:
        picture._mode = "YCbCr"
        tiles = [(*tile[:3], ("YCbCr", *tile[3][1:])) for tile in picture.tile]  # type: ignore[attr-defined]
        picture.tile = [ImageFile._Tile(*tile) for tile in tiles]  # type: ignore[attr-defined]


def mend_transparency(picture: Image.Image) -> None:
    """Let the grey that a PNG of one bit calls transparent be the grey of its pixels.

    They are 0 and 255. Pillow 12.0 gives it as the bit, 0 or 1, and finds no white pixel transparent then.
    """
    if picture.mode == "1" and picture.info.get("transparency") == 1:
        picture.info["transparency"] = OPAQUE_WHITE


def silence_libtiff() -> None:
    """Stop libtiff from writing to the terminal: Pillow raises what matters. Does nothing if libtiff is not found.

    Pillow's wheels bring a libtiff of their own. Its C functions set a handler that calls nobody.
    """
    with suppress(Exception):
        for file in metadata.files("pillow") or ():
            if file.name.startswith("libtiff"):
                library = ctypes.CDLL(str(file.locate()))  # the one that Pillow has loaded
                for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
                    handler = getattr(library, name)
                    handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                    handler(None)


class Deferred(Image.Image):
    """A picture whose header is known, and whose pixels a function unpacks once they are asked for.

    Pillow's own pictures work in this way, and take over a picture that another library made as is done here.
    """

    def __init__(
        self, format_name: str, size: tuple[int, int], has_more: bool, unpack: Callable[[], Image.Image]
    ) -> None:
        super().__init__()
        self.format = format_name
        self.is_animated = has_more
        self._size, self._mode = size, "RGB"
        self._unpack = unpack

    def load(self) -> Any:
        """Unpack the picture, and become the result."""
        picture = self._unpack()
        picture.format = self.format
        picture.info = {**self.info, **picture.info}
        self.__class__, self.__dict__ = picture.__class__, picture.__dict__  # type: ignore[assignment]
        return picture.load()
