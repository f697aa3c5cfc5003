"""Points and reductions: what is stored of a picture, side by side in one run."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
import xxhash
from safetensors.torch import save_file

import featcli
from conftest import REPOSITORY, SAMPLES, draw
from featcli import load_backbone, open_dump
from featcli.errors import CheckpointError, UsageError
from featcli.run import pooling
from featcli.spec.parsers import parse_pools, pools_by_stage

ZOO = REPOSITORY / "tests" / "zoo"
VIT = {"checkpoint": "test_vit4", "random_init": True}  # registers, and no class token
DEIT = {"checkpoint": "test_vit", "random_init": True}
RESNET = {"checkpoint": "test_resnet", "random_init": True}


def arrays(dump):
    return {name: dump[name][:] for name in dump.outputs}


# What is asked


@pytest.mark.parametrize(
    ("given", "for_all", "of_stages"),
    [
        ("none,cls", ("none", "cls"), {}),
        (["none", "gap"], ("none", "avg"), {}),
        (7, ("7x7",), {}),
        (["avg", "stage2=7,none", "stage2=max"], ("avg",), {"stage2": ("7x7", "none", "max")}),
        ({"stage2": "none", "stage3": ["cls", "avg"]}, (), {"stage2": ("none",), "stage3": ("cls", "avg")}),
        ("stage4=cls+avg", (), {"stage4": ("cls+avg",)}),
        ((), (), {}),
    ],
)
def test_reductions_in_every_notation(given, for_all, of_stages):
    """One reduction, several, and those of one stage are understood as texts, sequences and mappings."""
    texts = parse_pools(given)
    assert pools_by_stage(texts) == (for_all, of_stages)
    assert parse_pools(texts) == texts


@pytest.mark.parametrize("given", ["avg,avg", "avg,mean", ["7", "7x7"], {"stage1": ["cls", "cls"]}])
def test_a_reduction_that_is_named_twice(given):
    """It is refused, by whatever words."""
    with pytest.raises(UsageError, match="twice"):
        parse_pools(given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pool", "registers"], "test_resnet has no registers"),
        (["--pool", "none,cls"], "test_resnet gives no class token"),
        (["--pool", "stag4=avg"], "is not chosen"),
        (["--pool", "stage1=avg"], "is not chosen"),
        (["--out-features", "embedding", "--pool", "avg"], "it reduces maps, and no stage is chosen"),
        (["--pool", "avg", "--pool", "stage4=max"], "every chosen stage has a --pool of its own"),
        (["--out-features", "embedding", "--pool", "embedding=avg"], "embedding is a vector, and --pool reduces maps"),
        (["--out-features", "pooler_output"], "did you mean embedding?"),
        (["--out-features", "stage4,embeding"], "did you mean embedding?"),
        (["--out-features", "embedding,embedding"], "names a vector twice"),
        (["--out-features", "projection"], "has none, it makes embedding and logits"),
        (["--out-features", "embedding", "--norm", "model"], "no stage of test_resnet is chosen"),
    ],
)
def test_what_has_no_effect_is_refused(cli, tmp_path, options, said):
    """A point or reduction that the model lacks, or that nothing takes, is refused before anything is made."""
    run = cli("extract", SAMPLES, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", *options)
    assert run.code == 2
    assert said in run.err
    assert "\nhint: " in run.err
    assert not (tmp_path / "d").exists()


# What is stored


@pytest.mark.parametrize(
    ("model", "own", "precision"),
    [(VIT, ["registers"], "bf16"), (DEIT, ["cls", "cls+avg"], "fp32"), (RESNET, [], "fp32")],
    ids=["registers", "class token", "convolutions"],
)
def test_each_output_is_that_of_a_run_with_it_alone(tmp_path, photos, model, own, precision):
    """Bit for bit, whatever else is stored beside it."""
    options = {**model, "precision": precision, "batch_size": 4, "threads": 1}
    last = load_backbone(**model).out_features[0]
    pools = ["none", "gem", *own]
    asked = [last, "stage2", "embedding", "logits"]
    featcli.extract(photos, output=tmp_path / "all", out_features=asked, pool=pools, **options)
    together = arrays(open_dump(tmp_path / "all"))
    assert list(together) == [
        *[stage if pool == "none" else f"{stage}@{pool}" for stage in ("stage2", last) for pool in pools],
        *["embedding", "logits"],
    ]
    for name in (*[f"{last}@{pool}" for pool in pools if pool != "none"], "embedding"):
        point, _, pool = name.partition("@")
        alone = tmp_path / name
        featcli.extract(photos, output=alone, out_features=[point], pool=pool or (), **options)
        (found,) = arrays(open_dump(alone)).values()
        assert np.array_equal(found, together[name])


@pytest.mark.parametrize("format_name", ["hdf5", "safetensors"])
def test_vectors_are_those_of_timm(tmp_path, photos, format_name):
    """`embedding` and `logits` are bit for bit what timm's own model gives, and so are the maps beside them."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=1000).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = {"checkpoint": str(tmp_path / "w.safetensors"), "arch": "test_vit", "threads": 1, "batch_size": 12}
    featcli.extract(
        photos, output=tmp_path / "d", out_features=["stage6", "embedding", "logits"], format=format_name, **options
    )
    dump, backbone = open_dump(tmp_path / "d"), load_backbone(options["checkpoint"], arch="test_vit")
    pixels = backbone.preprocessing.normalize(torch.stack([backbone.preprocess(photos / key) for key in dump.keys]))
    torch.set_num_threads(1)
    with torch.inference_mode():
        features = model.forward_features(pixels)
        expected = {"embedding": model.forward_head(features, pre_logits=True), "logits": model(pixels)}
        maps = model.forward_intermediates(pixels, indices=1, intermediates_only=True)[0]
    assert torch.equal(torch.from_numpy(dump["stage6"][:]), maps)
    for name, vectors in expected.items():
        assert torch.equal(torch.from_numpy(dump[name][:]), vectors)
        assert (dump.outputs[name].axes, dump.outputs[name].stride) == (("C",), None)
    assert list(dump.stages) == ["stage6"]


def test_an_embedding_needs_what_it_is_made_by(tmp_path, photos, cli):
    """A file without the classifier gives embeddings and no logits; one without the layers before it gives neither."""
    model = timm.create_model("test_mambaout", num_classes=0)
    tensors = model.state_dict()
    save_file(tensors, tmp_path / "headless.safetensors")
    save_file({k: v for k, v in tensors.items() if "pre_logits.fc" not in k}, tmp_path / "cut.safetensors")
    command = ["extract", photos, "--arch", "test_mambaout", "-o", tmp_path / "d", "--dry-run"]
    run = cli(*command, "-c", tmp_path / "headless.safetensors", "--out-features", "logits")
    assert run.code == 6
    assert "it lacks head.fc.weight, the head of test_mambaout, which makes logits" in run.err
    with pytest.raises(CheckpointError, match=r"pre_logits\.fc"):
        load_backbone(tmp_path / "cut.safetensors", arch="test_mambaout", out_features=["embedding"])
    load_backbone(tmp_path / "cut.safetensors", arch="test_mambaout", out_features=["stage4"])


def test_logits_of_a_head_with_other_classes(tmp_path, photos):
    """They have as many numbers as the file has classes, and the names that a folder's configuration gives them."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    names = ["cat", "dog", "owl"]
    config = {
        "architecture": "test_resnet",
        "num_classes": 3,
        "label_names": names,
        "pretrained_cfg": {"license": "mit"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for checkpoint, arch in ((folder, None), (folder / "model.safetensors", "test_resnet")):
        output = tmp_path / f"d{arch}"
        featcli.extract(photos, checkpoint=str(checkpoint), arch=arch, output=output, out_features="logits")
        dump = open_dump(output)
        assert dump["logits"].shape == (12, 3)
        assert dump.plan.provenance.get("class_names") == (None if arch else names)
        assert dump.plan.provenance.get("licence") == (None if arch else "mit")


def test_an_embedding_in_python(photos):
    """`embed` gives the vector of timm's headless model for pictures and for pixels, whatever stages were chosen."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).eval()
    backbone = load_backbone("test_resnet", random_init=True, out_features="stage1")
    paths = sorted(photos.iterdir())[:2]
    pixels = backbone.preprocess(paths)
    with torch.inference_mode():
        expected = model(backbone.preprocessing.normalize(pixels))
    assert torch.equal(backbone.embed(pixels), expected)
    assert torch.equal(backbone.embed(paths), expected)
    assert backbone.embed(paths[0]).shape == expected[:1].shape
    chosen = load_backbone("test_resnet", random_init=True, out_features=["stage4", "embedding"])
    assert list(chosen(pixels)) == ["stage4", "embedding"]
    assert torch.equal(chosen(pixels)["embedding"], expected)


def test_the_generalised_mean_of_values_below_zero(tmp_path, photos, monkeypatch):
    """Where more than half of the values count as something else, the run says so, and otherwise it does not."""
    from featcli.backbones.backbone import Backbone

    said, plain = [], Backbone.run

    def extract(name, sign):
        monkeypatch.setattr(
            Backbone,
            "run",
            lambda self, pixels, **more: plain(self, pixels, **more)._replace(
                maps=[sign * maps.abs() for maps in plain(self, pixels).maps]
            ),
        )
        said.clear()
        report = lambda kind, **facts: said.append(facts["text"]) if kind == "warning" else None  # noqa: E731
        featcli.extract(photos, output=tmp_path / name, pool="gem,avg", report=report, **RESNET)
        return [text for text in said if "gem" in text]

    (line,) = extract("below", -1)
    assert line.startswith("100% of the values that gem took of stage4@gem are below 1e-6")
    assert extract("above", 1) == []


def test_outputs_of_a_dump_are_read_and_exported_by_name(tmp_path, photos, cli):
    """A stage means the output of its name, or all of its outputs where none has it; vectors are chosen by theirs."""
    options = {
        **DEIT,
        "out_features": ["stage2", "stage6", "embedding"],
        "pool": {"stage2": "none,avg", "stage6": "cls,avg"},
    }
    featcli.extract(photos, output=tmp_path / "d", **options)
    dump = open_dump(tmp_path / "d")
    assert list(dump.outputs) == ["stage2", "stage2@avg", "stage6@cls", "stage6@avg", "embedding"]
    assert dump.chosen_outputs(["stage2"]) == ["stage2"]
    assert dump.chosen_outputs(["stage6"]) == ["stage6@cls", "stage6@avg"]
    assert dump.chosen_outputs(["stage2:stage6"]) == ["stage2", "stage6@cls", "stage6@avg"]
    assert dump.chosen_outputs(["stage6:"]) == ["stage6@cls", "stage6@avg", "embedding"]  # and no stage2@avg
    assert dump.chosen_outputs([":embedding"]) == ["stage2", "stage6@cls", "stage6@avg", "embedding"]
    assert dump.chosen_outputs(["all"]) == list(dump.outputs)
    assert dump.chosen_outputs(["embedding"]) == ["embedding"]
    for wrong in (["stage2@avg:stage6"], ["stage6", "stage2:"], ["stage2@avg", "stage2@avg"]):
        with pytest.raises(UsageError, match=r"no stage 'stage2@avg'|twice"):
            dump.chosen_outputs(wrong)
    assert dump.chosen_outputs(["stage6@avg"]) == ["stage6@avg"]
    assert cli("export", tmp_path / "d", "--stage", "embedding", "-o", tmp_path / "e.npy").code == 0
    assert np.array_equal(np.load(tmp_path / "e.npy"), dump["embedding"][:])
    for name in ("x.h5", "x.safetensors", "x.parquet", "x.jsonl", "folder"):
        run = cli("export", tmp_path / "d", "-o", tmp_path / name)
        assert run.code == 0, run.err
    assert sorted(path.name for path in (tmp_path / "folder").glob("*.npy")) == sorted(
        f"{name}.npy" for name in dump.outputs
    )
    sheet = cli("show", tmp_path / "d", "-o", tmp_path / "x.png")
    assert "images, 1 stage, " in sheet.out
    assert sheet.err.startswith("stage2@avg, stage6@cls, stage6@avg, embedding not drawn")
    vectors = cli("show", tmp_path / "d", "-o", tmp_path / "y.png", "--stage", "embedding")
    assert vectors.code == 2
    assert "embedding is no map, so there is nothing to draw\nhint: choose maps with --stage stage2," in vectors.err
    near = cli("export", tmp_path / "d", "-o", tmp_path / "n.h5", "--stage", "stage6@clss")
    assert "did you mean stage6@cls, stage6 or stage6@avg?" in near.err
    backbone = dump.load_backbone()
    assert list(backbone(backbone.preprocess([photos / dump.keys[0]]))) == ["stage2", "stage6", "embedding"]


def test_an_export_by_the_reduction_that_is_stored(tmp_path, photos, cli):
    """It is written as it is; where maps are chosen too, the refusal says which output holds it."""
    featcli.extract(photos, output=tmp_path / "d", pool="none,cls", **DEIT)
    run = cli("export", tmp_path / "d", "--pool", "cls", "-o", tmp_path / "all.h5")
    assert run.code == 2
    assert "as with --stage stage6@cls" in run.err
    assert cli("export", tmp_path / "d", "--stage", "stage6@cls", "--pool", "cls", "-o", tmp_path / "e.npy").code == 0
    assert np.array_equal(np.load(tmp_path / "e.npy"), open_dump(tmp_path / "d")["stage6@cls"][:])


def test_an_export_by_the_generalised_mean(tmp_path, photos, cli, monkeypatch):
    """It says, as a run does, where more than a share of the values count as something else, and not where fewer do."""
    featcli.extract(photos, output=tmp_path / "d", **DEIT)
    share = float((open_dump(tmp_path / "d")["stage6"][:] < 1e-6).mean())
    for most in (share + 0.01, share - 0.01):
        monkeypatch.setattr(pooling, "MOST_CLAMPED", most)
        run = cli("export", tmp_path / "d", "-o", tmp_path / f"{most}.h5", "--pool", "gem")
        assert (f"{share:.0%} of the values that gem took of stage6 are" in run.out) == (most < share)


def test_a_model_without_one_vector_for_a_picture(cli, tmp_path, photos):
    """A head that gives all of its tokens, or takes one size alone, is refused before anything is made."""
    command = ["extract", photos, "--random-init", "-o", tmp_path / "d", "--out-features", "embedding"]
    tokens = cli(*command, "-c", "test_vit", "--model-arg", "global_pool=")
    assert tokens.code == 2
    assert "it makes no vector of a picture" in tokens.err
    sizes = cli(*command, "-c", "coat_tiny", "--fit", "native")
    assert sizes.code == 2
    assert "--fit native: coat_tiny does not take every size" in sizes.err
    assert not (tmp_path / "d").exists()


def test_a_dump_of_version_1_is_resumed_by_its_outputs(tmp_path, monkeypatch, cli):
    """Whatever words ask for them; another point or reduction is refused, and the refusal names nothing else."""
    shutil.copytree(ZOO, tmp_path / "zoo")
    monkeypatch.chdir(tmp_path / "zoo")
    command = json.loads((ZOO / "commands.json").read_text())["commands"]["mended"].split()
    dump = tmp_path / "zoo" / "dumps" / "mended"
    manifest = dump / "manifest.json"
    manifest.unlink()
    last = max((dump / "shards").glob("*.json"))
    last.unlink()
    again = ["stage4=avg" if one == "avg" else one for one in command]
    for more in (["--pool", "stage4=max"], ["--out-features", "stage4,embedding"]):
        run = cli(*again, *more)
        assert run.code == 5
        assert 'another plan: outputs: "stage4 avg 16 float32" there' in run.err
        assert "licence" not in run.err
    run = cli(*again)
    assert run.code == 0, run.err
    assert manifest.exists()
    assert "digests" not in json.loads(last.read_text())


# Digests of the pictures


def test_digests_are_those_of_the_bytes_of_files(tmp_path, photos, cli):
    """Of pictures, of members of a tar and of what is no picture; none where the bytes could not be read."""
    (photos / "broken.jpg").write_bytes(b"no picture at all")
    (photos / "empty.jpg").write_bytes(b"")
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        buffer = io.BytesIO(draw(tmp_path / "inside.png", 99).read_bytes())
        member = tarfile.TarInfo("inside.png")
        member.size = len(buffer.getvalue())
        tar.addfile(member, buffer)
    featcli.extract([photos, tmp_path / "more.tar"], output=tmp_path / "d", shard_size=5, batch_size=5, **RESNET)
    dump = open_dump(tmp_path / "d")
    expected = {
        "more/inside.png": buffer.getvalue(),
        **{f"photos/{path.relative_to(photos)}": path.read_bytes() for path in photos.rglob("*") if path.is_file()},
    }
    digests = dict(zip(dump.keys, dump.digests, strict=True))
    assert digests == {key: xxhash.xxh3_128_hexdigest(content) if content else "" for key, content in expected.items()}
    assert cli("verify", tmp_path / "d").code == 0


def test_pictures_that_are_not_what_they_were(tmp_path, photos, cli):
    """`verify --inputs` names changed, gone and equal pictures, and ends with 4 where one is changed or gone."""
    (photos / "same.jpg").write_bytes(next(photos.glob("*.jpg")).read_bytes())
    (photos / "broken.jpg").write_bytes(b"no picture at all")
    featcli.extract(photos, output=tmp_path / "d", **RESNET)
    keys = open_dump(tmp_path / "d").keys
    twin = next(path.name for path in photos.glob("*.jpg") if path.name not in ("same.jpg", "broken.jpg"))
    command = ["verify", tmp_path / "d", photos, "--inputs", "--json"]
    before = cli(*command)
    assert before.code == 0
    assert before.events[1] == {
        "type": "inputs", "images": len(keys), "changed": [], "gone": [], "copies": [sorted([twin, "same.jpg"])]
    }  # fmt: skip
    (photos / "broken.jpg").write_bytes(b"no picture at ALL")
    (photos / "same.jpg").unlink()
    draw(photos / "new.png", 77)
    after = cli(*command)
    assert after.code == 4
    assert (after.events[1]["changed"], after.events[1]["gone"]) == (["broken.jpg"], ["same.jpg"])
    assert "1 changed, first 'broken.jpg'; 1 gone, first 'same.jpg'" in after.err
    assert cli("verify", tmp_path / "d", photos).code == 2
    assert cli("verify", tmp_path / "d", "--inputs").code == 2
    assert cli("verify", tmp_path / "d", photos, "--inputs", "-c", "test_resnet").code == 2


def test_a_dump_without_digests_cannot_be_compared_with_pictures(cli):
    """A dump of format version 1 says so."""
    run = cli("verify", ZOO / "dumps" / "maps", ZOO / "pictures", "--inputs")
    assert run.code == 5
    assert "it is of format version 1, which holds no digests" in run.err
