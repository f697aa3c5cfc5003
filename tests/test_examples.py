"""Run the scripts in examples/ on pictures that are drawn so that the result is known."""

import ast
import importlib.util
import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import REPOSITORY, SAMPLES, draw
from featcli import extract, open_dump
from featcli.errors import UsageError

EXAMPLES = REPOSITORY / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
STARTS_ITSELF = {"demo", "train_upernet"}  # scripts that extract by themselves
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "threads": 1, "fit": "squash"}
EDGE = 160  # edge of test_resnet's input in pixels


def example(name):
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path, grey):
    """Save a grey picture from an (H, W) array of 0 to 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(path)


def noise(seed):
    """Return (EDGE, EDGE) of dark grey with grain, another one for each seed."""
    return np.random.default_rng(seed).normal(80, 20, (EDGE, EDGE))


def disc(row, column, radius):
    """Return the pixels of a disc, (EDGE, EDGE) bool."""
    rows, columns = np.mgrid[:EDGE, :EDGE]
    return np.hypot(rows - row, columns - column) < radius


@pytest.fixture
def textures(tmp_path):
    """Make three classes of ten pictures: upright stripes, lying stripes, no stripes, each beginning anywhere."""
    wave = 60 * np.sign(np.sin(np.arange(EDGE) / 3))[:, None]
    for i in range(10):
        lying = np.broadcast_to(np.roll(wave, 2 * i, 0), (EDGE, EDGE))
        for name, stripes in (("lying", lying), ("upright", lying.T), ("without", 0)):
            save(tmp_path / "textures" / name / f"{i}.png", noise(i) + stripes)
    return tmp_path / "textures"


@pytest.mark.parametrize("name", NAMES)
def test_every_example_explains_itself(name, monkeypatch, capsys):
    """--help of each script says what it does and which commands to try, as its docstring does."""
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert ("    python examples" if name in STARTS_ITSELF else "    featcli extract ") in said
    assert f"    python examples/{name}.py " in said
    assert ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) in said


def test_a_linear_probe_tells_textures_apart(tmp_path, textures, capsys):
    """A probe on maps pooled by extract, or while they are read, is far better than chance on held-out images."""
    module = example("linear_probe")
    shutil.copy(textures / "lying" / "0.png", textures / "of_no_class.png")
    (textures / "upright" / "0.png").write_bytes(b"no picture")
    extract(textures, output=tmp_path / "maps", **OPTIONS, out_features=("stage2", "stage3"), dtype="float16")
    extract(textures, output=tmp_path / "pooled", **OPTIONS, out_features=("stage2",), pool="avg")
    for dump in ("maps", "pooled"):
        capsys.readouterr()
        module.main([str(tmp_path / dump), "--stage", "stage2"])
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == "stage2: learned from 23 images, 6 held out"
        shares = {line[:13].strip(): float(line[13:]) for line in rest}
        assert shares["chance"] == pytest.approx(1 / 3, abs=0.001)
        assert shares["accuracy"] >= 0.8 > shares["most frequent"]


@pytest.fixture
def competition(tmp_path, textures):
    """Make a folder as a competition gives it: pictures named by ids, and train.csv with ids, classes and splits."""
    folder = tmp_path / "competition"
    (folder / "train").mkdir(parents=True)
    lines = ["id,texture,split,fold"]
    for number, path in enumerate(sorted(textures.rglob("*.png"), key=lambda path: path.name)):
        shutil.copy(path, folder / "train" / f"{number:06x}.png")
        split = "val" if number >= 24 else "train"
        lines.append(f"{number:06x},{'' if number == 1 else path.parent.name},{split},{number % 5}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_linear_probe_of_a_table(tmp_path, competition, capsys):
    """Classes and splits are columns of a table, images without a class are left out, and other columns refused."""
    extract(
        table=competition / "train.csv",
        path_format="train/{id}.png",
        output=tmp_path / "d",
        **OPTIONS,
        out_features="stage2",
        pool="avg",
    )
    module = example("linear_probe")
    for options, counts in (
        (["--train", "split=train", "--test", "split=val"], (23, 6)),
        (["--test", "fold=0"], (23, 6)),
        (["--train", "split=train"], (17, 6)),
        (["--train", "fold=1", "--train", "fold=2", "--test", "fold=0"], (11, 6)),
    ):
        capsys.readouterr()
        module.main([str(tmp_path / "d"), "--label", "texture", *options])
        first, accuracy, *_ = capsys.readouterr().out.splitlines()
        assert first == "stage2: learned from {} images, {} held out".format(*counts)
        assert float(accuracy.split()[1]) >= 0.8
    there = "choose one with --label: id, texture, split, fold"
    for options, message in (
        ([], f"there is no column 'label' ({there})"),
        (["--label", "textur"], f"there is no column 'textur' ({there})"),
        (["--label", "texture", "--test", "split=test"], "no image has split=test (there are train, val)"),
        (["--label", "texture", "--test", "split"], "'split' is no condition (write COLUMN=VALUE, such as split=val)"),
        (["--label", "texture", "--train", "fold=1", "--test", "fold=1"], "some images are in both --train and --test"),
        (["--label", "split"], "'train', 'val' are splits, not classes"),
    ):
        with pytest.raises(SystemExit) as ended:
            module.main([str(tmp_path / "d"), *options])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_linear_probe_of_one_class_is_refused(tmp_path, textures, capsys):
    """A dump with one class is refused in a sentence, with exit code 2."""
    extract(textures / "lying", output=tmp_path / "d", **OPTIONS, pool="avg")
    with pytest.raises(SystemExit) as ended:
        example("linear_probe").main([str(tmp_path / "d")])
    assert ended.value.code == 2
    assert "two classes with two images each are needed" in capsys.readouterr().err


def test_a_linear_probe_of_splits_is_refused():
    """Names of splits are not taken for classes, however many images each has."""
    with pytest.raises(UsageError, match="'Train', 'val' are splits, not classes"):
        example("linear_probe").probe(np.eye(8), ["Train", "val"] * 4, np.arange(8) < 4)


def test_every_class_is_learned_and_held_out():
    """Each class is held out by about the share, the smallest by one image, and a class of one image never."""
    labels = np.array(["a"] * 40 + ["b"] * 2 + ["c"])
    held_out = example("linear_probe").chosen_to_hold_out(labels, 0.25, seed=0)
    assert [int(held_out[labels == name].sum()) for name in "abc"] == [10, 1, 0]


def test_the_twin_is_the_nearest_neighbour(tmp_path, photos, capsys):
    """The copy of a picture comes first with similarity 1, and the picture itself does not come at all."""
    shutil.copy(photos / "trip" / "06.jpg", photos / "twin.jpg")
    extract(photos, output=tmp_path / "d", **OPTIONS)
    example("nearest_neighbours").main([str(tmp_path / "d"), "trip/06.jpg", "-k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == "1.0000  'twin.jpg'"
    assert lines[1:] == sorted(lines[1:], reverse=True)
    assert "trip/06.jpg" not in str(lines)


def test_neighbours_of_an_unknown_key(tmp_path, photos, capsys):
    """A key that the dump does not have is an error that names the key."""
    extract(photos, output=tmp_path / "d", **OPTIONS, pool="avg")
    with pytest.raises(SystemExit) as ended:
        example("nearest_neighbours").main([str(tmp_path / "d"), "trip/none.jpg"])
    assert ended.value.code == 2
    assert "'trip/none.jpg'" in capsys.readouterr().err


@pytest.fixture
def dented(tmp_path):
    """Make two dumps: six pictures with nothing but grain, and four more, one of them with a dent."""
    for seed in range(10):
        save(tmp_path / ("normal" if seed < 6 else "tested") / f"{seed}.png", noise(seed))
    save(tmp_path / "tested" / "dent.png", noise(10) + 70 * disc(116, 44, 9))
    for name in ("normal", "tested"):
        extract(tmp_path / name, output=tmp_path / f"{name}_feats", **OPTIONS, out_features=("stage2", "stage3"))
    return tmp_path


def test_the_dent_is_the_anomaly(dented, capsys):
    """The picture with the dent has the highest score, and its hottest position and pixel are in the dent."""
    heat = dented / "heat.png"
    arguments = [dented / "normal_feats", dented / "tested_feats", "--bank", "200", "--output", heat]
    example("anomaly_map").main([str(argument) for argument in arguments])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    scores = [float(line[0]) for line in lines]
    assert lines[0][1] == "'dent.png'"
    assert len(lines) == 5
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 1.5 * scores[1]
    row, column = int(lines[0][4].strip(",")), int(lines[0][6])
    assert abs(row - 116 / 8) <= 2 >= abs(column - 44 / 8)
    with Image.open(heat) as sheet:
        first = np.asarray(sheet, float)[8 + 16 :][:EDGE]
    seen, overlay = first[:, 8:][:, :EDGE], first[:, 16 + EDGE :][:, :EDGE]
    with Image.open(dented / "tested" / "dent.png") as picture:
        assert np.array_equal(seen, np.asarray(picture.convert("RGB")))
    hidden = np.abs(overlay - seen).sum(2)
    assert hidden[disc(116, 44, 9)].mean() > 100
    assert hidden[~disc(116, 44, 60)].mean() < 5


def test_normal_images_are_no_anomaly(dented):
    """If the bank holds every vector of the tested images, each score is tiny compared to that of a dent."""
    module, normal = example("anomaly_map"), open_dump(dented / "normal_feats")
    stages = ["stage2", "stage3"]
    same, _ = module.anomaly_maps(normal, normal, stages, size=6 * 20 * 20)
    other, highest = module.anomaly_maps(normal, open_dump(dented / "tested_feats"), stages)
    assert highest < other["dent.png"].max()  # the scale ends above its beginning
    assert max(scores.max() for scores in same.values()) < 0.02 * other["dent.png"].max()


def test_a_coreset_covers_what_is_rare():
    """One vector far from a thousand others is among the two that are kept."""
    import torch

    candidates = torch.rand(1000, 8)
    candidates[321] += 10
    assert 321 in example("anomaly_map").coreset(candidates, 2)


def test_dumps_of_two_kinds_are_not_compared(dented):
    """Maps of other weights are refused, because they would make every position an anomaly."""
    extract(dented / "tested", output=dented / "d", **OPTIONS, out_features=("stage2", "stage3"), seed=1)
    normal, tested = open_dump(dented / "normal_feats"), open_dump(dented / "d")
    with pytest.raises(UsageError, match="in two ways"):
        example("anomaly_map").anomaly_maps(normal, tested, ["stage2", "stage3"])


@pytest.fixture
def discs(tmp_path):
    """Make sixteen pictures of a bright disc, half as high as wide, with masks: 1 in the disc, 255 at its rim."""
    places = np.random.default_rng(0).integers(40, 120, (16, 2))
    for i, (row, column) in enumerate(places):
        rim, inner = disc(row, column, 34), disc(row, column, 30)
        save(tmp_path / "discs" / "a" / f"{i:02d}.png", (noise(i) + 90 * inner)[::2])
        save(tmp_path / "masks" / "a" / f"{i:02d}.png", np.where(inner, 1, np.where(rim, 255, 0))[::2])
    return tmp_path


def test_a_segmentation_head_finds_discs(discs, capsys):
    """Trained on stored maps, the head's mean IoU on held-out images is far above that of one class everywhere."""
    draw(discs / "discs" / "without_mask.png", 1)
    extract(discs / "discs", output=discs / "d", **OPTIONS, out_features=("stage1", "stage2"))
    example("segmentation_head").main([str(discs / "d"), str(discs / "masks"), "--stage", "stage1", "--epochs", "100"])
    title, *rest = capsys.readouterr().out.splitlines()
    shares = {line[:13].strip(): float(line[13:]) for line in rest}
    assert title.startswith("stage1: ")
    assert 0.3 < shares["most frequent"] < 0.5
    assert shares["head"] > 0.75


def test_mean_iou_of_known_guesses(discs):
    """A guess of background everywhere gets half the background's share, and pixels without class do not count."""
    module = example("segmentation_head")
    extract(discs / "discs", output=discs / "d", **OPTIONS, out_features=("stage4",))
    dump = open_dump(discs / "d")
    masks = module.masks_of(dump, discs / "masks")
    pixels = np.concatenate([mask.numpy().ravel() for mask in masks.values()])
    share = (pixels == 0).sum() / (pixels != 255).sum()
    assert module.mean_iou(lambda maps: 0, dump, "stage4", masks, list(masks), 2) == pytest.approx(share / 2)


def test_masks_that_do_not_fit_are_refused(discs):
    """A dump of another --fit and a coloured mask are refused, because masks would not fit the maps."""
    module = example("segmentation_head")
    extract(discs / "discs", output=discs / "cropped", **{**OPTIONS, "fit": "crop"})
    with pytest.raises(UsageError, match="--fit squash"):
        module.measure(open_dump(discs / "cropped"), "stage4", discs / "masks")
    extract(discs / "discs", output=discs / "d", **OPTIONS)
    draw(discs / "masks" / "a" / "03.png", 1)
    with pytest.raises(UsageError, match=r"03\.png: a mask of mode RGB"):
        module.measure(open_dump(discs / "d"), "stage4", discs / "masks")


def test_the_rest_of_a_maskformer_gives_what_the_whole_gives(tmp_path, capsys):
    """The demo builds a model and dumps its maps: replay equals the whole model bit for bit, and the demo says so."""
    pytest.importorskip("transformers")
    module, model, maps = example("maskformer_replay"), tmp_path / "maskformer", tmp_path / "maps"
    module.main([str(model), str(maps), str(SAMPLES / "things"), "--demo"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}  the same bit for bit" for name in module.OUTPUTS]
    other = tmp_path / "other"
    shutil.copytree(SAMPLES / "things", other)
    shutil.copy(other / "street.jpg", other / "fruit.jpg")
    assert min(module.differences(str(model), open_dump(maps), other).values()) > 0
    with pytest.raises(SystemExit) as ended:
        module.main([str(model), str(maps), str(SAMPLES / "things"), "--demo"])
    assert ended.value.code == 2


@pytest.mark.long
def test_a_upernet_learns_the_same_with_our_module(capsys):
    """Twenty steps of training give the losses of transformers' own backbone to 1e-5, and the losses fall."""
    pytest.importorskip("transformers")
    module = example("train_upernet")
    module.main([str(SAMPLES / "nature"), "--demo"])
    steps = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    own, ours = np.array(steps, float).T
    assert len(own) == 20
    np.testing.assert_allclose(ours, own, rtol=0, atol=1e-5)
    assert ours[-1] < 0.9 * ours[0]
    with pytest.raises(SystemExit) as ended:
        module.main(["nowhere", "--demo"])
    assert ended.value.code == 2
