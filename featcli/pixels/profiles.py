"""Find ICC profiles that say something else than sRGB, and convert pictures to sRGB by them."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from featcli.pixels.failure import UnreadableError
from featcli.pixels.png import BROKEN_PROFILE

# Each space of colours has the modes of pictures that its profiles fit. A profile is applied to the first mode.
MODES = {
    "RGB": ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "L", "LA", "La", "1", "YCbCr"),
    "GRAY": ("L", "LA", "La", "1"),
    "CMYK": ("CMYK",),
    "Lab": ("LAB",),
}
DEEP_GREYS = ("I", "F")  # modes that become L before a profile is applied
MOST_BYTES = 4 * 1024**2  # the largest profile that is used; those of printers have about 3 MB
TOO_LARGE = f"it is larger than {MOST_BYTES:,} bytes".encode()  # in place of such a profile, to save memory
SAME = 2  # levels of 255 by which rounding, and its text, may move the colours of a profile that is sRGB
KEPT = 32  # profiles whose transforms are kept; a folder has few


def icc_profile_of(picture: Image.Image) -> bytes | None:
    """Return the colour profile of a picture, or None. An unusable one is returned as BROKEN_PROFILE or TOO_LARGE."""
    found = picture.info.get("icc_profile", b"")
    if not isinstance(found, bytes):  # Pillow could not read it; in a TIFF it may be a number
        return BROKEN_PROFILE
    return TOO_LARGE if len(found) > MOST_BYTES else found or None


@lru_cache(KEPT)
def is_srgb(profile: bytes) -> bool:
    """Return whether a profile leaves colours as they are, judged by what it does, not by its name.

    A broken one does not.
    """
    try:
        space, transform = _transform(profile)
    except UnreadableError:
        return False
    if space not in ("RGB", "GRAY"):
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # black, white and 16 between them
    values = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3)
    if space == "GRAY":
        values = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 3))
    given = Image.fromarray(values[..., 0] if space == "GRAY" else values)
    moved = np.asarray(transform.apply(given)).astype(int) - values
    return bool(np.abs(moved).max() <= SAME)


def is_usable(profile: bytes, mode: str) -> bool:
    """Return whether pictures of a mode can be converted by a profile: it is not broken, and is for such colours."""
    try:
        space, _ = _transform(profile)
    except UnreadableError:
        return False
    return ("L" if mode.startswith(DEEP_GREYS) else mode) in MODES[space]


@lru_cache(KEPT)
def is_xyb(profile: bytes) -> bool:
    """Return whether a profile belongs to a JPEG in JPEG XL's XYB, whose values are not colours by themselves."""
    try:
        return "XYB" in ImageCms.getProfileDescription(_opened(profile))
    except (UnreadableError, ImageCms.PyCMSError):
        return False


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Return the picture in RGB, converted perceptually from the colours of the profile to sRGB, without transparency.

    Raises UnreadableError for a profile that is broken, or is not for such a picture.
    """
    space, transform = _transform(profile)
    wanted, *others = MODES[space]
    if picture.mode != wanted and picture.mode not in others:
        raise _unusable(f"it is for {space}, the picture is {picture.mode}")
    return transform.apply(picture if picture.mode == wanted else picture.convert(wanted))


@lru_cache(KEPT)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform]:
    """Return the space of a profile's colours, and the transform that makes them sRGB."""
    opened = _opened(profile)
    space = opened.profile.xcolor_space.strip()
    if space not in MODES:
        raise _unusable(f"its colours are {space}")
    try:
        made = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            MODES[space][0],
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            ImageCms.Flags.NOCACHE,  # several threads use it at once
        )
    except ImageCms.PyCMSError as error:
        raise _unusable(str(error)) from error
    assert isinstance(made, ImageCms.ImageCmsTransform)
    return space, made


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    if profile in (BROKEN_PROFILE, TOO_LARGE):
        raise _unusable(profile.decode())
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except OSError as error:
        raise _unusable(str(error)) from error


def _unusable(why: str) -> UnreadableError:
    text = f"its colour profile cannot be used ({' '.join(why.split())}); --colour ignore leaves it out"
    return UnreadableError("decode_error", text)
