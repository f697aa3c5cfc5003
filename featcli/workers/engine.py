"""Who makes the shards: this process, several processes of this machine, or a Ray cluster.

An engine moves numbers of shards and names of images, never tensors: workers write their shards themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from featcli.dump.folder import Dump
from featcli.dump.writer import DumpWriter
from featcli.events import Report
from featcli.pixels.batches import SizedImages
from featcli.run.loading import Setup
from featcli.run.pipeline import ShardRunner
from featcli.run.source import Shard
from featcli.run.stats import RunStats


@dataclass(frozen=True)
class WorkOrder:
    """The shards of a dump that are to be made, and the images of all rows."""

    into: DumpWriter
    shards: Sequence[int]
    pictures: SizedImages
    lock: int  # the descriptor of the lock on the folder, which holds as long as any process has it
    is_new: bool = False  # the dump was begun for this order

    @property
    def dump(self) -> Dump:
        """Whose shards they are."""
        return self.into.dump

    def shard(self, number: int) -> Shard:
        """One of them with its own images alone, which can be sent to another process."""
        rows = self.dump.plan.shard(number)
        return Shard(number, rows, self.pictures.of(rows))


class Engine(Protocol):
    """How shards are made."""

    workers: int  # processes that do it, where there are shards enough
    decode_threads: int  # of each of them

    def start(self) -> None:
        """Whatever can fail before anything is written. Raises FeatcliError."""

    def run(self, order: WorkOrder) -> RunStats:
        """Make and commit the shards. Raises FeatcliError; WorkerError where shards were given up."""

    def close(self) -> None:
        """End what was started, whatever happened."""


class LocalEngine:
    """One worker: this process, which has loaded the backbone already."""

    workers = 1

    def __init__(self, setup: Setup, report: Report) -> None:
        self.decode_threads = setup.decoder.threads
        self._runner = ShardRunner(setup, report)

    def start(self) -> None:
        """Compile, where that was asked for. Raises MachineError."""
        self._runner.compile()

    def run(self, order: WorkOrder) -> RunStats:
        """Raises FeatcliError."""
        stats, plan = RunStats(), order.dump.plan
        shards = (Shard(number, plan.shard(number), order.pictures) for number in order.shards)
        self._runner.run(order.into, shards, stats.add)
        return stats

    def close(self) -> None:
        """There is nothing to end."""
