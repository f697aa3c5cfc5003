"""Find the traits of a picture that a default decides about. Every run counts them, and says them at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import IO, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from featcli.pixels import jpeg2000
from featcli.pixels.colour import exif_orientation
from featcli.pixels.internals import file_of
from featcli.pixels.profiles import icc_profile_of, is_srgb, is_usable, is_xyb
from featcli.pixels.tiff_header import TURNS
from featcli.spec.groups import PixelSpec

T = TypeVar("T")
Trait = Literal["transparent", "deep", "turned", "profile", "xyb", "frames"]
TRAITS: tuple[Trait, ...] = get_args(Trait)  # add later ones at the end

WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
OPAQUE = 255
HEAD_BYTES = 1 << 20  # bytes of an AVIF that are searched for its depth; profiles come before it


def of_header(picture: Image.Image) -> Iterator[Trait]:
    """Yield the traits that only the opened file shows, before its pixels are unpacked."""
    if _has_more(picture):
        yield "frames"
    if is_deep(picture):
        yield "deep"
    if picture.info.get("is_turned"):  # true for formats that are turned as they are unpacked
        yield "turned"


def of_pixels(picture: Image.Image) -> Iterator[Trait]:
    """Yield the traits that the unpacked picture shows, as it is stored."""
    if picture.has_transparency_data and _is_transparent(picture):
        yield "transparent"
    if exif_orientation(picture) in TURNS:
        yield "turned"
    if profile := icc_profile_of(picture):
        if is_xyb(profile):
            yield "xyb"
        elif not is_srgb(profile) and is_usable(profile, picture.mode):
            yield "profile"


def _has_more(picture: Image.Image) -> bool:
    """Return whether a file holds more than one picture. n_frames is not used, because it walks through the file."""
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # the next frame of a GIF is damaged
        return True


def _is_transparent(picture: Image.Image) -> bool:
    """Return whether any pixel is not fully opaque."""
    if picture.mode.startswith("I;16"):
        return bool(np.any(np.asarray(picture) == picture.info["transparency"]))
    try:
        whole = picture if picture.mode in WITH_ALPHA else picture.convert("RGBA")
    except ValueError:  # Pillow does not know transparency for this mode
        return True
    return bool(np.asarray(whole.getchannel(len(whole.getbands()) - 1)).min() < OPAQUE)


def is_deep(picture: Image.Image) -> bool:
    """Return whether values have more than 8 bits, so that some bits are lost."""
    if picture.mode.startswith("I") or picture.mode == "F" or picture.info.get("bit_depth", 8) > 8:
        return True
    if picture.format == "JPEG2000":
        header = _in_file(picture, jpeg2000.header_of)
        return header is not None and max(header.depths) > 8
    if picture.format == "AVIF":
        return bool(_in_file(picture, _is_deep_avif))
    return any(_is_16_bit(tile.args) or _most_of_ppm(tile.args) > 255 for tile in getattr(picture, "tile", ()))


def _is_16_bit(args: object) -> bool:
    """Return whether values have 16 bits. The pixels of a BMP can have 16 bits, too, but not its values."""
    return ";16" in str(args) and "BGR;16" not in str(args)


def _most_of_ppm(args: object) -> int:
    """Return the value that is white in a PPM, or 255 for other formats."""
    return args[1] if isinstance(args, tuple) and len(args) == 2 and isinstance(args[1], int) else 255


def _is_deep_avif(file: IO[bytes]) -> bool:
    """Return whether an AVIF has more than 8 bits, which its AV1 box says in one bit."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    place = head.find(b"av1C")
    return place >= 0 and any(byte & 0x40 for byte in head[place + 6 : place + 7])


def _in_file(picture: Image.Image, look: Callable[[IO[bytes]], T]) -> T | None:
    """Return what `look` finds in the file of a picture, or None if it has none. The position in the file is kept."""
    file = file_of(picture)
    if file is None:
        return None
    place = file.tell()
    try:
        return look(file)
    finally:
        file.seek(place)


def lines(counts: Mapping[str, int], images: int, rules: PixelSpec) -> Iterator[str]:
    """Yield a line for each trait: how many pictures have it, what became of it, and which option changes that."""
    depth = "; --depth-range says which values are black and white" if rules.black_and_white is None else ""
    turned = {
        "apply": "it is applied; --orientation ignore leaves pictures as they are",
        "ignore": "it is ignored; --orientation apply turns them upright",
    }
    colours = {"ignore": "it is ignored; --colour convert converts to sRGB", "convert": "it is converted to sRGB"}
    hidden = "it is dropped, so hidden colours show; --alpha white puts white there"
    texts: Mapping[Trait, tuple[str, str]] = {
        "transparent": ("have transparency", hidden if rules.alpha == "drop" else f"{rules.alpha} is put behind it"),
        "deep": ("have more than 8 bits a value", f"these are reduced to 8{depth}"),
        "turned": ("have an EXIF orientation", turned[rules.orientation]),
        "profile": ("have a colour profile that is not sRGB", colours[rules.colour]),
        "xyb": ("have the colours of an XYB JPEG", "these are converted to sRGB"),
        "frames": ("have several frames or pages", "only the first is read"),
    }
    for trait, (what, became) in texts.items():
        if count := counts.get(trait, 0):
            what = what.replace("have", "has", 1) if count == 1 else what
            yield f"{count:,} of {images:,} pictures {what}: {became}"
