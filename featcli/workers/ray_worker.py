"""A worker of a Ray cluster, and the environment that it is started in."""

from __future__ import annotations

import queue as queues
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from featcli.dump.lock import FolderLock
from featcli.run.source import Shard
from featcli.workers.worker import WorkerSpec, runner_for

# Shards are made in a thread that is not the first of its process, and only of the first arena does glibc keep the
# memory of large tensors.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


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
