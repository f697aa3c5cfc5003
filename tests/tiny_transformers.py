"""A small configuration of every model type in transformers' AutoBackbone mapping, for tests: seconds, not minutes."""

import torch

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
    """Give every parameter random values, norms and biases too, so that none can be taken for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model
