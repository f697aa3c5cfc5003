"""Check checkpoints by hub id, from a cache laid out as the hub's client does it. There is no network here."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from tempfile import mkdtemp

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from conftest import SAMPLES, forks
from featcli import load_backbone, open_dump
from featcli.backbones import hub
from featcli.errors import CheckpointError, UsageError


def cached(cache, name, files, revision="main", commit="0123abcd"):
    """Put files into a hub cache under a repository's name, as a commit to which a branch leads."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(files, snapshot)
    (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Make a hub cache for this process, which never asks the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def featcli(cache, *arguments, offline):
    """Run a command with a cache at the place that the hub's client reads when it is imported."""
    environment = {"HF_HUB_CACHE": cache_of_all(), "HF_HUB_OFFLINE": "1" if offline else "0"}
    if not offline:
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers there
    Path(environment["HF_HUB_CACHE"]).unlink(missing_ok=True)
    Path(environment["HF_HUB_CACHE"]).symlink_to(cache)
    command = [forks(**environment) / "featcli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@functools.cache
def cache_of_all():
    return f"{mkdtemp()}/cache"


@pytest.mark.parametrize("offline", [pytest.param(True, marks=pytest.mark.long), False])
def test_transformers_hub_id_from_the_cache(tmp_path, dinov2_folder, offline):
    """A cached hub id works with HF_HUB_OFFLINE=1, and also if the hub does not answer."""
    cached(tmp_path / "cache", "lab/tiny-dino", dinov2_folder)
    options = ["-c", "lab/tiny-dino", "-o", tmp_path / "d", "--json", "-q"]
    done = featcli(tmp_path / "cache", "extract", SAMPLES / "things", *options, offline=offline)
    assert done.returncode == 0, done.stderr
    dump = open_dump(tmp_path / "d")
    backbone = load_backbone(str(dinov2_folder))
    assert dump.plan.settings.weights_digest == backbone.digest
    assert dump.plan.provenance["checkpoint"] == "lab/tiny-dino"
    assert dump.plan.provenance["weights_files"] == backbone.weights.files
    assert list(backbone.weights.files) == ["model.safetensors"]


def test_a_hub_that_answers_again(monkeypatch):
    """After the hub did not answer, it is asked again for the next checkpoint, once for each."""
    asked, answers = [], [OSError("no network"), None]

    def ask(seconds):
        asked.append(seconds)
        if (error := answers[len(asked) - 1]) is not None:
            raise error

    monkeypatch.setattr(hub, "ask_hub", ask)
    monkeypatch.setattr(hub, "hub_is_offline", lambda: False)
    monkeypatch.setattr(hub, "set_hub_offline", lambda is_offline: offline.append(is_offline))
    for name in ("_answered", "_did_not_answer"):
        monkeypatch.setattr(hub, name, threading.Event())
    for expected in (True, False):
        offline = []
        load_backbone("test_resnet", random_init=True)  # its name is known without the hub
        with hub.hub_or_cache(), hub.hub_or_cache():
            assert offline[-2:] == [expected, expected]
    assert len(asked) == 2


def test_a_timm_backbone_in_a_hub_checkpoint(tmp_path):
    """A DETR with timm's ResNet inside loads by its hub id from several files, which are all hashed."""
    transformers = pytest.importorskip("transformers")
    inner = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[4])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(**sizes, backbone_config=inner))
    model.save_pretrained(tmp_path / "files", max_shard_size="300kB")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "files")
    cached(tmp_path / "cache", "lab/tiny-detr", tmp_path / "files")
    options = ["-c", "lab/tiny-detr", "-o", tmp_path / "d", "-q"]
    done = featcli(tmp_path / "cache", "extract", SAMPLES / "things", *options, offline=True)
    assert done.returncode == 0, done.stderr
    dump = open_dump(tmp_path / "d")
    backbone = load_backbone(str(tmp_path / "files"))
    assert dump.plan.settings.weights_digest == backbone.digest
    assert dump.plan.provenance["weights_files"] == backbone.weights.files
    assert len(backbone.weights.files) > 1


def test_timm_weights_from_the_cache(tmp_path):
    """A timm name loads its trained weights from the hub's cache, and says how much of the model they cover."""
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=1000)
    (tmp_path / "files").mkdir()
    save_file(model.state_dict(), tmp_path / "files" / "model.safetensors")
    cached(tmp_path / "cache", "timm/test_resnet.r160_in1k", tmp_path / "files")
    done = featcli(
        tmp_path / "cache", "extract", SAMPLES / "nature", "-c", "test_resnet", "-o", tmp_path / "d", offline=True
    )
    assert done.returncode == 0, done.stderr
    assert "tensors loaded from test_resnet.r160_in1k" in done.stderr
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    expected = load_backbone(str(tmp_path / "w.safetensors"), arch="test_resnet").digest
    dump = open_dump(tmp_path / "d")
    assert dump.plan.settings.weights_digest == expected
    whole = hashlib.sha256((tmp_path / "files" / "model.safetensors").read_bytes()).hexdigest()
    assert dump.plan.provenance["weights_files"] == {"model.safetensors": whole}


def test_timm_hub_id_from_the_cache(tmp_path):
    """A hub id whose config.json is timm's is read by timm."""
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=3), tmp_path / "files", safe_serialization=True
    )
    cached(tmp_path / "cache", "lab/tiny-resnet", tmp_path / "files")
    done = featcli(tmp_path / "cache", "inspect", "lab/tiny-resnet", "--json", offline=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["library"] == "timm"


def test_a_revision_of_a_transformers_repository(cache, tmp_path, dinov2_folder):
    """`owner/name@revision` gives configuration, weights and pixels of that branch or commit, also after `hf-hub:`."""
    cached(cache, "lab/tiny-dino", dinov2_folder)
    shutil.copytree(dinov2_folder, tmp_path / "later")
    weights = load_file(dinov2_folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "later" / "model.safetensors")
    settings = tmp_path / "later" / "preprocessor_config.json"
    settings.write_text(
        settings.read_text().replace('"image_mean": [', '"image_mean": [0.25, 0.25, 0.25], "before": [')
    )
    commit = "b" * 40
    cached(cache, "lab/tiny-dino", tmp_path / "later", "trials/v2", commit)
    first, later = load_backbone(str(dinov2_folder)), load_backbone(str(tmp_path / "later"))
    assert first.digest != later.digest
    for name in ("lab/tiny-dino", "hf-hub:lab/tiny-dino", "lab/tiny-dino@main"):
        assert load_backbone(name).digest == first.digest
    for name in ("lab/tiny-dino@trials/v2", f"lab/tiny-dino@{commit}", "hf-hub:lab/tiny-dino@trials/v2"):
        found = load_backbone(name)
        assert (found.digest, found.weights.files) == (later.digest, later.weights.files)
        assert found.preprocessing.mean == later.preprocessing.mean == (0.25,) * 3
        assert found.name == name.removeprefix("hf-hub:")
    with pytest.raises(CheckpointError, match=r"lab/tiny-dino@v3.*not in the cache"):
        load_backbone("lab/tiny-dino@v3")


def test_a_revision_of_a_timm_repository(cache, tmp_path):
    """timm's own `@revision` works with and without `hf-hub:`, and two revisions give two sets of weights."""
    digests = {}
    for revision, seed in (("main", 1), ("v2", 2)):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=3)
        timm.models.save_for_hf(model, tmp_path / revision, safe_serialization=True)
        cached(cache, "lab/tiny-resnet", tmp_path / revision, revision, str(seed) * 40)
        digests[revision] = load_backbone(str(tmp_path / revision)).digest
    for name, revision in (("", "main"), ("@v2", "v2"), (f"@{'2' * 40}", "v2")):
        for prefix in ("", "hf-hub:"):
            found = load_backbone(f"{prefix}lab/tiny-resnet{name}")
            assert found.digest == digests[revision]
            assert found.library == "timm"


def test_a_configuration_that_asks_for_trained_weights(cache, tmp_path):
    """`use_pretrained_backbone=True` gives timm's trained weights, as documented; without it they are random."""
    transformers = pytest.importorskip("transformers")
    model = timm.create_model("test_resnet")
    expected = model.layer4[0].conv1.weight
    (tmp_path / "files").mkdir()
    save_file(model.state_dict(), tmp_path / "files" / "model.safetensors")
    cached(cache, "timm/test_resnet.r160_in1k", tmp_path / "files")
    config = transformers.TimmBackboneConfig(backbone="test_resnet", use_pretrained_backbone=True)
    for asked in (config, config.to_dict(), transformers.DetrConfig(backbone_config=config)):
        found = load_backbone(asked, out_indices=-1)
        assert not found.weights.random
        assert found.weights.matched == found.weights.total
        conv = found.network.module.state_dict()["layer4.0.conv1.weight"]
        assert torch.equal(conv, expected)
        assert load_backbone(asked, out_indices=-1, random_init=True).weights.random
    config.use_pretrained_backbone = False
    assert load_backbone(config).weights.random
    with pytest.raises(UsageError, match=r"does not say which"):
        load_backbone(transformers.SwinConfig(use_pretrained_backbone=True))


def test_a_folder_with_an_at_sign_is_a_folder(cache, tmp_path, monkeypatch, dinov2_folder):
    """A folder whose name has an `@` is taken as it is."""
    shutil.copytree(dinov2_folder, tmp_path / "lab" / "tiny@v2")
    monkeypatch.chdir(tmp_path)
    assert load_backbone("lab/tiny@v2").digest == load_backbone(str(dinov2_folder)).digest


@pytest.mark.parametrize(
    ("name", "offline", "cause"),
    [
        ("nobody/nothing", True, "HF_HUB_OFFLINE is set"),
        ("nobody/nothing", False, "the hub does not answer"),
        ("resnet18", True, "not in the cache"),
        ("resnet18", False, "not in the cache"),
    ],
)
def test_what_is_neither_cached_nor_reachable(tmp_path, name, offline, cause):
    """Without cache and network a checkpoint ends in one line with the reason, without half a minute of retries."""
    done = featcli(tmp_path, "extract", SAMPLES, "-c", name, "-o", tmp_path / "d", "-q", offline=offline)
    assert done.returncode == 6
    assert len(done.stderr.splitlines()) == 2, done.stderr
    assert cause in done.stderr
    assert not (tmp_path / "d").exists()
