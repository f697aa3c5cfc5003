"""Decide which shards of a dump this run makes, and take the locks for it, because other runs may work there.

Several processes may make missing shards at the same time. Only one alone may make committed shards again.
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
from featcli.extraction.pictures_again import refuse_other_pictures
from featcli.extraction.planning import Job, refuse_without_extras
from featcli.inputs.listing import Listing
from featcli.spec.commands import ExtractSpec
from featcli.system.scheduler import Part, part_of
from featcli.workers.engine import WorkOrder


class BegunMeanwhileError(Exception):
    """Another run has begun the dump since this one looked. Its plan holds the choices that this run must take."""

    def __init__(self, listing: Listing) -> None:
        super().__init__()
        self.listing = listing  # the images that were found, because stdin can be read only once


@dataclass(frozen=True)
class ShardsToMake:
    """The shards of a dump, or of a part of it, that are to be made."""

    missing: tuple[int, ...]  # shards that are not complete
    again: tuple[int, ...] = ()  # complete shards with failed images that will be tried again

    @property
    def all(self) -> list[int]:
        """All of them in order."""
        return sorted({*self.missing, *self.again})


def shards_to_make(dump: Dump, retry_failed: bool, part: Part | None) -> ShardsToMake:
    """Return what is to be made, after a look at every record of a dump. Raises DamagedError."""
    missing = dump.found.missing
    again = sorted(dump.found.failed - {*missing}) if retry_failed else []
    return ShardsToMake(missing=in_part(missing, part), again=in_part(again, part))


def in_part(shards: Iterable[int], part: Part | None) -> tuple[int, ...]:
    """Return the shards that are in the part; all shards for None."""
    return tuple(shards if part is None else part.of(shards))


def claim(job: Job, asked: ExtractSpec, existing: Dump | None, lock: FolderLock) -> WorkOrder:
    """Take the dump for this run, and begin it if there is none. Returns the shards to make, and the lock for them.

    `existing` is the dump that the job was planned by. Raises BegunMeanwhileError if there was none and now is one,
    ConflictError if another process is in the way, and MachineError.
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
            raise in_use(path)  # only one process alone may make committed shards again
        into, to_make = _state_now(path, job, asked)  # the state may have changed since the plan was made
    shards = to_make.all
    if shards and not is_alone:  # another process begins with the first shard, so begin elsewhere
        start = random.SystemRandom().randrange(len(shards))  # does not change the caller's random numbers
        shards = shards[start:] + shards[:start]
    return WorkOrder(into, shards, job.pictures, lock.descriptor, is_new=existing is None)


def _begin(path: Path, job: Job, existing: Dump | None, is_alone: bool) -> None:
    """Make sure that there is a dump with this job's plan, or the one that the job was planned by."""
    if Dump.existing(path) is not None:
        if existing is None:
            raise BegunMeanwhileError(job.listing)
        return
    if not is_alone:
        raise in_use(path)
    if not create(path, job.plan, job.images, job.columns):
        raise BegunMeanwhileError(job.listing)


def _state_now(path: Path, job: Job, asked: ExtractSpec) -> tuple[DumpWriter, ShardsToMake]:
    """Return the dump as it is now, and what is left to make. Raises ConflictError if it is not the job's."""
    dump = Dump.existing(path)
    if dump is None:
        raise no_dump(path)
    resized = resume(dump, job.plan, job.images, asked.retry_failed, job.columns)
    if job.images.are_in_memory:
        refuse_other_pictures(dump, job.images, asked)
    to_make = shards_to_make(dump, asked.retry_failed, part_of(asked.part))
    refuse_without_extras(dump, job.images, bool(to_make.all))
    again, retries = frozenset(to_make.again), asked.retry_failed
    return DumpWriter(dump, job.plan.environment, again=again, resized=resized, retry_failed=retries), to_make
