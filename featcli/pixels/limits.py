"""Limit what one file may cost, by counts that are read from it: a file that is refused is refused on every machine.

--max-pixels limits what is unpacked. The limits here are for what decoders do besides: they look for a header that
never comes, walk through millions of empty parts, or unpack before anybody has asked for the size.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from featcli.pixels.failure import UnreadableError
from featcli.pixels.jpeg import EOI, FRAMES, SOS

MOST_READS = 1 << 21  # by a decoder: one for each byte that it looks at by itself, and for each small part
MOST_HEADER_BYTES = 1 << 26  # in a JPEG before its pixels
MOST_SEGMENTS = 10_000  # in a JPEG; boxes in a JPEG XL
MOST_CHUNKS = 100_000  # in a WebP
MOST_EXIF_SEGMENTS = 100  # in a JPEG: Pillow joins them one by one
MOST_SKIPPED = 1 << 20  # bytes between the segments of a JPEG that belong to none
MOST_SCANS = 100  # in a JPEG, whatever its size
MOST_SCANNED_PIXELS = 1 << 34  # pixels times scans: each scan goes over the whole picture
MOST_TILES = 1 << 19  # or strips of a TIFF, or values of any of its tags that is not private
MOST_NETPBM_HEADER = 1 << 16  # bytes
MOST_PLAIN_VALUES = 1 << 25  # in a PBM, PGM or PPM whose values are digits
MOST_PLAIN_COMMENTS = 4_096
MOST_ENCODED_BYTES = 1 << 24  # of a GIF, in addition to four for each pixel: it can go on without pixels for gigabytes

MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker among a JPEG's pixels: no stuffed byte, and no restart
BARE = {*range(0xC0), 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}  # markers that Pillow takes to have no length
EXIF, FIRST_MARKER, FRAME_OF_LS = 0xE1, 0xC0, 0xF7
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}  # frames of several scans
BITMAP_HEADER = 40  # bytes; older headers have 12, and edges of two bytes
TIFF_TILE_EDGES, TIFF_SHORT, TIFF_BYTES, TIFF_PRIVATE = (322, 323), 3, (1, 2, 6, 7), 32768
HEADER_PIECES = (1 << 16, MOST_HEADER_BYTES)  # bytes that are read of a JPEG: most headers end within the first
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


if TYPE_CHECKING:
    Readable = io.BufferedIOBase
else:
    Readable = object  # each subclass also inherits the class of a real file


class Counted(Readable):
    """A file that counts its reads. It raises UnreadableError at the first read beyond a limit."""

    reads = 0
    bytes_left = 1 << 62  # bytes that may be read in pieces

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.BufferedIOBase."""
        content: bytes = super().read(size)
        self.reads += 1
        if size is not None and size >= 0:  # else the whole file is asked for, which happens once
            self.bytes_left -= len(content)
        if self.reads > MOST_READS or self.bytes_left < 0:
            self.refuse_excess()
        return content

    def refuse_excess(self) -> None:
        """Raise UnreadableError if too much was read. Decoders written in C may drop the error that a read raised."""
        if self.reads > MOST_READS:
            raise _too_large(f"no picture after {MOST_READS:,} reads")
        if self.bytes_left < 0:
            raise _too_large("far more bytes than its pixels can need")


def _too_large(what: str) -> UnreadableError:
    return UnreadableError("too_large", what)


def affordable(file: IO[bytes], max_pixels: int, header_only: bool = False) -> IO[bytes]:
    """Return the file, at its beginning. Raises UnreadableError if it would cost more than a picture may.

    `header_only` says that only its header will be read.
    """
    file.seek(0)
    start = file.read(16)
    if start.startswith(b"\xff\xd8"):
        _refuse_costly_jpeg(file, header_only)
    elif start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        _refuse_costly_tiff(file, max_pixels)
    elif start.startswith(b"\xff\x0a") or start[4:8] == b"JXL ":
        header = header_of_jxl(file)
        _refuse_large(header and header[:2], max_pixels)
    elif start.startswith(b"\0\0\1\0"):
        _refuse_large(_size_of_icon(file), max_pixels)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        _refuse_many_chunks(file)
    elif start[:1] == b"P" and start[1:2] in b"123456":
        _refuse_costly_netpbm(file, header_only)
    file.seek(0)
    return file


def _refuse_large(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is not None and size[0] * size[1] > max_pixels:
        raise too_many_pixels(*size, max_pixels)


def too_many_pixels(width: int, height: int, max_pixels: int) -> UnreadableError:
    """Return the error for a picture of this size."""
    return UnreadableError("too_many_pixels", f"{width}x{height}, the limit is {max_pixels:,} pixels (--max-pixels)")


def bound_pixels(file: IO[bytes], size: tuple[int, int], format_name: str | None) -> None:
    """Make the file raise UnreadableError once its pixels take far more bytes than they can need."""
    if format_name == "GIF" and isinstance(file, Counted):
        file.bytes_left = MOST_ENCODED_BYTES + 4 * size[0] * size[1]


def _refuse_costly_jpeg(file: IO[bytes], header_only: bool) -> None:
    """Check the segments before the pixels, and the scans if there are several."""
    for most in HEADER_PIECES:
        file.seek(0)
        content = file.read(most)
        if _walk_segments(file, content, header_only):
            return
        if len(content) < most:
            return  # the file is cut short, and its decoder will say so
    raise _too_large(f"no pixels in the first {MOST_HEADER_BYTES:,} bytes")


def _walk_segments(file: IO[bytes], content: bytes, header_only: bool) -> bool:
    """Check the segments in Pillow's order. Returns whether `content` reaches the pixels, or damage."""
    exif_segments, pixels, components, several = 0, 0, b"", False
    for count, (code, body, end) in enumerate(_segments(content)):
        if code < FIRST_MARKER:
            return True  # the file is damaged, and Pillow says so
        if code in FRAMES:
            height, width = struct.unpack(">HH", content[body + 1 : body + 5].ljust(4, b"\0"))
            pixels, components, several = height * width, content[body + 5 : body + 6], code in PROGRESSIVE
        elif code == SOS:
            if not header_only and (several or components != content[body : body + 1]):
                _refuse_many_scans(file, end, pixels)
            return True
        exif_segments += code == EXIF and content.startswith(b"Exif\0\0", body)
        if count >= MOST_SEGMENTS or exif_segments > MOST_EXIF_SEGMENTS:
            raise _too_large(f"more than {count:,} segments before the pixels")
    return False


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, begin of the content, end of the content) of each segment of a JPEG.

    Raises UnreadableError if far too many bytes belong to no segment.
    """
    place, skipped = 2, 0
    while True:
        found = content.find(b"\xff", place)
        skipped += (found if found >= 0 else max(place, len(content))) - place
        if skipped > MOST_SKIPPED:
            raise _too_large(f"no picture in {MOST_SKIPPED:,} bytes")
        if found < 0 or found + 4 > len(content):
            return
        code = content[found + 1]
        if code in (0x00, 0xFF):
            place, skipped = found + 1, skipped + 1
            continue
        place = found + 2
        if code not in BARE:
            place += int.from_bytes(content[place : place + 2], "big")
        yield code, found + 4, place


def frame_of_jpeg(file: IO[bytes]) -> tuple[int, int] | None:
    """Return (marker, bits of a value) of the frame of a JPEG or JPEG-LS; None if there is no frame near the beginning.

    Raises UnreadableError if far too many bytes belong to no segment.
    """
    file.seek(0)
    content = file.read(HEADER_PIECES[0])
    frames = (
        (code, content[body : body + 1]) for code, body, _ in _segments(content) if code in (*FRAMES, FRAME_OF_LS)
    )
    return next(((code, bits[0]) for code, bits in frames if bits), None)


def _refuse_many_scans(file: IO[bytes], place: int, pixels: int) -> None:
    """Count the scans of a JPEG, from the end of the first scan's header to the end of the picture."""
    scans, markers, at = 1, 0, 0
    file.seek(place)
    piece = file.read(MOST_HEADER_BYTES)
    while True:
        found = MARKER.search(piece, at)
        is_last = len(piece) < MOST_HEADER_BYTES
        if found is None or (found.end() + 2 > len(piece) and not is_last):
            if is_last:
                return
            place += len(piece) - 1 if found is None else found.start()
            at = 0
            file.seek(place)
            piece = file.read(MOST_HEADER_BYTES)
            continue
        code, at = piece[found.end() - 1], found.end()
        if code == EOI:
            return
        markers += 1
        scans += code == SOS
        if markers > MOST_SEGMENTS or (scans > MOST_SCANS and scans * pixels > MOST_SCANNED_PIXELS):
            raise _too_large(f"more than {scans - 1} scans of {pixels:,} pixels")
        if code not in BARE:
            at += int.from_bytes(piece[at : at + 2], "big")
        if at >= len(piece):
            place, at = place + at, 0
            file.seek(place)
            piece = file.read(MOST_HEADER_BYTES)


def _refuse_costly_tiff(file: IO[bytes], max_pixels: int) -> None:
    """Check the numbers of strips and tiles, and the size of a tile, of the first image."""
    file.seek(0)
    head = file.read(16)
    order, is_big = ("<" if head[:1] == b"I" else ">"), b"+" in head[2:4]
    offset, count, entry = ("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")
    try:
        file.seek(struct.unpack(order + offset, head[8:16] if is_big else head[4:8])[0])
        (number,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
        length = struct.calcsize(order + entry)
        entries = file.read(min(number, MOST_TILES) * length)
    except (struct.error, ValueError, OverflowError, OSError):
        return  # the file is damaged, and its decoder will say so
    tile = {}
    for tag, kind, values, value in struct.iter_unpack(order + entry, entries[: len(entries) // length * length]):
        if values > MOST_TILES and tag < TIFF_PRIVATE and kind not in TIFF_BYTES:  # Pillow makes an object of each
            raise _too_large(f"{values:,} values of the tag {tag}, the limit is {MOST_TILES:,}")
        if tag in TIFF_TILE_EDGES:
            short = kind == TIFF_SHORT and order == ">"  # it stands in the first half of its field
            tile[tag] = value >> (8 * struct.calcsize(offset) - 16) if short else value
    if len(tile) == len(TIFF_TILE_EDGES):
        width, height = (tile[tag] for tag in TIFF_TILE_EDGES)
        if width * height > max_pixels:
            raise _too_large(f"tiles of {width}x{height}, the limit is {max_pixels:,} pixels (--max-pixels)")


def _size_of_icon(file: IO[bytes]) -> tuple[int, int] | None:
    """Return (width, height) of the picture that Pillow unpacks from an icon: of the largest ones, the least deep.

    The directory of an icon cannot say edges above 256, so the size is read from the picture's own header.
    """
    file.seek(4)
    (number,) = struct.unpack("<H", file.read(2).ljust(2, b"\0"))
    directory = file.read(16 * number)
    entries = [*struct.iter_unpack("<BBBBHHII", directory[: len(directory) // 16 * 16])]
    if not entries:
        return None

    def order(entry: tuple[int, ...]) -> tuple[int, int]:
        width, height, colours, _, _, depth, *_ = entry
        return -(width or 256) * (height or 256), depth or (colours and (colours - 1).bit_length()) or 256

    file.seek(min(entries, key=order)[-1])
    start = file.read(24)
    if start.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", start[16:].ljust(8, b"\0"))
        return width, height
    length, width, height = struct.unpack("<Iii", start[:12].ljust(12, b"\0"))
    if length < BITMAP_HEADER:
        width, height = struct.unpack("<HH", start[4:8].ljust(4, b"\0"))
    return abs(width), abs(height) // 2  # the lower half is a mask


def header_of_jxl(file: IO[bytes]) -> tuple[int, int, int, int] | None:
    """Return (width, height, EXIF orientation, bits of a value) of a JPEG XL as stored; None if it is damaged.

    The plugin unpacks a JPEG XL before it says its size, and never says how it turned or reduced it. For a JPEG XL with
    a preview or frames, the bits are not read but given as 8.
    """
    place = _codestream_of_jxl(file)
    if place is None:
        return None
    file.seek(place + 2)
    bits = int.from_bytes(file.read(16), "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    is_small = take(1)

    def edge() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = edge(), take(3)
    if ratio:
        wide, high = JXL_RATIOS[ratio - 1]
        width = height * wide // high
    else:
        width = edge()
    has_defaults = take(1)
    orientation = 1
    if has_defaults:
        return width, height, orientation, 8
    if take(1):
        orientation = 1 + take(3)
        if take(3):  # another size, a preview, or frames
            return width, height, orientation, 8
    is_float, kind = take(1), take(2)
    return width, height, orientation, (32, 16, 24, 32)[kind] if is_float else (8, 10, 12, 1 + take(6))[kind]


def _codestream_of_jxl(file: IO[bytes]) -> int | None:
    """Return where the codestream of a JPEG XL begins, bare or in the first of its boxes, which are counted."""
    file.seek(0)
    if file.read(2) == b"\xff\x0a":
        return 0
    found, place = None, 0
    for _ in range(MOST_SEGMENTS):
        file.seek(place)
        head = file.read(16)
        kind, length, before = head[4:8], int.from_bytes(head[:4], "big"), 8
        if length == 1:
            length, before = int.from_bytes(head[8:], "big"), 16
        if found is None and kind in (b"jxlc", b"jxlp"):
            found = place + before + (4 if kind == b"jxlp" else 0)
        if length < before:  # length 0 means up to the end of the file
            return found
        place += length
    raise _too_large(f"more than {MOST_SEGMENTS:,} boxes")


def _refuse_many_chunks(file: IO[bytes]) -> None:
    place = 12
    for _ in range(MOST_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        place += 8 + (int.from_bytes(head[4:], "little") + 1) // 2 * 2
    raise _too_large(f"more than {MOST_CHUNKS:,} chunks")


def _refuse_costly_netpbm(file: IO[bytes], header_only: bool) -> None:
    """Read the size of a PBM, PGM or PPM. If its values are digits, count them, because Pillow reads them one by one.

    Pillow copies a megabyte for each comment between digits.
    """
    file.seek(0)
    start = file.read(MOST_NETPBM_HEADER)
    words = re.sub(rb"#[^\r\n]*", b" ", start).split(maxsplit=3)
    if len(words) < 4 and len(start) == MOST_NETPBM_HEADER:
        raise _too_large(f"no size in {MOST_NETPBM_HEADER:,} bytes")
    if words[0] not in (b"P1", b"P2", b"P3") or header_only:
        return
    with suppress(IndexError, ValueError):
        values = int(words[1][:11]) * int(words[2][:11]) * (3 if words[0] == b"P3" else 1)
        if values > MOST_PLAIN_VALUES:
            raise _too_large(f"{values:,} values in digits, the limit is {MOST_PLAIN_VALUES:,}")
    file.seek(0)
    comments = 0
    while piece := file.read(MOST_HEADER_BYTES):
        comments += piece.count(b"#")
        if comments > MOST_PLAIN_COMMENTS:
            raise _too_large(f"more than {MOST_PLAIN_COMMENTS:,} comments")
