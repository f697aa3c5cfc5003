"""What `--checkpoint` names: a timm model, a local folder, a weights file or a hub id; and who reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcli.backbones.input_size import Size, parse_size, refuse_unfit
from featcli.errors import CheckpointError, UsageError, one_line, one_of, shown
from featcli.pixels.resize import FITS, NATIVE

if TYPE_CHECKING:
    from featcli.backbones.model_spec import ModelSpec

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What the hub's client means by its exceptions, by their names: it need not be imported to say so.
UNREACHABLE = {
    "LocalEntryNotFoundError": "it is not in the cache, and the hub does not answer or HF_HUB_OFFLINE is set",
    "OfflineModeIsEnabled": "it is not in the cache, and HF_HUB_OFFLINE is set or the hub does not answer",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "GatedRepoError": "its owner gives access on request only",
    "EntryNotFoundError": "the repository has no config.json",
}
NORMS = ("raw", "model")  # maps before, or after, the final norm of the model
MOST_CHANNELS = 1024
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class Request:
    """What was asked of a checkpoint.

    In Python the checkpoint may be a path, or a transformers configuration (an object, or its dictionary), which has
    no weights: it stands for `random_init`, as in `AutoBackbone.from_config`.
    """

    checkpoint: Any
    arch: str | None = None  # a timm architecture, for a bare weights file
    random_init: bool = False
    seed: int = 0
    image_size: Size | None = None  # (H, W); None is the checkpoint's own
    num_channels: int | None = None  # of the pixels; None is the checkpoint's own
    norm: str | None = None  # "raw" or "model"; None is the library's own
    fit: str | None = None  # one of fitting.FITS; None is the checkpoint's own
    config: Any = None  # a transformers configuration, in place of a checkpoint
    largest: Size | None = None  # (H, W) that native inputs are shrunk into

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, os.PathLike):
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        if not isinstance(self.checkpoint, str):
            self._take_configuration(self.checkpoint)
        if self.norm is not None:
            one_of("--norm", self.norm, NORMS)
        if self.fit is not None:
            one_of("--fit", self.fit, FITS)
        if self.num_channels is not None and not 1 <= self.num_channels <= MOST_CHANNELS:
            raise UsageError(f"--num-channels {self.num_channels}: must be from 1 to {MOST_CHANNELS}", "1 is grey")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be from 0 to 2**63 - 1", "leave it out for the default")

    def _take_configuration(self, found: Any) -> None:
        if not ("model_type" in found if isinstance(found, Mapping) else hasattr(found, "model_type")):
            raise UsageError(
                f"checkpoint {shown(found)}: neither a name, a path nor a configuration of transformers",
                "a configuration is an object, or its dictionary with a model_type",
            )
        for name, value in (("config", found), ("random_init", True), ("checkpoint", type(found).__name__)):
            object.__setattr__(self, name, value)


def sizes_asked(image_size: Any, fit: str | None) -> dict[str, Any]:
    """What --image-size means: the input's size; where pictures keep theirs, the most it may be. Raises UsageError."""
    size = parse_size(image_size)
    return {"largest": size} if fit == NATIVE else {"image_size": size}


def resolve(request: Request) -> ModelSpec:
    """The source that can read this checkpoint. Reads configurations, never weights.

    Raises UsageError for names that do not exist and sizes that do not fit, CheckpointError for files that cannot
    be used.
    """
    source = _open(request)
    if request.image_size is not None:
        refuse_unfit(source, lambda size: _open(replace(request, image_size=size)))
    return source


def _open(request: Request) -> ModelSpec:
    if request.config is not None:
        return _transformers(request)
    path = Path(request.checkpoint)
    if not path.exists() and (path.suffix in WEIGHTS_SUFFIXES or request.checkpoint.startswith((".", "/", "~"))):
        raise UsageError(f"checkpoint {shown(request.checkpoint)}: no such folder or file", "is the path right?")
    if request.arch is not None and not path.is_file():
        raise UsageError("--arch goes with a weights file", "leave --arch out: this checkpoint says what it is")
    if request.checkpoint.startswith(("hf-hub:", "local-dir:")):
        return _timm(request)
    if path.is_file():
        return _from_config(request, path) if path.suffix == ".json" else _from_file(request, path)
    if path.is_dir() and (path / "config.json").is_file():
        return _from_folder(request, path)
    if path.is_dir() and not _is_timm_name(request.checkpoint):
        raise CheckpointError(
            f"checkpoint {shown(path)}: a folder without config.json",
            "a checkpoint folder is what timm's or transformers' save_pretrained writes, a dump what extract makes",
        )
    if HUB_ID.fullmatch(request.checkpoint) and not path.exists():
        return _from_hub(request)
    if "/" in request.checkpoint and not path.exists():
        raise UsageError(
            f"checkpoint {shown(request.checkpoint)}: no such folder or file",
            "a checkpoint is a timm model, a folder, a weights file or a hub id such as owner/name",
        )
    return _timm(request)


def _from_config(request: Request, path: Path) -> ModelSpec:
    """A configuration by itself: it can be inspected, and give random weights."""
    if request.arch is not None:
        raise UsageError("--arch goes with a weights file", "leave --arch out: this configuration says what it is")
    if _is_timm_config(read_config(path)):
        return _timm(replace(request, checkpoint=str(path.parent)), local=True)
    return _transformers(request)


def _from_file(request: Request, path: Path) -> ModelSpec:
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise CheckpointError(
            f"checkpoint {shown(path)}: not a weights file", f"weights files end in {', '.join(WEIGHTS_SUFFIXES)}"
        )
    if request.arch is None:
        raise UsageError(
            f"checkpoint {shown(path)}: a weights file does not say its architecture",
            "name the timm architecture it belongs to, for example --arch resnet50",
        )
    return _timm(request)


def _from_folder(request: Request, path: Path) -> ModelSpec:
    if len(path.parts) == 1 and not request.checkpoint.startswith(".") and _is_timm_name(request.checkpoint):
        raise UsageError(
            f"checkpoint {shown(request.checkpoint)}: both a folder here and a timm model",
            f"write ./{request.checkpoint} for the folder, or run elsewhere for the model",
        )
    config = read_config(path / "config.json")
    if config.get("model_type") == "timm_wrapper" and "architecture" in config and "architectures" in config:
        return _timm_wrapper(request, path, config)
    if _is_timm_config(config):
        return _timm(request, local=True)
    return _transformers(request)


def _from_hub(request: Request) -> ModelSpec:
    from huggingface_hub import hf_hub_download

    try:
        from featcli.backbones.hub import hub_or_cache

        with hub_or_cache():
            config = read_config(Path(hf_hub_download(request.checkpoint, "config.json")))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises what its HTTP library and its validators raise
        raise unreachable(request.checkpoint, error) from error
    if _is_timm_config(config):
        return _timm(request, hub=True)
    return _transformers(request)


def read_config(path: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises CheckpointError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint configuration {shown(path)}: {error}", "is the file whole?") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"checkpoint configuration {shown(path)}: not a JSON object", "is the file whole?")
    return config


def unreachable(checkpoint: str, error: Exception, or_else: str = "") -> CheckpointError:
    """A checkpoint that is neither here, nor cached, nor within reach; `or_else` ends the hint."""
    cause = UNREACHABLE.get(type(error).__name__, f"{type(error).__name__}: {one_line(error)}")
    return CheckpointError(
        f"checkpoint {shown(checkpoint)}: not on this machine, and not to be had from the hub: {cause}",
        f"check the name, or fetch it where there is a network and give its folder{or_else}",
    )


def _is_timm_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of timm's; transformers writes its own around some of them."""
    return "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"


def _is_timm_name(name: str) -> bool:
    from featcli.backbones.from_timm import is_timm_name

    return is_timm_name(name)


def _timm(request: Request, local: bool = False, hub: bool = False) -> ModelSpec:
    from featcli.backbones.from_timm import TimmModelSpec

    prefix = "local-dir:" if local else "hf-hub:" if hub else ""
    return TimmModelSpec(request, prefix + request.checkpoint)


def _timm_wrapper(request: Request, path: Path, config: dict[str, Any]) -> ModelSpec:
    """What transformers' TimmWrapper saves: timm's configuration in its own words, and weights under `timm_model.`"""
    from featcli.backbones.from_timm import TimmModelSpec
    from featcli.backbones.weights import weights_files

    files = weights_files(path)
    if not (files or request.random_init):
        raise CheckpointError(f"checkpoint {shown(path)}: no weights in it", "is the folder whole?")
    source = TimmModelSpec(
        replace(request, arch=config["architecture"]),
        "",
        config.get("model_args") or {},
        config.get("pretrained_cfg") or {},
    )
    source.files = files
    return source


def _transformers(request: Request) -> ModelSpec:
    try:
        import transformers  # noqa: F401  (an extra: its absence is the user's to mend, not a bug)
    except ModuleNotFoundError:
        raise CheckpointError(
            f"checkpoint {shown(request.checkpoint)}: a transformers checkpoint, and transformers is not installed",
            "pip install 'featcli[transformers]'",
        ) from None
    from featcli.backbones.from_transformers import open_transformers

    return open_transformers(request)
