"""timm models: names, tags, hub ids, local folders and bare weights files, through timm's own loaders.

Never `features_only`: it computes every stage in 183 architectures, yields NHWC in 35, and loads wrong
weights without a word. Here the full model is built without its head, pruned after the deepest stage
asked for, and run by `forward_intermediates(output_fmt="NCHW")`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before timm, which imports torchvision

import timm  # noqa: E402
from timm.data import resolve_data_config  # noqa: E402

from featcli.backbones.backbone import Network, Preprocessing, Weights  # noqa: E402
from featcli.backbones.checkpoint import unreachable  # noqa: E402
from featcli.backbones.hub import hub_or_cache, hub_weights  # noqa: E402
from featcli.backbones.model_spec import ModelSpec  # noqa: E402
from featcli.backbones.preprocessing import silent_timm, timm_preprocessing  # noqa: E402
from featcli.backbones.stages import names_by_stride  # noqa: E402
from featcli.backbones.weights import (  # noqa: E402
    captured_loads,
    hash_files,
    read_weights,
    refuse_pretenders,
    strip_prefix,
    weights_files,
)
from featcli.errors import CheckpointError, UsageError, nearest, one_line, shown  # noqa: E402
from featcli.spec.groups import CheckpointSpec  # noqa: E402
from featcli.spec.words import NATIVE  # noqa: E402


class TimmModelSpec(ModelSpec):
    """A timm model by whatever name, before its weights are read."""

    library = "timm"

    def __init__(
        self,
        asked: CheckpointSpec,
        checkpoint: str,
        options: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """`checkpoint` is the asked's, with `local-dir:` or `hf-hub:` before it where timm wants that; `options`
        go to the model's constructor, `preprocessing` is what the checkpoint says of its pixels in place of timm.
        """
        self.asked = asked
        self.model_name = asked.arch or checkpoint
        self.files = [Path(checkpoint)] if asked.arch else []
        self._place = ""  # of the weights in their file
        self._options = dict(options or {})
        plain = self._create("meta")
        if asked.num_channels not in (None, _in_chans(plain)):  # what changes nothing is no part of the plan
            self._options["in_chans"] = asked.num_channels
            plain = self._create("meta")
        own = dict(preprocessing or {}) or plain.pretrained_cfg
        own_size = tuple(resolve_data_config({}, pretrained_cfg=own)["input_size"][1:])
        self._options |= self._size_option(plain) if asked.input_size != own_size else {}
        if asked.fit == NATIVE and _takes(plain, "dynamic_img_size"):
            self._options["dynamic_img_size"] = True
        self.config = resolve_data_config(_size_override(asked.input_size), pretrained_cfg=own)
        self.channels = self._options.get("in_chans") or _in_chans(plain)
        self.input_size = self.config["input_size"][1:]
        strides = tuple(info["reduction"] for info in plain.feature_info)
        self.strides, self._is_isotropic = strides, len(set(strides)) == 1
        names = names_by_stride(strides)
        self.stage_names = tuple(zip(names, (str(info["module"]) for info in plain.feature_info), strict=True))
        self.patch = _patch(plain, strides)
        self.norm = asked.norm or "raw"
        self.norm_reason = "as asked" if asked.norm else "default: timm's own"
        # A folder's model_args can change the network without changing a weight: the plan must know.
        self._structure = xxhash.xxh3_128_hexdigest(repr(plain).encode())
        self.tag = plain.pretrained_cfg.get("tag") or ""
        self.architecture = plain.pretrained_cfg.get("architecture") or self.model_name
        path = Path(asked.checkpoint_name.removeprefix("local-dir:"))
        if path.exists():  # a private file or folder is not the checkpoint that timm has under that tag
            self.name = f"{path.resolve().name} ({self.architecture})"
        elif self.model_name.startswith("hf-hub:"):
            self.name = f"{self.model_name.removeprefix('hf-hub:')} ({self.architecture})"
        else:
            self.name = f"{self.architecture}.{self.tag}" if self.tag and not asked.is_random else self.architecture

    def settings(self) -> dict[str, Any]:
        """See Source."""
        return {
            "library": "timm",
            "architecture": self.architecture,
            "structure": self._structure,
            "input_size": list(self.input_size),
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in self._options.items()},
            "norm": self.norm,
        }

    def build(self, positions: Sequence[int], device: str) -> Network:
        """See Source."""
        return self._cut(self._create(device), positions)

    def load(self, positions: Sequence[int]) -> tuple[Network, Weights]:
        """See Source. Weights are proven: any tensor of the cut network that was not loaded is a refusal."""
        if self.asked.is_random:
            torch.manual_seed(self.asked.seed)
            network = self._cut(self._create("cpu"), positions)
            return network, Weights(f"random weights, seed {self.asked.seed}", random=True)
        overlay: dict[str, Any] = {}
        strangers: list[str] = []
        if self.files:
            container, found = read_weights(self.files)
            prefix, under_prefix, strangers = strip_prefix(self.files[0], found, self._create("meta").state_dict())
            self._place = ", ".join([*([container] if container else []), *([f"{prefix}*"] if prefix else [])])
            overlay = {"pretrained_cfg_overlay": {"state_dict": under_prefix}}
        if self.model_name.startswith("local-dir:"):
            refuse_pretenders(weights_files(Path(self.model_name.removeprefix("local-dir:"))))
        with captured_loads() as loads:
            model = self._create_pretrained(**overlay)
        model.pretrained_cfg.pop("state_dict", None)
        files = self.files or _files_of(self.model_name, model.pretrained_cfg)
        unexpected = strangers + [key for result in loads for key in result.unexpected_keys]
        network = self._cut(model, positions)
        return network, self._proven(network.module, loads, unexpected, files)

    def preprocessing(self) -> Preprocessing:
        """timm's own evaluation transform, up to the point where it would leave uint8."""
        if self.channels not in (1, 3):
            raise UsageError(
                f"--num-channels {self.channels}: a picture has 1 or 3", "such a backbone can only be inspected"
            )
        return timm_preprocessing(self.config, self.channels, self.tag, self.resize_mode)

    def _cut(self, model: Any, positions: Sequence[int]) -> Network:
        """The model without what comes after the deepest of these stages."""
        # A final norm fits every block of a transformer, but only the last stage of a pyramid.
        normed = self.norm == "model" and (self._is_isotropic or len(self.stage_names) - 1 in positions)
        indices = model.prune_intermediate_layers(list(positions), prune_norm=not normed, prune_head=True)

        def intermediates(pixels: torch.Tensor, **kwargs: Any) -> Any:
            return model.forward_intermediates(
                pixels, indices=indices, norm=normed, output_fmt="NCHW", intermediates_only=True, **kwargs
            )

        def class_tokens(pixels: torch.Tensor) -> list[torch.Tensor]:
            return [prefix[:, 0] for _, prefix in intermediates(pixels, return_prefix_tokens=True)]

        return Network(model, intermediates, class_tokens if _has_class_token(model) else None)

    def _size_option(self, plain: nn.Module) -> dict[str, Any]:
        """`img_size` for constructors that take one; convolution nets refuse it and do not need it."""
        if self.asked.input_size is None or not _takes(plain, "img_size"):
            return {}
        option = {"img_size": self.asked.input_size}
        try:
            self._create("meta", **option)
        except UsageError:  # not for that size: the model as it is may take it all the same
            return {}
        return option

    def _create(self, device: str, **more: Any) -> Any:
        """A headless model without weights. Raises UsageError for names that timm does not know."""
        options = {**self._options, **more}
        try:
            at_hub = self.model_name.startswith("hf-hub:")
            with torch.device(device), hub_or_cache(wanted=at_hub), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of architectures that have another name by now
                return timm.create_model(self.model_name, pretrained=False, num_classes=0, **options)
        except (AssertionError, ZeroDivisionError) as error:
            asked = ", ".join(f"{name} {value}" for name, value in options.items())
            raise UsageError(
                f"{self.model_name} with {asked}: {one_line(error)}", "choose another --image-size"
            ) from error
        except Exception as error:  # a configuration that is off; files, the hub, its HTTP library
            if str(error).startswith(("Unknown model", "Invalid pretrained tag")):
                raise _unknown(self.model_name, "--arch" if self.asked.arch else "checkpoint") from None
            if self.model_name.startswith("hf-hub:"):
                raise unreachable(self.model_name, error) from error
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {one_line(error)}", "is the folder whole?"
            ) from error

    def _create_pretrained(self, **overlay: Any) -> Any:
        """The same model with weights. Whatever timm raises here is about the checkpoint."""
        at_hub = not self.files and not self.model_name.startswith("local-dir:")
        try:
            with silent_timm(), hub_or_cache(wanted=at_hub):
                return timm.create_model(self.model_name, pretrained=True, num_classes=0, **self._options, **overlay)
        except Exception as error:  # files, hub, HTTP, unpickling and shapes: timm lets all of them through
            if at_hub:
                raise unreachable(self.model_name, error, ", or try --random-init") from error
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {one_line(error, 2)}",
                f"do these weights belong to {self.architecture}?",
            ) from error

    def _proven(self, module: Any, loads: list[Any], unexpected: Sequence[str], files: Sequence[Path]) -> Weights:
        origin = self.files[0].name if self.files else self.name.partition(" (")[0]
        origin += f" ({self._place})" if self._place else ""
        tensors, hashes = module.state_dict().keys(), hash_files(files)
        if not loads:
            if not module.pretrained_cfg.get("custom_load"):
                raise CheckpointError(f"checkpoint {shown(self.asked.checkpoint_name)}: timm loaded nothing from it")
            origin += ", by timm's reader for its format, which does not say which"
            return Weights(origin, 0, len(tensors), files=hashes)
        absent = [key for result in loads for key in result.missing_keys if key in tensors]
        absent = [key for key in absent if not key.endswith("num_batches_tracked")]  # a counter, used in training only
        if absent:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {len(absent)} of {len(tensors)} tensors of"
                f" {self.name} are not in it, first {', '.join(absent[:3])}",
                f"do these weights belong to {self.architecture}?",
            )
        return Weights(origin, len(tensors), len(tensors), unexpected=tuple(unexpected), files=hashes)


def is_timm_name(name: str) -> bool:
    """Whether timm has such a model; whatever comes after the first dot is a tag."""
    return bool(timm.is_model(name.partition(".")[0]))


def _takes(model: nn.Module, option: str) -> bool:
    """Whether a constructor of the model has such a parameter."""
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    return any(option in inspect.signature(kind.__init__).parameters for kind in kinds)


def _has_class_token(model: Any) -> bool:
    """Whether token 0 is a class token: some models have only registers in front of their patches."""
    has_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    return has_prefix and getattr(model, "cls_token", None) is not None and getattr(model, "num_prefix_tokens", 0) > 0


def _size_override(size: tuple[int, int] | None) -> dict[str, Any]:
    return {} if size is None else {"input_size": (3, *size)}


def _patch(model: Any, strides: Sequence[int]) -> tuple[int, int] | None:
    """(height, width) of the patches that a model cuts its input into; what does not fill one is lost in some."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch or ())
    if len(sides) == 2 and sides[0] == strides[0]:  # else patches overlap, and borders are padded
        return int(sides[0]), int(sides[1])
    return (strides[0], strides[0]) if len(set(strides)) == 1 else None


def _files_of(model_name: str, pretrained_cfg: Mapping[str, Any]) -> list[Path]:
    """The files that timm has just read: those of its folder, or the hub's cache."""
    if model_name.startswith("local-dir:"):
        return weights_files(Path(model_name.removeprefix("local-dir:")))
    hub_id = str(pretrained_cfg.get("hf_hub_id") or "")
    with hub_or_cache(wanted=False):  # all of it has just been read
        return hub_weights(hub_id, pretrained_cfg.get("hf_hub_filename")) if hub_id else []


def _in_chans(model: Any) -> int:
    """Channels of the pixels, from the first layer: a folder's model_args may say anything."""
    first = model.pretrained_cfg.get("first_conv")
    path = first[0] if isinstance(first, list | tuple) else first
    try:
        weight = model.get_submodule(path).weight
    except (AttributeError, TypeError):
        return 3
    return int(weight.shape[1]) if weight.ndim == 4 else 3


def _unknown(name: str, option: str) -> UsageError:
    plain, _, tag = name.partition(".")
    if is_timm_name(plain):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(plain)]
        return UsageError(f"{option} {shown(name)}: no tag {shown(tag)}", f"the tags of {plain} are {', '.join(tags)}")
    near = nearest(plain, timm.list_models())
    what, else_ = "timm model, folder or file", "a timm model, a folder, a weights file or a hub id"
    if option == "--arch":
        what, else_ = "timm architecture", "featcli models lists them"
    return UsageError(
        f"{option} {shown(name)}: no such {what}", f"did you mean {' or '.join(near)}?" if near else else_
    )
