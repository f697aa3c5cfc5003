"""Turn shards into committed shards in one process, in order. Every engine runs this.

rows of a shard  -> batches of pixels       run/source.py    ahead, by the threads that decode
a batch          -> maps, pooled and cast   run/forward.py   on the device, fed by the thread that runs this
maps             -> bytes of a shard file   run/sink.py      by the writer thread, each minute put on the disk
the last bytes   -> a committed shard       run/sink.py      likewise
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from featcli.dump.atomic_file import disk_errors
from featcli.dump.writer import DumpWriter
from featcli.events import Report
from featcli.run.background import Background
from featcli.run.forward import Forward
from featcli.run.loading import Setup
from featcli.run.sink import Sink
from featcli.run.source import Shard, ShardBatch, Source
from featcli.run.stats import RunStats
from featcli.system.device import memory_errors, settled_arithmetic
from featcli.system.machine import give_memory_back, kept_memory

QUEUED_BATCHES = 2  # batches that may wait for the writer
TIDY_SECONDS = 30.0  # between two times when free memory goes back to the system; seldom, because it is needed again


class ShardRunner:
    """Makes shards of a dump with what is loaded. It can be used again and again."""

    def __init__(self, setup: Setup, report: Report) -> None:
        self._setup = setup
        self._report = report
        self._forward = Forward(setup, report)
        self._sink: Sink | None = None

    def compile(self) -> None:
        """Let torch.compile do its work now, before anything is written. Raises MachineError."""
        if self._setup.backbone.execution.compiled:
            with settled_arithmetic(self._setup.threads, self._setup.backbone.device):
                self._forward.compile()

    def run(self, into: DumpWriter, shards: Iterable[Shard], count: Callable[[RunStats], None]) -> None:
        """Extract these shards and commit each. Shards that another process has committed meanwhile are skipped.

        The next shards are taken while those before are still being made. `count` gets the statistics of each shard
        when it is committed, and the times at the end. Raises FeatcliError.
        """
        device, plan, stats = self._setup.backbone.device, into.dump.plan, RunStats()
        source, sink = Source(self._setup.decoder, into, self._report), Sink(into, self._report, count)
        self._sink = sink
        # Python leaves these in reverse order. So the writer thread first writes what was computed, then the sink keeps
        # the rows of an unfinished shard, then decoding stops. Errors of all three pass through the blocks that turn
        # them into messages.
        with (
            _settled_process(self._setup.threads, device),
            _errors_of_the_machine(device, into.dump.path),
            source,
            closing(source.batches(shards)) as batches,
            sink,
            Background(QUEUED_BATCHES * plan.settings.batch_size * plan.row_bytes) as writer,
        ):
            self._stream(batches, sink, writer, stats)
        stats.timings.compute, stats.timings.waited_for_compute = sink.compute_seconds, sink.waited_seconds
        stats.timings.write = writer.busy_seconds - sink.waited_seconds
        # If the writer waited for the device, then the device did not wait for the writer during that time.
        stats.timings.waited_for_write = max(0.0, writer.waited_seconds - sink.waited_seconds)
        count(stats)

    def keep(self) -> None:
        """Put all written rows on the disk now, while another thread is in `run`. Raises OSError."""
        if self._sink is not None:
            self._sink.keep()

    def _stream(self, batches: Iterable[ShardBatch], sink: Sink, writer: Background, stats: RunStats) -> None:
        """Turn rows into batches, batches into maps, maps into bytes, and bytes into a committed shard."""
        began = tidied = time.perf_counter()
        for batch in batches:
            stats.timings.waited_for_decode += time.perf_counter() - began
            stats.timings.decode += batch.decode_seconds
            rows = self._forward(batch)
            for failure in batch.failures:
                self._report("failure", **failure.to_json())
            writer.give(partial(sink.write, batch, rows, self._forward.micro_batch), rows.nbytes)
            del rows  # the writer frees their memory
            self._report("batch", images=len(batch.rows))
            began = time.perf_counter()
            if began - tidied > TIDY_SECONDS:
                give_memory_back()
                tidied = began


@contextmanager
def _settled_process(threads: int, device: torch.device) -> Iterator[None]:
    """Set threads and exact arithmetic, and keep the memory of large tensors, while shards are made."""
    with settled_arithmetic(threads, device), kept_memory():
        yield


@contextmanager
def _errors_of_the_machine(device: torch.device, dump: Path) -> Iterator[None]:
    """Turn errors of memory and disk into a MachineError, which says in one line what to do."""
    with memory_errors("the images do", device), disk_errors(dump):
        yield
