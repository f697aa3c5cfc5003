"""Measure how fast ways to run a network are, in images per second with throwaway weights. tuning.py compares them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from featcli.backbones.assembly import prepare_network
from featcli.backbones.backbone import Network, as_run
from featcli.backbones.execution import Execution
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.stages import Points
from featcli.dump.plan import Output
from featcli.system.borrowed import own_random_numbers
from featcli.system.device import is_out_of_memory

AT_ONCE = 8  # images in a trial on a CPU
AT_ONCE_ELSEWHERE = 64  # with fewer, a GPU would wait for the launch of each operation
ROUNDS = 3  # the fastest counts, because other work on a machine only makes a round slower


@dataclass
class Trials:
    """The speed of throwaway networks of one kind. Speed does not depend on the weights."""

    model: ModelSpec
    points: Points
    outputs: Sequence[Output]
    device: torch.device
    began: Callable[[], None] = lambda: None  # called before the first trial
    images: int = field(init=False)  # that go through the network together by default
    rates: dict[tuple[Execution, int], float] = field(default_factory=dict)
    _last: tuple[Execution, Network] | None = None

    def __post_init__(self) -> None:
        self.images = AT_ONCE if self.device.type == "cpu" else AT_ONCE_ELSEWHERE

    def rate(self, execution: Execution, images: int = 0) -> float:
        """Return images per second, with maps laid out as on disk; 0 if they do not fit into memory.

        Only the first way that is tried may raise. If the network cannot run another way, that way has the rate 0.
        """
        images = images or self.images
        if (execution, images) not in self.rates:
            try:
                self.rates[execution, images] = self.measure(execution, images)
            except Exception as error:  # networks refuse layouts and precisions in many ways
                if not self.rates and not is_out_of_memory(error):
                    raise
                self.rates[execution, images] = 0.0
        return self.rates[execution, images]

    def make_room(self, execution: Execution) -> None:
        """Use fewer images from now on if this many do not fit, so that all ways can be compared."""
        while self.images > 1 and not self.rate(execution):
            self.images //= 2

    def compared(self, one: Execution, other: Execution) -> float:
        """Return how many times as fast as the other one is."""
        if self.rate(other):
            return self.rate(one) / self.rate(other)
        return inf if self.rate(one) else 1.0

    def forget(self) -> None:
        """Drop the last network, because the real one needs the memory."""
        self._last = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, execution: Execution, images: int) -> float:
        """Measure images per second now. Raises whatever a network raises that cannot run in this way."""
        if not self.rates:
            self.began()
        network = self._network(execution)
        with own_random_numbers():
            pixels = torch.rand(images, self.model.channels, *self.model.input_size, device=self.device)
        dtype = getattr(torch, self.outputs[0].dtype)
        seconds = []
        with torch.inference_mode():
            pixels = as_run(pixels, execution)
            for _ in range(1 + ROUNDS):  # the first round warms up
                began = time.perf_counter()
                for found in network.outputs(pixels):
                    torch.empty(found.shape, dtype=dtype, device=self.device).copy_(found)
                if self.device.type != "cpu":
                    torch.accelerator.synchronize(self.device)
                seconds.append(time.perf_counter() - began)
        return images / min(seconds[1:])

    def moved_by_compiling(self, execution: Execution, images: int) -> float:
        """Return by how much compiling moves the maps of the network, of their largest number, at most."""
        network = self._network(execution)
        with own_random_numbers():
            pixels = torch.rand(images, self.model.channels, *self.model.input_size, device=self.device)
        with torch.inference_mode():
            pixels = as_run(pixels, execution)
            pairs = zip(network.outputs(pixels), network.plain().outputs(pixels), strict=True)
            moved = torch.stack([(one.float() - plain.float()).abs().max() / _largest(plain) for one, plain in pairs])
        return float(moved.max())  # not a number if one of them is none

    def _network(self, execution: Execution) -> Network:
        if self._last is None or self._last[0] != execution:
            self.forget()
            with own_random_numbers():
                blank = self.model.build(self.points, "cpu")
            self._last = execution, prepare_network(self.model, blank, self.device, execution)[0]
        return self._last[1]


def _largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest size of a value, or 1 if all are zero."""
    largest = values.float().abs().max()
    return torch.where(largest > 0, largest, 1.0)
