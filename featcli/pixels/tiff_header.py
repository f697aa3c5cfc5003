"""Read what the header of a TIFF says about its first image, so that decisions are the same with every Pillow."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from PIL.Image import Transpose

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
MEANINGS = {WHITE_IS_ZERO: "grey", BLACK_IS_ZERO: "grey", RGB: "RGB", PALETTE: "palette", CMYK: "CMYK", YCBCR: "YCbCr"}
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}  # without extra samples
UNSIGNED, SIGNED, FLOAT, UNDEFINED = 1, 2, 3, 4
# What an extra sample means. If transparency is associated, the colours are multiplied by it.
NOTHING, ASSOCIATED, UNASSOCIATED, COREL = 0, 1, 2, 999
RAW, OLD_JPEG = 1, 6  # numbers of compressions
UPRIGHT = 1
TURNS = {  # the turn that makes a picture upright, by its orientation in TIFF and EXIF
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
EXCHANGING = (5, 6, 7, 8)  # orientations that exchange height and width

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 254, 255, 256, 257, 258, 259, 262, 266
ORIENTATION, SAMPLES, PLANAR, PREDICTOR, COLOUR_MAP, SUB_IMAGES, EXTRA, FORMAT = 274, 277, 284, 317, 320, 330, 338, 339
SUBSAMPLING, XMP, IMAGE_DEPTH, DNG_VERSION = 530, 700, 32997, 50706
ICC_PROFILE = 34675
WANTED = frozenset((
    *(SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES, PLANAR),
    *(PREDICTOR, COLOUR_MAP, SUB_IMAGES, EXTRA, FORMAT, SUBSAMPLING, XMP, IMAGE_DEPTH, DNG_VERSION, ICC_PROFILE),
))  # fmt: skip
CODES = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}  # whole numbers
MOST_VALUES = 3 * 2**16  # values of one tag that are read: those of the largest palette
MOST_ENTRIES = 2**16
MOST_PROFILE_BYTES = 2**23
MOST_IMAGES = 16  # images below the first one that are looked at


@dataclass(frozen=True)
class Header:
    """What an image of a TIFF says about itself."""

    order: str  # of bytes, "<" or ">"
    is_big: bool
    tags: Mapping[int, tuple[int, ...]]
    following: int = 0  # place of the next image's directory; 0 if there is none
    below: tuple[Header, ...] = ()  # the images that belong to this one, as far as they can be followed
    is_canon_raw: bool = False

    def value(self, tag: int, default: int) -> int:
        """Return the first value of a tag, or the default."""
        return next(iter(self.tags.get(tag, ())), default)

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) as stored."""
        return self.value(WIDTH, 0), self.value(HEIGHT, 0)

    @property
    def upright_size(self) -> tuple[int, int]:
        """The (width, height) once the picture is upright."""
        return self.size[::-1] if self.orientation in EXCHANGING else self.size

    @property
    def compression(self) -> int:
        """The number of the compression."""
        return self.value(COMPRESSION, RAW)

    @property
    def photometric(self) -> int:
        """The number that says what samples mean. If it is absent, zero is white, as in Pillow."""
        return self.value(PHOTOMETRIC, WHITE_IS_ZERO)

    @property
    def samples(self) -> int:
        """The number of samples of a pixel."""
        return self.value(SAMPLES, 1)

    @property
    def colours(self) -> int:
        """The number of samples of a pixel that are not extra."""
        return 1 if (self.photometric, self.samples) == (YCBCR, 1) else COLOURS[self.photometric]

    @property
    def extra(self) -> tuple[int, ...]:
        """The meanings of the samples after the colours, as far as the file says them."""
        return self.tags.get(EXTRA, ())

    @property
    def alpha(self) -> int:
        """ASSOCIATED, UNASSOCIATED, or NOTHING if no sample is transparency."""
        if not self.extra and self.samples > self.colours:
            return UNASSOCIATED  # Pillow takes a fourth sample of RGB so if nothing says what it is
        first = next(iter(self.extra), NOTHING)
        return UNASSOCIATED if first == COREL else first

    @property
    def bits(self) -> int:
        """The bits of each sample; 0 if samples differ."""
        found = set(self.tags.get(BITS, (1,))[: max(1, self.samples)])
        return found.pop() if len(found) == 1 else 0

    @property
    def sample_format(self) -> int:
        """The format of each sample; 0 if samples differ."""
        found = set(self.tags.get(FORMAT, (UNSIGNED,))[: max(1, self.samples)])
        return found.pop() if len(found) == 1 else 0

    @property
    def has_range(self) -> bool:
        """Whether the values of black and white are known."""
        return self.sample_format in (UNSIGNED, UNDEFINED) and self.bits <= 16

    @property
    def is_planar(self) -> bool:
        """Whether each sample has a plane of its own."""
        return self.value(PLANAR, 1) == 2

    @property
    def orientation(self) -> int:
        """The orientation as in EXIF. If no tag says it, the XMP does, as in Pillow."""
        if ORIENTATION in self.tags:
            return self.value(ORIENTATION, UPRIGHT)
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', bytes(self.tags.get(XMP, ())))
        return int(found[1]) if found else UPRIGHT

    def icc_profile(self, file: IO[bytes]) -> bytes:
        """Return the colour profile, read from the file; b"" if there is none."""
        place, length = self.tags.get(ICC_PROFILE, (0, 0))
        file.seek(place)
        return file.read(min(length, MOST_PROFILE_BYTES))

    @property
    def name(self) -> str:
        """The name of the format, for people."""
        if DNG_VERSION in self.tags:
            return "DNG, a camera raw file,"
        return "CR2, a camera raw file," if self.is_canon_raw else "TIFF"

    @property
    def kind(self) -> str:
        """All that decides how the picture is read, for people."""
        formats = {SIGNED: "signed ", FLOAT: "floating-point "}
        return " ".join([
            f"{self.bits}-bit {formats.get(self.sample_format, '')}{MEANINGS[self.photometric]}",
            *["where zero is white"] * (self.photometric == WHITE_IS_ZERO),
            *["with transparency"] * bool(self.alpha),
            *["in planes"] * self.is_planar,
            *["in a big-endian BigTIFF"] * (self.is_big and self.order == ">"),
        ])  # fmt: skip


def header_of(file: IO[bytes]) -> Header | None:
    """Return what the first image says about itself; None if the file is no TIFF, or its header cannot be followed."""
    file.seek(0)
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None or len(start) < 16:
        return None
    is_big = start[2:4] == struct.pack(order + "H", 43)
    if not is_big and start[2:4] != struct.pack(order + "H", 42):
        return None
    try:
        (place,) = struct.unpack_from(order + "Q", start, 8) if is_big else struct.unpack_from(order + "I", start, 4)
        tags, following = _directory(file, place, order, is_big)
    except (struct.error, OverflowError, ValueError, OSError):
        return None
    below = []
    for place in tags.get(SUB_IMAGES, ())[:MOST_IMAGES]:
        try:
            below.append(Header(order, is_big, *_directory(file, place, order, is_big)))
        except (struct.error, OverflowError, ValueError, OSError):
            continue
    return Header(order, is_big, tags, following, tuple(below), is_canon_raw=start[8:10] == b"CR" and not is_big)


def _directory(file: IO[bytes], place: int, order: str, is_big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return the wanted tags of the directory at a place in the file, and the place of the next directory."""
    offset, length = struct.Struct(order + ("Q" if is_big else "I")), struct.Struct(order + ("Q" if is_big else "H"))
    entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
    file.seek(place)
    (entries,) = length.unpack(file.read(length.size))
    if entries > MOST_ENTRIES:
        raise ValueError(f"{entries} entries")
    content = file.read(entries * entry.size)
    following = file.read(offset.size)
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, count, value in entry.iter_unpack(content):
        if tag == ICC_PROFILE:  # the values are its place and its length
            tags[tag] = (*offset.unpack(value), count)
        if tag not in WANTED or tag in tags or kind not in CODES or not 0 < count <= MOST_VALUES:
            continue
        codes = struct.Struct(f"{order}{count}{CODES[kind]}")
        if codes.size > offset.size:
            file.seek(*offset.unpack(value))
            value = file.read(codes.size)
        tags[tag] = codes.unpack(value[: codes.size])
    return tags, offset.unpack(following)[0] if len(following) == offset.size else 0
