"""Define the one `Backbone` for checkpoints of every library: pixels in, the feature map of each selected stage out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from featcli.backbones.execution import LAYOUTS, PRECISIONS, Execution
from featcli.backbones.internals import compiled, hook_again, to_be_copied
from featcli.backbones.preprocessing import Preprocessing
from featcli.backbones.stages import Stage, Vector
from featcli.errors import UsageError, one_line, shown_shape
from featcli.pixels.colour import DEFAULT
from featcli.pixels.pictures import prepared
from featcli.spec.calls import BackboneCall
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import Size

REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # libraries refuse a size with these
ROUNDED = 8  # a map may differ by 1/n from what the input size suggests


class Pass(NamedTuple):
    """What one pass through a network gives of pixels (B, C, H, W)."""

    maps: list[torch.Tensor]  # (B, C, h, w) of each stage that was chosen
    prefixes: list[torch.Tensor]  # (B, P, C) of each, the tokens before the patches; empty where nobody wants them
    vectors: dict[str, torch.Tensor]  # (B, D) by name: embedding, projection, logits


class Run(Protocol):
    """How a network is run: a partial of a function that takes the module first, so that it can be copied."""

    def __call__(self, pixels: torch.Tensor, /, with_prefixes: bool = False) -> Pass:
        """Run the module once; `with_prefixes` where the tokens before the patches are wanted."""


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
    run: Run
    has_class_token: bool = False  # token 0 of the prefixes
    num_registers: int = 0  # the last tokens of the prefixes
    idle: frozenset[str] = frozenset()  # parameters and buffers that nothing depends on, such as those of a head
    is_compiled: bool = False  # what is called then goes through torch.compile

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied and pickled by the module, and how it is run: neither what is compiled, nor hooks of libraries.

        The copy has a module of its own.
        """
        run: Any = self.run.plain if isinstance(self.run, _Compiled) else self.run
        recipe = (run.func, run.args[1:], run.keywords)
        facts = (self.has_class_token, self.num_registers, self.idle)
        return _network_again, (*to_be_copied(self.module), recipe, facts, self.is_compiled)

    def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the map (B, C, h, w) of each chosen stage, in network order."""
        return self.run(pixels).maps

    def outputs(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps and the vectors, in one list: all that the network was made for."""
        found = self.run(pixels)
        return [*found.maps, *found.vectors.values()]

    def compiled(self) -> Network:
        """Return the network that goes through torch.compile, for one size of batch."""
        return replace(self, run=_Compiled(self.run), is_compiled=True)

    def plain(self) -> Network:
        """Return the network as it is without torch.compile."""
        return replace(self, run=self.run.plain, is_compiled=False) if isinstance(self.run, _Compiled) else self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers by name, without the idle ones."""
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.idle}


class _Compiled:
    """A function that goes through torch.compile, with the original function."""

    def __init__(self, plain: Run) -> None:
        self.plain = plain
        self._run = compiled(plain)

    def __call__(self, pixels: torch.Tensor, /, with_prefixes: bool = False) -> Pass:
        return Pass(*self._run(pixels, with_prefixes=with_prefixes))


def _network_again(module: Any, hooked: bool, recipe: Any, facts: tuple[Any, ...], is_compiled: bool) -> Network:
    """Make a network of what `Network.__reduce__` gave."""
    hook_again(module, hooked)
    function, arguments, keywords = recipe
    network = Network(module, partial(function, module, *arguments, **keywords), *facts)
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
    vectors: tuple[Vector, ...] = ()  # the vectors that were chosen
    other_sizes: set[Size] = field(default_factory=set)  # sizes of inputs that were found to fit, besides its own
    make_module: Callable[[Backbone, bool], Any] | None = None  # makes the same network again: see as_module
    asked: BackboneCall | None = None  # what it was loaded by
    load_embedder: Callable[[], Backbone] | None = None  # loads the checkpoint for its embedding: see embed
    _embedder: Backbone | None = None

    def __repr__(self) -> str:
        points: tuple[Stage | Vector, ...] = (*self.selected, *self.vectors)
        stages = ", ".join(f"{point.name} {shown_shape(point.shape)}" for point in points)
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
        return self.network.has_class_token

    def preprocess(self, picture: Any) -> torch.Tensor:
        """Return the input that `forward` takes a batch of, for a picture: (C, H, W), uint8 as a rule.

        A list of pictures gives (B, C, H, W). A picture is a path or URL, a picture of Pillow, or an array or tensor
        (H, W), (H, W, C) or (C, H, W) of uint8 or uint16. Options of pixels that the backbone was loaded with are
        applied as `extract` applies them. Raises UsageError for something that is no picture, or cannot be read.
        """
        return prepared(picture, self.rules, self.preprocessing, self.preprocessing.size)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {stage: (B, C, h, w)} for (B, C, H, W) from `preprocess`, on the device, in the precision computed in.

        Chosen vectors come after the stages, {"embedding": (B, D)}. Pixels may have another size if the network takes
        it. No gradient goes into the network, but a head can be trained on what it returns. Raises UsageError for any
        other input, such as pixels that are already normalised.
        """
        found = self.run(pixels)
        return {**self._by_stage(found.maps), **found.vectors}

    def class_tokens(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {stage: (B, C)} for (B, C, H, W) from `preprocess`. Raises UsageError without a class token."""
        if not self.has_class_token:
            raise UsageError(f"{self.name} has no class token", "use --pool avg for one vector per image")
        return self._by_stage([prefix[:, 0] for prefix in self.run(pixels, with_prefixes=True).prefixes])

    def embed(self, pictures: Any) -> torch.Tensor:
        """Compute the model's own vector of each picture, (B, D).

        `pictures` are (B, C, H, W) from `preprocess`, or whatever that takes: one picture or a list of them. The first
        call loads the network once more, with what comes after its last stage, unless `embedding` was chosen. Raises
        UsageError where the model makes no vector, CheckpointError where the checkpoint lacks what it is made by.
        """
        is_pixels = isinstance(pictures, torch.Tensor) and pictures.ndim == 4
        pixels = pictures if is_pixels else self.preprocess(pictures)
        embedder = self._with_embedding()
        return embedder.run(pixels if pixels.ndim == 4 else pixels[None]).vectors["embedding"]

    def _with_embedding(self) -> Backbone:
        if any(vector.name == "embedding" for vector in self.vectors):
            return self
        if self._embedder is None:
            if self.load_embedder is None:
                raise UsageError(
                    f"{self!r} does not know its checkpoint",
                    "load it with out_features=['embedding'] beside its stages",
                )
            self._embedder = replace(self.load_embedder(), preprocessing=self.preprocessing)
        return self._embedder

    def _by_stage(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {stage.name: tensor for stage, tensor in zip(self.selected, tensors, strict=True)}

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

    def run(self, pixels: torch.Tensor, with_prefixes: bool = False) -> Pass:
        """Compute all that was chosen in one pass, as `forward` does.

        `with_prefixes`: the tokens before the patches, too. Raises what `forward` raises.
        """
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
            maps, prefixes, vectors = self.network.run(as_run(ready, self.execution), with_prefixes=with_prefixes)
        return Pass(
            [found[:count] for found in maps],
            [found[:count] for found in prefixes],
            {name: found[:count] for name, found in vectors.items()},
        )

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
