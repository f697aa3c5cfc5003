"""Decode one image of a batch into its place, and say what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import NOT_READ, Failure, UnreadableError
from featcli.spec.groups import PixelSpec
from featcli.spec.words import Decode

if TYPE_CHECKING:
    import numpy as np

    from featcli.inputs.image_list import Image
    from featcli.pixels.traits import Trait


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
class Decoder:
    """How images become pixels."""

    rules: PixelSpec
    preprocessing: Pixels
    threads: int  # over all processes that decode
    pinned: bool = False  # whether buffers are in memory that a GPU can copy from by itself
    processes: int = 0  # that decode beside this one; 0 if it does so itself

    def fill(self, image: Image, row: int, out: np.ndarray) -> Outcome:
        """Decode an image into `out` (C, H, W), which is zero after a failure. Raises what `read_pixels` does."""
        started = time.perf_counter()
        failure: Failure | None = None
        traits: tuple[Trait, ...] = ()
        digests = [NOT_READ]
        try:
            fit = self.preprocessing.fit_for(self.rules.decode)
            traits = read_pixels(image, self.rules, fit, out, self.preprocessing.is_native, digests.append)
        except UnreadableError as error:
            out[...] = 0  # else the pixels of the image before would stay in the buffer
            failure = Failure(key=image.key, row=row, reason=error.reason, detail=error.detail)
        return Outcome(failure, traits, digests[-1], time.perf_counter() - started)


@dataclass(frozen=True)
class Outcome:
    """What became of an image."""

    failure: Failure | None
    traits: tuple[Trait, ...]
    digest: str
    seconds: float


Outcomes = Callable[[], list[Outcome]]  # waits for those of some images; raises what `Decoder.fill` raises
