"""How fast ways to run a network are, tried with throwaway weights: images a second, for tuning.py to compare."""

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
from featcli.dump.plan import StoredStage
from featcli.system.borrowed import own_random_numbers
from featcli.system.device import is_out_of_memory

AT_ONCE = 8  # images in a trial on a CPU
AT_ONCE_ELSEWHERE = 64  # less would not keep a GPU busy while the next operation is launched
ROUNDS = 3  # of which the fastest counts: whatever else a machine does only ever makes it slower


@dataclass
class Trials:
    """How fast throwaway networks of a kind are: speed does not ask what the weights are."""

    model: ModelSpec
    positions: Sequence[int]
    stages: Sequence[StoredStage]
    device: torch.device
    began: Callable[[], None] = lambda: None  # called before the first trial
    images: int = field(init=False)  # that go through the network together, where nothing else is asked for
    rates: dict[tuple[Execution, int], float] = field(default_factory=dict)
    _last: tuple[Execution, Network] | None = None

    def __post_init__(self) -> None:
        self.images = AT_ONCE if self.device.type == "cpu" else AT_ONCE_ELSEWHERE

    def rate(self, execution: Execution, images: int = 0) -> float:
        """Images a second, the maps laid out as on disk included; 0 where they do not fit into memory.

        Only the first way that is tried may raise: where the network does not take another, that one is out.
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
        """Try with fewer images from now on where so many do not fit, for ways to be compared with what is there."""
        while self.images > 1 and not self.rate(execution):
            self.images //= 2

    def compared(self, one: Execution, other: Execution) -> float:
        """How many times as fast one is."""
        if self.rate(other):
            return self.rate(one) / self.rate(other)
        return inf if self.rate(one) else 1.0

    def forget(self) -> None:
        """Let go of the last network: the real one needs the memory."""
        self._last = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, execution: Execution, images: int) -> float:
        """Images a second, measured now. Raises whatever the network does where it does not take that."""
        if not self.rates:
            self.began()
        network = self._network(execution)
        with own_random_numbers():
            pixels = torch.rand(images, self.model.channels, *self.model.input_size, device=self.device)
        dtypes = [getattr(torch, stage.dtype) for stage in self.stages]
        seconds = []
        with torch.inference_mode():
            pixels = as_run(pixels, execution)
            for _ in range(1 + ROUNDS):  # the first warms up
                began = time.perf_counter()
                for found, dtype in zip(network.maps(pixels), dtypes, strict=True):
                    torch.empty(found.shape, dtype=dtype, device=self.device).copy_(found)
                if self.device.type != "cpu":
                    torch.accelerator.synchronize(self.device)
                seconds.append(time.perf_counter() - began)
        return images / min(seconds[1:])

    def _network(self, execution: Execution) -> Network:
        if self._last is None or self._last[0] != execution:
            self.forget()
            with own_random_numbers():
                blank = self.model.build(self.positions, "cpu")
            self._last = execution, prepare_network(self.model, blank, self.device, execution)[0]
        return self._last[1]
