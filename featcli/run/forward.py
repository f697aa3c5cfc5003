"""Turn the pixels of a batch into stored rows: forward pass, pooling, dtype; in portions if memory is short."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from featcli.errors import FeatcliError, MachineError, UsageError, one_line
from featcli.events import Report, silent
from featcli.pixels.batches import Batch
from featcli.run.loading import Setup
from featcli.run.pooling import StageTensors, clamped, pooling
from featcli.run.transfers import Buffers, transfers
from featcli.system.device import is_out_of_memory, out_of_memory


@dataclass
class BatchRows:
    """The stored rows of a batch, on their way from the device. Only the writer thread calls `finished`."""

    arrays: Mapping[str, torch.Tensor]  # by output, in the stored dtype
    extremes: Mapping[str, list[torch.Tensor]]  # (least, largest) of each portion
    failed: list[int]  # places in the batch without an image
    arrive: Callable[[], float]
    release: Callable[[], None]  # to be called when the buffers may be used again
    clamped_shares: Mapping[str, list[torch.Tensor]] = field(default_factory=dict)  # (B,) of each portion
    compute_seconds: float = field(default=0.0, init=False)  # known once it is finished
    waited_seconds: float = field(default=0.0, init=False)
    overflown: Counter[str] = field(default_factory=Counter, init=False)  # values that are not finite, by output
    clamped: Counter[str] = field(default_factory=Counter, init=False)  # shares that `gem` clamped, over all images

    @property
    def nbytes(self) -> int:
        """The bytes of all stages."""
        return sum(array.nbytes for array in self.arrays.values())

    def finished(self) -> dict[str, np.ndarray]:
        """Return the complete arrays by stage, with NaN in rows without an image. They are valid until `release`."""
        began = time.perf_counter()
        self.compute_seconds = self.arrive()
        self.waited_seconds = time.perf_counter() - began
        stored = {}
        for name, shares in self.clamped_shares.items():
            of_images = torch.cat(shares).cpu()
            of_images[self.failed] = 0
            self.clamped[name] = of_images.sum().item()  # type: ignore[assignment]  # shares, not counts
        for name, values in self.arrays.items():
            if not all(torch.isfinite(ends).all() for ends in self.extremes[name]):
                finite = torch.isfinite(values)
                finite[self.failed] = True
                self.overflown[name] += int((~finite).sum())
            if self.failed:
                values[self.failed] = torch.nan
            # numpy has no bfloat16, so the same bytes get another dtype.
            stored[name] = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        return stored


class Forward:
    """Runs the backbone and the pooling on batch after batch.

    `micro_batch` is how many images go through the backbone together. If they do not fit into memory, it is halved for
    the rest of the run.
    """

    def __init__(self, setup: Setup, report: Report = silent) -> None:
        self._setup = setup
        self._report = report
        self._poolings = {one.name: pooling(one.reduction) for one in setup.plan.outputs if one.is_of_stage}
        self._with_prefixes = any(one.needs_prefix for one in self._poolings.values())
        self._run = torch.inference_mode()(self._outputs)
        self._transfers = transfers(setup.backbone.device)
        self._buffers = Buffers(self._transfers.pinned)
        self.micro_batch = setup.plan.settings.batch_size

    def compile(self) -> None:
        """Let torch.compile do its work now, before anything is written. Raises MachineError."""
        while not self._fits_compiled():
            self._forget_tensors()

    def _fits_compiled(self) -> bool:
        """Try a batch, and halve it if it does not fit."""
        pixels = self._setup.backbone.preprocessing
        zeros = torch.zeros(self.micro_batch, pixels.channels, *pixels.size, dtype=getattr(torch, pixels.dtype))
        try:
            self._run(zeros)
        except Exception as error:  # compilers, and the code that looks for them, fail in many ways
            if not is_out_of_memory(error):
                raise MachineError(
                    f"--compile: torch.compile cannot compile {self._setup.backbone.name}: {one_line(error)}",
                    "on a CPU it needs a C++ compiler such as g++; without one, begin another dump with --no-compile",
                ) from error
            self._halve(self.micro_batch, error)
            return False
        return True

    def __call__(self, batch: Batch) -> BatchRows:
        """Return what is stored of each image.

        Raises MachineError if not even one image fits into memory, and UsageError if the network refuses a picture's
        own size.
        """
        taken, arrays = {}, {}
        for one in self._setup.plan.outputs:
            shape = (len(batch.rows), *one.shape_at((batch.pixels.shape[2], batch.pixels.shape[3])))
            dtype = getattr(torch, one.dtype)
            num_bytes = prod(shape) * dtype.itemsize
            taken[one.name] = self._buffers.take(one.name, num_bytes)
            arrays[one.name] = taken[one.name][:num_bytes].view(dtype).view(shape)

        def release() -> None:
            for name, buffer in taken.items():
                self._buffers.give_back(name, buffer)

        since = self._transfers.mark()
        filled = None
        while filled is None:
            try:
                filled = self._fill(arrays, batch.pixels)
            except (MemoryError, RuntimeError, IndexError, ValueError, AssertionError) as error:
                if is_out_of_memory(error):
                    self._halve(len(batch.rows), error)
                elif self._setup.backbone.preprocessing.is_native and not isinstance(error, torch.AcceleratorError):
                    # Networks refuse a size with one of these errors.
                    raise self._refused(error, batch) from error
                else:
                    raise
            if filled is None:
                self._forget_tensors()
        failed = [failure.row - batch.rows.start for failure in batch.failures]
        arrive = self._transfers.arrival(since)
        extremes, clamped_shares = filled
        return BatchRows(
            arrays=arrays,
            extremes=extremes,
            failed=failed,
            arrive=arrive,
            release=release,
            clamped_shares=clamped_shares,
        )

    def _refused(self, error: Exception, batch: Batch) -> UsageError:
        """Return the error for pictures that keep their own sizes, which some networks do not take."""
        height, width = batch.pixels.shape[2:]
        return UsageError(
            f"--fit native: {self._setup.backbone.name} does not take an input of {height}x{width}: {one_line(error)}",
            "give a smaller --image-size, which limits larger pictures, or use --fit pad, which keeps the whole"
            " picture at one size",
        )

    def _fill(
        self, arrays: Mapping[str, torch.Tensor], pixels: torch.Tensor
    ) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
        """Fill the arrays, portion by portion. Returns the extremes of each stage."""
        extremes: dict[str, list[torch.Tensor]] = {name: [] for name in arrays}
        clamped_shares: dict[str, list[torch.Tensor]] = {}
        for first in range(0, len(pixels), self.micro_batch):
            portion = slice(first, first + self.micro_batch)
            found, counts = self._portion(pixels[portion])
            for name, array in arrays.items():
                target, values = array[portion], found.pop(name)[: len(array[portion])]
                if values.shape != target.shape:
                    raise FeatcliError(f"{name} yields {tuple(values.shape)}, and the plan has {tuple(target.shape)}")
                extremes[name].append(self._transfers.to_host(values, target))
            for name, count in counts.items():
                clamped_shares.setdefault(name, []).append(count[: len(pixels[portion])])
        return extremes, clamped_shares

    def _portion(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        missing = self.micro_batch - len(pixels) if self._setup.backbone.execution.compiled else 0
        if missing:  # the network is compiled for one size of batch, and a shorter one would be compiled again
            pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        return self._run(self._transfers.to_device(pixels))

    def _outputs(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What is stored, by output; and how many values of each image were clamped, of outputs that clamp."""
        backbone = self._setup.backbone
        maps, prefixes, vectors = backbone.run(pixels, with_prefixes=self._with_prefixes)
        registers = backbone.network.num_registers
        stages = {
            stage.name: StageTensors(found, prefixes[place] if prefixes else None, registers)
            for place, (stage, found) in enumerate(zip(backbone.selected, maps, strict=True))
        }
        made, counts = {}, {}
        for one in self._setup.plan.outputs:
            if one.is_of_stage:
                made[one.name] = self._poolings[one.name].reduce(stages[one.point])
            else:
                made[one.name] = vectors[one.point]
            if one.reduction == "gem":
                counts[one.name] = clamped(stages[one.point].map)
        return made, counts

    def _forget_tensors(self) -> None:
        """Free GPU memory. Call it when an error is gone, because the error holds tensors."""
        if self._setup.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, images: int, error: BaseException) -> None:
        is_padded = self._setup.backbone.execution.compiled
        device, tried = self._setup.backbone.device, self.micro_batch if is_padded else min(images, self.micro_batch)
        if tried == 1:
            raise out_of_memory("one image does", device) from error
        self.micro_batch = tried // 2
        self._report(
            "warning",
            text=f"{tried} images do not fit into the memory of {device}: {self.micro_batch} are computed at once",
        )
