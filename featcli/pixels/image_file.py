"""The open file of an image: a file by itself, one in a tar, or one behind a URL; or the reason why not."""

from __future__ import annotations

import errno
import io
import os
import stat
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from featcli.errors import MachineError, shown
from featcli.inputs.archives import state_of
from featcli.inputs.image_list import MISSING, WHOLE, is_url
from featcli.inputs.urls import Remote, out_of_reach
from featcli.pixels.failure import UnreadableError
from featcli.system.files import open_regular

if TYPE_CHECKING:
    from featcli.inputs.image_list import Image

MAX_BYTES = 2 * 1024**3
NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what no other image would find either


def opened(image: Image) -> IO[bytes]:
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
        return open(image.path, "rb", opener=lambda path, _: open_regular(path))
    except ValueError as error:  # since the line before it was replaced
        raise UnreadableError("not_regular", str(error)) from None
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


def _from_tar(image: Image) -> bytes:
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


def _other_tar(image: Image, why: str) -> MachineError:
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


def _fetched(image: Image) -> bytes:
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


def modified(file: IO[bytes]) -> int | None:
    """When a file was written to last; None for what is in memory already."""
    return None if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_mtime_ns
