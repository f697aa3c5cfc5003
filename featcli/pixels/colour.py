"""What becomes of a picture's orientation, transparency, depth and size: the rules that change pixels, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from featcli.errors import UsageError, one_of, shown

ORIENTATIONS = ("apply", "ignore")
ALPHAS = ("drop", "white", "black")
DECODES = ("exact", "scaled")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn; a picture of that size takes 270 MB as RGB


@dataclass(frozen=True)
class Decoding:
    """What becomes of a file's orientation, transparency, depth and size. Raises UsageError for unknown choices."""

    orientation: str = "apply"  # or ignore: what EXIF says about which way is up
    alpha: str = "drop"  # as timm and torchvision do, which may show colours that were hidden; or white, or black
    depth_range: tuple[float, float] | None = None  # what becomes black and white, of pictures deeper than 8 bits
    max_pixels: int = MAX_PIXELS
    decode: str = "exact"  # or scaled: large JPEGs are unpacked at a half, a quarter or an eighth of their size

    def __post_init__(self) -> None:
        one_of("--orientation", self.orientation, ORIENTATIONS)
        one_of("--alpha", self.alpha, ALPHAS)
        one_of("--decode", self.decode, DECODES)
        if self.max_pixels < 1:
            raise UsageError(f"--max-pixels {self.max_pixels}: must be at least 1", "leave it out for the default")

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


def parse_depth_range(text: str | None) -> tuple[float, float] | None:
    """`"0:4095"` as (0, 4095), None as None. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(-?[\d.]+(?:e[+-]?\d+)?):(-?[\d.]+(?:e[+-]?\d+)?)", text)
    try:
        low, high = (float(value) for value in match.groups()) if match else (0.0, 0.0)
    except ValueError:
        low = high = 0.0
    if not -1e38 < low < high < 1e38:
        raise UsageError(
            f"--depth-range {shown(text)}: not a range", "write the values of black and white, such as 0:4095"
        )
    return low, high
