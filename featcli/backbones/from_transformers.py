"""transformers backbones: every model type of the AutoBackbone mapping, from folders and hub ids.

Not through `AutoBackbone.from_pretrained`, which in transformers 5 asks the hub even about a local folder
and fails without a network. The class comes from the same mapping, `PreTrainedModel.from_pretrained`
loads it, and the stage list is cut after the deepest stage asked for: transformers itself runs all of
them whatever is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before transformers, which imports torchvision

import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING  # noqa: E402

from featcli.backbones.backbone import Network, Preprocessing, Source, Weights  # noqa: E402
from featcli.backbones.checkpoint import Request, unreachable  # noqa: E402
from featcli.backbones.from_timm import TimmSource  # noqa: E402
from featcli.backbones.hub import hub_or_cache  # noqa: E402
from featcli.backbones.image_processor import (  # noqa: E402
    output_sizes,
    plain_json,
    preprocessing_of,
    quiet,
    read_processor,
)
from featcli.errors import CheckpointError, FeatcliError, one_line, shown  # noqa: E402

# Types that normalise each requested map do so with norms of their own, which only a checkpoint saved as a
# backbone has. Any other absent weight is a refusal.
UNTRAINED_NORM = re.compile(r"hidden_states_norms\.")
# pixio has a norm for all its maps that a plain checkpoint lacks too.
UNTRAINED_NORMS = {"pixio": re.compile(r"layernorm\.")}
# A final norm that the types below apply to whatever stage is last: after a cut it would meet the wrong width.
FINAL_NORM = {"swin": "swin.layernorm", "maskformer-swin": "model.layernorm", "focalnet": "focalnet.layernorm"}
FINAL_NORM["bit"] = "bit.norm"
DEFAULT_SIZE = 224
# Where a backbone lies inside a larger model, as its weights are named on disk, the longest names first.
# transformers renames some while loading, so the attribute path of the model in memory may be another.
INSIDE = (
    "model.pixel_level_module.encoder.",  # MaskFormer, Mask2Former, OneFormer
    "pixel_level_module.encoder.",
    "model.backbone.conv_encoder.model.",  # the DETR family, GroundingDINO
    "backbone.conv_encoder.model.",
    "model.backbone.model.",  # RT-DETR, D-FINE
    "model.backbone.",
    "backbone.",  # UperNet, DepthAnything, DPT, ZoeDepth, VitPose, VitMatte
)
# Types that name a stem in their configuration and refuse to give it.
NO_STEM = ("maskformer-swin",)
# Fields of a configuration that do not change what the backbone computes.
NOT_ARCHITECTURE = frozenset(
    "_name_or_path transformers_version architectures out_features out_indices dtype torch_dtype id2label"
    " label2id".split()
)


def open_transformers(request: Request) -> Source:
    """The source for a transformers folder or hub id. Raises CheckpointError."""
    with reading(request):
        config = transformers.AutoConfig.from_pretrained(request.checkpoint, trust_remote_code=False)
        inner = getattr(config, "backbone_config", None)
        if "timm_backbone" in (config.model_type, getattr(inner, "model_type", None)):
            return TimmInside(request, inner or config, composite=config.model_type if inner else "")
        if type(config) in MODEL_FOR_BACKBONE_MAPPING:
            inner = None
        return TransformersSource(request, config, inner)


@contextmanager
def reading(request: Request) -> Iterator[None]:
    """Whatever transformers raises in here is about the checkpoint."""
    try:
        with quiet(), hub_or_cache(wanted=not Path(request.checkpoint).is_dir()):
            yield
    except FeatcliError:
        raise
    except Exception as error:  # files, hub, HTTP, unpickling, unknown types: there is no common type
        if not Path(request.checkpoint).is_dir():
            raise unreachable(request.checkpoint, error) from error
        raise CheckpointError(
            f"checkpoint {shown(request.checkpoint)}: {one_line(error)}", "is the folder whole?"
        ) from error


def name_of(request: Request) -> str:
    """A folder by its name alone, a hub id as it is."""
    path = Path(request.checkpoint)
    return path.resolve().name if path.is_dir() else request.checkpoint


def own_size(request: Request, processor: Any) -> tuple[int, int] | None:
    """The (H, W) that a processor gives every picture, None without a processor. Raises CheckpointError."""
    sizes = output_sizes(processor) if processor is not None else {None}
    if len(sizes) > 1:
        raise CheckpointError(
            f"checkpoint {shown(request.checkpoint)}: its image processor gives every picture another size",
            "give one size for all with --image-size",
        )
    return sizes.pop()


def config_size(config: Any) -> tuple[int, int]:
    """The (H, W) that a configuration names, for checkpoints that say nothing of their preprocessing."""
    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class TimmInside(TimmSource):
    """A timm model whose weights lie in a transformers checkpoint: `timm_backbone`, alone or in a larger model."""

    def __init__(self, request: Request, config: Any, composite: str) -> None:
        names = ("model.safetensors", "pytorch_model.bin")
        files = [path for name in names if (path := Path(request.checkpoint) / name).is_file()]
        if not (files or request.random_init):
            raise CheckpointError(
                f"checkpoint {shown(request.checkpoint)}: none of {', '.join(names)} in it",
                "a timm backbone inside a transformers checkpoint is read from a folder with one weights file",
            )
        self._processor = read_processor(request.checkpoint, request.image_size)
        size = request.image_size or own_size(request, self._processor)
        super().__init__(replace(request, arch=config.backbone, image_size=size), str(files[0]) if files else "")
        self.default_indices = tuple(index % len(self.stage_names) for index in config.out_indices)
        inside = f"the {self.architecture} in a {composite}" if composite else self.architecture
        self.name = f"{name_of(request)} ({inside})"

    def preprocessing(self) -> Preprocessing:
        """See Source; the checkpoint's own where it has one, which is not timm's."""
        return preprocessing_of(self._processor, self.input_size) if self._processor else super().preprocessing()


class TransformersSource(Source):
    """A transformers checkpoint whose model type is in the AutoBackbone mapping, before its weights are read."""

    library = "transformers"

    def __init__(self, request: Request, config: Any, inner: Any = None) -> None:
        """`config` is the checkpoint's; `inner` that of the backbone inside it, where it is a larger model."""
        self.request = request
        self.name = name_of(request)
        self.composite = "" if inner is None else config.model_type
        self.config = config if inner is None else inner
        self.model_type = self.config.model_type
        if type(self.config) not in MODEL_FOR_BACKBONE_MAPPING:
            raise CheckpointError(
                f"checkpoint {shown(request.checkpoint)}: model type {shown(self.model_type)} has no backbone in"
                " transformers (AutoBackbone)",
                "use a model type with a backbone (swin, resnet, convnext, dinov2, ...), or a timm model",
            )
        self._backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(self.config)]
        self.processor = read_processor(request.checkpoint, request.image_size)
        self.input_size = request.image_size or own_size(request, self.processor) or config_size(self.config)
        self.first_index = int(self.model_type in NO_STEM)
        names = list(getattr(self.config, "stage_names", None) or [])
        if not names:
            raise CheckpointError(
                f"checkpoint {shown(request.checkpoint)}: model type {shown(self.model_type)} names no stages",
                "choose a checkpoint of its vision model alone",
            )
        self.stage_names = tuple(zip(names, self._module_names(names), strict=True))[self.first_index :]
        if self.composite:
            self.name += f" (the {self.model_type} in a {self.composite})"
            self.default_indices = tuple(index % len(names) for index in self.config.out_indices)

    def build(self, positions: Sequence[int], device: str) -> Network:
        """See Source."""
        with torch.device(device), quiet():
            return self._cut(self._blank(positions), positions)

    def load(self, positions: Sequence[int]) -> tuple[Network, Weights]:
        """See Source. Only norms that plain checkpoints do not have may be absent; they are named."""
        if self.request.random_init:
            torch.manual_seed(self.request.seed)
            origin = f"random weights, seed {self.request.seed}"
            return self.build(positions, "cpu"), Weights(origin, random=True)
        # TimmBackbone overrides from_pretrained with one that cannot read a folder; this is the plain one.
        from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__
        renamed = {f"^(?:{'|'.join(map(re.escape, INSIDE))})": ""} if self.composite else None
        with reading(self.request):
            module, report = from_pretrained(
                self._backbone_class,
                self.request.checkpoint,
                config=self._config_for(positions),
                key_mapping=renamed,
                dtype=torch.float32,
                output_loading_info=True,
            )
        absent = sorted(k for k in report["missing_keys"] if not k.endswith("num_batches_tracked"))
        network = self._cut(module, positions)
        return network, self._proven(network.module, absent, sorted(map(str, report["mismatched_keys"])))

    def preprocessing(self) -> Preprocessing:
        """See Source; the image processor's own."""
        if self.processor is None:
            raise CheckpointError(
                f"checkpoint {shown(self.request.checkpoint)}: no preprocessor_config.json beside its config.json,"
                " so nobody can tell which pixels it was trained on",
                "save the processor it belongs to there: AutoImageProcessor.from_pretrained(...).save_pretrained(...)",
            )
        with reading(self.request):
            return preprocessing_of(self.processor, self.input_size)

    def settings(self) -> dict[str, Any]:
        """See Source."""
        config = {k: v for k, v in plain_json(self.config.to_dict()).items() if k not in NOT_ARCHITECTURE}
        return {"library": "transformers", "input_size": list(self.input_size), "config": config}

    def _blank(self, positions: Sequence[int]) -> Any:
        """The backbone without weights, on whatever device is the default."""
        try:
            return self._backbone_class(self._config_for(positions))
        except ImportError as error:  # dinat needs natten
            raise CheckpointError(
                f"checkpoint {shown(self.request.checkpoint)}: model type {shown(self.model_type)} needs a library that"
                f" is not installed ({one_line(error)})",
                "install it, or choose another backbone",
            ) from error

    def _config_for(self, positions: Sequence[int]) -> Any:
        config = type(self.config).from_dict(plain_json(self.config.to_dict()))
        config.out_indices = [position + self.first_index for position in positions]
        return config

    def _cut(self, module: nn.Module, positions: Sequence[int]) -> Network:
        deepest, names = max(positions) + self.first_index, self.config.stage_names
        if deepest < len(names) - 1:
            _drop_stages_after(module, deepest, names, self.model_type)

        def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
            height, width = pixels.shape[2:]
            return [self._as_grid(found, height, width) for found in module(pixels).feature_maps]

        return Network(module, maps, self._class_tokens(module, positions))

    def _as_grid(self, found: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, tokens, C) as (B, C, h, w) for the types that leave their patches in a row; maps as they are."""
        if found.ndim != 3:
            return found
        patch = self.config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        grid = height // rows, width // columns
        tokens = found[:, found.shape[1] - grid[0] * grid[1] :]  # whatever is in front of the patches is no patch
        return tokens.transpose(1, 2).reshape(len(found), -1, *grid)

    def _class_tokens(self, module: nn.Module, positions: Sequence[int]) -> Any:
        """Token 0 of the selected stages' hidden states, normalised as the maps are, where it is a class token."""
        is_token_model = hasattr(self.config, "reshape_hidden_states")
        has_class_token = any(name.endswith("cls_token") for name, _ in module.named_parameters())
        norm = getattr(module, "layernorm", getattr(module, "norm", None))
        if not (is_token_model and has_class_token and isinstance(norm, nn.Module)):
            return None
        wants_norm = getattr(self.config, "apply_layernorm", True)

        def class_tokens(pixels: torch.Tensor) -> list[torch.Tensor]:
            hidden = module(pixels, output_hidden_states=True).hidden_states
            return [norm(hidden[i])[:, 0] if wants_norm else hidden[i][:, 0] for i in positions]

        return class_tokens

    def _module_names(self, names: list[str]) -> list[str]:
        with torch.device("meta"), quiet():
            module = self._blank([len(names) - 1 - self.first_index])
        path, _ = _stage_list(module, names)
        has_stem = names[0] == "stem"
        stem = [next(name for name, _ in module.named_children())] if has_stem else []
        return stem + [f"{path}.{i}" for i in range(len(names) - has_stem)]

    def _proven(self, module: nn.Module, absent: list[str], mismatched: list[str]) -> Weights:
        tensors = module.state_dict().keys()
        may_be_absent = UNTRAINED_NORMS.get(self.model_type, UNTRAINED_NORM)
        untrained = tuple(key for key in absent if may_be_absent.match(key) and key in tensors)
        lost = [key for key in absent if key in tensors and key not in untrained] + mismatched
        if lost:
            raise CheckpointError(
                f"checkpoint {shown(self.request.checkpoint)}: {len(lost)} of {len(tensors)} tensors of its"
                f" {self.model_type} backbone are not in it, first {', '.join(lost[:3])}",
                "is the folder whole, and are these the weights its config.json describes?",
            )
        return Weights(self.name, len(tensors) - len(untrained), len(tensors), untrained)


def _stage_list(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """The module list with one entry per stage (the stem is not in it) that lies nearest to the root."""
    count = len(names) - (names[0] == "stem")
    lists = [
        (name, found)
        for name, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and "norms" not in name and len(found) == count
    ]
    if not lists:
        raise CheckpointError(
            f"{type(module).__name__}: {count} stages are named, but no list of {count} stages is in the model",
            "is config.json whole? stage_names must fit the number of layers",
        )
    return min(lists, key=lambda pair: pair[0].count("."))


def _drop_stages_after(module: nn.Module, deepest: int, names: Sequence[str], model_type: str) -> None:
    """Cut the stage list behind the stage at position `deepest`. The maps that stay keep every bit."""
    _, stage_list = _stage_list(module, names)
    keep = deepest + (names[0] != "stem")
    del stage_list[max(1, keep) :]  # with no stage at all some types yield no maps, without an error
    if path := FINAL_NORM.get(model_type):
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
