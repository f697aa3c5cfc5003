"""Run workers as actors of a Ray cluster.

Ray places them and says when one is lost; the driver feeds and replaces them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

import featcli
from featcli.dump.folder import SHARDS
from featcli.dump.plan import Plan, environment_changes
from featcli.dump.unfinished import remove_unused
from featcli.errors import FeatcliError, MachineError, UsageError, counted, one_line, shown
from featcli.events import Report
from featcli.inputs.image_list import is_url
from featcli.inputs.storage import Ground
from featcli.pixels import extras
from featcli.run.source import Shard
from featcli.run.stats import RunStats
from featcli.spec.commands import ExtractSpec
from featcli.spec.words import AUTO, MOST_THREADS
from featcli.system.files import state_at
from featcli.system.machine import SLEEPING_THREADS
from featcli.workers.engine import WorkOrder
from featcli.workers.internals import NO_CLUSTER, begin, imported_ray, raised_by_worker, started_worker
from featcli.workers.shard_progress import ShardProgress
from featcli.workers.shard_queue import ShardQueue, at_shards
from featcli.workers.worker import ONE_ARENA, RayWorker, WorkerSpec

CONNECT_SECONDS = 10.0
PATIENCE = 10.0  # seconds that all workers together may take to keep their rows
START_SECONDS = 120.0  # seconds in which at least one worker must get a place
MOST_SHARDS, MOST_ROWS = 8, 100_000  # that a worker is given at once


class _State(Enum):
    """What a worker is doing, in order of time."""

    UNPLACED = auto()  # Ray looks for a node: `ping` has not returned
    LOADING = auto()  # `load` has not returned
    IDLE = auto()  # nothing is awaited from it
    AT_WORK = auto()  # `make` yields what happens


@dataclass(eq=False)
class _Actor:
    """A worker and its state."""

    handle: Any
    awaited: Any  # the reference of `ping` or `load`, the generator of `make`, or None if it is idle
    progress: ShardProgress
    state: _State = _State.UNPLACED
    at_work: set[int] = field(default_factory=set)  # numbers of shards

    @property
    def has_loaded(self) -> bool:
        """Whether it can make shards."""
        return self.state in (_State.IDLE, _State.AT_WORK)

    def move_to(self, state: _State, awaited: Any = None) -> None:
        """Change the state, and what is awaited."""
        self.state, self.awaited = state, awaited


class RayEngine:
    """Workers of a Ray that is started for this run, or of the cluster at `--ray-address`."""

    def __init__(self, asked: ExtractSpec, device: str, plan: Plan, report: Report, ray: Any = None) -> None:
        """Prepare workers of the kind `device`, which is also the driver's. `ray` replaces the module in tests."""
        self._ray = ray
        self.workers = asked.workers or 1
        self.decode_threads = 1  # until the cores of the cluster are known
        self._cpus: float = plan.settings.threads if asked.cpus_per_worker is None else asked.cpus_per_worker
        self._gpus = (1.0 if device == "cuda" else 0.0) if asked.gpus_per_worker is None else asked.gpus_per_worker
        self._asked = replace(asked, checkpoint=_whole_path(asked.checkpoint), device=device)
        self._report = report
        self._living: list[_Actor] = []
        self._has_begun_ray = False
        self._warned: set[str] = set()
        self._shards: Path | None = None  # the folder of shards, once it exists

    def start(self) -> None:
        """Find the cluster, or start one. Raises UsageError without the extra, MachineError without a cluster."""
        self._ray = self._ray or imported_ray()
        if not self._ray.is_initialized():
            self._begin_ray()
        torch.cuda.empty_cache()  # this process has dropped its backbone, and a worker may get its GPU
        offered = self._offered()
        if self._gpus and self._asked.cpus_per_worker is None:
            self._cpus = self._cpus_for_a_gpu()
        fitting = [int(offered.get("CPU", 0) // self._cpus)] if self._cpus else []
        fitting += [int(offered.get("GPU", 0) / self._gpus)] if self._gpus else []
        fits = min(fitting, default=1)
        if fits < 1 and self._has_begun_ray and self._asked.ray_address is None:  # no node can be added to it
            raise MachineError(
                f"a worker wants {self._cpus:g} CPUs and {self._gpus:g} GPUs, and this machine has"
                f" {_resources(offered)}",
                "ask for less with --threads, --cpus-per-worker and --gpus-per-worker, or name a cluster",
            )
        if self._asked.workers is None:
            self.workers = max(1, fits)
        if self._asked.decode_threads == AUTO:
            self._asked = replace(self._asked, decode_threads=max(1, min(int(self._cpus), MOST_THREADS)))
        self.decode_threads = int(self._asked.decode_threads)
        each = f"{self._cpus:g} CPUs" + (f", {self._gpus:g} GPUs" if self._gpus else "")
        where = f"{self._asked.ray_address or 'a Ray of its own'}: {_resources(offered)}"
        self._report("choice", name="engine", value=f"ray, {counted(self.workers, 'worker')} of {each}", reason=where)

    def _offered(self) -> dict[str, float]:
        return self._ray.cluster_resources()  # type: ignore[no-any-return]

    def _cpus_for_a_gpu(self) -> float:
        """Return the cores for a worker with a GPU.

        They decode: each node with GPUs has this many for each of its workers.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        shares = [node.get("CPU", 0) * self._gpus // node["GPU"] for node in nodes if node.get("GPU", 0) >= self._gpus]
        return max(1, min(shares, default=1))

    def _begin_ray(self) -> None:
        address = self._asked.ray_address
        if address is not None:
            _refuse_if_nobody_is_there(address)
        try:
            begin(self._ray, address)
        except NO_CLUSTER as error:
            raise _no_cluster(address or "local", error) from error
        self._has_begun_ray = True

    def run(self, order: WorkOrder) -> RunStats:
        """Make and commit the shards.

        Raises the FeatcliError of a worker, WorkerError, or MachineError if no worker starts.
        """
        self._shards = order.dump.path / SHARDS
        stats, queue, began = RunStats(), ShardQueue(order.shards, order.dump.rows_kept), time.monotonic()
        self._fill_up(queue, order)
        has_started, placed = False, began
        while not queue.is_over or any(one.state is _State.AT_WORK for one in self._living):
            ready, _ = self._ray.wait([one.awaited for one in self._living], timeout=1.0)
            for reference in ready:
                actor = next(one for one in self._living if one.awaited == reference)
                self._hear(actor, queue, stats, order)
            if not has_started and any(one.has_loaded for one in self._living):
                has_started, stats.timings.preparation = True, time.monotonic() - began
            if any(one.state is not _State.UNPLACED for one in self._living):
                placed = time.monotonic()
            elif time.monotonic() - placed > START_SECONDS:
                raise MachineError(
                    f"no worker has had a place for {START_SECONDS:.0f} s: each asks for {self._cpus:g} CPUs and"
                    f" {self._gpus:g} GPUs, and the cluster offers {_resources(self._offered())}",
                    "ask for less with --cpus-per-worker and --gpus-per-worker, or run ray status to see what is free",
                )
            self._fill_up(queue, order)
        queue.refuse_given_up()
        return stats

    def close(self) -> None:
        """End all workers once they have kept their rows, and end the Ray that was started here."""
        with suppress(Exception):  # the cluster may be in any state
            keeping = [one.handle.keep.remote() for one in self._living if one.state is _State.AT_WORK]
            if keeping:
                self._ray.wait(keeping, num_returns=len(keeping), timeout=PATIENCE)
        for actor in self._living:
            with suppress(Exception):  # the cluster may be in any state
                self._ray.kill(actor.handle)
        self._living.clear()
        if self._has_begun_ray:
            self._ray.shutdown()
            self._has_begun_ray = False
        if self._shards is not None:
            with suppress(MachineError):
                remove_unused(self._shards)  # files of workers that were ended

    def _fill_up(self, queue: ShardQueue, order: WorkOrder) -> None:
        """Give shards to each worker that has none, and start workers for the shards that are left."""
        for actor in [one for one in self._living if one.state is _State.IDLE]:
            # A worker gets several shards, because it prefetches from one to the next. It gets fewer towards the end,
            # so that all end together.
            most = min(MOST_SHARDS, MOST_ROWS // order.dump.plan.shard_rows, queue.num_new // (4 * self.workers))
            together = max(1, most)
            numbers = [number for _ in range(together) if (number := queue.take_new()) is not None]
            if not numbers and (number := queue.take_again()) is not None:
                numbers = [number]
            if numbers:
                actor.at_work.update(numbers)
                shards = [_with_whole_paths(order.shard(number)) for number in numbers]
                actor.move_to(_State.AT_WORK, actor.handle.make.remote(shards))
        while queue.wants_workers and len(self._living) < min(self.workers, len(order.shards)):
            self._start_worker(order)
        for actor in [one for one in self._living if one.state is _State.IDLE]:  # no shard is left for it
            self._end(actor)

    def _start_worker(self, order: WorkOrder) -> None:
        environment = SLEEPING_THREADS | ({} if self._gpus else ONE_ARENA)
        path, into = os.path.abspath(order.dump.path), order.into
        spec = WorkerSpec(asked=self._asked, path=path, again=into.again, resized=into.resized)
        wants = {"num_cpus": self._cpus, "num_gpus": self._gpus}
        handle = started_worker(self._ray, RayWorker, spec, wants, environment)
        progress = ShardProgress(order.dump.plan, self._report)
        self._living.append(_Actor(handle=handle, awaited=handle.ping.remote(), progress=progress))

    def _hear(self, actor: _Actor, queue: ShardQueue, stats: RunStats, order: WorkOrder) -> None:
        try:
            if actor.state is _State.UNPLACED:
                self._ray.get(actor.awaited)
                actor.move_to(_State.LOADING, actor.handle.load.remote())
            elif actor.state is _State.LOADING:
                self._check(self._ray.get(actor.awaited), order)
                actor.move_to(_State.IDLE)
                queue.worker_started()
            else:
                self._hear_of_shard(actor, queue, stats)
        except self._ray.exceptions.RayError as error:
            cause = raised_by_worker(self._ray, error)
            if isinstance(cause, FeatcliError):
                raise cause from None
            # A worker is lost if it was killed, is out of memory, or cannot be reached.
            why = f"lost ({type(error).__name__})" if cause is None else f"{type(cause).__name__}: {one_line(cause)}"
            self._bury(actor, queue, why, stats, order)

    def _hear_of_shard(self, actor: _Actor, queue: ShardQueue, stats: RunStats) -> None:
        kind, content = self._ray.get(next(actor.awaited))
        if kind == "stats":
            stats.add(content)
        elif kind == "done":
            actor.move_to(_State.IDLE)
        else:
            done = actor.progress.hear(*content)
            if done is not None:
                actor.at_work.discard(done)
                queue.done(done)

    def _check(self, environment: dict[str, str], order: WorkOrder) -> None:
        """Raise UsageError if a worker has another version. Report other differences that may change the last bits."""
        if environment.get("featcli") != featcli.__version__:
            raise UsageError(
                f"a worker has featcli {environment.get('featcli')}, this is {featcli.__version__}",
                "install the same version on all nodes of the cluster",
            )
        images = order.pictures.images
        keys = (images[row].key for row in range(len(images)))
        extras.refuse_without(order.dump.packages, keys, environment, str(order.dump.path))
        other = environment_changes(order.dump.plan.environment, environment)
        if other and (text := ", ".join(other)) not in self._warned:
            self._warned.add(text)
            self._report("warning", text=f"a worker is not like the others, so last bits may differ: {text}")

    def _bury(self, actor: _Actor, queue: ShardQueue, why: str, stats: RunStats, order: WorkOrder) -> None:
        self._report("warning", text=f"a worker died{at_shards(actor.at_work)}: {why}")
        stats.images += actor.progress.take_back()
        self._end(actor)
        remove_unused(order.dump.path / SHARDS)  # the file that it was writing
        queue.died(actor.at_work, why, actor.has_loaded, is_last=not self._living)

    def _end(self, actor: _Actor) -> None:
        self._living.remove(actor)
        with suppress(Exception):  # it may be gone already
            self._ray.kill(actor.handle)


def _refuse_if_nobody_is_there(address: str) -> None:
    """Raise MachineError if nobody answers at an address: Ray would end the process. Raise UsageError if it is none."""
    if address == "auto":
        return  # Ray finds a cluster of this machine by itself
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(
            f"--ray-address {shown(address)} is not host:port", "give the address of the head node, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> MachineError:
    return MachineError(
        f"--ray-address {shown(address)}: {one_line(error)}",
        "run ray status there; Python and Ray need the same versions as the cluster's",
    )


def _with_whole_paths(shard: Shard) -> Shard:
    """Return the same shard with absolute paths, for a process that runs in another folder."""
    assert isinstance(shard.pictures.images, Mapping)  # of this shard alone
    images = {
        row: image._replace(
            path=_from_the_root(image.path),
            folder=_from_the_root(image.folder or os.curdir),
            grounds=tuple(Ground(_from_the_root(ground.path), None) for ground in image.grounds),  # of another machine
        )
        for row, image in shard.pictures.images.items()
    }
    return replace(shard, pictures=replace(shard.pictures, images=images))


def _from_the_root(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _whole_path(checkpoint: Any) -> Any:
    """Return the absolute path of a checkpoint that is a file or folder here. Names and configurations stay.

    Raises MachineError if nobody can tell.
    """
    is_path = isinstance(checkpoint, str | os.PathLike) and state_at(checkpoint, follow_links=False) is not None
    return os.path.abspath(checkpoint) if is_path else checkpoint


def _resources(offered: dict[str, float]) -> str:
    return f"{offered.get('CPU', 0):g} CPUs, {offered.get('GPU', 0):g} GPUs"
