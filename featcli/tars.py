"""Images in tar files, as webdataset writes them: listed from the headers, read where they lie, never unpacked."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any, NamedTuple

from featcli.errors import UsageError, counted, one_line, shown

SUFFIX = ".tar"
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


def members(name: str, file: IO[bytes] | None, suffixes: frozenset[str], ignored: Counter[str]) -> Iterator[Member]:
    """The images in a tar file, in its order; what else is there is counted in `ignored`. `file`: it, if not local.

    Names are keys and never become paths; those that would lead out of a folder are refused all the same, since
    somebody will join them to one. Raises UsageError, also where the file is damaged or cut short.
    """
    count = 0
    with ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(name if file is None else None, "r:", file))
            while (member := tar.next()) is not None:
                count += 1
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                if (found := _image(name, member, suffixes, ignored)) is not None:
                    yield found
            tar.fileobj.seek(tar.offset)
            if not tar.fileobj.read(1):
                raise EOFError("no end marker")
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"input {shown(name)}: damaged or cut short after {counted(count, 'member')}: {one_line(error)}",
                "fetch or make it again, or leave it out",
            ) from error


def _image(name: str, member: Any, suffixes: frozenset[str], ignored: Counter[str]) -> Member | None:
    parts = [part for part in member.name.split("/") if part != "."]
    suffix = parts[-1][parts[-1].rfind(".") :].lower() if parts and "." in parts[-1] else ""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        ignored["links and devices"] += 1
    elif any(part.startswith(".") and part != ".." for part in parts):
        ignored["hidden"] += 1
    elif suffix not in suffixes:
        ignored[suffix or "no suffix"] += 1
    elif ".." in parts or "" in parts:
        raise UsageError(f"input {shown(name)}: the name {shown(member.name)} leads out of it", "make it again")
    else:
        return Member("/".join(parts), member.offset_data, member.size)
    return None
