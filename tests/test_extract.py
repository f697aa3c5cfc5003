import json
import shutil
import signal
import subprocess

import h5py
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import featcli
from conftest import SAMPLES, Featcli, draw, tree, upright
from featcli import open_dump
from featcli.dump.folder import Dump
from featcli.errors import ConflictError, FeatcliError, IncompleteError, MachineError, UsageError

TINY = {"checkpoint": "test_resnet", "random_init": True}  # 0.4 M parameters, 160 x 160
FORMATS = ["hdf5", "safetensors"]


def stored(dump, format_name):
    """Return the arrays of a one-shard dump, read without featcli."""
    if format_name == "hdf5":
        with h5py.File(dump / "shards" / "00000.h5") as file:
            return {name: file[name][:] for name in file}
    return {name: tensor.numpy() for name, tensor in load_file(dump / "shards" / "00000.safetensors").items()}


def sample_pictures(keys):
    return [upright(SAMPLES / key) for key in keys]


def test_the_documents_example(tmp_path):
    """Swin's default configuration at 224 gives the shapes in the documents, and transformers' own values."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path / "swin"
    transformers.SwinForImageClassification(transformers.SwinConfig()).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    featcli.extract(SAMPLES / "nature", checkpoint=str(folder), output=tmp_path / "dump", out_indices=[0, 1, 2])
    expected_shapes = {"stem": (96, 56, 56), "stage1": (96, 56, 56), "stage2": (192, 28, 28)}
    manifest = json.loads((tmp_path / "dump" / "manifest.json").read_text())
    assert {stage["name"]: tuple(stage["shape"]) for stage in manifest["outputs"]} == expected_shapes
    arrays = stored(tmp_path / "dump", "hdf5")
    assert {name: arrays[name].shape[1:] for name in expected_shapes} == expected_shapes

    model = transformers.SwinBackbone.from_pretrained(folder, out_indices=[0, 1, 2]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    keys = [f"nature/{key}" for key in open_dump(tmp_path / "dump").keys]
    pixels = processor(sample_pictures(keys), return_tensors="pt").pixel_values
    with torch.no_grad():
        for name, expected in zip(expected_shapes, model(pixels).feature_maps, strict=True):
            np.testing.assert_allclose(arrays[name], expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", FORMATS)
def test_transformers_resnet(tmp_path, resnet_folder, format_name):
    """Every stage of a ResNet folder equals transformers' own backbone and processor."""
    transformers = pytest.importorskip("transformers")
    options = {"out_indices": "all", "dtype": "float32", "format": format_name}
    featcli.extract(SAMPLES / "nature", checkpoint=str(resnet_folder), output=tmp_path / "dump", **options)
    arrays = stored(tmp_path / "dump", format_name)
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    config = transformers.AutoConfig.from_pretrained(resnet_folder)
    config.out_features = names
    model = transformers.ResNetBackbone.from_pretrained(resnet_folder, config=config).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(resnet_folder, backend="pil")
    keys = [f"nature/{key}" for key in open_dump(tmp_path / "dump").keys]
    with torch.no_grad():
        expected = model(processor(sample_pictures(keys), return_tensors="pt").pixel_values).feature_maps
    for name, maps in zip(names, expected, strict=True):
        np.testing.assert_allclose(arrays[name], maps.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [("resnet18", "hdf5"), ("vit_tiny_patch16_224", "safetensors"), ("swin_tiny_patch4_window7_224", "hdf5")],
)
def test_timm_models(tmp_path, name, format_name):
    """Rows equal, image by image, what timm's own model gives with timm's own transform."""
    featcli.extract(
        SAMPLES / "nature",
        checkpoint=name,
        random_init=True,
        output=tmp_path / "dump",
        out_indices=[1, -1],
        format=format_name,
    )
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    arrays, dump = stored(tmp_path / "dump", format_name), open_dump(tmp_path / "dump")
    for row in (0, 3):
        pixels = transform(upright(SAMPLES / "nature" / dump.keys[row]))[None]
        with torch.inference_mode():
            maps = model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)
        for stage in dump.stages.values():
            np.testing.assert_allclose(arrays[stage.name][row], maps[stage.index][0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reading_back(tmp_path, photos, format_name, dtype):
    """`open_dump` gives a map by row or key, and several by slice, list or mask, equally for every format and dtype."""
    outcome = featcli.extract(
        photos, output=tmp_path / "d", format=format_name, dtype=dtype, batch_size=2, shard_size=4, **TINY
    )
    assert (outcome.written, outcome.failed, outcome.exit_code) == (12, 0, 0)
    with open_dump(tmp_path / "d") as dump:
        maps = dump["stage4"]
        assert maps.shape == (12, 96, 5, 5) == (len(dump), *dump.stages["stage4"].shape)
        whole = maps[:]
        assert whole.dtype == maps.dtype == (np.float16 if dtype == "float16" else np.float32)
        exact = exact_maps(photos, dump.keys)
        np.testing.assert_allclose(whole, exact, atol=1e-5 if dtype == "float32" else 0.02)
        if dtype == "bfloat16":
            assert np.array_equal(whole, torch.from_numpy(exact).bfloat16().float().numpy())
        assert np.array_equal(maps[-1], whole[11])
        assert np.array_equal(maps[dump.keys[7]], whole[7])
        assert np.array_equal(maps[[9, 2, 3, 4]], whole[[9, 2, 3, 4]])
        assert np.array_equal(maps[[dump.keys[5], 1]], whole[[5, 1]])
        assert np.array_equal(maps[2:11:3], whole[2:11:3])
        assert np.array_equal(maps[np.arange(12) % 2 == 0], whole[::2])
        assert all(np.array_equal(one, other) for one, other in zip(maps, whole, strict=True))
        with pytest.raises(IndexError):
            maps[12]
        with pytest.raises(KeyError):
            maps["nowhere.jpg"]
        with pytest.raises(UsageError, match="stage 'stage9' is not in this dump"):
            dump["stage9"]


def exact_maps(photos, keys):
    backbone = featcli.load_backbone("test_resnet", random_init=True)
    return backbone(torch.stack([backbone.preprocess(upright(photos / key)) for key in keys]))["stage4"].numpy()


@pytest.mark.parametrize("pool", ["none", "avg", "max", "2x3", "cls"])
def test_pooled_maps(tmp_path, photos, pool):
    """The stored values are the pooled map, with the shape that the manifest gives."""
    outcome = featcli.extract(photos, checkpoint="test_vit", random_init=True, output=tmp_path / "d", pool=pool)
    backbone = featcli.load_backbone("test_vit", random_init=True)
    dump = open_dump(outcome.dump)
    pixels = torch.stack([backbone.preprocess(upright(photos / key)) for key in dump.keys])
    maps = backbone(pixels)["stage6"].numpy()
    expected = {
        "none": maps,
        "avg": maps.mean((2, 3)),
        "max": maps.max((2, 3)),
        "2x3": torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps), (2, 3)).numpy(),
        "cls": backbone.class_tokens(pixels)["stage6"].numpy(),
    }[pool]
    assert dump.stages["stage6"].shape == expected.shape[1:]
    np.testing.assert_allclose(dump["stage6"][:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_broken_image_is_recorded_and_changes_nothing_else(tmp_path, photos, format_name):
    """A failed image keeps its row, filled with NaN, and every other row has the bytes it would have had."""
    options = {"format": format_name, "batch_size": 4, "shard_size": 4, **TINY}
    whole = open_dump(featcli.extract(photos, output=tmp_path / "whole", **options).dump)
    broken = photos / "05.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (photos / "08.jpg").write_bytes(b"")
    outcome = featcli.extract(photos, output=tmp_path / "broken", **options)
    dump = open_dump(outcome.dump)
    rows = [dump.rows["05.png"], dump.rows["08.jpg"]]
    good = [row for row in range(12) if row not in rows]
    assert (outcome.exit_code, outcome.written, dict(outcome.failed_by_reason)) == (3, 10, {"empty": 1, "truncated": 1})
    assert dump.keys == whole.keys
    assert np.isnan(dump["stage4"][rows]).all()
    assert dump.valid.tolist() == [row in good for row in range(12)]
    assert dump["stage4"][good].tobytes() == whole["stage4"][good].tobytes()
    lines = (tmp_path / "broken" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == dump.failures
    assert [(f["key"], f["row"], f["reason"]) for f in dump.failures] == [
        ("05.png", rows[0], "truncated"),
        ("08.jpg", rows[1], "empty"),
    ]


def test_rows_do_not_depend_on_neighbours(tmp_path, photos):
    """On a CPU, the other images of a run change no byte of a row, and batch and shard size at most the last bits."""
    names = {"batch_size": 5, "shard_size": 5}, {"batch_size": 1, "shard_size": 3}, {"batch_size": 32}
    dumps = [
        open_dump(featcli.extract(photos, output=tmp_path / str(i), **options, **TINY).dump)
        for i, options in enumerate(names)
    ]
    alone = open_dump(featcli.extract(photos / "05.png", output=tmp_path / "alone", batch_size=1, **TINY).dump)
    assert dumps[1]["stage4"]["05.png"].tobytes() == alone["stage4"][0].tobytes()
    assert dumps[2]["stage4"][:].tobytes() == dumps[0]["stage4"][:].tobytes()
    # Some processors take another way through a batch of one image.
    np.testing.assert_allclose(dumps[1]["stage4"][:], dumps[0]["stage4"][:], rtol=1e-5, atol=1e-6)


def test_same_command_again_does_nothing(tmp_path, photos):
    """A complete dump stays as it is, byte for byte."""
    first = featcli.extract(photos, output=tmp_path / "d", **TINY)
    before = tree(tmp_path / "d")
    second = featcli.extract(photos, output=tmp_path / "d", **TINY)
    assert (first.extracted, second.extracted, second.written) == (12, 0, 12)
    assert tree(tmp_path / "d") == before


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"seed": 1}, "digest of the weights: "),
        ({"out_indices": [1]}, "outputs: "),
        ({"dtype": "float16"}, "float16"),
        ({"pool": "avg"}, 'outputs: "stage4 96x5x5 float32" there, "stage4 avg 96 float32" now'),
        ({"format": "safetensors"}, "--format: "),
        ({"batch_size": 3}, "--batch-size: 32 there, 3 now"),
        ({"precision": "bf16"}, '--precision: "fp32" there, "bf16" now'),
        ({"image_size": "64"}, "--image-size: "),
        ({"threads": 1}, "--threads: 7 there, 1 now"),
        ({"checkpoint": "test_vit"}, "--checkpoint: "),
    ],
)
def test_another_plan_is_refused(tmp_path, photos, other, field):
    """Whatever could change a byte is refused, and the message names the field with both values."""
    options = {**TINY, "threads": 7}
    featcli.extract(photos, output=tmp_path / "d", **options)
    before = tree(tmp_path / "d")
    with pytest.raises(ConflictError) as refused:
        featcli.extract(photos, output=tmp_path / "d", **{**options, **other})
    assert field in refused.value.message
    assert "--overwrite" in refused.value.hint
    assert tree(tmp_path / "d") == before


def test_other_images_are_refused(tmp_path, photos):
    """Images that came, went or changed since the plan was made are refused, with a count or a name."""
    featcli.extract(photos, output=tmp_path / "d", **TINY)
    draw(photos / "new.png", 1)
    with pytest.raises(ConflictError, match=r"of other images: 1 is new, first 'new\.png'"):
        featcli.extract(photos, output=tmp_path / "d", **TINY)
    (photos / "new.png").unlink()
    draw(photos / "05.png", 99)
    with pytest.raises(ConflictError, match=r"1 image changed since its plan was made, first '05\.png'"):
        featcli.extract(photos, output=tmp_path / "d", **TINY)


def test_a_moved_checkpoint_and_moved_images_are_the_same_work(tmp_path, photos, dinov2_folder):
    """A dump resumes after checkpoint and images have moved, with equal bytes, because their places are in no plan."""
    shutil.copytree(dinov2_folder, tmp_path / "elsewhere" / "dinov2")
    shutil.copytree(photos, tmp_path / "elsewhere" / "pictures")
    featcli.extract(photos, checkpoint=str(dinov2_folder), output=tmp_path / "a")
    featcli.extract(
        tmp_path / "elsewhere" / "pictures", checkpoint=str(tmp_path / "elsewhere" / "dinov2"), output=tmp_path / "b"
    )
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(tree(tmp_path / "a").values())


def test_threads_are_kept_on_resume(tmp_path, photos):
    """A resumed dump keeps its number of threads, because threads can change the last bits."""
    featcli.extract(photos, output=tmp_path / "d", threads=1, **TINY)
    assert featcli.extract(photos, output=tmp_path / "d", **TINY).extracted == 0
    assert open_dump(tmp_path / "d").plan.settings.threads == 1


def test_overwrite_starts_anew_and_touches_nothing_else(tmp_path, photos):
    """--overwrite replaces a dump only after the new options proved right, and spares other folders."""
    featcli.extract(photos, output=tmp_path / "d", **TINY)
    before = tree(tmp_path / "d")
    with pytest.raises(UsageError):
        featcli.extract(photos, output=tmp_path / "d", overwrite=True, out_indices=[9], **TINY)
    assert tree(tmp_path / "d") == before
    featcli.extract(photos, output=tmp_path / "d", overwrite=True, seed=4, **TINY)
    assert open_dump(tmp_path / "d").plan.settings != json.loads(before["plan.json"])["settings"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConflictError, match="holds other files"):
            featcli.extract(photos, output=tmp_path / "other", overwrite=overwrite, **TINY)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["manifest.json", "shards/00001.json", "shards/00001.h5", "images.jsonl"])
def test_what_is_missing_is_made_again(tmp_path, photos, missing):
    """A dump that lost a file at a commit gets the same bytes again."""
    options = {"batch_size": 4, "shard_size": 4, **TINY}
    featcli.extract(photos, output=tmp_path / "d", **options)
    before = tree(tmp_path / "d")
    gone = [missing, "manifest.json", *(["shards/00001.json"] if missing.endswith(".h5") else [])]
    if missing == "images.jsonl":
        gone += ["plan.json", "failures.jsonl", *(name for name in before if name.startswith("shards/"))]
    for name in set(gone):
        (tmp_path / "d" / name).unlink()
    featcli.extract(photos, output=tmp_path / "d", **options)
    assert tree(tmp_path / "d") == before


def test_incomplete_dumps(tmp_path, photos):
    """An incomplete dump opens if asked for, and says which rows are missing."""
    featcli.extract(photos, output=tmp_path / "d", batch_size=4, shard_size=4, **TINY)
    (tmp_path / "d" / "manifest.json").unlink()
    (tmp_path / "d" / "shards" / "00001.json").unlink()
    with pytest.raises(IncompleteError):
        open_dump(tmp_path / "d")
    dump = open_dump(tmp_path / "d", incomplete=True)
    assert dump.valid.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert dump["stage4"][0].shape == (96, 5, 5)
    with pytest.raises(IncompleteError, match="row 4"):
        dump["stage4"][3:6]
    with pytest.raises(UsageError, match=r"no plan\.json"):
        open_dump(tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "images.jsonl", "shards/00000.json", "shards/00000.h5"])
def test_damaged_dumps(tmp_path, photos, name):
    """A damaged file of a dump raises a FeatcliError, and never gives wrong maps or another exception."""
    featcli.extract(photos, output=tmp_path / "d", **TINY)
    path = tmp_path / "d" / name
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 3], b"[]", b'{"a": 1}', b"\xff" * 50, b'{"format_version": 9}'):
        path.write_bytes(damaged)
        with pytest.raises(FeatcliError):
            dump = open_dump(tmp_path / "d")
            _ = dump.keys, dump.records, dump["stage4"][:]


def test_no_space(tmp_path, photos, monkeypatch):
    """A dump that cannot fit is refused before the first image, with the bytes needed and free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(MachineError, match=r"it needs 115 kB, and 1 kB are free"):
        featcli.extract(photos, output=tmp_path / "d", **TINY)


def test_a_disk_that_fails_in_the_middle(tmp_path, photos, monkeypatch):
    """If a write fails, committed shards stay, partial files do not, and the same command completes the dump."""
    import os

    options = {"batch_size": 4, "shard_size": 4, **TINY}
    featcli.extract(photos, output=tmp_path / "whole", **options)
    real = os.pwrite

    def failing(*arguments):
        if ".00001.h5." in os.readlink(f"/proc/self/fd/{arguments[0]}"):
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(MachineError, match="no space left"):
        featcli.extract(photos, output=tmp_path / "d", **options)
    monkeypatch.undo()
    names = set(tree(tmp_path / "d"))
    assert names == {"plan.json", "images.jsonl", "shards/00000.h5", "shards/00000.json"}
    assert featcli.extract(photos, output=tmp_path / "d", **options).extracted == 8
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Make 500 JPEGs, and the dumps of an uninterrupted run in both formats."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(500):
        draw(folder / "photos" / f"{i:03d}.jpg", i)
    for format_name in FORMATS:
        featcli.extract(folder / "photos", output=folder / format_name, format=format_name, **MANY)
    return folder


# There are enough images for trials of layouts, and a network for which a trial may choose either way.
MANY = {"batch_size": 10, "shard_size": 20, "threads": 1, "layout": "channels-last", "fold": True, **TINY}
MANY_ARGUMENTS = "-c test_resnet --random-init --batch-size 10 --shard-size 20 --threads 1 --json".split()
MANY_ARGUMENTS += ["--layout", "channels-last", "--fold"]


@pytest.mark.parametrize(
    ("format_name", "number", "code"),
    [("hdf5", signal.SIGKILL, -9), ("safetensors", signal.SIGINT, 130), ("hdf5", signal.SIGTERM, 143)],
)
def test_killed_in_the_middle(tmp_path, many, cli, format_name, number, code):
    """After a kill or a signal in the middle, the same command gives the bytes of an uninterrupted run.

    A signal may come twice, because `timeout` sends it to the process and to its group.
    """
    command = ["extract", many / "photos", "-o", tmp_path / "d", "-f", format_name, *MANY_ARGUMENTS]
    with Featcli(*command) as process:
        while json.loads(process.stdout.readline()).get("shard") != 6:
            pass
        process.send_signal(number)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == code
    dump = Dump.at(tmp_path / "d")
    committed, kept = len(dump.numbered(".json")), sum(dump.rows_kept().values())
    assert 7 <= committed < 25
    assert not (tmp_path / "d" / "manifest.json").exists()
    if number != signal.SIGKILL:
        assert f"stopped: {20 * committed + kept} of 500 images are safe\n" in err
        assert "run the same command again: it resumes" in err
        assert "Traceback" not in err
        assert len(list(tmp_path.rglob("*.partial"))) == bool(kept)
    run = cli(*command)
    assert (run.code, run.events[-1]["extracted"]) == (0, 500 - 20 * committed - kept)
    assert tree(tmp_path / "d") == tree(many / format_name)


def test_two_processes_on_one_dump(tmp_path, many):
    """Two runs of one command at the same time both succeed, and leave the bytes of a single run."""
    command = ["extract", many / "photos", "-o", tmp_path / "d", *MANY_ARGUMENTS, "-q"]
    with Featcli(*command) as one, Featcli(*command) as other:
        for process in (one, other):
            _, err = process.communicate()
            assert (process.returncode, err) == (0, "")
    assert tree(tmp_path / "d") == tree(many / "hdf5")


def test_names_from_find(tmp_path):
    """The README's pipeline works: names from `find -print0`, and nothing but JSON lines on stdout."""
    find = subprocess.run(["find", SAMPLES.name, "-name", "*.jpg", "-print0"], cwd=SAMPLES.parent, capture_output=True)
    names = [name for name in find.stdout.split(b"\0") if name]
    command = "extract --files-from - -0 -c test_resnet --random-init --json".split()
    process = Featcli(*command, "-o", tmp_path / "d", cwd=SAMPLES.parent, stdin=subprocess.PIPE)
    with process:
        out, _ = process.communicate(find.stdout.decode())
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["type"] == "end"
    assert events[-1]["exit_code"] == process.returncode == 0
    assert open_dump(tmp_path / "d").keys == [name.decode() for name in names]


@pytest.mark.parametrize("format_name", FORMATS)
def test_shards_that_are_gone_or_cut_short_are_made_again(tmp_path, photos, cli, format_name):
    """inspect names a shard file that is gone or cut short, and the same command makes it again."""
    options = {"batch_size": 4, "shard_size": 4, "format": format_name, **TINY}
    featcli.extract(photos, output=tmp_path / "d", **options)
    before = tree(tmp_path / "d")
    one, two = sorted(path for path in (tmp_path / "d" / "shards").iterdir() if path.suffix != ".json")[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-7])
    run = cli("inspect", tmp_path / "d")
    assert run.code == 8
    assert f"gone or damaged: shards/{one.name}, shards/{two.name}" in run.out
    assert featcli.extract(photos, output=tmp_path / "d", **options).extracted == 8
    assert tree(tmp_path / "d") == before


def test_interrupting_an_overwrite(tmp_path, many):
    """After Ctrl-C the hint of an --overwrite run does not lead its user to delete what is committed."""
    command = ["extract", many / "photos", "-o", tmp_path / "d", *MANY_ARGUMENTS, "--overwrite"]
    with Featcli(*command) as process:
        while json.loads(process.stdout.readline()).get("shard") != 2:
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "run the same command without --overwrite: it resumes" in err


def test_small_rows_do_not_make_endless_shards(tmp_path, photos):
    """A shard has at most a few thousand images, however small the rows are, because a kill can cost a shard."""
    outcome = featcli.extract(photos, output=tmp_path / "d", pool="avg", **TINY)
    assert open_dump(outcome.dump).plan.shard_rows <= 4096


def test_maps_never_share_memory_with_batch_buffers(tmp_path, photos, monkeypatch):
    """A stage that is the input itself is stored right, although its batch buffer is used again at once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], image_size=32)
    folder = tmp_path / "checkpoint"
    transformers.DINOv3ConvNextBackbone(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    kind = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    plain = kind.normalize
    monkeypatch.setattr(kind, "normalize", lambda self, *a, **k: plain(self, *a, **k) * 2)  # floats stay as they are
    for i in range(60):
        draw(photos / f"more{i:02d}.png", 100 + i)
    dump = open_dump(
        featcli.extract(photos, checkpoint=str(folder), output=tmp_path / "d", batch_size=2, out_features=["stem"]).dump
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [upright(photos / key) for key in dump.keys]
    assert np.array_equal(dump["stem"][:], processor(pictures, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("format_name", FORMATS)
def test_order_on_the_disk(tmp_path, photos, monkeypatch, format_name):
    """The disk has data before names, the list before the plan, shards before records, records before the manifest."""
    import os

    calls = []

    def logged(name, describe):
        real = getattr(os, name)

        def call(*arguments, **options):
            calls.append((name, describe(*arguments)))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    def opened(descriptor, *_):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    logged("pwrite", opened)
    logged("fsync", opened)
    logged("link", lambda source, target: os.path.basename(target))
    logged("replace", lambda source, target: os.path.basename(target))
    featcli.extract(photos, output=tmp_path / "d", batch_size=4, shard_size=8, format=format_name, **TINY)
    suffix = {"hdf5": ".h5", "safetensors": ".safetensors"}[format_name]
    named = [what for name, what in calls if name in ("link", "replace")]
    shards = [f"0000{i}{end}" for i in range(2) for end in (suffix, ".json")]
    assert named == ["images.jsonl", "plan.json", *shards, "failures.jsonl", "manifest.json"]
    for what in named:
        at = next(i for i, call in enumerate(calls) if call[0] in ("link", "replace") and call[1] == what)
        last = max(i for i, call in enumerate(calls[:at]) if call[1].startswith(f".{what}."))
        assert calls[last][0] == "fsync", what  # nothing is written to a file between its fsync and its name
        following = next(call for call in calls[at + 1 :] if call[0] == "fsync")
        assert following[1] == ("shards" if what[0].isdigit() else "d"), what  # its folder is synced next


def test_what_a_killed_start_leaves_behind(tmp_path, photos):
    """Whatever a start left that was killed before its plan existed, the same command begins again."""
    (tmp_path / "d" / "shards").mkdir(parents=True)
    for name in (
        ".images.jsonl.0123456789abcdef.partial",
        ".featcli-probe.0123456789abcdef.partial",
        "images.jsonl",
        "shards/.00000.h5.0123456789abcdef.partial",
    ):
        (tmp_path / "d" / name).write_bytes(b"{}")
    assert featcli.extract(photos, output=tmp_path / "d", **TINY).written == 12
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_that_fills_up_at_the_very_end(tmp_path, photos, monkeypatch):
    """If the last commit fails, no partial file stays, and the same process can continue."""
    import os

    real = os.fsync

    def failing(descriptor):
        if ".00001.h5." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return real(descriptor)

    options = {"batch_size": 4, "shard_size": 8, **TINY}
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(MachineError, match="no space left"):
        featcli.extract(photos, output=tmp_path / "d", **options)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    assert featcli.extract(photos, output=tmp_path / "d", **options).extracted == 4


def test_too_little_space_deletes_nothing(tmp_path, photos, monkeypatch):
    """--overwrite without space for the new dump leaves the old one, and no plan that gets in the way."""
    featcli.extract(photos, output=tmp_path / "d", pool="avg", **TINY)
    before = tree(tmp_path / "d")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(MachineError):
        featcli.extract(photos, output=tmp_path / "d", overwrite=True, **TINY)
    with pytest.raises(MachineError):
        featcli.extract(photos, output=tmp_path / "new", **TINY)
    assert tree(tmp_path / "d") == before
    assert not (tmp_path / "new").exists()


def test_a_shard_that_somebody_else_committed(tmp_path, photos):
    """If another process committed a shard first, its shard and its record stay together."""
    from featcli.dump.folder import Dump

    options = {"batch_size": 4, "shard_size": 4, **TINY}
    featcli.extract(photos, output=tmp_path / "whole", **options)
    whole = Dump.existing(tmp_path / "whole")

    def first(kind, **facts):
        if kind == "start":  # the other process commits shard 1 after this one has listed its work
            for name in ("00001.json", "00001.h5"):
                shutil.copy(tmp_path / "whole" / "shards" / name, tmp_path / "d" / "shards")

    featcli.extract(photos, output=tmp_path / "d", report=first, **options)
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")
    assert whole.is_committed(1)


def test_model_arguments_are_part_of_the_plan(tmp_path, photos):
    """A folder's configuration that changes the network but no weight gives another plan."""
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "c", safe_serialization=True)
    featcli.extract(photos, checkpoint=str(tmp_path / "c"), output=tmp_path / "d")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["model_args"] = {"act_layer": "gelu"}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConflictError, match=r"backbone\.options\.act_layer"):
        featcli.extract(photos, checkpoint=str(tmp_path / "c"), output=tmp_path / "d")


@pytest.mark.parametrize("name", ["plan.json", "images.jsonl", "shards/00000.json", "shards/00000.h5"])
def test_a_damaged_dump_can_be_overwritten(tmp_path, photos, name):
    """--overwrite works after any damage, as the messages say, and needs no file of the old dump."""
    featcli.extract(photos, output=tmp_path / "d", **TINY)
    before = tree(tmp_path / "d")
    (tmp_path / "d" / name).write_bytes(b"{")
    assert featcli.extract(photos, output=tmp_path / "d", overwrite=True, **TINY).extracted == 12
    assert tree(tmp_path / "d") == before


def test_overflow_is_counted_and_said(tmp_path, photos, monkeypatch):
    """If maps are too large for float16, the run says how many values of which stage became infinite."""
    from featcli.backbones.backbone import Backbone

    plain = Backbone.run
    monkeypatch.setattr(
        Backbone,
        "run",
        lambda self, pixels, **more: plain(self, pixels, **more)._replace(
            maps=[maps * 0 + 1e6 for maps in plain(self, pixels).maps]
        ),
    )
    (photos / "broken.png").write_bytes(b"")
    said = []
    featcli.extract(
        photos, output=tmp_path / "d", dtype="float16", **TINY,
        report=lambda kind, **facts: said.append(facts["text"]) if kind == "warning" else None,
    )  # fmt: skip
    count = 12 * 96 * 5 * 5
    assert len(said) == 1
    assert said[0].startswith(f"{count:,} values of stage4 are infinite or undefined: float16 ends at 65,504")


@pytest.mark.parametrize("options", [[], ["-q"], ["--json", "-q"]], ids=" ".join)
def test_a_run_in_which_every_image_failed(tmp_path, cli, options):
    """A run in which every image failed ends with code 9 and says why, also with -q and when nothing is left to do.

    Parts end with 3. `finalize` ends with 9, too, because it may be what completes the dump.
    """
    for i, content in enumerate((b"<html>", b"<html>", b"")):
        (tmp_path / f"{i}.jpg").write_bytes(content)
    command = ["extract", tmp_path, "-c", "test_resnet", "--random-init", "--image-size", "32", "--threads", "1"]
    command += ["--batch-size", "2", "--shard-size", "2", "-o", tmp_path / "d", *options]
    for part in ("0/2", "1/2"):
        run = cli(*command, "--part", part)
        assert (run.code, "none of the" in run.err) == (3, False)
    run = cli(*command)
    assert run.code == 9
    said = "featcli: error: none of the 3 images could be read: 2 not_an_image, 1 empty\nhint: see "
    assert said in run.err
    finalized = cli("finalize", tmp_path / "d", *options[:1])
    assert (finalized.code, said in finalized.err) == (9, True)
    if "--json" in options:
        assert (run.events[-1]["type"], run.events[-1]["exit_code"]) == ("end", 9)
        assert set(run.events[-1]["pictures"].values()) == {0}


def test_a_list_below_another_folder(tmp_path, cli):
    """If no name of a list is found, the hint says where names are looked for."""
    (tmp_path / "list").write_text("a.jpg\nb.jpg\n")
    command = ["extract", "--files-from", tmp_path / "list", "-c", "test_resnet", "--random-init", "--image-size", "32"]
    run = cli(*command, "-o", tmp_path / "d", "-q")
    assert (run.code, "or to --root" in run.err) == (9, True)


def test_that_every_image_failed_is_said_of_the_whole_dump(tmp_path):
    """Exit code 9 does not depend on which shards a run made, and Python gets it from the outcome."""
    options = {
        "checkpoint": "test_resnet",
        "random_init": True,
        "image_size": 32,
        "output": tmp_path / "d",
        "threads": 1,
    }
    options |= {"batch_size": 1, "shard_size": 1}
    draw(tmp_path / "0.png", 0)
    (tmp_path / "1.jpg").write_bytes(b"")
    assert featcli.extract(tmp_path, part="0/2", **options).exit_code == 0
    outcome = featcli.extract(tmp_path, **options)
    assert (outcome.extracted, outcome.exit_code) == (1, 3)
    assert featcli.extract(tmp_path / "1.jpg", **options | {"output": tmp_path / "e"}).exit_code == 9
