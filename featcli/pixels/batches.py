"""Fill batch buffers in order, by decode threads ahead of the backbone. Pillow releases the GIL while it decodes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch

from featcli.inputs.image_list import Image, ImageList
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import NOT_READ, Failure, UnreadableError
from featcli.pixels.internals import pillow_set_up
from featcli.pixels.sizes import Sizes
from featcli.pixels.traits import Trait
from featcli.spec.groups import PixelSpec
from featcli.spec.words import Decode
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    import numpy as np

AHEAD = 2  # batches that are decoded while the backbone works on another


class Pixels(Protocol):
    """What batches need to know of a backbone's preprocessing."""

    def fit_for(self, decode: Decode) -> Callable[[Any], np.ndarray]:
        """Return a function that turns an RGB picture, or bands that are each RGB, into (C, H, W) values of `dtype`.

        For "fast" it also takes arrays (H, W, 3).
        """

    @property
    def channels(self) -> int:
        """The number of channels C."""

    @property
    def dtype(self) -> str:
        """The name of the dtype, which torch and numpy share."""

    @property
    def is_native(self) -> bool:
        """Whether each picture has an input size of its own."""


@dataclass(frozen=True)
class SizedImages:
    """The images of a run, or some of them by row, and the input size of each."""

    images: ImageList | Mapping[int, Image]
    sizes: Sizes

    def of(self, rows: range) -> SizedImages:
        """Return the part for some neighbouring rows, which can be sent to another process."""
        return SizedImages({row: self.images[row] for row in rows}, self.sizes.of(rows))


@dataclass(frozen=True)
class Decoder:
    """How an image becomes pixels."""

    rules: PixelSpec
    preprocessing: Pixels
    threads: int
    pinned: bool = False  # whether buffers are in memory that a GPU can copy from by itself


@dataclass
class Batch:
    """Images that go through the backbone together. It is valid until the next batch, which uses the same buffers."""

    rows: range
    pixels: torch.Tensor  # (B, C, H, W)
    failures: list[Failure] = field(default_factory=list)  # in row order; the pixels of failed images are zero
    traits: Counter[Trait] = field(default_factory=Counter)  # how many images have each trait
    digests: list[str] = field(default_factory=list)  # of the bytes of each file; NOT_READ if they were not read
    decode_seconds: float = 0.0  # the sum over all threads


@dataclass(frozen=True)
class _Outcome:
    """The result of decoding one image."""

    failure: Failure | None
    traits: tuple[Trait, ...]
    digest: str
    seconds: float


def read(decoder: Decoder, batches: Iterable[tuple[SizedImages, range]]) -> Generator[Batch, None, None]:
    """Yield the batches (rows of one size) in order. Several threads decode each, at most AHEAD batches early."""
    left, dtype = iter(batches), getattr(torch, decoder.preprocessing.dtype)
    buffers: list[torch.Tensor] = []  # flat, because batches may differ in size
    waiting: deque[tuple[range, torch.Tensor, torch.Tensor, list[Future[_Outcome]]]] = deque()
    with pillow_set_up(decoder.rules.max_pixels), DecodeThreads(decoder.threads, "decode") as pool:

        def start_next() -> None:
            pictures, rows = next(left, (None, range(0)))
            if pictures is None:
                return
            shape = (len(rows), decoder.preprocessing.channels, *pictures.sizes[rows.start])
            buffer = buffers.pop() if buffers else torch.empty(0, dtype=dtype)
            if len(buffer) < prod(shape):
                buffer = torch.empty(prod(shape), dtype=dtype, pin_memory=decoder.pinned)
            pixels = buffer[: prod(shape)].view(shape)
            array = pixels.numpy()
            futures = [pool.submit(_fill, decoder, pictures.images[row], row, array[i]) for i, row in enumerate(rows)]
            waiting.append((rows, buffer, pixels, futures))

        for _ in range(AHEAD + 1):
            start_next()
        while waiting:
            rows, buffer, pixels, futures = waiting.popleft()
            results = [future.result() for future in futures]
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


def _fill(decoder: Decoder, image: Image, row: int, out: np.ndarray) -> _Outcome:
    started = time.perf_counter()
    preprocessing, failure = decoder.preprocessing, None
    traits: tuple[Trait, ...] = ()
    digests = [NOT_READ]
    try:
        fit = preprocessing.fit_for(decoder.rules.decode)
        traits = read_pixels(image, decoder.rules, fit, out, preprocessing.is_native, digests.append)
    except UnreadableError as error:
        out[...] = 0  # else the pixels of the image before would stay in the buffer
        failure = Failure(key=image.key, row=row, reason=error.reason, detail=error.detail)
    return _Outcome(failure, traits, digests[-1], time.perf_counter() - started)
