"""Apply the orientation of HEIF and JPEG XL: their containers say it, not EXIF, and their plugins turn by it."""

from __future__ import annotations

from typing import IO

from PIL import Image

from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import Deferred, is_as_stored, transformations_of
from featcli.pixels.limits import header_of_jxl
from featcli.pixels.tiff_header import TURNS
from featcli.spec.groups import PixelSpec

Transpose = Image.Transpose
EXCHANGING = (Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270)
BACK = {Transpose.ROTATE_90: Transpose.ROTATE_270, Transpose.ROTATE_270: Transpose.ROTATE_90}  # others undo themselves
UNROTATED = {90: Transpose.ROTATE_270, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_90}
UNMIRRORED = {0: Transpose.FLIP_TOP_BOTTOM, 1: Transpose.FLIP_LEFT_RIGHT}


def oriented(picture: Image.Image, file: IO[bytes], rules: PixelSpec) -> Image.Image:
    """Return the picture as `rules.orientation` wants it, without an EXIF that would turn it again.

    Raises UnreadableError if a turn has to be undone, but pillow-heif is too old to say how it turned the picture.
    """
    is_ignored = rules.orientation == "ignore"
    turns: list[Transpose] = []
    if picture.format == "JXL":
        header = header_of_jxl(file)
        turn = TURNS.get(header[2]) if header else None
        picture.info |= {"is_turned": turn is not None, "bit_depth": header[3] if header else 8}
        if turn is not None and is_as_stored(picture) != is_ignored:
            turns = [BACK.get(turn, turn) if is_ignored else turn]
    else:
        picture.info["is_turned"] = any(kind in ("irot", "imir") for kind, *_ in transformations_of(picture) or ())
        turns = _undoing(picture) if is_ignored else []
    for name in ("exif", "xmp"):
        picture.info.pop(name, None)
    if not turns:
        return picture

    def load() -> Image.Image:
        picture.load()
        found = picture
        for each in turns:
            found = found.transpose(each)
        return found

    is_exchanged = sum(each in EXCHANGING for each in turns) % 2
    size = picture.size[::-1] if is_exchanged else picture.size
    deferred = Deferred(picture.format or "", size, bool(getattr(picture, "is_animated", False)), load)
    deferred.info = picture.info
    return deferred


def _undoing(picture: Image.Image) -> list[Transpose]:
    """Return the turns that undo those of a HEIF, beginning with its last one."""
    known = transformations_of(picture)
    if known is None:
        raise UnreadableError(
            "format_not_allowed", "HEIF with --orientation ignore: pip install --upgrade pillow-heif, or convert it"
        )
    undone = []
    for kind, *values in reversed(known):
        if kind == "irot" and values[0] in UNROTATED:
            undone.append(UNROTATED[values[0]])
        elif kind == "imir":
            undone.append(UNMIRRORED[values[0]])
    return undone
