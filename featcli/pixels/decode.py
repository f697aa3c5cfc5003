"""Decode one file into pixels of the wanted size, or say why it cannot be read."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar

from PIL import Image

from featcli.errors import CheckpointError, FeatcliError, MachineError, shown
from featcli.inputs.image_list import MISSING
from featcli.inputs.signatures import START
from featcli.pixels import avif, bands, jpeg, memory, png, traits, turbo
from featcli.pixels.bands import OF_COLOURS, Bands
from featcli.pixels.colour import is_as_seen, upright_rgb, upright_size
from featcli.pixels.failure import NOT_READ, UnreadableError
from featcli.pixels.formats import format_of, identified
from featcli.pixels.image_file import opened
from featcli.pixels.internals import mend_transparency, untouched_file
from featcli.pixels.limits import affordable, bound_pixels
from featcli.pixels.traits import Trait
from featcli.spec.groups import PixelSpec
from featcli.system.faults import RESUMES

if TYPE_CHECKING:
    import numpy as np

    from featcli.inputs.image_list import Image as Input

T = TypeVar("T")

DETAIL_LENGTH = 200
STRICT: dict[str, Callable[[Image.Image], None]] = {**dict.fromkeys(jpeg.FORMATS, jpeg.load), "PNG": png.load}
PLAIN_ERRORS = (OSError, ValueError, RuntimeError, SyntaxError)  # classes whose names say nothing about the error
ENDS_EARLY = "its data end before its pixels do"
SAYS_NOTHING = re.compile(  # what libraries say about any damage
    "data stream|cannot load this image|could not create decoder|failed to read next frame|Generic Error"
    "|(decoder|unknown) error|input data did not give",
    re.IGNORECASE,
)
UNREAD = ("Unsupported BMP", "unrecognized image mode")  # what Pillow says about kinds that it does not read
SPARE = 2  # a picture that is decoded at a smaller size stays this much larger than the input, for resizing


def read_pixels(
    image: Input,
    rules: PixelSpec,
    fit: Callable[[Any], np.ndarray],
    out: np.ndarray,
    is_native: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[Trait, ...]:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (C, H, W).

    If C is no number of colours, `fit` is given C bands, each as RGB like a grey picture. Returns the traits of the
    picture. With `is_native` the size was read from the header before, and the pixels must have it. `note` is called
    with the digest of the file's bytes if they are read, or of a picture in memory. Raises UnreadableError for whatever
    is wrong with the file, and MachineError for what is not the file's fault. After an error `out` may hold anything.
    """
    pixels, found = fitted_pixels(image, rules, fit, len(out), max(out.shape[1:]), note)
    if pixels.shape != out.shape:
        if is_native:
            raise UnreadableError("changed", f"{pixels.shape[1:]} pixels, by its header {out.shape[1:]}")
        raise CheckpointError(
            f"the checkpoint's preprocessing gives {shown(image.key)} the shape {pixels.shape},"
            f" and {out.shape} was planned",
            "give another --image-size",
        )
    out[...] = pixels
    return found


def fitted_pixels(
    image: Input,
    rules: PixelSpec,
    fit: Callable[[Any], np.ndarray],
    channels: int,
    longest: int,
    note: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, tuple[Trait, ...]]:
    """Decode a file, make it upright RGB, and return what `fit` makes of it, with the traits of the picture.

    `channels` and `longest`, its longer edge, are those of the input. Raises as `read_pixels` does.
    """
    if channels not in OF_COLOURS:
        return _fitted_bands(image, rules, fit, channels, note)
    of_pixels = None if image.picture is None else note
    image = _at_its_file(image)
    if image.picture is not None and not image.path:
        with _explained(image):
            picture, of_picture = memory.unpacked(image.picture, rules)
            if of_pixels is not None:
                of_pixels(memory.digest_of(image.picture, picture))
            return fit(upright_rgb(picture, rules)), of_picture

    def unpacked(file: IO[bytes], picture: Image.Image) -> tuple[np.ndarray, tuple[Trait, ...]]:
        found = list(traits.of_header(picture))
        if rules.decode == "fast" and of_pixels is None and (pixels := turbo.unpacked(file, picture)) is not None:
            found += traits.of_pixels(picture)
            if pixels.ndim == 3 and is_as_seen(picture, rules):
                return fit(pixels), tuple(dict.fromkeys(found))
            stored = Image.fromarray(pixels)
            stored.info = picture.info
            return fit(upright_rgb(stored, rules)), tuple(dict.fromkeys(found))
        if rules.decode == "scaled" and picture.format in jpeg.FORMATS:
            edge = SPARE * longest
            picture.draft(None, (edge, edge))  # smaller if the format can, but no edge shorter than this
        _unpack(file, picture)
        if of_pixels is not None:
            of_pixels(memory.digest_of(picture, picture))
        mend_transparency(picture)
        found += traits.of_pixels(picture)
        return fit(upright_rgb(picture, rules)), tuple(dict.fromkeys(found))

    return _looked_at(image, rules, unpacked, note=note if of_pixels is None else None)


def _fitted_bands(
    image: Input,
    rules: PixelSpec,
    fit: Callable[[Any], np.ndarray],
    channels: int,
    note: Callable[[str], None] | None,
) -> tuple[np.ndarray, tuple[Trait, ...]]:
    if image.picture is not None:
        if note is not None:
            note(read_digest(image, rules))
        with _explained(image):
            greys, found = bands.in_memory(image.picture, rules, channels)
            return fit(greys), found

    def unpacked(of_file: Bands) -> tuple[np.ndarray, tuple[Trait, ...]]:
        greys, found = of_file.greys(rules)
        return fit(greys), found

    return _bands_looked_at(image, rules, channels, unpacked, note=note)


def _unpack(file: IO[bytes], picture: Image.Image) -> None:
    """Unpack the pixels of an open picture, all of them or none. Raises UnreadableError and what Pillow raises."""
    bound_pixels(file, picture.size, picture.format)
    if strict := STRICT.get(picture.format or ""):
        strict(picture)
    picture.load()


def _at_its_file(image: Input) -> Input:
    """Return an image whose picture was opened and not looked at yet with the path of its file, any other as it is."""
    path = untouched_file(image.picture) if isinstance(image.picture, Image.Image) else ""
    return image._replace(path=path, folder=os.path.dirname(path), bytes=MISSING) if path else image


def read_digest(image: Input, rules: PixelSpec) -> str:
    """Return the digest of a picture in memory; NOT_READ if it cannot be unpacked. Raises MachineError."""

    def digest(file: IO[bytes], picture: Image.Image) -> str:
        _unpack(file, picture)
        return memory.digest_of(picture, picture)

    image = _at_its_file(image)
    try:
        if image.path:
            return _looked_at(image, rules, digest)
        with _explained(image):
            is_picture = memory.is_picture(image.picture)  # else it is an array of bands
            picture = memory.unpacked(image.picture, rules)[0] if is_picture else None
            return memory.digest_of(image.picture, picture)
    except UnreadableError:
        return NOT_READ


def read_size(image: Input, rules: PixelSpec, channels: int = 3) -> tuple[int, int]:
    """Return the (height, width) of the upright picture from the file's header alone. Raises as `read_pixels` does."""
    if channels not in OF_COLOURS:
        if image.picture is None:
            return _bands_looked_at(image, rules, channels, lambda found: found.size, header_only=True)
        with _explained(image):
            return bands.size_in_memory(image.picture, rules, channels)
    image = _at_its_file(image)
    if image.picture is not None and not image.path:
        with _explained(image):
            return upright_size(memory.unpacked(image.picture, rules)[0], rules)
    return _looked_at(image, rules, lambda _, picture: upright_size(picture, rules), header_only=True)


def _looked_at(
    image: Input,
    rules: PixelSpec,
    look: Callable[[IO[bytes], Image.Image], T],
    header_only: bool = False,
    note: Callable[[str], None] | None = None,
) -> T:
    """Return what `look` finds in the open picture.

    If a part of the file that holds no pixels is broken, the picture is opened again without that part.
    """
    with _explained(image), opened(image, header_only, note) as file, _named(file):
        try:
            with identified(affordable(file, rules.max_pixels, header_only=header_only), rules) as picture:
                return look(file, picture)
        except (FeatcliError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, UnreadableError) and error.reason != "decode_error":
                raise
            less = png.essential(file)
            if less is None and (mended := avif.with_alpha_size(file)) is not None:
                less = mended, None
            if less is None:
                raise
        content, profile = less
        with identified(content, rules) as picture:
            if profile is not None:
                picture.info["icc_profile"] = profile
            return look(file, picture)


def _bands_looked_at(
    image: Input,
    rules: PixelSpec,
    channels: int,
    look: Callable[[Bands], T],
    header_only: bool = False,
    note: Callable[[str], None] | None = None,
) -> T:
    """Return what `look` finds in the open picture of so many bands."""
    with _explained(image), opened(image, header_only, note) as file, _named(file):
        return look(bands.in_file(affordable(file, rules.max_pixels, header_only=header_only), rules, channels))


@contextmanager
def _named(file: IO[bytes]) -> Iterator[None]:
    """Turn any error of a decoder inside the block into an UnreadableError that names the format of the file."""
    try:
        yield
    except (UnreadableError, FeatcliError, MemoryError):
        raise
    except Exception as error:
        file.seek(0)
        raise UnreadableError(*_reason(error, format_of(file.read(START)) or "a picture")) from error


@contextmanager
def _explained(image: Input) -> Iterator[None]:
    """Turn any error into an UnreadableError: decoders raise OSError, SyntaxError, KeyError and nearly everything else.

    A lack of memory is the machine's fault, and becomes MachineError.
    """
    try:
        yield
    except (UnreadableError, FeatcliError):
        raise
    except MemoryError as error:
        raise MachineError(
            f"image {shown(image.key)} does not fit into memory",
            f"free some memory, use fewer --decode-threads, or refuse such images with --max-pixels; {RESUMES}",
        ) from error
    except Exception as error:
        raise UnreadableError(*_reason(error)) from error


def _reason(error: Exception, name: str = "a picture") -> tuple[str, str]:
    """Return one of REASONS for an error, and a text, which is the library's own if that helps."""
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\((\d+) pixels\)", str(error))
        many = f"{int(found[1]):,}" if found else "far too many"
        return "too_many_pixels", f"{many} pixels; --max-pixels moves the limit"
    text = str(error) if type(error) in PLAIN_ERRORS else f"{type(error).__name__}: {error}"
    text = " ".join(re.sub(r"\bat 0x[0-9a-f]+", "", text).split())  # addresses would make two equal runs differ
    if isinstance(error, OSError | struct.error | EOFError) and "trunca" in text.lower():
        return "truncated", ENDS_EARLY
    if text == "not enough image data":
        return "truncated", ENDS_EARLY
    if text.startswith(UNREAD):
        return "format_not_allowed", f"{name} of a kind that is not read ({text}): convert it to JPEG or PNG"
    said = f"{name} whose data are damaged, or cut short"
    return "decode_error", (said if not text or SAYS_NOTHING.search(text) else f"{said} ({text})")[:DETAIL_LENGTH]
