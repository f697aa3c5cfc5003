"""Unpack JPEGs by simplejpeg, for --decode fast, where its pixels are those of Pillow to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import IO, Any

import numpy as np
from PIL import Image

from featcli.pixels import jpeg

COLOURS = {"L": "GRAY", "RGB": "RGB"}  # modes of Pillow, and simplejpeg's words for them


def unpacked(file: IO[bytes], picture: Image.Image) -> np.ndarray | None:
    """Return the pixels of an open JPEG as they are stored: (H, W, 3) uint8, or (H, W) for greys.

    Returns None for whatever is not plain and whole: Pillow's decoder then reads it, or says what is wrong. So a file
    fails in one way, whoever unpacks it. None also means that simplejpeg is not installed.
    """
    decode, colours = _decoder(), COLOURS.get(picture.mode)
    if decode is None or colours is None or picture.format != "JPEG" or not isinstance(file, io.BytesIO):
        return None
    content = file.getbuffer()
    with suppress(Exception):  # a header is damaged, or libjpeg warned about the data or does not know the subsampling
        if not jpeg.has_all_scans(content):
            return None
        pixels: np.ndarray = decode(content, colours, strict=True)
        pixels = pixels if colours == "RGB" else pixels[..., 0]
        return pixels if pixels.shape[:2] == (picture.height, picture.width) else None
    return None


@cache
def _decoder() -> Callable[..., Any] | None:
    with suppress(ImportError):
        found: Callable[..., Any] = import_module("simplejpeg").decode_jpeg
        return found
    return None
