"""Check every stage of every model type in transformers' AutoBackbone mapping that can be built here."""

import pytest
import torch
from tiny_transformers import TINY, randomize, refuse_wrong_places

from conftest import SAMPLES, upright
from featcli import load_backbone
from featcli.backbones.checkpoint import resolve
from featcli.errors import CheckpointError, UsageError
from featcli.spec.groups import CheckpointSpec

transformers = pytest.importorskip("transformers")
MAPPING = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
NAMES = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES

PICTURES = [upright(path) for path in sorted(SAMPLES.rglob("*.jpg"))[:2]]
# Types whose maps come from modules that are no plain list. benchmarks/conformance.py tries all.
PLACES = ("beit", "dinov3_convnext", "focalnet", "hiera", "lw_detr_vit", "maskformer-swin", "pvt_v2", "swin")
# Types that only `make sweep` tries, because another type here is built in the same way.
SWEPT = {"convnextv2", "dinov3_convnext", "maskformer-swin", "pixio", "pp_lcnet_v3", "pp_lcnet_v4", "rt_detr_resnet"}
# Types of the mapping that are not in TINY, with the reason.
ELSEWHERE = {"dinat": "needs natten", "timm_backbone": "a timm model in other clothes", "tipsv2": "a text model too"}


def configured(model_type):
    config = transformers.CONFIG_MAPPING[model_type](**TINY[model_type])
    for name in ("hidden_sizes", "depths"):  # tuples as defaults break some backbones of transformers itself
        if isinstance(getattr(config, name, None), tuple):
            setattr(config, name, list(getattr(config, name)))
    first = 1 if model_type == "maskformer-swin" else 0  # it names a stem and refuses to give it
    config.out_features = config.stage_names[first:]
    return config


def save(model_type, folder):
    """Save a checkpoint with every parameter random, also norms and biases, so that none looks like another."""
    torch.manual_seed(0)
    config = configured(model_type)
    model = randomize(MAPPING[type(config)](config))
    model.save_pretrained(folder)
    size = getattr(config, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    transformers.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return config.out_features


def as_map(found, size, patch):
    """Return a feature map from what the library gives: vitpose leaves its patches in a row."""
    if found.ndim == 4:
        return found
    height, width = size[0] // patch[0], size[1] // patch[1]
    return found.reshape(len(found), height, width, -1).permute(0, 3, 1, 2)


def reference(model_type, folder, pixels):
    """Return what transformers' own backbone gives at all of its stages."""
    config = configured(model_type)
    model = MAPPING[type(config)].from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        found = model(pixels).feature_maps
    return [as_map(maps, pixels.shape[2:], getattr(config, "patch_size", None)) for maps in found]


@pytest.mark.parametrize("model_type", [model_type for model_type in TINY if model_type not in SWEPT])
def test_every_stage_of_every_type(tmp_path, model_type):
    """A backbone, whole or cut in the middle, equals transformers' own bit for bit; `make sweep` cuts more."""
    stages = save(model_type, tmp_path)
    config = configured(model_type)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = reference(model_type, tmp_path, processor(PICTURES, return_tensors="pt").pixel_values)
    source = resolve(CheckpointSpec(checkpoint=str(tmp_path)))
    assert [stage.name for stage in source.stages] == stages
    assert [stage.index for stage in source.stages] == [config.stage_names.index(stage) for stage in stages]
    assert [stage.shape for stage in source.stages] == [tuple(maps.shape[1:]) for maps in expected]
    middle = source.stages[(len(stages) - 1) // 2]
    for chosen in (source.stages, [middle]):
        backbone = load_backbone(str(tmp_path), out_indices=[stage.index for stage in chosen])
        found = backbone(torch.stack([backbone.preprocess(picture) for picture in PICTURES]))
        for stage in chosen:
            assert torch.equal(found[stage.name], expected[source.stages.index(stage)]), stage


@pytest.mark.parametrize("model_type", PLACES)
def test_the_module_of_a_stage_gives_its_map(model_type):
    """A hook on the module that is named for a stage sees the values of its raw map.

    The map may have them in another order, and lack those of no patch; the input is a place with its own name.
    """
    refuse_wrong_places(resolve(CheckpointSpec(checkpoint=configured(model_type))))


def test_every_type_of_the_mapping_is_known():
    """A new type in transformers' mapping fails here until it is tested, or has a reason not to be."""
    assert set(NAMES) == set(TINY) | set(ELSEWHERE)


def test_a_stem_that_is_refused(tmp_path):
    """The stem that MaskFormer's Swin names and refuses is not offered, and indices stay the library's."""
    save("maskformer-swin", tmp_path)
    backbone = load_backbone(str(tmp_path), out_indices=[1, -1])
    assert [(stage.index, stage.name) for stage in backbone.selected] == [(1, "stage1"), (4, "stage4")]
    with pytest.raises(UsageError, match="stage index 0 is out of range"):
        load_backbone(str(tmp_path), out_indices=[0])


def test_a_type_that_needs_more(tmp_path):
    """dinat, which needs natten, is refused with that name."""
    transformers.DinatConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="natten"):
        load_backbone(str(tmp_path))


def test_arguments_leave_the_chosen_stages_chosen():
    """Stages that a configuration chooses stay chosen with --model-arg if they exist, and the last stays the last."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28}

    def chosen(stages, **arguments):
        config = transformers.Dinov2Config(**sizes, out_features=stages)
        return load_backbone(config, model_arg=arguments).out_features

    assert chosen(["stage1", "stage2"], drop_path_rate=0.3) == ["stage1", "stage2"]
    assert chosen(["stage1", "stage3"], num_hidden_layers=2) == ["stage1"]
    assert chosen(["stage3"], num_hidden_layers=2) == ["stage2"]
    assert chosen(["stage4"], num_hidden_layers=5) == ["stage5"]


def test_a_pyramid_of_four_stages_is_no_stage():
    """A BEiT whose maps are each made from four stages is refused, with the argument that gives the stages."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BeitConfig(**sizes, image_size=64, out_indices=[1, 2, 3, 4], add_fpn=True)
    with pytest.raises(CheckpointError, match="with add_fpn it gives a pyramid"):
        load_backbone(config)
    backbone = load_backbone(config, model_arg={"add_fpn": False})
    assert backbone.out_features == ["stage1", "stage2", "stage3", "stage4"]
