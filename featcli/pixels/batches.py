"""Fill batch buffers in order, ahead of the backbone. Pillow releases the GIL while it decodes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch

from featcli.inputs.image_list import Image, ImageList, is_url
from featcli.pixels.decode_processes import DecodeProcesses
from featcli.pixels.decoder import Decoder, Outcomes
from featcli.pixels.failure import Failure
from featcli.pixels.internals import pillow_set_up
from featcli.pixels.sizes import Sizes
from featcli.pixels.traits import Trait
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    import numpy as np

    Fill = Callable[[Sequence[Image], range, np.ndarray], Outcomes]

AHEAD = 2  # batches that are decoded while the backbone works on another


@dataclass(frozen=True)
class SizedImages:
    """The images of a run, or some of them by row, and the input size of each."""

    images: ImageList | Mapping[int, Image]
    sizes: Sizes

    def of(self, rows: range) -> SizedImages:
        """Return the part for some neighbouring rows, which can be sent to another process."""
        return SizedImages({row: self.images[row] for row in rows}, self.sizes.of(rows))


@dataclass
class Batch:
    """Images that go through the backbone together. It is valid until the next batch, which uses the same buffers."""

    rows: range
    pixels: torch.Tensor  # (B, C, H, W)
    failures: list[Failure] = field(default_factory=list)  # in row order; the pixels of failed images are zero
    traits: Counter[Trait] = field(default_factory=Counter)  # how many images have each trait
    digests: list[str] = field(default_factory=list)  # of the bytes of each file; NOT_READ if they were not read
    decode_seconds: float = 0.0  # the sum over all threads


def read(decoder: Decoder, batches: Iterable[tuple[SizedImages, range]]) -> Generator[Batch, None, None]:
    """Yield the batches (rows of one size) in order. Threads or processes decode each, at most AHEAD batches early.

    Raises MachineError and CheckpointError.
    """
    left, dtype = iter(batches), getattr(torch, decoder.preprocessing.dtype)
    buffers: list[torch.Tensor] = []  # flat, because batches may differ in size
    waiting: deque[tuple[range, torch.Tensor, torch.Tensor, Outcomes]] = deque()
    with _filling(decoder) as fill:

        def start_next() -> None:
            pictures, rows = next(left, (None, range(0)))
            if pictures is None:
                return
            shape = (len(rows), decoder.preprocessing.channels, *pictures.sizes[rows.start])
            buffer = buffers.pop() if buffers else torch.empty(0, dtype=dtype)
            if len(buffer) < prod(shape):
                buffer = torch.empty(prod(shape), dtype=dtype, pin_memory=decoder.pinned)
            pixels = buffer[: prod(shape)].view(shape)
            images = [pictures.images[row] for row in rows]
            waiting.append((rows, buffer, pixels, fill(images, rows, pixels.numpy())))

        for _ in range(AHEAD + 1):
            start_next()
        while waiting:
            rows, buffer, pixels, outcomes = waiting.popleft()
            results = outcomes()
            yield Batch(
                rows=rows,
                pixels=pixels,
                failures=[result.failure for result in results if result.failure is not None],
                traits=Counter(trait for result in results for trait in result.traits),
                digests=[result.digest for result in results],
                decode_seconds=sum(result.seconds for result in results),
            )
            buffers.append(buffer)
            start_next()


@contextmanager
def _filling(decoder: Decoder) -> Iterator[Fill]:
    """Yield a function that has images decoded, by threads of this process or by processes beside it.

    Pictures in memory stay in this process, because they would have to be copied, and so do those behind URLs: what
    waits for a network waits without the interpreter's lock.
    """
    with pillow_set_up(decoder.rules.max_pixels), DecodeThreads(decoder.threads, "decode") as pool:

        def by_threads(images: Sequence[Image], rows: range, out: np.ndarray) -> Outcomes:
            futures = [pool.submit(decoder.fill, *each) for each in zip(images, rows, out, strict=True)]
            return lambda: [future.result() for future in futures]

        if not decoder.processes:
            yield by_threads
            return
        with DecodeProcesses(decoder, AHEAD + 1) as processes:

            def by_either(images: Sequence[Image], rows: range, out: np.ndarray) -> Outcomes:
                stays = any(one.picture is not None or is_url(one.path) for one in images)
                return (by_threads if stays else processes.fill)(images, rows, out)

            yield by_either
