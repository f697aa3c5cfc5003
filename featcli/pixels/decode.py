"""One file -> pixels of the wanted size, or a failure."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from PIL import Image

from featcli.errors import CheckpointError, FeatcliError, MachineError, shown
from featcli.pixels import jpeg
from featcli.pixels.colour import upright_rgb, upright_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.formats import identified
from featcli.pixels.image_file import opened
from featcli.pixels.limits import affordable, bound_pixels
from featcli.spec.groups import PixelSpec
from featcli.system.faults import RESUMES

if TYPE_CHECKING:
    import numpy as np

    from featcli.inputs.image_list import Image as Input

DETAIL_LENGTH = 200
SPARE = 2  # how much larger than the input a picture is that was decoded smaller: what is left for resizing


def read_pixels(
    image: Input, rules: PixelSpec, fit: Callable[[Image.Image], np.ndarray], out: np.ndarray, is_native: bool = False
) -> bool:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (C, H, W).

    Returns whether the file holds more frames or pages than the first. `is_native`: the size follows from the file's
    header, which has been read before. Raises UnreadableError for whatever is wrong with the file; `out` may then
    hold anything. Raises MachineError for what is no fault of the file's.
    """
    with _explained(image), opened(image) as file, identified(affordable(file, rules.max_pixels), rules) as picture:
        has_more = bool(getattr(picture, "is_animated", False))  # never n_frames: that walks the file
        if rules.decode == "scaled" and picture.format in jpeg.FORMATS:
            edge = SPARE * max(out.shape[1:])
            picture.draft(None, (edge, edge))  # as small as its own coding lets it, but no edge smaller than that
        bound_pixels(file, picture.size, picture.format)
        if picture.format in jpeg.FORMATS:
            jpeg.load(picture)
        picture.load()
        pixels = fit(upright_rgb(picture, rules))
    if pixels.shape != out.shape:
        if is_native:
            raise UnreadableError("changed", f"{pixels.shape[1:]} pixels, by its header {out.shape[1:]}")
        raise CheckpointError(
            f"the checkpoint's preprocessing gives {shown(image.key)} the shape {pixels.shape}, planned {out.shape}",
            "ask for another --image-size",
        )
    out[...] = pixels
    return has_more


def read_size(image: Input, rules: PixelSpec) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone. Raises as `read_pixels` does."""
    with (
        _explained(image),
        opened(image, header_only=True) as file,
        identified(affordable(file, rules.max_pixels, header_only=True), rules) as picture,
    ):
        return upright_size(picture, rules)


@contextmanager
def _explained(image: Input) -> Iterator[None]:
    """Whatever a decoder raises, as UnreadableError: that is nearly everything, OSError, SyntaxError, KeyError ...

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


def _reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\((\d+) pixels\)", str(error))
        return "too_many_pixels", f"{found[1] if found else 'far too many'} pixels; --max-pixels moves the limit"
    # Object addresses in a message would make two equal runs differ.
    text = " ".join(re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}").split())[:DETAIL_LENGTH]
    cut_short = isinstance(error, OSError | struct.error | EOFError) and "trunca" in text.lower()
    return ("truncated" if cut_short else "decode_error"), text
