"""Define the one `Backbone` for checkpoints of every library: pixels in, the feature map of each selected stage out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.execution import LAYOUTS, PRECISIONS, Execution
from featcli.backbones.internals import compiled, hook_again, to_be_copied
from featcli.backbones.preprocessing import Preprocessing
from featcli.backbones.stages import Stage
from featcli.errors import UsageError, one_line, shown_shape
from featcli.pixels.colour import DEFAULT
from featcli.pixels.pictures import prepared
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import Size

REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # libraries refuse a size with these
ROUNDED = 8  # a map may differ by 1/n from what the input size suggests

Maps = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Weights:
    """The source of weights, and how much of the backbone they covered."""

    origin: str
    matched: int = 0  # tensors of the cut backbone that were loaded
    total: int = 0  # tensors of the cut backbone
    missing: tuple[str, ...] = ()  # norms of the stages that a plain checkpoint lacks; any other absence is refused
    unexpected: tuple[str, ...] = ()  # tensors of the checkpoint that are no part of the backbone, such as a head
    undecided: tuple[str, ...] = ()  # tensors that the library left out or merged while it converted names
    resized: tuple[str, ...] = ()  # tensors that the library resized for another input than the checkpoint's
    files: Mapping[str, str] = field(default_factory=dict)  # name of each file -> its SHA-256, as the hub shows it
    random: bool = False

    def summary(self) -> str:
        """Return one line for people."""
        if self.random:
            return f"{self.origin}: its feature maps mean nothing"
        text = f"{self.matched} of {self.total} tensors loaded from {self.origin}"
        if self.missing:
            norms = sorted({name.rpartition(".")[0] for name in self.missing})
            text += f"; norms that it does not have, left without effect on scale: {', '.join(norms)}"
        if self.resized:
            names = f"{', '.join(self.resized[:2])}{' ...' if len(self.resized) > 2 else ''}"
            text += f"; {len(self.resized)} of another size there, which the library fitted to this input ({names})"
        if self.unexpected:
            names = f"{', '.join(self.unexpected[:2])}{' ...' if len(self.unexpected) > 2 else ''}"
            text += f"; {len(self.unexpected)} of no use here ({names})"
        if self.undecided:
            names = f"{', '.join(self.undecided[:2])}{' ...' if len(self.undecided) > 2 else ''}"
            text += f"; {len(self.undecided)} that the library leaves out or merges, which is not proven ({names})"
        return text


@dataclass(frozen=True)
class Network:
    """A module, whole or cut after the deepest stage asked for, and how it is asked for maps.

    `maps(x)` returns one (B, C, h, w) tensor for each stage in network order. `class_tokens(x)` returns one (B, C)
    tensor for each stage, if the model has a class token.
    """

    module: nn.Module
    maps: Maps  # of the module alone: a partial of a function that takes the module first, so that it can be copied
    class_tokens: Maps | None = None
    idle: frozenset[str] = frozenset()  # parameters and buffers on which no map depends, such as those of a head
    is_compiled: bool = False  # whether calls go through torch.compile

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by the module, and how it is asked, without compiled code and hooks of libraries.

        The copy has a module of its own.
        """
        asked = (_recipe(self.maps), _recipe(self.class_tokens))
        return _network_again, (*to_be_copied(self.module), asked, self.idle, self.is_compiled)

    def compiled(self) -> Network:
        """Return the network that goes through torch.compile, for one size of batch."""
        class_tokens = None if self.class_tokens is None else _Compiled(self.class_tokens)
        return replace(self, maps=_Compiled(self.maps), class_tokens=class_tokens, is_compiled=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers by name, without the idle ones."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.idle}


class _Compiled:
    """A function that goes through torch.compile, with the original function."""

    def __init__(self, plain: Maps) -> None:
        self.plain = plain
        self._run = compiled(plain)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._run(pixels)
        return found


def _recipe(asks: Any) -> tuple[Any, ...] | None:
    """Take the module out of the callable that asks it: (function, other arguments, keywords)."""
    if asks is None:
        return None
    plain: Any = asks.plain if isinstance(asks, _Compiled) else asks
    return plain.func, plain.args[1:], plain.keywords


def _network_again(
    module: Any, hooked: bool, asked: tuple[Any, Any], idle: frozenset[str], is_compiled: bool
) -> Network:
    """Make a network from what `Network.__reduce__` returned."""
    hook_again(module, hooked)
    maps, class_tokens = (made and partial(made[0], module, *made[1], **made[2]) for made in asked)
    network = Network(module, maps, class_tokens, idle)
    return network.compiled() if is_compiled else network


@dataclass(eq=False, repr=False)
class Backbone:
    """A frozen vision backbone, cut after the deepest selected stage: pixels in, the map of each stage out.

    `featcli.load_backbone` makes it. It can be copied, and pickled with its weights. It equals only itself.
    """

    name: str
    library: str
    stages: tuple[Stage, ...]  # all stages of the backbone
    selected: tuple[Stage, ...]
    preprocessing: Preprocessing
    weights: Weights
    settings: Mapping[str, Any]
    network: Network
    device: torch.device
    execution: Execution
    digest: str
    rules: PixelSpec = DEFAULT  # what happens to a picture before the preprocessing
    patch: Size | None = None  # (height, width) of the patches, if it cuts its input into patches
    other_sizes: set[Size] = field(default_factory=set)  # sizes of inputs that were found to fit, besides its own
    make_module: Callable[[Backbone, bool], Any] | None = None  # makes the same network again: see as_module

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.name} {shown_shape(stage.shape)}" for stage in self.selected)
        size = "HxW" if self.preprocessing.is_native else shown_shape(self.preprocessing.size)
        how = f"{self.device}, {self.precision}"
        return f"<backbone {self.name}: {stages} of {self.preprocessing.channels}x{size} pixels, {how}>"

    @property
    def precision(self) -> str:
        """The precision that it computes in: fp32, bf16 or fp16."""
        return self.execution.precision

    @property
    def out_features(self) -> list[str]:
        """The names of the selected stages, as in a transformers backbone."""
        return [stage.name for stage in self.selected]

    @property
    def out_indices(self) -> list[int]:
        """The library's own indices of the selected stages."""
        return [stage.index for stage in self.selected]

    @property
    def channels(self) -> list[int]:
        """C of each selected stage."""
        return [stage.channels for stage in self.selected]

    def to_dict(self) -> dict[str, Any]:
        """Return the backbone in plain JSON: its settings, all stages, and the selected ones by name and index."""
        return {
            "name": self.name,
            "library": self.library,
            "settings": dict(self.settings),
            "stage_names": [stage.name for stage in self.stages],
            "out_features": self.out_features,
            "out_indices": self.out_indices,
            "channels": self.channels,
            "num_channels": self.preprocessing.channels,
            "image_size": list(self.preprocessing.size),
            **self.execution.settings,
        }

    @property
    def has_class_token(self) -> bool:
        """Whether `class_tokens` can be called."""
        return self.network.class_tokens is not None

    def preprocess(self, picture: Any) -> torch.Tensor:
        """Return the input that `forward` takes a batch of, for a picture: (C, H, W), uint8 as a rule.

        A list of pictures gives (B, C, H, W). A picture is a path or URL, a picture of Pillow, or an array or tensor
        (H, W), (H, W, C) or (C, H, W) of uint8 or uint16. Options of pixels that the backbone was loaded with are
        applied as `extract` applies them. Raises UsageError for something that is no picture, or cannot be read.
        """
        return prepared(picture, self.rules, self.preprocessing, self.preprocessing.size)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {stage: (B, C, h, w)} for (B, C, H, W) from `preprocess`, on the device, in the precision computed in.

        Pixels may have another size if the network takes it. No gradient goes into the network, but a head can be
        trained on the maps. Raises UsageError for any other input, such as pixels that are already normalised.
        """
        return self._run(self.network.maps, pixels)

    def class_tokens(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {stage: (B, C)} for (B, C, H, W) from `preprocess`. Raises UsageError without a class token."""
        if self.network.class_tokens is None:
            raise UsageError(f"{self.name} has no class token", "use --pool avg for one vector per image")
        return self._run(self.network.class_tokens, pixels)

    __call__ = forward

    def as_module(self, cut: bool = False) -> Any:
        """Load the network again, as a torch module in transformers' manner, to be trained or built into a model.

        It takes normalised float pixels (`pixel_values`, (B, C, H, W)) and returns transformers' `BackboneOutput`. It
        is what the library built: not folded, not compiled, in fp32 on the CPU, with every stage, in eval mode. It
        shares no tensor with this backbone, so both take memory. With `cut` it lacks everything after the deepest
        selected stage. See `featcli.backbones.module`.

        Raises CheckpointError without the extra transformers, or if the checkpoint has changed, and what
        `load_backbone` raises.
        """
        if self.make_module is None:
            raise UsageError(
                f"{self!r} does not know its checkpoint", "load it with featcli.load_backbone, which tells it"
            )
        return self.make_module(self, cut)

    def _run(
        self, yields: Callable[[torch.Tensor], list[torch.Tensor]], pixels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        wanted, ours = self.preprocessing.dtype, self.preprocessing
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or pixels.shape[1] != ours.channels:
            found = getattr(pixels, "shape", type(pixels).__name__)
            size = "H, W" if ours.is_native else ", ".join(map(str, ours.size))
            raise UsageError(
                f"pixels {found}: this backbone takes a tensor (B, {ours.channels}, {size})",
                "stack what preprocess gives",
            )
        if pixels.dtype != getattr(torch, wanted):
            raise UsageError(
                f"pixels of {pixels.dtype}: this backbone takes {wanted}",
                "give what preprocess gives: the backbone normalises by itself",
            )
        with torch.no_grad():  # not inference_mode, because autograd keeps no such tensor, and a head may be trained
            self._refuse_unfit((pixels.shape[2], pixels.shape[3]))
            count = len(pixels)
            some = pixels if count else pixels.new_zeros(1, *pixels.shape[1:])  # many networks need one picture
            ready = ours.normalize(some.to(self.device, non_blocking=True))
            found = yields(as_run(ready, self.execution))
        return {stage.name: tensor[:count] for stage, tensor in zip(self.selected, found, strict=True)}

    def _refuse_unfit(self, size: Size) -> None:
        """Raise UsageError for an input of another size than `preprocess` gives, if the network does not take it.

        Such a network would cut off patches, refuse, or resize the input. A run on blank pixels shows it, once for each
        size.
        """
        ours = self.preprocessing
        if size == ours.size or size in self.other_sizes:
            return
        step = ours.resize_mode.step if ours.resize_mode is not None and ours.is_native else self.patch or (1, 1)
        cause = f"not a multiple of {step[0]}x{step[1]}" if size[0] % step[0] or size[1] % step[1] else ""
        if not cause and not ours.is_native:
            cause = self._tried(size)
        if cause:
            raise UsageError(
                f"pixels of {size[0]}x{size[1]}: {self.name} does not take them: {cause}",
                f"stack what preprocess gives, or try load_backbone(..., image_size=({size[0]}, {size[1]}))",
            )
        self.other_sizes.add(size)

    def _tried(self, size: Size) -> str:
        """Return why the network does not take an input of this size; "" if its maps have that size."""
        blank = torch.zeros(1, self.preprocessing.channels, *size, device=self.device)
        try:
            maps = self.network.maps(as_run(blank, self.execution))
        except REFUSALS as error:
            return one_line(error)
        for stage, found in zip(self.selected, maps, strict=True):
            for axis in (0, 1):
                cells, expected = (
                    found.shape[2 + axis],
                    stage.shape[1 + axis] * size[axis] / self.preprocessing.size[axis],
                )
                if abs(cells - expected) > 1 + expected / ROUNDED:  # allows for borders and rounding
                    return f"the map of {stage.name} is {found.shape[2]}x{found.shape[3]}"
        return ""


def as_run(pixels: torch.Tensor, execution: Execution) -> torch.Tensor:
    """Return normalised pixels (B, C, H, W) in the precision and layout that the network runs in."""
    dtype, layout = getattr(torch, PRECISIONS[execution.precision]), getattr(torch, LAYOUTS[execution.layout])
    return pixels.to(dtype=dtype, memory_format=layout)
