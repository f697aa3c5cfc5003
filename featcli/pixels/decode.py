"""Decode one file into pixels of the wanted size, or say why it cannot be read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, TypeVar

from PIL import Image

from featcli.errors import CheckpointError, FeatcliError, MachineError, shown
from featcli.inputs.signatures import START
from featcli.pixels import avif, jpeg, png, traits
from featcli.pixels.colour import upright_rgb, upright_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.formats import format_of, identified
from featcli.pixels.image_file import opened
from featcli.pixels.internals import mend_transparency
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
    fit: Callable[[Image.Image], np.ndarray],
    out: np.ndarray,
    is_native: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[Trait, ...]:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (C, H, W).

    Returns the traits of the picture. With `is_native` the size was read from the header before, and the pixels must
    have it. `note` is called with the digest of the file's bytes if they are read. Raises UnreadableError for whatever
    is wrong with the file, and MachineError for what is not the file's fault. After an error `out` may hold anything.
    """
    pixels, found = fitted_pixels(image, rules, fit, max(out.shape[1:]), note)
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
    fit: Callable[[Image.Image], np.ndarray],
    longest: int,
    note: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, tuple[Trait, ...]]:
    """Decode a file, make it upright RGB, and return what `fit` makes of it, with the traits of the picture.

    `longest` is the longer edge of the input. Raises as `read_pixels` does.
    """

    def unpacked(file: IO[bytes], picture: Image.Image) -> tuple[np.ndarray, tuple[Trait, ...]]:
        found = list(traits.of_header(picture))
        if rules.decode == "scaled" and picture.format in jpeg.FORMATS:
            edge = SPARE * longest
            picture.draft(None, (edge, edge))  # smaller if the format can, but no edge shorter than this
        bound_pixels(file, picture.size, picture.format)
        if strict := STRICT.get(picture.format or ""):
            strict(picture)
        picture.load()
        mend_transparency(picture)
        found += traits.of_pixels(picture)
        return fit(upright_rgb(picture, rules)), tuple(dict.fromkeys(found))

    return _looked_at(image, rules, unpacked, note=note)


def read_size(image: Input, rules: PixelSpec) -> tuple[int, int]:
    """Return the (height, width) of the upright picture from the file's header alone. Raises as `read_pixels` does."""
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
