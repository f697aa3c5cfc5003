"""Images in tar files, as webdataset writes them: listed from the headers, read where they lie, never unpacked."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from featcli.errors import UsageError, counted, one_line, shown
from featcli.inputs.internals import end_of_member, forget_members

SUFFIX = ".tar"
BLOCK = 512  # bytes: of a header, and what all sizes are filled up to
MOST_HEADER_BYTES = 1 << 20  # of one member: what systems allow for attributes is 64 KiB each
MOST_FOR_ALL = 1_000  # values in pax headers for all members
LONGEST_NAME = 65_536  # characters
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Member(NamedTuple):
    """An image in a tar file: its name, where its bytes begin, and how many there are."""

    name: str
    place: int
    bytes: int


def is_tar(name: str) -> bool:
    """Whether a name says so. Raises UsageError for packed ones, in which nothing can be found without unpacking."""
    lower = name.lower()
    if lower.endswith(PACKED):
        raise UsageError(
            f"input {shown(name)}: a packed tar file", "unpack it to a plain .tar: pictures are packed already"
        )
    return lower.endswith(SUFFIX)


def state_of(found: os.stat_result) -> str:
    """What tells a tar file of this machine from another of its name: tars are of few sizes."""
    return f"{found.st_size} {found.st_mtime_ns}"


def members(name: str, file: IO[bytes], suffixes: frozenset[str], ignored: Counter[str]) -> Iterator[Member]:
    """The images in a tar file, in its order; what else is there is counted in `ignored`.

    Names are keys and never become paths; those that would lead out of a folder are refused all the same, since
    somebody will join them to one. Raises UsageError, also where the file is damaged or cut short anywhere.
    """
    count, headers = 0, _Headers(file)
    readable: Any = headers  # all that reading needs of a file
    try:
        with tarfile.open(None, "r:", readable) as tar:
            before = -1
            is_empty = end_of_member(tar) == 0  # Python 3.10 looks for the next member before the beginning then
            while not is_empty and (member := tar.next()) is not None:
                count += 1
                headers.next_member(len(tar.pax_headers), len(member.name))
                forget_members(tar)
                if end_of_member(tar) <= before:
                    raise ValueError("a member of a size below zero")
                before = end_of_member(tar)
                if (found := _image(name, member, suffixes, ignored)) is not None:
                    yield found
            _refuse_more(file, end_of_member(tar))
    except UsageError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"input {shown(name)}: damaged or cut short after {counted(count, 'member')}: {one_line(error)}",
            "fetch or make it again, or leave it out",
        ) from error


class _Headers:
    """The headers of a tar, which are read into memory. Raises ValueError for those of one member that are too long."""

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
        """Begin with the next one. `for_all`: how many values hold for all members from now on; `name`: characters."""
        self._left = MOST_HEADER_BYTES
        if for_all > MOST_FOR_ALL:
            raise ValueError(f"more than {MOST_FOR_ALL:,} values for all members")
        if name > LONGEST_NAME:
            raise ValueError(f"a name of {name:,} characters")


def _refuse_more(file: IO[bytes], end: int) -> None:
    """Raise EOFError or ValueError unless the end is marked and nothing follows: a reader stops at damage, too."""
    file.seek(end)
    if len(file.read(BLOCK)) < BLOCK:
        raise EOFError("no end marker")
    file.seek(end)
    while content := file.read(1 << 20):
        if content.count(0) < len(content):
            raise ValueError("a damaged header, or another tar behind the first")


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
