"""Unpack PNGs without invented pixels, and without chunks that hold none: a broken or endless text costs no picture."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from typing import IO

from PIL import Image

from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import file_of, marked, still_marked

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # a wrong checksum of one of these is damage
BESIDE = (b"acTL", b"fcTL", b"eXIf", b"gAMA", b"cHRM", b"sRGB", b"cICP")
EXIF_TEXT, XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"  # texts that say how a picture is turned
DEPTH_AT = len(SIGNATURE) + 16  # place of the bits of a value, which the kind of values follows
GREY = 0
MOST_UNPACKED = 1 << 24  # bytes of a profile or text after unpacking
PILLOWS_LIMIT = 1 << 20  # bytes of a profile after unpacking
BROKEN_PROFILE = b"it is damaged"  # in place of a profile that is there but cannot be read
PATTERNS = (bytes.fromhex("a53c961fe2074b"), bytes.fromhex("5ac369e01df8b4"))  # they differ in every bit


def load(picture: Image.Image) -> None:
    """Unpack a PNG as `picture.load()` does. Raises UnreadableError if its data end properly, but too early."""
    file = file_of(picture)
    if file is None or not _stays_marked(picture, PATTERNS[0]):
        return
    file.seek(0)
    with Image.open(file, formats=("PNG",)) as again:  # it is cut short, or its last row happens to be the pattern
        if _stays_marked(again, PATTERNS[1]):
            raise UnreadableError("truncated", "its data end before its pixels do")


def mend_transparency(picture: Image.Image, is_seen: bool) -> None:
    """Convert the value that a PNG calls transparent into the 8 bits in which Pillow gives pixels.

    Pillow spreads greys of 2 and 4 bits over 8, and keeps the upper half of 16-bit colours, but leaves that value
    alone. Raises UnreadableError for such colours if the transparency `is_seen`, because different colours become equal
    in 8 bits.
    """
    value, file = picture.info.get("transparency"), file_of(picture)
    if value is None or file is None:
        return
    place = file.tell()
    file.seek(DEPTH_AT)
    bits, kind = file.read(2)
    file.seek(place)
    if bits in (2, 4) and kind == GREY:
        most = 2**bits - 1
        picture.info["transparency"] = (value & most) * 255 // most
    elif bits == 16 and kind != GREY:
        if is_seen:
            raise UnreadableError("unsupported_depth", "PNG of 16-bit colours, one of them transparent: --alpha drop")
        picture.info["transparency"] = tuple(one >> 8 for one in value)


def _stays_marked(picture: Image.Image, pattern: bytes) -> bool:
    """Return whether the row that is unpacked last still holds the mark that was written before."""
    height = picture.height
    is_odd_last = bool(picture.info.get("interlace")) and height % 2 == 1 and height > 1  # odd rows come last
    row = height - 1 - is_odd_last
    mark = marked(picture, row, pattern)
    picture.load()
    return still_marked(picture, row, mark)


def says_more(picture: Image.Image) -> bool:
    """Return whether a PNG has metadata after its pixels. If not, all is known without unpacking them."""
    file = file_of(picture)
    if file is None:
        return True
    place, is_late = file.tell(), False
    try:
        for kind, _, _ in _chunks(file):
            if kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and is_late:
                return True
            is_late |= kind == b"IDAT"
        return False
    finally:
        file.seek(place)


def essential(file: IO[bytes]) -> tuple[IO[bytes], bytes | None] | None:
    """Return a PNG without chunks that hold no pixels and that Pillow may refuse, and its colour profile if it has one.

    Chunks that say how the picture is turned stay if they are whole. A profile that cannot be read becomes
    BROKEN_PROFILE. Returns None for a file that is no PNG, or has no such chunk.
    """
    file.seek(0)
    if file.read(8) != SIGNATURE:
        return None
    pieces: list[tuple[int, int] | bytes] = [SIGNATURE]
    profile, is_less = None, False
    for kind, place, length in _chunks(file):
        if kind in PIXELS or (kind in BESIDE and _is_right(file, kind, place, length)):
            pieces.append((place - 8, length + 12))
            continue
        is_less = True
        if kind == b"iCCP":
            is_right = _is_right(file, kind, place, length)
            unpacked = _unpacked(_content(file, place, length).partition(b"\0")[2][1:]) if is_right else None
            profile = unpacked or BROKEN_PROFILE
            if unpacked and len(unpacked) < PILLOWS_LIMIT:
                pieces.append((place - 8, length + 12))
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and (text := _turning_text(kind, _content(file, place, length))):
            pieces.append(text)
    return (io.BufferedReader(_Pieces(file, pieces)), profile) if is_less else None


def _chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, place, length) of the content of each chunk, up to the end or up to bytes that are no chunk."""
    place = len(SIGNATURE)
    while True:
        file.seek(place)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or not kind.isalpha():
            return
        yield kind, place + 8, length
        if kind == b"IEND":
            return
        place += 12 + length


def _content(file: IO[bytes], place: int, length: int) -> bytes:
    """Return what a chunk holds, or b"" for one that is larger than any chunk here may be."""
    file.seek(place)
    return file.read(length) if length <= MOST_UNPACKED else b""


def _is_right(file: IO[bytes], kind: bytes, place: int, length: int) -> bool:
    content = _content(file, place, length)
    return len(content) == length and file.read(4) == zlib.crc32(kind + content).to_bytes(4, "big")


def _unpacked(packed: bytes) -> bytes | None:
    """Return the unpacked bytes, or None if they are damaged or larger than they may be."""
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(packed, MOST_UNPACKED)
    except zlib.error:
        return None
    return content if unpacking.eof else None


def _turning_text(kind: bytes, content: bytes) -> bytes | None:
    """Return the chunk of a text that says how the picture is turned, in a form that Pillow takes whatever its size."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in (EXIF_TEXT, XMP):
        return None
    if kind == b"iTXt":
        is_packed, rest = rest[:1] == b"\1", rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    else:
        is_packed, rest = kind == b"zTXt", rest[kind == b"zTXt" :]
    text = _unpacked(rest) if is_packed else rest
    if keyword == XMP and (found := re.search(rb'tiff:Orientation(?:="|>)[0-9]', text or b"")):
        return _chunk(b"iTXt", XMP + b"\0\0\0\0\0" + found[0])
    return _chunk(b"tEXt", keyword + b"\0" + text) if text and keyword == EXIF_TEXT else None


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


class _Pieces(io.RawIOBase):
    """A file made of pieces, one after another: each is a (place, length) of another file, or bytes."""

    def __init__(self, file: IO[bytes], pieces: list[tuple[int, int] | bytes]) -> None:
        self._file, self._pieces, self._at = file, pieces, 0
        self._lengths = [len(piece) if isinstance(piece, bytes) else piece[1] for piece in pieces]

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """See io.RawIOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._lengths)}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        begin = 0
        for piece, length in zip(self._pieces, self._lengths, strict=True):
            inside = self._at - begin
            if inside < length:
                if isinstance(piece, bytes):
                    content = piece[inside : inside + len(buffer)]
                else:
                    self._file.seek(piece[0] + inside)
                    content = self._file.read(min(len(buffer), length - inside))
                buffer[: len(content)] = content
                self._at += len(content)
                return len(content)
            begin += length
        return 0
