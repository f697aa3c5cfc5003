"""A worker, a process of this machine or an actor of Ray: loads the backbone once, then makes the shards it is given.

Messages of a process to the driver are pairs of a kind and its content: "event" (kind, facts), "more" (while shards
are at work), "idle" (when none is), "stats", "error" (a FeatcliError), "crash" (a text).
"""

from __future__ import annotations

import logging
import os
import queue as queues
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from featcli.dump.folder import Dump, no_dump
from featcli.dump.lock import FolderLock
from featcli.dump.plan import refuse_other_plan
from featcli.dump.writer import DumpWriter
from featcli.errors import FeatcliError, one_line, shown
from featcli.events import Report
from featcli.run.loading import load
from featcli.run.pipeline import ShardRunner
from featcli.run.source import Shard
from featcli.spec.commands import ExtractSpec
from featcli.system.threads import exit_process

UNHEARD = ("choice", "start", "end")  # the driver says those
# An actor makes shards in a thread that is not the first of its process, and only of the first arena does glibc keep
# the memory of large tensors.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is told when it starts."""

    asked: ExtractSpec  # for its one device
    path: str  # of the dump
    again: frozenset[int]  # committed shards that are to be made again
    resized: Mapping[int, int]  # row -> bytes, of images that are not as they were listed

    def writer(self, dump: Dump, environment: Mapping[str, str]) -> DumpWriter:
        """What writes shards of that dump, in a process of that environment."""
        retries = self.asked.retry_failed
        return DumpWriter(dump, environment, again=self.again, resized=self.resized, retry_failed=retries)


def runner_for(spec: WorkerSpec, report: Report) -> tuple[DumpWriter, ShardRunner]:
    """What makes shards, and what writes them. Raises ConflictError where the options come to another plan here."""
    warnings.filterwarnings("ignore", module="PIL")  # as the command line does
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    dump = Dump.existing(Path(spec.path))
    if dump is None:
        raise no_dump(spec.path)
    setup = load(spec.asked, dump.plan)
    refuse_other_plan(shown(spec.path), dump.plan, setup.plan)
    runner = ShardRunner(setup, report)
    runner.compile()
    return spec.writer(dump, setup.plan.environment), runner


def main(descriptor: int, lock: int) -> None:
    """Serve the driver at the other end of a socket until it has no more to do. `lock`: held on the dump with it."""
    for one in (descriptor, lock):
        os.set_inheritable(one, False)  # whatever a compiler starts does not outlive this process for the others
    signal.signal(signal.SIGTERM, _stop)
    with suppress(OSError):  # where there is no stderr
        os.dup2(2, 1)  # stdout carries results alone
    try:
        with Connection(descriptor) as driver:
            _serve(driver)
    except (BrokenPipeError, ConnectionResetError, EOFError, KeyboardInterrupt):
        exit_process(1)  # the driver is gone, or has had enough
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to tidy up
    exit_process(0)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # tidying up is not to be stopped in its turn
    raise KeyboardInterrupt


def _serve(driver: Connection) -> None:
    one_at_a_time = threading.Lock()  # events come from the main and the writer thread

    def tell(kind: str, content: Any = None) -> None:
        with one_at_a_time:
            driver.send((kind, content))

    def report(kind: str, **facts: Any) -> None:
        if kind not in UNHEARD:
            tell("event", (kind, facts))

    try:
        into, runner = runner_for(driver.recv(), report)
        while True:
            tell("idle")
            first = driver.recv()
            if first is None:
                return
            runner.run(into, _asked(first, tell, driver), partial(tell, "stats"))
    except FeatcliError as error:
        tell("error", error)
    except (OSError, EOFError):  # of the connection: those of disks and images are FeatcliErrors by now
        raise
    except Exception as error:  # a bug, or a device that broke: said here in full, and what can be is tried again
        traceback.print_exc()
        tell("crash", f"{type(error).__name__}: {one_line(error)}")
        exit_process(1)


def _asked(first: Shard, tell: Any, driver: Connection) -> Iterator[Shard]:
    shard = first
    while shard is not None:
        yield shard
        tell("more")
        shard = driver.recv()


class RayWorker:
    """The actor: loads the backbone once, then makes the shards that it is given."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._events: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._lock: FolderLock | None = None

    def ping(self) -> None:
        """It has been placed."""

    def load(self) -> dict[str, str]:
        """Load the backbone; what this process is, by name. Raises FeatcliError."""
        self._into, self._runner = runner_for(self._spec, self._report)
        self._lock = FolderLock(self._into.dump.path)
        self._lock.beside()  # so that nobody deletes the dump while this is at work, whatever becomes of the driver
        return dict(self._into.environment)

    def keep(self) -> None:
        """Put the rows that there are on the disk now, since the end is near. Ray calls it while `make` is at work."""
        self._runner.keep()

    def _report(self, kind: str, **facts: Any) -> None:
        self._events.put(("event", (kind, facts)))

    def make(self, shards: Sequence[Shard]) -> Iterator[tuple[str, Any]]:
        """Make shards; yields what happens, as it happens, and "done". Raises FeatcliError."""
        thread = threading.Thread(target=self._make, args=(shards,), daemon=True)
        thread.start()
        while True:
            kind, content = self._events.get()
            if kind == "error":
                raise content
            yield kind, content
            if kind == "done":
                return

    def _make(self, shards: Sequence[Shard]) -> None:
        try:
            self._runner.run(self._into, shards, lambda stats: self._events.put(("stats", stats)))
            self._events.put(("done", None))
        except BaseException as error:  # handed over to the thread that Ray listens to
            self._events.put(("error", error))
