"""Tell the format of a picture, and which formats are read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import IO

from PIL import Image, UnidentifiedImageError

from featcli.inputs.signatures import DOCUMENT, START, foreign, known_format
from featcli.pixels import jpeg2000, png, tiff
from featcli.pixels.containers import oriented
from featcli.pixels.extras import HEIF, JXL
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import register_plugin, silence_libtiff
from featcli.pixels.limits import FRAME_OF_LS, frame_of_jpeg, too_many_pixels
from featcli.pixels.tiff_header import TURNS, header_of
from featcli.pixels.traits import is_deep
from featcli.spec.groups import PixelSpec

# This is not every format that Pillow knows: a PostScript file named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
JPEG = b"\xff\xd8\xff"  # with what each JPEG begins that Pillow takes
PLUGINS = {"HEIF": ("pillow_heif", HEIF), "JXL": ("pillow_jxl", JXL)}  # modules of the plugins, and their extras


def identified(file: IO[bytes], rules: PixelSpec) -> Image.Image:
    """Return the picture as its header describes it. No pixel is unpacked.

    Raises UnreadableError if the file is of no format that is read, or costs too much.
    """
    formats = readable_formats()
    file.seek(0)
    is_jpeg = file.read(len(JPEG)) == JPEG
    header = None if is_jpeg else header_of(file)
    picture = None if is_jpeg else tiff.unpacked(file, header, rules) if header else jpeg2000.unpacked(file, rules)
    try:
        if picture is None:
            file.seek(0)
            picture = Image.open(file, formats=formats)
            picture = tiff.corrected(picture, header, rules) if header else picture
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(START)
        raise _of_jpeg(file, start) or _unidentified(start, formats) from None
    if picture.format == "PNG":
        png.mend_transparency(picture, is_seen=rules.alpha != "drop")
    if picture.format in PLUGINS:
        picture = oriented(picture, file, rules)
    if header:
        picture.info |= {"bit_depth": header.bits, "is_turned": header.orientation in TURNS}
    elif rules.black_and_white is not None and picture.format != "JPEG2000":  # its range was applied already
        _refuse_reduced(picture)
    if picture.width * picture.height > rules.max_pixels:
        raise too_many_pixels(*picture.size, rules.max_pixels)
    return picture


def _refuse_reduced(picture: Image.Image) -> None:
    """Raise UnreadableError if deep values come in 8 bits although --depth-range was given."""
    if is_deep(picture) and not picture.mode.startswith(("I", "F")):
        raise UnreadableError(
            "unsupported_depth", f"{picture.format} of more than 8 bits is read as 8: --depth-range needs it as a TIFF"
        )


def _of_jpeg(file: IO[bytes], start: bytes) -> UnreadableError | None:
    """Return why Pillow does not know a whole JPEG: it is a JPEG-LS, or has more than 8 bits. None for all others."""
    marker, bits = (start.startswith(JPEG[:2]) and frame_of_jpeg(file)) or (0, 8)
    if marker == FRAME_OF_LS:
        return UnreadableError("format_not_allowed", "JPEG-LS: convert it to JPEG or PNG")
    return (
        None if bits == 8 else UnreadableError("unsupported_depth", f"JPEG of {bits} bits a value: convert it to PNG")
    )


def _unidentified(start: bytes, formats: Sequence[str]) -> UnreadableError:
    """Return why Pillow knows no format for this file, judged by its first bytes."""
    found = foreign(start)
    if found is None or found.what in formats:
        if name := format_of(start):
            return UnreadableError("decode_error", f"{name} with a damaged header, or cut short")
        return UnreadableError("not_an_image", "no known picture format")
    if not (found.is_picture or found.kind == DOCUMENT):
        return UnreadableError("not_an_image", f"no known picture format: {found.what}")
    help_ = f"{PLUGINS[found.what][1].install}, or convert it" if found.what in PLUGINS else "convert it"
    return UnreadableError("format_not_allowed", f"{found.what}: {help_} to JPEG or PNG")


def format_of(start: bytes) -> str:
    """Return the name of the format that a file begins like, for messages; empty if the first bytes do not tell."""
    found = foreign(start)
    return known_format(start) or (found.what if found is not None and found.is_picture else "")


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats that are read, and set Pillow up: its plugins are registered, and libtiff is silenced."""
    silence_libtiff()
    return FORMATS + tuple(name for name, (module, _) in PLUGINS.items() if _registered(module))


def _registered(module: str) -> bool:
    with suppress(Exception):  # the plugin is not installed, or is for another Pillow
        register_plugin(module)
        return True
    return False
