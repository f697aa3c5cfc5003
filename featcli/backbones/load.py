"""Load a Backbone by options of Python in one call: `featcli.load_backbone`."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

from featcli.backbones.assembly import assemble_backbone
from featcli.backbones.backbone import Backbone
from featcli.backbones.checkpoint import resolve
from featcli.backbones.execution import Execution
from featcli.backbones.folding import nothing_to_fold
from featcli.backbones.module import make_module
from featcli.pixels.bands import refuse_idle_rules
from featcli.pixels.extras import refuse_without_fast
from featcli.spec.calls import OF_STAGES, BackboneCall
from featcli.spec.groups import PixelSpec
from featcli.spec.option import narrowed, takes
from featcli.system.device import exact_arithmetic, resolve_device


@takes(BackboneCall)
def load_backbone(asked: BackboneCall) -> Backbone:
    """Load the backbone that `featcli extract` would run, cut after the deepest selected stage.

    If neither `out_features` nor `out_indices` is given, the last stage is selected. `out_features` also takes
    `embedding`, `projection` and `logits`, the vectors that the model itself makes of a picture. `image_size` is (H, W)
    or one number. `norm` is "raw" or "model": maps before or after the model's final norm. `fit` is crop, squash, pad
    or native; for native, `image_size` is the largest size that a picture keeps. `mean` and `std` are for values from 0
    to 1, a number for each channel or one for all. `interpolation` is a word such as "bicubic", and `crop_pct` the
    share of a resized picture that is kept. All of these and `num_channels` are the checkpoint's own if they are None.
    The options of pixels (`alpha`, `orientation`, `depth_range`, `colour`, `max_pixels`, `decode`) say what
    `Backbone.preprocess` does to a picture, as in `extract`.

    The checkpoint may be a path, or a transformers configuration (object or dictionary), which gives random weights as
    `AutoBackbone.from_config` does. The network is always in eval mode, with every parameter and every statistic of its
    norms frozen. It runs as in its library, unless `layout` ("channels-last") or `fold` (norms into convolutions) say
    otherwise.

    Raises UsageError, CheckpointError and MachineError.
    """
    refuse_without_fast(asked.decode)
    with exact_arithmetic():
        model = resolve(asked)
        refuse_idle_rules(narrowed(asked, PixelSpec), model.channels)
        points = model.choose(asked.features, asked.indices)
        model.refuse_idle_arguments()
        model.refuse_idle_norm(points.positions)
        execution = Execution(precision=asked.precision, layout=asked.layout, folded=asked.fold)
        backbone = assemble_backbone(model, points, resolve_device(asked.device).value, execution)
        if asked.fold and not backbone.execution.folded:
            raise nothing_to_fold(model.name)
        return replace(
            backbone,
            rules=narrowed(asked, PixelSpec),
            asked=asked,
            make_module=partial(make_module, asked),
            load_embedder=partial(_load_embedder, asked),
        )


def _load_embedder(asked: BackboneCall) -> Backbone:
    """Load the same checkpoint for its embedding alone, which no option of stages has a part in."""
    return load_backbone(
        **{one.name: getattr(asked, one.name) for one in fields(asked) if one.name not in (*OF_STAGES, "norm")},
        out_features=("embedding",),
    )
