"""Make checkpoints with the names of official repositories from timm's models, by the inverse of each converter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from featcli import load_backbone

State = dict[str, torch.Tensor]
SMALL_VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL_EVA = {**SMALL_VIT, "depth": 1}
ONE = torch.ones(1)


@dataclass(frozen=True, kw_only=True)
class Official:
    """A checkpoint of an official repository."""

    arch: str  # architecture of the weights
    source: str  # where timm's code has these names
    back: Callable[[State], Any]  # timm's names of a model with a head -> the content of the official file
    arguments: Mapping[str, Any] = field(default_factory=dict)  # make the model small
    size: int | None = None  # if its constructor needs it
    head: bool = True  # whether the file has the tensors of a classifier
    noughts: tuple[str, ...] = ()  # parameters that are zero and not in the file
    ordered: bool = False  # whether the converter depends on the order of names, which safetensors does not keep
    weights_key: str | None = None  # if a file has more than one set of weights

    def model(self) -> torch.nn.Module:
        """Return the small model; all its weights differ."""
        torch.manual_seed(0)
        arguments = dict(self.arguments) | ({"img_size": self.size} if self.size else {})
        model = timm.create_model(self.arch, num_classes=3 if self.head else 0, **arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.rand_like(parameter) / 50 + 1e-3).mul_(name not in self.noughts)
        return model.eval()

    def options(self) -> dict[str, Any]:
        """Return what load_backbone is told in addition to the file."""
        size = {"image_size": self.size} if self.size else {}
        return {"arch": self.arch, "model_arg": dict(self.arguments), "weights_key": self.weights_key, **size}


def renamed(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[State], State]:
    """Return a function that replaces these patterns in the names of tensors, one after another."""

    def back(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            key = name
            for pattern, new in pairs:
                key = re.sub(pattern, new, key)
            found[key] = tensor
        assert len(found) == len(state), "two tensors have one name"
        return found

    return back


def under(prefix: str, state: State, **more: torch.Tensor) -> State:
    """Put a prefix before the names of tensors, and add others."""
    return {prefix + key: tensor for key, tensor in state.items()} | more


def less(by: int = 1) -> Callable[[re.Match[str]], str]:
    """Return a replacement for re.sub: the first group, the second group's number minus `by`, the third group."""
    return lambda found: f"{found[1]}{int(found[2]) - by}{found[3]}"


def more(by: int = 1) -> Callable[[re.Match[str]], str]:
    """Return the same replacement with a number that is larger by `by`."""
    return less(-by)


def counted(depths: tuple[int, ...], pattern: str, new: str) -> Callable[[State], State]:
    """Return a function that numbers blocks through all stages. The pattern finds the stage and the block."""

    def place(found: re.Match[str]) -> str:
        return new.format(sum(depths[: int(found[1])]) + int(found[2]))

    return renamed((pattern, place))


CLIP = renamed(
    (r"^patch_embed\.proj", "conv1"), (r"^pos_embed", "positional_embedding"), (r"^cls_token", "class_embedding"),
    (r"^norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post."), (r"\.norm(\d)", r".ln_\1"), (r"qkv\.", "in_proj_"),
    (r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"^blocks\.", "transformer.resblocks."),
)  # fmt: skip
PE = renamed(
    (r"gamma_(\d)$", r"ls_\1.gamma"), (r"^patch_embed\.proj", "conv1"), (r"^pos_embed", "positional_embedding"),
    (r"^cls_token", "class_embedding"), (r"^norm_pre\.", "ln_pre."), (r"^norm\.", "ln_post."),
    (r"\.norm(\d)", r".ln_\1"), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"^blocks\.", "transformer.resblocks."),
)  # fmt: skip


def bare(state: State) -> State:
    """Remove the dimensions that timm puts before positions and class token."""
    found = dict(state)
    found["positional_embedding"] = found["positional_embedding"][0]
    if "class_embedding" in found:
        found["class_embedding"] = found["class_embedding"][0, 0]
    return found


def clip(state: State, prefix: str = "visual.") -> State:
    """Name tensors as openai/CLIP and OpenCLIP: a transposed projection without bias, and a text tower."""
    found = bare(CLIP({key: tensor for key, tensor in state.items() if not key.startswith("head.")}))
    found["proj"] = state["head.weight"].T
    text = {"transformer.resblocks.0.attn.in_proj_weight": ONE, "logit_scale": ONE, "positional_embedding": ONE}
    return under(prefix, found) | under(prefix.removesuffix("visual."), text)


def perception_encoder(state: State) -> State:
    """Name tensors as facebookresearch/perception_models."""
    return under("visual.", bare(PE(state)), logit_scale=ONE)


def with_registers(state: State) -> State:
    """Name tensors as facebookresearch/dinov2 with registers: the class token has a position of its own."""
    found = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    own = torch.rand(1, 1, found["pos_embed"].shape[2])
    found["register_tokens"] = found.pop("reg_token")
    found["cls_token"] = found["cls_token"] - own
    found["pos_embed"] = torch.cat([own, found["pos_embed"]], 1)
    return found | {"mask_token": torch.zeros(1, found["pos_embed"].shape[2])}


def ijepa(state: State) -> dict[str, Any]:
    """Name tensors as facebookresearch/ijepa: encoders and a predictor in containers of one file."""
    found = under("module.", state)
    return {"encoder": found, "predictor": under("module.", {"predictor_embed.weight": ONE}), "epoch": 300}


def beit3(state: State) -> dict[str, Any]:
    """Name tensors as microsoft/unilm beit3: separate query, key and value, and a branch for pictures of two."""
    swap = renamed(
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."), (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
        (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."), (r"\.mlp\.", ".ffn.A."),
        (r"\.norm1\.", ".self_attn_layer_norm.A."), (r"\.norm2\.", ".final_layer_norm.A."),
        (r"\.ffn\.A\.ffn_layernorm\.", ".ffn.A.ffn_layernorm."),
        (r"^blocks\.", "beit3.encoder.layers."), (r"^patch_embed\.", "beit3.vision_embed."),
        (r"^cls_token", "beit3.vision_embed.cls_token"),
    )  # fmt: skip
    found: State = {}
    for key, tensor in state.items():
        if key.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            block, leaf = key.split(".")[1], key.rpartition(".")[2]
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"beit3.encoder.layers.{block}.self_attn.{name}_proj.A.{leaf}"] = part
        elif key == "pos_embed":
            own = torch.rand(2, tensor.shape[2])
            found["beit3.encoder.embed_positions.A.weight"] = torch.cat([own, tensor[0]])
        elif not key.startswith(("head.", "fc_norm.")):
            found |= swap({key: tensor})
    other = {key.replace(".A.", ".B."): tensor + 1 for key, tensor in found.items() if ".A." in key}
    return {"model": found | other | {"beit3.text_embed.weight": ONE, "beit3.vision_embed.mask_token": ONE}}


def radio(state: State) -> State:
    """Name tensors as NVlabs/RADIO: a linear layer for patches, a class token for each teacher, then registers."""
    found = {key: tensor for key, tensor in state.items() if key.startswith("blocks.")}
    found["patch_generator.embedder.weight"] = state["patch_embed.proj.weight"].flatten(1)
    found["patch_generator.pos_embed"] = state["pos_embed"]
    found["patch_generator.cls_token.token"] = torch.cat([state["cls_token"][0], state["reg_token"][0]])
    return under("radio_model.model.", found, **{"radio_model.input_conditioner.norm_mean": ONE})


def dinov3(state: State) -> State:
    """Name tensors as facebookresearch/dinov3: a bias that is zero, a mask for it, and rotary periods."""
    found = renamed((r"gamma_(\d)$", r"ls\1.gamma"), ("^reg_token", "storage_tokens"))(state)
    for key in [key for key in found if key.endswith("attn.qkv.weight")]:
        found[key.replace("weight", "bias")] = torch.zeros(found[key].shape[0])
        found[key.replace("weight", "bias_mask")] = torch.ones(found[key].shape[0])
    return found | {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}


def fcmae(state: State) -> State:
    """Name tensors as facebookresearch/ConvNeXt-V2: four dimensions in its response normalisation, and a decoder."""
    found = CONVNEXT({key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta"): tensor
                      for key, tensor in state.items()})  # fmt: skip
    found = {key: tensor[None, None, None] if ".grn." in key else tensor for key, tensor in found.items()}
    return {"model": found}


# facebookresearch/ConvNeXt.
CONVNEXT = renamed(
    (r"^stem\.(\d)", r"downsample_layers.0.\1"), (r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
    (r"^stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2"), (r"conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"),
    (r"^head\.norm", "norm"), (r"^head\.fc", "head"),
)  # fmt: skip
# microsoft/Swin-Transformer, both versions: the layer that makes maps smaller ends a stage.
SWIN = renamed((r"^(layers\.)(\d)(\.downsample)", less()), (r"^head\.fc\.", "head."))


def swin(state: State, *tables: str) -> dict[str, Any]:
    """Name tensors as microsoft/Swin-Transformer, with the tables that the model computes."""
    found = SWIN(state)
    for block in {key.partition(".attn.")[0] for key in found if ".attn." in key}:
        found |= {f"{block}.attn.{table}": ONE for table in tables}
    return {"model": found | {"layers.0.blocks.1.attn_mask": ONE}}


# apple/ml-fastvit.
FASTVIT = renamed(
    (r"^stages\.(\d)\.downsample\.proj", lambda found: f"network.{2 * int(found[1]) - 1}.proj"),
    (r"^stages\.(\d)\.blocks", lambda found: f"network.{2 * int(found[1])}"),
    (r"large_conv", "lkb_origin"), (r"conv_kxk", "rbr_conv"), (r"conv_scale", "rbr_scale"),
    (r"\.identity", ".rbr_skip"),
    (r"^final_conv", "conv_exp"), (r"se\.fc1", "se.reduce"), (r"se\.fc2", "se.expand"), (r"^stem", "patch_embed"),
    (r"\.mlp\.", ".convffn."), (r"layer_scale(_\d)?\.gamma", r"layer_scale\1"), (r"^head\.fc\.", "head."),
)  # fmt: skip


def clip_resnet(state: State) -> State:
    """Name tensors as the ResNets of openai/CLIP: the layers of a torchvision ResNet, and attention that pools."""
    parts = {"conv1_1x1": 1, "conv2_kxk": 2, "conv3_1x1": 3}
    names = renamed(
        (r"^stem\.conv(\d)\.conv", r"conv\1"), (r"^stem\.conv(\d)\.bn", r"bn\1"),
        (r"^stages\.(\d)\.(\d+)\.shortcut\.conv\.conv", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0"),
        (r"^stages\.(\d)\.(\d+)\.shortcut\.conv\.bn", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1"),
        (r"^stages\.(\d)\.(\d+)\.(conv\d_\w+)\.(conv|bn)",
         lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{m[4]}{parts[m[3]]}"),
        (r"^head\.pos_embed", "attnpool.positional_embedding"), (r"^head\.proj", "attnpool.c_proj"),
        (r"^head\.([qkv])\.", r"attnpool.\1_proj."),
    )  # fmt: skip
    return under("visual.", names(state), logit_scale=ONE)


# timm's names of the parts of a RegNet's block -> torchvision's.
REGNET = (
    (r"conv1\.conv", "f.a.0"), (r"conv1\.bn", "f.a.1"), (r"conv2\.conv", "f.b.0"), (r"conv2\.bn", "f.b.1"),
    (r"se\.fc1", "f.se.excitation.0"), (r"se\.fc2", "f.se.excitation.2"),
    (r"downsample\.conv", "proj.0"), (r"downsample\.bn", "proj.1"),
)  # fmt: skip
TORCHVISION_REGNET = renamed(
    (r"^stem\.conv", "stem.0"), (r"^stem\.bn", "stem.1"), (r"^head\.fc", "fc"), *REGNET,
    (r"conv3\.conv", "f.c.0"), (r"conv3\.bn", "f.c.1"), (r"(se\.excitation\.)(\d)()", r"\1\2"),
    (r"^s(\d)\.b(\d+)", lambda found: f"trunk_output.block{found[1]}.block{found[1]}-{int(found[2]) - 1}"),
)  # fmt: skip
SEER = renamed(
    (r"^stem\.conv", "_feature_blocks.conv1.stem.0"), (r"^stem\.bn", "_feature_blocks.conv1.stem.1"), *REGNET[:6],
    (r"downsample\.conv", "proj"), (r"downsample\.bn", "bn"), (r"conv3\.conv", "f.c"), (r"conv3\.bn", "f.final_bn"),
    (r"^s(\d)\.b(\d+)", lambda found: f"_feature_blocks.res{int(found[1]) + 1}.block{found[1]}-{int(found[2]) - 1}"),
)  # fmt: skip


def seer(state: State) -> dict[str, Any]:
    """Name tensors as facebookresearch/vissl: the trunk and its heads in containers."""
    trunk = SEER({key: tensor for key, tensor in state.items() if not key.startswith("head.")})
    heads = {"0.clf.0.weight": state["head.fc.weight"], "0.clf.0.bias": state["head.fc.bias"]}
    return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}, "iteration": 3}


def by_order(state: State) -> State:
    """Give other names in the same order, which timm's converter for NextViT relies on."""
    return {f"features.{number}.x": tensor for number, tensor in enumerate(state.values())}


def xcit(state: State) -> dict[str, Any]:
    """Name tensors as facebookresearch/xcit: class blocks join query, key and value; positions have another name."""
    found = dict(state)
    for key in [key for key in found if ".attn.q." in key and key.startswith("cls_attn")]:
        parts = [found.pop(key.replace(".q.", f".{name}.")) for name in "qkv"]
        found[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return {"model": renamed((r"^pos_embed\.", "pos_embeder."))(found)}


def densenet(state: State) -> State:
    """Name tensors as torchvision before 2018: a dot between a layer and its number."""
    return renamed((r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."))(state)


def vgg(state: State) -> State:
    """Name tensors as torchvision's VGG: linear layers where timm has convolutions over the last map."""
    found = renamed(
        (r"^pre_logits\.fc1", "classifier.0"), (r"^pre_logits\.fc2", "classifier.3"), (r"^head\.fc", "classifier.6")
    )(state)
    return {
        key: tensor.flatten(1) if re.match(r"classifier\.[03]\.w", key) else tensor for key, tensor in found.items()
    }


def with_tables(state: State, table: str, beside: str) -> State:
    """Add a table that models compute beside each tensor of this name."""
    return state | {key.replace(beside, table): ONE for key in state if key.endswith(beside)}


def more_of_stage(found: re.Match[str]) -> str:
    """Return the number of a stage as OpenMMLab counts it: from one."""
    return f"stage{int(found[1]) + 1}"


def official(state: State) -> State:
    """Return timm's names, which are those of the repository."""
    return dict(state)


FOCALNET = renamed(
    (r"ls(\d)\.gamma", r"gamma_\1"), (r"^(layers\.)(\d)(\.downsample)", less()),
    (r"modulation\.norm\.", "modulation.ln."),
    (r"norm(\d)_post", r"norm\1"), (r"^stem", "patch_embed"), (r"^head\.fc", "head"),
)  # fmt: skip

EFFICIENTFORMER = renamed(
    (r"^stem\.conv1", "patch_embed.0"), (r"^stem\.norm1", "patch_embed.1"), (r"^stem\.conv2", "patch_embed.3"),
    (r"^stem\.norm2", "patch_embed.4"),
    (r"^stages\.(\d)\.downsample\.conv", lambda found: f"network.{2 * int(found[1]) - 1}.proj"),
    (r"^stages\.(\d)\.downsample\.norm", lambda found: f"network.{2 * int(found[1]) - 1}.norm"),
    (r"^stages\.(\d)\.blocks", lambda found: f"network.{2 * int(found[1])}"),
    (r"ls(\d)\.gamma", r"layer_scale_\1"), (r"^head_dist", "dist_head"),
)  # fmt: skip


def deit3(state: State) -> State:
    """Name tensors as DeiT III in facebookresearch/deit."""
    return renamed((r"ls(\d)\.gamma", r"gamma_\1"))(state)


def teacher(state: State) -> dict[str, Any]:
    """Name tensors as facebookresearch/dino: a student and a teacher, each with a head."""
    body = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    own = under("module.backbone.", {key: tensor + 1 for key, tensor in body.items()})
    head = {"module.head.mlp.0.weight": ONE, "module.head.last_layer.weight_g": ONE}
    kept = {key.removeprefix("module."): tensor for key, tensor in head.items()}
    return {"student": own | head, "teacher": under("backbone.", body) | kept, "epoch": 100}


VIT, EVA = "vision_transformer.py", "eva.py"
POOLFORMER = renamed(
    (r"layer_scale(\d)\.scale", r"layer_scale_\1"), (r"^stem\.conv", "patch_embed.proj"), (r"^head\.norm", "norm"),
    (r"^head\.fc", "head"),
    (r"^stages\.(\d)\.downsample\.conv", lambda found: f"network.{2 * int(found[1]) - 1}.proj"),
    (r"^stages\.(\d)\.blocks\.", lambda found: f"network.{2 * int(found[1])}."),
)  # fmt: skip
CAFORMER = renamed(
    (r"^stem\.conv", "downsample_layers.0.conv"), (r"^stem\.norm", "downsample_layers.0.post_norm"),
    (r"^stages\.(\d)\.downsample\.norm", r"downsample_layers.\1.pre_norm"),
    (r"^stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.conv"), (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"^head\.norm", "norm"), (r"^head\.fc", "head"),
)  # fmt: skip
PVT = renamed(
    (r"^patch_embed", "patch_embed1"),
    (r"^stages\.(\d)\.downsample", lambda found: f"patch_embed{int(found[1]) + 1}"),
    (r"dwconv", "dwconv.dwconv"), (r"^stages\.(\d)\.blocks", lambda found: f"block{int(found[1]) + 1}"),
    (r"^stages\.(\d)\.norm", lambda found: f"norm{int(found[1]) + 1}"),
)  # fmt: skip
DAVIT = renamed(
    (r"^stem\.conv", "patch_embeds.0.proj"), (r"^stem", "patch_embeds.0"),
    (r"^stages\.(\d)\.downsample\.conv", r"patch_embeds.\1.proj"), (r"^stages\.(\d)\.downsample", r"patch_embeds.\1"),
    (r"^stages\.(\d)\.blocks", r"main_blocks.\1"), (r"cpe1", "cpe.0"), (r"cpe2", "cpe.1"),
    (r"^head\.norm", "norms"), (r"^head\.fc", "head"),
)  # fmt: skip
FLORENCE = renamed(
    (r"^stem\.conv", "convs.0.proj"), (r"^stem", "convs.0"), (r"^stages\.(\d)\.downsample\.conv", r"convs.\1.proj"),
    (r"^stages\.(\d)\.downsample", r"convs.\1"), (r"(spatial_block)\.norm1", r"\1.window_attn.norm"),
    (r"(channel_block)\.norm1", r"\1.channel_attn.norm"), (r"(spatial_block)\.attn", r"\1.window_attn.fn"),
    (r"(channel_block)\.attn", r"\1.channel_attn.fn"), (r"norm2", "ffn.norm"), (r"\.mlp\.", ".ffn.fn.net."),
    (r"cpe(\d)\.proj", r"conv\1.fn.dw"), (r"^stages\.(\d)\.blocks", r"blocks.\1"),
)  # fmt: skip
MAMBAOUT = renamed(
    (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
    (r"^stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2"), (r"^head\.norm", "norm"),
    (r"^head\.pre_logits\.fc", "head.fc1"), (r"^head\.pre_logits\.norm", "head.norm"), (r"^head\.fc\.", "head.fc2."),
)  # fmt: skip
SEQUENCER = renamed(
    (r"^stages\.(\d)\.downsample\.down", lambda found: f"blocks.{int(found[1]) - 1}.9.down"),
    (r"^stages\.(\d)\.blocks", r"blocks.\1"), (r"^head\.fc", "head"),
)  # fmt: skip
SWIFTFORMER = renamed(
    (r"^stem\.", "patch_embed."), (r"^head_dist", "dist_head"), (r"attn\.proj\.", "attn.Proj."),
    (r"(layer_scale(?:_\d)?)\.gamma", r"\1"),
    (r"^stages\.(\d)\.blocks", lambda found: f"network.{2 * int(found[1])}"),
    (r"^stages\.(\d)\.downsample", lambda found: f"network.{2 * int(found[1]) - 1}"),
)  # fmt: skip
TNT = renamed(
    (r"\.norm_mlp_in", ".inner_norm2"), (r"\.mlp_in", ".inner_mlp"), (r"\.norm_mlp", ".outer_norm2"),
    (r"\.mlp", ".outer_mlp"), (r"^patch_pos", "outer_pos"), (r"^pixel_pos", "inner_pos"),
    (r"^pixel_embed", "patch_embed"),
    (r"norm1_proj", "proj_norm1"), (r"norm2_proj", "proj_norm2"), (r"norm_in", "inner_norm1"),
    (r"attn_in", "inner_attn"),
    (r"norm_out", "outer_norm1"), (r"attn_out", "outer_attn"),
)  # fmt: skip
TRESNET = renamed(
    (r"(conv\d)\.conv", r"\1.0.0"), (r"(conv\d)\.bn", r"\1.0.1"), (r"(downsample\.\d)\.conv", r"\1.0"),
    (r"(downsample\.\d)\.bn", r"\1.1"),
)  # fmt: skip
MOBILECLIP = renamed(
    (r"^patch_embed\.backbone\.(\d)\.conv", r"patch_emb.\1.block.conv"), (r"^norm\.", "post_transformer_norm."),
    (r"^patch_embed\.backbone\.(\d)\.bn", r"patch_emb.\1.block.norm"), (r"norm1", "pre_norm_mha.0"),
    (r"\.attn\.", ".pre_norm_mha.1."), (r"norm2", "pre_norm_ffn.0"), (r"mlp\.fc1", "pre_norm_ffn.1"),
    (r"mlp\.fc2", "pre_norm_ffn.4"), (r"qkv\.", "qkv_proj."), (r"(mha\.1)\.proj", r"\1.out_proj"),
    (r"^blocks", "transformer"),
)  # fmt: skip
GEMMA = renamed(
    (r"^patch_embed", "patch_embedder"), (r"^blocks", "encoder.layers"), (r"norm1", "input_layernorm"),
    (r"norm2", "post_attention_layernorm"), (r"norm3", "pre_feedforward_layernorm"), (r"\.attn\.", ".self_attn."),
    (r"norm4", "post_feedforward_layernorm"),
)  # fmt: skip
SAPIENS = renamed(
    (r"^reg_token", "storage_tokens"), (r"^patch_embed\.proj", "patch_embed.projection"),
    (r"gamma_1", "attn.gamma.weight"),
    (r"attn\.([qkv])_proj", r"attn.w\1"), (r"\.norm(\d)\.", r".ln\1."), (r"^norm\.", "ln1."),
    (r"mlp\.fc1\.", "ffn.w12."), (r"mlp\.fc2\.", "ffn.w3."), (r"\.mlp\.", ".ffn."),
)  # fmt: skip
AIMV2 = renamed(
    (r"^blocks\.(\d+)\.norm", r"blocks.\1.norm_"), (r"^blocks", "trunk.blocks"),
    (r"^patch_embed", "preprocessor.patchifier"),
    (r"^pos_embed", "preprocessor.pos_embed"), (r"^norm\.", "trunk.post_trunk_norm."), (r"fc1_g", "fc1"),
    (r"fc1_x", "fc3"),
)  # fmt: skip
CPUBONE = renamed(
    (r"^stem\.", "backbone.input_stem.op_list."), (r"^stages\.(\d)\.", r"backbone.stages.\1.op_list."),
    (r"conv_proj\.conv", "conv_proj.0"), (r"conv_proj\.norm", "conv_proj.1"), (r"\.pwise\.", ".pwise.0."),
    (r"^head\.in_conv", "head.op_list.0"), (r"^head\.pre_classifier", "head.op_list.2"),
    (r"^head\.classifier", "head.op_list.3"),
)  # fmt: skip
LOWFORMER = renamed(
    (r"^stem\.", "backbone.input_stem.op_list."), (r"(stages\.\d\.\d+)\.local\.", r"\1.total.1."),
    (r"(stages\.\d\.\d+)\.attn\.", r"\1.total.0.0."), (r"(stages\.\d\.\d+)\.mlp\.", r"\1.total.0.1."),
    (r"^stages\.(\d)\.", r"backbone.stages.\1.op_list."), (r"conv_proj\.conv", "conv_proj.0"),
    (r"conv_proj\.norm", "conv_proj.1"), (r"\.pwise\.", ".pwise.0."), (r"^in_conv", "head.op_list.0"),
    (r"^pre_classifier\.0", "head.op_list.2.linear"), (r"^pre_classifier\.1", "head.op_list.2.norm"),
    (r"^classifier", "head.op_list.3.linear"),
)  # fmt: skip
IFORMER = renamed(
    (r"^head\.head", "classifier.classifier"), (r"^stem\.conv1", "downsample_layers.0.0"),
    (r"^stem\.conv2", "downsample_layers.0.2.conv_exp_bn1"), (r"^stem\.conv3", "downsample_layers.0.2.conv_pwl_bn2"),
    (r"^stages\.(\d)\.downsample", r"downsample_layers.\1.0"), (r"^stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2.block"),
    (r"\.mixer\.", ".token_channel_mixer."), (r"\.module\.", ".m."),
)  # fmt: skip


def mobileclip(state: State) -> State:
    """Name tensors as apple/ml-mobileclip: the tower for pictures, with a transposed projection."""
    found = MOBILECLIP({key: tensor for key, tensor in state.items() if not key.startswith(("head.", "pos_embed"))})
    found["pos_embed.pos_embed.pos_embed"] = state["pos_embed"][None]
    found["classifier.proj"] = state["head.weight"].T
    return under("image_encoder.model.", found, **{"text_encoder.projection_layer": ONE})


def deepseek(state: State) -> State:
    """Name tensors as deepseek-ai: a tower inside a language model, with a linear layer for patches."""
    found = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"].flatten(1)
    names = renamed((r"attn\.qkv", "attn.wqkv"), (r"attn\.proj", "attn.wo"), (r"mlp\.fc(\d)", r"mlp.w\1"))
    return under("vision.", names(found), **{"norm.weight": ONE, "head.weight": ONE})


def qwen(state: State) -> State:
    """Name tensors as Qwen: a tower inside a language model, with patches of two frames."""
    found = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    found["patch_embed.proj.weight"] = (found["patch_embed.proj.weight"] / 2)[:, :, None].repeat(1, 1, 2, 1, 1)
    found["pos_embed.weight"] = found.pop("pos_embed")[0]
    names = renamed((r"mlp\.fc(\d)", r"mlp.linear_fc\1"))
    return under("model.visual.", names(found), **{"model.language_model.norm.weight": ONE})


def gemma(state: State) -> State:
    """Name tensors as google/gemma-4: a tower inside a language model."""
    found = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    return under("model.vision_tower.", GEMMA(found), **{"model.language_model.norm.weight": ONE})


def resmlp(state: State) -> State:
    """Name tensors as ResMLP in facebookresearch/deit: the numbers of an affine layer have one dimension."""
    names = renamed(
        (r"^stem\.", "patch_embed."),
        (r"linear_tokens\.", "attn."),
        (r"mlp_channels\.", "mlp."),
        (r"ls(\d)$", r"gamma_\1"),
    )
    return {key: t.flatten() if key.endswith((".alpha", ".beta")) else t for key, t in names(state).items()}


def mvit(depths: tuple[int, ...]) -> Callable[[State], dict[str, Any]]:
    """Return a function that names tensors as facebookresearch/mvit, which numbers blocks through all stages."""
    names = renamed((r"shortcut_proj_attn", "proj"), (r"^head\.fc", "head.projection"))
    return lambda state: {"model_state": counted(depths, r"^stages\.(\d)\.blocks\.(\d+)", "blocks.{}")(names(state))}


def naflex(state: State) -> State:
    """Name tensors as timm's other ViTs: positions in a row, patches by a convolution."""
    found = renamed((r"^embeds\.proj", "patch_embed.proj"), (r"^embeds\.", ""))(state)
    weight = found["patch_embed.proj.weight"]
    found["patch_embed.proj.weight"] = weight.reshape(weight.shape[0], 16, 16, 3).permute(0, 3, 1, 2)
    found["pos_embed"] = found["pos_embed"].flatten(1, 2)
    return found


def csat(state: State) -> State:
    """Name tensors as the first CSATv2: the layer that makes maps smaller ends the stage before."""
    ends = {1: 2, 2: 2, 3: 8}

    def place(found: re.Match[str]) -> str:
        stage, block = int(found[1]), int(found[2])
        if stage and not block:
            return f"stages{stage}.{ends[stage] + 1}."
        return f"stages{stage + 1}.{block - (1 if stage else 0)}."

    names = renamed(
        (r"^stem_dct\.", "dct."), (r"\.conv_y\.", ".Y_Conv."), (r"\.conv_cb\.", ".Cb_Conv."),
        (r"\.conv_cr\.", ".Cr_Conv."),
        (r"^head\.fc", "head"), (r"^head\.norm", "norm"), (r"^stages\.(\d)\.(\d+)\.", place),
        (r"grn\.weight", "grn.gamma"), (r"grn\.bias", "grn.beta"), (r"\.mlp\.fc1\.", ".ff.net.0."),
        (r"\.mlp\.fc2\.", ".ff.net.3."), (r"\.norm2\.", ".ff_norm."), (r"\.norm1\.", ".attn_norm."),
        (r"\.attn\.attn\.", ".attention.attention.attn."), (r"\.attn\.qkv", ".attn.to_qkv"),
    )  # fmt: skip
    found = names(state)
    return {key: tensor[None, None, None] if ".grn." in key else tensor for key, tensor in found.items()}


OFFICIAL: dict[str, Official] = {
    "DINO": Official(
        arch="vit_small_patch16_224", source=f"{VIT}, checkpoint_filter_fn", back=teacher, arguments=SMALL_VIT, size=64
    ),
    "MAE": Official(
        arch="vit_small_patch16_224",
        source=f"{VIT}, _convert_dinov2",
        arguments=SMALL_VIT,
        size=64,
        head=False,
        back=lambda state: {
            "model": state | {"mask_token": ONE, "decoder_pos_embed": ONE, "decoder_blocks.0.norm1.weight": ONE}
        },
    ),
    "DINOv2": Official(
        arch="vit_giant_patch14_dinov2",
        source=f"{VIT}, _convert_dinov2",
        arguments=SMALL_VIT,
        size=56,
        head=False,
        back=lambda state: renamed((r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))(state) | {"mask_token": ONE},
    ),
    "DINOv2 with registers": Official(
        arch="vit_small_patch14_reg4_dinov2",
        source=f"{VIT}, _convert_dinov2",
        back=with_registers,
        arguments=SMALL_VIT,
        size=56,
        head=False,
    ),
    "TIPSv2": Official(
        arch="vit_base_patch14_reg1_tipsv2",
        source=f"{VIT}, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=56,
        head=False,
        back=lambda state: under("vision_encoder.", with_registers(state), **{"text_encoder.x": ONE}),
    ),
    "CLIP": Official(
        arch="vit_base_patch32_clip_224", source=f"{VIT}, _convert_openai_clip", back=clip, arguments=SMALL_VIT, size=64
    ),
    "OpenCLIP, trained on several GPUs": Official(
        arch="vit_base_patch32_clip_224",
        source=f"{VIT}, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        back=lambda state: {"state_dict": clip(state, "module.visual."), "epoch": 3},
    ),
    "SigLIP in OpenCLIP": Official(
        arch="vit_base_patch16_siglip_224",
        source=f"{VIT}, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        head=False,
        back=lambda state: under("visual.trunk.", state, logit_bias=ONE, **{"text.ln_final.weight": ONE}),
    ),
    "SigLIP, trained on several GPUs": Official(
        arch="vit_base_patch16_siglip_224",
        source=f"{VIT}, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        head=False,
        back=lambda state: under("module.visual.trunk.", state, **{"module.logit_bias": ONE}),
    ),
    "I-JEPA": Official(
        arch="vit_huge_patch14_gap_224",
        source=f"{VIT}, checkpoint_filter_fn",
        back=ijepa,
        arguments=SMALL_VIT,
        size=56,
        head=False,
    ),
    "BEiT-3": Official(
        arch="beit3_base_patch16_224", source=f"{VIT}, _convert_beit3", back=beit3, arguments=SMALL_VIT, size=64
    ),
    "AIMv2": Official(
        arch="aimv2_large_patch14_224",
        source=f"{VIT}, _convert_aimv2",
        back=AIMV2,
        arguments=SMALL_VIT,
        size=56,
        head=False,
    ),
    "RADIO": Official(
        arch="vit_base_patch16_radio_v3",
        source=f"{VIT}, _convert_radio",
        back=radio,
        arguments=SMALL_VIT,
        size=64,
        noughts=("patch_embed.proj.bias",),
    ),
    "DeiT III": Official(
        arch="deit3_small_patch16_224",
        source=f"deit.py, {VIT}, checkpoint_filter_fn",
        back=deit3,
        arguments=SMALL_VIT,
        size=64,
    ),
    "MobileCLIP, ViT": Official(
        arch="vit_base_mci_224",
        source="vision_transformer_hybrid.py, _convert_mobileclip",
        back=mobileclip,
        arguments={"depth": 1},
    ),
    "Segment Anything": Official(
        arch="samvit_base_patch16_224",
        source="vision_transformer_sam.py, checkpoint_filter_fn",
        size=64,
        head=False,
        arguments={**SMALL_VIT, "global_attn_indexes": [1]},
        back=lambda state: under(
            "image_encoder.", renamed((r"mlp\.fc", "mlp.lin"))(state), **{"prompt_encoder.x": ONE}
        ),
    ),
    "NaFlexViT": Official(
        arch="naflexvit_base_patch16_gap",
        source="naflexvit.py, checkpoint_filter_fn",
        back=naflex,
        arguments=SMALL_VIT,
        size=64,
    ),
    "BEiT": Official(
        arch="beit_base_patch16_224",
        source="beit.py, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        back=lambda state: {"model": with_tables(state, "relative_position_index", "relative_position_bias_table")},
    ),
    "BEiT v2": Official(
        arch="beitv2_base_patch16_224",
        source="beit.py, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        back=lambda state: {
            "module": with_tables(state, "relative_position_index", "relative_position_bias_table")
            | {"mask_token": ONE}
        },
    ),
    "EVA-02": Official(
        arch="eva02_tiny_patch14_224",
        source=f"{EVA}, checkpoint_filter_fn",
        arguments=SMALL_EVA,
        size=56,
        back=lambda state: {
            "module": renamed(
                (r"mlp\.fc1_g", "mlp.w1"),
                (r"mlp\.fc1_x", "mlp.w2"),
                (r"mlp\.fc2", "mlp.w3"),
                (r"mlp\.norm", "mlp.ffn_ln"),
            )(state)
            | {"rope.freqs_cos": ONE, "rope.freqs_sin": ONE}
        },
    ),
    "EVA-02, masked images": Official(
        arch="eva02_tiny_patch14_224",
        source=f"{EVA}, checkpoint_filter_fn",
        arguments=SMALL_EVA,
        size=56,
        head=False,
        back=lambda state: {
            "model": {key.replace("fc_norm", "norm"): tensor for key, tensor in state.items()}
            | {"mask_token": ONE, "lm_head.weight": ONE}
        },
    ),
    "EVA-CLIP": Official(
        arch="eva02_base_patch16_clip_224",
        source=f"{EVA}, checkpoint_filter_fn",
        arguments=SMALL_EVA,
        size=64,
        head=False,
        back=lambda state: under(
            "visual.",
            renamed(
                (r"mlp\.fc1_g", "mlp.w1"),
                (r"mlp\.fc1_x", "mlp.w2"),
                (r"mlp\.fc2", "mlp.w3"),
                (r"mlp\.norm", "mlp.ffn_ln"),
                (r"attn\.norm", "attn.inner_attn_ln"),
                (r"q_proj\.bias", "q_bias"),
                (r"v_proj\.bias", "v_bias"),
            )(state),
            logit_scale=ONE,
        ),
    ),
    "DINOv3": Official(
        arch="vit_small_patch16_dinov3",
        source=f"{EVA}, checkpoint_filter_fn",
        back=dinov3,
        arguments=SMALL_EVA,
        head=False,
    ),
    "Perception Encoder": Official(
        arch="vit_pe_spatial_tiny_patch16_512",
        source=f"{EVA}, _convert_pe",
        back=perception_encoder,
        arguments=SMALL_EVA,
        size=64,
        head=False,
    ),
    "Perception Encoder, layer scale": Official(
        arch="vit_pe_lang_large_patch14_448",
        source=f"{EVA}, _convert_pe",
        back=perception_encoder,
        arguments=SMALL_EVA,
        size=56,
        head=False,
    ),
    "Sapiens 2": Official(
        arch="vit_base_patch16_sapiens2",
        source=f"{EVA}, checkpoint_filter_fn",
        back=SAPIENS,
        arguments={**SMALL_EVA, "num_kv_heads": [2]},
        size=64,
        head=False,
    ),
    "ConvNeXt": Official(
        arch="test_convnext", source="convnext.py, checkpoint_filter_fn", back=lambda state: {"model": CONVNEXT(state)}
    ),
    "ConvNeXt in OpenCLIP": Official(
        arch="test_convnext",
        source="convnext.py, checkpoint_filter_fn",
        head=False,
        back=lambda state: under("visual.trunk.", state, **{"visual.head.proj.weight": torch.ones(3, 64)}),
    ),
    "ConvNeXt V2": Official(
        arch="convnextv2_atto",
        source="convnext.py, checkpoint_filter_fn",
        back=fcmae,
        arguments={"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    ),
    "EdgeNeXt": Official(
        arch="edgenext_xx_small",
        source="edgenext.py, checkpoint_filter_fn",
        back=lambda state: {"model_ema": CONVNEXT(state)},
    ),
    "Swin": Official(
        arch="swin_tiny_patch4_window7_224",
        source="swin_transformer.py, checkpoint_filter_fn",
        arguments={"embed_dim": 24, "depths": [2, 1, 1, 1]},
        back=lambda state: swin(state, "relative_position_index"),
    ),
    "Swin V2": Official(
        arch="swinv2_tiny_window8_256",
        source="swin_transformer_v2.py, checkpoint_filter_fn",
        arguments={"embed_dim": 24, "depths": [2, 1, 1, 1]},
        back=lambda state: swin(state, "relative_position_index", "relative_coords_table"),
    ),
    "Swin V2 by Christoph Reich": Official(
        arch="swinv2_cr_tiny_224",
        source="swin_transformer_v2_cr.py, checkpoint_filter_fn",
        arguments={"embed_dim": 24, "depths": [1, 1, 1, 1]},
        back=lambda state: {
            key.replace("logit_scale", "tau").replace("head.fc.", "head."): (-t).exp() if "logit_scale" in key else t
            for key, t in state.items()
        },
    ),
    "MaxViT": Official(
        arch="test_coatnet",
        source="maxxvit.py, checkpoint_filter_fn",
        back=lambda state: {key: t[..., 0, 0] if t.shape[2:] == (1, 1) else t for key, t in state.items()},
    ),
    "FocalNet": Official(
        arch="focalnet_tiny_srf",
        source="focalnet.py, checkpoint_filter_fn",
        back=lambda state: {"model": FOCALNET(state)},
    ),
    "FocalNet, norms after": Official(
        arch="focalnet_tiny_srf",
        source="focalnet.py, checkpoint_filter_fn",
        back=lambda state: {"model": FOCALNET(state)},
        arguments={"use_post_norm": True, "use_post_norm_in_modulation": True, "layerscale_value": 1e-4},
    ),
    "DaViT": Official(
        arch="davit_tiny",
        source="davit.py, checkpoint_filter_fn",
        arguments={"embed_dims": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "depths": [1, 1, 1, 1]},
        back=lambda state: {"state_dict": DAVIT(state)},
    ),
    "Florence-2": Official(
        arch="davit_base_fl",
        source="davit.py, _convert_florence2",
        head=False,
        arguments={"embed_dims": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "depths": [1, 1, 1, 1]},
        back=lambda state: under(
            "vision_tower.",
            FLORENCE({key: t for key, t in state.items() if not key.startswith("head.")}),
            **{"language_model.model.shared.weight": ONE},
        ),
    ),
    "EfficientFormer": Official(
        arch="efficientformer_l1",
        source="efficientformer.py, checkpoint_filter_fn",
        back=EFFICIENTFORMER,
        arguments={"embed_dims": [8, 16, 16, 32], "depths": [1, 1, 1, 2]},
        ordered=True,
    ),
    "FastViT": Official(
        arch="fastvit_t8",
        source="fastvit.py, checkpoint_filter_fn",
        arguments={"embed_dims": [16, 16, 32, 32], "layers": [1, 1, 1, 1]},
        back=lambda state: {"state_dict": FASTVIT(state)},
    ),
    "MobileCLIP": Official(
        arch="fastvit_mci0",
        source="fastvit.py, checkpoint_filter_fn",
        head=False,
        arguments={"embed_dims": [16, 16, 32, 32], "layers": [1, 1, 1, 1]},
        back=lambda state: under("image_encoder.model.", FASTVIT(state), **{"text_encoder.projection_layer": ONE}),
    ),
    "Hiera": Official(
        arch="hiera_tiny_224",
        source="hiera.py, checkpoint_filter_fn",
        arguments={"embed_dim": 16, "stages": [1, 1, 1, 1]},
        back=lambda state: {"model_state": renamed((r"^head\.fc", "head.projection"), (r"^head\.norm", "norm"))(state)},
    ),
    "Hiera, masked images": Official(
        arch="hiera_tiny_224",
        source="hiera.py, checkpoint_filter_fn",
        arguments={"embed_dim": 16, "stages": [1, 1, 1, 1]},
        head=False,
        back=lambda state: {
            "model_state": renamed((r"^head\.norm", "encoder_norm"))(state)
            | {"mask_token": ONE, "decoder_norm.weight": ONE}
        },
    ),
    "Segment Anything 2": Official(
        arch="sam2_hiera_tiny",
        source="hieradet_sam2.py, checkpoint_filter_fn",
        head=False,
        arguments={"embed_dim": 16},
        back=lambda state: {
            "model": under(
                "image_encoder.trunk.",
                renamed((r"mlp\.fc1", "mlp.layers.0"), (r"mlp\.fc2", "mlp.layers.1"))(
                    {key: t for key, t in state.items() if not key.startswith("head.")}
                ),
                **{"memory_encoder.x": ONE},
            )
        },
    ),
    "MViTv2": Official(arch="mvitv2_tiny", source="mvitv2.py, checkpoint_filter_fn", back=mvit((1, 2, 5, 2))),
    "PVTv2": Official(
        arch="pvt_v2_b0",
        source="pvt_v2.py, checkpoint_filter_fn",
        back=PVT,
        arguments={"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16, 32], "num_heads": [1, 2, 2, 2]},
    ),
    "XCiT": Official(
        arch="xcit_nano_12_p16_224",
        source="xcit.py, checkpoint_filter_fn",
        back=xcit,
        arguments={"depth": 1, "embed_dim": 32},
        size=64,
    ),
    "CaiT": Official(
        arch="cait_xxs24_224",
        source="cait.py, checkpoint_filter_fn",
        arguments=SMALL_VIT,
        size=64,
        back=lambda state: {"model": under("module.", state)},
    ),
    "CoaT": Official(
        arch="coat_lite_tiny",
        source="coat.py, checkpoint_filter_fn",
        arguments={"embed_dims": [16, 16, 32, 32], "serial_depths": [1, 1, 1, 1]},
        back=lambda state: {"model": state | {"norm1.weight": ONE, "norm1.bias": ONE}},
    ),
    "CrossViT": Official(
        arch="crossvit_tiny_240",
        source="crossvit.py, pretrained_filter_fn",
        arguments={"embed_dim": [16, 32], "num_heads": [2, 2]},
        back=renamed((r"^(pos_embed|cls_token)_(\d)", r"\1.\2")),
    ),
    "LeViT": Official(
        arch="levit_128s",
        source="levit.py, checkpoint_filter_fn",
        back=lambda state: {"model": with_tables(state, "attention_bias_idxs", "attention_biases")},
    ),
    "TinyViT": Official(
        arch="tiny_vit_5m_224",
        source="tiny_vit.py, checkpoint_filter_fn",
        arguments={"embed_dims": [16, 16, 32, 32], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]},
        back=lambda state: {"model": with_tables(state, "attention_bias_idxs", "attention_biases")},
    ),
    "EfficientViT of MSRA": Official(
        arch="efficientvit_m0",
        source="efficientvit_msra.py, checkpoint_filter_fn",
        back=lambda state: {"model": with_tables(state, "attention_bias_idxs", "attention_biases")},
    ),
    "EfficientViM": Official(
        arch="efficientvim_m1",
        source="efficientvim.py, checkpoint_filter_fn",
        arguments={"embed_dim": [16, 16, 32], "depths": [1, 1, 1]},
        back=lambda state: {
            "model": {
                key: t[None, :, None]
                if key.endswith("norm.weight") and t.ndim == 1 and key.replace("weight", "running_mean") not in state
                else t
                for key, t in state.items()
            }
        },
    ),
    "PoolFormer": Official(arch="poolformer_s12", source="metaformer.py, checkpoint_filter_fn", back=POOLFORMER),
    "CAFormer": Official(arch="caformer_s18", source="metaformer.py, checkpoint_filter_fn", back=CAFORMER),
    "MambaOut": Official(
        arch="mambaout_femto",
        source="mambaout.py, checkpoint_filter_fn",
        arguments={"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
        back=lambda state: {"model": MAMBAOUT(state)},
    ),
    "ResMLP": Official(arch="resmlp_12_224", source="mlp_mixer.py, checkpoint_filter_fn", back=resmlp),
    "NextViT": Official(arch="nextvit_small", source="nextvit.py, checkpoint_filter_fn", back=by_order, ordered=True),
    "PiT": Official(
        arch="pit_ti_224",
        source="pit.py, checkpoint_filter_fn",
        back=renamed((r"^transformers\.(\d)\.pool\.", lambda found: f"pools.{int(found[1]) - 1}.")),
    ),
    "RDNet": Official(
        arch="rdnet_tiny", source="rdnet.py, checkpoint_filter_fn", back=renamed((r"^stem\.", "stem.stem."))
    ),
    "RegNet of torchvision": Official(arch="regnety_002", source="regnet.py, _filter_fn", back=TORCHVISION_REGNET),
    "RegNet, SEER": Official(arch="regnety_002", source="regnet.py, _filter_fn", back=seer),
    "ResNet of CLIP": Official(
        arch="resnet50_clip", source="byobnet.py, _convert_openai_clip", back=clip_resnet, head=False
    ),
    "Sequencer": Official(
        arch="sequencer2d_s",
        source="sequencer.py, checkpoint_filter_fn",
        back=SEQUENCER,
        arguments={"layers": [1, 1, 1, 1]},
    ),
    "SwiftFormer": Official(
        arch="swiftformer_xs",
        source="swiftformer.py, checkpoint_filter_fn",
        back=lambda state: {"model": SWIFTFORMER(state)},
    ),
    "TNT": Official(
        arch="tnt_s_legacy_patch16_224",
        source="tnt.py, checkpoint_filter_fn",
        back=TNT,
        arguments={"depth": 1, "embed_dim": 32, "inner_dim": 16, "num_heads_outer": 2},
        size=64,
    ),
    "TNT, later": Official(
        arch="tnt_s_patch16_224",
        source="tnt.py, checkpoint_filter_fn",
        arguments={"depth": 1, "embed_dim": 32, "inner_dim": 16, "num_heads_outer": 2},
        size=64,
        back=lambda state: TNT(
            {key: t.flatten(2).permute(0, 2, 1) if key == "pixel_pos" else t for key, t in state.items()}
        ),
    ),
    "TResNet": Official(
        arch="tresnet_m",
        source="tresnet.py, checkpoint_filter_fn",
        back=lambda state: {
            "model": TRESNET({key: t - 1e-5 if key.endswith("bn.weight") else t for key, t in state.items()})
        },
    ),
    "VGG": Official(arch="vgg11", source="vgg.py, _filter_fn", back=vgg),
    "DenseNet": Official(
        arch="densenet121",
        source="densenet.py, _filter_torchvision_pretrained",
        back=densenet,
        arguments={"growth_rate": 8, "block_config": [1, 1, 1, 1]},
    ),
    "CSPNeXt of OpenMMLab": Official(
        arch="cspnext_tiny",
        source="cspnext.py, checkpoint_filter_fn",
        head=False,
        back=lambda state: {"state_dict": under("backbone.", renamed((r"^stages\.(\d)", more_of_stage))(state))},
    ),
    "CPUBone": Official(arch="cpubone_nano", source="cpubone.py, remap_legacy_state_dict", back=CPUBONE),
    "LowFormer": Official(
        arch="lowformer_b0",
        source="lowformer.py, checkpoint_filter_fn",
        back=lambda state: {"state_dict": LOWFORMER(state)},
    ),
    "iFormer": Official(
        arch="iformer_t", source="iformer.py, checkpoint_filter_fn", back=lambda state: {"model": IFORMER(state)}
    ),
    "GhostNetV3": Official(
        arch="ghostnetv3_100",
        source="ghostnet.py, checkpoint_filter_fn",
        back=renamed((r"(\.ghost.*|\.dw_rpr_.*)bn1\.", r"\1bn.")),
    ),
    "MobileNetV5 in Gemma 3n": Official(
        arch="mobilenetv5_base",
        source="mobilenetv5.py, checkpoint_filter_fn",
        head=False,
        back=lambda state: under("model.vision_tower.timm_model.", state, **{"model.language_model.norm.weight": ONE}),
    ),
    "Gemma 4": Official(
        arch="gemma4_vit_167m",
        source="gemma4_vit.py, checkpoint_filter_fn_classifier",
        back=gemma,
        size=96,
        head=False,
        arguments={
            "depth": 1,
            "embed_dim": 32,
            "num_heads": 2,
            "head_dim": 16,
            "intermediate_size": 32,
            "final_norm": False,
        },
    ),
    "Qwen 3.5": Official(
        arch="qwen3_vit_88m",
        source="qwen3_vit.py, checkpoint_filter_fn_classifier",
        back=qwen,
        size=64,
        head=False,
        arguments={**SMALL_VIT, "final_norm": False},
    ),
    "DeepSeek": Official(
        arch="deepseek_vit_412m",
        source="deepseek_vit.py, checkpoint_filter_fn_classifier",
        back=deepseek,
        size=84,
        head=False,
        arguments={**SMALL_VIT, "final_norm": False},
    ),
    "CSATv2": Official(arch="csatv2", source="csatv2.py, checkpoint_filter_fn", back=csat),
    "ResNet of torchvision": Official(arch="resnet18", source="resnet.py, the names of torchvision", back=official),
    "MoCo": Official(
        arch="resnet18",
        source="resnet.py, the names of torchvision",
        head=False,
        weights_key="module.encoder_q",
        back=lambda state: {
            "state_dict": under(
                "module.encoder_q.", state, **{"module.encoder_q.fc.0.weight": torch.ones(2, 2), "module.queue": ONE}
            )
            | under("module.encoder_k.", {key: t + 1 for key, t in state.items()})
        },
    ),
    "RepViT": Official(
        arch="repvit_m0_9", source="repvit.py, the names of THU-MIG/RepViT", back=lambda state: {"model": state}
    ),
    "InceptionNeXt": Official(
        arch="inception_next_atto",
        source="inception_next.py, the names of sail-sg/inceptionnext",
        back=lambda state: {"state_dict": state},
    ),
    "Twins": Official(
        arch="twins_svt_small",
        source="twins.py, the names of Meituan-AutoML/Twins",
        back=official,
        arguments={"embed_dims": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "depths": [1, 1, 1, 1]},
    ),
    "ViTamin in OpenCLIP": Official(
        arch="vitamin_small_224",
        source=f"{VIT}, checkpoint_filter_fn",
        head=False,
        arguments={"depth": 1},
        back=lambda state: under("visual.trunk.", state, logit_scale=ONE),
    ),
}


def flat(content: Mapping[str, Any]) -> State:
    """Return the tensors in the only container of a file."""
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    return flat(inner[0]) if inner else {key: tensor.contiguous().clone() for key, tensor in content.items()}


def read(official: Official, folder: Path, prefix: str | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the maps of all stages twice: of an official file read by featcli, and of the model with its weights.

    With a prefix before its names, the file is a safetensors file without containers, unless the order of names must be
    kept. Undecided tensors are allowed.
    """
    model = official.model()
    content = official.back(model.state_dict())
    if prefix is None or official.ordered:
        file = folder / "w.pth"
        torch.save(content if prefix is None else under(prefix, flat(content)), file)
    else:
        file = folder / "w.safetensors"
        save_file(under(prefix, flat(content)), file)
    backbone = load_backbone(file, **official.options(), out_indices="all")
    pixels = torch.randn(1, 3, *backbone.settings["input_size"])
    with torch.no_grad():
        expected = model.forward_intermediates(pixels, norm=False, output_fmt="NCHW", intermediates_only=True)
        return list(backbone.network.maps(pixels)), list(expected)
