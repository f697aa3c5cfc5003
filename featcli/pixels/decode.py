"""One file -> pixels of the wanted size, or a failure: which files and formats are read, and their limits."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from featcli.errors import CheckpointError, FeatcliError, MachineError, shown
from featcli.inputs.archives import state_of
from featcli.inputs.image_list import MISSING, WHOLE, is_url
from featcli.inputs.urls import Remote, out_of_reach
from featcli.pixels.colour import UnreadableError, upright_rgb, upright_size
from featcli.pixels.internals import register_plugin, silence_libtiff
from featcli.spec.groups import PixelSpec
from featcli.system.files import open_regular

if TYPE_CHECKING:
    import numpy as np

    from featcli.inputs.image_list import Image as Input

# Never "every format Pillow knows": a PostScript file named .jpg would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}  # read if installed
MAX_BYTES = 2 * 1024**3
DETAIL_LENGTH = 200
SPARE = 2  # how much larger than the input a picture is that was decoded smaller: what is left for resizing
NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what no other image would find either

REASONS = (
    "not_found",
    "not_regular",
    "unreadable",
    "empty",
    "too_large",
    "changed",
    "not_an_image",
    "format_not_allowed",
    "truncated",
    "decode_error",
    "too_many_pixels",
    "unsupported_depth",
)

# What people take for pictures and no format here reads: (first bytes, how far in, name).
FOREIGN = (
    (b"ftyphei", 4, "HEIF"),
    (b"ftyphev", 4, "HEIF"),
    (b"ftypmif1", 4, "HEIF"),
    (b"\xff\x0a", 0, "JXL"),
    (b"JXL ", 4, "JXL"),
    (b"%!PS", 0, "PostScript"),
    (b"%PDF", 0, "PDF"),
    (b"<svg", 0, "SVG"),
    (b"<?xml", 0, "XML, such as SVG"),
)
# How those begin whose header can be so damaged that Pillow no longer knows them.
KNOWN = (
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"\x89PNG", 0, "PNG"),
    (b"WEBP", 8, "WebP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"GIF8", 0, "GIF"),
    (b"ftypavif", 4, "AVIF"),
)


@dataclass(frozen=True)
class Failure:
    """An image that could not be read. Its row is there, filled with NaN."""

    key: str
    row: int
    reason: str  # one of REASONS
    detail: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in records and in failures.jsonl."""
        return {"key": self.key, "row": self.row, "reason": self.reason, "detail": self.detail}


def read_pixels(
    image: Input, rules: PixelSpec, fit: Callable[[Image.Image], np.ndarray], out: np.ndarray, is_native: bool = False
) -> bool:
    """Decode a file, make it upright RGB, resize and crop it with `fit`, and write it into `out` (C, H, W).

    Returns whether the file holds more frames or pages than the first. `is_native`: the size follows from the file's
    header, which has been read before. Raises UnreadableError for whatever is wrong with the file; `out` may then
    hold anything. Raises MachineError for what is no fault of the file's.
    """
    with _explained(), _opened(image) as file, _identified(file, rules) as picture:
        begun = _modified(file)
        has_more = bool(getattr(picture, "is_animated", False))  # never n_frames: that walks the file
        if rules.decode == "scaled" and picture.format == "JPEG":
            edge = SPARE * max(out.shape[1:])
            picture.draft(None, (edge, edge))  # as small as its own coding lets it, but no edge smaller than that
        picture.load()
        pixels = fit(upright_rgb(picture, rules))
        if _modified(file) != begun:
            raise UnreadableError("changed", "written to while it was read")
    if pixels.shape != out.shape:
        if is_native:
            raise UnreadableError("changed", f"{pixels.shape[1:]} pixels, by its header {out.shape[1:]}")
        raise CheckpointError(
            f"the checkpoint's preprocessing gives {shown(image.key)} the shape {pixels.shape}, planned {out.shape}",
            "ask for another --image-size",
        )
    out[...] = pixels
    return has_more


def read_size(image: Input, rules: PixelSpec) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone. Raises as `read_pixels` does."""
    with _explained(), _opened(image) as file, _identified(file, rules) as picture:
        return upright_size(picture, rules)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever a decoder raises, as UnreadableError: that is nearly everything, OSError, SyntaxError, KeyError ..."""
    try:
        yield
    except (UnreadableError, FeatcliError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableError(*_reason(error)) from error


def _opened(image: Input) -> IO[bytes]:
    """The open file, after the checks that must come before opening: a named pipe would wait for ever.

    Raises MachineError where no other image could be opened either.
    """
    if is_url(image.path):
        return io.BytesIO(_fetched(image))
    try:
        if image.place != WHOLE:
            return io.BytesIO(_from_tar(image))
        found = os.stat(image.path)
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError("not_regular", "a folder, pipe, socket or device")
        _check_size(found.st_size, image.bytes)
        return open(image.path, "rb")
    except OSError as error:
        if error.errno in NONE_LEFT:
            raise MachineError(
                f"image {shown(image.key)} cannot be opened: {os.strerror(error.errno)}",
                "see ulimit -n, and free memory",
            ) from error
        if not os.path.isdir(image.folder or os.curdir):  # unmounted, moved, or a network share that went away
            raise MachineError(
                f"input folder {shown(image.folder)}: no longer there",
                "bring it back: what is committed stays, and the same command goes on",
            ) from error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UnreadableError("not_found", "no such file") from None
        raise UnreadableError("unreadable", os.strerror(error.errno) if error.errno else "cannot be opened") from error


def _check_size(now: int, listed: int) -> None:
    if now == 0:
        raise UnreadableError("empty", "0 bytes")
    if now > MAX_BYTES:
        raise UnreadableError("too_large", f"{now} bytes, the limit is {MAX_BYTES}")
    if now != listed != MISSING:
        raise UnreadableError("changed", f"{listed} bytes when listed, {now} when read")


def _from_tar(image: Input) -> bytes:
    """The bytes of an image in a tar file."""
    _check_size(image.bytes, image.bytes)
    try:
        descriptor = open_regular(Path(image.path))
    except (OSError, ValueError) as error:
        raise _other_tar(image, (isinstance(error, OSError) and error.strerror) or str(error)) from error
    with os.fdopen(descriptor, "rb") as tar:
        if state_of(tar) != image.tar_state:
            raise _other_tar(image, "it was written to since it was listed")
        content = os.pread(tar.fileno(), image.bytes, image.place)
    if len(content) < image.bytes:
        raise UnreadableError("truncated", f"{len(content)} of {image.bytes} bytes are in the tar")
    return content


def _other_tar(image: Input, why: str) -> MachineError:
    """No image of that tar can be read: it would be wrong to call each of them a failure."""
    return MachineError(
        f"tar file {shown(image.path)}: {why}",
        "bring it back as it was: what is committed stays, and the same command goes on",
    )


@cache
def _remote_tar(path: str, state: str) -> Remote:
    """A tar behind a URL, looked at once by each process. Raises MachineError where it is not the one of the list."""
    remote = Remote(path)
    if remote.state() != state:
        raise out_of_reach(path, ValueError("written to since it was listed"))
    return remote


def _fetched(image: Input) -> bytes:
    """The bytes of an image behind a URL."""
    is_in_tar = image.place != WHOLE
    if image.bytes != MISSING:
        _check_size(image.bytes, image.bytes)
    try:
        if is_in_tar:
            content = _remote_tar(image.path, image.tar_state).fetch(image.place, image.bytes)
        else:
            content = Remote(image.path).fetch()
    except FileNotFoundError as error:
        if is_in_tar or not (image.folder.endswith("/") or Remote(image.folder).exists()):
            raise out_of_reach(image.path if is_in_tar else image.folder, error) from error
        raise UnreadableError("not_found", "no such object") from None
    _check_size(len(content), image.bytes)
    return content


def _modified(file: IO[bytes]) -> int | None:
    """When a file was written to last; None for what is in memory already."""
    return None if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_mtime_ns


def _identified(file: IO[bytes], rules: PixelSpec) -> Image.Image:
    """The picture as its header describes it, no pixel unpacked."""
    formats = readable_formats(rules.max_pixels)
    try:
        picture = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(16)
        name = _begins_as(start, FOREIGN)
        if name and name not in formats:
            help_ = f"pip install {PLUGINS[name][1]}, or convert it" if name in PLUGINS else "convert it"
            raise UnreadableError("format_not_allowed", f"{name}: {help_} to JPEG or PNG") from None
        if name := name or _begins_as(start, KNOWN):
            raise UnreadableError("decode_error", f"{name} with a damaged header, or cut short") from None
        raise UnreadableError("not_an_image", "no known picture format") from None
    if picture.width * picture.height > rules.max_pixels:
        raise UnreadableError(
            "too_many_pixels",
            f"{picture.width}x{picture.height}, the limit is {rules.max_pixels} pixels (--max-pixels)",
        )
    return picture


def _begins_as(start: bytes, marks: tuple[tuple[bytes, int, str], ...]) -> str:
    return next((name for mark, position, name in marks if start[position:].startswith(mark)), "")


@cache
def readable_formats(max_pixels: int) -> tuple[str, ...]:
    """The formats that are read, once Pillow is set up: with plugins, without libtiff's messages, with this limit."""
    Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS or 0)  # Pillow's guards the frames inside a file
    silence_libtiff()
    return FORMATS + tuple(name for name, (module, _) in PLUGINS.items() if _registered(module))


def _registered(module: str) -> bool:
    with suppress(Exception):  # not installed, or for another Pillow
        register_plugin(module)
        return True
    return False


def plugin_versions() -> dict[str, str]:
    """Of the plugins that are installed."""
    found = {}
    for _, package in PLUGINS.values():
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\((\d+) pixels\)", str(error))
        return "too_many_pixels", f"{found[1] if found else 'far too many'} pixels; --max-pixels moves the limit"
    # Object addresses in a message would make two equal runs differ.
    text = " ".join(re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}").split())[:DETAIL_LENGTH]
    cut_short = isinstance(error, OSError | struct.error | EOFError) and "trunca" in text.lower()
    return ("truncated" if cut_short else "decode_error"), text
