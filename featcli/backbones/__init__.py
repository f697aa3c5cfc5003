"""Checkpoints in, one kind of `Backbone` out: `resolve` decides who reads a checkpoint, `load_backbone` does it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from featcli.backbones.checkpoint import Request, parse_size, resolve
from featcli.backbones.stages import parse_features, parse_indices

if TYPE_CHECKING:
    from featcli.backbones.backbone import Backbone

__all__ = ["Request", "load_backbone", "resolve"]


def load_backbone(  # noqa: PLR0913  (a keyword for each option)
    checkpoint: str,
    *,
    out_features: Sequence[str] | str | None = None,
    out_indices: Sequence[int] | str | None = None,
    arch: str | None = None,
    random_init: bool = False,
    seed: int = 0,
    image_size: tuple[int, int] | int | str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Backbone:
    """Load the backbone that `featcli extract` would run, cut after the deepest selected stage.

    The last stage is selected where neither `out_features` nor `out_indices` is given. `image_size` is
    (H, W) or one number, the checkpoint's own where it is None. Raises UsageError, CheckpointError and MachineError.
    """
    from featcli.backbones.backbone import ready
    from featcli.device import resolve_device

    source = resolve(Request(checkpoint, arch, random_init, seed, parse_size(image_size)))
    features = parse_features(out_features) if isinstance(out_features, str) else out_features
    indices = parse_indices(out_indices) if isinstance(out_indices, str) else out_indices
    positions = source.select(features, indices)
    return ready(source, positions, resolve_device(device).value, precision)
