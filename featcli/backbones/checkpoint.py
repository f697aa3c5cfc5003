"""Find what `--checkpoint` names (a timm model, local folder, weights file or hub id), and which ModelSpec reads it.

timm and transformers are imported only for their own checkpoints: each takes seconds, and transformers is an extra.
transformers' checkpoints are never read through `AutoBackbone.from_pretrained`, which in transformers 5 asks the hub
even for a local folder, and fails without a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcli.backbones.hub import ask_hub_again, hub_or_cache, unreachable
from featcli.backbones.input_size import refuse_unfit
from featcli.backbones.internals import AT_HUB, IN_FOLDER, read_config_of
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.preprocessing import refuse_processor_backend
from featcli.backbones.torchvision_operators import import_transformers
from featcli.backbones.weights import weights_files
from featcli.errors import CheckpointError, UsageError, shown
from featcli.spec.groups import CheckpointSpec
from featcli.system.files import is_file, is_folder, is_there, read_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # with a branch, a tag or a commit
ADAPTER = "adapter_config.json"  # transformers applies the adapter if PEFT is installed, and otherwise says nothing
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def resolve(asked: CheckpointSpec) -> ModelSpec:
    """Return the ModelSpec that can read this checkpoint. Reads configurations, never weights.

    Raises UsageError for names that do not exist and sizes that do not fit, CheckpointError for files that cannot be
    used, and MachineError.
    """
    ask_hub_again()
    model = _open(asked)
    if asked.input_size is not None:
        refuse_unfit(model, lambda size: _open(replace(asked, image_size=size)))
    return model


def _open(asked: CheckpointSpec) -> ModelSpec:
    if asked.config is not None:
        return _transformers(asked)
    path = Path(asked.checkpoint_name)
    if not is_there(path) and (path.suffix in WEIGHTS_SUFFIXES or asked.checkpoint_name.startswith((".", "/", "~"))):
        raise UsageError(
            f"checkpoint {shown(asked.checkpoint_name)}: there is no such folder or file", "is the path right?"
        )
    if asked.arch is not None and not is_file(path):
        raise UsageError("--arch is only for a weights file", "leave --arch out: this checkpoint says what it is")
    if asked.checkpoint_name.startswith((AT_HUB, IN_FOLDER)):
        return _named_for_timm(asked)
    if is_file(path):
        return _from_config(asked, path) if path.suffix == ".json" else _from_file(asked, path)
    if is_folder(path) and is_file(path / "config.json"):
        return _from_folder(asked, path)
    if is_folder(path) and not _is_timm_name(asked.checkpoint_name):
        raise CheckpointError(
            f"checkpoint {shown(path)}: this folder has no config.json",
            "give a folder that timm's or transformers' save_pretrained wrote; what featcli extract makes is a dump",
        )
    if HUB_ID.fullmatch(asked.checkpoint_name) and not is_there(path):
        return _from_hub(asked, asked.checkpoint_name)
    if "/" in asked.checkpoint_name and not is_there(path):
        raise UsageError(
            f"checkpoint {shown(asked.checkpoint_name)}: there is no such folder or file",
            "a checkpoint is a timm model, a folder, a weights file or a hub id such as owner/name",
        )
    return _timm(asked)


def _named_for_timm(asked: CheckpointSpec) -> ModelSpec:
    """Open a checkpoint whose name begins with timm's word for a place. At the hub it may be one of transformers."""
    name = asked.checkpoint_name.removeprefix(AT_HUB)
    is_id = name != asked.checkpoint_name and HUB_ID.fullmatch(name)
    return _from_hub(asked, name) if is_id else _timm(asked)


def _from_config(asked: CheckpointSpec, path: Path) -> ModelSpec:
    """Open a configuration without weights. It can be inspected, and give random weights."""
    if asked.arch is not None:
        raise UsageError("--arch is only for a weights file", "leave --arch out: this configuration says what it is")
    if _is_timm_config(read_config(path)):
        return _timm(replace(asked, checkpoint=str(path.parent)), local=True)
    return _transformers(asked)


def _from_file(asked: CheckpointSpec, path: Path) -> ModelSpec:
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {shown(path)}: this is not a weights file",
            f"give one whose name ends in {', '.join(WEIGHTS_SUFFIXES)}",
        )
    if asked.arch is not None and asked.is_random:
        raise UsageError(
            f"--random-init: the weights in {shown(path)} would not be read",
            f"leave one of them out: -c {asked.arch} --random-init",
        )
    if asked.arch is None:
        raise UsageError(
            f"checkpoint {shown(path)}: a weights file does not say its architecture",
            "name the timm architecture it belongs to, for example --arch resnet50",
        )
    return _timm(asked)


def _from_folder(asked: CheckpointSpec, path: Path) -> ModelSpec:
    if len(path.parts) == 1 and not asked.checkpoint_name.startswith(".") and _is_timm_name(asked.checkpoint_name):
        raise UsageError(
            f"checkpoint {shown(asked.checkpoint_name)}: there is a folder of this name here, and a timm model",
            f"write ./{asked.checkpoint_name} for the folder, or run elsewhere for the model",
        )
    if is_file(path / ADAPTER) and not asked.is_random:
        raise CheckpointError(
            f"checkpoint {shown(path)}: it holds {ADAPTER}: weights of PEFT that are not merged into the model",
            "merge them: model.merge_and_unload().save_pretrained(FOLDER); or delete that file, to do without them",
        )
    config = read_config(path / "config.json")
    if config.get("model_type") == "timm_wrapper" and "architecture" in config and "architectures" in config:
        return _timm_wrapper(asked, path, config)
    if _is_timm_config(config):
        return _timm(asked, local=True)
    return _transformers(asked)


def _from_hub(asked: CheckpointSpec, name: str) -> ModelSpec:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        with hub_or_cache():
            config = read_config(Path(hf_hub_download(repository, "config.json", revision=revision or None)))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises what its HTTP library and its validators raise
        raise unreachable(asked.checkpoint_name, error, name) from error
    if _is_timm_config(config):
        return _timm(asked, hub=name == asked.checkpoint_name)
    return _transformers(replace(asked, checkpoint=name))


def read_config(path: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json. Raises CheckpointError and MachineError."""
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint configuration {shown(path)}: {error}", "is the file complete?") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"checkpoint configuration {shown(path)}: it is not a JSON object", "is the file complete?"
        )
    return config


def _is_timm_config(config: dict[str, Any]) -> bool:
    """Return whether a config.json is timm's. transformers writes a configuration of its own around some of them."""
    return "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"


def _is_timm_name(name: str) -> bool:
    from featcli.backbones.timm_model import is_timm_name

    return is_timm_name(name)


def _timm(asked: CheckpointSpec, local: bool = False, hub: bool = False) -> ModelSpec:
    """Open a model that timm finds by its name, or a weights file for one of its architectures."""
    from featcli.backbones.timm_model import TimmModelSpec, TimmRequest

    refuse_processor_backend(asked)
    prefix = IN_FOLDER if local else AT_HUB if hub else ""
    request = TimmRequest(
        model_name=asked.arch or prefix + asked.checkpoint_name,
        is_architecture=asked.arch is not None,
        files=(Path(asked.checkpoint_name),) if asked.arch else (),
        input_size=asked.input_size,
        num_channels=asked.num_channels,
    )
    return TimmModelSpec(asked, request)


def _timm_wrapper(asked: CheckpointSpec, path: Path, config: dict[str, Any]) -> ModelSpec:
    """Open what transformers' TimmWrapper saves: a configuration in timm's words, and weights under `timm_model.`"""
    from featcli.backbones.timm_model import TimmModelSpec, TimmRequest

    refuse_processor_backend(asked)
    files = weights_files(path)
    if not (files or asked.is_random):
        raise CheckpointError(f"checkpoint {shown(path)}: there are no weights in it", "is the folder complete?")
    request = TimmRequest(
        model_name=config["architecture"],
        is_architecture=True,
        files=tuple(files),
        options=config.get("model_args") or {},
        pretrained_cfg=config.get("pretrained_cfg") or {},
        input_size=asked.input_size,
        num_channels=asked.num_channels,
    )
    return TimmModelSpec(asked, request)


def _transformers(asked: CheckpointSpec) -> ModelSpec:
    """Open a transformers folder, hub id or configuration: a mapped type, a larger model, or hidden states."""
    try:
        import_transformers()
    except ModuleNotFoundError:  # the user can install the extra, so this is no bug
        raise CheckpointError(
            f"checkpoint {shown(asked.checkpoint_name)}: it is a transformers checkpoint, and transformers"
            " is not installed",
            "pip install 'featcli[transformers]'",
        ) from None
    from featcli.backbones.auto_backbone import AutoBackboneModelSpec, is_mapped
    from featcli.backbones.composites import backbone_config_of
    from featcli.backbones.hidden_states import HiddenStatesModelSpec
    from featcli.backbones.timm_in_transformers import TimmInTransformersModelSpec
    from featcli.backbones.transformers_model import reading

    with reading(asked):
        config = _transformers_config(asked)
        inner = backbone_config_of(config)
        tower = getattr(config, "vision_config", None)
        if "timm_backbone" in (config.model_type, getattr(inner, "model_type", None)):
            return TimmInTransformersModelSpec(asked, inner or config, None if inner is None else config)
        if asked.config is not None and not asked.is_random:
            raise UsageError(
                f"{asked.checkpoint_name}: use_pretrained_backbone=True asks for weights, and a configuration of type"
                f" {shown(config.model_type)} does not say which",
                "give the checkpoint that has them, its folder or hub id, or leave use_pretrained_backbone out",
            )
        if tower is not None and is_mapped(tower):
            return AutoBackboneModelSpec(asked, tower, config)
        if is_mapped(config):
            return AutoBackboneModelSpec(asked, config)
        if inner is not None and is_mapped(inner):
            return AutoBackboneModelSpec(asked, inner, config)
        return HiddenStatesModelSpec(asked, config)


def _transformers_config(asked: CheckpointSpec) -> Any:
    if asked.config is None:
        return read_config_of(asked.checkpoint_name)
    if isinstance(asked.config, Mapping):
        return import_transformers().AutoConfig.for_model(**asked.config)
    return asked.config
