"""Try weights that are not those of the network, each of which must be refused, and honest ones, which must be read.

    python benchmarks/corruption.py

For each of 30 architectures, a checkpoint with its head is written. It is then written again with one tensor more,
less, renamed or of another shape: under a module that runs, which must be refused, and under the head, which must not
matter. Then come checkpoints as the heads and pretraining classes of timm and transformers save them, which must all be
read. It prints a table; the exit code is 1 if a cell is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from featcli import load_backbone
from featcli.backbones.torchvision_operators import import_timm, import_transformers
from featcli.errors import CheckpointError

timm, T = import_timm(), import_transformers()
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # small configurations
_of_backbones, _of_others = import_module("tiny_transformers"), import_module("test_hidden_states")

TIMM = (
    "test_resnet", "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_efficientnet", "test_convnext",
    "test_byobnet", "test_mambaout", "test_nfnet", "resnet18", "mobilenetv3_small_050", "convnext_atto",
    "efficientvit_b0", "levit_128s", "tiny_vit_5m_224", "edgenext_xx_small", "pit_ti_224",
)  # fmt: skip
# Models of transformers with a classification head: model type -> its classifier.
TRANSFORMERS = {
    "resnet": "ResNetForImageClassification", "convnext": "ConvNextForImageClassification",
    "swin": "SwinForImageClassification", "dinov2": "Dinov2ForImageClassification",
    "beit": "BeitForImageClassification", "bit": "BitForImageClassification",
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification",
    "segformer": "SegformerForImageClassification", "regnet": "RegNetForImageClassification",
    "mobilevit": "MobileViTForImageClassification", "poolformer": "PoolFormerForImageClassification",
}  # fmt: skip
ALL_TYPES = {**{name: config for name, (config, _) in _of_others.TYPES.items()}, **_of_backbones.TINY}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, and the names of its head's tensors."""

    name: str
    file: Path
    opened: dict  # arguments of load_backbone
    head: list[str]

    def load(self):
        """Load it with all stages."""
        return load_backbone(**self.opened, out_indices="all")


def of_timm(name: str, folder: Path) -> Checkpoint:
    """Write a weights file of timm, with its classifier."""
    torch.manual_seed(0)
    state, file = timm.create_model(name, num_classes=5).state_dict(), folder / "w.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    headless = timm.create_model(name, num_classes=0).state_dict()
    return Checkpoint(name, file, {"checkpoint": file, "arch": name}, [key for key in state if key not in headless])


def of_transformers(name: str, folder: Path) -> Checkpoint:
    """Write a folder of transformers, with its classifier."""
    torch.manual_seed(0)
    model = getattr(T, TRANSFORMERS[name])(T.CONFIG_MAPPING[name](**ALL_TYPES[name], num_labels=5))
    head = [key for key in saved(model, folder) if not key.startswith(model.base_model_prefix)]
    return Checkpoint(name, folder / "model.safetensors", {"checkpoint": folder}, head)


def saved(model, folder: Path) -> list[str]:
    """Save a model with an image processor, and name the tensors in its file."""
    model.save_pretrained(folder)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return list(load_file(folder / "model.safetensors"))


def corruptions(key: str) -> dict[str, Callable[[dict], dict]]:
    """Return what is done to the tensors of a checkpoint around one of them."""
    owner, _, leaf = key.rpartition(".")
    return {
        "more": lambda tensors: tensors | {f"{owner}.gate.weight": torch.ones(3)},
        "more beside": lambda tensors: tensors | {f"{owner}.gate": torch.ones(3)},
        "less": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key},
        "renamed": lambda tensors: {name if name != key else f"{owner}.x_{leaf}": t for name, t in tensors.items()},
        "shape": lambda tensors: tensors | {key: torch.ones(tensors[key].shape[0] + 1, *tensors[key].shape[1:])},
    }


def chosen(checkpoint: Checkpoint, tensors: dict) -> list[str]:
    """Choose three tensors of its layers: of the first, of one in the middle, and of the last that all maps need."""
    running = checkpoint.load().network.tensors()
    leaves = {(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in running.items()}
    trunk = [
        name
        for name, tensor in tensors.items()
        if name not in checkpoint.head
        and tensor.is_floating_point()
        and any(part.isdigit() for part in name.split("."))
        and (name in running or (name.rpartition(".")[2], tuple(tensor.shape)) in leaves)
        and "distill" not in name
    ]
    return [trunk[0], trunk[len(trunk) // 2], trunk[-1]]


def cells(checkpoint: Checkpoint) -> Iterator[tuple[str, str, bool]]:
    """Yield (what was done, to which tensor, whether featcli did what it should)."""
    tensors = load_file(checkpoint.file)
    whole = checkpoint.load()
    places = [(key, True) for key in chosen(checkpoint, tensors)]
    places += [(key, False) for key in checkpoint.head[:1] + checkpoint.head[-1:]]
    for key, must_be_refused in places:
        for done, change in corruptions(key).items():
            save_file(change(tensors), checkpoint.file, metadata={"format": "pt"})
            try:
                digest = checkpoint.load().digest
            except CheckpointError as error:
                yield done, key, must_be_refused and "\n" not in error.message
            else:
                yield done, key, not must_be_refused and digest == whole.digest
    save_file(tensors, checkpoint.file, metadata={"format": "pt"})


def config_of(name: str, **more):
    return T.CONFIG_MAPPING[name](**{**ALL_TYPES[name], **more})


def honest() -> dict[str, Callable[[], object]]:
    """Return checkpoints as transformers' own heads and pretraining classes save them, by what they are."""
    clip = {"vision_config": _of_others.TOWER, "text_config": _of_others.TEXT}
    composite = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    resnet = config_of("resnet", out_features=["stage1", "stage2", "stage3", "stage4"])
    swin = config_of("swin", out_features=["stage1", "stage2", "stage3", "stage4"])
    dinov2 = config_of("dinov2", out_indices=[1, 2, 3], reshape_hidden_states=False)
    small = {"num_labels": 5}
    return {
        "ViT, masked images": lambda: T.ViTForMaskedImageModeling(config_of("vit")),
        "DeiT, masked images": lambda: T.DeiTForMaskedImageModeling(config_of("deit")),
        "DeiT, with a teacher": lambda: T.DeiTForImageClassificationWithTeacher(config_of("deit", **small)),
        "BEiT, masked images": lambda: T.BeitForMaskedImageModeling(
            config_of("beit", vocab_size=9, use_mask_token=True, use_mean_pooling=False)
        ),
        "BEiT, mean pooling": lambda: T.BeitForImageClassification(config_of("beit", use_mean_pooling=True, **small)),
        "BEiT, segmentation": lambda: T.BeitForSemanticSegmentation(
            config_of("beit", out_indices=[0, 1, 2, 3], num_hidden_layers=4, image_size=64)
        ),
        "BEiT, relative positions": lambda: T.BeitForImageClassification(
            config_of("beit", use_relative_position_bias=True, layer_scale_init_value=0.1)
        ),
        "Data2Vec, classes": lambda: T.Data2VecVisionForImageClassification(config_of("data2vec-vision", **small)),
        "Swin, masked images": lambda: T.SwinForMaskedImageModeling(config_of("swin", encoder_stride=32)),
        "Swin, classes": lambda: T.SwinForImageClassification(config_of("swin", **small)),
        "SwinV2, masked images": lambda: T.Swinv2ForMaskedImageModeling(config_of("swinv2", encoder_stride=32)),
        "SwinV2, classes": lambda: T.Swinv2ForImageClassification(config_of("swinv2", **small)),
        "FocalNet, masked images": lambda: T.FocalNetForMaskedImageModeling(config_of("focalnet", encoder_stride=32)),
        "Hiera, pretraining": lambda: T.HieraForPreTraining(
            config_of("hiera", decoder_hidden_size=16, decoder_depth=1, decoder_num_heads=1)
        ),
        "Hiera, classes": lambda: T.HieraForImageClassification(config_of("hiera", **small)),
        "MAE": lambda: T.ViTMAEForPreTraining(
            T.ViTMAEConfig(
                **ALL_TYPES["vit"],
                decoder_hidden_size=32,
                decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
            )
        ),
        "DINOv2, classes": lambda: T.Dinov2ForImageClassification(config_of("dinov2", use_mask_token=True, **small)),
        "DINOv2 with registers": lambda: T.Dinov2WithRegistersForImageClassification(
            config_of("dinov2_with_registers", **small)
        ),
        "ConvNeXt V2, classes": lambda: T.ConvNextV2ForImageClassification(config_of("convnextv2", **small)),
        "PVT v2, classes": lambda: T.PvtV2ForImageClassification(config_of("pvt_v2", **small)),
        "SegFormer, segmentation": lambda: T.SegformerForSemanticSegmentation(
            config_of("segformer", decoder_hidden_size=16)
        ),
        "MobileViT, segmentation": lambda: T.MobileViTForSemanticSegmentation(
            config_of("mobilevit", aspp_out_channels=16)
        ),
        "MobileNetV2, segmentation": lambda: T.MobileNetV2ForSemanticSegmentation(config_of("mobilenet_v2")),
        "LeViT, with a teacher": lambda: T.LevitForImageClassificationWithTeacher(config_of("levit", **small)),
        "YOLOS, detection": lambda: T.YolosForObjectDetection(config_of("yolos")),
        "GLPN, depth": lambda: T.GLPNForDepthEstimation(config_of("glpn", decoder_hidden_size=16)),
        "DPT, depth": lambda: T.DPTForDepthEstimation(
            config_of(
                "dpt",
                num_hidden_layers=4,
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
            )
        ),
        "CLIP": lambda: T.CLIPModel(T.CLIPConfig(**clip)),
        "CLIP, image tower": lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**_of_others.TOWER)),
        "CLIP, classes": lambda: T.CLIPForImageClassification(T.CLIPConfig(**clip, **small)),
        "SigLIP": lambda: T.SiglipModel(T.SiglipConfig(**clip)),
        "SigLIP, classes": lambda: T.SiglipForImageClassification(T.SiglipConfig(**clip, **small)),
        "CLIPSeg": lambda: T.CLIPSegForImageSegmentation(
            T.CLIPSegConfig(
                **clip,
                extract_layers=[0, 1, 2],
                reduce_dim=8,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=8,
            )
        ),
        "MaskFormer": lambda: T.MaskFormerForInstanceSegmentation(
            T.MaskFormerConfig(
                backbone_config=resnet,
                fpn_feature_size=32,
                mask_feature_size=32,
                decoder_config=T.DetrConfig(**composite, backbone_config=resnet),
            )
        ),
        "UperNet": lambda: T.UperNetForSemanticSegmentation(
            T.UperNetConfig(backbone_config=swin, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=64)
        ),
        "DETR": lambda: T.DetrForObjectDetection(T.DetrConfig(**composite, backbone_config=config_of("resnet"))),
        "Depth Anything": lambda: T.DepthAnythingForDepthEstimation(
            T.DepthAnythingConfig(
                backbone_config=dinov2,
                reassemble_hidden_size=_of_backbones.TOKENS["hidden_size"],
                neck_hidden_sizes=[8, 8, 8],
                reassemble_factors=[2, 1, 0.5],
                fusion_hidden_size=8,
                head_hidden_size=4,
                patch_size=14,
            )
        ),
    }


def honest_of_timm() -> dict[str, tuple[str, Callable[[], dict]]]:
    """Return the same for timm, by what they are: the architecture, and the content of the file."""

    def state(arch: str, **options) -> dict:
        return timm.create_model(arch, **options).state_dict()

    def under(prefix: str, tensors: dict) -> dict:
        return {prefix + key: tensor for key, tensor in tensors.items()}

    one = torch.ones(1)
    return {
        "DINOv2, fine-tuned": ("vit_small_patch14_dinov2", lambda: state("vit_small_patch14_dinov2", num_classes=5)),
        "DeiT, two heads": ("deit_tiny_distilled_patch16_224", lambda: state("deit_tiny_distilled_patch16_224")),
        "Inception, auxiliary head": ("inception_v3", lambda: state("inception_v3", aux_logits=True)),
        "OpenCLIP": (
            "test_vit",
            lambda: (
                under("visual.trunk.", state("test_vit"))
                | {"logit_scale": one, "text.transformer.resblocks.0.attn.in_proj_weight": one}
            ),
        ),
        "masked images": ("test_vit", lambda: state("test_vit") | {"mask_token": one, "decoder.0.weight": one}),
        "a training run": (
            "test_resnet",
            lambda: {"epoch": 3, "state_dict": under("module.", state("test_resnet")), "optimizer": {"state": {}}},
        ),
        "a segmentation network": (
            "test_convnext",
            lambda: under("encoder.model.", state("test_convnext", features_only=True)) | {"decoder.conv.weight": one},
        ),
    }


def is_read(name: str, write: Callable[[Path], dict]) -> bool:
    """Return whether a checkpoint is read, and print what is wrong. `write` returns the arguments of load_backbone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        try:
            opened = write(Path(folder))
            load_backbone(**opened, out_indices="all")
            load_backbone(**opened)
        except Exception as error:  # the table names whatever it is
            print(f"{name:32} {type(error).__name__}: {error}", flush=True)
            return False
    return True


def written(arch: str, content: dict, folder: Path) -> dict:
    """Write a weights file of timm. Returns the arguments of load_backbone."""
    torch.save(content, folder / "w.pth")
    return {"checkpoint": folder / "w.pth", "arch": arch}


def main(only: str = "") -> int:
    """Print the table, and return 1 if a cell is wrong. `only` is a part of the names to try."""
    wrong, done = 0, 0
    for make, names in ((of_timm, TIMM), (of_transformers, TRANSFORMERS)):
        for name in names:
            if only not in name:
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = list(cells(make(name, Path(folder))))
            faults = [f"{what} {key}" for what, key, is_right in found if not is_right]
            print(f"{name:32} {len(found) - len(faults):3} of {len(found)} {'; '.join(faults)}", flush=True)
            wrong, done = wrong + len(faults), done + 1
    print(f"{done} architectures")
    honest_ones: dict[str, Callable[[Path], dict]] = {
        name: lambda folder, arch=arch, make=make: written(arch, make(), folder)
        for name, (arch, make) in honest_of_timm().items()
    }
    for name, make_model in honest().items():
        honest_ones[name] = lambda folder, make=make_model: {"checkpoint": saved(make(), folder) and folder}
    read = [is_read(name, write) for name, write in honest_ones.items() if only in name]
    print(f"{sum(read)} of {len(read)} honest checkpoints read; {wrong + read.count(False)} wrong")
    return int(wrong > 0 or not all(read))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
