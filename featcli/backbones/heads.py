"""The vectors of transformers' models: which class makes each, and how it is run behind the network of the maps.

A head is a model of transformers, such as ResNetModel for its pooler or ViTForImageClassification for its logits. What
it shares with the network of the maps, the trunk, is taken out of it, and what the trunk gave there in the same pass
stands in its place. Where the trunk runs those layers otherwise than the model does (Swin always shifts its windows for
maps), the head stays complete, and runs as a second pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.internals import (
    OperationMode,
    classes_of_classifiers,
    is_whole_model,
    mapped,
    plain_class,
    prefix_of_transformers,
    silent_transformers,
    twin_of,
    vision_class,
)
from featcli.backbones.torchvision_operators import import_transformers
from featcli.backbones.trimming import idle_tensors

HEADS = "heads"  # the part of a network that holds them, by the names of their vectors
FIELDS = {"embedding": "pooler_output", "projection": "image_embeds", "logits": "logits"}
SECOND_PASS = "a second pass: its layers run otherwise than for the maps"
WITH_PROJECTION = "VisionModelWithProjection"  # how the names of classes of a vision tower with one end
OF_NO_SPACE = ("blip-2",)  # types whose image features are for a model of language, though it has text features too
LEAST_SHARED = 0.5  # of the trunk's parameters
_KEPT: ContextVar[dict[str, Any] | None] = ContextVar("_KEPT", default=None)  # where this thread keeps outputs
# Arguments that do not change what a module gives, but for what it gives beside that.
OF_NO_EFFECT = ("output_", "return_", "interpolate_pos_encoding", "labels", "use_cache")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A way to make a vector by a model of transformers."""

    vector: str
    size: int  # D
    shared: Mapping[str, str]  # path of a module in the model -> path of the same one in the trunk
    unused: tuple[str, ...]  # paths of modules and parameters of the model that the vector does not depend on

    def cut(self, model: Any) -> Any:
        """Take what is shared and what is unused out of the model. Returns it."""
        for path in self.unused:
            owner, leaf = _owner(model, path)
            is_module = isinstance(getattr(owner, leaf), nn.Module)
            setattr(owner, leaf, nn.Identity() if is_module else None)
        for path in self.shared:
            if not path:
                return nn.Identity()
            owner, leaf = _owner(model, path)
            setattr(owner, leaf, nn.Identity())
        return model

    def run(self, model: Any, trunk: nn.Module, pixels: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """Return the vector (B, D) that a cut model makes.

        `given` is what the shared modules of the trunk gave, by their paths there.
        """
        instead: dict[nn.Module, nn.Module] = {
            model.get_submodule(path): _Given(trunk.get_submodule(place), given[place])
            for path, place in self.shared.items()
        }
        return vector_of(self.vector, twin_of(model, instead) if instead else model, pixels)


class _Given(nn.Module):
    """A stand-in for a module whose output is known. All its other attributes are those of the module."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        super().__init__()
        self._of = (module,)  # in a tuple, so that it does not become a part of this one
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_of"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return copy(self._output) if isinstance(self._output, Mapping) else self._output  # some models write into it


def vector_of(name: str, model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return one of the vectors (B, D) of a model of transformers. Raises ValueError where it makes none."""
    if name == "projection" and hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixels, **options_for(model.get_image_features, model, pixels))
        found = found if isinstance(found, torch.Tensor) else found.get("pooler_output")
    else:
        output = model(pixel_values=pixels, **options_for(model.forward, model, pixels))
        found = output.get(FIELDS[name])
        if found is None and name == "logits":  # PP-LCNet calls them so
            found = output.get("last_hidden_state")
    return as_vector(found)


def as_vector(found: Any) -> torch.Tensor:
    """Return (B, D), or (B, D, 1, 1), as (B, D). Raises ValueError for anything else."""
    if isinstance(found, torch.Tensor) and (found.ndim == 2 or (found.ndim == 4 and found.shape[2:] == (1, 1))):
        return found.flatten(1)
    raise ValueError("it makes no such vector of a picture")


def options_for(function: Callable[..., Any], model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Return the option for an input of another size than the configuration names, if a function takes that."""
    if "interpolate_pos_encoding" not in inspect.signature(function).parameters:
        return {}
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    own = (size, size) if isinstance(size, int) else tuple(size or ())
    return {"interpolate_pos_encoding": tuple(pixels.shape[2:]) != own}


def heads_alone(trunk: Any) -> nn.Module:
    """Return the heads of a trunk that they do not need."""
    module = nn.Module()
    module.add_module(HEADS, trunk.get_submodule(HEADS))
    return module.eval()


def run_with_heads(
    trunk: Any, run: Callable[[], Any], heads: Sequence[Head], pixels: torch.Tensor, wants_maps: bool = True
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run the trunk, by `run`, and all heads behind it. Returns what the trunk gives, and the vectors.

    Without `wants_maps` the trunk is run only if a head shares a part of it; else None stands for what it gives.
    """
    with _outputs(trunk, {place for head in heads for place in head.shared.values()}) as given:
        found = run() if wants_maps or any(head.shared for head in heads) else None
    return found, {head.vector: head.run(getattr(trunk, HEADS)[head.vector], trunk, pixels, given) for head in heads}


@contextmanager
def _outputs(module: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Keep what these modules give to this thread in the block."""
    kept: dict[str, Any] = {}
    before = _KEPT.set(kept)

    def keep(path: str, output: Any) -> None:
        if _KEPT.get() is kept:  # else it is a pass of another thread
            kept[path] = output

    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        yield kept
    finally:
        _KEPT.reset(before)
        for hook in hooks:
            hook.remove()


def find_head(vector: str, model: Any, trunk: Any, run: Callable[[], Any], pixels: torch.Tensor) -> Head:
    """Return how a vector is made by a model behind the trunk, both without weights.

    `run` runs the trunk on these pixels. Raises what the model raises, and ValueError where it makes no such vector.
    """
    with torch.no_grad():  # some models keep tables from their first run
        size = int(vector_of(vector, model, pixels).shape[1])
    with torch.enable_grad(), _Record(model) as in_model:  # as below: autograd adds operations
        vector_of(vector, model, pixels)
    pairs = {path: place for path, place in _counterparts(model, trunk).items() if path in in_model.calls}
    parameters = sum(one.numel() for one in trunk.parameters())
    common = sum(one.numel() for place in pairs.values() for one in trunk.get_submodule(place).parameters())
    whole = Head(vector=vector, size=size, shared={}, unused=())
    if common >= LEAST_SHARED * parameters:
        with torch.enable_grad(), _Record(trunk) as in_trunk, _outputs(trunk, pairs.values()) as given:
            run()
        if _are_run_alike(pairs, in_model, in_trunk):
            head = replace(whole, shared=pairs)
            with suppress(AttributeError, KeyError, TypeError):  # its code looks into what was taken out
                return _without_unused(head, head.cut(twin_of(model)), trunk, pixels, given)
    return _without_unused(whole, model, trunk, pixels, {})


def _without_unused(head: Head, model: Any, trunk: Any, pixels: torch.Tensor, given: Mapping[str, Any]) -> Head:
    """Return the head with what its vector does not depend on left out. Raises what the model raises."""
    with torch.enable_grad():
        vector = head.run(model, trunk, pixels, given)
    has_parameters = any(True for _ in model.parameters())
    idle = idle_tensors(model, lambda _: [vector], pixels) if has_parameters else frozenset()
    unused: list[str] = []
    for path, part in model.named_modules():  # outer modules come first
        names = {f"{path}.{name}" for name, _ in part.named_parameters()}
        if path and names and idle.issuperset(names) and not any(path.startswith(f"{one}.") for one in unused):
            unused.append(path)
    own = {name for name, _ in model.named_parameters() if not any(name.startswith(f"{one}.") for one in unused)}
    alone = tuple(sorted(own & idle))
    for less in ((*unused, *alone), alone) if idle else ():
        found = replace(head, unused=less)
        with suppress(AttributeError, TypeError), torch.no_grad():  # its code looks into what nothing depends on
            found.run(found.cut(twin_of(model)), trunk, pixels, given)
            return found
    return head


def _counterparts(model: Any, trunk: Any) -> dict[str, str]:
    """Return the outermost modules of a model that are in the trunk too: path -> path there.

    A module of the trunk may have more in it. Single layers are not paired, since a norm may run once for each stage.
    """
    for path, part in model.named_modules():
        if type(part) is type(trunk) and _is_part(part, trunk):
            return {path: ""}
    roots = [_root(model), _root(trunk)]
    return dict(_pairs(model.get_submodule(roots[0]), trunk.get_submodule(roots[1]), *roots))


def _root(model: Any) -> str:
    """Return the path of the plain model in a model: its prefix, or nothing for the model itself."""
    prefix = prefix_of_transformers(model)
    inner = getattr(model, prefix, None)
    return prefix if isinstance(inner, nn.Module) and is_whole_model(inner) else ""  # of DINOv3 it is its encoder


def _pairs(part: nn.Module, other: nn.Module, path: str, place: str) -> Iterator[tuple[str, str]]:
    is_called = not isinstance(part, nn.ModuleList | nn.ModuleDict)
    has_layers = any(True for _ in part.children())
    if is_called and has_layers and type(part) is type(other) and _is_part(part, other):
        yield path, place
        return
    twins = dict(other.named_children())
    for name, child in part.named_children():
        if name in twins:
            yield from _pairs(child, twins[name], f"{path}.{name}".lstrip("."), f"{place}.{name}".lstrip("."))


def _is_part(part: nn.Module, other: nn.Module) -> bool:
    """Return whether all modules and tensors of a module are in another one."""
    return _contents(part) <= _contents(other)


def _contents(part: nn.Module) -> set[tuple[str, Any]]:
    modules = {(name, type(module)) for name, module in part.named_modules()}
    return modules | {(name, tensor.shape) for name, tensor in part.state_dict().items()}


class _Record(OperationMode):  # type: ignore[no-untyped-call]
    """A block in which the operations of a module are noted, and the calls of the modules in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.calls: dict[str, list[tuple[dict[str, Any], int]]] = {}  # arguments, and how many operations came before
        self._module = module
        self._hooks: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """See OperationMode."""
        self.operations.append(f"{func} {_described((args, kwargs or {}))}")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for path, part in self._module.named_modules():
            call = partial(self._call, path)
            self._hooks.append(part.register_forward_pre_hook(call, with_kwargs=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _call(self, path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.setdefault(path, []).append((_arguments(part, args, kwargs), len(self.operations)))

    def before(self, paths: Iterable[str]) -> list[str]:
        """Return the operations before the last of these modules was called."""
        return self.operations[: max(count for path in paths for _, count in self.calls[path])]


def _are_run_alike(pairs: Mapping[str, str], in_model: _Record, in_trunk: _Record) -> bool:
    """Return whether these modules are called once in both, with the same arguments, after the same operations."""
    for path, place in pairs.items():
        calls, others = in_model.calls[path], in_trunk.calls.get(place, [])
        if len(calls) != 1 or len(others) != 1 or calls[0][0] != others[0][0]:
            return False
    return bool(pairs) and in_model.before(pairs) == in_trunk.before(pairs.values())


def _arguments(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that matter, in words, by name: all that are neither None nor False."""
    bound = inspect.signature(part.forward).bind(*args, **kwargs).arguments
    named = {**bound, **bound.get("kwargs", {})}
    return {
        name: _described(value)
        for name, value in named.items()
        if name != "kwargs" and value is not None and value is not False and not name.startswith(OF_NO_EFFECT)
    }


def _described(tree: Any) -> str:
    """Return lists and dictionaries of any depth in words: a tensor by its shape, all else by its value."""
    return str(mapped(lambda one: tuple(one.shape) if isinstance(one, torch.Tensor) else repr(one), tree))


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, leaf = path.rpartition(".")
    return model.get_submodule(above), leaf


def classes_of_vectors(config: Any, outer: Any) -> dict[str, Any]:
    """Return the class that makes each vector, by the configuration of a model and that of a larger one around it.

    Only the models that `architectures` names make a projection and logits. Where it names none, nothing was trained
    yet, and every class that can be made of the configuration counts.
    """
    whole, found = config if outer is None else outer, {"embedding": vision_class(config)}
    named = [kind for name in whole.architectures or () if (kind := getattr(import_transformers(), name, None))]
    plain, classifiers = plain_class(whole), classes_of_classifiers(whole)
    projectors = [projector for kind in named or [plain] if (projector := _projector(kind, plain, whole))]
    found["projection"] = projectors[0] if projectors else None
    with_logits = [kind for kind in named if kind in classifiers] if named else classifiers
    found["logits"] = with_logits[0] if with_logits and whole.num_labels else None
    return {name: kind for name, kind in found.items() if kind is not None}


def _projector(kind: Any, plain: Any, config: Any) -> Any:
    """Return the class that projects pictures in a model of this class, which may hold the plain model of its type."""
    if kind is None or config.model_type in OF_NO_SPACE:
        return None
    if _projects(kind) or kind.__name__.endswith(WITH_PROJECTION):
        return kind
    if plain is None or not _projects(plain):
        return None
    with torch.device("meta"), silent_transformers():
        model = kind(config)
    return plain if any(type(part) is plain for part in model.modules()) else None


def _projects(kind: Any) -> bool:
    """Return whether a class projects onto a space that pictures share with texts."""
    return hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")
