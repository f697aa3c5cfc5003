"""Share what all transformers checkpoints have: a configuration, an image processor, weights that are proven."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Network, Weights
from featcli.backbones.composites import OUTSIDE, described_place, names_of_task
from featcli.backbones.extra_tensors import OF_NO_EFFECT, layers_in, place_of, skeleton_of
from featcli.backbones.heads import FIELDS, HEADS, SECOND_PASS, Head, classes_of_vectors, find_head
from featcli.backbones.hub import hub_or_cache, hub_weights, unreachable
from featcli.backbones.idle_arguments import refuse_words
from featcli.backbones.image_processor import ImageProcessor, default_processor, plain_json, read_processor
from featcli.backbones.internals import (
    faults_are_heard,
    files_are_read,
    holds_more_than_tensors,
    ignored_names_of_transformers,
    is_of_meta,
    is_whole_model,
    load_pretrained,
    needs_code_of_its_own,
    prefix_of_transformers,
    silent_transformers,
    vision_class,
    written_config,
)
from featcli.backbones.key_names import in_its_place
from featcli.backbones.model_spec import ModelSpec, modules_run
from featcli.backbones.own_preprocessing import (
    asked_of_preprocessing,
    is_normalisation_said,
    normalisation_in,
    on_record,
)
from featcli.backbones.preprocessing import Preprocessing, processor_preprocessing
from featcli.backbones.stages import Points, Vector
from featcli.backbones.weightless import WithoutWeights
from featcli.backbones.weights import (
    hash_files,
    is_counter,
    more_than_tensors,
    refuse_pretenders,
    refuse_whole_numbers,
    tensors_in,
    weights_files,
)
from featcli.errors import CheckpointError, FeatcliError, UsageError, counted, did_you_mean, nearest, one_line, shown
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size, as_given
from featcli.system.borrowed import own_random_numbers
from featcli.system.faults import fault_behind, machine_error
from featcli.system.files import is_file, is_folder, is_there

DEFAULT_SIZE = 224
FINAL_NORMS = ("layernorm", "post_layernorm", "norm", "rms_norm")  # names of the final norm in models
# Fields of a configuration that do not change what the backbone computes.
NOT_ARCHITECTURE = frozenset(
    "_name_or_path transformers_version architectures out_features out_indices dtype torch_dtype id2label"
    " label2id".split()
)
FOLLOWING = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")  # from other fields
SETTLED = {
    "num_channels": "it is what --num-channels sets",
    "out_features": "it is what --out-features sets",
    "out_indices": "it is what --out-indices sets",
}
PARTS = ("vision_config", "backbone_config")  # places of the backbone's configuration in that of a larger model


class TransformersModelSpec(ModelSpec):
    """A transformers checkpoint before its weights are read.

    A subclass says which class it is, and how it gives maps.
    """

    library = "transformers"
    vectors_of_trunk: Mapping[str, int] = MappingProxyType({})  # name -> D of those that it gives with its maps
    is_plain_of_trunk = False  # whether the network of the maps is the plain model of its type

    def __init__(self, asked: CheckpointSpec, config: Any, outer: Any = None) -> None:
        """Read a configuration: `config` is the vision model's, `outer` that of a larger model around it."""
        self.asked = asked
        self.name = name_of(asked)
        self.config = with_arguments(copied(config), asked.model_args)
        self.outer = outer
        self.model_type = config.model_type
        if asked.num_channels is not None:
            self.config.num_channels = asked.num_channels
        self.channels = getattr(self.config, "num_channels", 3)
        self.processor = processor_of(asked)
        self._has_processor = self.processor is not None
        self.input_size = asked.input_size or own_size(asked, self.processor) or config_size(self.config)
        # Random weights were not trained on any pixels, so the default processor is as good as another.
        if self.processor is None and (asked.is_random or is_normalisation_said(asked)):
            self.processor = default_processor(self.model_type, self.input_size, asked.processor_backend)
        if self.processor is not None:
            with reading(asked):
                wanted = asked_of_preprocessing(asked, self.channels)
                self.processor = self.processor.overridden(wanted, self.input_size, asked.fit is not None)
            if not (self._has_processor or asked.is_random):
                self.processor.overrides |= normalisation_in(wanted)
        if outer is not None:
            self.name += f" (the {self.model_type} in a {outer.model_type})"
            self.inside = described_place(outer)

    @abstractmethod
    def _blank(self, points: Points) -> Any:
        """Return the whole model without weights, on the default device."""

    @abstractmethod
    def _network(self, module: Any, points: Points, heads: Sequence[Head]) -> Network:
        """Return the model, cut after the deepest of these points. The models of these heads are in it."""

    @abstractmethod
    def _read(self, points: Points) -> tuple[Any, Mapping[str, Any]]:
        """Return the whole model with the checkpoint's weights, and transformers' report of what it loaded."""

    def _may_be_absent(self, key: str) -> bool:
        """Return whether plain checkpoints lack this tensor. It is then named; any other absence is refused."""
        return False

    @abstractmethod
    def _run_trunk(self, module: Any, pixels: torch.Tensor) -> Any:
        """Return what the whole model gives when it is run for its maps."""

    @cached_property
    def vectors(self) -> tuple[Vector, ...]:
        """See ModelSpec: those of transformers' own classes."""
        found: list[Vector] = []
        for name, kind in self._kinds.items():
            what = "get_image_features" if hasattr(kind, "get_image_features") else FIELDS[name]
            if name in self.vectors_of_trunk:
                size, remark = self.vectors_of_trunk[name], ""
            else:
                try:
                    head = self._head(name)
                except Exception:  # libraries refuse in many ways
                    continue
                size, remark = head.size, "" if head.shared else SECOND_PASS
            found.append(Vector(name, (size,), f"{kind.__name__}.{what}", remark))
        return tuple(found)

    @cached_property
    def _kinds(self) -> dict[str, Any]:
        """Return the classes that may make its vectors, by name."""
        outer = self._outer_to_run
        found = classes_of_vectors(self.config, outer)
        if self.is_plain_of_trunk and "embedding" not in self.vectors_of_trunk:
            found.pop("embedding", None)
        if self.outer is not None and outer is None:  # a part of a larger model whose end is for something else
            return {name: kind for name, kind in found.items() if name == "embedding"}
        return found

    @property
    def _outer_to_run(self) -> Any:
        """Return the configuration of the larger model, with its vision tower as changed; None without a tower."""
        if not hasattr(self.outer, "vision_config"):
            return None  # its heads make something else than one vector of a picture
        outer = copied(self.outer)
        outer.vision_config = copied(self.config)
        return outer

    def _config_of_head(self, name: str) -> Any:
        outer = None if name == "embedding" else self._outer_to_run
        return copied(self.config) if outer is None else outer

    @cached_property
    def _heads(self) -> dict[str, Head]:
        """Return the heads that were found so far, by the names of their vectors."""
        return {}

    def _head(self, name: str) -> Head:
        if name not in self._heads:
            try:
                self._heads[name] = self._found_head(name, "meta")
            except Exception as error:  # a model's forward raises anything for an unexpected input
                if not is_of_meta(error):
                    raise
                with WithoutWeights():
                    self._heads[name] = self._found_head(name, "cpu")
        return self._heads[name]

    def _found_head(self, name: str, device: str) -> Head:
        last = Points((len(self.stage_names) - 1,))
        with torch.device(device), silent_transformers():
            trunk, model = self._blank(last).eval(), self._kinds[name](self._config_of_head(name)).eval()
        pixels = self.blank(device)
        return find_head(name, model, trunk, lambda: self._run_trunk(trunk, pixels), pixels)

    def _heads_for(self, points: Points) -> tuple[Head, ...]:
        """Return the heads of those vectors that need more than the network of the maps. Raises UsageError."""
        own = [name for name in points.vectors if name not in self.vectors_of_trunk]
        try:
            return tuple(self._head(name) for name in own)
        except KeyError:
            raise UsageError(f"{self.name} has no {' and no '.join(own)}", "leave it out") from None

    def _with_heads(self, trunk: Any, models: Mapping[str, Any]) -> Any:
        """Put the models of heads, which are cut, into the network of the maps. Returns that."""
        if models:
            trunk.add_module(HEADS, nn.ModuleDict(models))
        return trunk

    def _built(self, points: Points) -> Any:
        """Return the network of the maps without weights, with its heads, on the default device."""
        heads = self._heads_for(points)
        trunk = self._blank(points)  # first: its random numbers are then those of a run without vectors
        models: dict[str, Any] = {}
        for head in heads:
            models[head.vector] = head.cut(self._kinds[head.vector](self._config_of_head(head.vector)))
        return self._with_heads(trunk, models).eval()

    def _read_head(self, head: Head) -> Any:
        """Return the model of a head with the checkpoint's weights, cut. Raises CheckpointError."""
        kind, config = self._kinds[head.vector], self._config_of_head(head.vector)
        whole = iter((None, names_of_task(config, ()) or None))
        ways = self._ways_to_name() if head.vector == "embedding" else whole
        model, report = self.from_pretrained(kind, config, ways)
        skeleton, model = skeleton_of(model), head.cut(model)
        own = model.state_dict()
        self._refuse_misfits([misfit for misfit in report["mismatched_keys"] if misfit[0] in own], head.vector, own)
        lost = sorted(key for key in report["missing_keys"] if key in own and not is_counter(key))
        self._refuse_lost(lost, head.vector, own, report, lambda: self._way_around(head.vector))
        places = {name.rpartition(".")[0] for name in own}
        for key in sorted(report["unexpected_keys"]):
            place, rest = place_of(key, skeleton)
            if place in places and rest and place and not OF_NO_EFFECT.search(key):
                raise CheckpointError(
                    f"checkpoint {shown(self.asked.checkpoint_name)}: {key} has no place in"
                    f" {type(model).__name__}, whose {head.vector} is another with it",
                    self._way_around(head.vector),
                )
        return model

    def _ways_to_name(self) -> Iterator[Mapping[str, str] | None]:
        """Yield what may have to be replaced in names on disk for the backbone, the most common first."""
        yield None

    def build(self, points: Points, device: str) -> Network:
        """See ModelSpec."""
        heads = self._heads_for(points)  # before: they are found on a device of their own
        with torch.device(device), silent_transformers():
            return self._network(self._built(points), points, heads)

    def load(self, points: Points) -> tuple[Network, Weights]:
        """Return the network with weights. See ModelSpec.

        Only norms that plain checkpoints lack may be absent, and are named.
        """
        if self.asked.is_random:
            origin = f"random weights, seed {self.asked.seed_of_weights}"
            with own_random_numbers(self.asked.seed_of_weights):
                return self.build(points, "cpu"), Weights(origin=origin, random=True)
        if is_file(self.asked.checkpoint_name):
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: it is a configuration without weights",
                "give the folder that holds its weights too, or --random-init",
            )
        if is_folder(self.asked.checkpoint_name):
            refuse_pretenders(files_of(self.asked))
        module, report = self._read(points)
        skeleton, extra = skeleton_of(module), self._extra(module, report)
        ignored = ignored_names_of_transformers(module)
        self._refuse_whole_numbers(module)
        heads = self._heads_for(points)
        models = {head.vector: self._read_head(head) for head in heads}
        network = self._network(self._with_heads(module, models), points, heads)
        weights = self._proven(network, report, points)
        inside = [key for key in extra if not key.startswith(OUTSIDE) and not self._is_of_other_stages(key)]
        self.refuse_foreign(inside, skeleton, lambda: self.in_use(points, network))
        undecided = [key for key in self.on_disk if _matches(ignored, key) and not OF_NO_EFFECT.search(key)]
        unexpected = sorted(key.removeprefix(OUTSIDE) for key in report["unexpected_keys"])
        used = [name for model in models.values() for name in model.state_dict()]
        unexpected = [key for key in unexpected if not any(f".{key}".endswith(f".{name}") for name in used)]
        return network, replace(weights, unexpected=tuple(unexpected), undecided=tuple(undecided))

    @cached_property
    def on_disk(self) -> Mapping[str, bool]:
        """All tensors of the checkpoint by name, and whether they hold floating-point numbers.

        Raises CheckpointError and MachineError.
        """
        with reading(self.asked):
            return tensors_in(files_of(self.asked))

    def _refuse_whole_numbers(self, module: Any) -> None:
        """Raise CheckpointError for whole numbers in the place of a parameter, by the ends of their names.

        The beginnings of the names differ between module and disk.
        """
        leaves = {name.rpartition(".")[2] for name, one in module.named_parameters() if one.is_floating_point()}
        whole = [name for name, is_floating in self.on_disk.items() if not is_floating]
        named = [name for name in whole if name.rpartition(".")[2] in leaves and not OF_NO_EFFECT.search(name)]
        refuse_whole_numbers(self.asked.checkpoint_name, named)

    def _extra(self, module: Any, report: Mapping[str, Any]) -> list[str]:
        """Return the tensors that the model lacks under their names in the model: with its own prefix, or without.

        transformers removes or adds a prefix only for tensors that the model has.
        """
        prefix = f"{prefix_of_transformers(module)}."
        names = sorted(report["unexpected_keys"])
        if not any(name.startswith(prefix) for name in module.state_dict()):
            return [name.removeprefix(prefix) for name in names]
        inner = getattr(module, prefix_of_transformers(module))  # for DINOv3 it is a list of layers, and no model
        if names and is_whole_model(inner) and not any(name.startswith(prefix) for name in self.on_disk):
            return [name if name.startswith((prefix, OUTSIDE)) else prefix + name for name in names]
        return names

    def _arguments_for(self, foreign: Sequence[str], shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, Any]]:
        fields = self.config.to_dict()
        yield from ((name, True) for name, value in fields.items() if value is False and name not in NOT_ARCHITECTURE)
        numbers = {"num_hidden_layers": layers_in(foreign), "num_register_tokens": 4, "layer_scale_init_value": 1e-5}
        yield from ((name, value) for name, value in numbers.items() if name in fields)

    def _names_with(self, argument: str, value: Any) -> set[str]:
        return set(self._shapes_with({argument: value}))

    def _shapes_with(self, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole network's tensors with other values of these fields."""
        twin = copy(self)
        twin.config = with_arguments(self.config, {key: arguments[key] for key in arguments if key not in SETTLED})
        if "num_channels" in arguments:
            twin.config = copied(twin.config)
            twin.config.num_channels = arguments["num_channels"]
        with torch.device("meta"), silent_transformers():
            return {
                key: tuple(one.shape)
                for key, one in twin._blank(Points((0,))).state_dict().items()
                if not is_counter(key)
            }

    def _hint_to_fit(self, lost: Sequence[str], misfits: Sequence[tuple[str, Any, Any]], otherwise: str) -> str:
        """Return which changed field explains absent tensors or tensors of other shapes in the file, or `otherwise`.

        `misfits` are names with the shapes in the file and in the network.
        """
        own = self._shapes_with({})
        there = {key: tuple(shape) for key, shape, _ in misfits}
        for name, value in self._fields_to_fit(misfits):
            try:
                shapes = self._shapes_with({name: value})
            except Exception:  # configurations and constructors refuse in many ways
                continue
            is_right = shapes == own | there if misfits else own.keys() - shapes.keys() == set(lost)
            if is_right and shapes.items() <= (own | there).items() and shapes != own:
                if name == "num_channels":
                    return f"are they for pictures of {counted(value, 'channel')}? Then add --num-channels {value}"
                return f"is it a network with another {name}? Then add --model-arg {as_given(name, value)}"
        return otherwise

    def _fields_to_fit(self, misfits: Sequence[tuple[str, Any, Any]]) -> Iterable[tuple[str, Any]]:
        fields = {name: value for name, value in self.config.to_dict().items() if name not in NOT_ARCHITECTURE}
        yield from ((name, False) for name, value in fields.items() if value is True)
        if "num_hidden_layers" in fields:
            yield "num_hidden_layers", layers_in(self.on_disk)
        ratios = {there / here for _, *both in misfits for there, here in zip(*both, strict=False) if there != here}
        numbers = {name: value for name, value in fields.items() if type(value) in (int, float) and value}
        for ratio, (name, value) in product(ratios, numbers.items()):
            if value * ratio == int(value * ratio):
                yield name, int(value * ratio)

    def _is_of_other_stages(self, key: str) -> bool:
        """Return whether a tensor that the cut network lacks is that of a stage that was not asked for."""
        return False

    def from_pretrained(
        self, kind: Any, config: Any, ways: Iterable[Mapping[str, str] | None]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Load a model of this class with transformers' own loader, and its report of what it loaded.

        Each of the `ways` replaces patterns in the names on disk, or none. The first way by which nothing is missing is
        used, or else the first by which least is missing. Raises CheckpointError.
        """
        found: list[tuple[Any, Mapping[str, Any]]] = []
        for renamed in ways:
            if renamed is None and found:
                continue
            with reading(self.asked), files_are_read():
                found.append(load_pretrained(kind, self.asked.checkpoint_name, config, renamed))
            if not self._lost(found[-1][1]["missing_keys"]):
                break
        module, report = min(found, key=lambda one: len(self._lost(one[1]["missing_keys"])))
        return module.eval(), report

    def _lost(self, missing: Iterable[str]) -> list[str]:
        """Return the names of missing tensors without those that plain checkpoints lack."""
        return sorted(key for key in missing if not is_counter(key) and not self._may_be_absent(key))

    def preprocessing(self) -> Preprocessing:
        """Return the image processor's own preprocessing. See ModelSpec."""
        if self.processor is None:
            raise no_processor(self.asked)
        with reading(self.asked):
            found = processor_preprocessing(self.processor, self.input_size, self.channels, self.resize_mode)
        guess = "" if self._has_processor else f"a guess: transformers' default for {self.model_type}"
        return on_record(found, self.processor.overrides, guess, self.asked.is_random)

    def class_names(self) -> tuple[str, ...]:
        """See ModelSpec. Those that transformers makes up for a configuration without any are none."""
        outer = self._outer_to_run
        names = dict((self.config if outer is None else outer).id2label or {})
        found = tuple(str(names[number]) for number in sorted(names))
        return () if found == tuple(f"LABEL_{number}" for number in range(len(found))) else found

    @property
    def licence(self) -> str:
        """See ModelSpec."""
        found = getattr(self.config if self.outer is None else self.outer, "license", None)
        return str(found or "")

    def norms_before_pooling(self, of_class_token: bool) -> frozenset[str]:
        """Return the norms that the plain model of the type runs on all that the last stage gives. See ModelSpec."""
        kind = vision_class(self.config)
        if kind is None or (self.norm == "model" and self.final_norm((len(self.stage_names) - 1,))):
            return frozenset()
        values = 1 if of_class_token else math.prod(self.stages[-1].shape)
        for device in ("meta", "cpu"):
            try:
                with torch.device(device), silent_transformers():
                    module = kind(self.config)
                found = modules_run(module, partial(self._run_whole, module), self.blank(device))
                return frozenset(name for name, size in found if name in FINAL_NORMS and size >= values)
            except Exception:  # some models look into their tensors
                continue
        return frozenset()

    def _run_whole(self, module: Any, pixels: torch.Tensor) -> None:
        """Run the plain model of the type, up to the end of its pooling."""
        module(pixel_values=pixels)

    def settings(self) -> dict[str, Any]:
        """Return the settings. See ModelSpec."""
        return {
            "library": "transformers",
            "architecture": self.model_type if self.outer is None else f"{self.model_type} in {self.outer.model_type}",
            "input_size": list(self.input_size),
            "num_channels": self.channels,
            "norm": self.norm,
            "config_json": self._config_json,
        }

    def settings_beside(self, before: Mapping[str, Any], is_same_library: bool) -> tuple[dict[str, Any], list[str]]:
        """Word the settings as `before`. See ModelSpec.

        Older plans hold a configuration with every default of their transformers.
        """
        if not isinstance(before.get("config"), Mapping):
            return super().settings_beside(before, is_same_library)
        config, unset = _of_architecture(self.config.to_dict()), list[str]()
        if not is_same_library:  # else no default has changed, and whatever differs was set
            set_here = dict(self._config_json)
            if self.asked.num_channels is not None:
                set_here["num_channels"] = self.asked.num_channels
            config, unset = unless_set(before["config"], config, set_here)
        settings = {"library": "transformers", "input_size": list(self.input_size), "norm": self.norm}
        return {**settings, "config": config}, [f"config.{name}" for name in unset]

    @cached_property
    def _config_json(self) -> dict[str, Any]:
        """What config.json, or the user, says about the backbone, or about all of a larger model if no part is named.

        Raises CheckpointError.
        """
        asked, config = self.asked, self.asked.config
        if config is None:
            with reading(asked):
                config = written_config(asked.checkpoint_name)
        elif not isinstance(config, Mapping):
            config = config.to_diff_dict()
        parts = () if self.outer is None else [config.get(f"{part}{end}") for part in PARTS for end in ("", "_dict")]
        written = next((part for part in parts if isinstance(part, Mapping)), config)
        return _of_architecture({**written, **asked.model_args})

    def _refuse_misfits(self, misfits: Sequence[Any], part: str, tensors: Collection[str]) -> None:
        """Raise CheckpointError for tensors of a part that have another shape in the checkpoint."""
        if not misfits:
            return
        key, there, here = misfits[0]
        doubt = "does config.json belong to these weights?"
        if self.asked.num_channels is not None:
            hint = "these weights are for another number of channels: leave --num-channels out"
        else:
            hint = self._hint_to_fit([], misfits, doubt) if part == "backbone" else doubt
        raise CheckpointError(
            f"checkpoint {shown(self.asked.checkpoint_name)}: {len(misfits)} of {len(tensors)} tensors of its"
            f" {self.model_type} {part} have another shape, first {key}: {tuple(there)}, not {tuple(here)}",
            hint,
        )

    def _refuse_lost(
        self,
        lost: Sequence[str],
        part: str,
        tensors: Collection[str],
        report: Mapping[str, Any],
        hint: Callable[[], str],
    ) -> None:
        """Raise CheckpointError for tensors of a part that the checkpoint lacks."""
        if lost:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: it lacks {len(lost)} of the {len(tensors)}"
                f" tensors of its {self.model_type} {part}, first {', '.join(lost[:3])}"
                + in_its_place(lost[0], report["unexpected_keys"]),
                hint(),
            )

    def _are_of_head(self, lost: Sequence[str]) -> bool:
        """Return whether the maps do not need these tensors of their network, which gives a vector too."""
        return False

    def _way_around(self, vector: str) -> str:
        """Return a hint to what gives a vector if the checkpoint lacks the weights for this one."""
        if vector != "embedding":
            return f"leave {vector} out: this checkpoint was saved without that head"
        last = Points((len(self.stage_names) - 1,))
        pool = "cls" if self.build(last, "meta").has_class_token else "avg"
        norm = " --norm model" if self.norm == "raw" and self.final_norm(last.positions) else ""
        name = self.stage_names[-1][0]
        return f"it has no pooler: take --out-features {name} --pool {pool}{norm}, one vector per picture without it"

    def _proven(self, network: Network, report: Mapping[str, Any], points: Points) -> Weights:
        tensors = network.tensors().keys()
        absent = sorted(k for k in report["missing_keys"] if k in tensors and not is_counter(k))
        missing = tuple(key for key in absent if self._may_be_absent(key))
        lost = [key for key in absent if key not in missing]
        misfits = sorted(misfit for misfit in report["mismatched_keys"] if misfit[0] in tensors)
        self._refuse_misfits(misfits, "backbone", tensors)
        if lost and points.vectors and self._are_of_head(lost):
            self._refuse_lost(lost, points.vectors[0], tensors, report, lambda: self._way_around(points.vectors[0]))
        self._refuse_lost(
            lost,
            "backbone",
            tensors,
            report,
            lambda: self._hint_to_fit(
                self._lost(report["missing_keys"]),
                [],
                "is the folder complete, and are these the weights its config.json describes?",
            ),
        )
        with hub_or_cache(wanted=False):  # all of it has just been read
            files = files_of(self.asked)
        return Weights(
            origin=name_of(self.asked),
            matched=len(tensors) - len(missing),
            total=len(tensors),
            missing=missing,
            files=hash_files(files),
        )


@contextmanager
def reading(asked: CheckpointSpec) -> Iterator[None]:
    """Turn whatever transformers raises in the block into an error of the checkpoint, or of the machine.

    Raises CheckpointError and MachineError.
    """
    is_here = asked.config is not None or is_there(asked.checkpoint_name)
    try:
        heard = nullcontext() if asked.config is not None else faults_are_heard(asked.checkpoint_name)
        with silent_transformers(), hub_or_cache(wanted=not is_here), heard:
            yield
    except FeatcliError:
        raise
    except Exception as error:  # files, hub, HTTP, unpickling and unknown types raise errors without a common type
        if not is_here:
            raise unreachable(asked.checkpoint_name, error, asked.checkpoint_name) from error
        if (fault := fault_behind(error)) is not None:
            raise machine_error(f"checkpoint {shown(asked.checkpoint_name)}", fault) from error
        cause, hint = _cause_and_hint(error)
        raise CheckpointError(f"checkpoint {shown(asked.checkpoint_name)}: {cause}", hint) from error


def _cause_and_hint(error: Exception) -> tuple[str, str]:
    """Return why a library refused a checkpoint, without advice that nobody should follow, and what to do."""
    if holds_more_than_tensors(error):
        return (
            f"a weights file holds {more_than_tensors(error)}, which could run code when read",
            "convert it to .safetensors on a machine where you trust it",
        )
    if needs_code_of_its_own(error):
        return "it needs code of its own, and featcli runs none", "use another checkpoint"
    return one_line(error), "is the folder whole?"


def name_of(asked: CheckpointSpec) -> str:
    """Return the last name of a folder or file, and a hub id as it is."""
    path = Path(asked.checkpoint_name)
    return path.resolve().name if is_there(path) else asked.checkpoint_name


def files_of(asked: CheckpointSpec) -> list[Path]:
    """Return the weights files of a folder or a hub id. Call it inside `hub_or_cache`. Raises CheckpointError."""
    path = Path(asked.checkpoint_name)
    return weights_files(path) if is_there(path) else hub_weights(asked.checkpoint_name)


def processor_of(asked: CheckpointSpec) -> ImageProcessor | None:
    """Read the image processor of a folder or hub id, or the one beside a config.json.

    Returns None if there is none.
    """
    if asked.config is not None:
        return None
    place = Path(asked.checkpoint_name)
    size = None if asked.fit else asked.input_size  # --fit sets the size by itself
    return read_processor(str(place.parent) if is_file(place) else asked.checkpoint_name, size, asked.processor_backend)


def no_processor(asked: CheckpointSpec) -> CheckpointError:
    """Return the error for a checkpoint without an image processor."""
    return CheckpointError(
        f"checkpoint {shown(asked.checkpoint_name)}: there is no preprocessor_config.json beside its config.json,"
        " so nobody can tell which pixels it was trained on",
        "give --mean and --std, or save the processor it belongs to there:"
        " AutoImageProcessor.from_pretrained(...).save_pretrained(...)",
    )


def own_size(asked: CheckpointSpec, processor: ImageProcessor | None) -> Size | None:
    """Return the (H, W) that a processor gives every picture, or None without a processor. Raises CheckpointError."""
    sizes: set[Size] | set[None] = processor.output_sizes() if processor is not None else {None}
    if len(sizes) > 1:
        raise CheckpointError(
            f"checkpoint {shown(asked.checkpoint_name)}: its image processor gives every picture another size",
            "give one size for all with --image-size",
        )
    return sizes.pop()


def config_size(config: Any) -> Size:
    """Return the (H, W) of a configuration, for checkpoints that say nothing about their preprocessing."""
    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _of_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without fields that do not change what the backbone computes."""
    fields = plain_json(dict(config)).items()
    return {name: value for name, value in fields if name not in NOT_ARCHITECTURE and not name.startswith("_")}


def unless_set(
    before: Mapping[str, Any], now: Mapping[str, Any], set_here: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Keep the values of `before` for all fields that `set_here` lacks. Returns the fields, and those that differed."""
    kept: dict[str, Any] = {}
    differing: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        one, two, wanted = before.get(name), now.get(name), set_here.get(name)
        if name in set_here and all(isinstance(part, Mapping) for part in (one, two, wanted)):
            kept[name], inside = unless_set(before[name], now[name], set_here[name])
            differing += [f"{name}.{field}" for field in inside]
        elif name in set_here or one == two:
            kept |= {name: now[name]} if name in now else {}
        else:
            kept |= {name: before[name]} if name in before else {}
            differing.append(name)
    return kept, differing


def with_arguments(config: Any, arguments: Mapping[str, Any]) -> Any:
    """Change fields of a configuration. Fields that follow from them, such as the names of stages, are made again.

    Stages that the configuration chooses stay chosen if they still exist, and the last stays the last. Raises
    UsageError.
    """
    if not arguments:
        return config
    if unknown := [name for name in arguments if not hasattr(config, name) or name in SETTLED]:
        near = nearest(unknown[0], config.to_dict())
        raise UsageError(
            f"--model-arg {unknown[0]}: " + SETTLED.get(unknown[0], f"{type(config).__name__} has no such field"),
            did_you_mean([] if unknown[0] in SETTLED else near, "read its config.json"),
        )
    refuse_words(arguments, {name: getattr(config, name) for name in arguments})
    if idle := [name for name, value in arguments.items() if getattr(config, name) == value]:
        raise UsageError(f"--model-arg {idle[0]}: the configuration has that value already", "leave it out")
    fields = {name: value for name, value in config.to_dict().items() if name not in FOLLOWING}
    try:
        made = type(config).from_dict(plain_json({**fields, **arguments}))
        _choose_as(made, config)
        return made
    except Exception as error:  # configurations check their fields in many ways
        asked = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise UsageError(
            f"--model-arg {asked}: {type(config).__name__} does not take it: {one_line(error)}", "read its config.json"
        ) from error


def _choose_as(made: Any, before: Any) -> None:
    """Choose the stages in a configuration that another one chooses, unless that is its last one."""
    chosen, names = getattr(before, "out_features", None), getattr(before, "stage_names", None)
    if chosen and names and list(chosen) != [names[-1]]:
        kept = [name for name in chosen if name in made.stage_names]
        made.out_features = kept or [made.stage_names[-1]]


def num_registers(module: Any) -> int:
    """Count the registers of a model: the last of the tokens before its patches."""
    found = [one for name, one in module.named_parameters() if name.rpartition(".")[2] == "register_tokens"]
    return int(found[0].shape[-2]) if found else 0


def copied(config: Any) -> Any:
    """Copy a configuration as it comes from a file: with its defaults as lists, which some backbones need."""
    return type(config).from_dict(plain_json(config.to_dict()))
