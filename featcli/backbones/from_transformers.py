"""transformers checkpoints, from folders, hub ids and configurations: which source reads them.

Never through `AutoBackbone.from_pretrained`, which in transformers 5 asks the hub even about a local folder and fails
without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcli.backbones.auto_backbone import AutoBackboneModelSpec, is_mapped
from featcli.backbones.hidden_states import HiddenStatesModelSpec
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.timm_in_transformers import TimmInTransformersModelSpec
from featcli.backbones.transformers_model import reading
from featcli.spec.groups import CheckpointSpec

import transformers  # isort: skip  (transformers_model has seen to what its import needs)


def open_transformers(asked: CheckpointSpec) -> ModelSpec:
    """The source for a transformers folder, hub id or configuration. Raises CheckpointError and UsageError."""
    with reading(asked):
        config = _config(asked)
        inner = getattr(config, "backbone_config", None)
        tower = getattr(config, "vision_config", None)
        if "timm_backbone" in (config.model_type, getattr(inner, "model_type", None)):
            return TimmInTransformersModelSpec(asked, inner or config, None if inner is None else config)
        if tower is not None and is_mapped(tower):
            return AutoBackboneModelSpec(asked, tower, config)
        if is_mapped(config):
            return AutoBackboneModelSpec(asked, config)
        if inner is not None and is_mapped(inner):
            return AutoBackboneModelSpec(asked, inner, config)
        return HiddenStatesModelSpec(asked, config)


def _config(asked: CheckpointSpec) -> Any:
    if asked.config is None:
        return transformers.AutoConfig.from_pretrained(asked.checkpoint_name, trust_remote_code=False)
    if isinstance(asked.config, Mapping):
        return transformers.AutoConfig.for_model(**asked.config)
    return asked.config
