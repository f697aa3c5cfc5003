"""Take pictures in memory, of Pillow, numpy and torch: what can be used, their identity, and a picture to be sized."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image, ImageMode

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import ImageList, PicturesInMemory
from featcli.pixels import traits
from featcli.pixels.colour import DEEP, exif_orientation
from featcli.pixels.depth import high_bits, reduced
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import file_of, mend_transparency, was_unpacked
from featcli.pixels.profiles import icc_profile_of
from featcli.pixels.tiff_header import UPRIGHT
from featcli.pixels.traits import Trait
from featcli.spec.groups import PixelSpec

COLOURS = (1, 2, 3, 4)  # numbers of channels that an array may have: grey, grey with alpha, RGB, RGB with alpha
TAKEN = "give a path, a picture of Pillow, an array (H, W) or (H, W, C) of uint8 or uint16, or a list of these"
_unpacking = threading.Lock()  # one picture may stand in two rows, and Pillow unpacks it only once


def listed(keys: Sequence[str], pictures: Sequence[Any]) -> PicturesInMemory:
    """List pictures for a run. Raises UsageError for something that is no picture, or is closed."""
    sizes = []
    for key, picture in zip(keys, pictures, strict=True):
        try:
            sizes.append(_num_bytes(picture))
        except UsageError as error:
            raise UsageError(f"picture {shown(key)}: {error.message}", error.hint) from None
    return PicturesInMemory(keys, pictures, sizes)


def _num_bytes(given: Any) -> int:
    """Return the bytes of a picture's pixels, without unpacking it. Raises UsageError."""
    if isinstance(given, Image.Image):
        if file_of(given) is None and not was_unpacked(given):
            raise UsageError("it is closed, and was never unpacked", "call its load() before its file is closed")
        row = given.width if given.mode != "1" else -(-given.width // 8)
        itemsize = np.dtype(ImageMode.getmode(given.mode).typestr).itemsize
        return row * given.height * len(given.getbands()) * itemsize
    if not isinstance(given, np.ndarray | torch.Tensor):
        raise UsageError(f"{type(given).__name__} is not a picture", TAKEN)
    dtype = str(given.dtype).removeprefix("torch.")
    _refuse_no_picture(tuple(given.shape), dtype, of_bands=True)  # the network is not known yet
    return math.prod(given.shape) * (2 if dtype == "uint16" else 1)


def refuse_bands(images: ImageList) -> None:
    """Raise UsageError for an array of bands in a list of pictures for a network that takes colours or greys."""
    for image in map(images.__getitem__, range(len(images))):
        if not is_picture(image.picture):
            shape, dtype = tuple(image.picture.shape), str(image.picture.dtype).removeprefix("torch.")
            raise UsageError(f"picture {shown(image.key)}: an array {shape} of {dtype} is not a picture", TAKEN)


def is_picture(given: Any) -> bool:
    """Return whether a picture in memory is no array of bands."""
    shape = tuple(getattr(given, "shape", ()))
    return len(shape) != 3 or shape[2] in COLOURS or shape[0] in COLOURS


def _refuse_no_picture(shape: tuple[int, ...], dtype: str, of_bands: bool = False) -> None:
    """Raise UsageError for an array of a shape or dtype that no picture has."""
    has_channels = len(shape) == 3 and (of_bands or shape[2] in COLOURS or shape[0] in COLOURS)
    if not (len(shape) == 2 or has_channels) or 0 in shape or dtype not in ("uint8", "uint16", "bool"):
        floats = "; pixels of floats are normalised already" if "float" in dtype else ""
        raise UsageError(f"an array {shape} of {dtype} is not a picture{floats}", TAKEN)


def array_of(given: Any) -> Any:
    """Return the values of a tensor as an array. Anything else is returned as it is."""
    return given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given


def picture_of(values: np.ndarray, rules: PixelSpec) -> Image.Image:
    """Make a picture from (H, W), (H, W, C) or (C, H, W) numbers. Raises UsageError for other shapes and kinds."""
    _refuse_no_picture(values.shape, str(values.dtype))
    if values.ndim == 3 and values.shape[2] not in COLOURS:
        values = values.transpose(1, 2, 0)  # torch has the channels first
    values = np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)
    if values.dtype == np.uint16 and values.ndim == 3:  # Pillow has no mode for it
        values = _in_8_bits(values, rules)
    return Image.fromarray(values)


def _in_8_bits(values: np.ndarray, rules: PixelSpec) -> np.ndarray:
    """Reduce (H, W, C) 16-bit values as those of a TIFF are reduced. `depth_range` does not apply to transparency."""
    colours = 1 if values.shape[2] == 2 else 3
    seen, alpha = values[..., :colours], values[..., colours:]
    if rules.black_and_white is not None:
        seen = reduced(seen, *rules.black_and_white)
    seen, alpha = (
        part if part.dtype == np.uint8 else high_bits(part) if colours == 3 else reduced(part, *DEEP)
        for part in (seen, alpha)
    )
    return np.concatenate([seen, alpha], axis=2)


def unpacked(given: Any, rules: PixelSpec) -> tuple[Image.Image, tuple[Trait, ...]]:
    """Return a picture in memory as one of Pillow with its pixels, and its traits.

    A picture of Pillow that was not unpacked yet is unpacked. Raises UnreadableError for more pixels than the rules
    allow, and whatever Pillow raises.
    """
    values = array_of(given)
    if isinstance(values, np.ndarray):
        refuse_too_many(math.prod(values.shape) // _channels(values), rules)
        picture = picture_of(values, rules)
        found: list[Trait] = ["deep"] if values.dtype == np.uint16 else []
    else:
        refuse_too_many(values.width * values.height, rules)
        with _unpacking:
            found = [one for one in traits.of_header(values) if one != "frames" or values.tell() == 0]
            values.load()
            exif_orientation(values)  # which Pillow reads once and keeps
        picture = values
        if picture.mode == "1" and "transparency" in picture.info:
            picture = picture.copy()  # the caller's stays as it is
            mend_transparency(picture)
    return picture, tuple(dict.fromkeys([*found, *traits.of_pixels(picture)]))


def _channels(values: np.ndarray) -> int:
    if values.ndim == 2:
        return 1
    return int(values.shape[2] if values.shape[2] in COLOURS else values.shape[0])


def refuse_too_many(pixels: int, rules: PixelSpec) -> None:
    """Raise UnreadableError for more pixels than the rules allow."""
    if pixels > rules.max_pixels:
        raise UnreadableError("too_many_pixels", f"{pixels:,} pixels; --max-pixels moves the limit")


def digest_of(given: Any, picture: Image.Image | None) -> str:
    """Return the xxh3-128 (hex) that tells a picture in memory from others: see docs/format.md.

    `picture` is what it is unpacked, which arrays do not need.
    """
    digest = xxhash.xxh3_128()
    values = array_of(given)
    if isinstance(values, np.ndarray):
        digest.update(f"{values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()
    assert picture is not None
    digest.update(f"{picture.mode} {(picture.height, picture.width)}\n".encode())
    digest.update(picture.tobytes())
    for name, content in _beside_pixels(picture):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _beside_pixels(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of all that decides about the colours and the turn of an unpacked picture."""
    if picture.palette is not None:
        # A conversion of Pillow puts `transparency` into a palette that had none, and the digest must stay the same.
        mode = "RGBA" if picture.palette.mode.endswith("A") else "RGB"
        yield "palette", bytes(picture.getpalette(mode) or ())
    transparency = picture.info.get("transparency")
    if transparency is not None:
        numbers = transparency if isinstance(transparency, tuple | bytes) else (transparency,)
        yield "transparency", " ".join(map(str, numbers)).encode()
    if profile := icc_profile_of(picture):
        yield "profile", profile
    if (orientation := exif_orientation(picture)) != UPRIGHT:
        yield "orientation", str(orientation).encode()
