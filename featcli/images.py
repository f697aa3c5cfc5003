"""One file -> upright RGB pixels of the wanted size, or a failure. All decoding rules and limits are here."""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from featcli.errors import CheckpointError, shown
from featcli.inputs import MISSING

if TYPE_CHECKING:
    from featcli.inputs import Image as Input

# Never "every format Pillow knows": a PostScript file named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MAX_BYTES = 2 * 1024**3
MAX_PIXELS = 89_478_485  # where Pillow begins to warn; a picture of that size takes 270 MB as RGB
DETAIL_LENGTH = 200

REASONS = (
    "not_found",
    "not_regular",
    "unreadable",
    "empty",
    "too_large",
    "changed",
    "not_an_image",
    "format_not_allowed",
    "truncated",
    "decode_error",
    "too_many_pixels",
    "unsupported_depth",
)

# What people take for pictures and no format here reads: (first bytes, how far in, name).
FOREIGN = (
    (b"ftyphei", 4, "HEIC"),
    (b"ftyphev", 4, "HEIC"),
    (b"ftypmif1", 4, "HEIF"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"JXL ", 4, "JPEG XL"),
    (b"%!PS", 0, "PostScript"),
    (b"%PDF", 0, "PDF"),
    (b"<svg", 0, "SVG"),
)

# Rules that change pixels; they are part of the plan.
RULES = {"orientation": "apply", "alpha": "drop", "depth": "16 bit scaled to 8", "frame": "first"}


@dataclass(frozen=True)
class Failure:
    """An image that could not be read. Its row is there, filled with NaN."""

    key: str
    row: int
    reason: str  # one of REASONS
    detail: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in records and in failures.jsonl."""
        return {"key": self.key, "row": self.row, "reason": self.reason, "detail": self.detail}


class UnreadableError(Exception):
    """Why one file gives no pixels."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_pixels(image: Input, fit: Callable[[Image.Image], np.ndarray], out: np.ndarray) -> None:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (3, H, W).

    Raises UnreadableError for whatever is wrong with the file; `out` may then hold anything.
    """
    try:
        pixels = fit(_decode(image))
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly everything: OSError, ValueError, SyntaxError, struct.error ...
        raise UnreadableError(*_explained(error)) from error
    if pixels.shape != out.shape:  # no fault of the picture's
        raise CheckpointError(
            f"the checkpoint's preprocessing gives {shown(image.key)} the shape {pixels.shape}, planned {out.shape}",
            "ask for another --image-size",
        )
    out[...] = pixels


def _decode(image: Input) -> Image.Image:
    with _opened(image) as file, _identified(file) as picture:
        if picture.width * picture.height > MAX_PIXELS:  # known from the header, before any pixel is unpacked
            raise UnreadableError(
                "too_many_pixels", f"{picture.width}x{picture.height}, the limit is {MAX_PIXELS} pixels"
            )
        picture.load()
        return upright_rgb(picture)


def _opened(image: Input) -> IO[bytes]:
    """The open file, after the checks that must come before opening: a named pipe would wait for ever."""
    try:
        found = os.stat(image.path)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError("not_regular", "a folder, pipe, socket or device")
        if found.st_size == 0:
            raise UnreadableError("empty", "0 bytes")
        if found.st_size > MAX_BYTES:
            raise UnreadableError("too_large", f"{found.st_size} bytes, the limit is {MAX_BYTES}")
        if found.st_size != image.bytes != MISSING:
            raise UnreadableError("changed", f"{image.bytes} bytes when listed, {found.st_size} when read")
        return open(image.path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableError("not_found", "no such file") from None
    except OSError as error:
        raise UnreadableError("unreadable", os.strerror(error.errno) if error.errno else "cannot be opened") from error


def _identified(file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        for mark, position, name in FOREIGN:
            if start[position:].startswith(mark):
                raise UnreadableError("format_not_allowed", f"{name}: convert it to JPEG or PNG") from None
        raise UnreadableError("not_an_image", "no known picture format") from None


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture as a person sees it, in RGB: turned by its EXIF, without transparency, deep greys scaled to 8 bits.

    Raises UnreadableError for modes without a known range.
    """
    return _to_rgb(_upright(picture))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF beside good pixels: there is no orientation to apply
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip every value above 255 to white
        scaled = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise UnreadableError("unsupported_depth", f"mode {picture.mode}: 32-bit values without a known range")
    return picture.convert("RGB")


def _explained(error: Exception) -> tuple[str, str]:
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels", f"the limit is {MAX_PIXELS} pixels"
    # Object addresses in a message would make two equal runs differ.
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")[:DETAIL_LENGTH]
    cut_short = isinstance(error, OSError | struct.error | EOFError) and "trunca" in text.lower()
    return ("truncated" if cut_short else "decode_error"), text
