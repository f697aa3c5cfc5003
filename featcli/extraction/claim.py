"""Which shards of a dump are this run's to make, and the locks under which it makes them: others may be at work there.

Shards that are missing may be made by several processes beside one another; who makes committed ones again is alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from featcli.dump.folder import Dump, in_use, no_dump
from featcli.dump.lock import FolderLock
from featcli.dump.picture_folders import remember_pictures
from featcli.dump.target import occupy
from featcli.dump.writer import DumpWriter, create, resume
from featcli.extraction.planning import Job, refuse_without_extras
from featcli.inputs.listing import Listing
from featcli.spec.commands import ExtractSpec
from featcli.system.scheduler import Part, part_of
from featcli.workers.engine import WorkOrder


class BegunMeanwhileError(Exception):
    """Another run has begun the dump since this one looked: its choices, which the plan holds, are to be taken."""

    def __init__(self, listing: Listing) -> None:
        super().__init__()
        self.listing = listing  # the images that were found: stdin, for one, can be read once


@dataclass(frozen=True)
class ShardsToMake:
    """Of a dump, or of a part of it."""

    missing: tuple[int, ...]  # those that are not there whole
    again: tuple[int, ...] = ()  # those that are, with images that failed and are to be tried again

    @property
    def all(self) -> list[int]:
        """In order."""
        return sorted({*self.missing, *self.again})


def shards_to_make(dump: Dump, retry_failed: bool, part: Part | None) -> ShardsToMake:
    """What a look at every record of a dump says. Raises DamagedError."""
    missing = dump.found.missing
    again = sorted(dump.found.failed - {*missing}) if retry_failed else []
    return ShardsToMake(missing=in_part(missing, part), again=in_part(again, part))


def in_part(shards: Iterable[int], part: Part | None) -> tuple[int, ...]:
    """Those that are in the part; all where there is none."""
    return tuple(shards if part is None else part.of(shards))


def claim(job: Job, asked: ExtractSpec, existing: Dump | None, lock: FolderLock) -> WorkOrder:
    """Take the dump for this run, and begin it where there is none. Returns what is to be made, and the lock for it.

    `existing` is the dump that the job was planned by. Raises BegunMeanwhileError where there was none and now is one,
    ConflictError where another process is in the way, and MachineError.
    """
    path = asked.dump_path
    is_alone = occupy(path, lock, asked.overwrite)
    _begin(path, job, existing, is_alone)
    if is_alone and not lock.together():  # others may help, and need not wait while the records are read
        raise in_use(path)
    into, to_make = _state_now(path, job, asked)
    remember_pictures(path, job.images)
    if to_make.again or into.dump.found.damaged & {*to_make.missing}:
        if not lock.alone():
            raise in_use(path)  # what is committed is made again by one process alone
        into, to_make = _state_now(path, job, asked)  # as it is now
    shards = to_make.all
    if shards and not is_alone:  # another begins at the first: begin elsewhere
        start = random.SystemRandom().randrange(len(shards))  # no number of the caller's
        shards = shards[start:] + shards[:start]
    return WorkOrder(into, shards, job.pictures, lock.descriptor, is_new=existing is None)


def _begin(path: Path, job: Job, existing: Dump | None, is_alone: bool) -> None:
    """See to it that there is a dump with this job's plan, or the one that the job was planned by."""
    if Dump.existing(path) is not None:
        if existing is None:
            raise BegunMeanwhileError(job.listing)
        return
    if not is_alone:
        raise in_use(path)
    if not create(path, job.plan, job.images):
        raise BegunMeanwhileError(job.listing)


def _state_now(path: Path, job: Job, asked: ExtractSpec) -> tuple[DumpWriter, ShardsToMake]:
    """The dump as it is now, if it is the job's, and what there is to make. Raises ConflictError if it is not."""
    dump = Dump.existing(path)
    if dump is None:
        raise no_dump(path)
    resized = resume(dump, job.plan, job.images, asked.retry_failed)
    to_make = shards_to_make(dump, asked.retry_failed, part_of(asked.part))
    refuse_without_extras(dump, job.images, bool(to_make.all))
    again, retries = frozenset(to_make.again), asked.retry_failed
    return DumpWriter(dump, job.plan.environment, again=again, resized=resized, retry_failed=retries), to_make
