"""Copy batches to the device and rows back, while the device works on others.

A CPU needs no copies: values are cast and laid out straight in the buffer that is written. CUDA copies both ways
through pinned memory, on streams of their own, so that copies, the backbone and the writer overlap.
"""

from __future__ import annotations

import mmap
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from featcli.errors import MachineError


class Buffers:
    """Memory for rows that are to be written. A buffer that is given back is used again. Buffers start on a page."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: defaultdict[str, deque[torch.Tensor]] = defaultdict(deque)

    def take(self, stage: str, num_bytes: int) -> torch.Tensor:
        """Return a flat buffer of at least `num_bytes`, which nobody else has until it is given back.

        Raises MachineError.
        """
        free = self._free[stage]
        while free:
            if len(buffer := free.popleft()) >= num_bytes:
                return buffer  # buffers that are too small are dropped, because maps have become larger
        return self._allocated(num_bytes)

    def give_back(self, stage: str, buffer: torch.Tensor) -> None:
        """Give back a buffer that nobody uses any more. Any thread may call this."""
        self._free[stage].append(buffer)

    def _allocated(self, num_bytes: int) -> torch.Tensor:
        try:
            if self._pinned:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError, RuntimeError) as error:
            raise MachineError(
                f"{num_bytes:,} bytes for rows that are to be written do not fit into the memory of this machine",
                "use a smaller --batch-size, fewer stages or --pool",
            ) from error
        with suppress(AttributeError, OSError):  # large pages only make it faster
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)


class Transfers:
    """Copies that are complete when the call returns."""

    pinned = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels on the device. Their buffer may be filled again at once."""
        return pixels.to(self._device)

    def to_host(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Copy `values` into `target`, in its dtype and layout.

        Returns (least, largest), not finite if any value is not.
        """
        target.copy_(values if values.device == target.device else values.to(target.dtype).cpu())
        return torch.stack(torch.aminmax(target))

    def mark(self) -> Any:
        """Return this moment, for `arrival`."""
        return time.perf_counter()

    def arrival(self, since: Any) -> Callable[[], float]:
        """Return a function that waits until all copies are complete and returns the seconds that the device worked."""
        seconds = time.perf_counter() - since
        return lambda: seconds


class CudaTransfers(Transfers):
    """Copies that run while the device computes. `cuda` is torch.cuda, or a replacement in tests."""

    pinned = True

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        super().__init__(device)
        self._cuda = cuda
        self._in, self._out = cuda.Stream(device), cuda.Stream(device)

    def to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """See Transfers. Waits only for the copy: the device is still busy with the batch before."""
        with self._cuda.stream(self._in):
            there = pixels.to(self._device, non_blocking=True)
            copied = self._cuda.Event(blocking=True)  # it sleeps; others would spin on a core that decodes
            copied.record(self._in)
        copied.synchronize()
        there.record_stream(self._cuda.current_stream(self._device))  # else its memory could be freed too early
        return there

    def to_host(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See Transfers. Values are cast and laid out on the device. Both results are valid only after `arrival`."""
        there = values.to(target.dtype).contiguous()
        ends_there = torch.stack(torch.aminmax(there))
        ends = torch.empty(2, dtype=target.dtype, pin_memory=self._device.type == "cuda")
        self._out.wait_stream(self._cuda.current_stream(self._device))
        with self._cuda.stream(self._out):
            target.copy_(there, non_blocking=True)
            ends.copy_(ends_there, non_blocking=True)
        for tensor in (there, ends_there):
            tensor.record_stream(self._out)
        return ends

    def mark(self) -> Any:
        """See Transfers."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def arrival(self, since: Any) -> Callable[[], float]:
        """See Transfers."""
        computed, copied = self.mark(), self._cuda.Event(blocking=True)
        copied.record(self._out)

        def arrive() -> float:
            with self._cuda.device(self._device):  # the writer thread has a current device of its own
                copied.synchronize()
                computed.synchronize()  # no copy waits for it, and it may end a moment later
            return float(since.elapsed_time(computed)) / 1000

        return arrive


def transfers(device: torch.device) -> Transfers:
    """Return the transfers for a device."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)
