"""Run one process for each device of this machine. This process feeds and watches them, and replaces one that dies."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from featcli.dump.folder import SHARDS
from featcli.dump.unfinished import remove_unused
from featcli.events import Report
from featcli.run.stats import RunStats
from featcli.spec.commands import ExtractSpec
from featcli.system.child import start_python, wait_or_kill
from featcli.system.faults import how_it_ended
from featcli.system.machine import SLEEPING_THREADS
from featcli.workers.engine import WorkOrder
from featcli.workers.shard_progress import ShardProgress
from featcli.workers.shard_queue import ShardQueue, at_shards
from featcli.workers.worker import WorkerSpec

PATIENCE = 10.0  # seconds that a worker may take to end when it is told to
PROGRAM = "from featcli.workers.worker import main; main({socket}, {lock})"


@dataclass(eq=False)
class _Worker:
    """A worker process and its state."""

    place: int  # index of its device
    process: subprocess.Popen[bytes]
    connection: Connection
    progress: ShardProgress
    at_work: set[int] = field(default_factory=set)
    has_started: bool = False
    is_idle: bool = False  # whether it waits for a shard
    is_alone: bool = False  # whether its shard has to be its only one
    crash: str = ""  # what it said about its end


class ProcessEngine:
    """Workers on this machine, each for one device. A device may be named more than once."""

    def __init__(self, asked: ExtractSpec, devices: Sequence[str], decode_threads: int, report: Report) -> None:
        self.workers = len(devices)
        self.decode_threads = decode_threads
        self._asked = replace(asked, decode_threads=decode_threads)
        self._devices = devices
        self._report = report
        self._living: list[_Worker] = []

    def start(self) -> None:
        """Make room on the GPU. Workers start later, with the first shards, because they read the plan."""
        torch.cuda.empty_cache()  # does nothing without a GPU

    def run(self, order: WorkOrder) -> RunStats:
        """Make and commit the shards. Raises the FeatcliError of a worker, or WorkerError."""
        stats, queue = RunStats(), ShardQueue(order.shards, order.dump.rows_kept)
        for place in range(min(self.workers, len(order.shards))):
            self._start_worker(place, order)
        while self._living:
            for connection in wait([worker.connection for worker in self._living]):
                worker = next(one for one in self._living if one.connection is connection)
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    self._bury(worker, queue, stats, order)
                else:
                    self._hear(worker, kind, content, queue, stats, order)
                self._serve_idle(queue, order)
        queue.refuse_given_up()
        return stats

    def close(self) -> None:
        """End all workers. What they have not committed is left out."""
        for worker in self._living:
            worker.process.terminate()
        for worker in self._living:
            wait_or_kill(worker.process, PATIENCE)
            worker.connection.close()
        self._living.clear()

    def _start_worker(self, place: int, order: WorkOrder) -> None:
        device, environment = as_the_only_one(self._devices[place])
        # The command line sets how threads wait for itself, too; what the user has set comes first.
        settings = {name: value for name, value in SLEEPING_THREADS.items() if name not in os.environ}
        program = PROGRAM.replace("{lock}", str(order.lock))
        process, connection = start_python(program, [order.lock], {**settings, **environment})
        worker = _Worker(place, process, connection, ShardProgress(order.dump.plan, self._report))
        self._living.append(worker)
        asked, path, into = replace(self._asked, device=device), str(order.dump.path), order.into
        _tell(worker, WorkerSpec(asked=asked, path=path, again=into.again, resized=into.resized))

    def _hear(
        self, worker: _Worker, kind: str, content: Any, queue: ShardQueue, stats: RunStats, order: WorkOrder
    ) -> None:
        if kind == "event":
            done = worker.progress.hear(*content)
            if done is not None:
                worker.at_work.discard(done)
                queue.done(done)
        elif kind == "more":
            self._answer(worker, None if worker.is_alone else queue.take_new(), order)
        elif kind == "idle":
            worker.has_started = True
            queue.worker_started()
            if not stats.timings.preparation:
                stats.timings.preparation = time.perf_counter() - stats.timings.started
            worker.is_idle, worker.is_alone = True, False
        elif kind == "stats":
            stats.add(content)
        elif kind == "crash":
            worker.crash = content
        else:
            raise content  # it is a FeatcliError

    def _serve_idle(self, queue: ShardQueue, order: WorkOrder) -> None:
        for worker in [one for one in self._living if one.is_idle]:
            number = queue.take_new()
            if number is None:
                number = queue.take_again()
                worker.is_alone = number is not None
            if number is not None or queue.is_over:
                worker.is_idle = False
                self._answer(worker, number, order)

    def _answer(self, worker: _Worker, number: int | None, order: WorkOrder) -> None:
        if number is None:
            _tell(worker, None)
            return
        worker.at_work.add(number)
        _tell(worker, order.shard(number))

    def _bury(self, worker: _Worker, queue: ShardQueue, stats: RunStats, order: WorkOrder) -> None:
        """Remove a worker that ended or died, and start another one if it is needed."""
        self._living.remove(worker)
        worker.connection.close()
        code = wait_or_kill(worker.process, PATIENCE)
        stats.images += worker.progress.take_back()
        if code == 0 and not worker.at_work:
            return
        why = worker.crash or how_it_ended(code)
        name = f"worker {worker.place} ({self._devices[worker.place]})"
        self._report("warning", text=f"{name} died{at_shards(worker.at_work)}: {why}")
        remove_unused(order.dump.path / SHARDS)  # the file that it was writing
        queue.died(worker.at_work, why, worker.has_started, is_last=not self._living)
        self._serve_idle(queue, order)
        if queue.wants_workers:  # otherwise the workers that live do the rest
            self._start_worker(worker.place, order)


def _tell(worker: _Worker, content: Any) -> None:
    with suppress(OSError):  # it is dead, which is found when it is listened to
        worker.connection.send(content)


def as_the_only_one(device: str) -> tuple[str, dict[str, str]]:
    """Return the name of a GPU for a process that sees only it: libraries take memory of the first GPU they see."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device, {}
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return "cuda:0", {"CUDA_VISIBLE_DEVICES": visible[int(number or 0)] if visible else number or "0"}
