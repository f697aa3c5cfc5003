"""Checkpoints in, one kind of `Backbone` out: `load_backbone` does it all, for Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from featcli.backbones.execution import DEFAULT_LAYOUT, DEFAULT_PRECISION, LAYOUTS, PRECISIONS, Execution
from featcli.errors import one_of

if TYPE_CHECKING:
    from featcli.backbones.backbone import Backbone

__all__ = ["load_backbone"]


def load_backbone(  # noqa: PLR0913  (a keyword for each option)
    checkpoint: Any,
    *,
    out_features: Sequence[str] | str | None = None,
    out_indices: Sequence[int] | int | str | None = None,
    arch: str | None = None,
    random_init: bool = False,
    seed: int = 0,
    image_size: tuple[int, int] | int | str | None = None,
    num_channels: int | None = None,
    norm: str | None = None,
    fit: str | None = None,
    device: str = "cpu",
    precision: str = DEFAULT_PRECISION,
    layout: str = DEFAULT_LAYOUT,
    fold: bool = False,
) -> Backbone:
    """Load the backbone that `featcli extract` would run, cut after the deepest selected stage.

    The last stage is selected where neither `out_features` nor `out_indices` is given. `image_size` is
    (H, W) or one number, the checkpoint's own where it is None, and so are `num_channels`, `norm` ("raw" or
    "model": before or after the model's final norm) and `fit` (crop, squash, pad, or native: then `image_size` is the
    most that a picture may keep of its own). The checkpoint may be a path, or a transformers configuration (object or
    dictionary), which gives random weights as `AutoBackbone.from_config` does. It is always in eval mode
    with every parameter and every statistic of its norms frozen, and run as its library runs it unless `layout`
    ("channels-last") or `fold` (norms into convolutions) say otherwise.

    Raises UsageError, CheckpointError and MachineError.
    """
    from featcli.backbones.checkpoint import Request, resolve, sizes_asked
    from featcli.backbones.model_spec import ready
    from featcli.backbones.stages import given_features, given_indices
    from featcli.system.device import resolve_device

    one_of("precision", precision, tuple(PRECISIONS))
    one_of("layout", layout, tuple(LAYOUTS))
    sizes = sizes_asked(image_size, fit)
    source = resolve(
        Request(checkpoint, arch, random_init, seed, num_channels=num_channels, norm=norm, fit=fit, **sizes)
    )
    positions = source.select(given_features(out_features), given_indices(out_indices))
    return ready(source, positions, resolve_device(device).value, Execution(precision, layout, fold))
