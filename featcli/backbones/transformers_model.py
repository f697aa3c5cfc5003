"""What all transformers checkpoints have in common: a configuration, an image processor, weights that are proven."""

from __future__ import annotations

import importlib
import pickle
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before transformers, which imports torchvision

import transformers  # noqa: E402

from featcli.backbones.backbone import Network, Preprocessing, Weights  # noqa: E402
from featcli.backbones.checkpoint import unreachable  # noqa: E402
from featcli.backbones.hub import hub_or_cache, hub_weights  # noqa: E402
from featcli.backbones.image_processor import (  # noqa: E402
    default_processor,
    output_sizes,
    plain_json,
    preprocessing_of,
    quiet,
    read_processor,
)
from featcli.backbones.model_spec import ModelSpec  # noqa: E402
from featcli.backbones.replay import place_of_backbone  # noqa: E402
from featcli.backbones.weights import hash_files, refuse_pretenders, weights_files  # noqa: E402
from featcli.errors import CheckpointError, FeatcliError, UsageError, one_line, shown  # noqa: E402
from featcli.spec.groups import CheckpointSpec  # noqa: E402

DEFAULT_SIZE = 224
# Fields of a configuration that do not change what the backbone computes.
NOT_ARCHITECTURE = frozenset(
    "_name_or_path transformers_version architectures out_features out_indices dtype torch_dtype id2label"
    " label2id".split()
)


class TransformersModelSpec(ModelSpec):
    """A transformers checkpoint before its weights are read. A subclass says which class, and how it yields maps."""

    library = "transformers"

    def __init__(self, asked: CheckpointSpec, config: Any, outer: Any = None) -> None:
        """`config` is the vision model's own; `outer` that of the larger model around it, where there is one."""
        self.asked = asked
        self.name = name_of(asked)
        self.config = copied(config)
        self.outer = outer
        self.model_type = config.model_type
        if asked.num_channels is not None:
            self.config.num_channels = asked.num_channels
        self.channels = getattr(self.config, "num_channels", 3)
        self.processor = processor_of(asked)
        self._has_processor = self.processor is not None
        self.input_size = asked.input_size or own_size(asked, self.processor) or config_size(self.config)
        if self.processor is None and asked.is_random:  # nothing was trained on other pixels
            self.processor = default_processor(self.model_type, self.input_size)
        if outer is not None:
            self.name += f" (the {self.model_type} in a {outer.model_type})"
            self.inside = inside(outer)
        self.freeze = freezer(outer)

    @abstractmethod
    def _blank(self, positions: Sequence[int]) -> Any:
        """The whole model without weights, on whatever device is the default."""

    @abstractmethod
    def _network(self, module: Any, positions: Sequence[int]) -> Network:
        """The model cut after the deepest of these stages."""

    @abstractmethod
    def _read(self, positions: Sequence[int]) -> tuple[Any, Mapping[str, Any]]:
        """The whole model with the checkpoint's weights, and transformers' report of what it loaded."""

    def _may_be_absent(self, key: str) -> bool:
        """Whether plain checkpoints lack this tensor; it is named then, and every other absence is a refusal."""
        return False

    def build(self, positions: Sequence[int], device: str) -> Network:
        """See Source."""
        with torch.device(device), quiet():
            return self._network(self._blank(positions), positions)

    def load(self, positions: Sequence[int]) -> tuple[Network, Weights]:
        """See Source. Only norms that plain checkpoints do not have may be absent; they are named."""
        if self.asked.is_random:
            torch.manual_seed(self.asked.seed)
            origin = f"random weights, seed {self.asked.seed}"
            return self.build(positions, "cpu"), Weights(origin, random=True)
        if Path(self.asked.checkpoint_name).is_file():
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: a configuration without weights",
                "give the folder that holds its weights too, or --random-init",
            )
        if Path(self.asked.checkpoint_name).is_dir():
            refuse_pretenders(files_of(self.asked))
        module, report = self._read(positions)
        network = self._network(module, positions)
        return network, self._proven(network, report)

    def from_pretrained(self, kind: Any, config: Any, renamed: dict[str, str] | None) -> tuple[Any, Mapping[str, Any]]:
        """transformers' own loader for any class, with its report. Raises CheckpointError."""
        # Some classes override from_pretrained with one that cannot read a folder; this is the plain one.
        plain = transformers.PreTrainedModel.from_pretrained.__func__
        with reading(self.asked):
            module, report = plain(
                kind,
                self.asked.checkpoint_name,
                config=config,
                key_mapping=renamed,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, with both shapes
            )
        return module.eval(), report

    def preprocessing(self) -> Preprocessing:
        """See Source; the image processor's own."""
        if self.processor is None:
            raise no_processor(self.asked)
        if self.channels not in (1, 3):
            raise UsageError(
                f"{self.name}: takes {self.channels} channels, a picture has 1 or 3",
                "such a backbone can only be inspected",
            )
        with reading(self.asked):
            found = preprocessing_of(self.processor, self.input_size, self.channels, self.resize_mode)
        return found if self._has_processor else replace(found, origin="default of its type: it has none")

    def settings(self) -> dict[str, Any]:
        """See Source."""
        config = {k: v for k, v in plain_json(self.config.to_dict()).items() if k not in NOT_ARCHITECTURE}
        return {
            "library": "transformers",
            "input_size": list(self.input_size),
            "norm": self.norm,
            "config": config,
        }

    def _proven(self, network: Network, report: Mapping[str, Any]) -> Weights:
        tensors = network.tensors().keys()
        absent = sorted(k for k in report["missing_keys"] if k in tensors and not k.endswith("num_batches_tracked"))
        missing = tuple(key for key in absent if self._may_be_absent(key))
        lost = [key for key in absent if key not in missing]
        misfits = sorted(misfit for misfit in report["mismatched_keys"] if misfit[0] in tensors)
        if misfits:
            key, there, here = misfits[0]
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {len(misfits)} of {len(tensors)} tensors of its"
                f" {self.model_type} backbone have another shape, first {key}: {tuple(there)}, not {tuple(here)}",
                "does config.json belong to these weights? Trained weights are for the channels that they name"
                if self.asked.num_channels is None
                else "these weights are for another number of channels: leave --num-channels out",
            )
        if lost:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {len(lost)} of {len(tensors)} tensors of its"
                f" {self.model_type} backbone are not in it, first {', '.join(lost[:3])}",
                "is the folder whole, and are these the weights its config.json describes?",
            )
        with hub_or_cache(wanted=False):  # all of it has just been read
            files = files_of(self.asked)
        unexpected = tuple(sorted(report["unexpected_keys"]))
        return Weights(
            name_of(self.asked), len(tensors) - len(missing), len(tensors), missing, unexpected, hash_files(files)
        )


@contextmanager
def reading(asked: CheckpointSpec) -> Iterator[None]:
    """Whatever transformers raises in here is about the checkpoint."""
    is_here = asked.config is not None or Path(asked.checkpoint_name).exists()
    try:
        with quiet(), hub_or_cache(wanted=not is_here):
            yield
    except FeatcliError:
        raise
    except Exception as error:  # files, hub, HTTP, unpickling, unknown types: there is no common type
        if not is_here:
            raise unreachable(asked.checkpoint_name, error) from error
        raise CheckpointError(f"checkpoint {shown(asked.checkpoint_name)}: {cause(error)}", hint_of(error)) from error


def cause(error: Exception) -> str:
    """A library's reason for refusing a checkpoint, without advice that nobody should follow."""
    text = str(error)
    if "weights_only" in text or isinstance(error, pickle.UnpicklingError):
        return "a weights file holds something other than tensors, which could run code when read"
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs code of its own, and featcli runs none"
    return one_line(error)


def hint_of(error: Exception) -> str:
    """What to do about `cause`."""
    if "other than tensors" in cause(error):
        return "convert it to .safetensors on a machine where you trust it"
    return "use another checkpoint" if "of its own" in cause(error) else "is the folder whole?"


def name_of(asked: CheckpointSpec) -> str:
    """A folder or file by its name alone, a hub id as it is."""
    path = Path(asked.checkpoint_name)
    return path.resolve().name if path.exists() else asked.checkpoint_name


def files_of(asked: CheckpointSpec) -> list[Path]:
    """The weights files of a folder or a hub id. Call it inside `hub_or_cache`. Raises CheckpointError."""
    path = Path(asked.checkpoint_name)
    return weights_files(path) if path.exists() else hub_weights(asked.checkpoint_name)


def processor_of(asked: CheckpointSpec) -> Any:
    """The image processor of a folder or hub id; None where it has none, and for configurations by themselves."""
    if asked.config is not None or Path(asked.checkpoint_name).is_file():
        return None
    return read_processor(asked.checkpoint_name, None if asked.fit else asked.input_size)  # --fit sizes by itself


def no_processor(asked: CheckpointSpec) -> CheckpointError:
    """A checkpoint without an image processor."""
    return CheckpointError(
        f"checkpoint {shown(asked.checkpoint_name)}: no preprocessor_config.json beside its config.json,"
        " so nobody can tell which pixels it was trained on",
        "save the processor it belongs to there: AutoImageProcessor.from_pretrained(...).save_pretrained(...)",
    )


def own_size(asked: CheckpointSpec, processor: Any) -> tuple[int, int] | None:
    """The (H, W) that a processor gives every picture, None without a processor. Raises CheckpointError."""
    sizes = output_sizes(processor) if processor is not None else {None}
    if len(sizes) > 1:
        raise CheckpointError(
            f"checkpoint {shown(asked.checkpoint_name)}: its image processor gives every picture another size",
            "give one size for all with --image-size",
        )
    return sizes.pop()


def config_size(config: Any) -> tuple[int, int]:
    """The (H, W) that a configuration names, for checkpoints that say nothing of their preprocessing."""
    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def inside(outer: Any) -> str:
    """Where the backbone sits in a larger model: built without weights to see. Empty where that cannot be told."""
    for name in outer.architectures or ():
        try:
            with torch.device("meta"), quiet():
                place = place_of_backbone(getattr(transformers, name)(outer))
        except Exception:  # a class that needs more libraries, or is not this transformers': the name is a courtesy
            continue
        if place:
            return f"{place} of {name}"
    return ""


def freezer(outer: Any) -> Callable[[nn.Module], None]:
    """What a larger model does to the norms of its backbone: DETR and its kin put frozen ones of their own in place.

    They compute the same up to the last bits; replay promises all of them.
    """
    if outer is None or not getattr(outer, "freeze_backbone_batch_norms", True):
        return lambda _: None
    modeling = importlib.import_module(type(outer).__module__.replace(".configuration_", ".modeling_"))
    replace = getattr(modeling, "replace_batch_norm", None)
    if replace is None:
        return lambda _: None

    def freeze(backbone: nn.Module) -> None:
        with torch.no_grad():
            replace(backbone)

    return freeze


def copied(config: Any) -> Any:
    """A configuration as it comes from a file: with its defaults as lists, which some backbones need."""
    return type(config).from_dict(plain_json(config.to_dict()))
