"""Mend AVIFs whose transparency lacks its size. Early writers left it out, and Pillow's libavif refuses such files."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import IO

MOST_BYTES = 1 << 28  # the largest file that is copied
MOST_ITEMS = 16


def with_alpha_size(file: IO[bytes]) -> IO[bytes] | None:
    """Return a copy in which each auxiliary image has the size of its picture.

    Return None if the file is no AVIF, or lacks no size.
    """
    file.seek(0)
    if file.read(8)[4:] != b"ftyp":
        return None
    file.seek(0)
    content = file.read(MOST_BYTES)
    is_more = False
    try:
        for _ in range(MOST_ITEMS):
            more = _with_one_size(content)
            if more is None:
                break
            content, is_more = more, True
    except (KeyError, IndexError, ValueError, struct.error):  # Pillow finds the damage, too, and says so
        return None
    return io.BytesIO(content) if is_more else None


def _boxes(content: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, begin of its content, end of its content) of each box. All boxes have sizes of 32 bits."""
    while begin + 8 <= end:
        length = int.from_bytes(content[begin : begin + 4], "big")
        if length < 8:
            return
        yield content[begin + 4 : begin + 8], begin + 8, begin + length
        begin += length


def _inside(content: bytes, begin: int, end: int) -> dict[bytes, tuple[int, int]]:
    return {kind: (first, last) for kind, first, last in _boxes(content, begin, end)}


def _with_one_size(content: bytes) -> bytes | None:
    meta = _inside(content, 0, len(content))[b"meta"]
    parts = _inside(content, meta[0] + 4, meta[1])
    properties = parts[b"iprp"]
    ipco, ipma = (_inside(content, *properties)[kind] for kind in (b"ipco", b"ipma"))
    kinds = [kind for kind, _, _ in _boxes(content, *ipco)]
    width = 1 + (content[ipma[0] + 3] & 1)
    known = dict(_associations(content, ipma[0], width))
    for auxiliary, picture in _auxiliaries(content, *parts[b"iref"]):
        indices, end = known[auxiliary]
        sizes = [index for index in known[picture][0] if kinds[index - 1] == b"ispe"]
        if sizes and not any(kinds[index - 1] == b"ispe" for index in indices):
            mended = bytearray(content)
            mended[end - len(indices) * width - 1] += 1
            for begin, _ in (meta, properties, ipma):
                mended[begin - 8 : begin - 4] = struct.pack(
                    ">I", struct.unpack_from(">I", content, begin - 8)[0] + width
                )
            _move(mended, parts[b"iloc"][0], end, width)
            mended[end:end] = sizes[0].to_bytes(width, "big")
            return bytes(mended)
    return None


def _associations(content: bytes, at: int, width: int) -> Iterator[tuple[int, tuple[list[int], int]]]:
    """Yield (item, (the numbers of its properties, the end of their list))."""
    id_width, count = (4 if content[at] else 2), int.from_bytes(content[at + 4 : at + 8], "big")
    at += 8
    for _ in range(count):
        item, number = int.from_bytes(content[at : at + id_width], "big"), content[at + id_width]
        at += id_width + 1
        mask = (1 << (8 * width - 1)) - 1
        places = range(at, at + number * width, width)
        indices = [int.from_bytes(content[place : place + width], "big") & mask for place in places]
        at += number * width
        yield item, (indices, at)


def _auxiliaries(content: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (auxiliary image, the picture that it belongs to)."""
    width = 4 if content[begin] else 2
    for kind, at, _ in _boxes(content, begin + 4, end):
        if kind == b"auxl":
            place = at + width + 2
            yield int.from_bytes(content[at : at + width], "big"), int.from_bytes(content[place : place + width], "big")


def _move(content: bytearray, at: int, place: int, by: int) -> None:
    """Add `by` to the offsets of all items that lie behind `place`."""
    version, sizes = content[at], content[at + 4 : at + 6]
    offset_size, length_size, base_size = sizes[0] >> 4, sizes[0] & 15, sizes[1] >> 4
    index_size = sizes[1] & 15 if version else 0
    wide = 4 if version == 2 else 2
    count, at = int.from_bytes(content[at + 6 : at + 6 + wide], "big"), at + 6 + wide
    for _ in range(count):
        at += wide
        method = int.from_bytes(content[at : at + 2], "big") & 15 if version else 0
        at += 4 if version else 2
        base, base_at = int.from_bytes(content[at : at + base_size], "big"), at
        at += base_size
        extents, at = int.from_bytes(content[at : at + 2], "big"), at + 2
        if base and base >= place and method == 0:
            content[base_at : base_at + base_size] = (base + by).to_bytes(base_size, "big")
        for _ in range(extents):
            at += index_size
            offset = int.from_bytes(content[at : at + offset_size], "big")
            if method == 0 and base < place <= base + offset:
                content[at : at + offset_size] = (offset + by).to_bytes(offset_size, "big")
            at += offset_size + length_size
