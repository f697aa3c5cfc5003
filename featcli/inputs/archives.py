"""List images in tar files, as webdataset writes them, from the headers. They are read in place, never unpacked."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from featcli.errors import UsageError, counted, one_line, shown
from featcli.inputs.internals import end_of_member, forget_members
from featcli.inputs.sidecars import LARGEST, Sidecars, is_sidecar

SUFFIX = ".tar"
BLOCK = 512  # bytes of a header; all sizes are filled up to a multiple of it
MOST_HEADER_BYTES = 1 << 20  # of one member: systems allow 64 KiB for each attribute
MOST_FOR_ALL = 1_000  # values in pax headers that apply to all members
LONGEST_NAME = 65_536  # characters
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Member(NamedTuple):
    """An image in a tar file: its name, the place of its first byte, and its number of bytes."""

    name: str
    place: int
    bytes: int


def is_tar(name: str) -> bool:
    """Return whether a name is that of a tar. Raises UsageError for compressed tars, in which an image has no place."""
    lower = name.lower()
    if lower.endswith(PACKED):
        raise UsageError(
            f"input {shown(name)}: it is a compressed tar file",
            "decompress it to a plain .tar: pictures are compressed already",
        )
    return lower.endswith(SUFFIX)


def state_of(found: os.stat_result) -> str:
    """Return a text that tells a local tar from another of its name: tars come in few sizes."""
    return f"{found.st_size} {found.st_mtime_ns}"


def members(
    name: str, file: IO[bytes], suffixes: frozenset[str], ignored: Counter[str], sidecars: Sidecars
) -> Iterator[Member]:
    """Yield the images in a tar file, in its order. `ignored` counts everything else but their sidecars.

    Names are keys and never become paths. A name that leads out of a folder is refused nevertheless, because somebody
    may join it to one. Raises UsageError, also if the file is damaged or cut short anywhere.
    """
    count, headers = 0, _Headers(file)
    readable: Any = headers  # it has all methods that reading a tar needs
    try:
        with tarfile.open(None, "r:", readable) as tar:
            before = -1
            is_empty = end_of_member(tar) == 0  # Python 3.10 would look for a member at a negative place
            while not is_empty and (member := tar.next()) is not None:
                count += 1
                headers.next_member(len(tar.pax_headers), len(member.name))
                forget_members(tar)
                if end_of_member(tar) <= before:
                    raise ValueError("a member of a size below zero")
                before = end_of_member(tar)
                if _is_sidecar(member):
                    sidecars.add(member.name, _content(file, member))
                elif (found := _image(name, member, suffixes, ignored)) is not None:
                    sidecars.add_picture(member.name, found.place)
                    yield found
            _refuse_more(file, end_of_member(tar))
    except UsageError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"input {shown(name)}: it is damaged or cut short after {counted(count, 'member')}: {one_line(error)}",
            "fetch or make it again, or leave it out",
        ) from error


class _Headers:
    """The headers of a tar, which are read into memory. Raises ValueError if those of one member are too long."""

    def __init__(self, file: IO[bytes]) -> None:
        self._left = MOST_HEADER_BYTES
        self.seek = file.seek
        self.tell = file.tell
        self._read = file.read

    def read(self, size: int) -> bytes:
        """Read some bytes of a header."""
        self._left -= size
        if self._left < 0:
            raise ValueError(f"headers of more than {MOST_HEADER_BYTES:,} bytes for one member")
        return self._read(size)

    def next_member(self, for_all: int, name: int) -> None:
        """Begin with the next member.

        `for_all` is the number of values for all members, `name` the length in characters.
        """
        self._left = MOST_HEADER_BYTES
        if for_all > MOST_FOR_ALL:
            raise ValueError(f"more than {MOST_FOR_ALL:,} values for all members")
        if name > LONGEST_NAME:
            raise ValueError(f"a name of {name:,} characters")


def _refuse_more(file: IO[bytes], end: int) -> None:
    """Raise EOFError or ValueError unless the end is marked and nothing follows: damage also ends the reading."""
    file.seek(end)
    if len(file.read(BLOCK)) < BLOCK:
        raise EOFError("no end marker")
    file.seek(end)
    while content := file.read(1 << 20):
        if content.count(0) < len(content):
            raise ValueError("a damaged header, or another tar behind the first")


def _is_sidecar(member: tarfile.TarInfo) -> bool:
    parts = member.name.split("/")
    is_hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return is_sidecar(member.name) and member.isreg() and not member.issparse() and not is_hidden


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes | None:
    """Return the bytes of a member, or None if there are too many. Raises EOFError."""
    if member.size > LARGEST:
        return None
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise EOFError("cut short")
    return content


def _image(name: str, member: Any, suffixes: frozenset[str], ignored: Counter[str]) -> Member | None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    suffix = parts[-1][parts[-1].rfind(".") :].lower() if parts and "." in parts[-1] else ""
    if member.isdir():
        return None
    if any(part.startswith(".") and part != ".." for part in parts):
        ignored["hidden"] += 1
    elif suffix not in suffixes:
        ignored[suffix or "no suffix"] += 1
    elif ".." in parts or member.name.startswith("/"):
        hint = "pack it again, from the folder that holds all: tar -C FOLDER -cf x.tar ."
        raise UsageError(f"input {shown(name)}: the name {shown(member.name)} may lead out of a folder", hint)
    elif not member.isreg() or member.issparse():
        raise UsageError(
            f"input {shown(name)}: {shown(member.name)} is a link, a device or sparse: its picture would be missing",
            "pack it again with tar --dereference --hard-dereference, and without --sparse",
        )
    else:
        return Member("/".join(parts), member.offset_data, member.size)
    return None
