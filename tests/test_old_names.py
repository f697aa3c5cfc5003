"""Check folders with older tensor names of transformers: they give the same maps and the same refusals as new ones."""

import inspect
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hidden_states import TYPES
from tiny_transformers import TINY, randomize

from featcli import load_backbone
from featcli.backbones.internals import backbone_classes, vision_class
from featcli.errors import CheckpointError

T = pytest.importorskip("transformers")
from old_names import OLD, read, write  # noqa: E402 (they are made of transformers)
from transformers import conversion_mapping, core_model_loading  # noqa: E402

# These are cheap and differ from each other. benchmarks/key_names.py reads all.
CHEAP = (
    "ViT, classes", "BEiT, a backbone", "DINOv2", "DINOv3, ConvNeXt", "RADIO",
    "Swin, a backbone", "CLIP, images", "LW-DETR", "RF-DETR",
)  # fmt: skip
# Entries of transformers' table that name a class or type which sees pictures, and that no folder in OLD needs.
NO_FOLDER = {
    "names of the decoder, the neck, the head or the text alone": (
        "MaskFormerDetrDecoder d_fine maskformer rt_detr rt_detr_v2 pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4"
        " NemotronH_Omni_Reasoning_V3 UltraVBertForMaskedLM"
        " tipsv2_dpt Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation"
    ),
    "a video, packed pictures, or a tower that has no class of its own: refused in words": (
        "Siglip2VisionModel VivitModel dots3_note_vision_encoder videomae xCLIPVisionModel"
        " cosmos3_edge cosmos3_omni deepseek_ocr2 ernie4_5_vl_moe glm4v_moe glm5_next hunyuan_vl"
        " hyperclovax_vision_v2 inkling2 inkling_mm_model kimi_k25 minimax_m3_vl mistral_large4 molmo2 paddleocr_vl"
        " qwen3_omni_moe_thinker qwen3_vl_moe step3p7 unlimited_ocr UnlimitedOcrSamVisionEncoder"
        " UnlimitedOcrVisionEncoder hy_v4_vl inkling2_loop"
    ),
    "the tower's names stay as they are below a prefix, which is found by itself as LLaVA's": (
        "AriaModel AyaVisionModel Dots3NoteForConditionalGeneration Dots3NoteModel Gemma3Model GotOcr2Model"
        " InternVLModel LlavaNextModel LlavaNextVideoModel LlavaOnevisionModel Mistral3Model MllamaModel"
        " PPChart2TableModel PaliGemmaModel Qwen2VLForConditionalGeneration Qwen2VLModel"
        " Qwen2_5OmniThinkerForConditionalGeneration Qwen2_5OmniThinkerModel Qwen2_5_VLForConditionalGeneration"
        " Qwen2_5_VLModel Qwen3OmniMoeThinkerForConditionalGeneration Qwen3OmniMoeThinkerModel VideoLlavaModel"
        " VipLlavaModel aria aya_vision gemma3 gemma4_unified got_ocr2 internvl llava_next llava_next_video"
        " llava_onevision mistral3 mllama paligemma pp_chart2table qwen2_5_omni_thinker shieldgemma2 sam3_tracker"
        " sam3_tracker_video t5gemma2_encoder video_llava vipllava"
    ),
    "the table of the whole model takes tensors of its tower apart, which is out of reach: refused by name": (
        "qianfan_ocr"
    ),
    "featcli reads them with timm, under any prefix": "timm_wrapper",
}


@pytest.mark.parametrize("name", CHEAP)
def test_old_names(tmp_path, name):
    """The maps of all stages, and every tensor, equal those of a folder with new names bit for bit."""
    found = read(OLD[name], tmp_path)
    for one, other in zip(found["before"], found.get("now", found["before"]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "key", "now"),
    [
        ("ViT, classes", "vit.encoder.layer.1.attention.attention.query.weight", "layers.1.attention.q_proj.weight"),
        ("DINOv2", "encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.gate_proj.weight"),
        ("DINOv3, ConvNeXt", "stages.1.layers.0.gamma", "model.stages.1.layers.0.gamma"),
        ("Swin, a backbone", "encoder.layers.0.blocks.0.attention.self.key.bias", "blocks.0.attention.k_proj.bias"),
        ("AltCLIP", "vision_model.encoder.layer.1.mlp.fc1.bias", "encoder.layers.1.mlp.fc1.bias"),
        (
            "RF-DETR", "backbone.0.encoder.encoder.encoder.layer.1.attention.attention.value.bias",
            "encoder.layer.1.attention.v_proj.bias",
        ),
    ],
)  # fmt: skip
def test_old_names_are_proven(tmp_path, name, key, now):
    """A folder with one tensor less, or one more beside it, is refused with its new name."""
    torch.manual_seed(0)
    model = randomize(OLD[name].make())
    state = OLD[name].back(model.state_dict())
    folder = write(model, state, tmp_path / "whole", OLD[name].size)
    load_backbone(folder, out_indices="all")
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"it lacks .*, first \S*{re.escape(now)}"):
        load_backbone(folder, out_indices="all")
    owner, _, _ = key.rpartition(".")
    save_file(tensors | {f"{owner}.gate": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of its tensors have no place in .*\.gate"):
        load_backbone(folder, out_indices="all")


def sees_pictures(entry):
    """Return whether an entry of the table, a type or a class, belongs to a model of pictures."""
    kind = T.CONFIG_MAPPING[entry] if entry in T.CONFIG_MAPPING else None  # noqa: SIM401 (it is filled when asked)
    kind = kind or getattr(getattr(T, entry, None), "config_class", None)
    if kind is None:
        return "Vision" in entry or "Detr" in entry
    parts = {"vision_config", "backbone_config"} & set(getattr(kind, "sub_configs", ()))
    return kind in backbone_classes() or bool(parts) or vision_class(kind.__new__(kind)) is not None


def test_every_renaming_of_transformers_has_a_folder():
    """A new entry in transformers' table for a model of pictures fails here until it has a folder or a reason."""
    table = conversion_mapping._build_checkpoint_conversion_mapping()
    with_folder = {source for old in OLD.values() for source in old.sources}
    without = {entry for entries in NO_FOLDER.values() for entry in entries.split()}
    assert {entry for entry in table if sees_pictures(entry)} - with_folder - without == set()
    assert with_folder <= table.keys()


def test_nothing_that_is_read_has_names_of_tensorflow():
    """No model that is read has `gamma` and `beta` of a LayerNorm, or the two parts of a normed weight."""
    rules = conversion_mapping.get_checkpoint_conversion_mapping("legacy")
    assert {type(rule) for rule in rules} == {core_model_loading.WeightRenaming}
    meant = {target for rule in rules for target in rule.target_patterns} - {"model.language_model"}
    assert meant == {
        "LayerNorm.weight", "LayerNorm.bias", ".parametrizations.weight.original0",
        ".parametrizations.weight.original1",
    }  # fmt: skip
    with torch.device("meta"):
        for name, options in {**TINY, **{name: options for name, (options, _) in TYPES.items()}}.items():
            config = T.CONFIG_MAPPING[name](**options)
            kind = backbone_classes().get(type(config), None) or vision_class(config)
            names = list(kind(config).state_dict()) if inspect.isclass(kind) else []
            assert not [key for key in names if any(part in key for part in meant)], name
