"""A timm model whose weights lie in a transformers checkpoint: `timm_backbone`, alone or in a larger model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcli.backbones.backbone import Network, Preprocessing, Weights
from featcli.backbones.image_processor import preprocessing_of
from featcli.backbones.timm_model import TimmModelSpec
from featcli.backbones.transformers_model import (
    files_of,
    freezer,
    inside,
    name_of,
    no_processor,
    own_size,
    processor_of,
    reading,
)
from featcli.errors import CheckpointError, UsageError, shown
from featcli.spec.groups import CheckpointSpec


class TimmInTransformersModelSpec(TimmModelSpec):
    """See the module. Everything about the network is timm's, pixels and default stages are the checkpoint's."""

    def __init__(self, asked: CheckpointSpec, config: Any, outer: Any) -> None:
        if not config.features_only:
            raise UsageError("features_only=False: featcli gives features, never logits", "leave features_only out")
        self._processor = processor_of(asked)
        size = asked.input_size or own_size(asked, self._processor)
        channels = asked.num_channels or config.num_channels
        options = {"output_stride": config.output_stride} if config.output_stride else {}
        timm_request = replace(
            asked,
            arch=config.backbone,
            image_size=size,
            num_channels=channels if channels != 3 else asked.num_channels,
        )
        self._freeze = freezer(outer)
        super().__init__(timm_request, "", options)
        self.default_indices = tuple(config.out_indices) if config.out_indices else None
        composite = outer.model_type if outer is not None else ""
        within = f"the {self.architecture} in a {composite}" if composite else self.architecture
        self.name = f"{name_of(asked)} ({within})"
        self.inside = inside(outer) if outer is not None else ""

    def _cut(self, model: Any, positions: Sequence[int]) -> Network:
        self._freeze(model)
        return super()._cut(model, positions)

    def load(self, positions: Sequence[int]) -> tuple[Network, Weights]:
        """See Source."""
        if not self.asked.is_random:
            self.files = self._weights_files()
        return super().load(positions)

    def _weights_files(self) -> list[Path]:
        with reading(self.asked):
            files = files_of(self.asked)
        if not files:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: no weights in it",
                "save the model there with save_pretrained, or try --random-init",
            )
        return files

    def preprocessing(self) -> Preprocessing:
        """See Source; the checkpoint's own where it has one, which is not timm's."""
        if self._processor is None and self.inside and not self.asked.is_random:
            raise no_processor(self.asked)
        if self._processor is None:
            return super().preprocessing()
        return preprocessing_of(self._processor, self.input_size, self.channels, self.resize_mode)
