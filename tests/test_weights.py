"""Check that weights are proven: what was loaded, what is missing, what is not needed, and from which bytes."""

import hashlib
import json

import pytest
import safetensors.torch
import timm
import torch
from tiny_transformers import PYRAMID, TOKENS

from conftest import SAMPLES
from featcli import extract, load_backbone, open_dump
from featcli.backbones.weights import read_weights, tensors_in
from featcli.errors import CheckpointError

T = pytest.importorskip("transformers")
RESNET = PYRAMID | {"hidden_sizes": [16, 32, 32, 64], "embedding_size": 16}


def saved(make, folder):
    """Save a model with weights of a seed, and an image processor, to a folder."""
    torch.manual_seed(0)
    make().save_pretrained(folder)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def resnet(tmp_path):
    """Save a ResNet classifier of transformers."""
    return saved(lambda: T.ResNetForImageClassification(T.ResNetConfig(**RESNET, num_labels=3)), tmp_path / "resnet")


@pytest.fixture
def detr(tmp_path):
    """Save a DETR with a timm backbone inside."""
    backbone = T.TimmBackboneConfig(backbone="test_resnet", out_indices=[4])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    return saved(lambda: T.DetrForObjectDetection(T.DetrConfig(**sizes, backbone_config=backbone)), tmp_path / "detr")


@pytest.fixture
def vit(tmp_path):
    """Save a ViT classifier of transformers."""
    return saved(
        lambda: T.ViTForImageClassification(T.ViTConfig(**TOKENS, image_size=64, num_labels=3)), tmp_path / "vit"
    )


@pytest.fixture
def timm_folder(tmp_path):
    """Save a folder as timm saves it for the hub."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    return tmp_path / "timm"


@pytest.fixture
def timm_file(tmp_path):
    """Save a bare weights file."""
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    safetensors.torch.save_file(
        {f"backbone.{k}": v for k, v in state.items()} | {"x": torch.ones(1)}, tmp_path / "w.safetensors"
    )
    return tmp_path / "w.safetensors"


FOLDERS = ["resnet", "detr", "vit", "timm_folder", "timm_file"]

# A tensor of the last stage, as the file names it and as the backbone does.
RESNET_LAST = "encoder.stages.3.layers.0.shortcut.convolution.weight"
LAST = {
    "resnet": (f"resnet.{RESNET_LAST}", RESNET_LAST),
    "detr": ("model.backbone.conv_encoder.model.layer4.0.conv1.weight", "layer4.0.conv1.weight"),
    "vit": ("vit.encoder.layer.2.output.dense.weight", "layers.2.mlp.fc2.weight"),
    "timm": ("blocks.5.mlp.fc2.weight", "blocks.5.mlp.fc2.weight"),
    "w.safetensors": ("backbone.blocks.5.mlp.fc2.weight", "blocks.5.mlp.fc2.weight"),
}


def options(path):
    return {"arch": "test_vit"} if path.is_file() else {}


def rewrite(path, change):
    """Change the tensors of a checkpoint's only safetensors file."""
    file = path if path.is_file() else path / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture(params=FOLDERS)
def checkpoint(request):
    return request.getfixturevalue(request.param)


def test_the_report(checkpoint):
    """For every source the report says how many tensors matched, that none is missing, and what is not needed."""
    weights = load_backbone(checkpoint, out_indices="all", **options(checkpoint)).weights
    assert weights.matched == weights.total > 0
    assert weights.missing == ()
    if checkpoint.name == "timm":
        assert weights.unexpected == ()  # timm removes the head itself
        return
    expected = {"resnet": "classifier.1.weight", "detr": "class_labels_classifier.bias", "vit": "classifier.bias"}
    assert expected.get(checkpoint.name, "x") in weights.unexpected
    assert f"{len(weights.unexpected)} of no use here" in weights.summary()


def test_files_are_hashed(checkpoint, tmp_path):
    """The plan and the manifest hold the SHA-256 of every weights file, as `sha256sum` and the hub show it."""
    extract([str(SAMPLES / "nature" / "sea.jpg")], checkpoint=checkpoint, output=tmp_path / "d", **options(checkpoint))
    file = checkpoint if checkpoint.is_file() else checkpoint / "model.safetensors"
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert open_dump(tmp_path / "d").plan.provenance["weights_files"] == expected
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["provenance"]["weights_files"] == expected


def test_nan_is_refused(checkpoint):
    """A checkpoint with NaN from a training that diverged is refused, and the message names a tensor."""
    rewrite(checkpoint, lambda tensors: {k: v * torch.nan if v.is_floating_point() else v for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match="of its weights are NaN or infinite"):
        load_backbone(checkpoint, **options(checkpoint))


def test_infinity_is_refused(checkpoint):
    """One infinite parameter is refused, because it makes every map NaN."""
    name = LAST[checkpoint.name][0]
    rewrite(checkpoint, lambda tensors: tensors | {name: torch.full_like(tensors[name], torch.inf)})
    with pytest.raises(CheckpointError, match="1 of its weights are NaN or infinite"):
        load_backbone(checkpoint, **options(checkpoint))


def test_an_absent_tensor_is_refused(checkpoint):
    """A checkpoint that lacks one tensor of the backbone is refused with its name."""
    on_disk, in_memory = LAST[checkpoint.name]
    rewrite(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if k != on_disk})
    with pytest.raises(CheckpointError, match=r"it lacks 1 of the ") as refused:
        load_backbone(checkpoint, out_indices="all", **options(checkpoint))
    assert refused.value.message.endswith(f"first {in_memory}")


def test_whole_numbers_are_refused(checkpoint):
    """A quantised tensor is refused by its name, because its values would be taken for weights."""
    name = LAST[checkpoint.name][0]
    rewrite(checkpoint, lambda tensors: tensors | {name: (100 * tensors[name]).to(torch.int8)})
    with pytest.raises(CheckpointError, match="1 of its weights are not floating-point numbers") as refused:
        load_backbone(checkpoint, **options(checkpoint))
    assert "quantised" in refused.value.hint


def test_an_adapter_is_refused(vit):
    """A folder with an adapter of PEFT is refused, with PEFT or without, because maps would depend on that."""
    (vit / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(CheckpointError, match="weights of PEFT that are not merged") as refused:
        load_backbone(vit)
    assert "merge_and_unload" in refused.value.hint


def test_fitted_positions_are_said(tmp_path):
    """Positions that timm resamples from another grid are named in the line about weights."""
    model = timm.create_model("test_vit", img_size=224)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    weights = load_backbone(tmp_path / "w.pth", arch="test_vit").weights
    assert weights.resized == ("pos_embed",)
    assert "1 of another size there, which the library fitted to this input (pos_embed)" in weights.summary()


def test_the_content_of_a_file_counts(tmp_path):
    """A safetensors file, or one of torch.save, is read as such whatever its name ends in."""
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "w.pth")
    torch.save({"b": torch.ones(2)}, tmp_path / "w.safetensors")
    for name, key in (("w.pth", "a"), ("w.safetensors", "b")):
        assert torch.equal(read_weights([tmp_path / name])[1][key], torch.ones(2))
        assert tensors_in([tmp_path / name]) == {key: True}


def test_a_key_within_the_container_that_is_taken(tmp_path):
    """A weights key names a container, or else a prefix in the container that is taken without a key."""
    torch.save({"state_dict": {"a.x": torch.ones(1), "b.x": torch.zeros(1)}}, tmp_path / "w.pth")
    for key in ("a", "state_dict.a"):
        assert read_weights([tmp_path / "w.pth"], key) == ("state_dict.a", {"x": torch.ones(1)})


@pytest.mark.parametrize("name", ["pytorch_model.pth", "other.safetensors"])
def test_the_file_that_timm_chose_is_hashed(timm_folder, name):
    """Of several weights files in a timm folder, the one that timm reads is named and hashed."""
    tensors = safetensors.torch.load_file(timm_folder / "model.safetensors")
    (timm_folder / "model.safetensors").unlink()
    (torch.save if name.endswith(".pth") else safetensors.torch.save_file)(tensors, timm_folder / name)
    if name.endswith(".pth"):  # timm takes this one first
        torch.save({}, timm_folder / "open_clip_pytorch_model.bin")
    expected = {name: hashlib.sha256((timm_folder / name).read_bytes()).hexdigest()}
    assert load_backbone(timm_folder).weights.files == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "nope", "names an architecture that this timm lacks"),
        ("interpolation", "nope", "its preprocessing cannot be followed"),
        ("std", [0, 1, 1], "standard deviations, 0, 1, 1"),
    ],
)
def test_a_damaged_configuration_of_timm(timm_folder, field, value, message):
    """A config.json with names that timm lacks, or values that make every map infinite, is refused in a sentence."""
    path = timm_folder / "config.json"
    config = json.loads(path.read_text())
    (config if field in config else config["pretrained_cfg"])[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(timm_folder)


def test_a_truncated_file_is_refused(checkpoint):
    """Half a file is refused."""
    file = checkpoint if checkpoint.is_file() else checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError) as refused:
        load_backbone(checkpoint, **options(checkpoint))
    assert "\n" not in refused.value.message


def test_half_precision_weights_are_computed_in_full(checkpoint):
    """fp16 weights give the maps of the same values in fp32."""
    rewrite(checkpoint, lambda tensors: {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()})
    half = load_backbone(checkpoint, **options(checkpoint))
    rewrite(checkpoint, lambda tensors: {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    full = load_backbone(checkpoint, **options(checkpoint))
    pixels = torch.randint(0, 256, (2, 3, *full.preprocessing.size), dtype=torch.uint8)
    for name, maps in full(pixels).items():
        assert torch.equal(half(pixels)[name], maps)
        assert half(pixels)[name].dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet", "detr", "vit"])
@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards"])
def test_other_files_of_a_folder(request, name, kind):
    """Several safetensors files with an index, a pytorch_model.bin, and several of those give the same weights."""
    folder = request.getfixturevalue(name)
    whole = load_backbone(folder, out_indices="all")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if "shards" in kind else [names]
    stem, suffix, save = (
        ("pytorch_model", "bin", torch.save)
        if "bin" in kind
        else ("model", "safetensors", lambda t, f: safetensors.torch.save_file(t, f, metadata={"format": "pt"}))
    )
    files = [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)] if "shards" in kind else [f"{stem}.{suffix}"]
    for part, file in zip(parts, files, strict=True):
        save({key: tensors[key] for key in part}, folder / file)
    if "shards" in kind:
        weight_map = {key: file for part, file in zip(parts, files, strict=True) for key in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    again = load_backbone(folder, out_indices="all")
    assert again.digest == whole.digest
    assert sorted(again.weights.files) == files


def test_an_index_that_names_no_files(detr):
    """A damaged index is refused by name."""
    (detr / "model.safetensors").rename(detr / "model-00001-of-00002.safetensors")
    (detr / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an index"):
        load_backbone(detr)


@pytest.mark.parametrize("name", ["detr", "vit"])
def test_a_shard_that_is_gone(request, name):
    """An index that names a missing file is refused, with the name of the file."""
    folder = request.getfixturevalue(name)
    (folder / "model.safetensors").unlink()
    weight_map = {"some.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"'model-00001-of-00001.safetensors', which is not there"):
        load_backbone(folder)
