"""Unpack JPEGs without invented pixels: each scan must hold what its header declares.

libjpeg invents what is missing as soon as it meets a marker in place of data, and Pillow is not told. If the data
merely stop, libjpeg waits for more. So it is given each scan without the marker that follows, and the marker only if
the scan was whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO

from PIL import Image

from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import decoder_of, file_of

FORMATS = ("JPEG", "MPO")  # an MPO is several JPEGs, and the first of them is the picture
BLOCK = 1 << 18  # bytes that are read at once
EOI, SOS, DHT, DRI = 0xD9, 0xDA, 0xC4, 0xDD
RESTARTS = bytes(range(0xD0, 0xD8))
WITHOUT_LENGTH = (0x01, 0xD8, EOI, *RESTARTS)
FRAMES = {*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC}  # markers of segments that say the size and the coding
BASELINE, EXTENDED, PROGRESSIVE, LOSSLESS = 0xC0, 0xC1, 0xC2, 0xC3
HUFFMAN = (BASELINE, EXTENDED, PROGRESSIVE, LOSSLESS)
MARKER = re.compile(rb"\xff[^\0\xff]")
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
OTHER_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")
COEFFICIENTS = 64
# libjpeg reads ahead: it asks for 57 bits if it needs one, so the last block waits for up to seven bytes more.
READ_AHEAD = 7
ONES = b"\xff\0"  # a byte of ones, which begin no code


def load(picture: Image.Image) -> None:
    """Unpack a JPEG as `picture.load()` does. Raises UnreadableError if its data end before its pixels do.

    A few codes of the last blocks may be missing unnoticed: at most a corner of 16x16 pixels.
    """
    file = file_of(picture)
    if file is None or len(getattr(picture, "tile", ())) != 1:
        picture.load()
        return
    file.seek(0)
    with decoder_of(picture) as decode:
        _Scans(file, decode).give()


@dataclass
class _Component:
    """One colour channel of the picture."""

    across: int  # blocks of it in a unit of all components
    down: int
    lacks: list[int] = field(default_factory=lambda: [COEFFICIENTS] * COEFFICIENTS)  # bits to come, by coefficient


def _components_of(frame: bytes) -> dict[int, _Component]:
    """Return the components that a frame's segment names."""
    return {
        frame[at]: _Component(frame[at + 1] >> 4 or 1, frame[at + 1] & 15 or 1) for at in range(10, len(frame) - 2, 3)
    }


def _begin_scan(header: bytes, frame: int, components: Mapping[int, _Component]) -> list[_Component]:
    """Return the components of a scan, and note which bits of them it holds."""
    found = [components[name] for name in header[5:-3:2] if name in components]
    first, last, low = (header[-3], header[-2], header[-1] & 15) if frame == PROGRESSIVE else (0, COEFFICIENTS - 1, 0)
    for component in found:
        component.lacks[first : last + 1] = [low] * (last + 1 - first)
    return found


def has_all_scans(content: memoryview) -> bool:
    """Return whether a JPEG has one frame in the usual codings, whose scans hold all of it by their headers.

    libjpeg does not mind if scans are missing; that data end early, it says itself. Raises IndexError for a header
    that is too short.
    """
    frame, at = 0, 2
    components: dict[int, _Component] = {}
    while found := OTHER_MARKER.search(content, at):
        marker, begin, at = content[found.end() - 1], found.start(), found.end()
        if marker == EOI:
            return bool(components) and not any(any(each.lacks) for each in components.values())
        if marker in WITHOUT_LENGTH:
            continue
        at += max(2, int.from_bytes(content[at : at + 2], "big"))
        if marker in FRAMES:
            if frame or marker not in (BASELINE, EXTENDED, PROGRESSIVE):
                return False
            frame, components = marker, _components_of(bytes(content[begin:at]))
        elif marker == SOS:
            of_scan = _begin_scan(bytes(content[begin:at]), frame, components)
            if frame in (BASELINE, EXTENDED) and len(of_scan) == len(components):
                return True
    return False


class _Scans:
    """Feeds a file to a decoder, scan by scan."""

    def __init__(self, file: IO[bytes], decode: Callable[[bytes], int]) -> None:
        self._file, self._decode = file, decode
        self._data, self._at = b"", 0  # bytes that were read, and where those begin that are still to be given
        self._untaken = b""  # bytes that were given, but not used yet
        self._is_done = False
        self._frame = 0
        self._size = (0, 0)
        self._components: dict[int, _Component] = {}
        self._interval = 0  # units between restart markers
        self._tables: list[bytes] = []  # segments of Huffman tables

    def give(self) -> None:
        """Give the whole file. Raises UnreadableError if a scan is incomplete or missing."""
        segments: list[bytes] = []
        while not self._is_done:
            marker, segment = self._segment()
            segments.append(segment)
            if marker in FRAMES:
                self._begin_frame(marker, segment)
            elif marker == DHT:
                self._tables.append(segment[4:])
            elif marker == DRI:
                self._interval = int.from_bytes(segment[4:6], "big")
            elif marker in (SOS, EOI):
                if marker == EOI and any(any(each.lacks) for each in self._components.values()):
                    raise _truncated("scans are missing")
                self._untaken += b"".join(segments)
                segments = []
                if marker == EOI:
                    self._give()
                    if not self._is_done:
                        raise _truncated("it ends before its pixels do")
                elif self._frame in HUFFMAN:
                    self._give_scan(segment)
                else:
                    self._give_rest()

    def _segment(self) -> tuple[int, bytes]:
        """Return the next marker with its segment. Bytes before it are skipped, as libjpeg does."""
        while not (found := MARKER.search(self._data, self._at)):
            self._at = max(self._at, len(self._data) - 1)  # the last byte may be the first of a marker
            self._read_on()
        self._at = found.start()
        marker, length = found[0][1], 2
        if marker not in WITHOUT_LENGTH:
            while len(self._data) < self._at + 4:
                self._read_on()
            length += max(2, (self._data[self._at + 2] << 8) + self._data[self._at + 3])
        while len(self._data) < self._at + length:
            self._read_on()
        begin, self._at = self._at, self._at + length
        return marker, self._data[begin : self._at]

    def _read_on(self) -> None:
        block = self._file.read(BLOCK)
        if not block:
            raise _truncated("it has no end")
        self._data = self._data[self._at :] + block
        self._at = 0

    def _begin_frame(self, marker: int, segment: bytes) -> None:
        self._frame = marker
        self._size = (int.from_bytes(segment[7:9], "big"), int.from_bytes(segment[5:7], "big"))
        self._components |= _components_of(segment)

    def _table(self, wanted: int) -> bytes | None:
        """Return the latest Huffman table of a number: how many codes there are of each length, then their symbols."""
        found = None
        for content in self._tables:
            while len(content) > 16:
                end = 17 + sum(content[1:17])
                found = content[1:end] if content[0] == wanted else found
                content = content[end:]
        return found

    def _give_scan(self, header: bytes) -> None:
        """Give the data of a scan, without the marker that follows."""
        components = _begin_scan(header, self._frame, self._components)
        is_only = self._frame != PROGRESSIVE and len(components) == len(self._components)
        restarts = self._give_data()
        if self._interval:
            due = (self._units(components) - 1) // self._interval
            if restarts[:due] != (RESTARTS * (due // 8 + 1))[:due]:
                raise _truncated("some of it is missing between two restart markers")
        fill = _fill(self._table(16 + (header[-4] & 15))) if is_only and not self._is_done else ONES
        if not (self._is_done or self._takes_no_more(is_only, fill)):
            raise _truncated("its data end before its pixels do")

    def _give_data(self) -> bytes:
        """Give the data up to the next marker that is no restart marker, and return the restart markers."""
        restarts = []
        markers = OTHER_MARKER if self._interval else MARKER
        while not self._is_done:
            found = markers.search(self._data, self._at)
            end = found.start() if found else len(self._data)
            data = self._data[self._at : end].rstrip(b"\xff")  # these may be the first byte of a marker
            if self._interval:
                restarts += [each[1:] for each in RESTART.findall(data)]
            self._give(data)
            self._at += len(data)
            if found:
                break
            if not self._is_done:
                self._at = max(self._at, len(self._data) - 1)
                self._read_on()
        return b"".join(restarts)

    def _takes_no_more(self, is_only: bool, fill: bytes) -> bool:
        """Return whether the decoder has finished a scan, judged by how many bytes it uses beyond the data."""
        if is_only:
            self._give(fill * READ_AHEAD)
            return self._is_done
        for _ in range(READ_AHEAD):
            self._give(fill)
            if self._is_done:
                return True
        for _ in range(2):  # if more scans may follow, it skips all bytes up to the next marker
            had_left = bool(self._untaken)
            self._give(fill)
            if not (had_left or self._untaken):
                return True
        return False

    def _units(self, components: list[_Component]) -> int:
        """Return how many units a scan of these components has. Restart intervals are counted in them."""
        units = 1
        for size, edge in zip(self._size, ("across", "down"), strict=True):
            coarsest = max(getattr(each, edge) for each in self._components.values())
            blocks = getattr(components[0], edge) if len(components) == 1 else 1
            units *= -(-size * blocks // ((1 if self._frame == LOSSLESS else 8) * coarsest))
        return units

    def _give_rest(self) -> None:
        """Give the rest of the file at once: in arithmetic coding libjpeg cannot wait, and an early end is allowed."""
        self._give(self._data[self._at :] + self._file.read())
        if not self._is_done:
            raise _truncated("it has no end")

    def _give(self, data: bytes = b"") -> None:
        """Let the decoder take from what it left before, and from these data."""
        self._untaken += data
        taken = self._decode(self._untaken)
        self._is_done = taken < 0
        self._untaken = self._untaken[taken:] if taken > 0 else self._untaken


def _fill(table: bytes | None) -> bytes:
    """Return a byte in which no block ends, wherever it is read from, so that missing blocks make themselves known."""
    place = table.find(b"\0", 16) - 16 if table else -1  # where the table has the symbol that ends a block
    code = 0
    for length, count in enumerate(table[:16] if table and place >= 0 else b"", 1):
        if place < count:
            code += place
            return b"\0" if code else b"\x55" if length > 1 else ONES
        place -= count
        code = (code + count) << 1
    return ONES


def _truncated(what: str) -> UnreadableError:
    return UnreadableError("truncated", what)
