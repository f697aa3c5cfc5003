"""Write TIFFs of every kind from arrays, tag by tag, without a TIFF library, to measure readers with."""

from __future__ import annotations

import lzma
import struct
import zlib
from dataclasses import dataclass

import numpy as np

GREY_WHITE_IS_ZERO, GREY, RGB, PALETTE, MASK, CMYK, YCBCR, CIELAB, CFA = 0, 1, 2, 3, 4, 5, 6, 8, 32803
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA, ZSTD = 1, 5, 8, 32946, 32773, 34925, 50000
SHORT, LONG, LONG8 = 3, 4, 16
PHOTOMETRIC, PLANAR, EXTRA = 262, 284, 338  # numbers of tags
ROWS = 10  # of a strip
CODES = {1: "B", SHORT: "H", LONG: "I", LONG8: "Q"}


@dataclass(frozen=True)
class Layout:
    """How a TIFF holds its samples."""

    order: str = "<"
    big: bool = False
    planar: bool = False
    tiles: bool = False
    compression: int = NONE
    predictor: int = 1
    lowest_bit_first: bool = False


def tiff(samples, bits, photometric, layout=Layout(), tags=(), later=()):
    """Return the bytes of a TIFF of (H, W, S) samples. `tags` are more (tag, type, values), `later` are more images."""
    images = [image_of(samples, bits, photometric, layout, tags), *later]
    order, width = layout.order, 8 if layout.big else 4
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if layout.big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if layout.big else struct.pack(order + "I", 8)
    out = bytearray(head)
    for last, (entries, chunks) in ((i == len(images) - 1, image) for i, image in enumerate(images)):
        out += _directory(entries, chunks, len(out), last, order, width)
    return bytes(out)


def retagged(data, tags):
    """Return the same file with another first value for tags of its first image that hold a few SHORTs."""
    order, is_big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    place, (head, entry, value) = (16, (8, 20, 12)) if is_big else (8, (2, 12, 8))
    (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, place)
    out = bytearray(data)
    for at in range(place + head, place + head + count * entry, entry):
        (tag,) = struct.unpack_from(order + "H", data, at)
        if tag in tags:
            struct.pack_into(order + "H", out, at + value, tags[tag])
    return bytes(out)


def image_of(samples, bits, photometric, layout=Layout(), tags=()):
    """Return the tags and the chunks of one image."""
    samples = samples.reshape(*samples.shape[:2], -1)
    height, wide, count = samples.shape
    kind = {"f": FLOAT, "i": SIGNED}.get(samples.dtype.kind, UNSIGNED)
    planes = [samples[..., i : i + 1] for i in range(count)] if layout.planar else [samples]
    if layout.tiles:
        edge = 16
        padded = [np.pad(p, ((0, -height % edge), (0, -wide % edge), (0, 0))) for p in planes]
        parts = [
            plane[y : y + edge, x : x + edge]
            for plane in padded
            for y in range(0, height, edge)
            for x in range(0, wide, edge)
        ]
        sizes = [(322, SHORT, [edge]), (323, SHORT, [edge])]
    else:
        parts = [plane[y : y + ROWS] for plane in planes for y in range(0, height, ROWS)]
        sizes = [(278, SHORT, [ROWS])]
    chunks = [_compressed(_packed(part, bits, layout), layout) for part in parts]
    offsets, lengths = (324, 325) if layout.tiles else (273, 279)
    entries = [
        (256, SHORT, [wide]),
        (257, SHORT, [height]),
        (258, SHORT, [bits] * count),
        (259, SHORT, [layout.compression]),
        (262, SHORT, [photometric]),
        (277, SHORT, [count]),
        (284, SHORT, [2 if layout.planar else 1]),
        *sizes,
        (offsets, LONG, [0] * len(chunks)),
        (lengths, LONG, [len(chunk) for chunk in chunks]),
    ]
    if kind != UNSIGNED:
        entries.append((339, SHORT, [kind] * count))
    if layout.predictor != 1:
        entries.append((317, SHORT, [layout.predictor]))
    if layout.lowest_bit_first:
        entries.append((266, SHORT, [2]))
    given = {tag for tag, _, _ in tags}
    return sorted([entry for entry in entries if entry[0] not in given] + list(tags)), chunks


def _directory(entries, chunks, at, is_last, order, width):
    """Return a directory at a place of the file, then the values that are too long for it, then the chunks."""
    count, field = ("Q", "Q") if width == 8 else ("H", "I")
    size = struct.calcsize("<" + count) + len(entries) * (4 + 2 * width) + width
    values = [struct.pack(f"{order}{len(v)}{CODES[t]}", *v) for _, t, v in entries]
    first = at + size + sum(len(v) + len(v) % 2 for v in values if len(v) > width)
    places = [first + sum(map(len, chunks[:i])) for i in range(len(chunks))]
    end = first + sum(map(len, chunks))
    end += end % 2
    head, tail = struct.pack(order + count, len(entries)), b""
    for (tag, kind, held), value in zip(entries, values, strict=True):
        if tag in (273, 324):
            value = struct.pack(f"{order}{len(places)}{CODES[kind]}", *places)
        head += struct.pack(order + "HH" + field, tag, kind, len(held))
        if len(value) > width:
            head += struct.pack(order + field, at + size + len(tail))
            tail += value + bytes(len(value) % 2)
        else:
            head += value.ljust(width, b"\0")
    head += struct.pack(order + field, 0 if is_last else end)
    out = head + tail + b"".join(chunks)
    return out + bytes(end - at - len(out))


def _packed(part, bits, layout):
    """Return (h, w, s) samples as bytes, with each row from a byte of its own."""
    kind = part.dtype.kind
    if bits in (8, 16, 32, 64):
        values = part.astype(np.dtype(f"{kind}{bits // 8}"))
        if layout.predictor == 2:
            unsigned = values.view(f"u{bits // 8}")
            values = unsigned.copy()
            values[:, 1:] -= unsigned[:, :-1]
        elif layout.predictor == 3:
            return _float_differences(values)
        data = values.astype(values.dtype.newbyteorder(layout.order)).tobytes()
    else:
        rows = part.reshape(len(part), -1).astype(np.uint64)
        places = np.arange(bits - 1, -1, -1, dtype=np.uint64)
        data = np.packbits(((rows[..., None] >> places) & 1).astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()
    return data


def _float_differences(values):
    """Apply the predictor for floats: the bytes of a row by weight, highest first, each minus the one before."""
    rows, count = values.reshape(len(values), -1), values.shape[2]
    octets = rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1, values.dtype.itemsize)
    planes = octets.transpose(0, 2, 1).reshape(len(rows), -1)
    out = planes.copy()
    out[:, count:] -= planes[:, :-count]
    return out.tobytes()


def _compressed(data, layout):
    import imagecodecs

    ways = {
        NONE: bytes,
        LZW: imagecodecs.lzw_encode,
        DEFLATE: zlib.compress,
        OLD_DEFLATE: zlib.compress,
        PACKBITS: imagecodecs.packbits_encode,
        LZMA: lambda content: lzma.compress(content, preset=0),
        ZSTD: imagecodecs.zstd_encode,
    }
    data = bytes(ways[layout.compression](data))
    if layout.lowest_bit_first:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder="little").tobytes()
    return data
