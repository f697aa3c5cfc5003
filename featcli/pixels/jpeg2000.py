"""Tell from the header whether Pillow reads a JPEG 2000 rightly, and unpack the kinds that it does not.

Pillow shifts values to 8 bits: deeper white overflows to black, and white of fewer bits becomes grey. It does not read
tiles with a part more than they declare, as some writers leave them. imagecodecs, a part of the extra `tiff`, unpacks
those kinds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
from PIL import Image

from featcli.pixels.depth import high_bits, highest, reduced
from featcli.pixels.extras import refuse_without_tiff
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import Deferred
from featcli.spec.groups import PixelSpec

SIGNATURE, CODESTREAM, PART = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\xff\x90"
MOST_PARTS = 2**12  # parts of tiles that are looked at
MOST_BOXES = 64
MOST_COMPONENTS = 16
CMYK, CIELAB = 12, 14  # numbers of colour spaces
SPACES = {CMYK: "CMYK", CIELAB: "CIELAB", 18: "YCbCr", 24: "YCbCr"}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Header:
    """What a JPEG 2000 file says about its pixels."""

    size: tuple[int, int]  # (width, height)
    depths: tuple[int, ...]  # bits of each component
    is_signed: bool
    is_subsampled: bool
    space: int = 0  # number of the colour space; 0 if it is not given by number
    has_palette: bool = False
    is_bare: bool = False  # whether it is a codestream without boxes around it
    has_more_parts: bool = False  # whether a tile has more parts than it declares

    @property
    def name(self) -> str:
        """The kind of the picture, for people."""
        kinds = {1: "grey", 2: "grey with transparency", 3: "RGB", 4: "RGB with transparency"}
        named = SPACES.get(self.space) or kinds.get(len(self.depths), f"{len(self.depths)} components")
        depths = "/".join(map(str, dict.fromkeys(self.depths)))
        return f"JPEG 2000 of {depths}-bit {named}{', subsampled' if self.is_subsampled else ''}"


def header_of(file: IO[bytes]) -> Header | None:
    """Return what the file says about its pixels; None if it is no JPEG 2000, or its header cannot be followed."""
    file.seek(0)
    start = file.read(12)
    try:
        if start.startswith(CODESTREAM):
            return _codestream(file, 0, True)
        return _boxes(file) if start == SIGNATURE else None
    except (struct.error, OverflowError, ValueError, OSError):
        return None


def _boxes(file: IO[bytes]) -> Header | None:
    """Read the boxes of a file, and those inside its header box."""
    place, space, has_palette = len(SIGNATURE), 0, False
    for _ in range(MOST_BOXES):
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            head = 16
        if kind == b"jp2c":
            return _codestream(file, place + head, False, space, has_palette)
        if kind == b"colr" and not space:
            method, _, _, number = struct.unpack(">BBBI", file.read(7))
            space = number if method == 1 else 0
        has_palette |= kind == b"pclr"
        if 0 < length < head:
            raise ValueError("a box that is shorter than its own head")
        if length == 0:
            return None
        place += head if kind == b"jp2h" else length
    return None


def _codestream(file: IO[bytes], place: int, is_bare: bool, space: int = 0, has_palette: bool = False) -> Header:
    file.seek(place + len(CODESTREAM))
    _, _, right, bottom, left, top, *_, count = struct.unpack(">HHIIIIIIIIH", file.read(38))
    if not 0 < count <= MOST_COMPONENTS:
        raise ValueError(f"{count} components")
    components = list(struct.iter_unpack("BBB", file.read(3 * count)))
    return Header(
        size=(right - left, bottom - top),
        depths=tuple((depth & 127) + 1 for depth, _, _ in components),
        is_signed=any(depth & 128 for depth, _, _ in components),
        is_subsampled=any((across, down) != (1, 1) for _, across, down in components),
        space=space,
        has_palette=has_palette,
        is_bare=is_bare,
        has_more_parts=_has_more_parts(file),
    )


def _has_more_parts(file: IO[bytes]) -> bool:
    """Return whether a tile has more parts than it declares, reading on from the end of the size segment."""
    place = file.tell()
    for _ in range(MOST_BOXES + MOST_PARTS):
        file.seek(place)
        head = file.read(12)
        if len(head) < 12:
            return False
        marker, length, _, part_length, part, parts = struct.unpack(">2sHHIBB", head)
        if marker != PART:
            if marker[0] != 0xFF or length < 2:  # the end, or damage
                return False
            place += 2 + length
        elif part_length < 12:  # the last part may leave out its length and reach to the end
            return False
        elif 0 < parts <= part:
            return True
        else:
            place += part_length
    return False


def unpacked(file: IO[bytes], rules: PixelSpec) -> Image.Image | None:
    """Return the picture, which imagecodecs unpacks when its pixels are asked for; None if Pillow reads it.

    Raises UnreadableError for kinds that are not read, and if imagecodecs is missing.
    """
    header = header_of(file)
    if header is None or _is_for_pillow(header, rules):
        return None
    refused = UnreadableError("format_not_allowed", f"{header.name}: convert it to JPEG or PNG")
    if len(header.depths) not in MODES or header.space in SPACES or header.has_palette or header.is_subsampled:
        raise refused
    if len(set(header.depths)) > 1 or header.depths[0] > 16:
        raise UnreadableError("unsupported_depth", header.name)
    refuse_without_tiff(header.name)
    picture = Deferred("JPEG2000", header.size, False, partial(_unpack, file, header, rules))
    picture.info["bit_depth"] = header.depths[0]
    return picture


def _is_for_pillow(header: Header, rules: PixelSpec) -> bool:
    """Return whether Pillow reads this kind rightly. If not, whatever Pillow gives is not used."""
    count, deepest = len(header.depths), max(header.depths)
    if count not in MODES or header.space == CIELAB:
        return False
    if count == 1 and deepest > 8:
        return deepest <= 16 and (deepest > 9 or header.is_bare)  # Pillow scales them to 16 bits; 9 bits in boxes to 8
    has_alpha = count in (2, 4) and header.space != CMYK
    seen = header.depths[:-1] if has_alpha and rules.alpha == "drop" else header.depths
    return header.has_palette or (set(seen) == {8} and not header.has_more_parts)


def _unpack(file: IO[bytes], header: Header, rules: PixelSpec) -> Image.Image:
    import imagecodecs

    file.seek(0)
    values = imagecodecs.jpeg2k_decode(file.read())
    width, height = header.size
    values = values.reshape(*values.shape[:2], -1)
    if values.shape != (height, width, len(header.depths)):
        raise UnreadableError("decode_error", f"{header.name} that holds {values.shape}")
    bits, count = header.depths[0], len(header.depths)
    if header.is_signed:
        values = (values.astype(np.int32) + 2 ** (bits - 1)).astype(np.uint16)
    shown = values if count in (1, 3) else values[..., :-1]
    if rules.black_and_white is None or bits <= 8:
        shown = _eight_bits(shown, bits, count > 2)
    else:  # 16 bits, as Pillow gives greys
        shown = reduced(shown << (16 - bits), *rules.black_and_white)
    if count in (2, 4):
        shown = np.concatenate([shown, _eight_bits(values[..., -1:], bits, count > 2)], axis=2)
    return Image.frombytes(MODES[count], header.size, shown.tobytes())


def _eight_bits(values: np.ndarray, bits: int, is_colour: bool) -> np.ndarray:
    """Reduce values to 8 bits as in TIFF and PNG: the upper bits of 16-bit colours, else linear from black to white."""
    return high_bits(values) if is_colour and bits == 16 else reduced(values, 0.0, highest(bits))
