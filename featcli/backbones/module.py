"""Give a backbone as a torch module in transformers' manner, to be trained, or to stand inside a larger model.

For the types of AutoBackbone it is transformers' own class. All others, timm's models and vision models with hidden
states, are inside a `BackboneModule`, which has the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Backbone, Network
from featcli.backbones.checkpoint import resolve
from featcli.backbones.internals import backbone_type, freeze_norms_of_timm, unfreeze_norms_of_timm
from featcli.backbones.model_spec import ModelSpec, Wanted
from featcli.backbones.stages import Points, select
from featcli.backbones.torchvision_operators import import_transformers
from featcli.errors import CheckpointError, UsageError, shown
from featcli.spec.calls import BackboneCall
from featcli.system.borrowed import own_random_numbers
from featcli.system.device import exact_arithmetic


def make_module(asked: BackboneCall, backbone: Backbone, cut: bool) -> Any:
    """Load the network of a backbone again, in fp32 on the CPU: see `Backbone.as_module`.

    Raises UsageError without transformers, CheckpointError if the weights are not those of the backbone, and what
    `load_backbone` raises.
    """
    try:
        import_transformers()
    except ModuleNotFoundError:
        raise UsageError("as_module needs transformers", "pip install 'featcli[transformers]'") from None
    with exact_arithmetic():
        spec = resolve(asked)
        points = spec.choose(asked.features, asked.indices)
        if points.vectors:
            raise UsageError(
                f"as_module: a module gives feature maps, and {points.vectors[0]} is a vector",
                "load the backbone with stages alone",
            )
        positions = points.positions
        reach = max(positions) + 1 if cut else len(spec.stage_names)
        with own_random_numbers():  # loaded weights replace them
            network, _ = spec.load(Points(tuple(range(reach))))
    _refuse_other_weights(backbone, network)
    network.module.float().eval()
    if not hasattr(network.module, "forward_with_filtered_kwargs"):
        return BackboneModule(spec, network.module, reach, positions)
    module: Any = network.module
    reach += spec.first_index
    module.stage_names = module.config.stage_names = module.stage_names[:reach]  # its setters refuse all others
    module.num_features = module.num_features[:reach]
    module.out_indices = [position + spec.first_index for position in positions]
    return module


def _refuse_other_weights(backbone: Backbone, network: Network) -> None:
    """Raise CheckpointError if a tensor differs from that of the backbone. Folded weights cannot be compared."""
    if backbone.execution.folded:
        return
    tensors = network.tensors()
    for name, tensor in backbone.network.tensors().items():
        again = tensors.get(name)
        if again is None or not torch.equal(again.to(tensor.dtype), tensor.cpu()):
            raise CheckpointError(
                f"checkpoint {shown(backbone.name)}: its weights have changed since this backbone was loaded",
                "load the backbone again",
            )


class BackboneModule(nn.Module):
    """A timm model, or one that gives hidden states, with the interface of transformers' backbones.

    `model` is the library's own module. Stages can be selected at any time, by `out_features` or `out_indices`.
    """

    def __init__(self, spec: ModelSpec, model: nn.Module, reach: int, positions: Sequence[int]) -> None:
        """Wrap a model that computes the first `reach` stages, and select those at `positions`."""
        super().__init__()
        self.model = model
        self.backbone_type = backbone_type(spec.library)
        self.has_attentions = spec.library == "transformers"
        self.config = spec.module_config()
        self._spec = spec
        self._stages = spec.stages[:reach]
        self._select(positions)
        if spec.freezes_norms:
            self.freeze_batch_norm_2d()
        self.eval()

    def _select(self, positions: Sequence[int]) -> None:
        self._positions = tuple(positions)
        if self.backbone_type.value == "timm":
            self.config.out_indices = self.out_indices

    @property
    def stage_names(self) -> list[str]:
        """The names of all stages, in network order."""
        return [stage.name for stage in self._stages]

    @property
    def num_features(self) -> list[int]:
        """C of each stage."""
        return [stage.channels for stage in self._stages]

    @property
    def out_features(self) -> list[str]:
        """The names of the selected stages. To set others than it has raises UsageError."""
        return [self._stages[position].name for position in self._positions]

    @out_features.setter
    def out_features(self, names: Sequence[str]) -> None:
        self._select(select(self._places, out_features=tuple(names)))

    @property
    def out_indices(self) -> list[int]:
        """The library's own indices of the selected stages. To set others than it has raises UsageError."""
        return [self._stages[position].index for position in self._positions]

    @out_indices.setter
    def out_indices(self, indices: Sequence[int]) -> None:
        self._select(select(self._places, out_indices=tuple(indices), first_index=self._spec.first_index))

    @property
    def _places(self) -> list[tuple[str, str]]:
        return [(stage.name, stage.module) for stage in self._stages]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """C of each stage by name."""
        return {stage.name: stage.channels for stage in self._stages}

    @property
    def channels(self) -> list[int]:
        """C of each selected stage."""
        return [self._stages[position].channels for position in self._positions]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(one.dtype for one in self.parameters() if one.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def freeze_batch_norm_2d(self) -> None:
        """Replace batch norms by frozen norms: neither weights nor statistics change, also in training."""
        freeze_norms_of_timm(self.model)

    def unfreeze_batch_norm_2d(self) -> None:
        """Replace frozen norms by batch norms."""
        unfreeze_norms_of_timm(self.model)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the BackboneOutput of (B, C, H, W) floats: `feature_maps` has a (B, C, h, w) for each stage.

        It has `hidden_states` if they are asked for: timm's are the maps of all stages, others are as the model gives
        them. Without `return_dict` it is a tuple. Raises UsageError for pixels that are not normalised, and for
        attentions of timm.
        """
        from transformers.modeling_outputs import BackboneOutput

        if not pixel_values.is_floating_point():
            raise UsageError(
                f"pixels of {pixel_values.dtype}: a module takes normalised floats",
                "give backbone.preprocessing.normalize(pixels)",
            )
        wants_attentions = self._wants("output_attentions", output_attentions)
        if wants_attentions and not self.has_attentions:
            raise UsageError("output_attentions: timm's models do not give their attentions", "leave it out")
        wanted = Wanted(
            positions=self._positions,
            reach=len(self._stages),
            hidden_states=self._wants("output_hidden_states", output_hidden_states),
            attentions=wants_attentions,
        )
        found = self._spec.run(self.model, pixel_values, wanted)
        output = BackboneOutput(feature_maps=found.maps, hidden_states=found.hidden_states, attentions=found.attentions)
        return output if self._wants("return_dict", return_dict, True) else output.to_tuple()

    def _wants(self, name: str, said: bool | None, default: bool = False) -> bool:
        return bool(getattr(self.config, name, default) if said is None else said)

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Run with only those keywords that it takes, which larger models call."""
        taken = {"pixel_values", "output_hidden_states", "return_dict"}
        taken |= {"output_attentions"} if self.has_attentions else set()
        return self(*args, **{name: value for name, value in kwargs.items() if name in taken})

    def __getattr__(self, name: str) -> Any:
        """Return the model's `save_pretrained` if its class has one, else one that raises UsageError."""
        if name == "save_pretrained":
            return getattr(super().__getattr__("model"), name, _cannot_save)
        return super().__getattr__(name)


def _cannot_save(*_: Any, **__: Any) -> None:
    raise UsageError(
        "save_pretrained is transformers' own, and this is a model of timm",
        "use torch.save(module.model.state_dict(), 'weights.pth'), and load it with -c weights.pth --arch NAME",
    )
