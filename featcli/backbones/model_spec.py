"""A checkpoint before its weights are read: its stages, their shapes and their cost, from the meta device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import lcm
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from featcli.backbones.backbone import (
    Backbone,
    Network,
    Preprocessing,
    Weights,
    refuse_not_finite,
    weights_digest,
)
from featcli.backbones.execution import LAYOUTS, PRECISIONS, Execution
from featcli.backbones.folding import fold
from featcli.backbones.stages import Stage, select
from featcli.errors import UsageError, one_line
from featcli.pixels.resize import ResizeMode
from featcli.spec.parsers import Size
from featcli.spec.words import NATIVE


class ModelSpec(ABC):
    """A checkpoint of one library, before its weights are read.

    A subclass sets the first attributes and says how to build the network; everything that can be learnt
    without weights is learnt here, from one forward pass on the meta device.
    """

    asked: Any  # checkpoint.CheckpointSpec
    name: str
    library: str  # "timm" or "transformers"
    input_size: tuple[int, int]  # (H, W)
    stage_names: tuple[tuple[str, str], ...]  # (stage, module) in network order
    norm: str  # one of checkpoint.NORMS: what of the model's own normalisation the maps have seen
    norm_reason: str
    channels = 3  # of the pixels
    patch: tuple[int, int] | None = None  # (height, width) of a patch, where the backbone cuts its input into such
    inside: str = ""  # of a larger model: where in it the backbone sits
    first_index = 0  # the library's own index of the first of them
    strides: tuple[int, ...] | None = None  # where the library knows them; sizes alone round at odd input sizes
    default_indices: tuple[int, ...] | None = None  # the stages that a larger model uses; None is the last

    @abstractmethod
    def build(self, positions: Sequence[int], device: str) -> Network:
        """A network without weights that computes these stages and no more."""

    @abstractmethod
    def load(self, positions: Sequence[int]) -> tuple[Network, Weights]:
        """The same network on the CPU with the checkpoint's weights. Raises CheckpointError."""

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """The checkpoint's own preprocessing at `input_size`, or with `resize_mode`. Raises CheckpointError."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the architecture is, in the library's words, wherever the checkpoint lies: part of the plan."""

    @property
    def resize_mode(self) -> ResizeMode | None:
        """How pictures get their size, where that was asked for. None is the checkpoint's own way."""
        if self.asked.fit is None:
            return None
        if self.asked.fit != NATIVE:
            return ResizeMode(self.asked.fit, self.input_size, (1, 1))
        patch, strides = self.patch or (1, 1), [stage.stride for stage in self.stages]
        step = [lcm(side, max(stride[axis] for stride in strides)) for axis, side in enumerate(patch)]
        return ResizeMode(NATIVE, self.asked.largest_size, (step[0], step[1]))

    def refuse_other_sizes(self, positions: Sequence[int]) -> None:
        """Raise UsageError unless the maps of these stages follow the size of the input, which `native` relies on."""
        resize_mode = self.resize_mode
        assert resize_mode is not None
        if resize_mode.size is not None and (
            resize_mode.size[0] < resize_mode.step[0] or resize_mode.size[1] < resize_mode.step[1]
        ):
            raise UsageError(
                f"--image-size {resize_mode.size[0]}x{resize_mode.size[1]}: the step of {self.name} is"
                f" {resize_mode.step[0]}x{resize_mode.step[1]}",
                f"give at least {resize_mode.step[0]}x{resize_mode.step[1]}",
            )
        stages = [self.stages[position] for position in positions]
        for by in ((2, 1), (1, 3)):
            size = tuple(
                edge + more * step for edge, more, step in zip(self.input_size, by, resize_mode.step, strict=True)
            )
            height, width = (edge - edge % step for edge, step in zip(size, resize_mode.step, strict=True))
            expected = [stage.shape_at((height, width)) for stage in stages]
            try:
                found = [tuple(shape[1:]) for shape in self._probe(positions, (height, width)).shapes]
            except UsageError as error:
                found, cause = [], error.message
            else:
                cause = f"its maps of {height}x{width} pixels are {found}"
            if found != expected:
                raise UsageError(
                    f"--fit {NATIVE}: {self.name} does not take every size: {cause}",
                    "--fit pad keeps all of a picture at one size",
                )

    @cached_property
    def _whole(self) -> _Probe:
        return self._probe(range(len(self.stage_names)))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage, with shapes as the network really yields them (never from config fields)."""
        known = self.strides or (None,) * len(self.stage_names)
        places = zip(self.stage_names, self._whole.shapes, known, strict=True)
        return tuple(
            Stage(name, index, module, (shape[1], shape[2], shape[3]), self._stride(shape, stride))
            for index, ((name, module), shape, stride) in enumerate(places, self.first_index)
        )

    def _stride(self, shape: torch.Size, known: int | None) -> tuple[int, int]:
        """Input pixels per cell: what the library names, unless it is off by more than borders and rounding."""
        measured = self.input_size[0] / shape[2], self.input_size[1] / shape[3]
        if known is not None and 0.67 < measured[0] / known < 1.5:
            return known, known
        return round(measured[0]), round(measured[1])

    def select(
        self, out_features: Sequence[str] | None = None, out_indices: Sequence[int] | str | None = None
    ) -> tuple[int, ...]:
        """The positions of the chosen stages in network order, by the rules of `stages.select`. Raises UsageError."""
        if out_features is None and out_indices is None:
            out_indices = self.default_indices
        return select(self.stage_names, out_features, out_indices, self.first_index)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole backbone, without a head."""
        return self._whole.parameters

    def share(self, positions: Sequence[int]) -> float:
        """Which share of the whole backbone's floating point operations these stages cost."""
        if len(self.stage_names) - 1 in positions:
            return 1.0
        return self._probe(positions).operations / self._whole.operations if self._whole.operations else 1.0

    def share_of_convolutions(self, positions: Sequence[int]) -> float:
        """Which share of the operations for these stages are those of convolutions."""
        found = self._probe(positions)
        return found.convolutions / found.operations if found.operations else 0.0

    @cached_property
    def _probed(self) -> dict[tuple[tuple[int, ...], Size | None], _Probe]:
        return {}

    def _probe(self, positions: Sequence[int], at: Size | None = None) -> _Probe:
        """Shapes and costs, from one forward pass that computes nothing."""
        key = tuple(positions), at
        if key not in self._probed:
            self._probed[key] = self._run_once(positions, (1, self.channels, *(at or self.input_size)))
        return self._probed[key]

    def _run_once(self, positions: Sequence[int], size: tuple[int, ...]) -> _Probe:
        try:
            return _forward_once(self.build(positions, "meta"), torch.empty(size, device="meta"))
        except UsageError:
            raise
        except Exception:  # some models look into their tensors, and libraries refuse in many ways
            pass
        try:
            return _forward_once(self.build(positions, "cpu"), torch.zeros(size))
        except (
            RuntimeError,
            AssertionError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:  # how libraries refuse a size
            norm = " and --norm model" if self.norm == "model" else ""
            raise UsageError(
                f"the backbone cannot be run with an input of {'x'.join(map(str, size[1:]))}{norm}: {one_line(error)}",
                "choose another --image-size, a multiple of the backbone's largest stride or its patch"
                + (", or --norm raw" if norm else "")
                + (", or leave --num-channels out" if self.channels != 3 else ""),
            ) from error


@dataclass(frozen=True)
class _Probe:
    """What one forward pass showed."""

    shapes: list[torch.Size]  # (B, C, H, W) of each map
    operations: int
    convolutions: int  # of the operations
    parameters: int


def _forward_once(network: Network, pixels: torch.Tensor) -> _Probe:
    network.module.eval()
    # With gradients: under inference_mode no operation reaches the counter, under no_grad some models fail in it.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        maps = network.maps(pixels)
    for found in maps:
        if found.ndim != 4:
            raise UsageError(f"a stage of this backbone yields {tuple(found.shape)}, not a map (B, C, H, W)")
    parameters = sum(p.numel() for p in network.module.parameters())
    operations = counter.get_flop_counts().get("Global", {})
    convolutions = sum(count for name, count in operations.items() if "convolution" in str(name))
    return _Probe([found.shape for found in maps], counter.get_total_flops(), convolutions, parameters)


def arranged(
    source: ModelSpec, network: Network, device: torch.device, execution: Execution
) -> tuple[Network, Execution]:
    """A network on the CPU, made to be run so on a device, and how it is run then. The module is changed in place.

    Norms are not folded where there are none, or where the maps would move by more than rounding.
    """
    network.module.eval().requires_grad_(False)
    if execution.folded and not fold(network, source.channels, source.input_size):
        execution = replace(execution, folded=False)
    dtype, layout = getattr(torch, PRECISIONS[execution.precision]), getattr(torch, LAYOUTS[execution.layout])
    network.module.to(device=device, dtype=dtype)
    for tensor in (*network.module.parameters(), *network.module.buffers()):
        if tensor.ndim == 4:  # others have no channels to put last; `Module.to` would refuse those of five dimensions
            tensor.data = tensor.data.contiguous(memory_format=layout)
    if not execution.compiled:
        return network, execution
    # freezing: weights are constants, laid out once. CUDA graphs would use the memory of maps again while those are
    # still on their way to the host.
    options = {"freezing": True, "triton.cudagraphs": False}
    compiled = partial(torch.compile, dynamic=False, options=options)
    tokens = None if network.class_tokens is None else compiled(network.class_tokens)
    return replace(network, maps=compiled(network.maps), class_tokens=tokens), execution


def ready(source: ModelSpec, positions: Sequence[int], device: torch.device, execution: Execution) -> Backbone:
    """Load the weights of these stages and freeze the network on the device. Raises CheckpointError."""
    network, weights = source.load(positions)
    refuse_not_finite(source.name, network)
    digest = weights_digest(network)
    network, execution = arranged(source, network, device, execution)
    return Backbone(
        name=source.name,
        library=source.library,
        stages=source.stages,
        selected=tuple(source.stages[i] for i in positions),
        preprocessing=source.preprocessing(),
        weights=weights,
        settings=source.settings(),
        network=network,
        device=device,
        execution=execution,
        digest=digest,
    )
