"""Decode threads filling batch buffers in order, ahead of the backbone. Pillow releases the GIL while it decodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from featcli.images import Failure, UnreadableError, read_pixels
from featcli.inputs import ImageList

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as Picture

AHEAD = 2  # batches that are being decoded while the backbone works on another


class Fitting(Protocol):
    """What must be known of a backbone's preprocessing to fill a buffer."""

    @property
    def fit(self) -> Callable[[Picture], np.ndarray]:
        """RGB picture -> (C, H, W) of `dtype`."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""

    @property
    def dtype(self) -> str:
        """Of torch and numpy, by name."""


@dataclass
class Batch:
    """Images that go through the backbone together. Valid until the next one is asked for: buffers are used again."""

    rows: range
    pixels: torch.Tensor  # (B, 3, H, W)
    failures: list[Failure] = field(default_factory=list)  # in row order; their pixels are zero
    decode_seconds: float = 0.0  # summed over threads


def read(
    images: ImageList,
    batches: Iterable[range],
    fitting: Fitting,
    threads: int,
    pinned: bool = False,
) -> Generator[Batch, None, None]:
    """The batches (rows of `images`) in their order, each decoded by `threads` threads at most AHEAD batches early."""
    rows_left, dtype = iter(batches), getattr(torch, fitting.dtype)
    buffers: list[torch.Tensor] = []
    waiting: deque[tuple[range, torch.Tensor, list[Future[tuple[Failure | None, float]]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def start_next() -> None:
            rows = next(rows_left, None)
            if rows is None:
                return
            if not buffers or len(buffers[-1]) < len(rows):
                buffers.append(torch.empty(len(rows), fitting.channels, *fitting.size, dtype=dtype, pin_memory=pinned))
            buffer = buffers.pop()
            array = buffer.numpy()
            futures = [pool.submit(_fill, images, row, fitting.fit, array[i]) for i, row in enumerate(rows)]
            waiting.append((rows, buffer, futures))

        try:
            for _ in range(AHEAD + 1):
                start_next()
            while waiting:
                rows, buffer, futures = waiting.popleft()
                results = [future.result() for future in futures]
                failures = [failure for failure, _ in results if failure is not None]
                yield Batch(rows, buffer[: len(rows)], failures, sum(seconds for _, seconds in results))
                buffers.append(buffer)
                start_next()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fill(
    images: ImageList, row: int, fit: Callable[[Picture], np.ndarray], out: np.ndarray
) -> tuple[Failure | None, float]:
    started = time.perf_counter()
    image, failure = images[row], None
    try:
        read_pixels(image, fit, out)
    except UnreadableError as error:
        out[...] = 0  # never the pixels of the image that used this buffer before
        failure = Failure(image.key, row, error.reason, error.detail)
    return failure, time.perf_counter() - started
