"""Compare the files of pictures with the digests that a dump holds of them, without decoding any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featcli.dump.folder import Dump
from featcli.dump.generations import all_generations
from featcli.errors import ConflictError, shown
from featcli.events import Report, silent
from featcli.extraction.planning import with_keys_of
from featcli.inputs.image_list import Image
from featcli.inputs.listing import find
from featcli.pixels.failure import NOT_READ, UnreadableError
from featcli.pixels.image_file import opened
from featcli.reading.reader import reader_of
from featcli.spec.commands import VerifyCommand
from featcli.spec.groups import InputSpec
from featcli.spec.option import narrowed
from featcli.system.machine import available_cores
from featcli.system.threads import DecodeThreads

AT_ONCE = 256  # files that are waited for together


@dataclass(frozen=True)
class PictureCheck:
    """What became of the pictures of a dump."""

    images: int  # that have a digest in the dump
    changed: tuple[str, ...]  # keys of pictures whose bytes are others by now
    gone: tuple[str, ...]  # keys of pictures that are not there, or cannot be read
    copies: tuple[tuple[str, ...], ...]  # keys of pictures whose bytes were the same, group by group


def check_pictures(dump: Dump, asked: VerifyCommand, report: Report = silent) -> PictureCheck:
    """Read the files of all pictures that the dump has a digest of, and compare them with it.

    Pictures that came since are no part of it. Raises ConflictError for a dump of format version 1, which has no
    digests, and for pictures that were in memory, UsageError and MachineError.
    """
    if not dump.plan.has_digests:
        raise ConflictError(
            f"dump {shown(dump.path)}: it is of format version 1, which holds no digests of pictures",
            "use --recompute, which compares some of its images",
        )
    dump.refuse_in_memory()
    listing = with_keys_of(dump, find(narrowed(asked, InputSpec)))
    for text in listing.remarks:
        report("warning", text=text)
    rows = {key: row for row, key in enumerate(listing.images.keys)}
    reader = reader_of(all_generations(dump).dumps)
    digests = [(key, digest) for key, digest in zip(reader.keys, reader.digests, strict=True) if digest]
    there = [(key, digest) for key, digest in digests if key in rows]
    report("start", images=len(there), done=0)
    now = digests_of([listing.images[rows[key]] for key, _ in there], report)
    compared = [(key, digest, found) for (key, digest), found in zip(there, now, strict=True)]
    gone = {key for key, _ in digests if key not in rows} | {key for key, _, found in compared if not found}
    copies: dict[str, list[str]] = defaultdict(list)
    for key, digest in digests:
        copies[digest].append(key)
    return PictureCheck(
        images=len(digests),
        changed=tuple(key for key, digest, found in compared if found not in ("", digest)),
        gone=tuple(key for key, _ in digests if key in gone),
        copies=tuple(tuple(keys) for keys in copies.values() if len(keys) > 1),
    )


def digests_of(images: Sequence[Image], report: Report = silent) -> Iterator[str]:
    """Yield the digest of the bytes of each file, empty for one that cannot be read."""
    with DecodeThreads(available_cores(), "digest") as pool:
        for first in range(0, len(images), AT_ONCE):
            some = images[first : first + AT_ONCE]
            yield from pool.map(_digest, some)
            report("batch", images=len(some))


def _digest(image: Image) -> str:
    noted = [NOT_READ]
    try:
        with opened(image, note=noted.append):
            pass
    except UnreadableError:
        return ""
    return noted[-1]
