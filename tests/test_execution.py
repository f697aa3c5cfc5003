"""Check that maps are the library's own however the network is run, and that choices stay as they were made."""

import json
import shutil
import weakref

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import featcli
from conftest import tree
from featcli import load_backbone, open_dump
from featcli.backbones.backbone import Network, Pass
from featcli.backbones.folding import fold
from featcli.errors import ConflictError, UsageError
from featcli.extraction import extract as extraction
from featcli.run import trials, tuning

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "threads": 1, "batch_size": 4, "shard_size": 4}


def used(module):
    """Give the module norms as training leaves them."""
    chance = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2, generator=chance)
            norm.running_var.uniform_(0.5, 2, generator=chance)
    return module.eval()


def saved(name, folder):
    """Save a weights file of a timm model with such norms."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = used(timm.create_model(name))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_efficientnet", "test_efficientnet_ln", "test_byobnet", "test_vit", "mobilenetv3_small_050"],
)
def test_layout_and_folding_change_no_number_by_more_than_rounding(tmp_path, name):
    """With norms folded, if there are any, and channels last, every stage is within 1e-5 of timm's."""
    given = {"arch": name, "out_indices": "all"}
    path = saved(name, tmp_path)
    plain = load_backbone(path, **given)
    other = load_backbone(path, **given, layout="channels-last", fold=name not in ("test_vit", "test_efficientnet_ln"))
    size = (4, 3, *plain.preprocessing.size)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected, found = plain(pixels), other(pixels)
    for stage, maps in expected.items():
        assert (found[stage] - maps).abs().max() <= 1e-5 * maps.abs().max()
    left = [norm for norm in other.network.module.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert not left


def test_transformers_norms_are_folded(resnet_folder):
    """Norms of transformers' ResNet are folded, too, with maps within 1e-5."""
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = load_backbone(str(resnet_folder), out_indices="all")(pixels)
    other = load_backbone(str(resnet_folder), out_indices="all", layout="channels-last", fold=True)
    for stage, maps in other(pixels).items():
        assert (expected[stage] - maps).abs().max() <= 1e-5 * maps.abs().max()
    assert not [norm for norm in other.network.module.modules() if isinstance(norm, nn.BatchNorm2d)]


def test_weights_of_five_dimensions_stay_as_they_are():
    """A network with a three-dimensional convolution also runs channels last."""
    backbone = load_backbone("lambda_resnet26t", random_init=True, image_size=64, layout="channels-last", fold=True)
    assert any(parameter.ndim == 5 for parameter in backbone.network.module.parameters())
    assert backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))["stage4"].shape == (1, 2048, 2, 2)


class Standardised(nn.Conv2d):
    """A convolution that does not use its weights as they are."""

    def forward(self, pixels):
        return self._conv_forward(pixels, self.weight - self.weight.mean(), self.bias)


class Model(nn.Module):
    """A convolution and a norm."""

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.norm = conv(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixels):
        return self.norm(self.conv(pixels))


class Shortcut(Model):
    def forward(self, pixels):
        between = self.conv(pixels)
        return self.norm(between) + between


class Twice(Model):
    def forward(self, pixels):
        return self.norm(self.conv(pixels)) + self.norm(pixels.mean(1, keepdim=True).expand(-1, 4, -1, -1)[..., 2:, 2:])


class Apart(Model):
    def forward(self, pixels):
        return self.norm(self.conv(pixels).relu())


@pytest.mark.parametrize(
    ("model", "folded"),
    [(Model(), 1), (Model(Standardised), 0), (Shortcut(), 0), (Twice(), 0), (Apart(), 0)],
    ids=["plain", "standardised", "shortcut", "twice", "apart"],
)
def test_only_what_may_be_folded_is(model, folded):
    """A norm whose convolution is of another kind, or is used twice, stays as it was, to the last bit."""
    pixels = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = used(model)(pixels)
        assert fold(Network(model, lambda given: Pass([model(given)], [], {})), 3, (9, 9)) == folded
        found = model(pixels)
    assert isinstance(model.norm, nn.BatchNorm2d) == (not folded)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) if folded else torch.equal(found, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_maps(tmp_path, photos, cli):
    """--compile gives the same maps up to rounding, also in a short last batch, and is what a resumed run does too."""
    options = {**OPTIONS, "batch_size": 5, "shard_size": 5, "out_indices": "all"}
    featcli.extract(photos, output=tmp_path / "plain", **options)
    featcli.extract(photos, output=tmp_path / "compiled", compile=True, **options)
    one, other = open_dump(tmp_path / "plain"), open_dump(tmp_path / "compiled")
    for stage in one.stages:
        maps = one[stage][:]
        np.testing.assert_allclose(other[stage][:], maps, rtol=0, atol=1e-5 * np.abs(maps).max())
    with pytest.raises(ConflictError, match="--compile: true there, false now"):
        featcli.extract(photos, output=tmp_path / "compiled", compile=False, **options)
    whole = tree(tmp_path / "compiled")
    for name in ("manifest.json", "failures.jsonl", "shards/00000.json", "shards/00000.h5"):
        (tmp_path / "compiled" / name).unlink()
    assert featcli.extract(photos, output=tmp_path / "compiled", **options).extracted == 5
    assert tree(tmp_path / "compiled") == whole


def test_compiled_dumps_are_recomputed_where_that_can_be_done(tmp_path, photos, monkeypatch, cli):
    """verify --recompute of a compiled dump ends with a message if torch.compile fails."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    featcli.extract(photos, output=tmp_path / "d", compile=True, **OPTIONS)
    again = ("verify", tmp_path / "d", "--recompute", 2, "-c", "test_resnet", "--random-init", photos)
    assert cli(*again).code == 0
    monkeypatch.setattr(torch, "compile", no_compiler)
    run = cli(*again)
    assert run.code == 7
    assert "torch.compile cannot compile test_resnet" in run.err


def no_compiler(function, **_):
    """Stand for torch.compile on a machine without a compiler."""

    def run(pixels, **_):
        raise RuntimeError("No working C++ compiler found")

    return run


def test_what_cannot_be_compiled(tmp_path, photos, monkeypatch, cli):
    """If torch.compile fails, the run says so with exit code 7 before anything is written."""
    monkeypatch.setattr(torch, "compile", no_compiler)
    run = cli("extract", photos, "-c", "test_resnet", "--random-init", "--compile", "-o", tmp_path / "d", "-q")
    assert run.code == 7
    assert "--compile: torch.compile cannot compile test_resnet: No working C++ compiler found" in run.err
    assert "needs a C++ compiler such as g++" in run.err
    assert not (tmp_path / "d").exists()


def test_compilation_that_does_not_fit(tmp_path, photos, monkeypatch):
    """A compilation that does not fit is tried again with half the images, after its memory is freed."""
    tried, held = [], []

    def compiled(function, **_):
        def run(pixels, **more):
            tried.append(len(pixels))
            assert not [reference for reference in held if reference() is not None]
            if len(pixels) > 2:
                held.append(weakref.ref(pixels))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(pixels, **more)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    options = {**OPTIONS, "batch_size": 8, "shard_size": 6}
    featcli.extract(photos, output=tmp_path / "compiled", compile=True, **options)
    assert tried == [8, 4, 2, *[2] * 6]
    featcli.extract(photos, output=tmp_path / "plain", **{**options, "batch_size": 2})
    one, other = open_dump(tmp_path / "plain"), open_dump(tmp_path / "compiled")
    assert all(np.array_equal(one[stage][:], other[stage][:]) for stage in one.stages)


@pytest.fixture
def measured(monkeypatch):
    """Let a test set how fast each way of running is, by (execution, images), and list what was asked."""
    asked = []

    def set_rates(rate):
        def measure(trials, execution, images):
            asked.append((execution.precision, execution.layout, execution.folded, images))
            return rate(execution, images)

        monkeypatch.setattr(tuning, "FEWEST", 1)
        monkeypatch.setattr(trials.Trials, "measure", measure)
        return asked

    return set_rates


def chosen(dump):
    settings = json.loads((dump / "plan.json").read_text())["settings"]
    return [settings[name] for name in ("precision", "layout", "folded", "batch_size")]


def by_layout(gain):
    return lambda execution, images: gain if execution.layout == "channels-last" else 1.0


@pytest.mark.parametrize(("gain", "expected"), [(1.5, ["channels-last", True]), (1.05, ["channels-first", False])])
def test_a_layout_has_to_be_worth_it(tmp_path, photos, measured, cli, gain, expected):
    """Another layout than the library's is taken only if it is clearly faster, and the gain is printed."""
    measured(by_layout(gain))
    run = cli("extract", photos, "-o", tmp_path / "d", "-c", "test_resnet", "--random-init")
    assert chosen(tmp_path / "d")[1:3] == expected
    assert ("channels-last, norms folded  (auto: 1.5 x as fast as channels-first here)" in run.err) == (gain == 1.5)


def test_a_layout_that_a_network_does_not_take(tmp_path, photos, measured):
    """A trial that fails rules out its own way, and no other."""

    def rate(execution, images):
        if execution.layout == "channels-last":
            raise RuntimeError("view size is not compatible with input tensor's size and stride")
        return 2.0 if execution.folded else 1.0

    measured(rate)
    featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    assert chosen(tmp_path / "d")[1:3] == ["channels-first", True]


def test_a_precision_that_alone_fits_into_memory(tmp_path, photos, measured, cli):
    """--precision auto takes bf16 if fp32 does not fit into memory."""

    def rate(execution, images):
        if execution.precision == "fp32":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5.0

    measured(rate)
    run = cli("extract", photos, "-o", tmp_path / "d", "-c", "test_vit", "--random-init", "--precision", "auto")
    assert chosen(tmp_path / "d")[0] == "bf16"
    assert "auto: more than 100 x as fast as fp32 here" in run.err


def test_norms_that_cannot_be_folded_are_refused(tmp_path, photos, cli):
    """--fold is refused if maps would change or there is no norm; without it nothing is folded then."""
    tensors = timm.create_model("test_resnet", num_classes=0).state_dict()
    mean, deviation = tensors["conv1.1.running_mean"], (tensors["conv1.1.running_var"] + 1e-5).sqrt()
    mean.fill_(1e5)  # added to what it is subtracted from later, so that the folded sum has other last digits
    tensors["conv1.1.bias"].copy_(mean * tensors["conv1.1.weight"] / deviation)
    save_file(tensors, tmp_path / "w.safetensors")
    given = ("-c", tmp_path / "w.safetensors", "--arch", "test_resnet", "--fold")
    run = cli("extract", photos, "-o", tmp_path / "d", *given)
    assert (run.code, "--fold: w.safetensors (test_resnet) has no norm" in run.err) == (2, True)
    with pytest.raises(UsageError, match="--fold: w"):
        load_backbone(tmp_path / "w.safetensors", arch="test_resnet", fold=True)
    run = cli("extract", photos, "-o", tmp_path / "d", "-c", "test_vit", "--random-init", "--fold", "--dry-run")
    assert (run.code, "--fold: test_vit has no norm" in run.err) == (2, True)
    assert cli("extract", photos, "-o", tmp_path / "d", *given[:-1]).code == 0
    assert chosen(tmp_path / "d")[2] is False


def test_networks_without_convolutions_are_not_tried(tmp_path, photos, measured):
    """A transformer runs as it is, because the layout of its one convolution is not worth a trial."""
    asked = measured(by_layout(9.0))
    featcli.extract(photos, output=tmp_path / "d", **{**OPTIONS, "checkpoint": "test_vit"})
    assert (chosen(tmp_path / "d")[1:3], asked) == (["channels-first", False], [])


def test_few_images_are_not_worth_a_measurement(tmp_path, photos, monkeypatch):
    """A run of few images starts at once, in the library's own way."""
    monkeypatch.setattr(trials.Trials, "measure", lambda *_: pytest.fail("measured"))
    featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    assert chosen(tmp_path / "d")[1:3] == ["channels-first", False]


def test_what_is_asked_is_not_measured(tmp_path, photos, measured):
    """--layout and --fold are obeyed without a trial."""
    asked = measured(by_layout(9.0))
    featcli.extract(photos, output=tmp_path / "d", layout="channels-first", fold=True, **OPTIONS)
    assert (chosen(tmp_path / "d")[1:3], asked) == (["channels-first", True], [])


@pytest.mark.parametrize(("gain", "expected"), [(2.0, "bf16"), (1.1, "fp32")])
def test_precision_auto(tmp_path, photos, measured, cli, gain, expected):
    """--precision auto takes bf16 if it is clearly faster here, and says by how much."""
    measured(lambda execution, images: gain if execution.precision == "bf16" else 1.0)
    run = cli("extract", photos, "-o", tmp_path / "d", "-c", "test_vit", "--random-init", "--precision", "auto")
    assert chosen(tmp_path / "d")[0] == expected
    assert (
        f"auto: {gain:.1f} x as fast as fp32 here" if gain == 2 else "auto: bf16 would be 1.10 x as fast here"
    ) in run.err


def test_batch_size_auto(tmp_path, photos, measured):
    """--batch-size auto doubles the batch while that pays, and shards are whole batches."""
    asked = measured(lambda execution, images: {8: 100, 16: 110, 32: 112}[images])
    given = {**OPTIONS, "checkpoint": "test_vit", "batch_size": "auto", "shard_size": 5}
    featcli.extract(photos, output=tmp_path / "d", **given)
    assert chosen(tmp_path / "d")[3] == 16
    assert [images for *_, images in asked] == [8, 16, 32]
    assert json.loads((tmp_path / "d" / "plan.json").read_text())["shard_rows"] == 16


def test_batch_size_auto_where_nothing_fits(tmp_path, photos, measured):
    """If nothing fits, --batch-size auto takes one image, and the run says if even that does not fit."""

    def rate(execution, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    measured(rate)
    featcli.extract(photos, output=tmp_path / "d", **{**OPTIONS, "checkpoint": "test_vit", "batch_size": "auto"})
    assert chosen(tmp_path / "d")[3] == 1


def test_batch_size_auto_without_memory(tmp_path, photos, measured):
    """A batch that does not fit in a trial is not chosen."""

    def rate(execution, images):
        if images > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0

    measured(rate)
    featcli.extract(photos, output=tmp_path / "d", **{**OPTIONS, "checkpoint": "test_vit", "batch_size": "auto"})
    assert chosen(tmp_path / "d")[3] == 2


@pytest.mark.parametrize(
    ("network", "rates", "options", "expected"),
    [
        ("test_vit", {32: 1.0, 16: 1.2, 8: 1.1}, {}, 16),
        ("test_vit", {32: 1.0, 16: 1.05, 8: 1.0}, {}, 32),
        ("test_vit", {32: 0.0, 16: 0.0, 8: 1.0}, {}, 8),  # more do not fit into memory
        ("test_vit", {}, {"batch_size": 32}, 32),
        ("test_resnet", {}, {"layout": "channels-first", "fold": False}, 32),
    ],
)
def test_fewer_images_at_once(tmp_path, photos, measured, monkeypatch, network, rates, options, expected):
    """In a run of many images, a network of few convolutions takes fewer at once than 32 where that is faster."""
    monkeypatch.setattr(tuning, "FEWEST_FOR_BATCHES", 12)
    asked = measured(lambda execution, images: rates[images])
    given = {"checkpoint": network, "random_init": True, "threads": 1, "compile": False, **options}
    featcli.extract(photos, output=tmp_path / "d", **given)
    assert chosen(tmp_path / "d")[3] == expected
    assert {images for *_, images in asked} == rates.keys()
    monkeypatch.setattr(tuning, "FEWEST_FOR_BATCHES", 13)
    measured(lambda *_: pytest.fail("measured"))
    featcli.extract(photos, output=tmp_path / "few", **given)
    assert chosen(tmp_path / "few")[3] == 32


def disturbed(function, **_):
    """Stand for a compiler that changes numbers."""
    return lambda pixels, **more: Pass(*([1.01 * one for one in part] for part in function(pixels, **more)[:2]), {})


@pytest.mark.parametrize(
    ("seconds", "gain", "compiler", "said"),
    [
        (2000, 1.2, lambda function, **_: function, "yes  (auto: 1.20 x as fast here, which saves 5.6 min of 33.3 min"),
        (2000, 1.04, lambda function, **_: function, "no  (auto: it would be 1.04 x as fast here, which does not pay)"),
        (2000, 0, lambda function, **_: function, "no  (auto: torch.compile does not run here)"),
        (2000, 1.2, disturbed, "no  (auto: it would move maps by 1e-02 of their largest number)"),
        (1700, 1.2, lambda function, **_: pytest.fail("compiled"), ""),
    ],
)
def test_compiling_has_to_pay(tmp_path, photos, measured, monkeypatch, cli, seconds, gain, compiler, said):
    """A long run compiles the network where a trial says that it saves time and leaves the maps as they are."""
    monkeypatch.setattr(tuning, "FEWEST_FOR_BATCHES", 12)
    monkeypatch.setattr(torch, "compile", compiler)
    measured(lambda execution, images: 12 / seconds * (gain if execution.compiled else 1))
    command = "extract", photos, "-c", "test_resnet", "--random-init", "--layout", "channels-first", "--no-fold"
    run = cli(*command, "-o", tmp_path / "d")
    assert said in run.err, run.err
    assert ("compile " in run.err) == bool(said)
    settings = json.loads((tmp_path / "d" / "plan.json").read_text())["settings"]
    assert settings["compiled"] == said.startswith("yes")
    measured(lambda *_: pytest.fail("measured"))
    assert cli(*command, "--no-compile", "-o", tmp_path / "not", "-q").code == 0


def test_ways_are_compared_with_what_fits(tmp_path, photos, measured):
    """If the library's own way does not fit, trials take fewer images, so no other way wins just by that."""
    fits = {"fp32": 3, "bf16": 8}

    def rate(execution, images):
        if images > fits[execution.precision]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0

    asked = measured(rate)
    given = {**OPTIONS, "checkpoint": "test_vit", "precision": "auto"}
    featcli.extract(photos, output=tmp_path / "d", **given)
    assert chosen(tmp_path / "d")[0] == "fp32"
    assert [(precision, images) for precision, *_, images in asked][-2:] == [("fp32", 2), ("bf16", 2)]


def test_a_dump_is_gone_on_with_as_it_was_begun(tmp_path, photos, measured, cli):
    """A resumed run repeats measured choices instead of measuring again, and the bytes are those of one run."""
    measured(lambda execution, images: by_layout(1.5)(execution, images) * (2 if execution.precision == "bf16" else 1))
    given = {**OPTIONS, "precision": "auto", "batch_size": "auto"}
    featcli.extract(photos, output=tmp_path / "d", **given)
    whole = tree(tmp_path / "d")
    assert chosen(tmp_path / "d")[:3] == ["bf16", "channels-last", True]
    for name in ("manifest.json", "failures.jsonl", "shards/00000.json", "shards/00000.h5"):
        (tmp_path / "d" / name).unlink()
    measured(lambda *_: pytest.fail("measured"))
    featcli.extract(photos, output=tmp_path / "d", **given)
    assert tree(tmp_path / "d") == whole
    with pytest.raises(ConflictError, match='--layout: "channels-last" there, "channels-first" now'):
        featcli.extract(photos, output=tmp_path / "d", layout="channels-first", **given)
    run = cli("verify", tmp_path / "d", "--recompute", 3, "-c", "test_resnet", "--random-init", photos)
    assert run.code == 0, run.err
    assert "3 images extracted anew: 3 equal bit for bit" in run.out


def test_two_that_begin_at_once_choose_alike(tmp_path, photos, measured, monkeypatch):
    """If another run has begun the dump with other choices meanwhile, a run takes those choices."""
    measured(by_layout(1.5))
    real, begun = extraction.prepare, []

    def prepare(*arguments):
        job = real(*arguments)
        if not begun:
            begun.append(True)
            measured(by_layout(0.5))
            featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
        return job

    monkeypatch.setattr(extraction, "prepare", prepare)
    outcome = featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    assert (outcome.written, outcome.extracted) == (12, 0)
    assert chosen(tmp_path / "d")[1] == "channels-first"


def test_compile_has_one_size(tmp_path, photos, cli):
    """--compile and --fit native exclude each other."""
    run = cli("extract", photos, "-c", "test_resnet", "--compile", "--fit", "native", "-o", tmp_path / "d", "-q")
    assert run.code == 2
    assert "--compile cannot be used with --fit native" in run.err
