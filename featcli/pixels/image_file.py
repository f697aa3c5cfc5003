"""Open the file of an image: a file by itself, one in a tar, or one behind a URL; or say why it cannot be opened."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING

import xxhash

from featcli.errors import FeatcliError, MachineError, shown
from featcli.inputs.archives import BLOCK, state_of
from featcli.inputs.image_list import MISSING, WHOLE, is_url
from featcli.inputs.storage import may_not_be_entered, refuse_if_gone
from featcli.inputs.urls import Remote, out_of_reach
from featcli.pixels.failure import UnreadableError
from featcli.pixels.limits import Counted
from featcli.system.faults import LOST, RESUMES, is_of_machine, machine_error
from featcli.system.files import ReadFile, is_folder, names_in, open_regular, read_at, read_fresh

if TYPE_CHECKING:
    from featcli.inputs.image_list import Image

MAX_BYTES = 2 * 1024**3
# A file of up to this many bytes is read before it is decoded. A larger one is read as its decoder asks, because most
# of it may be pages that nobody wants. Only one large file is open at a time, because a decoder may ask for all of it.
WHOLE_BYTES = 64 * 1024**2
MOST_WITNESSES = 8  # other files that are tried, to tell a bad sector from a lost disk
WITNESS_BYTES = 1 << 20
PIECE_BYTES = 1 << 20  # that are hashed at once
_large_file = threading.Lock()


class Content(Counted, io.BytesIO):
    """The bytes of an image in memory, with the name of their file."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def digest(self) -> str:
        """xxh3-128 (hex) of them."""
        return xxhash.xxh3_128_hexdigest(self.getbuffer())


class LargeFile(Counted, ReadFile):
    """A file of which only the bytes are read that its decoder asks for."""

    def digest(self) -> str:
        """xxh3-128 (hex) of all of it, which is read for that."""
        digest = xxhash.xxh3_128()
        self.regular.seek(0)
        while content := self.regular.read(PIECE_BYTES):
            digest.update(content)
        return digest.hexdigest()


@contextmanager
def opened(image: Image, header_only: bool = False, note: Callable[[str], None] | None = None) -> Iterator[IO[bytes]]:
    """Open the file of an image. The result has no descriptor, so decoders read it and cannot map it.

    `note` is called with the digest of its bytes, but not for a large file that cannot be decoded. Raises
    UnreadableError if this file alone is at fault, also if it is written to meanwhile or asks for too much. Raises
    MachineError for anything else, whatever error the decoder made of it.
    """
    with _opened(image, header_only) as file:
        try:
            if note is not None and isinstance(file, Content):
                note(file.digest())
            yield file
            if note is not None and isinstance(file, LargeFile):
                note(file.digest())
        finally:
            file.refuse_excess()


@contextmanager
def _opened(image: Image, header_only: bool) -> Iterator[Content | LargeFile]:
    if is_url(image.path):
        yield Content(_fetched(image), image.path)
    elif image.place != WHOLE:
        yield Content(_from_tar(image), image.path)
    else:
        content = None
        with _file_of(image) as file:
            begun = file.regular.state()
            _check_size(begun.st_size, image.bytes)
            if header_only:
                yield file
                return
            if begun.st_size <= WHOLE_BYTES:
                content = file.regular.read_next(begun.st_size)
            else:
                with _large_file:
                    yield file
            now = file.regular.state()
            if (now.st_size, now.st_mtime_ns) != (begun.st_size, begun.st_mtime_ns):
                raise UnreadableError("changed", "written to while it was read")
        if content is not None:
            yield Content(content, image.path)


@contextmanager
def _file_of(image: Image) -> Iterator[LargeFile]:
    """Open a file. An error while it is read inside the block becomes one of those that `opened` raises."""
    try:
        file = LargeFile(image.path)
    except ValueError:
        raise UnreadableError("not_regular", "a folder, pipe, socket or device") from None
    except OSError as error:
        raise _cause(image, error, (0, 0)) from error
    with file:
        try:
            yield file
        finally:  # an error of reading comes first, whatever the decoder made of it
            if (fault := file.regular.fault) is not None:
                raise _cause(image, fault, file.regular.place_of_fault) from fault


def _cause(image: Image, error: OSError, place: tuple[int, int]) -> FeatcliError | UnreadableError:
    """Return the error that tells whether the file or the machine is at fault.

    `place` is the offset and the number of the bytes that were asked for.
    """
    cause = os.strerror(error.errno) if error.errno else "cannot be opened"
    if is_of_machine(error):
        if error.errno in LOST and _is_alone(image, place):
            return UnreadableError("unreadable", cause)
        return machine_error(f"image {shown(image.key)}", error)
    refuse_if_gone(image.grounds)
    if not is_folder(image.folder or os.curdir):  # unmounted, moved, or on a network share that is gone
        return MachineError(f"input folder {shown(image.folder)}: it is no longer there", f"bring it back; {RESUMES}")
    if error.errno == errno.EACCES and may_not_be_entered(image.path):
        return machine_error(f"image {shown(image.key)}", error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadableError("not_found", "no such file")
    return UnreadableError("unreadable", cause)


def _is_alone(image: Image, place: tuple[int, int]) -> bool:
    """Return whether a disk lost only bytes of this image: they fail again, but other files can be read."""
    try:
        read_fresh(image.path, *place)
        return False
    except OSError as error:
        if error.errno not in LOST:
            return False
    except ValueError:
        return False
    if image.place != WHOLE:
        return _can_be_read(image.path, BLOCK) is True  # the first header of the tar
    folder, name = os.path.split(image.path)
    names = sorted(names_in(folder or os.curdir))
    nearest = [*filter(name.__lt__, names), *reversed([*filter(name.__gt__, names)])]  # later names first
    tried = 0
    for other in nearest:
        found = _can_be_read(os.path.join(folder, other), WITNESS_BYTES)
        tried += found is not None
        if found or tried == MOST_WITNESSES:
            return bool(found)
    return False


def _can_be_read(path: str, count: int) -> bool | None:
    """Return whether the first bytes of a file can be read; None if it is no file, or is empty, which tells nothing."""
    try:
        return True if read_fresh(path, 0, count) else None
    except ValueError:
        return None
    except OSError as error:
        return False if is_of_machine(error) else None


def _check_size(now: int, listed: int) -> None:
    if now == 0:
        raise UnreadableError("empty", "0 bytes")
    if now > MAX_BYTES:
        raise UnreadableError("too_large", f"{now:,} bytes, the limit is {MAX_BYTES:,}")
    if now != listed != MISSING:
        raise UnreadableError("changed", f"{listed:,} bytes when listed, {now:,} when read")


def _from_tar(image: Image) -> bytes:
    """Read the bytes of an image in a tar file."""
    _check_size(image.bytes, image.bytes)
    try:
        descriptor = open_regular(image.path)
    except (OSError, ValueError) as error:
        raise _other_tar(image, (isinstance(error, OSError) and error.strerror) or str(error)) from error
    try:
        if state_of(os.fstat(descriptor)) != image.tar_state:
            raise _other_tar(image, "it was written to since it was listed")
        content = read_at(descriptor, image.bytes, image.place)
    except OSError as error:
        raise _cause(image, error, (image.place, image.bytes)) from error
    finally:
        os.close(descriptor)
    if len(content) < image.bytes:
        raise UnreadableError("truncated", f"{len(content):,} of {image.bytes:,} bytes are in the tar")
    return content


def _other_tar(image: Image, why: str) -> MachineError:
    """Return the error for a tar of which no image can be read: it would be wrong to call each of them a failure."""
    return MachineError(f"tar file {shown(image.path)}: {why}", f"bring it back as it was; {RESUMES}")


@cache
def _remote_tar(path: str, state: str) -> Remote:
    """Return the tar behind a URL. Each process checks once that it is still the one of the list, else MachineError."""
    remote = Remote(path)
    if remote.state() != state:
        raise out_of_reach(path, ValueError("written to since it was listed"))
    return remote


def _fetched(image: Image) -> bytes:
    """Read the bytes of an image behind a URL."""
    is_in_tar = image.place != WHOLE
    if image.bytes != MISSING:
        _check_size(image.bytes, image.bytes)
    try:
        if is_in_tar:
            content = _remote_tar(image.path, image.tar_state).fetch(image.place, image.bytes)
        else:
            content = Remote(image.path).fetch()
    except FileNotFoundError as error:
        if is_in_tar or (not image.folder.endswith("/") and Remote(image.folder).is_gone()):
            raise out_of_reach(image.path if is_in_tar else image.folder, error) from error
        raise UnreadableError("not_found", "no such object") from None
    except PermissionError as error:
        if not any(Remote(other).is_given() for other in image.beside):
            raise out_of_reach(image.path, error.__context__ or error) from error
        raise UnreadableError("unreadable", str(error)) from None
    _check_size(len(content), image.bytes)
    return content
