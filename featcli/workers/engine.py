"""Who makes the shards: this process, several processes of this machine, or a Ray cluster.

An engine moves numbers of shards and names of images, never tensors: workers write their shards themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from featcli.dump.folder import Dump
from featcli.pixels.batches import Pictures
from featcli.run.pipeline import Tally


@dataclass(frozen=True)
class ToDo:
    """The shards of a dump that are to be made, and the images of all rows."""

    dump: Dump
    shards: Sequence[int]
    pictures: Pictures
    lock: int  # the descriptor of the lock on the folder, which holds as long as any process has it


class Engine(Protocol):
    """How shards are made."""

    workers: int  # processes that do it, where there are shards enough
    decode_threads: int  # of each of them

    def start(self) -> None:
        """Whatever can fail before anything is written. Raises FeatcliError."""

    def run(self, todo: ToDo) -> Tally:
        """Make and commit the shards. Raises FeatcliError; WorkerError where shards were given up."""

    def close(self) -> None:
        """End what was started, whatever happened."""
