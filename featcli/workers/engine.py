"""Define who makes the shards: this process, several processes of this machine, or a Ray cluster.

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
    lock: int  # descriptor of the lock on the folder, which holds as long as any process has it open
    is_new: bool = False  # whether the dump was begun for this order

    @property
    def dump(self) -> Dump:
        """The dump that the shards belong to."""
        return self.into.dump

    def shard(self, number: int) -> Shard:
        """Return a shard with its own images alone, which can be sent to another process."""
        rows = self.dump.plan.shard(number)
        return Shard(number, rows, self.pictures.of(rows))


class Engine(Protocol):
    """A way to make shards."""

    workers: int  # processes that make them, if there are enough shards
    decode_threads: int  # of each process

    def start(self) -> None:
        """Do all that can fail before anything is written. Raises FeatcliError."""

    def run(self, order: WorkOrder) -> RunStats:
        """Make and commit the shards. Raises FeatcliError, and WorkerError if shards were given up."""

    def close(self) -> None:
        """End everything that was started, whatever happened."""


class LocalEngine:
    """One worker, which is this process. Its backbone is already loaded."""

    workers = 1

    def __init__(self, setup: Setup, report: Report) -> None:
        self.decode_threads = setup.decoder.threads
        self._runner = ShardRunner(setup, report)

    def start(self) -> None:
        """Compile the network if that was asked for. Raises MachineError."""
        self._runner.compile()

    def run(self, order: WorkOrder) -> RunStats:
        """Make and commit the shards. Raises FeatcliError."""
        stats, plan = RunStats(), order.dump.plan
        shards = (Shard(number, plan.shard(number), order.pictures) for number in order.shards)
        self._runner.run(order.into, shards, stats.add)
        return stats

    def close(self) -> None:
        """Do nothing, because nothing was started."""
