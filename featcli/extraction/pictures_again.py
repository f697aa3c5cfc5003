"""Tell whether pictures in memory are those of which a dump holds rows already, by the digests in its records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from featcli.dump.folder import Dump
from featcli.dump.records import split_digests
from featcli.errors import ConflictError, shown
from featcli.inputs.image_list import Image, ImageList
from featcli.pixels.decode import read_digest
from featcli.pixels.failure import NOT_READ
from featcli.pixels.internals import pillow_set_up
from featcli.run.loading import decode_threads_of
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import PixelSpec
from featcli.spec.option import narrowed
from featcli.system.threads import DecodeThreads

AT_ONCE = 256  # pictures that are waited for together


def refuse_other_pictures(dump: Dump, images: ImageList, asked: ExtractSpec) -> None:
    """Raise ConflictError if a picture is another than the one that a row was made of, and name the first.

    A picture that failed may be another with `retry_failed`. `images` have the keys of the dump.
    """
    failed = dump.found.failed_rows if asked.retry_failed else set()
    known = [(row, digest) for row, digest in _digests(dump) if digest != NOT_READ and row not in failed]
    now = digests_in_memory([images[row] for row, _ in known], asked)
    for (row, before), found in zip(known, now, strict=True):
        if found != before:
            raise ConflictError(
                f"dump {shown(dump.path)}: the picture {shown(images.keys[row])} is another than its row was made of",
                "give the pictures as before, use another -o, or --overwrite to start anew",
            )


def digests_in_memory(images: Sequence[Image], asked: ExtractSpec) -> Iterator[str]:
    """Yield the digest of each picture in memory; NOT_READ for one that cannot be unpacked. Raises MachineError."""
    rules = narrowed(asked, PixelSpec)
    read = partial(read_digest, rules=rules)
    with pillow_set_up(rules.max_pixels), DecodeThreads(decode_threads_of(asked), "digest") as pool:
        for first in range(0, len(images), AT_ONCE):
            yield from pool.map(read, images[first : first + AT_ONCE])


def _digests(dump: Dump) -> Iterator[tuple[int, str]]:
    """Yield the row and the digest of each picture in committed and unfinished shards, in row order."""
    found = {record["shard"]: record for record in dump.records()}
    begun = [one.content for one in dump.unfinished() if one.content is not None and one.number not in found]
    for record in sorted([*found.values(), *begun], key=lambda record: int(record["first_row"])):
        yield from enumerate(split_digests(record["digests"]), record["first_row"])
