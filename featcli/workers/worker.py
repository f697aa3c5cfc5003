"""Be a worker, as a process of this machine or an actor of Ray: load the backbone once, then make the shards that come.

A process sends the driver pairs of a kind and its content: "event" (kind, facts), "more" (while it makes shards),
"idle" (when it has none), "stats", "error" (a FeatcliError), "crash" (a text).
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

UNHEARD = ("choice", "start", "end")  # the driver reports these itself
# An actor makes shards in a thread that is not the first of its process. glibc keeps the memory of large tensors only
# in the first arena, so there is only one.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is told when it starts."""

    asked: ExtractSpec  # with the worker's one device
    path: str  # the folder of the dump
    again: frozenset[int]  # committed shards that are made again
    resized: Mapping[int, int]  # row -> bytes, for images whose size has changed since they were listed

    def writer(self, dump: Dump, environment: Mapping[str, str]) -> DumpWriter:
        """Return a writer for shards of the dump, in a process with this environment."""
        retries = self.asked.retry_failed
        return DumpWriter(dump, environment, again=self.again, resized=self.resized, retry_failed=retries)


def runner_for(spec: WorkerSpec, report: Report) -> tuple[DumpWriter, ShardRunner]:
    """Return a writer and a maker of shards.

    Raises ConflictError if the options lead to another plan on this machine.
    """
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
    """Serve the driver at the other end of a socket until it has no more work. `lock` is held on the dump meanwhile."""
    for one in (descriptor, lock):
        os.set_inheritable(one, False)  # a compiler's processes may outlive this one, and must not hold these
    signal.signal(signal.SIGTERM, _stop)
    with suppress(OSError):  # there may be no stderr
        os.dup2(2, 1)  # stdout carries only results
    try:
        with Connection(descriptor) as driver:
            _serve(driver)
    except (BrokenPipeError, ConnectionResetError, EOFError, KeyboardInterrupt):
        exit_process(1)  # the driver is gone, or has stopped
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to clean up
    exit_process(0)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not stop the cleaning up
    raise KeyboardInterrupt


def _serve(driver: Connection) -> None:
    one_at_a_time = threading.Lock()  # events come from the main thread and the writer thread

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
    except (OSError, EOFError):  # errors of the connection: those of disks and images are FeatcliErrors by now
        raise
    except Exception as error:  # a bug, or a device that broke: its traceback is shown here, and the driver tries again
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
    """The actor. It loads the backbone once, then makes the shards that come."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._events: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self._lock: FolderLock | None = None

    def ping(self) -> None:
        """Return once the actor has a place."""

    def load(self) -> dict[str, str]:
        """Load the backbone. Returns the names and versions of this process's environment. Raises FeatcliError."""
        self._into, self._runner = runner_for(self._spec, self._report)
        self._lock = FolderLock(self._into.dump.path)
        self._lock.beside()  # nobody may delete the dump while this works, whatever becomes of the driver
        return dict(self._into.environment)

    def keep(self) -> None:
        """Put all rows on the disk now, because the end is near. Ray calls this while `make` runs."""
        self._runner.keep()

    def _report(self, kind: str, **facts: Any) -> None:
        self._events.put(("event", (kind, facts)))

    def make(self, shards: Sequence[Shard]) -> Iterator[tuple[str, Any]]:
        """Make shards. Yields what happens, as it happens, and at last "done". Raises FeatcliError."""
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
        except BaseException as error:  # the thread that Ray listens to gets it
            self._events.put(("error", error))
