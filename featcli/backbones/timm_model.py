"""Read timm models (names, tags, hub ids, local folders and bare weights files) with timm's own loaders.

`features_only` is never used: it computes every stage in 183 architectures, gives NHWC in 35, and silently loads wrong
weights. Instead the full model is built without its head, pruned after the deepest stage asked for, and run by
`forward_intermediates(output_fmt="NCHW")`.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from featcli.backbones.backbone import Network, Pass, Weights
from featcli.backbones.extra_tensors import foreign_tensors, layers_in, skeleton_of
from featcli.backbones.hub import hub_or_cache, hub_weights, unreachable
from featcli.backbones.idle_arguments import refuse_idle, refuse_words
from featcli.backbones.image_processor import plain_json
from featcli.backbones.internals import (
    AT_HUB,
    IN_FOLDER,
    Load,
    arguments_of_timm,
    facts_of_timm,
    faults_are_heard,
    files_are_read,
    forget_weights,
    has_class_token_of_timm,
    has_head_of_timm,
    head_projects_of_timm,
    in_chans_of_timm,
    is_option_of_timm,
    is_unknown_to_timm,
    model_args_of_timm,
    num_registers_of_timm,
    option_for_weights,
    patch_of_timm,
    prune_timm,
    reported_loads,
    run_timm,
    run_whole_timm,
    silent_timm,
    stages_of_timm,
    values_for_channels,
)
from featcli.backbones.key_names import Reading, in_its_place, readings, refuse_equals, strip_prefix, without_heads
from featcli.backbones.model_names import containing
from featcli.backbones.model_spec import ModelSpec, Outputs, Wanted, modules_run, norms_alone
from featcli.backbones.own_preprocessing import asked_of_preprocessing, of_bands, on_record
from featcli.backbones.preprocessing import Preprocessing, timm_preprocessing
from featcli.backbones.stages import Points, Vector, names_by_stride
from featcli.backbones.torchvision_operators import import_timm, import_transformers
from featcli.backbones.weightless import WithoutDraws
from featcli.backbones.weights import (
    hash_files,
    is_counter,
    read_weights,
    refuse_pretenders,
    refuse_whole_numbers,
    weights_files,
)
from featcli.errors import CheckpointError, FeatcliError, UsageError, counted, did_you_mean, nearest, one_line, shown
from featcli.pixels.bands import OF_COLOURS
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size, as_given
from featcli.spec.words import NATIVE
from featcli.system.borrowed import own_random_numbers, silent_warnings
from featcli.system.faults import fault_behind, machine_error
from featcli.system.files import is_there

timm = import_timm()


# Arguments of timm's constructors that give a network more tensors, with values that do so.
ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("init_values", 1e-5),
    ("qk_norm", True),
    ("qkv_bias", True),
    ("pre_norm", True),
    ("scale_norm", True),
    ("class_token", True),
    ("use_abs_pos_emb", True),
    ("use_rel_pos_bias", True),
    ("use_shared_rel_pos_bias", True),
    ("rel_pos", True),
    ("ls_init_value", 1e-6),
    ("block_args", {"attn_layer": "se"}),
)
# Arguments that give it fewer tensors, or tensors of another shape.
FITTING: tuple[Mapping[str, Any], ...] = (
    {"qkv_bias": False},
    {"class_token": False},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "global_pool": ""},
    {"no_embed_class": True},
    {"qk_norm": False},
    {"use_abs_pos_emb": False},
    {"use_rel_pos_bias": False},
    {"reg_tokens": 0},
)
NAMED = 3  # models that a hint names
OF_HEAD = ("projection", "logits")  # the vectors that the classifier makes
OF_LAYERS = "behind layers of the head: not the pooled map"
# Arguments that other options stand for, or that would make it something else than a backbone.
SETTLED = {"in_chans": "give --num-channels", "img_size": "give --image-size", "num_classes": "a backbone has no head"}
SETTLED |= dict.fromkeys(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"), "give -c/--checkpoint"
)
SETTLED |= dict.fromkeys(("pretrained_strict", "cache_dir"), "leave it out")
SETTLED |= dict.fromkeys(("features_only", "out_indices"), "give --out-indices")


@dataclass(frozen=True, kw_only=True)
class TimmRequest:
    """What timm is asked for."""

    model_name: str  # as timm takes it, with AT_HUB or IN_FOLDER before it if it is no architecture
    is_architecture: bool = False  # whether --arch or a configuration names it as an architecture
    files: tuple[Path, ...] = ()  # weights that are read here; without any, timm finds its own
    options: Mapping[str, Any] = field(default_factory=dict)  # for the model's constructor
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)  # of the pixels, in place of the model's own
    input_size: Size | None = None  # (H, W); None is the model's own
    num_channels: int | None = None  # of the pixels; None is the model's own


@dataclass(frozen=True, kw_only=True)
class _FileWeights:
    """What was read from weights files."""

    files: Sequence[Path]
    place: str  # container and prefix in the files; "" if there are none
    tensors: Mapping[str, torch.Tensor]  # as the model names them
    strangers: Sequence[str]  # names of all others


class TimmModelSpec(ModelSpec):
    """A timm model by any kind of name, before its weights are read."""

    library = "timm"

    def __init__(self, asked: CheckpointSpec, request: TimmRequest) -> None:
        """Build the model without weights, as often as it takes to find which options its constructor needs.

        Size and channels are those of `request`, not those of `asked`. Raises UsageError and CheckpointError.
        """
        self.asked = asked
        self.request = request
        refuse_settled(asked.model_args)
        self._refuse_words()
        plain, options = self._with_channels(self._given_options)
        own = dict(request.pretrained_cfg) or plain.pretrained_cfg
        self._options = options | self._size_options(plain, options, own)
        self.config = self._data_config(request.input_size, own)
        self.channels = self._options.get("in_chans") or in_chans_of_timm(plain)
        self.input_size = self.config["input_size"][1:]
        self._overrides = self._differing(asked_of_preprocessing(asked, self.channels))
        self.config |= self._overrides
        stages = stages_of_timm(plain)
        self.strides = tuple(stride for _, stride in stages)
        self._is_isotropic = len(set(self.strides)) == 1
        modules = [module for module, _ in stages]
        self.stage_names = tuple(zip(names_by_stride(self.strides), modules, strict=True))
        self.patch = _patch(plain, self.strides)
        self.norm = asked.norm or self.default_norm
        self.norm_reason = "as asked" if asked.norm else "default: timm's own"
        facts = facts_of_timm(plain)
        self.tag, self._classifiers = facts.tag, facts.classifiers
        self._facts, self._can_head = facts, has_head_of_timm(plain)
        self.architecture = facts.architecture or request.model_name
        self.name = self._name()

    def refuse_idle_arguments(self) -> None:
        """Raise UsageError for idle arguments, because some constructors of timm take any argument. See ModelSpec."""
        refuse_idle(
            self.asked.model_args,
            lambda device, some: self._create(device, {**self.request.options, **some}),
            is_random=self.asked.is_random,
        )

    def _refuse_words(self) -> None:
        """Raise UsageError for a word in place of true or false in an argument of the model's class."""
        if any(isinstance(value, str) for value in self.asked.model_args.values()):
            refuse_words(self.asked.model_args, arguments_of_timm(self._create("meta", self.request.options)))

    @property
    def _given_options(self) -> dict[str, Any]:
        return {**self.request.options, **self.asked.model_args}

    def _with_channels(self, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the model for the channels that are asked for, and its options.

        An option that changes nothing is left out.
        """
        model = self._create("meta", options)
        if self.request.num_channels in (None, in_chans_of_timm(model)):
            return model, options
        options = options | {"in_chans": self.request.num_channels}
        return self._create("meta", options), options

    def _size_options(self, model: Any, options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options for a size: `img_size` for constructors that take one; convolution nets do not need it.

        With --fit native it adds `dynamic_img_size`, which some transformers have for inputs of any size.
        """
        wanted = self.request.input_size
        more: dict[str, Any] = {}
        own_size = tuple(self._data_config(None, own)["input_size"][1:])
        if wanted not in (None, own_size) and is_option_of_timm(model, "img_size"):
            try:
                self._create("meta", {**options, "img_size": wanted})
                more["img_size"] = wanted
            except UsageError:  # it does not take the option for that size, but may take the size
                pass
        if self.asked.fit == NATIVE and is_option_of_timm(model, "dynamic_img_size"):
            more["dynamic_img_size"] = True
        return more

    @staticmethod
    def _data_config(size: Size | None, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return timm's preprocessing: what the checkpoint says, at another (H, W) if one is given."""
        args = {} if size is None else {"input_size": (3, *size)}
        config: dict[str, Any] = timm.data.resolve_data_config(args, pretrained_cfg=own)
        return config

    def _differing(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that differ from the checkpoint's preprocessing."""
        own = {name: self.config[name] for name in asked}
        for_channels = values_for_channels if self.channels in OF_COLOURS else of_bands
        own |= {name: for_channels(own[name], self.channels) for name in ("mean", "std") if name in own}
        return {name: value for name, value in asked.items() if value != own[name]}

    @property
    def _is_guessed(self) -> bool:
        """Whether nothing says which preprocessing belongs to the weights."""
        return self.asked.is_random or (bool(self.request.files) and not self.request.pretrained_cfg)

    def _name(self) -> str:
        path = Path(self.asked.checkpoint_name.removeprefix(IN_FOLDER))
        if is_there(path):  # a private file or folder is not the checkpoint that timm has under that tag
            return f"{path.resolve().name} ({self.architecture})"
        if self.request.model_name.startswith(AT_HUB):
            return f"{self.request.model_name.removeprefix(AT_HUB)} ({self.architecture})"
        return f"{self.architecture}.{self.tag}" if self.tag and not self.asked.is_random else self.architecture

    def settings(self) -> dict[str, Any]:
        """Return the settings. See ModelSpec.

        A folder's `model_args` can change the network without changing a weight. Its `input_size` can say that there
        are bands, which no option says then.
        """
        has_bands = self.channels not in OF_COLOURS and "in_chans" not in self._options
        return {
            "library": "timm",
            "architecture": self.architecture,
            "input_size": list(self.input_size),
            "options": plain_json({**self._model_args, **self._options}),
            **({"num_channels": self.channels} if has_bands else {}),
            "norm": self.norm,
        }

    def settings_beside(self, before: Mapping[str, Any], is_same_library: bool) -> tuple[dict[str, Any], list[str]]:
        """Word the settings as `before`. See ModelSpec.

        Older plans hold a hash of the printed network instead of its arguments.
        """
        if "structure" not in before:
            return super().settings_beside(before, is_same_library)
        plain, _ = self._with_channels(self._given_options)
        structure = xxhash.xxh3_128_hexdigest(repr(plain).encode())
        settings = {**self.settings(), "structure": structure, "options": plain_json(self._options)}
        if structure == before["structure"] or is_same_library:  # the same library prints the same network alike
            return settings, []
        return {**settings, "structure": before["structure"]}, ["structure"]

    @cached_property
    def _model_args(self) -> Mapping[str, Any]:
        """What the checkpoint's own configuration sets for the model, if timm reads that by itself."""
        with hub_or_cache(wanted=False):  # it has just been read
            return model_args_of_timm(self.request.model_name)

    @cached_property
    def vectors(self) -> tuple[Vector, ...]:
        """See ModelSpec: what `forward_head` gives, before the classifier and after it."""
        if not self._can_head:
            return ()
        head = ("projection" if self._is_projection else "logits",) if self._num_classes else ()
        try:
            found = self._probe(Points((), ("embedding", *head))).vectors
        except UsageError:  # a few models have a `forward_head` that refuses
            return ()
        return tuple(
            Vector(
                name=name,
                shape=(int(shape[1]),),
                module=", ".join(self._classifiers) or "forward_head",
                remark=OF_LAYERS if name == "embedding" and self._has_layers_before_classifier() else "",
            )
            for name, shape in found.items()
            if len(shape) == 2  # with `global_pool` "" it would be what the last stage gives
        )

    def _refuse_absent(self, vectors: Sequence[str]) -> None:
        """Raise CheckpointError for what only the head gives, if a weights file has none. See ModelSpec."""
        of_head = "projection" if head_projects_of_timm(self.architecture, self.tag) else "logits"
        is_headless = self._classifiers and self._facts.num_classes and not self._num_classes
        if of_head in vectors and self._can_head and is_headless:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: it lacks {self._classifiers[0]}.weight, the head of"
                f" {self.architecture}, which makes {of_head}",
                "is its head in another file? --out-features embedding needs none",
            )
        super()._refuse_absent(vectors)

    def _has_layers_before_classifier(self) -> bool:
        """Tell whether learnt layers stand between the last map and the embedding, as in VGG or MobileNet."""
        with suppress(Exception):  # some models look into their tensors
            model = self._create("meta", self._options)
            with torch.no_grad():
                last = model.eval().forward_features(self.blank("meta"))
            run = modules_run(model, partial(model.forward_head, pre_logits=True), last)
            return any(isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d) for name, _ in run)
        return False

    @cached_property
    def _is_projection(self) -> bool:
        return self._num_classes == self._facts.num_classes and head_projects_of_timm(self.architecture, self.tag)

    @property
    def licence(self) -> str:
        """See ModelSpec."""
        return "" if self.asked.is_random or self._own_files() else self._facts.licence

    def class_names(self) -> tuple[str, ...]:
        """See ModelSpec."""
        names = self._facts.class_names
        return names if len(names) == self._num_classes else ()

    def build(self, points: Points, device: str) -> Network:
        """See ModelSpec."""
        return self._cut(self._create(device, self._options, self._classes_for(points)), points)

    def _classes_for(self, points: Points) -> int:
        """How many classes the model is made for: none unless the head is wanted."""
        return self._num_classes if set(OF_HEAD).intersection(points.vectors) else 0

    @cached_property
    def _num_classes(self) -> int:
        """The classes that the head was trained for, 0 without one: in a weights file, as many as it has weights of."""
        if self.asked.is_random or not self._own_files():
            return self._facts.num_classes
        read = self._read("meta")
        weights = [read.tensors.get(f"{name}.weight") for name in self._classifiers] if read else []
        count = int(weights[0].shape[0]) if weights and weights[0] is not None else 0
        return self._facts.num_classes if count == self._facts.num_classes + self._facts.label_offset else count

    def load(self, points: Points) -> tuple[Network, Weights]:
        """See ModelSpec. Any tensor of the cut network that was not loaded is a refusal."""
        if self.asked.is_random:
            network = self._cut(self._create_random(self._classes_for(points)), points)
            return network, Weights(origin=f"random weights, seed {self.asked.seed_of_weights}", random=True)
        read = self._read()
        if self.request.model_name.startswith(IN_FOLDER):
            refuse_pretenders(weights_files(Path(self.request.model_name.removeprefix(IN_FOLDER))))
        with reported_loads() as loads:
            with WithoutDraws():
                model, files = self._create_pretrained(read, self._classes_for(points))
            load = next((load for load in reversed(loads) if load.module is model), None)
            if load is None:  # a reader of timm's own may leave tensors as they are made
                model, files = self._create_pretrained(read, self._classes_for(points))
        forget_weights(model)
        if read or not self.request.model_name.startswith(IN_FOLDER):
            files = read.files if read else self._files_at_hub(model)
        skeleton = skeleton_of(model)
        network = self._cut(model, points)
        weights = self._proven(network.module, load, read, hash_files(files))
        if load is None:
            return network, weights
        shapes = {key: tensor.shape for key, tensor in load.arrived.items()}
        in_use = cache(lambda: self.in_use(points, network))
        self.refuse_foreign(load.unexpected, skeleton, in_use, shapes)
        left_out = [] if read is None else _left_out(read.tensors, load)
        undecided = foreign_tensors(left_out, skeleton, in_use)
        of_no_use = [*weights.unexpected, *(key for key in left_out if key not in undecided)]
        resized = [] if read is None else _resized(read.tensors, load, network.tensors())
        return network, replace(
            weights, unexpected=tuple(of_no_use), undecided=tuple(undecided), resized=tuple(resized)
        )

    def _create_random(self, num_classes: int) -> Any:
        """Make a model with random weights. Those of its stages do not depend on whether it has a head."""
        with own_random_numbers(self.asked.seed_of_weights):
            model = self._create("cpu", self._options)
            if num_classes:
                headless, model = model, self._create("cpu", self._options, num_classes)
                model.load_state_dict(headless.state_dict(), strict=False)
        return model

    def preprocessing(self) -> Preprocessing:
        """Return timm's own evaluation transform, up to the point where it would leave uint8. See ModelSpec."""
        try:
            found = timm_preprocessing(self.config, self.channels, self.tag, self.resize_mode)
        except UsageError:
            raise
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            ZeroDivisionError,
        ) as error:  # timm lacks these words
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: its preprocessing cannot be followed:"
                f" {one_line(error)}",
                "is pretrained_cfg in its config.json complete?",
            ) from error
        guess = f"a guess: timm's default for {self.architecture}" if self._is_guessed else ""
        return on_record(found, self._overrides, guess, self.asked.is_random)

    def norms_before_pooling(self, of_class_token: bool) -> frozenset[str]:
        """Return the norms that timm's `forward_features` runs, and `forward_intermediates` can run, too.

        See ModelSpec.

        They may also be all that it runs after the raw map, although `forward_intermediates` runs others there, or
        none.
        """
        last, values = (len(self.stage_names) - 1,), math.prod(self.stages[-1].shape)
        known = self.final_norm(last)
        for device in ("meta", "cpu") if self.norm == "raw" else ():
            try:
                model = self._create(device, self._options)
                found = modules_run(model, model.forward_features, self.blank(device))
            except Exception:  # some models look into their tensors
                continue
            of_maps = {name for name, _ in self._modules_run(last, "raw")}
            alone = norms_alone(model, [name for name, _ in found if name not in of_maps])
            return frozenset(name for name, size in found if size >= values and name in known | alone)
        return frozenset()

    def can_apply(self, norms: frozenset[str]) -> bool:
        """Return whether `--norm model` runs these norms. See ModelSpec."""
        return bool(norms & self.final_norm((len(self.stage_names) - 1,))) and super().can_apply(norms)

    def _cut(self, model: Any, points: Points) -> Network:
        """Cut off what comes after the deepest of these points."""
        normed = self._is_normed(points.positions)
        if points.vectors:  # nothing comes after them, and what a cut takes out would be missed
            run = partial(_run_whole, model, positions=points.positions, normed=normed, vectors=points.vectors)
        else:
            indices = prune_timm(model, points.positions, keeps_norm=normed)
            run = partial(_run_cut, model, indices=indices, normed=normed)
        return Network(
            module=model,
            run=run,
            has_class_token=has_class_token_of_timm(model),
            num_registers=num_registers_of_timm(model),
        )

    def _is_normed(self, positions: Sequence[int]) -> bool:
        """Return whether the final norm runs.

        It fits every block of a transformer, but only the last stage of a pyramid.
        """
        return self.norm == "model" and (self._is_isotropic or len(self.stage_names) - 1 in positions)

    def module_config(self) -> Any:
        """Return the configuration that transformers' own TimmBackbone is made from. See ModelSpec."""
        return import_transformers().TimmBackboneConfig(
            backbone=self.architecture,
            num_channels=self.channels,
            output_stride=self._options.get("output_stride"),
            freeze_batch_norm_2d=self.freezes_norms,
        )

    def run(self, module: Any, pixels: torch.Tensor, wanted: Wanted) -> Outputs:
        """Run the module. See ModelSpec.

        Hidden states are the maps of all stages, as in TimmBackbone; it has no attentions.
        """
        positions = wanted.positions
        if not wanted.hidden_states:
            return Outputs(tuple(run_timm(module, pixels, list(positions), self._is_normed(positions))[0]))
        every = range(wanted.reach)
        hidden = tuple(run_timm(module, pixels, list(every), self._is_normed(every))[0])
        return Outputs(tuple(hidden[position] for position in positions), hidden)

    def _create(self, device: str, options: Mapping[str, Any], num_classes: int = 0) -> Any:
        """Return a headless model without weights. Raises UsageError for names that timm does not know."""
        name = self.request.model_name
        try:
            wanted, heard = name.startswith(AT_HUB), faults_are_heard(self.asked.checkpoint_name)
            draws = WithoutDraws() if device == "meta" else nullcontext()
            with torch.device(device), draws, hub_or_cache(wanted=wanted), heard, silent_warnings():
                # timm warns about architectures that have another name by now.
                return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
        except (AssertionError, ZeroDivisionError) as error:
            if not options:
                raise CheckpointError(
                    f"checkpoint {shown(self.asked.checkpoint_name)}: {one_line(error)}", "is its config.json complete?"
                ) from error
            asked = ", ".join(f"{option} {value}" for option, value in options.items())
            hint = "choose another --image-size" + (", or leave --model-arg out" if self.asked.model_args else "")
            raise UsageError(f"{name} with {asked}: {one_line(error)}", hint) from error
        except Exception as error:  # a wrong configuration, files, the hub, its HTTP library
            if is_unknown_to_timm(error):
                raise _unknown(name, "--arch" if self.request.is_architecture else "checkpoint") from None
            if name.startswith(AT_HUB):
                raise unreachable(name, error, name.removeprefix(AT_HUB)) from error
            if self.asked.model_args:
                arguments = ", ".join(self.asked.model_args)
                raise UsageError(
                    f"--model-arg {arguments}: {name.removeprefix(IN_FOLDER)} cannot be made so: {one_line(error)}",
                    self._hint_for_arguments(),
                ) from error
            if (fault := fault_behind(error)) is not None:
                raise machine_error(f"checkpoint {shown(self.asked.checkpoint_name)}", fault) from error
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {one_line(error)}", "is the folder complete?"
            ) from error

    def _hint_for_arguments(self) -> str:
        """Return which arguments were meant, if one is unknown to the model's class."""
        with suppress(Exception):  # without them there may be no network
            with torch.device("meta"), WithoutDraws(), silent_warnings():
                plain = timm.create_model(self.request.model_name, num_classes=0, **self.request.options)
            known = arguments_of_timm(plain)
            for name in self.asked.model_args:
                if name not in known and (near := nearest(name, known)):
                    return did_you_mean(near)
        return "its arguments are those of its class in timm"

    def _arguments_for(self, foreign: Sequence[str], shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, Any]]:
        model = self._create("meta", self._options)
        numbers = (("reg_tokens", shapes.get("reg_token", (1, 4))[1]), ("depth", layers_in(foreign)))
        return [(name, value) for name, value in (*ARGUMENTS, *numbers) if is_option_of_timm(model, name)]

    def _names_with(self, argument: str, value: Any) -> set[str]:
        return set(self._shapes_with({argument: value}))

    def _shapes_with(self, arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes of the whole network's tensors with other values of these arguments."""
        model = self._create("meta", {**self._options, **arguments})
        return {key: tensor.shape for key, tensor in model.state_dict().items() if not is_counter(key)}

    def _refusal_after(self, error: Exception, read: _FileWeights | None) -> CheckpointError:
        """Return the error for weights that timm cannot load: it names tensors of another shape, or has timm's words.

        A converter that fails at positions names numbers that the user has never seen.
        """
        found = {key: tensor.shape for key, tensor in read.tensors.items()} if read else {}
        own = self._shapes_with({})
        misfits = sorted((key for key in own if found.get(key, own[key]) != own[key]), key=lambda key: "pos" in key)
        message = one_line(error, 2)
        if "is invalid for input of size" in message:
            message = f"its tensors do not fit {self.architecture}: timm cannot reshape them"
        if misfits:
            key = misfits[0]  # positions come last, because timm fits others
            message = (
                f"{len(misfits)} of {len(own)} tensors of {self.architecture} have another shape in it, first {key}:"
                f" {tuple(found[key])}, not {tuple(own[key])}"
            )
        return CheckpointError(
            f"checkpoint {shown(self.asked.checkpoint_name)}: {message}", self._hint_for_shapes(found)
        )

    def _hint_for_shapes(self, found: Mapping[str, torch.Size]) -> str:
        """Return which argument makes tensors of these shapes fit, if any."""
        own = self._shapes_with({})
        here = own.keys() & found.keys()
        for arguments in self._arguments_to_fit(found, own) if found else ():
            with suppress(FeatcliError):
                shapes = self._shapes_with(arguments)
                is_whole = here <= shapes.keys() and all(found.get(key) == shape for key, shape in shapes.items())
                if is_whole and shapes != own:
                    return _hint_with(arguments)
        return f"do these weights belong to {self.architecture}?"

    def _arguments_to_fit(
        self, found: Mapping[str, torch.Size], own: Mapping[str, torch.Size]
    ) -> Iterable[Mapping[str, Any]]:
        yield from ({name: value} for name, value in self._arguments_for(list(found), found))
        model = self._create("meta", self._options)
        yield from (some for some in FITTING if all(is_option_of_timm(model, name) for name in some))
        hidden = next((shape for key, shape in found.items() if key.endswith("mlp.fc1.weight")), None)
        if hidden is not None and is_option_of_timm(model, "mlp_ratio"):
            yield {"mlp_ratio": _plain_number(hidden[0] / hidden[1])}
        both = [(found[key], shape) for key, shape in own.items() if len(shape) == 4 and key in found]
        channels = {there[1] for there, shape in both if there != shape and shape[1] == self.channels}
        yield from ({"in_chans": count} for count in channels)

    def _own_files(self) -> Sequence[Path]:
        """Return the weights files that are read here; () if timm finds its own."""
        return self.request.files

    def _read(self, device: str = "cpu") -> _FileWeights | None:
        """Read the tensors of the weights files, with the model's names; None if timm reads its own.

        On the `device` meta their values are not read.
        """
        files = self._own_files()
        if not files:
            return None
        container, found = read_weights(files, self.asked.weights_key, device)
        expected = self._create("meta", self._options).state_dict()
        best = strip_prefix(files[0], found, expected)
        if not all(name in best.tensors or is_counter(name) for name in expected):
            best = self._best_reading(files[0], readings(found, expected, best), expected)
        words = [container, best.prefix and f"{best.prefix}*", best.format and f"names of {best.format}"]
        place = ", ".join(filter(None, words))
        return _FileWeights(files=files, place=place, tensors=best.tensors, strangers=best.strangers)

    def _best_reading(self, path: Path, ways: Iterable[Reading], expected: Mapping[str, torch.Tensor]) -> Reading:
        """Return the reading of a file by which most of the model's tensors arrive, after timm's own converter.

        Nothing is computed. Raises CheckpointError if two prefixes do equally well.
        """
        counts = [(way, self._count_arriving(way.tensors, expected)) for way in ways]
        if not any(count for _, count in counts):
            bare = [without_heads(way, self._classifiers) for way, _ in counts]
            counts += [(way, self._count_arriving(way.tensors, expected)) for way in bare]
        best, most = max(counts, key=lambda pair: pair[1])  # the first among equals
        prefixes = [way.prefix for way, count in counts if count == most > 0]
        apart = [
            prefix for prefix in prefixes if not (prefix.startswith(best.prefix) or best.prefix.startswith(prefix))
        ]
        refuse_equals(path, [best.prefix, *apart])
        return best

    def _count_arriving(self, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> int:
        """Return how many tensors of the model these become in timm's converter, with the shapes that it wants."""
        blank = {key: tensor.to("meta") for key, tensor in tensors.items()}
        options = {**self._options, **option_for_weights(self._classifiers, blank)}
        with (
            reported_loads() as loads,
            suppress(Exception),
            silent_timm(),
            silent_warnings(),
            torch.device("meta"),
            WithoutDraws(),
        ):
            # A converter may raise anything for names that it does not expect.
            timm.create_model(self.request.model_name, pretrained=True, num_classes=0, **options)
        arrived = loads[-1].arrived if loads else {}
        return sum(key in arrived and arrived[key].shape == tensor.shape for key, tensor in expected.items())

    def _create_pretrained(self, read: _FileWeights | None, num_classes: int) -> tuple[Any, Sequence[Path]]:
        """Return the same model with weights, and the files that timm read for it.

        Whatever timm raises here is about the checkpoint.
        """
        name, options = self.request.model_name, dict(self._options)
        at_hub = read is None and not name.startswith(IN_FOLDER)
        # Converters remove tensors from what they are given.
        options |= option_for_weights(self._classifiers, None if read is None else dict(read.tensors), num_classes)
        try:
            heard = faults_are_heard(self.asked.checkpoint_name)
            with silent_timm(), hub_or_cache(wanted=at_hub), heard, files_are_read() as files:
                return timm.create_model(name, pretrained=True, num_classes=num_classes, **options), files
        except FeatcliError:
            raise
        except Exception as error:  # timm lets all errors through: of files, hub, HTTP, unpickling and shapes
            if at_hub:
                raise unreachable(name, error, _repository_of(name), ", try --random-init") from error
            if (fault := fault_behind(error)) is not None:
                raise machine_error(f"checkpoint {shown(self.asked.checkpoint_name)}", fault) from error
            raise self._refusal_after(error, read) from error

    def _files_at_hub(self, model: Any) -> Sequence[Path]:
        """Return the files that timm has just read from the hub's cache."""
        facts = facts_of_timm(model)
        with hub_or_cache(wanted=False):  # all of it has just been read
            return hub_weights(facts.hub_id, facts.hub_filename) if facts.hub_id else []

    def _proven(self, module: Any, load: Load | None, read: _FileWeights | None, hashes: Mapping[str, str]) -> Weights:
        """Return what timm loaded, if it is all that the cut network has. Raises CheckpointError."""
        origin = read.files[0].name if read else self.name.partition(" (")[0]
        origin += f" ({read.place})" if read and read.place else ""
        tensors = module.state_dict().keys()
        if load is None:
            if not facts_of_timm(module).has_reader_of_its_own:
                raise CheckpointError(f"checkpoint {shown(self.asked.checkpoint_name)}: timm loaded nothing from it")
            origin += ", by timm's reader for its format, which does not say which"
            return Weights(origin=origin, total=len(tensors), files=hashes)
        floats = {key for key, tensor in module.state_dict().items() if tensor.is_floating_point()}
        whole = [key for key, tensor in load.arrived.items() if key in floats and not tensor.is_floating_point()]
        refuse_whole_numbers(self.asked.checkpoint_name, whole)
        absent = [key for key in load.missing if key in tensors and not is_counter(key)]
        strangers = [*(read.strangers if read else ()), *load.unexpected]
        if absent:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: it lacks {len(absent)} of the {len(tensors)} tensors"
                f" of {self.architecture}, first {', '.join(absent[:3])}{in_its_place(absent[0], strangers)}",
                self._hint_for_shapes({key: tensor.shape for key, tensor in load.arrived.items()}),
            )
        return Weights(
            origin=origin, matched=len(tensors), total=len(tensors), unexpected=tuple(strangers), files=hashes
        )


def _run_cut(model: Any, pixels: torch.Tensor, indices: Any, normed: bool, with_prefixes: bool = False) -> Pass:
    return Pass(*run_timm(model, pixels, indices, normed, with_prefixes), {})


def _run_whole(
    model: Any,
    pixels: torch.Tensor,
    positions: Sequence[int],
    normed: bool,
    vectors: Sequence[str],
    with_prefixes: bool = False,
) -> Pass:
    return Pass(*run_whole_timm(model, pixels, positions, normed, vectors, with_prefixes))


def _hint_with(arguments: Mapping[str, Any]) -> str:
    """Return a hint that these arguments make weights fit."""
    if "in_chans" in arguments:
        return f"are they for pictures of {counted(arguments['in_chans'], 'channel')}? " + (
            f"Then add --num-channels {arguments['in_chans']}"
        )
    given = " ".join(f"--model-arg {as_given(name, value)}" for name, value in arguments.items())
    return f"is it a network with another {' and '.join(arguments)}? Then add {given}"


def _plain_number(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 4)


def is_timm_name(name: str) -> bool:
    """Return whether timm has such a model. Whatever comes after the first dot is a tag."""
    return bool(timm.is_model(name.partition(".")[0]))


def _left_out(tensors: Mapping[str, torch.Tensor], load: Load) -> list[str]:
    """Return the names of tensors that went into timm's converter and did not come out under any name and shape.

    A name that came out may hold another tensor than before, because Swin's stages are counted differently.
    """
    as_they_were = {key for key, tensor in tensors.items() if _is_same(tensor, load.arrived.get(key))}
    moved = Counter(_content(tensor) for key, tensor in load.arrived.items() if key not in as_they_were)
    found: list[str] = []
    for key, tensor in tensors.items():
        if key in as_they_were:
            continue
        content = _content(tensor)
        if not moved[content] and key not in load.arrived:
            found.append(key)
        moved[content] -= 1
    return found


def _resized(tensors: Mapping[str, torch.Tensor], load: Load, own: Collection[str]) -> list[str]:
    """Return the names of the network's own tensors that timm's converter made larger or smaller than in a file."""
    both = [key for key in load.arrived if key in tensors and key in own]
    return [key for key in both if load.arrived[key].numel() != tensors[key].numel()]


def _is_same(tensor: torch.Tensor, arrived: torch.Tensor | None) -> bool:
    """Return whether a tensor arrived as it was."""
    return arrived is not None and (
        arrived is tensor or (arrived.dtype == tensor.dtype and torch.equal(arrived, tensor))
    )


def _content(tensor: torch.Tensor) -> tuple[int, bytes]:
    """Return what tells a tensor by its values, in any shape: their number, and their digest."""
    return tensor.numel(), xxhash.xxh3_128_digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _patch(model: Any, strides: Sequence[int]) -> Size | None:
    """Return (height, width) of the patches that a model cuts its input into. Some lose pixels that do not fill one."""
    sides = patch_of_timm(model)
    if len(sides) == 2 and sides[0] == strides[0]:  # otherwise patches overlap, and borders are padded
        return int(sides[0]), int(sides[1])
    return (strides[0], strides[0]) if len(set(strides)) == 1 else None


def refuse_settled(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for arguments that other options stand for."""
    for name in arguments:
        if name in SETTLED:
            raise UsageError(f"--model-arg {name}: featcli sets it by itself", SETTLED[name])


def _repository_of(name: str) -> str | None:
    """Return the repository of the hub that has the weights of a model; None for weights that lie elsewhere."""
    if name.startswith(AT_HUB):
        return name.removeprefix(AT_HUB)
    config = timm.get_pretrained_cfg(name)
    return None if config is None else config.hf_hub_id


def _unknown(name: str, option: str) -> FeatcliError:
    if name.startswith((IN_FOLDER, AT_HUB)):
        return CheckpointError(
            f"checkpoint {shown(name.partition(':')[2])}: its config.json names an architecture that this timm lacks",
            "is it spelt rightly? A newer timm may have it",
        )
    plain, _, tag = name.partition(".")
    if is_timm_name(plain):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(plain)]
        return UsageError(
            f"{option} {shown(name)}: there is no tag {shown(tag)}", f"choose a tag of {plain}: {', '.join(tags)}"
        )
    what, else_ = "timm model, folder or file", "give a timm model, a folder, a weights file or a hub id"
    if option == "--arch":
        what, else_ = "timm architecture", "run featcli models, which lists them"
    return UsageError(f"{option} {shown(name)}: there is no such {what}", _models_like(plain) or else_)


def _models_like(name: str) -> str:
    """Return models that have the parts of a name, else those that are spelt most like it; "" if there are none."""
    known = timm.list_models()
    found = containing(name, known)
    if found:
        more = f" featcli models {shlex.quote(name)} lists all" if len(found) > NAMED else ""
        return did_you_mean(found[:NAMED]) + more
    return did_you_mean(nearest(name, known))
