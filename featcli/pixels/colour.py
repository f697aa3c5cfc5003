"""A decoded picture -> upright RGB: orientation, transparency and depth, by rules that are checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from featcli.pixels.internals import exif_of_header, file_of
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import parse_depth_range
from featcli.spec.words import MAX_PIXELS, Alpha, Decode, Orientation


@dataclass(frozen=True)
class PixelRules:
    """What becomes of a file's orientation, transparency, depth and size. Raises UsageError for unknown choices."""

    orientation: Orientation = "apply"  # or ignore: what EXIF says about which way is up
    alpha: Alpha = "drop"  # as timm and torchvision do, which may show colours that were hidden; or white, or black
    depth_range: tuple[float, float] | None = None  # what becomes black and white, of pictures deeper than 8 bits
    max_pixels: int = MAX_PIXELS
    decode: Decode = "exact"  # or scaled: large JPEGs are unpacked at a half, a quarter or an eighth of their size

    @classmethod
    def of(cls, asked: PixelSpec) -> PixelRules:
        """The rules that options ask for. Raises UsageError."""
        return cls(
            orientation=asked.orientation,
            alpha=asked.alpha,
            depth_range=parse_depth_range(asked.depth_range),
            max_pixels=asked.max_pixels,
            decode=asked.decode,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As part of the plan."""
        depth = "16 bit" if self.depth_range is None else list(self.depth_range)
        return {
            "orientation": self.orientation,
            "alpha": self.alpha,
            "depth_range": depth,
            "max_pixels": self.max_pixels,
            "frame": "first",
            "decode": self.decode,
        }

    @property
    def summary(self) -> str:
        """For people, in one line."""
        depth = "16 bits" if self.depth_range is None else "{:g} to {:g}".format(*self.depth_range)
        turned = "applied" if self.orientation == "apply" else "ignored"
        large = ", large JPEGs decoded smaller" if self.decode == "scaled" else ""
        return f"EXIF orientation {turned}, alpha {self.alpha}, {depth} scaled to 8{large}"


ORIENTATION_TAG = 0x0112
UPRIGHT = 1
DEFAULT = PixelRules()
TURNED = (5, 6, 7, 8)  # the EXIF orientations that exchange height and width
DEEP = (0.0, 65535.0)  # the values of a 16-bit picture that become black and white


class UnreadableError(Exception):
    """Why one file gives no pixels: one of images.REASONS, and words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def upright_rgb(picture: Image.Image, rules: PixelRules = DEFAULT) -> Image.Image:
    """The picture as a person sees it, in RGB, by these rules.

    Raises UnreadableError for modes without a known range.
    """
    is_16_bit = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")  # 16-bit PGM
    upright = _upright(picture) if rules.orientation == "apply" else picture
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        return _scaled(upright, rules.depth_range or (DEEP if is_16_bit else None)).convert("RGB")
    if rules.alpha != "drop" and upright.has_transparency_data:
        background = Image.new("RGBA", upright.size, rules.alpha)
        background.alpha_composite(upright.convert("RGBA"))
        return background.convert("RGB")
    return upright.convert("RGB")


def upright_size(picture: Image.Image, rules: PixelRules) -> tuple[int, int]:
    """(height, width) that `upright_rgb` will give, from the header alone."""
    width, height = picture.size
    if rules.orientation != "apply" or width == height or picture.format == "TIFF":
        return height, width
    turned = _orientation(picture, _has_late_chunks(picture)) in TURNED
    return (width, height) if turned else (height, width)  # Pillow itself turns TIFF, and says so in its size


def _has_late_chunks(picture: Image.Image) -> bool:
    """Whether a PNG says something of itself after its pixels. Else its orientation is known without unpacking them."""
    file = file_of(picture)
    if picture.format != "PNG" or file is None:
        return True
    place, is_late = file.tell(), False
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and is_late:
                return True
            is_late |= head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _orientation(picture: Image.Image, unpack: bool = True) -> int:
    try:
        exif = picture.getexif() if unpack else exif_of_header(picture)
        return int(exif.get(ORIENTATION_TAG, UPRIGHT))
    except Exception:  # damaged EXIF beside good pixels: there is no orientation to apply
        return UPRIGHT


def _upright(picture: Image.Image) -> Image.Image:
    if _orientation(picture) == UPRIGHT:  # nearly all; ImageOps would copy them
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # as above: it writes the EXIF anew
        return picture


def _scaled(picture: Image.Image, known: tuple[float, float] | None) -> Image.Image:
    """A deep grey picture in 8 bits. Pillow's own conversion would clip all above 255 to white."""
    if known is None:
        raise UnreadableError(
            "unsupported_depth", f"mode {picture.mode}: 32-bit values; say which are black and white: --depth-range"
        )
    low, high = known
    values = np.asarray(picture).astype(np.float32)
    if not np.isfinite(values).all():
        raise UnreadableError("unsupported_depth", f"mode {picture.mode}: values that are not finite")
    scaled = ((values - low) / ((high - low) / 255)).round()
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
