"""What of Pillow, its plugins and libtiff is used though nobody promises it: the one place to mend when it changes.

tests/test_internals.py says what breaks without each.
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


def exif_of_header(picture: Image.Image) -> Image.Exif:
    """The EXIF as far as the header of the file holds it, no pixel unpacked.

    The method of PngImageFile unpacks the picture first, for what may come after its pixels; the one of all pictures,
    which it overrides, does not.
    """
    return Image.Image.getexif(picture)


def file_of(picture: Image.Image) -> IO[bytes] | None:
    """The file from which an opened picture is read, as long as there is one."""
    return getattr(picture, "fp", None)


def untouched_file(picture: Image.Image) -> str:
    """The path that `Image.open` was given for a picture that is as it was then: not unpacked, and at its first frame.

    Empty for all others.
    """
    path, is_packed = getattr(picture, "filename", None), bool(getattr(picture, "tile", None))
    is_as_opened = isinstance(path, str) and is_packed and file_of(picture) is not None and picture.tell() == 0
    return path if isinstance(path, str) and is_as_opened and is_file(path) else ""


@contextmanager
def decoder_of(picture: Image.Image) -> Iterator[Callable[[bytes], int]]:
    """Pillow's decoder of a picture of one tile, to be given its bytes by hand; after it the picture is loaded.

    The function takes bytes, of which those that were not used have to come again with the next. It returns how many
    were used, or -1 at the end of the picture. Raises OSError as `load` does.
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

    Pillow leaves rows that do not come as they are.
    """
    tiles: Any = picture
    ImageFile.ImageFile.load_prepare(tiles)  # not the picture's own, which counts how often it is called
    strip = Image.new(picture.mode, (picture.width, 1))
    length = len(strip.tobytes())
    strip.frombytes((pattern * (length // len(pattern) + 1))[:length])
    tiles.im.paste(strip.im, (0, row, picture.width, row + 1))
    return strip.tobytes()


def still_marked(picture: Image.Image, row: int, mark: bytes) -> bool:
    """Whether a row of an unpacked picture is as it was marked."""
    return picture.crop((0, row, picture.width, row + 1)).tobytes() == mark


def transformations_of(picture: Image.Image) -> list[tuple[Any, ...]] | None:
    """How pillow-heif turned, mirrored and cut a picture, in that order; None where it does not say."""
    with suppress(AttributeError):
        plugin: Any = picture
        return list(plugin._heif_file[0]._c_image.transformations)
    return None


def is_as_stored(picture: Image.Image) -> bool:
    """Whether pillow-jxl-plugin left a picture unturned: a JPEG packed as JPEG XL, which it makes a JPEG again."""
    return bool(getattr(picture, "jpeg", False))


def register_plugin(module: str) -> None:
    """Import a plugin of Pillow: some register their formats by that, pillow_heif when it is told to."""
    plugin: Any = import_module(module)
    if hasattr(plugin, "register_heif_opener"):
        plugin.register_heif_opener()


class _Pillow(NamedTuple):
    """The settings of Pillow's modules that decide which pictures it reads, and what it says of them."""

    most_pixels: int | None  # None: any number
    takes_truncated: bool
    level: int  # of its logger


def _pillow() -> _Pillow:
    return _Pillow(Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, _logger.level)


def _set_pillow(wanted: _Pillow) -> None:
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = wanted.most_pixels, wanted.takes_truncated
    _logger.setLevel(wanted.level)


def _largest(before: _Pillow, wanted: Sequence[_Pillow]) -> _Pillow:
    """Take the widest limit of those that read pictures now: Pillow's guards frames inside of files alone."""
    limits = [one.most_pixels for one in (before, *wanted)]
    return wanted[-1]._replace(most_pixels=None if None in limits else max(one for one in limits if one is not None))


_logger = logging.getLogger("PIL")
_PILLOW = Borrowed(_pillow, _set_pillow, _largest)


@contextmanager
def pillow_set_up(max_pixels: int) -> Iterator[None]:
    """Have Pillow read whole pictures alone, of so many pixels, and say nothing: what matters becomes a failure."""
    with unheard.set_to(("PIL",)), _PILLOW.set_to(_Pillow(max_pixels, False, logging.CRITICAL)):
        yield


def mend_ycbcr(picture: Image.Image) -> None:
    """Make Pillow 12 read the three bytes of each pixel of an uncompressed YCbCr TIFF; it looks for four."""
    is_mistaken = [tile[0] == "raw" and tile[3][0] == "RGBX" for tile in picture.tile]  # type: ignore[attr-defined]
    if all(is_mistaken) and is_mistaken:
        picture._mode = "YCbCr"
        tiles = [(*tile[:3], ("YCbCr", *tile[3][1:])) for tile in picture.tile]  # type: ignore[attr-defined]
        picture.tile = [ImageFile._Tile(*tile) for tile in tiles]  # type: ignore[attr-defined]


def silence_libtiff() -> None:
    """libtiff writes to the terminal by itself; what matters of it, Pillow raises. No harm where it is not found.

    Wheels of Pillow bring a libtiff of their own, which is told through its C functions to call nobody.
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
    """A picture of which the header is known, and that is unpacked by a function once its pixels are asked for.

    Pillow's own pictures work so, and take over the picture that another library made as it is done here.
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
        """Unpack, and be what comes of it from now on."""
        picture = self._unpack()
        picture.format = self.format
        picture.info = {**self.info, **picture.info}
        self.__class__, self.__dict__ = picture.__class__, picture.__dict__  # type: ignore[assignment]
        return picture.load()
