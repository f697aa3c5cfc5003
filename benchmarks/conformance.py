"""Try what transformers' documents say about Backbones, claim by claim, here and in transformers: a table in Markdown.

    python benchmarks/conformance.py                 every row, and how many there are of each answer
    python benchmarks/conformance.py --only D7,E2    the rows whose id begins so
    python benchmarks/conformance.py --as-listed F   and whether each id of the table in F is among them
    python benchmarks/conformance.py --write F       into a page, as `make sweep` writes docs/conformance.md

A row is a claim of the documents (an attribute, an argument, an example) for one model, option or value. Rows come from
what transformers itself has: the types of its mapping, the attributes of a backbone, the stages of its models. The
answer is `works` if featcli does what transformers does, and `by design` if it does something else on purpose. A row by
design tries that, and names the page and the sentence that say so, which must exist. Anything else is `fails`, and the
exit code is 1. Weights are random and models small, so it takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))  # small configurations

from featcli.backbones.torchvision_operators import declare_missing_operators  # noqa: E402

declare_missing_operators()

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_transformers import TINY, refuse_wrong_places  # noqa: E402

import featcli  # noqa: E402
from featcli import load_backbone  # noqa: E402

BACKBONES, PICTURES_PAGE, STAGES_PAGE = "docs/backbones.md", "docs/pictures.md", "docs/stages.md"
PICTURE = REPOSITORY / "sample_images" / "nature" / "sea.jpg"
MAPPING = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING
TYPES = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES


@functools.cache
def scratch() -> Path:
    """Return a folder for this run."""
    return Path(tempfile.mkdtemp(prefix="conformance-"))


@dataclass(frozen=True)
class Row:
    """A claim, how it is put to featcli, and what shows that it holds: `tried` raises if it does not."""

    id: str
    claim: str
    here: str
    tried: Callable[[], object]
    page: str = ""  # page of the documentation, for a row by design
    says: str = ""  # sentence on that page

    def is_said(self) -> bool:
        """Return whether the sentence stands on the page."""
        return self.says in " ".join((REPOSITORY / self.page).read_text().split())

    def answer(self) -> tuple[str, str]:
        """Return the answer, and where the documentation says so, or what was seen."""
        try:
            self.tried()
            if not self.page:
                return "works", ""
            if not self.is_said():
                return "fails", f"{self.page} does not say: {self.says}"
            return "by design", f"{self.page}: {self.says}"
        except Exception as error:  # the row shows whatever is wrong
            return "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def same(found: Any, expected: Any) -> None:
    """Raise if two things differ; tensors are compared to the bit."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape, (tuple(found.shape), tuple(expected.shape))
        assert torch.equal(found, expected), float((found.float() - expected.float()).abs().max())
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (len(found), len(expected))
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected, (found, expected)


def refused(call: Callable[[], object], kind: type[Exception] = featcli.UsageError) -> Exception:
    """Return the error that a call ends in. Raises AssertionError if it ends otherwise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError("it is not refused")


# What rows are about.


def tiny(model_type: str, **options: Any) -> Any:
    """Return a small configuration of a type, with lists, as one from a file has them."""
    config = transformers.CONFIG_MAPPING[model_type](**TINY[model_type], **options)
    for name in ("hidden_sizes", "depths"):
        if isinstance(getattr(config, name, None), tuple):
            setattr(config, name, list(getattr(config, name)))
    return config


@functools.cache
def folder(model_type: str = "swin") -> str:
    """Return a checkpoint folder of a small model whose norms are trained for every stage, too."""
    torch.manual_seed(0)
    config = tiny(model_type)
    config.out_features = config.stage_names[int(model_type == "maskformer-swin") :]
    path = scratch() / model_type
    MAPPING[type(config)](config).save_pretrained(path)
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    transformers.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(path)
    return str(path)


@functools.cache
def theirs(model_type: str = "swin") -> Any:
    """Return transformers' own backbone of that folder, in eval mode."""
    config = transformers.AutoConfig.from_pretrained(folder(model_type))
    return MAPPING[type(config)].from_pretrained(folder(model_type), config=config).eval()


@functools.cache
def ours(model_type: str = "swin", **options: Any) -> Any:
    """Return featcli's backbone, with the stages of the folder's configuration."""
    return load_backbone(folder(model_type), **options)


@functools.cache
def module(model_type: str = "swin") -> Any:
    """Return the same as an nn.Module."""
    return ours(model_type).as_module().eval()


@functools.cache
def floats(model_type: str = "swin") -> torch.Tensor:
    """Return what transformers' processor gives for the picture: (1, 3, H, W), normalised."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder(model_type), backend="pil")
    return processor(Image.open(PICTURE), return_tensors="pt")["pixel_values"]


def given_by_module(by_name: bool = False) -> Any:
    """Return the outputs of featcli's module for what transformers' processor returns."""
    with torch.no_grad():  # attention computes in another way if gradients are wanted
        return module()(pixel_values=floats()) if by_name else module()(floats())


def maps_of(model_type: str = "swin") -> tuple[torch.Tensor, ...]:
    """Return transformers' maps of the picture."""
    with torch.no_grad():
        return theirs(model_type)(floats(model_type)).feature_maps


def cached(name: str, files: Path, revision: str, commit: str) -> None:
    """Put files into the hub's cache, as a branch of a repository."""
    repository = scratch() / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / commit, dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@contextlib.contextmanager
def served(path: Path) -> Iterator[str]:
    """Yield the URL of a file on a local web server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(path.parent))
    handler.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{path.name}"
        server.shutdown()


def shell(*arguments: str, code: int = 0) -> str:
    """Return what featcli prints in a shell, and check its exit code."""
    done = subprocess.run([sys.executable, "-m", "featcli", *arguments], capture_output=True, text=True)
    assert done.returncode == code, (done.returncode, done.stderr[-200:])
    return done.stdout


# A: choosing stages, and what comes out.


def choosing() -> Iterator[Row]:
    def outputs_by_number() -> None:
        found = given_by_module()
        same(found.feature_maps, maps_of())
        same(found[0], maps_of())

    yield Row("A5", "outputs.feature_maps, an attribute, and outputs by number", "as_module()(x)", outputs_by_number)

    def value_error() -> None:
        for wrong in ({"out_indices": (9,)}, {"out_features": ["nothing"]}, {"out_indices": (1, 1)}):
            refused(lambda wrong=wrong: transformers.SwinConfig(**{k: list(v) for k, v in wrong.items()}), ValueError)
            refused(lambda wrong=wrong: load_backbone(folder(), **wrong), ValueError)

    yield Row("A13", "a wrong choice is a ValueError", "except ValueError", value_error)
    yield Row(
        "A15",
        "out_indices are kept as given ([-2, -1])",
        "backbone.out_indices",
        lambda: same(load_backbone(folder(), out_indices=[-2, -1]).out_indices, [3, 4]),
        BACKBONES,
        "`out_indices` of a Backbone are counted from the beginning, even if they were chosen from the end.",
    )

    def any_order() -> None:
        refused(lambda: tiny("swin", out_indices=[2, 0]), ValueError)
        same(load_backbone(folder(), out_indices=(2, 0)).out_features, ["stem", "stage2"])

    yield Row(
        "A16",
        "an order that is not the network's",
        "out_indices=(2, 0)",
        any_order,
        BACKBONES,
        "**The order does not matter**",
    )
    yield Row(
        "A17",
        "no stage at all",
        "out_indices=()",
        lambda: refused(lambda: load_backbone(folder(), out_indices=())),
        BACKBONES,
        "accepts a choice of no stage at all, which is an error here",
    )
    wrong = {
        "float index": {"out_indices": (1.0,)},
        "number in out_features": {"out_features": [1]},
        "out_features None in list": {"out_features": [None]},
    }
    for what, options in wrong.items():

        def is_refused(options: dict[str, Any] = options) -> None:
            refused(lambda: tiny("swin", **{name: list(value) for name, value in options.items()}), Exception)
            assert isinstance(refused(lambda: load_backbone(folder(), **options)), ValueError)

        yield Row(f"A18 {what}", f"{what}: refused, in one line", str(options), is_refused)
    right = {
        "string in list": (["1"], ["stage1"]),
        "out_indices np.array": (np.array([0, 1]), ["stem", "stage1"]),
        "out_indices np.int64": (np.int64(1), ["stage1"]),
        "out_indices torch tensor": (torch.tensor([0, 1]), ["stem", "stage1"]),
    }
    for what, (indices, names) in right.items():
        yield Row(
            f"A18 {what}",
            f"{what}: the stages that it means",
            f"out_indices={indices!r}",
            lambda indices=indices, names=names: same(load_backbone(folder(), out_indices=indices).out_features, names),
        )
    yield Row(
        "H8 microsoft/swin-tiny-patch4-window7-224",
        "out_indices=np.array([1, 2])",
        "load_backbone",
        lambda: same(load_backbone(folder(), out_indices=np.array([1, 2])).out_indices, [1, 2]),
    )


# B: pictures.


def pictures() -> Iterator[Row]:
    def backend(which: str) -> None:
        processor = transformers.AutoImageProcessor.from_pretrained(folder("dinov2"), backend=which)
        expected = processor(Image.open(PICTURE), return_tensors="pt")["pixel_values"]
        backbone = load_backbone(folder("dinov2"), processor_backend=which)
        found = backbone.preprocessing.normalize(backbone.preprocess(Image.open(PICTURE))[None])
        assert float((found - expected).abs().max()) < 1e-6

    yield Row(
        "B1 default",
        "AutoImageProcessor.from_pretrained(id)(picture): its backend is torchvision",
        "backbone.preprocess",
        lambda: backend("pil"),
        PICTURES_PAGE,
        "whose pixels differ by a grey level or two: `--processor-backend torchvision` gives those",
    )
    yield Row(
        "B1",
        "AutoImageProcessor.from_pretrained(id)(picture), word by word",
        'processor_backend="torchvision"',
        lambda: backend("torchvision"),
    )
    yield Row(
        "B3",
        "inputs['pixel_values'], floats, go into the model",
        "as_module()(pixel_values)",
        lambda: same(given_by_module().feature_maps, maps_of()),
    )
    yield Row(
        "B4",
        "model(**inputs)",
        "as_module()(**inputs)",
        lambda: same(given_by_module(by_name=True).feature_maps, maps_of()),
    )

    def arrays() -> None:
        picture = Image.open(PICTURE).convert("RGB")
        expected = ours().preprocess(picture)
        same(ours().preprocess(np.asarray(picture)), expected)
        same(ours().preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1)), expected)

    yield Row("B6", "a processor takes arrays and tensors", "backbone.preprocess(array)", arrays)

    def paths() -> None:
        expected = ours().preprocess(Image.open(PICTURE))
        same(ours().preprocess(str(PICTURE)), expected)
        with served(PICTURE) as url:
            same(ours().preprocess(url), expected)

    yield Row("B7", "a processor takes a path or a URL", "backbone.preprocess(path)", paths)

    def deep(mode: str) -> None:
        values = np.linspace(0, 65535 if mode == "I;16" else 1, 64 * 64).reshape(64, 64)
        picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
        if mode == "F":
            refused(lambda: ours().preprocess(picture))
            found = load_backbone(folder(), depth_range="0:1").preprocess(picture)
        else:
            found = ours().preprocess(picture)
        assert int(found.max()) > 250, "white is not white"
        assert 100 < float(found.float().mean()) < 155, "grey levels are clipped"

    yield Row(
        "B8 I;16",
        "a picture of mode I;16, as processor(picture.convert('RGB')) has it",
        "backbone.preprocess",
        lambda: deep("I;16"),
        "README.md",
        "16-bit greys are scaled instead of clipped",
    )
    yield Row(
        "B8 F",
        "a picture of mode F, likewise",
        "load_backbone(..., depth_range='0:1')",
        lambda: deep("F"),
        BACKBONES,
        "Pictures of 32 bits are refused until `--depth-range` says what black and white are",
    )


# D: a Backbone as an object.

MIXIN = (
    "stage_names num_features out_feature_channels backbone_type config has_attentions forward_with_filtered_kwargs"
    " named_parameters state_dict parameters train eval to requires_grad_ save_pretrained from_pretrained half dtype"
).split()


def objects() -> Iterator[Row]:
    def to_dict() -> None:
        config = module().config.to_dict()
        expected = theirs().config.to_dict()
        assert expected.keys() <= config.keys(), sorted(expected.keys() - config.keys())
        assert "settings" in ours().to_dict()

    yield Row(
        "D3",
        "to_dict: the other fields of the configuration beside the stages",
        "as_module().config.to_dict()",
        to_dict,
        BACKBONES,
        "`backbone.to_dict()` describes what was loaded; the configuration is that of `backbone.as_module().config`",
    )

    def again() -> None:
        config = module().config
        made = load_backbone(config)
        same(made.out_features, ours().out_features)
        same(load_backbone(config.to_dict()).out_features, ours().out_features)

    yield Row(
        "D6",
        "a configuration's to_dict gives the backbone again",
        "load_backbone(module.config.to_dict())",
        again,
        BACKBONES,
        "`backbone.to_dict()` describes what was loaded; the configuration is that of `backbone.as_module().config`",
    )
    for name in MIXIN:
        yield Row(
            f"D7 {name}",
            f"an attribute of a backbone: {name}",
            f"as_module().{name}",
            functools.partial(_has_as_theirs, name),
        )


def _has_as_theirs(name: str) -> None:
    """Raise unless the module has this attribute, equal to that of transformers' backbone if it can be compared."""
    there, expected = getattr(module(), name), getattr(theirs(), name)
    if name in ("stage_names", "num_features", "out_feature_channels", "has_attentions", "dtype"):
        same(there, expected)
    elif name == "state_dict":
        for key, tensor in expected().items():
            same(there()[key], tensor)
    elif name in ("parameters", "named_parameters"):
        same(sum(1 for _ in there()), sum(1 for _ in expected()))
    elif name == "save_pretrained":
        there(scratch() / "saved")
        same(load_backbone(scratch() / "saved", out_features="all", random_init=True).channels, ours().channels)
    elif name == "forward_with_filtered_kwargs":
        with torch.no_grad():
            same(there(floats(), unknown=True).feature_maps, maps_of())
    else:
        assert there is not None
        assert callable(there) == callable(expected)


def settings_of_objects() -> Iterator[Row]:
    def setters(by: str) -> None:
        one, other = ours().as_module().eval(), MAPPING[type(theirs().config)].from_pretrained(folder()).eval()
        for model in (one, other):
            setattr(model, by, ["stage2"] if by == "out_features" else [2])
        same((list(one.out_features), list(one.out_indices)), (["stage2"], [2]))
        with torch.no_grad():
            same(one(floats()).feature_maps, other(floats()).feature_maps)

    yield Row(
        "D8",
        "setting out_features sets out_indices, too",
        "module.out_features = [...]",
        lambda: setters("out_features"),
    )
    yield Row("D9", "setting out_indices", "module.out_indices = [...]", lambda: setters("out_indices"))
    for id_, name in (("D10", "hidden_states"), ("D11", "attentions")):

        def given(name: str = name) -> None:
            options = {f"output_{name}": True}
            with torch.no_grad():
                expected = getattr(theirs()(floats(), **options), name)
                same(getattr(module()(floats(), **options), name), expected)

        yield Row(id_, f"output_{name}=True", f"as_module()(x, output_{name}=True)", given)
    yield Row(
        "E13",
        "configuration = model.config",
        "as_module().config",
        lambda: same(type(module().config), type(theirs().config)),
    )


# E: timm in transformers.

RESNETS = {
    "TimmBackboneConfig('resnet50')": {},
    "TimmBackboneConfig(backbone='resnet50', out_indices=[-1])": {"out_indices": [-1]},
    "TimmBackboneConfig('resnet50', out_indices=(1,2))": {"out_indices": [1, 2]},
    "TimmBackboneConfig('resnet50', out_indices=[0,2,4])": {"out_indices": [0, 2, 4]},
    "TimmBackboneConfig('resnet50', num_channels=1)": {"num_channels": 1},
    "TimmBackboneConfig('resnet50', freeze_batch_norm_2d=True)": {"freeze_batch_norm_2d": True},
    "TimmBackboneConfig('resnet50', use_pretrained_backbone=False)": {"use_pretrained_backbone": False},
    "TimmBackboneConfig('resnet50', output_stride=16)": {"output_stride": 16, "out_indices": [1, 2, 3, 4]},
}
OTHERS_OF_TIMM = {
    "TimmBackboneConfig('efficientnet_b0', out_indices=[1,2,3,4])": ("efficientnet_b0", [1, 2, 3, 4]),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", [3, 11]),
    "swin_tiny_patch4_window7_224": ("swin_tiny_patch4_window7_224", [0, 3]),
    "convnext_atto": ("convnext_atto", [0, 3]),
    "deit_tiny_distilled_patch16_224": ("deit_tiny_distilled_patch16_224", [11]),
    "vit_small_patch14_dinov2.lvd142m": ("vit_small_patch14_dinov2.lvd142m", [5, 11]),
    "mobilenetv3_small_050": ("mobilenetv3_small_050", [0, 4]),
    "vgg11": ("vgg11", [0, 5]),
}
PORTABLE = "**Names are portable, indices are not.**"
THEIR_NAMES = "transformers names a timm model's stages after timm's modules, `layer2`; featcli names them `stage2`"


def of_timm() -> Iterator[Row]:
    examples = {name: ("resnet50", options) for name, options in RESNETS.items()}
    examples |= {name: (model, {"out_indices": indices}) for name, (model, indices) in OTHERS_OF_TIMM.items()}
    for name, (model, options) in examples.items():

        def names(model: str = model, options: dict[str, Any] = options) -> None:
            config = transformers.TimmBackboneConfig(backbone=model, **options)
            with torch.device("meta"):
                expected = list(transformers.AutoBackbone.from_config(config).out_features)
            backbone = _light(config)
            same([stage.module for stage in backbone], expected)
            same([stage.name for stage in _light(config, out_features=expected)], [stage.name for stage in backbone])

        yield Row(f"E2 {name}", "out_features are those of transformers", "stage.module", names, BACKBONES, THEIR_NAMES)
    for name, options in RESNETS.items():
        if options.get("out_indices", [-1]) != [-1]:
            continue

        def indices(options: dict[str, Any] = options) -> None:
            same(
                [stage.index for stage in _light(transformers.TimmBackboneConfig(backbone="resnet50", **options))], [4]
            )

        yield Row(
            f"E3 {name}",
            "out_indices are those of transformers ([-1])",
            "backbone.out_indices",
            indices,
            BACKBONES,
            "`out_indices` of a Backbone are counted from the beginning, even if they were chosen from the end.",
        )

    def channels_first() -> None:
        config = transformers.TimmBackboneConfig(backbone="swin_tiny_patch4_window7_224", out_indices=[0, 3])
        torch.manual_seed(0)
        reference = transformers.AutoBackbone.from_config(config).eval()
        backbone = load_backbone(config)
        state = {key.removeprefix("_backbone."): tensor for key, tensor in reference.state_dict().items()}
        state = {re.sub(r"^layers_(\d)", r"layers.\1", key): tensor for key, tensor in state.items()}
        backbone.network.module.load_state_dict(state, strict=False)
        pixels = backbone.preprocess(Image.open(PICTURE))[None]
        with torch.no_grad():
            expected = reference(backbone.preprocessing.normalize(pixels)).feature_maps
        same(list(backbone(pixels).values()), [found.permute(0, 3, 1, 2) for found in expected])

    yield Row(
        "E1 swin_tiny_patch4_window7_224",
        "maps of timm's Swin are (B, H, W, C)",
        "backbone(pixels)",
        channels_first,
        BACKBONES,
        "or yields channels last (timm's Swin)",
    )
    yield Row(
        "E5",
        "features_only=False: logits too",
        "load_backbone(config)",
        lambda: refused(lambda: _light(transformers.TimmBackboneConfig(backbone="resnet50", features_only=False))),
        BACKBONES,
        "| `features_only` | always: features, and `logits` where they are asked for by name | always |",
    )

    def pretrained() -> None:
        torch.manual_seed(3)
        model = timm.create_model("test_resnet")
        (scratch() / "trained").mkdir(exist_ok=True)
        torch.save(model.state_dict(), scratch() / "trained" / "pytorch_model.bin")
        cached("timm/test_resnet.r160_in1k", scratch() / "trained", "main", "a" * 40)
        found = load_backbone(transformers.TimmBackboneConfig(backbone="test_resnet", use_pretrained_backbone=True))
        assert not found.weights.random
        same(found.network.module.state_dict()["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)

    yield Row("E6", "use_pretrained_backbone=True: trained weights", "load_backbone(config)", pretrained)
    yield Row(
        "E10",
        "out_features by timm's own names",
        "out_features=['layer2']",
        lambda: same(load_backbone("resnet50", random_init=True, out_features=["layer2"]).out_features, ["stage2"]),
    )


def _light(checkpoint: Any, **options: Any) -> tuple[Any, ...]:
    """Return the selected stages of a checkpoint, without making its weights."""
    from featcli.backbones.checkpoint import resolve
    from featcli.spec.groups import CheckpointSpec, StageSpec

    model, chosen = resolve(CheckpointSpec(checkpoint=checkpoint)), StageSpec(**options)
    return tuple(model.stages[position] for position in model.select(chosen.features, chosen.indices))


# G: every type of the mapping.


@functools.cache
def listed_models() -> set[str]:
    """Return the names that featcli models lists."""
    return {json.loads(line)["name"] for line in shell("models", "--json").splitlines()}


def types() -> Iterator[Row]:
    for name in TYPES:
        if name == "timm_backbone":  # a timm model, which is listed as such
            continue

        def is_listed(name: str = name) -> None:
            assert name in listed_models()

        yield Row(f"G0 {name}", "listed by featcli models", "featcli models", is_listed)
    for name in TINY:
        first = int(name == "maskformer-swin")

        def names(name: str = name, first: int = first) -> None:
            same([stage.name for stage in ours(name, out_features="all").stages], theirs(name).stage_names[first:])
            if first:  # transformers refuses it, too
                config = tiny(name, out_features=["stem"])
                refused(lambda: MAPPING[type(config)](config), Exception)

        stem = (BACKBONES, "MaskFormer's Swin names a stem and refuses to give it: it is no stage here")
        how = "[stage.name for stage in backbone.stages]"
        yield Row(f"G2 {name}", "stage_names", how, names, *(stem if first else ()))

        def maps(name: str = name, everything: bool = False) -> None:
            expected = maps_of(name)
            backbone = ours(name, out_features="all")
            pixels = backbone.preprocess(Image.open(PICTURE))[None]
            found = list(backbone(pixels).values())
            if expected[0].ndim == 3:  # patches in a row
                height, width = found[0].shape[2:]
                expected = tuple(one.transpose(1, 2).reshape(1, -1, height, width) for one in expected)
            chosen = slice(None) if everything else slice(-1, None)
            same(found[chosen], list(expected[chosen]))

        row = (BACKBONES, "even if a model leaves its patches in a row (ViTPose") if name == "vitpose_backbone" else ()
        yield Row(f"G3 {name}", "the map of the last stage", "backbone(pixels)", maps, *row)
        yield Row(
            f"G4 {name}", "the maps of all stages", "out_features='all'", functools.partial(maps, everything=True), *row
        )

        def places(name: str = name) -> None:
            _gives_its_map(name)

        yield Row(f"G6 {name}", "`module` is where the raw map comes from", "inspect's column module", places)


def _gives_its_map(name: str) -> None:
    """Raise if a hook on a stage's module does not see every value of its raw map."""
    from featcli.backbones.checkpoint import resolve
    from featcli.spec.groups import CheckpointSpec

    refuse_wrong_places(resolve(CheckpointSpec(checkpoint=tiny(name))))


# H: other inputs.


def inputs() -> Iterator[Row]:
    for id_, claim, kind in (("H2", "num_channels={}", "resnet"), ("H3", "SwinConfig(num_channels={})", "swin")):
        for channels in (2, 4):

            def channels_refused(kind: str = kind, channels: int = channels) -> None:
                same(_light(tiny(kind, num_channels=channels))[-1].shape[0], _light(tiny(kind))[-1].shape[0])
                refused(lambda: load_backbone(tiny(kind, num_channels=channels)))

            yield Row(
                f"{id_} {channels}",
                claim.format(channels),
                "load_backbone(config)",
                channels_refused,
                BACKBONES,
                "takes pictures of as many bands, and is refused until their mean and deviation are known",
            )
    for size in ((200, 300), (97, 131)):

        def other_size(size: tuple[int, int] = size) -> None:
            path = scratch() / "resnet-50"
            shutil.copytree(folder("resnet"), path, dirs_exist_ok=True)
            transformers.ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(path)
            backbone = load_backbone(path, image_size=size, out_features="all")
            pixels = backbone.preprocess(Image.open(PICTURE))[None]
            same(tuple(pixels.shape[2:]), size)
            with torch.no_grad():
                expected = theirs("resnet")(backbone.preprocessing.normalize(pixels)).feature_maps
            same(list(backbone(pixels).values()), list(expected))
            same(list(load_backbone(path, out_features="all")(pixels).values()), list(expected))

        yield Row(f"H5 microsoft/resnet-50 {size}", "an input of another size", f"image_size={size}", other_size)


# K: the command line.


def command_line() -> Iterator[Row]:
    def chosen(*options: str) -> list[int]:
        found = json.loads(shell("inspect", "test_resnet", "--json", *options))
        return [stage["index"] for stage in found["stages"] if stage["selected"]]

    written = {
        "K6": ("--out-indices", "(0,1,2)", [0, 1, 2]),
        "K7": ("--out-indices", "(0,)", [0]),
        "K8": ("--out-indices", "[0, 1, 2]", [0, 1, 2]),
        "K9": ("--out-indices", "0,", [0]),
        "K10": ("--out-features", "['stem', 'stage1']", [0, 1]),
    }
    for id_, (option, text, expected) in written.items():
        yield Row(
            id_,
            "the documents' own notation",
            f'{option} "{text}"',
            lambda option=option, text=text, expected=expected: same(chosen(option, text), expected),
        )

    def by_url() -> None:
        with served(PICTURE) as url:
            for number, source in enumerate((url, str(PICTURE))):
                out = str(scratch() / f"by-url-{number}")
                shell("extract", source, "-c", "test_resnet", "--random-init", "-o", out, "-q")
        found, expected = (featcli.open_dump(scratch() / f"by-url-{number}")["stage4"][0] for number in (0, 1))
        assert np.array_equal(found, expected)

    yield Row("K11", "the documents' picture by URL, with what is installed", "featcli extract http://...", by_url)

    def revision() -> None:
        digests = []
        for number, name in ((1, "main"), (2, "v2")):
            torch.manual_seed(number)
            path = scratch() / f"revision-{name}"
            transformers.ResNetBackbone(tiny("resnet")).save_pretrained(path)
            transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
            cached("lab/tiny", path, name, str(number) * 40)
            digests.append(load_backbone(path).digest)
        same(
            [load_backbone(name).digest for name in ("lab/tiny", "lab/tiny@v2", f"lab/tiny@{'2' * 40}")],
            [*digests, digests[1]],
        )
        same(load_backbone("hf-hub:lab/tiny@v2").digest, digests[1])

    yield Row("K29", "a revision of a hub id", "-c owner/name@revision", revision)


GROUPS = (choosing, pictures, objects, settings_of_objects, of_timm, types, inputs, command_line)


def ids_in(table: Path) -> list[str]:
    """Return the first column of a Markdown table."""
    cells = [line.split("|")[1].strip() for line in table.read_text().splitlines() if line.startswith("| ")]
    return [cell for cell in cells if cell != "id"]


HEAD = """# Conformance with transformers' documents

Written by `benchmarks/conformance.py`, which puts the claims of transformers' documents on Backbones to featcli and to
transformers {version}, for each type of AutoBackbone where they are about types. `works`: featcli does what
transformers does. `by design`: it does something else, and the documentation says so, where the last column says.

"""


def answered(rows: list[Row], counted: Counter[str]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| id | claim of the documents | how in featcli | answer | where that is said, or what was seen |"
    yield "|---|---|---|---|---|"
    for row in rows:
        with contextlib.redirect_stderr(io.StringIO()):
            answer, why = row.answer()
        counted[answer] += 1
        cells = (row.id, row.claim, row.here, answer, why)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    """Try the rows. The exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--as-listed", type=Path)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    only = tuple(asked.only.split(",")) if asked.only else ("",)
    rows = [row for group in GROUPS for row in group() if row.id.startswith(only)]
    if asked.as_listed is not None:
        listed = set(ids_in(asked.as_listed))
        absent = sorted(listed - {row.id for row in rows})
        print(f"{len(listed)} ids are listed, {len(absent)} of them are no row here: {absent}\n")
    counted: Counter[str] = Counter()
    lines = []
    for line in answered(rows, counted):
        print(line, flush=True)
        lines.append(line)
    total = f"{len(rows)} rows: {', '.join(f'{number} {answer}' for answer, number in counted.most_common())}"
    print(f"\n{total}")
    if asked.write is not None:
        head = HEAD.format(version=transformers.__version__)
        asked.write.write_text(head + "\n".join([f"{total}.", "", *lines]) + "\n")
    shutil.rmtree(scratch(), ignore_errors=True)
    return int(counted["fails"] > 0)


if __name__ == "__main__":
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(scratch() / "hub"), True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
