"""Turn a decoded picture into upright RGB: orientation, transparency and depth, by rules that are part of the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

from featcli.pixels import png
from featcli.pixels.depth import reduced
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import exif_of_header
from featcli.pixels.profiles import icc_profile_of, is_srgb, is_xyb, to_srgb
from featcli.pixels.tiff_header import EXCHANGING, ORIENTATION, UPRIGHT
from featcli.spec.groups import PixelSpec

STRIP_PIXELS = 1 << 22  # pixels of a deep picture that are reduced to 8 bits at once
DEFAULT = PixelSpec()
DEEP = (0.0, 65535.0)  # the values of a 16-bit picture that become black and white


def settings_of(rules: PixelSpec) -> dict[str, Any]:
    """Return the rules as the plan holds them."""
    return {
        "orientation": rules.orientation,
        "alpha": rules.alpha,
        "depth_range": list(rules.black_and_white or ()) or "16 bit",
        "max_pixels": rules.max_pixels,
        "frame": "first",
        "decode": rules.decode,
        **({"colour": rules.colour} if rules.colour != DEFAULT.colour else {}),  # absent at its default: see Settings
    }


def summary_of(rules: PixelSpec) -> str:
    """Describe the rules in one line for people."""
    depth = "16 bits" if rules.black_and_white is None else "{:g} to {:g}".format(*rules.black_and_white)
    turned = "applied" if rules.orientation == "apply" else "ignored"
    decoded = {"exact": "", "fast": ", JPEGs by simplejpeg", "scaled": ", large JPEGs decoded smaller"}[rules.decode]
    colour = ", colours converted to sRGB" if rules.colour == "convert" else ""
    return f"EXIF orientation {turned}, alpha {rules.alpha}, {depth} scaled to 8{colour}{decoded}"


def upright_rgb(picture: Image.Image, rules: PixelSpec = DEFAULT) -> Image.Image:
    """Return the picture in RGB as a person sees it, by these rules.

    Raises UnreadableError if the values have no known range, or if a colour profile that is needed is broken.
    """
    profile = _profile_to_apply(picture, rules)
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")  # 16-bit PGM
    upright = _upright(picture) if rules.orientation == "apply" else picture
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        seen = _scaled(upright, rules.black_and_white or (DEEP if is_16_bit else None))
    else:
        seen = upright
    rgb = to_srgb(seen, profile) if profile else _rgb(seen)
    if rules.alpha == "drop" or not upright.has_transparency_data:
        return rgb
    if profile or seen is not upright:
        rgb.putalpha(_alpha_of(upright))
    else:
        rgb = upright.convert("RGBA")
    background = Image.new("RGBA", upright.size, rules.alpha)
    background.alpha_composite(rgb)
    return background.convert("RGB")


def is_as_seen(picture: Image.Image, rules: PixelSpec) -> bool:
    """Return whether the pixels of an opaque picture in 8 bits are what `upright_rgb` makes of them, but for greys."""
    is_upright = rules.orientation != "apply" or exif_orientation(picture) == UPRIGHT
    return is_upright and _profile_to_apply(picture, rules) is None


def _rgb(picture: Image.Image) -> Image.Image:
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # a conversion would copy it


def _profile_to_apply(picture: Image.Image, rules: PixelSpec) -> bytes | None:
    """Return the colour profile that the picture is converted by, or None if its values stay."""
    profile = icc_profile_of(picture)
    if profile is None or not (rules.colour == "convert" or is_xyb(profile)):
        return None
    return None if is_srgb(profile) else profile


def _alpha_of(picture: Image.Image) -> Image.Image:
    """Return the opacity of each pixel. In a 16-bit grey picture, one value can stand for transparent."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(picture) != picture.info["transparency"]).convert("L")
    return picture.convert("RGBA").getchannel("A")


def upright_size(picture: Image.Image, rules: PixelSpec) -> tuple[int, int]:
    """Return the (height, width) that `upright_rgb` will give, read from the header alone."""
    width, height = picture.size
    if rules.orientation != "apply" or width == height or picture.format == "TIFF":
        return height, width
    is_known = picture.format == "PNG" and not png.says_more(picture)
    if picture.format == "PNG" and not is_known:
        picture.load()
    turned = exif_orientation(picture, unpack=not is_known) in EXCHANGING
    return (width, height) if turned else (height, width)  # Pillow turns a TIFF itself, and its size is that afterwards


def exif_orientation(picture: Image.Image, unpack: bool = True) -> int:
    """Return the orientation that EXIF gives. `unpack` unpacks the pixels first, to find EXIF that follows them."""
    try:
        exif = picture.getexif() if unpack else exif_of_header(picture)
        return int(exif.get(ORIENTATION, UPRIGHT))
    except Exception:  # EXIF is damaged but the pixels may be good: there is no orientation to apply
        return UPRIGHT


def _upright(picture: Image.Image) -> Image.Image:
    if exif_orientation(picture) == UPRIGHT:  # true of nearly all pictures, and ImageOps would copy them
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # ImageOps writes the EXIF again, which fails if it is damaged
        return picture


def _scaled(picture: Image.Image, known: tuple[float, float] | None) -> Image.Image:
    """Reduce a deep grey picture to 8 bits. Pillow's own conversion would clip all values above 255 to white."""
    if known is None:
        raise UnreadableError(
            "unsupported_depth", f"mode {picture.mode}: 32-bit values; say which are black and white: --depth-range"
        )
    out = np.empty((picture.height, picture.width), np.uint8)
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):  # by strips, because an array of the whole would be a copy of it
        bottom = min(top + rows, picture.height)
        out[top:bottom] = reduced(np.asarray(picture.crop((0, top, picture.width, bottom))), *known)
    return Image.fromarray(out)
