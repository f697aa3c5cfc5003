"""Make folders with tensor names from before transformers renamed them, by the inverse of its conversion table.

The names are written here by hand, as the classes of transformers 4 and the official repositories have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from official_names import State, renamed, under
from safetensors.torch import save_file
from tiny_transformers import TINY, TOKENS, randomize

from featcli import load_backbone
from featcli.backbones.torchvision_operators import import_transformers

T = import_transformers()
VIT = TOKENS | {"image_size": 64, "patch_size": 16}
TEXT = TOKENS | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16}
SWIN = TINY["swin"] | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
RESNET = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "embedding_size": 16, "out_features": ["stage4"]}
DECODER = {
    "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32, "num_queries": 5, "decoder_n_points": 2,
    "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 1,
}  # fmt: skip
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
LONG = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, kw_only=True)
class Old:
    """A folder with older names."""

    make: Callable[[], Any]  # the model, as transformers has it now
    back: Callable[[State], State]  # new names -> older names
    sources: tuple[str, ...]  # entries of transformers/conversion_mapping.py that have these names
    place: str = ""  # path of the backbone in the model, with a dot at its end
    size: int = 64
    new_is_read: bool = True  # False if transformers' own table fails at new names under a prefix


def long_names(attention: str) -> Callable[[State], State]:
    """Return a function that writes query, key and value in full, as BERT does, which much of transformers follows."""
    return renamed((r"attention\.([qkv])_proj", lambda found: f"{attention}.{LONG[found[1]]}"))


def all_of(*steps: Callable[[State], State]) -> Callable[[State], State]:
    """Return a function that applies the steps one after another."""

    def back(state: State) -> State:
        for step in steps:
            state = step(state)
        return state

    return back


def together(parts: tuple[str, ...], whole: str) -> Callable[[State], State]:
    """Return a function that joins tensors whose names end in these parts to one, as they were before."""

    def back(state: State) -> State:
        found = dict(state)
        for key in [key for key in found if parts[0] in key]:
            pieces = [found.pop(key.replace(parts[0], part)) for part in parts]
            found[key.replace(parts[0], whole)] = torch.cat(pieces)
        return found

    return back


DENSE = renamed(
    (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)  # fmt: skip
OF_VIT = all_of(long_names("attention.attention"), DENSE, renamed((r"(^|\.)(layers\.)(?=\d)", r"\1encoder.layer.")))
# Relative positions of BEiT, which layers have or share.
OF_BEIT = all_of(
    renamed(
        (r"attention\.relative_position_bias\.", "attention.attention.relative_position_bias."),
        (r"shared_position_bias\.", "encoder.relative_position_bias."),
    ),
    OF_VIT,
)
OF_DINOV2 = all_of(
    long_names("attention.attention"),
    renamed((r"attention\.o_proj", "attention.output.dense"), (r"mlp\.down_proj", "mlp.weights_out")),
    together(("mlp.gate_proj", "mlp.up_proj"), "mlp.weights_in"),
)
OF_SWIN = all_of(
    renamed((r"attention\.relative_position_bias\.", "attention.self.")), long_names("attention.self"), DENSE
)
OF_SEGFORMER = all_of(
    renamed(
        (r"stages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
        (r"stages\.(\d+)\.blocks\.", r"encoder.block.\1."), (r"stages\.(\d+)\.layer_norm", r"encoder.layer_norm.\1"),
        (r"attention\.sequence_reduction\.sequence_reduction", "attention.self.sr"),
        (r"attention\.sequence_reduction\.layer_norm", "attention.self.layer_norm"),
        (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc(\d)", r"mlp.dense\1"),
        (r"layernorm_before", "layer_norm_1"), (r"layernorm_after", "layer_norm_2"),
    ),
    long_names("attention.self"),
)  # fmt: skip
OF_RADIO = all_of(
    together(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attn.qkv"),
    renamed(
        (r"^embeddings\.video_patch_projection", "radio_model.model.patch_generator.video_embedder"),
        (r"^embeddings\.patch_projection", "radio_model.model.patch_generator.embedder"),
        (r"^embeddings\.position_embedding", "radio_model.model.patch_generator.pos_embed"),
        (r"^embeddings\.cls_register_token", "radio_model.model.patch_generator.cls_token.token"),
        (r"^encoder\.layer", "radio_model.model.blocks"), (r"attention\.o_proj", "attn.proj"),
        (r"^input_conditioner", "radio_model.input_conditioner"), (r"^summary_idxs", "radio_model.summary_idxs"),
    ),
)  # fmt: skip
OF_SAPIENS2 = all_of(
    together(("mlp.gate_proj", "mlp.up_proj"), "ffn.w12"),
    renamed(
        (r"^norm\.", "ln1."), (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.register_tokens", "storage_tokens"),
        (r"^embeddings\.patch_embeddings", "patch_embed.projection"),
        (r"^model\.layer\.", "blocks."), (r"attention\.o_proj", "attn.proj"), (r"attention\.([qkv])_proj", r"attn.w\1"),
        (r"attention\.([qk]_norm)", r"attn.\1"), (r"layer_scale1\.lambda1", "attn.gamma.weight"),
        (r"mlp\.down_proj", "ffn.w3"), (r"\.norm([12])\.", r".ln\1."),
    ),
)  # fmt: skip
OF_TIPSV2 = all_of(
    together(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attn.qkv"),
    renamed(
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.", ""), (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.", "blocks."), (r"attention\.o_proj", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    ),
)  # fmt: skip
OF_DETR = renamed((r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."))
OF_RF_DETR = all_of(
    OF_DINOV2, renamed((r"^model\.backbone\.backbone\.", "backbone.0.encoder.encoder."), (r"^model\.", "transformer."))
)


def without(prefix: str) -> Callable[[State], State]:
    """Return a function that removes a prefix from the names."""
    return renamed((f"^{prefix}", ""))


def config(name: str, **more: Any) -> Any:
    return T.CONFIG_MAPPING[name](**{**TINY.get(name, VIT), **more})


def clip(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(T, f"{kind}VisionModel")(getattr(T, f"{kind}VisionConfig")(**VIT, **more))


def before_5(state: State) -> State:
    """Give the names that all towers of text and pictures have in transformers 4."""
    return under("vision_model.", state)


def lw_detr() -> Any:
    sizes = {"projector_scale_factors": [1.0], "hidden_expansion": 0.5, "c2f_num_blocks": 1}
    return T.LwDetrForObjectDetection(
        T.LwDetrConfig(backbone_config=config("lw_detr_vit", out_indices=[1, 3]), **DECODER, **sizes)
    )


def rf_detr() -> Any:
    return T.RfDetrForObjectDetection(
        T.RfDetrConfig(backbone_config=config("rf_detr_dinov2", out_indices=[1, 3]), **DECODER)
    )


def upernet(backbone: Any, channels: int) -> Any:
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": channels}
    return T.UperNetForSemanticSegmentation(T.UperNetConfig(backbone_config=backbone, **sizes))


def mask2former() -> Any:
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2}
    more = {"num_attention_heads": 2, "dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 5}
    return T.Mask2FormerForUniversalSegmentation(
        T.Mask2FormerConfig(backbone_config=T.SwinConfig(**SWIN), **sizes, **more)
    )


OLD: dict[str, Old] = {
    "ViT": Old(make=lambda: T.ViTModel(config("vit")), back=OF_VIT, sources=("ViTModel",)),
    "ViT, classes": Old(
        make=lambda: T.ViTForImageClassification(config("vit")), back=OF_VIT, sources=("ViTModel",), place="vit."
    ),
    "DeiT": Old(make=lambda: T.DeiTModel(config("deit")), back=OF_VIT, sources=("DeiTModel",)),
    "ViT MSN": Old(
        make=lambda: T.ViTMSNModel(config("vit_msn")),
        back=OF_VIT,
        sources=("ViTMSNModel", "ViTMSNForImageClassification"),
    ),
    "I-JEPA": Old(make=lambda: T.IJepaModel(config("ijepa")), back=OF_VIT, sources=("IJepaModel",)),
    "MAE": Old(
        make=lambda: T.ViTMAEModel(config("vit_mae")), back=OF_VIT, sources=("ViTMAEModel", "ViTMAEForPreTraining")
    ),
    "BEiT": Old(
        make=lambda: T.BeitModel(config("beit", use_relative_position_bias=True, layer_scale_init_value=0.1)),
        back=OF_BEIT,
        sources=("BeitModel", "BeitForSemanticSegmentation"),
    ),
    "BEiT, shared positions": Old(
        make=lambda: T.BeitModel(config("beit", use_shared_relative_position_bias=True)),
        back=OF_BEIT,
        sources=("BeitModel",),
    ),
    "BEiT, a backbone": Old(
        make=lambda: T.BeitBackbone(config("beit")),
        back=all_of(OF_BEIT, without(r"beit\.")),
        sources=("BeitBackbone", "BeitModel"),
    ),
    "DINOv2": Old(
        make=lambda: T.Dinov2Model(config("dinov2", use_swiglu_ffn=True)),
        back=OF_DINOV2,
        sources=("Dinov2Model",),
        size=56,
    ),
    "DINOv2, a backbone": Old(
        make=lambda: T.Dinov2Backbone(config("dinov2")), back=OF_DINOV2, sources=("Dinov2Backbone",), size=56
    ),
    "DINOv2 with registers": Old(
        make=lambda: T.Dinov2WithRegistersModel(config("dinov2_with_registers")),
        back=OF_DINOV2,
        sources=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    ),
    "DINOv3": Old(
        make=lambda: T.DINOv3ViTModel(config("dinov3_vit")), back=without(r"model\."), sources=("dinov3_vit",)
    ),
    "DINOv3, ConvNeXt": Old(
        make=lambda: T.DINOv3ConvNextModel(config("dinov3_convnext")),
        back=without(r"model\."),
        sources=("dinov3_convnext",),
    ),
    "Pixio": Old(
        make=lambda: T.PixioModel(config("pixio")),
        back=all_of(OF_VIT, renamed(("layernorm_before", "norm1"), ("layernorm_after", "norm2"))),
        sources=("pixio",),
    ),
    "RADIO": Old(make=lambda: T.RadioModel(config("radio")), back=OF_RADIO, sources=("radio",)),
    "Sapiens2": Old(make=lambda: T.Sapiens2Model(config("sapiens2")), back=OF_SAPIENS2, sources=("sapiens2",)),
    "Sapiens2 with a head": Old(
        make=lambda: T.Sapiens2Model(config("sapiens2")),
        back=lambda state: under("backbone.", OF_SAPIENS2(state)),
        sources=(
            "Sapiens2ForSemanticSegmentation",
            "Sapiens2ForPoseEstimation",
            "Sapiens2ForNormalEstimation",
            "Sapiens2ForPointmapEstimation",
            "Sapiens2ForImageMatting",
        ),
    ),
    "Swin": Old(make=lambda: T.SwinModel(config("swin")), back=OF_SWIN, sources=("swin",)),
    "Swin, a backbone": Old(
        make=lambda: T.SwinBackbone(config("swin")),
        back=all_of(OF_SWIN, without(r"swin\.")),
        sources=("swin", "SwinBackbone"),
    ),
    "SegFormer": Old(
        make=lambda: T.SegformerModel(T.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])),
        back=OF_SEGFORMER,
        sources=("SegformerModel", "SegformerForSemanticSegmentation"),
    ),
    "TIPSv2, images": Old(
        make=lambda: T.Tipsv2VisionModel(config("tipsv2_vision_model")),
        back=lambda state: under("vision_encoder.", OF_TIPSV2(state)),
        sources=("Tipsv2VisionModel", "Tipsv2VisionBackbone", "tipsv2"),
        size=56,
    ),
    "CLIP, images": Old(make=clip("CLIP"), back=before_5, sources=("CLIPVisionModel",)),
    "AltCLIP, images": Old(make=clip("AltCLIP"), back=before_5, sources=("AltCLIPVisionModel",)),
    "Chinese CLIP, images": Old(make=clip("ChineseCLIP"), back=before_5, sources=("ChineseCLIPVisionModel",)),
    "CLIPSeg, images": Old(make=clip("CLIPSeg"), back=before_5, sources=("CLIPSegVisionModel",)),
    "MetaCLIP 2, images": Old(make=clip("MetaClip2"), back=before_5, sources=("MetaClip2VisionModel",)),
    "MLCD": Old(make=clip("MLCD"), back=before_5, sources=("mlcd",)),
    "SigLIP, images": Old(make=clip("Siglip"), back=before_5, sources=("SiglipVisionModel",)),
    "YOLOS": Old(
        make=lambda: T.YolosModel(config("yolos", image_size=[64, 64], num_detection_tokens=5)),
        back=renamed((r"encoder\.interpolation\.", "encoder.")),
        sources=("yolos",),
    ),
    "AltCLIP": Old(
        make=lambda: T.AltCLIPModel(T.AltCLIPConfig(vision_config=VIT, text_config=TEXT | {"project_dim": 16})),
        back=renamed((r"encoder\.layers\.", "encoder.layer.")),
        sources=("altclip",),
        place="vision_model.",
    ),
    "LLaVA": Old(
        make=lambda: T.LlavaForConditionalGeneration(
            T.LlavaConfig(vision_config=T.CLIPVisionConfig(**VIT), text_config=T.LlamaConfig(**LLAMA))
        ),
        back=renamed((r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.", "")),
        sources=("llava", "LlavaModel"),
        place="model.vision_tower.",
    ),
    "DETR": Old(
        make=lambda: T.DetrForObjectDetection(T.DetrConfig(**DETR, backbone_config=T.ResNetConfig(**RESNET))),
        back=OF_DETR,
        sources=("DetrModel", "DetrForSegmentation"),
        place="model.backbone.model.",
    ),
    "Conditional DETR": Old(
        make=lambda: T.ConditionalDetrForObjectDetection(
            T.ConditionalDetrConfig(**DETR, backbone_config=T.ResNetConfig(**RESNET))
        ),
        back=OF_DETR,
        sources=("ConditionalDetrModel", "ConditionalDetrForSegmentation"),
        place="model.backbone.model.",
    ),
    "Deformable DETR": Old(
        make=lambda: T.DeformableDetrForObjectDetection(
            T.DeformableDetrConfig(
                **DETR | {"decoder_layers": 2, "encoder_n_points": 2, "decoder_n_points": 2},
                backbone_config=T.ResNetConfig(**RESNET | {"out_features": ["stage2", "stage3", "stage4"]}),
            )
        ),
        back=OF_DETR,
        sources=("deformable_detr",),
        place="model.backbone.model.",
    ),
    "LW-DETR": Old(
        make=lw_detr,
        back=all_of(long_names("attention.attention"), renamed((r"attention\.o_proj", "attention.output"))),
        sources=("lw_detr",),
        place="model.backbone.backbone.",
    ),
    "RF-DETR": Old(
        make=rf_detr,
        back=OF_RF_DETR,
        sources=("RfDetrModel", "RfDetrForObjectDetection", "RfDetrForInstanceSegmentation"),
        place="model.backbone.backbone.",
        size=56,
    ),
    "Mask2Former with a Swin": Old(
        make=mask2former,
        back=all_of(OF_SWIN, renamed((r"^(model\.pixel_level_module\.encoder\.)swin\.", r"\1"))),
        sources=("swin", "SwinBackbone"),
        place="model.pixel_level_module.encoder.",
    ),
    "UperNet with a BEiT": Old(
        make=lambda: upernet(config("beit", num_hidden_layers=4, out_indices=[1, 2, 3, 4]), 32),
        back=all_of(OF_BEIT, without(r"(?<=backbone\.)beit\.")),
        sources=("BeitBackbone",),
        place="backbone.",
    ),
    "UperNet with a DINOv3": Old(
        make=lambda: upernet(config("dinov3_vit", num_hidden_layers=4, out_indices=[1, 2, 3, 4]), 32),
        back=renamed((r"^backbone\.model\.", "backbone.")),
        sources=("dinov3_vit",),
        place="backbone.",
        new_is_read=False,
    ),
}


def write(model: Any, state: Mapping[str, torch.Tensor], folder: Path, size: int) -> Path:
    """Save a folder with a model's configuration, these tensors and an image processor."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    T.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def read(old: Old, folder: Path) -> dict[str, list[torch.Tensor]]:
    """Return the maps of all stages: of a folder with older names, and of one with new names if that is read.

    Raises AssertionError if a tensor of the backbone is not that of the model.
    """
    torch.manual_seed(0)
    model = randomize(old.make()).eval()
    now, before = model.state_dict(), old.back(model.state_dict())
    assert before.keys() != now.keys()
    found = {}
    pixels = torch.rand(1, 3, old.size, old.size)
    for name, state in {"before": before, "now": now}.items():
        if name == "now" and not old.new_is_read:
            continue
        backbone = load_backbone(write(model, state, folder / name, old.size), out_indices="all")
        for key, tensor in backbone.network.tensors().items():
            if key not in backbone.weights.missing:  # only a model saved as a backbone has these norms
                place = next(place for place in places(old.place, key) if place in now)
                assert torch.equal(tensor, now[place]), key
        with torch.no_grad():
            found[name] = list(backbone.network.maps(pixels))
    return found


def places(place: str, key: str) -> list[str]:
    """Return where a tensor of the backbone may be in the model: it may hold a model that can stand alone, too."""
    return [place + key, key, *(key.removeprefix(inner) for inner in ("beit.", "swin.", "pixio.", "model."))]


def written(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
