"""Hold the private and version-bound names of torch, timm, transformers and huggingface_hub that backbones use.

If a later release changes them, this is the place to mend. tests/test_internals_backbones.py says what breaks without
each. timm and transformers are imported when a function needs them: timm takes seconds, and transformers is an extra.
The names of modules and tensors inside models are elsewhere, because checkpoints on disk hold them, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import math
import os
import pickle
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from featcli.backbones.torchvision_operators import import_timm, import_transformers
from featcli.errors import CheckpointError, shown
from featcli.pixels.resize import covering, shorter_edge
from featcli.spec.words import ProcessorBackend
from featcli.system.borrowed import Borrowed, one_at_a_time
from featcli.system.faults import is_of_machine, machine_error
from featcli.system.files import is_there, reading

# Reading weights needs these names of torch and numpy.

_PIECE_BYTES = 1 << 24  # that are copied at once


@dataclass(frozen=True, kw_only=True)
class Load:
    """One call of `load_state_dict`: the names that reached it, after any converter, and what it made of them."""

    module: nn.Module
    arrived: Mapping[str, torch.Tensor]
    missing: list[str]  # tensors of the module that did not arrive
    unexpected: list[str]  # tensors that arrived and that the module lacks


class _Watch(threading.local):
    """The loads that a thread collects."""

    loads: list[Load] | None = None
    hooks: dict[nn.Module, Any]


_watch = _Watch()


def _arrive(
    module: nn.Module, state: Mapping[str, torch.Tensor], prefix: str, _: object, __: object, *lists: list[str]
) -> None:
    missing, unexpected, _ = lists
    if not prefix and _watch.loads is not None:  # a part of the module loads with a prefix
        _watch.loads.append(Load(module=module, arrived=dict(state), missing=missing, unexpected=unexpected))


def _meet(owner: nn.Module, name: str, part: object) -> None:
    if _watch.loads is not None and owner not in _watch.hooks:
        _watch.hooks[owner] = owner.register_load_state_dict_pre_hook(_arrive)  # type: ignore[no-untyped-call]


@cache
def _meet_modules() -> None:
    """Have torch report modules that are made. The hook stays for good.

    If it were removed while another thread makes a module, torch's loop over such hooks would end with an error.
    """
    register_module_module_registration_hook(_meet)


@contextmanager
def reported_loads() -> Iterator[list[Load]]:
    """Collect the loads of all modules that this thread makes inside the block, because libraries only log them.

    Hooks on these modules see the loads, and are gone after the block.
    """
    _meet_modules()
    _watch.loads, _watch.hooks = [], {}
    try:
        yield _watch.loads
    finally:
        for hook in _watch.hooks.values():
            hook.remove()
        _watch.loads, _watch.hooks = None, {}


@contextmanager
def files_are_read() -> Iterator[list[Path]]:
    """Make libraries read weights files inside the block: if they mapped them, a read error would kill the process.

    Yields the list of files that were read whole, which grows. Raises MachineError inside the block for what cannot be
    read.
    """
    import safetensors.torch

    mapped, loaded = safetensors.torch.load_file, torch.load
    models = sys.modules.get("transformers.modeling_utils")
    opened = getattr(models, "safe_open", None)
    whole: list[Path] = []

    def load_file(filename: Any, device: Any = "cpu", **_: Any) -> dict[str, torch.Tensor]:
        whole.append(Path(filename))
        with reading(filename, "checkpoint") as file:
            return {name: tensor.to(device) for name, tensor in safetensors.torch.load(file.read()).items()}

    def load(f: Any, *args: Any, mmap: bool | None = None, **options: Any) -> Any:
        if not isinstance(f, str | os.PathLike):
            return loaded(f, *args, **options)
        whole.append(Path(f))
        with reading(f, "checkpoint") as file:
            return loaded(file, *args, **options)

    with one_at_a_time, ExitStack() as copies:  # these functions belong to the whole process

        def safe_open(filename: Any, *args: Any, **options: Any) -> Any:
            assert opened is not None
            if not hasattr(os, "memfd_create"):  # the system is not Linux
                return opened(filename, *args, **{**options, "backend": "pread"})
            return opened(copies.enter_context(_copied_to_memory(filename)), *args, **options)

        safetensors.torch.load_file, torch.load = load_file, load
        if opened is not None:
            setattr(models, "safe_open", safe_open)  # noqa: B010
        try:
            yield whole
        finally:
            safetensors.torch.load_file, torch.load = mapped, loaded
            if opened is not None:
                setattr(models, "safe_open", opened)  # noqa: B010


@contextmanager
def _copied_to_memory(filename: Any) -> Iterator[str]:
    """Copy a file into memory that can be mapped by a path, and yield that path.

    Sums of a convolution can differ in the last bit if weights lie at another offset to cache lines. Mapped from the
    copy, tensors lie as they would if the library mapped the file itself.
    """
    with reading(filename, "checkpoint") as file:
        descriptor = os.memfd_create("weights", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as copy:
                shutil.copyfileobj(file, copy, _PIECE_BYTES)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)


@contextmanager
def faults_are_heard(checkpoint: str) -> Iterator[None]:
    """Make errors of the machine reach libraries inside the block, where `os.path` would say that a file is not there.

    They would call a whole checkpoint broken, or take its path for a name at the hub. Only questions about this file or
    folder get another answer. Raises MachineError at the end, whatever the libraries made of an error.
    """
    below, heard = os.path.abspath(checkpoint), list[OSError]()

    def answering(plain: Callable[[Any], bool], is_kind: Callable[[int], bool]) -> Callable[[Any], bool]:
        def answer(path: Any) -> bool:
            if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(below):
                return plain(path)
            try:
                return is_kind(os.stat(path).st_mode)
            except ValueError:  # no file can have such a name
                return False
            except OSError as error:
                if not is_of_machine(error):
                    return False
                heard.append(error)
                raise

        return answer

    plain = os.path.isfile, os.path.isdir, os.path.exists
    with one_at_a_time:  # these functions belong to the whole process
        os.path.isfile = answering(plain[0], stat.S_ISREG)  # type: ignore[assignment]
        os.path.isdir = answering(plain[1], stat.S_ISDIR)  # type: ignore[assignment]
        os.path.exists = answering(plain[2], lambda mode: True)  # type: ignore[assignment]
        try:
            yield
        finally:
            os.path.isfile, os.path.isdir, os.path.exists = plain
            if heard:
                raise machine_error(f"checkpoint {shown(checkpoint)}", heard[0]) from heard[0]


def holds_more_than_tensors(error: Exception) -> bool:
    """Return whether torch, alone or under transformers, refused a weights file because it could run code."""
    return isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)


def class_in_pickle(error: Exception) -> str:
    """Return the name of the class or function for which torch refused a weights file; "" if it names none."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else ""


def ends_too_early(error: pickle.UnpicklingError) -> bool:
    """Return whether torch refused a weights file because its end is missing."""
    return "EOF" in str(error)


def numpy_numbers() -> list[Any]:
    """Return what a pickle of one of numpy's single numbers names, for torch's list of what is safe to read."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


# Convolutions, norms and operations of torch and timm have these names and parts.

# These convolutions use their weights as they are. Others standardise them first.
PLAIN_CONVOLUTIONS = ("Conv2d", "Conv2dSame")
NORM_WITH_ACTIVATION = "BatchNormAct2d"  # timm's batch norm, followed by its `drop` and its `act`


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution that a norm can be folded into."""
    return isinstance(module, nn.Conv2d) and type(module).__name__ in PLAIN_CONVOLUTIONS


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm with statistics, torch's own or timm's BatchNormAct2d."""
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
        return False
    return type(module) is nn.BatchNorm2d or type(module).__name__ == NORM_WITH_ACTIVATION


def steps_after_norm(norm: nn.BatchNorm2d) -> list[nn.Module]:
    """Return what a plain norm does after it has normalised."""
    return [] if type(norm) is nn.BatchNorm2d else [norm.drop, norm.act]  # type: ignore[list-item]


def fused_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weight and the bias of a convolution that does what it and the norm after it do in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def is_of_meta(error: Exception) -> bool:
    """Return whether a network cannot run on the meta device because it looks into its tensors."""
    return isinstance(error, NotImplementedError) or "meta" in str(error)


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which each operation of this thread on tensors goes through `__torch_dispatch__`."""

    def __init__(self) -> None:
        """Prepare a block for one `with`."""
        super().__init__()  # type: ignore[no-untyped-call]


def leaves_of(tree: object) -> list[Any]:
    """Return the leaves of lists and dictionaries of any depth."""
    return tree_leaves(tree)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same lists and dictionaries with each leaf replaced."""
    return tree_map(function, tree)


def operations_of(counter: FlopCounterMode) -> tuple[int, int]:
    """Return how many floating point operations were counted, and how many of them were those of convolutions."""
    by_operator = counter.get_flop_counts().get("Global", {})
    return counter.get_total_flops(), sum(n for name, n in by_operator.items() if "convolution" in str(name))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for one size, with the weights as constants that are laid out once.

    CUDA graphs are off, because they would use the memory of maps again while these are still on their way to the host.
    Each function gets code of its own, because torch counts how often it has compiled some code, for whatever network,
    and after eight times runs it as it is.
    """

    def whole(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    code = whole.__code__.replace(co_name=f"network_{next(_compiled)}")
    own = FunctionType(code, whole.__globals__, code.co_name, None, whole.__closure__)
    return torch.compile(own, dynamic=False, options={"freezing": True, "triton.cudagraphs": False})


_compiled = count()  # numbers of networks


# The hub's client.

# What its exceptions mean, by their names, so that it need not be imported to say so.
HUB_ERRORS = {
    "LocalEntryNotFoundError": "it is not in the cache, and the hub does not answer or HF_HUB_OFFLINE is set",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE is set or the hub does not answer",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "the repository has no such revision",
    "GatedRepoError": "its owner gives access on request only",
    "EntryNotFoundError": "the repository has no config.json",
}


def name_and_revision(checkpoint: str) -> dict[str, Any]:
    """Split `owner/name@revision` into arguments of transformers' loaders. A path stays as it is."""
    name, at, revision = checkpoint.rpartition("@")
    if not at or is_there(checkpoint):
        return {"pretrained_model_name_or_path": checkpoint}
    return {"pretrained_model_name_or_path": name, "revision": revision}


def hub_is_offline() -> bool:
    """Return whether the hub's client uses only its cache."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def set_hub_offline(is_offline: bool) -> None:
    """Make the hub's client use only its cache from now on, or not.

    It reads HF_HUB_OFFLINE only when it is imported.
    """
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = is_offline


def ask_hub(seconds: float) -> None:
    """Send the smallest request to the hub. Without an answer it raises whatever the client's HTTP library raises."""
    from huggingface_hub import constants, get_session

    get_session().head(constants.ENDPOINT, timeout=seconds)


# The models of timm.

AT_HUB, IN_FOLDER = "hf-hub:", "local-dir:"  # begin the names of such checkpoints in timm


@dataclass(frozen=True, kw_only=True)
class TimmFacts:
    """What timm's configuration of a model says besides its preprocessing."""

    architecture: str  # "" if it says none
    tag: str  # of the trained weights
    hub_id: str  # of the repository with the weights; "" if there is none
    hub_filename: str | None  # of the weights there, if it is no usual name
    has_reader_of_its_own: bool  # whether its weights have a format that is no state dict
    classifiers: tuple[str, ...]  # the modules of its head
    num_classes: int  # that its head was trained for; 0 without a head
    label_offset: int  # classes of its weights that come before those, and are not its own
    class_names: tuple[str, ...]  # empty where it names none
    licence: str  # empty likewise


def facts_of_timm(model: Any) -> TimmFacts:
    """Read the configuration of a model that timm made."""
    config = model.pretrained_cfg
    classifiers = config.get("classifier")
    return TimmFacts(
        architecture=config.get("architecture") or "",
        tag=config.get("tag") or "",
        hub_id=str(config.get("hf_hub_id") or ""),
        hub_filename=config.get("hf_hub_filename"),
        has_reader_of_its_own=bool(config.get("custom_load")),
        classifiers=(classifiers,) if isinstance(classifiers, str) else tuple(classifiers or ()),
        num_classes=int(config.get("num_classes") or 0),
        label_offset=int(config.get("label_offset") or 0),
        class_names=tuple(map(str, config.get("label_names") or ())),
        licence=str(config.get("license") or ""),
    )


def head_projects_of_timm(architecture: str, tag: str) -> bool:
    """Tell whether the head of a checkpoint of timm projects onto a space that pictures share with texts.

    timm does not say so: such a head has as many outputs as that space has dimensions, which is no number of classes
    that a model of timm was trained for.
    """
    models = importlib.import_module("timm.models")
    if not models.is_model(architecture):
        return False
    config = models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture, allow_unregistered=True)
    return bool(config and 0 < (config.num_classes or 0) <= MOST_DIMENSIONS and config.num_classes != OF_IMAGENET)


MOST_DIMENSIONS = 2048  # of a space that pictures share with texts
OF_IMAGENET = 1000


def has_head_of_timm(model: Any) -> bool:
    """Tell whether a model can make a vector of what its stages give."""
    return callable(getattr(model, "forward_head", None))


def in_chans_of_timm(model: Any) -> int:
    """Return the number of channels of the pixels that a model takes, as its constructor was told.

    The weight of the first layer does not say it, because some models first make more channels of fewer pixels.
    """
    return int(model.in_chans)


def patch_of_timm(model: Any) -> tuple[int, ...]:
    """Return the (height, width) of the model's patches by its own words; () if it says nothing."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return (patch, patch) if isinstance(patch, int) else tuple(patch or ())


def stages_of_timm(model: Any) -> list[tuple[str, int]]:
    """Return the module and the stride of each stage, as timm counts them."""
    return [(str(info["module"]), info["reduction"]) for info in model.feature_info]


def is_option_of_timm(model: nn.Module, option: str) -> bool:
    """Return whether a constructor of the model has such a parameter."""
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    return any(option in inspect.signature(kind.__init__).parameters for kind in kinds)


def arguments_of_timm(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that the constructors of a model have, with their defaults, or the fields of a dataclass."""
    fields: dict[str, Any] = {}
    found: dict[str, Any] = {}
    kinds: list[Any] = [kind for kind in type(model).__mro__[:-1] if kind is not nn.Module]
    for kind in reversed(kinds):
        _, *known = inspect.signature(kind.__init__).parameters.values()
        found |= {one.name: one.default for one in known if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        with suppress(NameError):  # an annotation is only for type checkers
            config = get_type_hints(kind.__init__).get("cfg")
            for form in (config, *get_args(config)):
                fields |= (
                    {one.name: one.default for one in dataclasses.fields(form)}
                    if dataclasses.is_dataclass(form)
                    else {}
                )
    return fields | found


# timm notes these at a model, about how it was made.
NOTES_OF_TIMM = frozenset(("pretrained_cfg", "default_cfg", "pretrained_model_args", "_traits", "_model_args"))


def has_class_token_of_timm(model: Any) -> bool:
    """Return whether token 0 is a class token. Some models have only registers before their patches."""
    has_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    return has_prefix and getattr(model, "cls_token", None) is not None and getattr(model, "num_prefix_tokens", 0) > 0


def num_registers_of_timm(model: Any) -> int:
    """Count the registers of a model: the last of the tokens before its patches."""
    found = getattr(model, "reg_token", None)
    return 0 if found is None else int(found.shape[1])


def prune_timm(model: Any, positions: Sequence[int], keeps_norm: bool) -> Any:
    """Take out of a model what comes after the deepest of these stages. Returns the indices for `run_timm`."""
    return model.prune_intermediate_layers(list(positions), prune_norm=not keeps_norm, prune_head=True)


def run_timm(
    model: Any, pixels: torch.Tensor, indices: Any, normed: bool, with_prefixes: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a model for the (B, C, h, w) maps of these stages, after its final norm where `normed`; and for prefixes.

    Prefixes are the (B, P, C) tokens before the patches, in a list that is empty where they are not wanted.
    """
    options: dict[str, Any] = {"norm": normed, "output_fmt": "NCHW", "intermediates_only": True}
    found = model.forward_intermediates(
        pixels, indices=indices, **options, **({"return_prefix_tokens": True} if with_prefixes else {})
    )
    return _apart(found, with_prefixes)


def run_whole_timm(
    model: Any, pixels: torch.Tensor, indices: Any, normed: bool, vectors: Sequence[str], with_prefixes: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Run a model for the same, and for (B, D) vectors of what it gives after all of its stages and its final norm."""
    options: dict[str, Any] = {"norm": normed, "output_fmt": "NCHW"}
    indices = list(indices)
    last, found = model.forward_intermediates(
        pixels, indices=indices or 1, **options, **({"return_prefix_tokens": True} if with_prefixes else {})
    )
    made = {name: model.forward_head(last, pre_logits=name == "embedding") for name in vectors}
    return *_apart(found if indices else [], with_prefixes), made


def _apart(found: Any, with_prefixes: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    if not with_prefixes:
        return list(found), []
    return [maps for maps, _ in found], [prefix for _, prefix in found]


def model_args_of_timm(name: str) -> dict[str, Any]:
    """Return the arguments that the configuration of a folder (`local-dir:`) or hub id (`hf-hub:`) sets."""
    models = importlib.import_module("timm.models._hub")
    source, _, place = name.partition(":")
    read = {"hf-hub": models.load_model_config_from_hf, "local-dir": models.load_model_config_from_path}.get(source)
    return {} if read is None else dict(read(place)[2] or {})


def is_unknown_to_timm(error: Exception) -> bool:
    """Return whether timm refused the name of a model, or the tag in it."""
    return str(error).startswith(("Unknown model", "Invalid pretrained tag"))


def option_for_weights(
    classifiers: Sequence[str], tensors: Mapping[str, torch.Tensor] | None = None, num_classes: int = 0
) -> dict[str, Any]:
    """Return the option with which timm's `create_model(pretrained=True)` loads these tensors, or its own file's.

    timm refuses tensors that a headless model lacks if its configuration says that the trained one had no head either.
    With another number of classes in it, timm removes the tensors of `classifiers`, and reports the others. With the
    `num_classes` of a model that has its head, they stay.
    """
    overlay: dict[str, Any] = {"num_classes": num_classes or 1, "classifier": tuple(classifiers)}
    more = {"pretrained_strict": False} if num_classes else {}  # what is absent is told as of every other tensor
    return {"pretrained_cfg_overlay": overlay if tensors is None else {**overlay, "state_dict": tensors}, **more}


def forget_weights(model: Any) -> None:
    """Drop the tensors that a model was made from, because timm keeps them in its configuration."""
    model.pretrained_cfg.pop("state_dict", None)


_timm = logging.getLogger("timm")
_LEVEL_OF_TIMM = Borrowed(lambda: _timm.level, _timm.setLevel)


# One of timm's converters prints what it tried to find.
_PRINT_OF_TIMM: Borrowed[Any] = Borrowed(
    lambda: vars(_module_of_eva()).get("print", print), lambda found: setattr(_module_of_eva(), "print", found)
)


def _module_of_eva() -> Any:
    return importlib.import_module("timm.models.eva")


@contextmanager
def silent_timm() -> Iterator[None]:
    """Suppress timm's warnings about superfluous keys of a file: featcli says what matters itself."""
    with _LEVEL_OF_TIMM.set_to(logging.ERROR), _PRINT_OF_TIMM.set_to(lambda *_, **__: None):
        yield


# The preprocessing of timm.


def timm_transform(config: Mapping[str, Any]) -> tuple[Callable[[Image.Image], Any], list[str]]:
    """Return timm's evaluation transform, and its steps, such as `Resize 235 bicubic`.

    It takes a picture, or uint8 (C, H, W), and gives the same kind. With `use_prefetcher` timm leaves scaling and
    normalising to its loader, and its last step only makes a tensor of the picture, which is left out.
    """
    import_timm()
    from timm.data import create_transform

    steps = create_transform(**config, is_training=False, use_prefetcher=True).transforms[:-1]

    def transform(picture: Any) -> Any:
        for step in steps:
            picture = step(picture)
        return picture

    return transform, [_name_of_step(step, config["interpolation"]) for step in steps]


def _name_of_step(step: Any, interpolation: str) -> str:
    size = step.size if isinstance(step.size, int) else "x".join(map(str, step.size))
    return f"{type(step).__name__} {size}" + (f" {interpolation}" if hasattr(step, "interpolation") else "")


def timm_resampling(name: str) -> Image.Resampling:
    """Return Pillow's filter for timm's word."""
    import_timm()
    from timm.data.transforms import str_to_pil_interp

    resampling: Image.Resampling = str_to_pil_interp(name)
    return resampling


def timm_sizes(config: Mapping[str, Any]) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """Return a function from the (H, W) of a picture to the size to which timm's transform resizes it before it crops.

    Two different edges are covered by timm's own step, and equal ones by torchvision's, which rounds differently.
    """
    import_timm()
    from timm.data.constants import DEFAULT_CROP_PCT

    kept = config.get("crop_pct") or DEFAULT_CROP_PCT
    height, width = (math.floor(edge / kept) for edge in config["input_size"][1:])
    if config.get("crop_mode") == "squash":
        return lambda _: (height, width)
    if config.get("crop_mode") != "border":
        return shorter_edge(height) if height == width else covering((height, width))

    def sizes(size: tuple[int, int]) -> tuple[int, int]:
        ratio = max(size[0] / height, size[1] / width)
        return round(size[0] / ratio), round(size[1] / ratio)

    return sizes


def values_for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return means or deviations for so many channels. Greys take the average of the colours, as in timm's loader."""
    import_timm()
    from timm.data.loader import adapt_to_chs

    with silent_timm():
        return tuple(adapt_to_chs(values, channels))


# The models of transformers.


def is_whole_model(module: nn.Module) -> bool:
    """Return whether a module is a whole model of transformers, as SwinModel is and SwinEncoder is not."""
    return hasattr(module, "base_model_prefix") and type(module).__name__.endswith("Model")


def prefix_of_transformers(module: Any) -> str:
    """Return the name that a whole model has inside one with a head, such as `swin` for SwinModel."""
    return str(module.base_model_prefix)


def ignored_names_of_transformers(module: Any) -> list[str]:
    """Return the patterns of names that a model leaves out of the report of what it loaded."""
    return sorted(module._keys_to_ignore_on_load_unexpected or ())


# The code of these types puts frozen norms in place of their backbone's batch norms. The names are those of their
# modules.
REPLACE_NORMS = frozenset(
    "conditional_detr d_fine dab_detr deformable_detr deimv2 detr grounding_dino mm_grounding_dino pp_doclayout_v2"
    " pp_doclayout_v3 pp_doclayout_v4 rt_detr rt_detr_v2 table_transformer".split()
)


def backbone_classes() -> Mapping[type, Any]:
    """Return the class of AutoBackbone for each configuration class that it knows."""
    mapping: Mapping[type, Any] = import_transformers().models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
    return mapping


def vision_class(config: Any) -> Any:
    """Return the model class of a configuration by AutoModel's mapping or by its name; None if it sees no pictures."""
    kind = plain_class(config)
    return kind if getattr(kind, "main_input_name", "") == "pixel_values" else None


def plain_class(config: Any) -> Any:
    """Return the model class of a configuration, without a head, by AutoModel's mapping or by its name, or None."""
    transformers = import_transformers()
    kind = transformers.models.auto.modeling_auto.MODEL_MAPPING.get(type(config), None) or getattr(
        transformers, type(config).__name__.removesuffix("Config") + "Model", None
    )
    return kind[0] if isinstance(kind, tuple) else kind


def classes_of_classifiers(config: Any) -> tuple[Any, ...]:
    """Return the classes of AutoModelForImageClassification for a configuration, its default first."""
    mapping = import_transformers().models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    kinds = mapping.get(type(config), None) or ()
    return kinds if isinstance(kinds, tuple) else (kinds,)


def load_pretrained(
    kind: Any, checkpoint: str, config: Any, renamed: Mapping[str, str] | None
) -> tuple[Any, Mapping[str, Any]]:
    """Load a model of any class in fp32, with transformers' report: missing, unexpected and mismatched keys.

    `renamed` replaces patterns in the names on disk. Some classes override `from_pretrained` with one that cannot read
    a folder, so the plain one is called unbound. Raises whatever transformers raises.
    """
    plain = import_transformers().PreTrainedModel.from_pretrained.__func__
    model, report = plain(
        kind,
        **name_and_revision(checkpoint),
        config=config,
        key_mapping=renamed,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report has them, with both shapes
    )
    return model, report


def renamings_of_transformers(config: Any) -> dict[str, str]:
    """Return what transformers replaces in the names of a whole model's tensors: pattern -> replacement.

    It depends on the class that the configuration names and on its type, as in transformers. Entries that merge or
    split tensors are left out.
    """
    transformers = import_transformers()
    from transformers import conversion_mapping, core_model_loading

    base = transformers.models.auto.modeling_auto.MODEL_MAPPING.get(type(config), None)
    classes = [*(config.architectures or ()), *([] if base is None or isinstance(base, tuple) else [base.__name__])]
    tables = [conversion_mapping.get_checkpoint_conversion_mapping(name) for name in (*classes, config.model_type)]
    rules = [rule for table in tables for rule in table or () if type(rule) is core_model_loading.WeightRenaming]
    pairs = [zip(rule._original_source_patterns, rule._original_target_patterns, strict=True) for rule in rules]
    return {source: target for pair in pairs for source, target in pair}


def norm_replacer(outer: Any) -> Callable[[nn.Module], None] | None:
    """Return what the code of a larger model does to the batch norms of its backbone; None if it leaves them.

    It is found by its name, beside the configuration. Raises CheckpointError if it is no longer there: maps would
    silently differ in their last bits from those of the model itself.
    """
    if not getattr(outer, "freeze_backbone_batch_norms", True):
        return None
    place = type(outer).__module__
    modeling = importlib.import_module(place.replace(".configuration_", ".modeling_"))
    found: Callable[[nn.Module], None] | None = getattr(modeling, "replace_batch_norm", None)
    if found is None and place.startswith("transformers.") and place.partition(".configuration_")[2] in REPLACE_NORMS:
        raise CheckpointError(
            f"model type {shown(outer.model_type)}: transformers {import_transformers().__version__} lacks"
            " replace_batch_norm, which freezes the norms of its backbone",
            "use the transformers of featcli's constraints.txt",
        )
    return found


def needs_code_of_its_own(error: Exception) -> bool:
    """Return whether transformers refused a checkpoint because it brings code."""
    return "custom code" in str(error) or "trust_remote_code" in str(error)


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and load reports: featcli says what matters itself."""
    import_transformers()
    with _SAID_BY_TRANSFORMERS.set_to((logging.CRITICAL, False)):
        yield


def _said_by_transformers() -> tuple[int, bool]:
    from transformers.utils import logging as of_transformers

    return of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()


def _have_transformers_say(what: tuple[int, bool]) -> None:
    from transformers.utils import logging as of_transformers

    verbosity, has_bar = what
    of_transformers.set_verbosity(verbosity)
    (of_transformers.enable_progress_bar if has_bar else of_transformers.disable_progress_bar)()


_SAID_BY_TRANSFORMERS = Borrowed(_said_by_transformers, _have_transformers_say)


# The preprocessing of transformers.


def load_processor(checkpoint: str, backend: ProcessorBackend) -> Any:
    """Load an image processor without running code of its own. Its backend is fixed, because others give other pixels.

    It has another backend if its type lacks this one. Raises whatever transformers raises.
    """
    kind, place = import_transformers().AutoImageProcessor, name_and_revision(checkpoint)
    return kind.from_pretrained(**place, backend=backend, trust_remote_code=False)


def written_config(checkpoint: str) -> dict[str, Any]:
    """Return what the config.json of a folder, file or hub id says, without defaults of transformers."""
    config, _ = import_transformers().PreTrainedConfig.get_config_dict(**name_and_revision(checkpoint))
    return dict(config)


def read_config_of(checkpoint: str) -> Any:
    """Read the configuration of a folder or hub id, without running code of its own."""
    kind = import_transformers().AutoConfig
    return kind.from_pretrained(**name_and_revision(checkpoint), trust_remote_code=False)


def processor_class(model_type: str, backend: ProcessorBackend) -> Any:
    """Return the image processor class of a backend that transformers pairs with a model type, or None."""
    transformers = import_transformers()
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    return getattr(transformers, str(IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {}).get(backend)), None)


def plain_processor(size: tuple[int, int], backend: ProcessorBackend) -> Any:
    """Return ViT's image processor for this (H, W): resize, scale, normalise."""
    return processor_class("vit", backend)(size={"height": size[0], "width": size[1]})


def resized_by_torchvision(picture: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """Resize an RGB picture to this (H, W) as the backend `torchvision` does. Returns (3, H, W)."""
    from torchvision.transforms.v2 import functional
    from transformers.image_utils import pil_torch_interpolation_mapping

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    found = functional.resize(
        pixels, list(size), interpolation=pil_torch_interpolation_mapping[resample], antialias=True
    )
    resized: np.ndarray = found.numpy()
    return resized


def backbone_type(library: str) -> Any:
    """Return transformers' word for the library of a backbone."""
    from transformers.backbone_utils import BackboneType

    return BackboneType(library)


def freeze_norms_of_timm(module: nn.Module) -> None:
    """Replace batch norms by timm's frozen norms, as transformers' TimmBackbone does."""
    import_timm().utils.model.freeze_batch_norm_2d(module)


def unfreeze_norms_of_timm(module: nn.Module) -> None:
    """Replace timm's frozen norms by batch norms."""
    import_timm().utils.model.unfreeze_batch_norm_2d(module)


def to_be_copied(module: nn.Module) -> tuple[nn.Module, bool]:
    """Return a copy that can be pickled: without the hooks by which transformers records outputs, local functions.

    Also returns whether it has such hooks.
    """
    twin, hooked = twin_of(module), False
    for part in twin.modules():
        for number, hook in list(part._forward_hooks.items()):
            if "output_capturing_hook" in getattr(hook, "__qualname__", ""):
                del part._forward_hooks[number]
                hooked = True
        vars(part).pop("_output_capturing_hooks_installed", None)
    return twin, hooked


def hook_again(module: nn.Module, hooked: bool) -> None:
    """Put the hooks by which transformers records outputs into a copy that has none."""
    if hooked:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        maybe_install_capturing_hooks(module)


def twin_of(
    module: nn.Module,
    instead: Mapping[nn.Module, nn.Module] | None = None,
    tensors: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """Return a module of the same class with copies of its parts, which share their tensors.

    Changes of the copy's parts and hooks leave the module as it was. A part that is a key of `instead` is replaced by
    the value. `tensors` makes the copy's parameters and buffers from those of the module.
    """
    made: dict[nn.Module, nn.Module] = dict(instead or {})

    def twin(part: nn.Module) -> nn.Module:
        if part in made:  # a part in two places is one part in the copy, too
            return made[part]
        other = made[part] = part.__class__.__new__(part.__class__)
        # copy.copy is not used, because some classes copy themselves in another way, with their tensors.
        for name, value in vars(part).items():
            vars(other)[name] = value.copy() if isinstance(value, dict) and name.startswith("_") else value
        for name, child in part._modules.items():
            other._modules[name] = None if child is None else twin(child)
        for kept in (other._parameters, other._buffers) if tensors is not None else ():
            for name, tensor in kept.items():
                kept[name] = None if tensor is None else tensors(tensor)  # type: ignore[assignment,misc]
        return other

    return twin(module)


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and dtype that takes no memory."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def names_without_value(module: nn.Module) -> set[str]:
    """Return the attributes, parameters and modules of a module that are None, which no public name lists."""
    kinds = (vars(module), module._parameters, module._modules)
    return {name for kind in kinds for name, value in kind.items() if value is None}
