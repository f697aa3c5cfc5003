"""Read a timm model whose weights lie in a transformers checkpoint: `timm_backbone`, alone or in a larger model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcli.backbones.backbone import Network
from featcli.backbones.composites import described_place, norm_freezer
from featcli.backbones.own_preprocessing import (
    asked_of_preprocessing,
    is_normalisation_said,
    normalisation_in,
    on_record,
)
from featcli.backbones.preprocessing import Preprocessing, processor_preprocessing, refuse_processor_backend
from featcli.backbones.stages import Points, select
from featcli.backbones.timm_model import TimmModelSpec, TimmRequest
from featcli.backbones.transformers_model import (
    files_of,
    name_of,
    no_processor,
    own_size,
    processor_of,
    reading,
)
from featcli.errors import CheckpointError, UsageError, shown
from featcli.spec.groups import CheckpointSpec


class TimmInTransformersModelSpec(TimmModelSpec):
    """A timm model in a transformers checkpoint.

    The network is timm's; pixels and default stages are the checkpoint's.
    """

    def __init__(self, asked: CheckpointSpec, config: Any, outer: Any) -> None:
        """Read a `timm_backbone` configuration. `outer` is that of the larger model around it, or None."""
        if not config.features_only:
            raise UsageError(
                "features_only=False: a backbone gives features",
                'leave features_only out; out_features=["logits"] gives what a classifier gives',
            )
        self._processor = processor_of(asked)
        if self._processor is None:
            refuse_processor_backend(asked)
        self._freeze_norms = norm_freezer(outer)
        channels = asked.num_channels or config.num_channels
        request = TimmRequest(
            model_name=config.backbone,
            is_architecture=True,
            options={"output_stride": config.output_stride} if config.output_stride else {},
            input_size=asked.input_size or own_size(asked, self._processor),
            num_channels=channels if channels != 3 else asked.num_channels,
        )
        super().__init__(asked, request)
        wanted = asked_of_preprocessing(asked, self.channels)
        self._says_nothing = self._processor is None and not (outer is None or asked.is_random or asked.config)
        if self._processor is not None:
            with reading(asked):
                self._processor = self._processor.overridden(wanted, self.input_size, asked.fit is not None)
        elif self._says_nothing:
            self._overrides |= normalisation_in(wanted)
        self.freezes_norms = bool(config.freeze_batch_norm_2d)
        self.default_indices = self._own_choice(config)
        within = self.architecture if outer is None else f"the {self.architecture} in a {outer.model_type}"
        self.name = f"{name_of(asked)} ({within})"
        self.inside = described_place(outer) if outer is not None else ""

    def _own_choice(self, config: Any) -> tuple[int, ...] | None:
        """Return the stages that a configuration chooses, or None. Raises UsageError.

        If it names only modules, its indices are still those of the last stage.
        """
        names, indices = getattr(config, "out_features", None), tuple(config.out_indices or ())
        if not names:
            return indices or None
        chosen = select(self.stage_names, names)
        if indices not in ((), (-1,)) and select(self.stage_names, None, indices) != chosen:
            raise UsageError(
                f"{name_of(self.asked)}: out_features {', '.join(names)} and out_indices {list(indices)} of its"
                " configuration mean different stages",
                "choose stages with one of the two",
            )
        return chosen

    def preprocessing(self) -> Preprocessing:
        """Return the checkpoint's own preprocessing if it has one, which is not timm's. See ModelSpec."""
        if self._processor is not None:
            found = processor_preprocessing(self._processor, self.input_size, self.channels, self.resize_mode)
            return on_record(found, self._processor.overrides)
        if self._says_nothing and not is_normalisation_said(self.asked):
            raise no_processor(self.asked)
        return super().preprocessing()

    @property
    def _is_guessed(self) -> bool:
        return self.asked.is_random or self.asked.config is None  # a configuration takes timm's own weights

    def _cut(self, model: Any, points: Points) -> Network:
        self._freeze_norms(model)
        return super()._cut(model, points)

    def _own_files(self) -> list[Path]:
        if self.asked.config is not None:  # timm finds the trained weights of the architecture
            return []
        with reading(self.asked):
            files = files_of(self.asked)
        if not files:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: there are no weights in it",
                "save the model there with save_pretrained, or try --random-init",
            )
        return files
