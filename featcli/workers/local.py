"""All shards in this process."""

from __future__ import annotations

from featcli.cli.terminal import Report
from featcli.run.loading import Loaded
from featcli.run.pipeline import Shard, ShardRunner, Tally
from featcli.workers.engine import ToDo


class LocalEngine:
    """One worker: this process, which has loaded the backbone already."""

    workers = 1

    def __init__(self, loaded: Loaded, report: Report) -> None:
        self.decode_threads = loaded.reading.threads
        self._runner = ShardRunner(loaded, report)

    def start(self) -> None:
        """Compile, where that was asked for. Raises MachineError."""
        self._runner.compile()

    def run(self, todo: ToDo) -> Tally:
        """Raises FeatcliError."""
        tally = Tally()
        self._runner.run(todo.dump, (Shard(number, todo.pictures) for number in todo.shards), tally.add)
        return tally

    def close(self) -> None:
        """There is nothing to end."""
