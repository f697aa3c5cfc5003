"""Give a small configuration of every model type in transformers' AutoBackbone mapping: seconds, not minutes."""

import torch

from featcli.backbones.stages import Points

TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PYRAMID = {"depths": [1, 1, 1, 1]}
WINDOWS = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64}

TINY = {
    "beit": TOKENS | {"image_size": 64},
    "bit": PYRAMID | {"hidden_sizes": [128, 128, 128, 256], "embedding_size": 32},
    "convnext": PYRAMID | {"hidden_sizes": [8, 16, 24, 32], "image_size": 64},
    "convnextv2": PYRAMID | {"hidden_sizes": [8, 16, 24, 32], "image_size": 64},
    "dinov2": TOKENS | {"image_size": 56, "mlp_ratio": 2},
    "dinov2_with_registers": TOKENS | {"image_size": 64, "mlp_ratio": 2},
    "dinov3_convnext": PYRAMID | {"hidden_sizes": [8, 16, 24, 32], "image_size": 64},
    "dinov3_vit": TOKENS | {"image_size": 64, "num_register_tokens": 2},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 128, 128], "image_size": 64},
    "hgnet_v2": {"embedding_size": 16, "depths": [1, 1, 1, 1]},
    "hiera": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": [64, 64]},
    "lw_detr_vit": TOKENS | {"image_size": 64, "pretrain_image_size": 64, "num_windows": 4},
    "maskformer-swin": WINDOWS,
    "pixio": TOKENS | {"image_size": 64},
    "pp_lcnet": {},
    "pp_lcnet_v3": {},
    "pp_lcnet_v4": {},
    "pvt_v2": PYRAMID | {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 2, 2], "image_size": 64},
    "resnet": PYRAMID | {"hidden_sizes": [16, 32, 32, 64], "embedding_size": 16},
    "rf_detr_dinov2": TOKENS | {"image_size": 56, "mlp_ratio": 2, "num_windows": 2},
    "rt_detr_resnet": PYRAMID | {"hidden_sizes": [16, 32, 32, 64], "embedding_size": 16},
    "sapiens2": TOKENS | {"image_size": 64},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "textnet": {"image_size": [64, 64]},
    "tipsv2_vision_model": TOKENS | {"image_size": 56},
    "uvdoc_backbone": {},
    "vitdet": TOKENS | {"image_size": 64},
    "vitpose_backbone": TOKENS | {"image_size": [64, 48]},
}


def randomize(model):
    """Give every parameter random values, also norms and biases, so that none looks like another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def refuse_wrong_places(spec):
    """Raise if a hook on the module that is named for a stage sees other values than those of its raw map.

    `spec` is a ModelSpec. Values of no patch, such as tokens of each window, may be more.
    """
    torch.manual_seed(0)
    stages, spec.norm = spec.stages, "raw"
    network = spec.build(Points(tuple(range(len(stages)))), "cpu")
    pixels = torch.rand(1, spec.channels, *spec.input_size)
    seen = {"pixel_values": pixels}
    for place in {stage.module for stage in stages} - seen.keys():
        network.module.get_submodule(place).register_forward_hook(
            lambda _, given, out, place=place: seen.update({place: out if isinstance(out, torch.Tensor) else out[0]})
        )
    with torch.no_grad():
        maps = network.maps(pixels)
    for stage, found in zip(stages, maps, strict=True):
        given = seen[stage.module].flatten().tolist()
        assert len(given) - found.numel() <= 8 * stage.channels * 4, (stage.name, stage.module)
        assert set(found.flatten().tolist()) <= set(given), (stage.name, stage.module)
