"""Describe a checkpoint before its weights are read: its stages, their shapes and their cost, from the meta device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featcli.backbones.backbone import REFUSALS, Network, Weights
from featcli.backbones.extra_tensors import Skeleton, foreign_tensors, modules_in_use
from featcli.backbones.internals import is_of_meta, operations_of
from featcli.backbones.places import Places
from featcli.backbones.preprocessing import Preprocessing
from featcli.backbones.stages import Points, Stage, Vector, select
from featcli.backbones.weightless import WithoutValues, WithoutWeights, blank
from featcli.errors import CheckpointError, UsageError, one_line, shown
from featcli.pixels.resize import ResizeMode
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size, as_given
from featcli.spec.words import ALL, NATIVE, VECTORS, Norm

LEAST_SECOND_PASS = 1.5  # the share of the operations of a backbone above which it is run more than once


class Outputs(NamedTuple):
    """What a whole model gives for pixels."""

    maps: tuple[torch.Tensor, ...]  # (B, C, h, w) of each stage asked for
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a whole model is run for."""

    positions: tuple[int, ...]  # of the stages whose maps are returned
    reach: int  # how many stages the model has after its cut
    hidden_states: bool = False
    attentions: bool = False


class ModelSpec(ABC):
    """A checkpoint of one library, before its weights are read.

    A subclass sets the first attributes and says how to build the network. Everything that can be found without weights
    is found here, from one forward pass on the meta device.
    """

    asked: CheckpointSpec
    name: str
    library: str  # "timm" or "transformers"
    input_size: Size  # (H, W)
    stage_names: tuple[tuple[str, str], ...]  # (stage, module) in network order
    norm: Norm  # whether maps come before (raw) or after (model) the model's own final norm
    default_norm: Norm = "raw"  # if nobody asks for one
    norm_reason: str
    channels: int = 3  # of the pixels
    patch: Size | None = None  # (height, width) of a patch, if the backbone cuts its input into patches
    inside: str = ""  # where the backbone sits in a larger model
    first_index: int = 0  # the library's own index of the first stage
    strides: tuple[int, ...] | None = None  # if the library knows them; sizes alone round at odd input sizes
    freezes_norms: bool = False  # whether its configuration wants frozen batch norms in training
    default_indices: tuple[int, ...] | None = None  # the stages that a larger model uses; None is the last
    norms_of_maps: tuple[str, ...] | None = None  # norms that are no place of a map, if `module` is found in a run

    @abstractmethod
    def build(self, points: Points, device: str) -> Network:
        """Return a network without weights, on this device, that computes these stages and no more."""

    @abstractmethod
    def load(self, points: Points) -> tuple[Network, Weights]:
        """Make the same network on the CPU with the checkpoint's weights.

        Weights are proven: a tensor of the cut network that the checkpoint lacks is refused, unless `Weights` names it.
        Raises CheckpointError.
        """

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Return the checkpoint's own preprocessing at `input_size`, or with `resize_mode`.

        Raises CheckpointError and UsageError.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what the architecture is, wherever the checkpoint lies, as a part of the plan.

        It has the name, and what the checkpoint's own files and the user set, as they wrote it. It never has what the
        library adds or prints, which changes with its version.
        """

    def settings_beside(self, before: Mapping[str, Any], is_same_library: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the settings in the words of `before`, the settings of a dump that is resumed.

        Also returns the fields that keep their values there although the library has others by now, because nobody set
        them. `is_same_library` says whether the dump was begun with the same versions.
        """
        return self.settings(), []

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """The vectors that the model makes of a picture behind its stages, those that it has of spec.words.VECTORS."""
        return ()

    def class_names(self) -> tuple[str, ...]:
        """Name the classes of its logits, in their order, as the checkpoint's configuration does; empty where not."""
        return ()

    @property
    def licence(self) -> str:
        """The licence that the checkpoint's configuration names; empty where it names none."""
        return ""

    def module_config(self) -> Any:
        """Return a configuration of transformers that describes the network, for a `BackboneModule`."""
        raise NotImplementedError

    def run(self, module: Any, pixels: torch.Tensor, wanted: Wanted) -> Outputs:
        """Run a module that `load` made for its first stages. Returns the maps, and what else is wanted."""
        raise NotImplementedError

    @property
    def resize_mode(self) -> ResizeMode | None:
        """How pictures get their size, if that was asked for; None is the checkpoint's own way."""
        if self.asked.fit is None:
            return None
        if self.asked.fit != NATIVE:
            return ResizeMode(name=self.asked.fit, size=self.input_size, step=(1, 1))
        patch, strides = self.patch or (1, 1), [stage.stride for stage in self.stages]
        step = [lcm(side, max(stride[axis] for stride in strides)) for axis, side in enumerate(patch)]
        return ResizeMode(name=NATIVE, size=self.asked.largest_size, step=(step[0], step[1]))

    def refuse_other_sizes(self, points: Points) -> None:
        """Raise UsageError unless maps follow the size of the input and vectors do not, which `native` relies on."""
        resize_mode = self.resize_mode
        assert resize_mode is not None
        step, largest = resize_mode.step, resize_mode.size
        if largest is not None and (largest[0] < step[0] or largest[1] < step[1]):
            raise UsageError(
                f"--image-size {largest[0]}x{largest[1]}: {self.name} needs at least its step, {step[0]}x{step[1]}",
                f"give at least {step[0]}x{step[1]}",
            )
        stages = [self.stages[position] for position in points.positions]
        vectors = [vector.shape for vector in self.vectors if vector.name in points.vectors] if points.vectors else []
        for more in ((2, 1), (1, 3)):
            height, width = (self.input_size[axis] + more[axis] * step[axis] for axis in (0, 1))
            height, width = height - height % step[0], width - width % step[1]
            expected = [*(stage.shape_at((height, width)) for stage in stages), *vectors]
            try:
                probe = self._probe(points, (height, width))
                found = [tuple(shape[1:]) for shape in (*probe.shapes, *probe.vectors.values())]
            except UsageError as error:
                found, cause = [], error.message
            else:
                cause = f"of {height}x{width} pixels it gives {found}"
            if found != expected:
                raise UsageError(
                    f"--fit {NATIVE}: {self.name} does not take every size: {cause}",
                    "use --fit pad: it keeps the whole picture, at one size",
                )

    @cached_property
    def _whole(self) -> _Probe:
        return self._probe(Points(tuple(range(len(self.stage_names)))))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage, with the shapes that the network really gives, never from fields of a configuration."""
        known = self.strides or (None,) * len(self.stage_names)
        if len(self._whole.shapes) != len(self.stage_names):
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {self.name} names {len(self.stage_names)} stages and"
                f" gives {len(self._whole.shapes)} maps",
                "is its configuration complete?",
            )
        places = zip(self.stage_names, self._whole.places, self._whole.shapes, known, strict=True)
        return tuple(
            Stage(
                name=name,
                index=index,
                module=place or module,
                shape=(shape[1], shape[2], shape[3]),
                stride=self._stride(shape, stride),
            )
            for index, ((name, module), place, shape, stride) in enumerate(places, self.first_index)
        )

    def _stride(self, shape: torch.Size, known: int | None) -> tuple[int, int]:
        """Return the input pixels per cell, as the library says, unless the shape differs by more than rounding."""
        measured = self.input_size[0] / shape[2], self.input_size[1] / shape[3]
        if known is not None and 0.67 < measured[0] / known < 1.5:
            return known, known
        return round(measured[0]), round(measured[1])

    def select(
        self, out_features: Sequence[str] | None = None, out_indices: Sequence[int] | str | None = None
    ) -> tuple[int, ...]:
        """Return the positions of the chosen stages, in network order, by the rules of `stages.select`.

        Raises UsageError.
        """
        if out_features is None and out_indices is None:
            out_indices = self.default_indices
        known = {ALL, *(name for name, _ in self.stage_names)}
        by_module = any(part not in known for feature in out_features or () for part in feature.split(":"))
        pairs = [(stage.name, stage.module) for stage in self.stages] if by_module else self.stage_names
        return select(pairs, out_features, out_indices, self.first_index)

    def final_norm(self, positions: Sequence[int]) -> frozenset[str]:
        """Return the modules that `--norm model` runs for the maps of these stages, and `--norm raw` does not.

        Returns none if the two give the same maps.
        """
        if not positions:
            return frozenset()
        key = tuple(positions)
        if key not in self._final_norms:
            model, raw = (Counter(name for name, _ in self._modules_run(key, norm)) for norm in ("model", "raw"))
            self._final_norms[key] = frozenset(model - raw) if raw else frozenset()
        return self._final_norms[key]

    @cached_property
    def _final_norms(self) -> dict[tuple[int, ...], frozenset[str]]:
        return {}

    def _modules_run(self, positions: Sequence[int], norm: Norm) -> list[tuple[str, int]]:
        """Return `modules_run` for the maps of these stages with this norm; [] if the model refuses that."""
        twin = copy(self)
        twin.norm = norm
        for device in ("meta", "cpu"):  # some models look into their tensors
            try:
                network = twin.build(Points(tuple(positions)), device)
                return modules_run(network.module, network.maps, self.blank(device))
            except Exception:  # libraries refuse in many ways
                continue
        return []

    def refuse_foreign(
        self,
        extra: Iterable[str],
        skeleton: Skeleton,
        modules_in_use: Callable[[], frozenset[str]],
        shapes: Mapping[str, torch.Size] | None = None,
    ) -> None:
        """Raise CheckpointError if the checkpoint has tensors that another network than this one would use.

        `extra` are the names that this one lacks, `skeleton` is its structure before it was cut. `modules_in_use` gives
        what `in_use` does.
        """
        foreign = sorted(foreign_tensors(extra, skeleton, modules_in_use, shapes))
        if foreign:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {len(foreign)} of its tensors have no place in"
                f" {self.name}, whose maps would differ with them, first {', '.join(foreign[:3])}",
                self._hint_for(foreign, shapes or {}),
            )

    def in_use(self, points: Points, network: Network) -> frozenset[str]:
        """Return the modules in use. See `modules_in_use`."""
        try:
            return modules_in_use(self.build(points, "meta"), self.blank("meta"))
        except Exception:  # some models look into their tensors
            return modules_in_use(network, self.blank("cpu"))

    def _hint_for(self, foreign: Sequence[str], shapes: Mapping[str, torch.Size]) -> str:
        """Return what may be done about tensors without a place: which argument would give them one, if any."""
        for name, value in self._arguments_for(foreign, shapes):
            try:
                names = self._names_with(name, value)
            except Exception:  # libraries refuse in many ways
                continue
            if names.issuperset(foreign):
                return f"is it a network with them? Then add --model-arg {as_given(name, value)}"
        return "do these weights belong to this architecture?"

    @abstractmethod
    def _arguments_for(self, foreign: Sequence[str], shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, Any]]:
        """Return arguments of the network, by name, with which it could have such tensors."""

    @abstractmethod
    def _names_with(self, argument: str, value: Any) -> set[str]:
        """Return the names of the whole network's tensors with another value of an argument.

        Raises whatever its library does.
        """

    def blank(self, device: str) -> torch.Tensor:
        """Return one blank picture: (1, C, H, W) of the backbone's input."""
        return torch.zeros(1, self.channels, *self.input_size, device=device)

    def refuse_idle_arguments(self) -> None:  # noqa: B027 (most libraries do so themselves)
        """Raise UsageError for a `--model-arg` that changes nothing about the network."""

    def is_of(self, backbone: Mapping[str, Any]) -> bool:
        """Return whether this is the backbone of a dump, by its settings."""
        return self.settings_beside(backbone, False)[0] == backbone

    def refuse_idle_norm(self, positions: Sequence[int]) -> None:
        """Raise UsageError if `--norm` asks for other maps of these stages than the default, and gets the same."""
        norm, last = self.norm, len(self.stage_names) - 1
        if norm == self.default_norm or self.final_norm(positions):
            return
        if not positions:
            raise UsageError(
                f"--norm {norm}: no stage of {self.name} is chosen, and vectors are as the model makes them",
                "choose a stage too, or leave --norm out",
            )
        if last not in positions and self.final_norm((last,)):
            name = self.stage_names[last][0]
            raise UsageError(
                f"--norm {norm}: the final norm of {self.name} is for {name} alone, which is not chosen",
                f"choose {name} too, or leave --norm out",
            )
        raise UsageError(
            f"--norm {norm}: {self.name} has no final norm for its maps: they are the same without it",
            "leave --norm out",
        )

    def norms_before_pooling(self, of_class_token: bool) -> frozenset[str]:
        """Return the norms that the model itself applies to its last stage, or its class token, before it pools.

        Only norms count that these maps have not passed.
        """
        return frozenset()

    def can_apply(self, norms: frozenset[str]) -> bool:
        """Return whether `--norm model` gives maps of the last stage after these norms, which come before pooling."""
        return self.norm == "raw" and bool(self.final_norm((len(self.stage_names) - 1,)))

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the whole backbone, without a head."""
        return self._whole.parameters

    def share(self, points: Points) -> float:
        """Return the share of the whole backbone's floating point operations that these points cost."""
        if self._is_whole(points) and not points.vectors:
            return 1.0
        share = self._probe(points).operations / self._whole.operations if self._whole.operations else 1.0
        return 1.0 if 1.0 < share < LEAST_SECOND_PASS else share  # a head costs something, too

    def share_of_convolutions(self, points: Points) -> float:
        """Return the share of the operations for these stages that are in convolutions."""
        found = self._whole if self._is_whole(points) else self._probe(points)
        return found.convolutions / found.operations if found.operations else 0.0

    def _is_whole(self, points: Points) -> bool:
        last = len(self.stage_names) - 1
        return points.deepest(last + 1) == last

    def choose(
        self, out_features: Sequence[str] | None = None, out_indices: Sequence[int] | str | None = None
    ) -> Points:
        """Find the chosen points: stages as `select` does, and the vectors among `out_features`. Raises UsageError."""
        named = [name for name in out_features or () if name in VECTORS]
        features = None if out_features is None else [name for name in out_features if name not in VECTORS]
        if len(set(named)) < len(named):
            raise UsageError(f"--out-features {','.join(out_features or ())} names a vector twice", "name each once")
        wanted = tuple(name for name in VECTORS if name in named)
        self._refuse_absent(wanted)
        if named and not features:
            return Points(self.select(None, out_indices) if out_indices is not None else (), wanted)
        return Points(self.select(features, out_indices), wanted)

    def _refuse_absent(self, vectors: Sequence[str]) -> None:
        """Raise UsageError for vectors that the model does not make."""
        there = [vector.name for vector in self.vectors] if vectors else []
        absent = [name for name in vectors if name not in there]
        if absent:
            makes = f"makes {' and '.join(there)}" if there else "makes no vector of a picture"
            raise UsageError(
                f"--out-features {absent[0]}: {self.name} has none, it {makes}",
                "featcli inspect lists what there is; --pool avg makes a vector of a map",
            )

    @cached_property
    def _probed(self) -> dict[tuple[Points, Size | None], _Probe]:
        return {}

    def _probe(self, points: Points, at: Size | None = None) -> _Probe:
        """Find shapes and costs in one forward pass that computes nothing."""
        key = points, at
        if key not in self._probed:
            self._probed[key] = self._run_once(points, (1, self.channels, *(at or self.input_size)))
        return self._probed[key]

    def _run_once(self, points: Points, size: tuple[int, ...]) -> _Probe:
        try:
            try:
                return self._forward_once(self.build(points, "meta"), torch.empty(size, device="meta"))
            except (*REFUSALS, NotImplementedError) as error:
                if isinstance(error, UsageError) or not is_of_meta(error):
                    raise
            with WithoutWeights(), WithoutValues():
                network = self.build(points, "cpu")
                network.module.requires_grad_(False)  # otherwise every layer's maps are kept for gradients: gigabytes
                return self._forward_once(network, blank(size))
        except UsageError:
            raise
        except REFUSALS as error:
            norm = " and --norm model" if self.norm == "model" else ""
            raise UsageError(
                f"the backbone cannot be run with an input of {'x'.join(map(str, size[1:]))}{norm}: {one_line(error)}",
                "choose another --image-size, a multiple of the backbone's largest stride or its patch"
                + (", or --norm raw" if norm else "")
                + (", or leave --num-channels out" if self.channels != 3 else ""),
            ) from error

    def _forward_once(self, network: Network, pixels: torch.Tensor) -> _Probe:
        network.module.eval()
        places = Places(pixels, self._is_norm_of_maps)
        watched = nullcontext() if self.norms_of_maps is None else places.watched(network.module)
        # Gradients are on, because under inference_mode no operation reaches the counter, and under no_grad some models
        # fail in it.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter, watched:
            maps, _, vectors = network.run(pixels)
        for found in maps:
            if found.ndim != 4:
                raise UsageError(f"a stage of this backbone yields {tuple(found.shape)}, not a map (B, C, H, W)")
        operations, convolutions = operations_of(counter)
        return _Probe(
            shapes=[found.shape for found in maps],
            vectors={name: found.shape for name, found in vectors.items()},
            places=[None if self.norms_of_maps is None else places.of(found) for found in maps],
            operations=operations,
            convolutions=convolutions,
            parameters=sum(parameter.numel() for parameter in network.module.parameters()),
        )

    def _is_norm_of_maps(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{norm}.") for norm in self.norms_of_maps or ())


@dataclass(frozen=True)
class _Probe:
    """What one forward pass showed."""

    shapes: list[torch.Size]  # (B, C, H, W) of each map
    vectors: dict[str, torch.Size]  # (B, D) by name
    places: list[str | None]  # the module that gives the map, if that was watched and there is one
    operations: int
    convolutions: int  # operations in convolutions
    parameters: int


def modules_run(
    module: nn.Module, run: Callable[[torch.Tensor], object], pixels: torch.Tensor
) -> list[tuple[str, int]]:
    """Return each module that takes part when `run` gets these pixels, with the size of its first input.

    They are in the order in which they end, without those that do nothing.
    """
    found: list[tuple[str, int]] = []

    def note(name: str, given: tuple[object, ...]) -> None:
        found.append((name, given[0].numel() if given and isinstance(given[0], torch.Tensor) else 0))

    module.eval()
    hooks = [
        part.register_forward_hook(lambda _, given, __, name=name: note(name, given))
        for name, part in module.named_modules()
        if not isinstance(part, nn.Identity)
    ]
    try:
        with torch.no_grad():
            run(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def norms_alone(module: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Return the norms among modules that run one after another, if nothing else is among them."""

    def is_norm(name: str) -> bool:
        part = module.get_submodule(name)
        has_layers = any(isinstance(one, nn.Linear | nn.Conv2d) for one in part.modules())  # as a ConvNormAct has
        return "norm" in type(part).__name__.lower() and not has_layers

    found: set[str] = set()
    for name in names:
        part, steps = module.get_submodule(name), name.split(".")
        if any(is_norm(".".join(steps[:length])) for length in range(1, len(steps))) or isinstance(part, nn.Dropout):
            continue  # a part of a norm
        if is_norm(name):
            found.add(name)
        elif not [*part.children()]:
            return frozenset()
    return frozenset(found)
