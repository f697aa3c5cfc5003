"""Shards -> batches of decoded images, each knowing its shard. Used by one thread: the one that feeds the backbone."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from featcli.dump.writer import DumpWriter
from featcli.events import Report
from featcli.pixels import batches
from featcli.pixels.batches import Batch, Decoder, SizedImages


@dataclass(frozen=True)
class Shard:
    """A shard that is to be made; what an engine gives to a worker."""

    number: int
    rows: range
    pictures: SizedImages  # of these rows; where all of it stays in one process, of all rows


@dataclass
class ShardBatch(Batch):
    """A batch of images of one shard."""

    shard: Shard = field(kw_only=True)

    @property
    def ends_shard(self) -> bool:
        """Whether it is the last of its shard."""
        return self.rows.stop == self.shard.rows.stop


class Source:
    """Decodes the images of shards, batch by batch in their order, some batches ahead of whoever takes them."""

    def __init__(self, decoder: Decoder, into: DumpWriter, report: Report) -> None:
        self._decoder = decoder
        self._into = into
        self._report = report
        self._ahead: deque[Shard] = deque()  # the shard of each batch that is being decoded

    def batches(self, shards: Iterable[Shard]) -> Generator[ShardBatch, None, None]:
        """The batches of these shards, but for those that another process has committed by the time they are reached.

        The next shards are asked for while batches of those before are still on their way.
        """
        with closing(batches.read(self._decoder, self._wanted(shards))) as decoded:
            for batch in decoded:
                yield ShardBatch(**vars(batch), shard=self._ahead.popleft())

    def _wanted(self, shards: Iterable[Shard]) -> Iterator[tuple[SizedImages, range]]:
        for shard in shards:
            if self._into.is_done(shard.number):
                self._report("there", shard=shard.number, images=len(shard.rows))
                continue
            for rows in shard.pictures.sizes.batches(shard.rows, self._into.dump.plan.settings.batch_size):
                self._ahead.append(shard)
                yield shard.pictures, rows
