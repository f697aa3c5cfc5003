"""transformers checkpoints, from folders, hub ids and configurations: which source reads them.

Never through `AutoBackbone.from_pretrained`, which in transformers 5 asks the hub even about a local folder and fails
without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featcli.backbones.auto_backbone import AutoBackboneSource, is_mapped
from featcli.backbones.checkpoint import Request
from featcli.backbones.hidden_states import HiddenStatesSource
from featcli.backbones.source import Source
from featcli.backbones.timm_inside import TimmInside
from featcli.backbones.transformers_source import reading

import transformers  # isort: skip  (transformers_source has seen to what its import needs)


def open_transformers(request: Request) -> Source:
    """The source for a transformers folder, hub id or configuration. Raises CheckpointError and UsageError."""
    with reading(request):
        config = _config(request)
        inner = getattr(config, "backbone_config", None)
        tower = getattr(config, "vision_config", None)
        if "timm_backbone" in (config.model_type, getattr(inner, "model_type", None)):
            return TimmInside(request, inner or config, None if inner is None else config)
        if tower is not None and is_mapped(tower):
            return AutoBackboneSource(request, tower, config)
        if is_mapped(config):
            return AutoBackboneSource(request, config)
        if inner is not None and is_mapped(inner):
            return AutoBackboneSource(request, inner, config)
        return HiddenStatesSource(request, config)


def _config(request: Request) -> Any:
    if request.config is None:
        return transformers.AutoConfig.from_pretrained(request.checkpoint, trust_remote_code=False)
    if isinstance(request.config, Mapping):
        return transformers.AutoConfig.for_model(**request.config)
    return request.config
