"""Which formats of pictures are read, and how a file is known to be of one."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import IO

from PIL import Image, UnidentifiedImageError

from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import register_plugin, silence_libtiff
from featcli.spec.groups import PixelSpec

# Never "every format Pillow knows": a PostScript file named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}  # read if installed

# What people take for pictures and no format here reads: (first bytes, how far in, name).
FOREIGN = (
    (b"ftyphei", 4, "HEIF"),
    (b"ftyphev", 4, "HEIF"),
    (b"ftypmif1", 4, "HEIF"),
    (b"\xff\x0a", 0, "JXL"),
    (b"JXL ", 4, "JXL"),
    (b"%!PS", 0, "PostScript"),
    (b"%PDF", 0, "PDF"),
    (b"<svg", 0, "SVG"),
    (b"<?xml", 0, "XML, such as SVG"),
)
# How those begin whose header can be so damaged that Pillow no longer knows them.
KNOWN = (
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"\x89PNG", 0, "PNG"),
    (b"WEBP", 8, "WebP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"GIF8", 0, "GIF"),
    (b"ftypavif", 4, "AVIF"),
)


def identified(file: IO[bytes], rules: PixelSpec) -> Image.Image:
    """The picture as its header describes it, no pixel unpacked."""
    formats = readable_formats(rules.max_pixels)
    try:
        picture = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        name = _begins_as(start, FOREIGN)
        if name and name not in formats:
            help_ = f"pip install {PLUGINS[name][1]}, or convert it" if name in PLUGINS else "convert it"
            raise UnreadableError("format_not_allowed", f"{name}: {help_} to JPEG or PNG") from None
        if name := name or _begins_as(start, KNOWN):
            raise UnreadableError("decode_error", f"{name} with a damaged header, or cut short") from None
        raise UnreadableError("not_an_image", "no known picture format") from None
    if picture.width * picture.height > rules.max_pixels:
        raise UnreadableError(
            "too_many_pixels",
            f"{picture.width}x{picture.height}, the limit is {rules.max_pixels} pixels (--max-pixels)",
        )
    return picture


def _begins_as(start: bytes, marks: tuple[tuple[bytes, int, str], ...]) -> str:
    return next((name for mark, position, name in marks if start[position:].startswith(mark)), "")


@cache
def readable_formats(max_pixels: int) -> tuple[str, ...]:
    """The formats that are read, once Pillow is set up: with plugins, without libtiff's messages, with this limit."""
    Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS or 0)  # Pillow's guards the frames inside a file
    silence_libtiff()
    return FORMATS + tuple(name for name, (module, _) in PLUGINS.items() if _registered(module))


def _registered(module: str) -> bool:
    with suppress(Exception):  # not installed, or for another Pillow
        register_plugin(module)
        return True
    return False


def plugin_versions() -> dict[str, str]:
    """Of the plugins that are installed."""
    found = {}
    for _, package in PLUGINS.values():
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
