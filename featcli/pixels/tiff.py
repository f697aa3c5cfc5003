"""Tell from the header whether Pillow reads a TIFF rightly, and unpack the kinds that it does not.

tifffile and imagecodecs, the extra `tiff`, unpack those kinds, even if Pillow would give pixels. So pixels do not
depend on what is installed. A kind that neither is known to read rightly is refused by name.
"""

from __future__ import annotations

import os
from functools import partial
from math import prod
from typing import IO

import numpy as np
from PIL import Image

from featcli.pixels.depth import high_bits, highest, reduced
from featcli.pixels.extras import refuse_without_tiff
from featcli.pixels.failure import UnreadableError
from featcli.pixels.image_file import MAX_BYTES
from featcli.pixels.internals import Deferred, mend_ycbcr
from featcli.pixels.tiff_header import (
    ASSOCIATED,
    BLACK_IS_ZERO,
    CIELAB,
    CMYK,
    COLOUR_MAP,
    COLOURS,
    COREL,
    EXCHANGING,
    FILL_ORDER,
    FLOAT,
    ICC_PROFILE,
    IMAGE_DEPTH,
    NOTHING,
    OLD_JPEG,
    OLD_SUBFILE,
    ORIENTATION,
    PALETTE,
    PREDICTOR,
    RAW,
    RGB,
    SIGNED,
    SUBFILE,
    TURNS,
    UNASSOCIATED,
    UNSIGNED,
    WHITE_IS_ZERO,
    YCBCR,
    Header,
)
from featcli.spec.groups import PixelSpec

UNREAD = {  # meanings of samples that are no picture, or that nothing here reads
    4: "a transparency mask",
    CIELAB: "CIELAB colours",
    9: "ICC LAB colours",
    10: "ITU LAB colours",
    32803: "the colour filter array of a camera",
    32844: "LogL values",
    32845: "LogLuv values",
    34892: "the linear values of a camera",
    51177: "a depth map",
}
COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34925, 50000)  # those of Pillow, in any build
CONFIRMED = (1, 5, 8, 32773, 32946, 34925, 50000)  # those for which other readers confirm what tifffile gives
UNREAD_COMPRESSIONS = {
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    **dict.fromkeys((22610, 34934), "JPEG XR"),
    **dict.fromkeys((50002, 52546), "JPEG XL"),
    **dict.fromkeys((32767, 34713, 65535), "a camera raw file's"),
    33007: "ALT-JPEG",
    50001: "WebP",
    34661: "JBIG",
    34676: "SGILog",
    34677: "SGILog24",
    34887: "LERC",
    34892: "lossy JPEG",
    34933: "PNG",
}
# Bits of a sample that Pillow reads rightly, by the meaning of the samples and of the extra ones.
PLAIN = {
    BLACK_IS_ZERO: (1, 2, 4, 8, 16),
    WHITE_IS_ZERO: (1, 2, 4, 8),
    PALETTE: (1, 2, 4, 8),
    RGB: (8, 16),
    CMYK: (8, 16),
    YCBCR: (8,),
}
WITH_EXTRA: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {
    **{(BLACK_IS_ZERO, (kind,)): (8,) for kind in (NOTHING, UNASSOCIATED)},
    **{(PALETTE, (kind,)): (8,) for kind in (NOTHING, UNASSOCIATED)},
    **{(RGB, (kind,)): (8, 16) for kind in (NOTHING, ASSOCIATED, UNASSOCIATED)},
    **{(RGB, (kind, *[NOTHING] * n)): (8,) for kind in (NOTHING, ASSOCIATED, UNASSOCIATED) for n in (1, 2)},
    **{(CMYK, (NOTHING,) * n): (8,) for n in (1, 2)},
    (RGB, (COREL,)): (8,),
}
REVERSED_UNREAD = ((PALETTE, 1), (PALETTE, 2), (PALETTE, 4), (WHITE_IS_ZERO, 8))  # if uncompressed, lowest bit first
CONVERT = "convert it to JPEG or PNG"
BACK = {**TURNS, 6: TURNS[8], 8: TURNS[6]}  # undoes each turn


def unpacked(file: IO[bytes], header: Header, rules: PixelSpec) -> Image.Image | None:
    """Return the picture, which tifffile unpacks when its pixels are asked for; None if Pillow reads it.

    Raises UnreadableError for kinds that are not read, and if tifffile or imagecodecs is missing.
    """
    refuse_preview(header)
    if header.compression == OLD_JPEG or not all(header.size):  # other tags of such files are often wrong or missing
        return None
    if header.photometric == CIELAB and _has_plain_colours(header):
        if rules.colour == "convert":
            return None
        what = f"{header.name} with CIELAB colours: --colour convert reads it, by its profile"
        raise UnreadableError("format_not_allowed", what)
    _refuse_meaning(header)
    refuse_depth(header, rules)
    if _is_for_pillow(header, rules):
        return None
    refuse_unconfirmed(header)
    refuse_without_tiff(f"{header.name} of {header.kind}")
    size = header.size if rules.orientation == "ignore" else header.upright_size
    picture = Deferred("TIFF", size, bool(header.following), partial(_unpack, file, header, rules))
    if profile := header.icc_profile(file):
        picture.info["icc_profile"] = profile
    return picture


def corrected(picture: Image.Image, header: Header, rules: PixelSpec) -> Image.Image:
    """Return the picture that Pillow opened, corrected if its size, turn or values differ from the file's."""
    if header.compression == OLD_JPEG or not all(header.size):
        return picture
    if (header.photometric, header.compression) == (YCBCR, RAW):
        mend_ycbcr(picture)
    turn = _turn(picture)
    is_put_back = turn is not None and rules.orientation == "ignore"
    size = header.size[::-1] if turn in EXCHANGING and not is_put_back else header.size
    colours = header.tags.get(COLOUR_MAP, ()) if header.photometric == PALETTE else ()
    has_8_bit_colours = bool(colours) and max(colours) < 256
    is_unsigned_32 = header.bits == 32 and header.sample_format == UNSIGNED
    if picture.size == size and not (is_put_back or has_8_bit_colours or is_unsigned_32):
        return picture

    def load() -> Image.Image:
        picture.load()
        found = picture
        if has_8_bit_colours:  # some writers put 8 bits into the 16-bit map, of which Pillow takes the upper 8
            found.putpalette(np.array(colours, np.uint8).reshape(3, -1).T.tobytes())
        if is_unsigned_32:  # Pillow has a mode only for signed ones
            found = Image.fromarray(np.asarray(found).view(np.uint32).astype(np.float32))
        return found.transpose(BACK[turn]) if is_put_back and turn is not None else found

    return Deferred("TIFF", size, bool(getattr(picture, "is_animated", False)), load)


def _turn(picture: Image.Image) -> int | None:
    """Return the orientation by which Pillow turns a TIFF as it unpacks it, whatever is asked; None if it does not."""
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:  # EXIF is damaged: Pillow fails by itself, or does without
        return None
    return orientation if isinstance(orientation, int) and orientation in TURNS else None


def refused(header: Header, what: str, advice: str = CONVERT) -> UnreadableError:
    """Return the error for a TIFF of a kind that is not read, with what to do about it."""
    return UnreadableError("format_not_allowed", f"{header.name} {what}: {advice}")


def refuse_preview(header: Header, advice: str = CONVERT) -> None:
    """Raise UnreadableError if the first image stands for another one."""
    is_reduced = bool(header.value(SUBFILE, 0) & 1) or header.value(OLD_SUBFILE, 0) == 2
    mains = [other for other in header.below if not other.value(SUBFILE, 0) & 1]
    larger = max((other.size for other in mains), key=prod, default=(0, 0))
    if prod(larger) > prod(header.size):
        raise refused(header, "whose first image is a preview of one of {}x{} pixels".format(*larger), advice)
    if header.is_canon_raw or (is_reduced and (header.below or header.following)):
        raise refused(header, "whose first image is a preview of another one", advice)


def _has_plain_colours(header: Header) -> bool:
    """Return whether CIELAB colours are of the kind that Pillow reads rightly, and come with their profile."""
    kind = (header.bits, header.samples, header.sample_format, header.value(FILL_ORDER, 1))
    is_plain = kind == (8, 3, UNSIGNED, 1) and not (header.extra or header.is_planar or header.is_big)
    is_simple = header.compression in CONFIRMED and header.value(PREDICTOR, 1) == 1
    return is_plain and is_simple and ICC_PROFILE in header.tags


def _refuse_meaning(header: Header) -> None:
    """Raise UnreadableError if the samples mean something that cannot be shown."""
    if header.photometric not in COLOURS:
        what = UNREAD.get(header.photometric, f"samples of an unknown meaning ({header.photometric})")
        raise refused(header, f"with {what}")
    if header.compression not in COMPRESSIONS:
        name = UNREAD_COMPRESSIONS.get(header.compression, "an unknown")
        raise refused(header, f"with {name} compression ({header.compression})")
    if not header.bits or not header.sample_format:
        raise UnreadableError("unsupported_depth", f"{header.name} with samples of different depths")
    extra, spare = header.extra, header.samples - header.colours
    is_unsaid = header.photometric == RGB and spare == 1 and not extra
    first, rest = extra[:1], extra[1:]
    kinds = (NOTHING, UNASSOCIATED, *[ASSOCIATED] * (header.photometric in (BLACK_IS_ZERO, RGB)), COREL)
    is_known = not any(rest) and all(kind in kinds for kind in first)
    most = 3 if header.photometric == RGB else 2 if header.photometric == CMYK else 1
    if not is_unsaid and (spare != len(extra) or not is_known or spare > most):
        raise refused(
            header, f"with {header.samples:,} values for each pixel, and it does not say what all of them mean"
        )
    if header.value(IMAGE_DEPTH, 1) > 1:
        raise refused(header, "with a volume")


def refuse_depth(header: Header, rules: PixelSpec) -> None:
    """Raise UnreadableError for samples whose black and white nobody knows."""
    if header.has_range:
        return
    if rules.black_and_white is None:
        raise UnreadableError(
            "unsupported_depth",
            f"{header.name} of {header.kind}: say which values are black and white, --depth-range",
        )
    if header.sample_format not in (UNSIGNED, SIGNED, FLOAT) or header.photometric not in (BLACK_IS_ZERO, RGB):
        raise UnreadableError("unsupported_depth", f"{header.name} of {header.kind}")


def _is_for_pillow(header: Header, rules: PixelSpec) -> bool:
    """Return whether Pillow reads this kind rightly. If not, whatever Pillow gives is not used."""
    bits, extra, photometric = header.bits, header.extra, header.photometric
    if header.is_big and header.order == ">":
        return False
    is_reversed = header.value(FILL_ORDER, 1) == 2
    if not header.has_range:
        kind = (header.sample_format, bits)
        is_known = kind in ((SIGNED, 16), (SIGNED, 32), (FLOAT, 32)) or (*kind, header.order) == (UNSIGNED, 32, "<")
        is_plain = header.samples == 1 and photometric == BLACK_IS_ZERO and not is_reversed
        is_native = header.order == "<" if header.compression != RAW else not header.is_planar
        return is_known and is_plain and is_native
    if header.samples - header.colours != len(extra) and header.is_planar:
        return False
    if header.is_planar and header.compression == RAW:  # Pillow reads one plane for each letter of its mode
        plain = ((BLACK_IS_ZERO, ()), (PALETTE, ()), (RGB, ()), (RGB, (UNASSOCIATED,)), (CMYK, ()))
        return bits == 8 and (photometric, extra) in plain and not is_reversed
    means_nothing = not any(extra)
    if header.is_planar and extra and (bits == 16 if means_nothing else len(extra) > 1 or photometric != RGB):
        return False  # Pillow 12.0 takes 16-bit planes without meaning for damage
    if header.is_planar and means_nothing:
        extra = ()  # Pillow skips such planes
    if bits == 16 and header.samples > 1 and rules.black_and_white is not None:
        return False  # Pillow reduces them to 8 bits before the range can be applied
    is_known = bits in (WITH_EXTRA.get((photometric, extra), ()) if extra else PLAIN[photometric])
    if is_reversed and (bits == 16 or header.samples > 1):
        return False
    if is_reversed and header.compression == RAW and (photometric, bits) in REVERSED_UNREAD:
        return False
    return is_known


def refuse_unconfirmed(header: Header, advice: str = CONVERT) -> None:
    """Raise UnreadableError for a kind that only tifffile reads, so that no other reader confirms its pixels."""
    if header.compression not in CONFIRMED or header.photometric == YCBCR:
        raise refused(header, f"of {header.kind}, compression {header.compression}", advice)
    if header.photometric == CMYK and header.alpha:
        raise refused(header, f"of {header.kind}", advice)
    predictor = header.value(PREDICTOR, 1)
    is_float = header.sample_format == FLOAT
    fits = {1: True, 2: not is_float and header.bits in (8, 16, 32, 64), 3: is_float}
    if not fits.get(predictor, False) or (predictor != 1 and header.compression == RAW):
        raise refused(header, f"of {header.kind}, predictor {predictor}", advice)


def _unpack(file: IO[bytes], header: Header, rules: PixelSpec) -> Image.Image:
    """Return the picture in 8 bits, upright if the rules say so."""
    samples = samples_of(file, header)
    shown, alpha = samples[..., : header.colours], samples[..., header.colours : header.colours + 1]
    if header.photometric == PALETTE:
        shown = _coloured(shown[..., 0].astype(np.uint8), header)
    else:
        shown = eight_bits(shown, header, rules.black_and_white, header.photometric == WHITE_IS_ZERO)
    if header.alpha:
        alpha = eight_bits(alpha, header, None if header.has_range else rules.black_and_white)
        whole = np.concatenate([shown] * (3 // shown.shape[2]) + [alpha], axis=2)
        mode = "RGBa" if header.alpha == ASSOCIATED else "RGBA"
        picture = Image.frombytes("RGBA", whole.shape[1::-1], whole.tobytes(), "raw", mode)
    else:
        mode = {1: "L", 3: "RGB", 4: "CMYK"}[shown.shape[2]]
        picture = Image.frombytes(mode, shown.shape[1::-1], shown.tobytes())
    turn = TURNS.get(header.orientation)
    return picture if turn is None or rules.orientation == "ignore" else picture.transpose(turn)


def eight_bits(
    values: np.ndarray, header: Header, asked: tuple[float, float] | None, is_inverted: bool = False
) -> np.ndarray:
    """Reduce samples to 8 bits. `asked` are the values of black and white, or None for the whole range."""
    if header.bits == 16 and header.photometric in (RGB, CMYK) and asked is None:
        return high_bits(values)  # so Pillow reads the same picture with the samples of a pixel side by side
    if asked is None or (header.has_range and header.bits <= 8):
        asked = (0.0, highest(header.bits))
    return reduced(values, *(asked[::-1] if is_inverted else asked))


def _coloured(indices: np.ndarray, header: Header) -> np.ndarray:
    """Return (H, W, 3) of 8 bits, looked up in the palette."""
    colours = np.array(header.tags.get(COLOUR_MAP, ()), np.uint16)
    if len(colours) != 3 * 2**header.bits:
        raise UnreadableError("decode_error", f"{header.name} with a palette of {len(colours):,} values")
    table = (colours if colours.max() < 256 else colours >> 8).astype(np.uint8).reshape(3, -1).T
    shown: np.ndarray = table[indices]
    return shown


def samples_of(file: IO[bytes], header: Header) -> np.ndarray:
    """Return (H, W, samples of a pixel) as stored. Raises UnreadableError if the file does not hold them all."""
    import tifffile

    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        found = (page.imagewidth, page.imagelength, page.samplesperpixel, page.bitspersample)
        if found != (*header.size, header.samples, header.bits) or page.dtype is None or page.imagedepth != 1:
            raise UnreadableError("decode_error", f"{header.name} whose tags contradict each other")
        size = prod(page.shaped) * page.dtype.itemsize
        if size > MAX_BYTES:
            raise UnreadableError("too_large", f"{size:,} bytes once unpacked, the limit is {MAX_BYTES:,}")
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if len(places) < prod(page.chunked) or any(not held or place + held > end for place, held in places):
            raise UnreadableError("truncated", f"{header.name}: strips or tiles are missing")
        out = np.empty(page.shaped, page.dtype.newbyteorder("="))  # (planes, depth, H, W, samples of a pixel)
        for part, (plane, _, top, left, _), _ in page.segments(maxworkers=1, sort=True):
            room = out[plane, 0, top : top + part.shape[1], left : left + part.shape[2]]
            room[...] = part[0, : room.shape[0], : room.shape[1]]
    return out[0, 0] if len(out) == 1 else np.moveaxis(out[:, 0, :, :, 0], 0, -1)
