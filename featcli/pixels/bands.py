"""Read pictures for networks of other numbers of channels than greys and colours have: a channel is a band.

Only a TIFF or an array holds so many bands. Each band goes the way of a grey picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

import numpy as np
from PIL import Image

from featcli.errors import UsageError, counted
from featcli.pixels.colour import DEEP, DEFAULT, upright_rgb
from featcli.pixels.depth import reduced
from featcli.pixels.extras import refuse_without_tiff
from featcli.pixels.failure import UnreadableError
from featcli.pixels.formats import identified
from featcli.pixels.limits import too_many_pixels
from featcli.pixels.memory import array_of, refuse_too_many
from featcli.pixels.tiff import (
    eight_bits,
    refuse_depth,
    refuse_preview,
    refuse_unconfirmed,
    refused,
    samples_of,
)
from featcli.pixels.tiff_header import (
    BLACK_IS_ZERO,
    COREL,
    IMAGE_DEPTH,
    NOTHING,
    OLD_JPEG,
    PHOTOMETRIC,
    RGB,
    TURNS,
    UNASSOCIATED,
    WHITE_IS_ZERO,
    Header,
    header_of,
)
from featcli.pixels.traits import OPAQUE, Trait
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import Size

OF_COLOURS = (1, 3)  # numbers of channels for which pictures are greys or colours
GREYS = ("1", "L", "I", "F")  # with what Pillow's modes of greys begin
ADVICE = "write it as a plain TIFF"
RGBA_SAMPLES = 4


@dataclass(frozen=True)
class Bands:
    """A picture of bands whose header is known."""

    size: Size  # (H, W), upright if the rules say so
    traits: tuple[Trait, ...]  # those that its header shows
    turn: Image.Transpose | None  # what makes them upright
    unpack: Callable[[], tuple[np.ndarray, np.ndarray | None]]  # -> (H, W, bands) and opacity (H, W) in 8 bits

    def greys(self, rules: PixelSpec) -> tuple[Iterator[Image.Image], tuple[Trait, ...]]:
        """Unpack the picture. Returns its bands, each as RGB like a grey picture, and all of its traits."""
        bands, opacity = self.unpack()
        more: tuple[Trait, ...] = () if opacity is None or opacity.min() == OPAQUE else ("transparent",)
        return greys_of(bands, rules, opacity, self.turn), self.traits + more


def refuse_idle_rules(rules: PixelSpec, channels: int) -> None:
    """Raise UsageError for rules that only pictures of greys and colours follow, if the pictures are bands."""
    for name in ("colour", "decode") if channels not in OF_COLOURS else ():
        if (word := getattr(rules, name)) != getattr(DEFAULT, name):
            raise UsageError(
                f"--{name} {word} changes nothing: this network takes {channels} bands, which have no colours"
                " and are in no JPEG",
                "leave it out",
            )


def other_bands(there: int, wanted: int, has_alpha: bool = False) -> UnreadableError:
    """Return the error for a picture that does not have as many bands as the network has channels."""
    also = " and transparency, which is no band" if has_alpha else ""
    return UnreadableError("format_not_allowed", f"{counted(there, 'band')}{also}; the network takes {wanted}")


def is_grey(picture: Image.Image) -> bool:
    """Return whether a picture of Pillow is grey, with or without transparency."""
    return picture.mode.startswith(GREYS) and picture.mode != "LAB"


def greys_of(
    bands: np.ndarray, rules: PixelSpec, opacity: np.ndarray | None = None, turn: Image.Transpose | None = None
) -> Iterator[Image.Image]:
    """Yield each of the (H, W, bands) in 8 bits as an RGB picture, made as from a grey picture by the same rules."""
    for place in range(bands.shape[2]):
        band = Image.fromarray(np.ascontiguousarray(bands[..., place]))
        if opacity is not None:
            band.putalpha(Image.fromarray(np.ascontiguousarray(opacity)))
        yield upright_rgb(band if turn is None else band.transpose(turn), rules)


def in_memory(given: Any, rules: PixelSpec, channels: int) -> tuple[Iterator[Image.Image], tuple[Trait, ...]]:
    """Return the bands of an array (H, W, C) or (C, H, W), each as RGB like a grey picture, and its traits.

    Raises UsageError for a dtype or shape that no picture has, and UnreadableError for another number of bands.
    """
    values = _of_bands(given, rules, channels)
    if values.dtype == np.uint8:
        return greys_of(values, rules), ()
    return greys_of(reduced(values, *(rules.black_and_white or DEEP)), rules), ("deep",)


def size_in_memory(given: Any, rules: PixelSpec, channels: int) -> Size:
    """Return the (H, W) of such an array. Raises as `in_memory` does."""
    height, width, _ = _of_bands(given, rules, channels).shape
    return height, width


def _of_bands(given: Any, rules: PixelSpec, channels: int) -> np.ndarray:
    if isinstance(given, Image.Image):  # Pillow has no picture of bands
        raise other_bands(1 if is_grey(given) else 3, channels, given.has_transparency_data)
    values: np.ndarray = array_of(given)
    if values.dtype.kind == "b":
        values = values * np.uint8(255)  # as Pillow shows it
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] == channels:
        values = values.transpose(1, 2, 0)  # torch has the channels first
    if not (values.ndim in (2, 3) and values.size and values.dtype in (np.uint8, np.uint16)):
        taken = f"give the path of a TIFF, or an array (H, W, {channels}) of uint8 or uint16, or a list of these"
        raise UsageError(f"an array {values.shape} of {values.dtype} is not a picture of {channels} bands", taken)
    there = values.shape[2] if values.ndim == 3 else 1
    if there != channels:
        raise other_bands(there, channels)
    refuse_too_many(values.shape[0] * values.shape[1], rules)
    return values


def in_file(file: IO[bytes], rules: PixelSpec, channels: int) -> Bands:
    """Return the picture of so many bands as its header describes it. No pixel is unpacked.

    Raises UnreadableError with both numbers if it has another number of bands, and for files that cannot be read.
    """
    header = header_of(file)
    if header is None or not all(header.size) or not _has_plain_samples(header):
        with identified(file, rules) as picture:
            is_one = is_grey(picture) or (header is not None and header.photometric == WHITE_IS_ZERO)
            raise other_bands(1 if is_one else 3, channels, picture.has_transparency_data)
    refuse_preview(header, ADVICE)
    alphas = _alphas(header)
    if header.samples - len(alphas) != channels:
        raise other_bands(header.samples - len(alphas), channels, bool(alphas))
    _refuse_kind(header, rules)
    refuse_without_tiff(f"{header.name} of {channels} bands", "")
    width, height = header.size if rules.orientation == "ignore" else header.upright_size
    if width * height > rules.max_pixels:
        raise too_many_pixels(width, height, rules.max_pixels)
    shown: dict[Trait, bool] = {
        "frames": bool(header.following),
        "deep": header.bits > 8,
        "turned": header.orientation in TURNS,
    }
    return Bands(
        size=(height, width),
        traits=tuple(trait for trait, is_there in shown.items() if is_there),
        turn=TURNS.get(header.orientation) if rules.orientation == "apply" else None,
        unpack=partial(_unpacked, file, header, rules, alphas),
    )


def _has_plain_samples(header: Header) -> bool:
    return header.photometric in (BLACK_IS_ZERO, RGB) and header.compression != OLD_JPEG


def _alphas(header: Header) -> tuple[int, ...]:
    """Return which samples are transparency. Samples that the file calls unspecified are bands."""
    if header.photometric == RGB and header.samples == RGBA_SAMPLES and not header.extra:
        return (RGBA_SAMPLES - 1,)  # nothing says what it is, and all others take it so
    first = header.samples - len(header.extra)
    return tuple(first + place for place, kind in enumerate(header.extra) if kind != NOTHING)


def _refuse_kind(header: Header, rules: PixelSpec) -> None:
    """Raise UnreadableError for a TIFF of bands that is not read."""
    if header.value(IMAGE_DEPTH, 1) > 1:
        raise refused(header, "with a volume", ADVICE)
    if not header.bits or not header.sample_format:
        raise UnreadableError("unsupported_depth", f"{header.name} with samples of different depths")
    if header.bits % 8:
        raise UnreadableError("unsupported_depth", f"{header.name} with bands of {header.bits} bits")
    refuse_depth(header, rules)
    kinds = [kind for kind in header.extra if kind != NOTHING]
    if kinds not in ([], [UNASSOCIATED], [COREL]) or len(header.extra) > header.samples:
        raise refused(header, "whose bands are multiplied by transparency, or have several kinds of it", ADVICE)
    refuse_unconfirmed(header, ADVICE)


def _unpacked(
    file: IO[bytes], header: Header, rules: PixelSpec, alphas: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    grey = replace(header, tags={**header.tags, PHOTOMETRIC: (BLACK_IS_ZERO,)})  # as which each band is reduced
    samples = samples_of(file, header)
    bands = eight_bits(np.delete(samples, alphas, axis=2) if alphas else samples, grey, rules.black_and_white)
    if not alphas:
        return bands, None
    asked = None if header.has_range else rules.black_and_white
    return bands, eight_bits(samples[..., alphas[0]], grey, asked)
