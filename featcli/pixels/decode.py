"""One file -> pixels of the wanted size, or a failure."""

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
PLAIN_ERRORS = (OSError, ValueError, RuntimeError, SyntaxError)  # of which the name says nothing
ENDS_EARLY = "its data end before its pixels do"
SAYS_NOTHING = re.compile(  # what libraries call any damage
    "data stream|cannot load this image|could not create decoder|failed to read next frame|Generic Error"
    "|(decoder|unknown) error|input data did not give",
    re.IGNORECASE,
)
UNREAD = ("Unsupported BMP", "unrecognized image mode")  # what Pillow says of kinds that it does not read
SPARE = 2  # how much larger than the input a picture is that was decoded smaller: what is left for resizing


def read_pixels(
    image: Input, rules: PixelSpec, fit: Callable[[Image.Image], np.ndarray], out: np.ndarray, is_native: bool = False
) -> tuple[Trait, ...]:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (C, H, W).

    Returns what is true of the picture. `is_native`: the size follows from the file's header, which has been read
    before. Raises UnreadableError for whatever is wrong with the file; `out` may then hold anything. Raises
    MachineError for what is no fault of the file's.
    """
    pixels, found = fitted_pixels(image, rules, fit, max(out.shape[1:]))
    if pixels.shape != out.shape:
        if is_native:
            raise UnreadableError("changed", f"{pixels.shape[1:]} pixels, by its header {out.shape[1:]}")
        raise CheckpointError(
            f"the checkpoint's preprocessing gives {shown(image.key)} the shape {pixels.shape}, planned {out.shape}",
            "ask for another --image-size",
        )
    out[...] = pixels
    return found


def fitted_pixels(
    image: Input, rules: PixelSpec, fit: Callable[[Image.Image], np.ndarray], longest: int
) -> tuple[np.ndarray, tuple[Trait, ...]]:
    """Decode a file, make it upright RGB, and give what `fit` makes of it, with what is true of the picture.

    `longest`: the longer edge of the input. Raises as `read_pixels` does.
    """

    def unpacked(file: IO[bytes], picture: Image.Image) -> tuple[np.ndarray, tuple[Trait, ...]]:
        found = list(traits.of_header(picture))
        if rules.decode == "scaled" and picture.format in jpeg.FORMATS:
            edge = SPARE * longest
            picture.draft(None, (edge, edge))  # as small as its own coding lets it, but no edge smaller than that
        bound_pixels(file, picture.size, picture.format)
        if strict := STRICT.get(picture.format or ""):
            strict(picture)
        picture.load()
        found += traits.of_pixels(picture)
        return fit(upright_rgb(picture, rules)), tuple(dict.fromkeys(found))

    return _looked_at(image, rules, unpacked)


def read_size(image: Input, rules: PixelSpec) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone. Raises as `read_pixels` does."""
    return _looked_at(image, rules, lambda _, picture: upright_size(picture, rules), header_only=True)


def _looked_at(
    image: Input, rules: PixelSpec, look: Callable[[IO[bytes], Image.Image], T], header_only: bool = False
) -> T:
    """What `look` finds in the open picture. What fails for something beside its pixels is looked at without it."""
    with _explained(image), opened(image, header_only=header_only) as file, _named(file):
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
    """Whatever a decoder raises inside the block, as UnreadableError that names the format of the file."""
    try:
        yield
    except (UnreadableError, FeatcliError, MemoryError):
        raise
    except Exception as error:
        file.seek(0)
        raise UnreadableError(*_reason(error, format_of(file.read(START)) or "a picture")) from error


@contextmanager
def _explained(image: Input) -> Iterator[None]:
    """Whatever is raised, as UnreadableError: decoders raise nearly everything, OSError, SyntaxError, KeyError ...

    That there is no memory left is the machine's fault, and becomes MachineError.
    """
    try:
        yield
    except (UnreadableError, FeatcliError):
        raise
    except MemoryError as error:
        raise MachineError(
            f"image {shown(image.key)} does not fit into memory",
            f"free some, use fewer --decode-threads, or refuse such images with --max-pixels; {RESUMES}",
        ) from error
    except Exception as error:
        raise UnreadableError(*_reason(error)) from error


def _reason(error: Exception, name: str = "a picture") -> tuple[str, str]:
    """Why a file of that format gives no pixels: one of REASONS, and words, those of a library where they help."""
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
