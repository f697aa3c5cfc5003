"""Turn shards into batches of decoded images, each with its shard. Only the thread that feeds the backbone uses it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from featcli.dump.plan import Output
from featcli.dump.writer import BegunShard, DumpWriter
from featcli.events import Report
from featcli.pixels import batches
from featcli.pixels.batches import Batch, SizedImages
from featcli.pixels.decoder import Decoder


@dataclass(frozen=True)
class Shard:
    """A shard that is to be made, as an engine gives it to a worker."""

    number: int
    rows: range
    pictures: SizedImages  # of these rows, or of all rows if it stays in this process

    @cached_property
    def keys(self) -> list[str]:
        """The keys of its rows, in order."""
        return [self.pictures.images[row].key for row in self.rows]

    def shapes(self, stages: Iterable[Output]) -> dict[str, np.ndarray]:
        """Return (rows, 3) shapes for each stage whose maps differ in size."""
        return {one.name: one.shapes(self.pictures.sizes.own_of(self.rows)) for one in stages if one.is_ragged}


@dataclass
class ShardBatch(Batch):
    """A batch of images from one shard."""

    shard: Shard = field(kw_only=True)
    begun: BegunShard | None = None  # what an earlier run left of the shard; only the first batch after it has this

    @property
    def ends_shard(self) -> bool:
        """Whether it is the last batch of its shard."""
        return self.rows.stop == self.shard.rows.stop


class Source:
    """Decodes the images of shards in order, some batches ahead of whoever takes them."""

    def __init__(self, decoder: Decoder, into: DumpWriter, report: Report) -> None:
        self._decoder = decoder
        self._into = into
        self._report = report
        # The shard of each batch that is being decoded.
        self._ahead: deque[tuple[Shard, BegunShard | None]] = deque()
        self._begun: list[BegunShard] = []  # shards that were resumed

    def batches(self, shards: Iterable[Shard]) -> Generator[ShardBatch, None, None]:
        """Yield the batches of these shards, except of those that another process has committed by then.

        A shard that an earlier run has begun gives only the batches that are left. The next shards are taken while
        batches of those before are still being decoded.
        """
        with closing(batches.read(self._decoder, self._wanted(shards))) as decoded:
            for batch in decoded:
                shard, begun = self._ahead.popleft()
                yield ShardBatch(**vars(batch), shard=shard, begun=begun)

    def _wanted(self, shards: Iterable[Shard]) -> Iterator[tuple[SizedImages, range]]:
        for shard in shards:
            if self._into.is_done(shard.number):
                self._report("there", shard=shard.number, rows=len(shard.rows), images=len(shard.rows))
                continue
            batch_rows = list(shard.pictures.sizes.batches(shard.rows, self._into.dump.plan.settings.batch_size))
            begun = self._take_up(shard, [rows.start for rows in batch_rows])
            done = shard.rows.start + (0 if begun is None else begun.made.count)
            for rows in batch_rows:
                if rows.start >= done:
                    self._ahead.append((shard, begun if rows.start == done else None))
                    yield shard.pictures, rows

    def _take_up(self, shard: Shard, starts: Sequence[int]) -> BegunShard | None:
        """Return what an earlier run has left of a shard, or None."""
        shapes = shard.shapes(self._into.dump.plan.outputs)
        begun = self._into.take_up(shard.number, shard.keys, shapes, starts, self._report)
        if begun is not None:
            self._begun.append(begun)
            self._report("resumed", shard=shard.number, rows=begun.made.count)
            for failure in begun.made.failures:
                self._report("failure", **failure.to_json())
        return begun

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._begun:  # shards without a batch are still open
            self._into.leave(one)
