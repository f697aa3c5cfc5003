"""Ask other readers what they find in a file: GDAL (rasterio), libvips (pyvips) and FFmpeg (av), if installed.

They are asked for the samples, before anybody makes a picture of them. FFmpeg has a JPEG 2000 decoder of its own. GDAL
and libvips read TIFF with libtiff, which tifffile and imagecodecs do not use.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import tiffs

UNREAD = None  # the answer of a witness that does not read the file
SAME, OTHER = "same", "other"


@dataclass(frozen=True)
class Peculiarity:
    """What libvips is known to do to a kind, and how to look past it.

    `tags` are values by which the file means the same samples, but is not treated so. Only every `step`-th row is
    right, and only so many `channels`.
    """

    why: str
    tags: dict[int, int] = field(default_factory=dict)
    step: int = 1
    channels: int = 5


def installed():
    """Return the witnesses by name. Each gives SAME, OTHER, UNREAD, or why it gives something else."""
    found = {}
    with suppress(ImportError):
        import rasterio  # noqa: F401

        logging.getLogger("rasterio").setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")  # that pictures are on no map
        found["GDAL"] = gdal
    with suppress(ImportError):
        import pyvips  # noqa: F401

        found["libvips"] = libvips
    with suppress(ImportError):
        import av

        av.logging.set_level(None)
        found["FFmpeg"] = ffmpeg
    return found


def testimony(cell, witnesses):
    """Return what each witness says about a cell."""
    return {name: ask(cell) for name, ask in witnesses.items()} if cell.samples is not None else {}


def gdal(cell):
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    is_tiff = cell.data[:2] in (b"II", b"MM")
    try:
        with MemoryFile(cell.data) as file, rasterio.open("GTIFF_RAW:" * is_tiff + file.name) as picture:
            found = picture.read().transpose(1, 2, 0)
    except RasterioError:
        return UNREAD
    if same(found, cell.samples):
        return SAME
    is_small_signed = not is_tiff and cell.samples.dtype == np.int8
    return "negative samples become 0" if is_small_signed and same(found, cell.samples.clip(0)) else OTHER


def libvips(cell):
    found = _by_libvips(cell.data)
    if found is UNREAD:
        return UNREAD
    if cell.seen is not None and same(found, cell.seen):
        return SAME
    for count in range(1, len(cell.peculiar) + 1):
        for chosen in itertools.combinations(cell.peculiar, count):
            tags = {tag: value for each in chosen for tag, value in each.tags.items()}
            right = np.s_[:: max(each.step for each in chosen), :, : min(each.channels for each in chosen)]
            seen = spread(cell.samples, cell.bits) if tiffs.PHOTOMETRIC in tags or cell.seen is None else cell.seen
            twin = _by_libvips(tiffs.retagged(cell.data, tags)) if tags else found
            if twin is not UNREAD and same(twin[right], seen[right]):
                return " and ".join(each.why for each in chosen)
    return OTHER


def _by_libvips(data):
    import pyvips

    try:
        found = pyvips.Image.new_from_buffer(data, "", fail_on="warning").numpy()
    except pyvips.Error:
        return UNREAD
    return found.reshape(*found.shape[:2], -1)


def ffmpeg(cell):
    import av

    if cell.data[:2] in (b"II", b"MM"):
        return UNREAD  # it reads a few kinds of TIFF
    decoder = av.CodecContext.create("jpeg2000", "r")
    try:
        (frame,) = [*decoder.decode(av.Packet(cell.data)), *decoder.decode(None)]
    except (av.FFmpegError, ValueError):
        return UNREAD
    size = 2 if "16" in frame.format.name or "48" in frame.format.name or "64" in frame.format.name else 1
    count = sum(1 for _ in frame.format.components)
    (plane,) = frame.planes
    rows = np.frombuffer(plane, f"<u{size}").reshape(frame.height, -1)[:, : frame.width * count]
    unsigned = cell.samples.astype(np.int64) + (2 ** (cell.bits - 1) if cell.samples.dtype.kind == "i" else 0)
    shift = 0 if frame.format.name == "ya16le" else 8 * size - cell.bits  # in nearly all the value is in the upper bits
    return SAME if same(rows.reshape(frame.height, frame.width, count), unsigned << shift) else OTHER


def same(found, samples):
    return found.shape == samples.shape and np.array_equal(found, samples)


def spread(samples, bits):
    """Return samples of a few bits as libvips returns greys: spread over 8."""
    return samples * (255 // (2**bits - 1)) if bits < 8 else samples
