import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featcli
from conftest import draw, tree, with_columns
from featcli import open_dump
from featcli.dump.picture_folders import remembered_pictures
from featcli.reading.keys import match_keys
from featcli.views.dump_pictures import DumpPictures
from featcli.views.neighbours import neighbours
from featcli.views.stage_view import evenly_spaced, study

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1, 2), "batch_size": 2, "shard_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make seven pictures, two of them equal, one broken, one with a name that is HTML."""
    made = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        draw(made / "things" / f"{i}.png", i, (120, 90))
    (made / "things" / "3.png").write_bytes(b"no picture")
    draw(made / "<script>alert(1)<.png", 9)
    shutil.copy(made / "things" / "0.png", made / "things" / "twin.png")
    return made


@pytest.fixture(scope="module")
def dump(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumps") / "dump"
    featcli.extract(folder, output=path, **OPTIONS)
    return open_dump(path)


def facts_of(page):
    """Return the facts that the script of a page gets."""
    return json.loads(re.search(r'id="facts">(.*)</script>', page.read_text("utf-8"))[1])


def picture_of(data):
    """Return a picture inside a page."""
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("checkpoint", ["test_resnet", "dinov2", "swin"])
@pytest.mark.parametrize("fit", [None, "squash", "pad", "native"])
def test_pictures_are_those_that_the_backbone_saw(tmp_path, folder, request, checkpoint, fit):
    """Pictures made from the plan alone equal those of the checkpoint's own preprocessing."""
    name = checkpoint if checkpoint == "test_resnet" else request.getfixturevalue(f"{checkpoint}_folder")
    options = {"checkpoint": name, "random_init": True, "fit": fit}
    try:
        featcli.extract(folder / "things", output=tmp_path / "d", pool="avg", threads=1, **options)
    except featcli.UsageError:
        pytest.skip("this backbone takes no such size")
    dump = open_dump(tmp_path / "d")
    backbone = featcli.load_backbone(**options)
    pictures = DumpPictures(dump, str(folder / "things"))
    for row in (0, 4):
        expected = backbone.preprocess(Image.open(folder / "things" / dump.keys[row]))
        assert torch.equal(torch.from_numpy(np.array(pictures[row])).permute(2, 0, 1), expected)
    made = dump.preprocessing
    assert (made.mean, made.std, made.size) == tuple(
        getattr(backbone.preprocessing, n) for n in ("mean", "std", "size")
    )


@pytest.mark.parametrize("fit", [None, "squash"])
def test_greys_and_processors_that_do_not_resize(tmp_path, folder, fit):
    """Preprocessing made again has the backbone's channels, and resizes as --fit did."""
    import transformers

    config = transformers.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "c")
    processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64}, do_resize=fit is None, resample=0)
    processor.save_pretrained(tmp_path / "c")
    options = {"checkpoint": str(tmp_path / "c"), "fit": fit, "image_size": "64" if fit else None}
    featcli.extract(folder / "things", output=tmp_path / "d", threads=1, **options)
    dump = open_dump(tmp_path / "d")
    backbone, made = featcli.load_backbone(**options), dump.preprocessing
    with Image.open(folder / "things" / "0.png") as picture:
        assert np.array_equal(made.fit(picture), backbone.preprocess(picture).numpy())
    assert (made.channels, made.mean) == (1, backbone.preprocessing.mean)
    assert DumpPictures(dump, str(folder / "things"))[0].mode == "RGB"


def test_pictures_that_are_not_there(dump, folder, tmp_path):
    """A missing or broken file gives no picture, and keys of a hostile dump do not lead out of the folder."""
    pictures = DumpPictures(dump, str(folder))
    assert pictures[dump.rows["things/0.png"]] is not None
    assert pictures[dump.rows["things/3.png"]] is None
    assert DumpPictures(dump, str(tmp_path))[0] is None
    for key in ("../things/0.png", str(folder / "things" / "0.png")):
        row = dump.rows["things/0.png"]
        dump.keys[row], before = key, dump.keys[row]
        root = str(folder / "things")
        assert DumpPictures(dump, root)[row] is None
        assert DumpPictures(dump, root, allow_outside=True)[row] is not None
        dump.keys[row] = before
    other = tmp_path / "other"
    draw(other / "things" / "0.png", 77, (200, 100))
    pictures = DumpPictures(dump, str(other))
    assert pictures[dump.rows["things/0.png"]] is None  # it has that name, but is not what was extracted
    assert pictures.missing == {"not the file that was extracted": 1}
    with pytest.raises(featcli.UsageError, match="no such folder"):
        DumpPictures(dump, str(folder / "nowhere"))


def test_statistics_are_numpys(dump):
    """Mean, deviation, extremes, zeros and dead channels are those of all values of the studied images."""
    rows = np.flatnonzero(dump.valid)
    for stage in dump.stages:
        values = dump[stage][rows]
        found, _ = study(dump[stage], rows.tolist())
        assert found.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-5)
        assert found.std == pytest.approx(values.std(dtype=np.float64), rel=1e-4)
        assert (found.least, found.most) == (values.min(), values.max())
        assert found.zeros == (values == 0).mean()
        assert found.dead == np.flatnonzero((values == 0).all((0, 2, 3))).tolist()
        assert 0.99 * (values != 0).sum() <= sum(found.counts) <= (values != 0).sum()
        assert found.not_finite == 0


def test_colours_are_principal_components(dump):
    """The three directions equal those of a full decomposition, and a value has one colour in every picture."""
    rows = np.flatnonzero(dump.valid).tolist()
    for stage in dump.stages:
        values = dump[stage][rows]
        points = values.transpose(0, 2, 3, 1).reshape(-1, values.shape[1])
        _, _, expected = np.linalg.svd(points - points.mean(0), full_matrices=False)
        _, colours = study(dump[stage], rows)
        np.testing.assert_allclose(np.abs((colours.components * expected[:3]).sum(1)), 1, atol=1e-3)
        whole = colours.components_of(values.transpose(1, 0, 2, 3).reshape(values.shape[1], -1, values.shape[3]))
        alone = np.concatenate([colours.components_of(maps) for maps in values])
        assert np.array_equal(whole, alone)
        means = np.stack([colours.mean_of(maps).astype(int).sum(2) for maps in values])
        order = np.argsort(values.mean(1), None)
        assert (np.diff(means.ravel()[order]) >= -1).all()  # brighter for a higher mean
        assert len(np.unique(alone.reshape(-1, 3), axis=0)) > 20


def test_maps_without_any_difference(dump):
    """A stage that is the same everywhere is drawn in one colour, without a division by zero."""

    class Flat:
        stage = dump.stages["stage1"]

        def __getitem__(self, row):
            return np.zeros((self.stage.shape[0], 4, 4), np.float32)

    statistics, colours = study(Flat(), [0, 1])
    assert (statistics.zeros, len(statistics.dead)) == (1, Flat.stage.shape[0])
    assert len(np.unique(colours.components_of(Flat()[0]))) == 1


class Maps:
    """A stage with these maps."""

    def __init__(self, dump, maps):
        self.stage = replace(dump.stages["stage1"], shape=maps.shape[1:])
        self.maps = maps

    def __getitem__(self, row):
        return self.maps[row]


def test_all_of_a_map_counts(dump):
    """Points come from everywhere in a map, however few are drawn."""
    maps = np.random.default_rng(0).uniform(5, 6, (256, 2048, 7, 7)).astype(np.float32)
    maps[:, :, :, 0] = 1
    statistics, colours = study(Maps(dump, maps), range(256))
    assert (statistics.low, statistics.high) == (pytest.approx(1, abs=0.1), pytest.approx(6, abs=0.1))
    of_ones = statistics.counts[0] / sum(statistics.counts)
    assert of_ones == pytest.approx(1 / 7, abs=0.02)
    assert colours.heat_high > 5 > colours.heat_low


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_values_that_are_no_numbers(dump, value):
    """Infinite, undefined and huge values are counted, and left out of all other numbers."""
    maps = np.random.default_rng(0).normal(size=(3, 4, 5, 5)).astype(np.float32)
    clean, _ = study(Maps(dump, maps), range(3))
    maps[1, 2, 3, 3] = value
    statistics, colours = study(Maps(dump, maps), range(3))
    assert colours.components_of(maps[1]).shape == colours.mean_of(maps[1]).shape == (5, 5, 3)
    assert json.dumps(statistics.__dict__, allow_nan=False)
    if not np.isfinite(value):
        assert statistics.not_finite == 1
        assert statistics.mean == pytest.approx(clean.mean, abs=0.05)


@pytest.mark.parametrize("values", [(1e9, 1e9), (1, 1 + 4e-7), (0, 0), (0, 1e-38)], ids=str)
def test_stages_of_hardly_any_difference(dump, values):
    """Constant and nearly constant maps have a histogram and colours."""
    maps = np.full((2, 4, 5, 5), values[0], np.float32)
    maps[1] = values[1]
    statistics, colours = study(Maps(dump, maps), range(2))
    assert statistics.high > statistics.low
    assert colours.mean_of(maps[0]).dtype == np.uint8


def test_evenly_spaced():
    """Rows are spaced evenly from the first to the last, none comes twice, and few come all."""
    assert evenly_spaced(range(5), 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(range(101), 5) == [0, 25, 50, 75, 100]
    assert evenly_spaced(range(9), 1) == [0]


def test_neighbours_are_by_cosine():
    """Neighbours come nearest first, without the image itself, and a zero vector has none near."""
    vectors = np.array([[1, 0], [2, 0.1], [0, 1], [0, 0]], np.float32)
    near = neighbours(vectors)
    assert [place for place, _ in near[0]] == [1, 2, 3]
    assert near[0][0][1] == pytest.approx(np.cos(np.arctan(0.05)), abs=1e-4)
    assert near[3][0][1] == 0
    assert neighbours(vectors[:1]) == [[]]


def test_neighbours_are_those_of_the_whole_dump(dump, tmp_path, cli):
    """A page of one key has its nearest images of the whole dump by the last stage, named by key if not on the page."""
    target = tmp_path / "x.html"
    assert cli("show", dump.path, "things/0", "things/4", "-o", target).code == 0
    facts = facts_of(target)
    vectors, rows = dump.pooled("stage2")
    unit = vectors.astype(float) / np.linalg.norm(vectors.astype(float), axis=1, keepdims=True)
    similar = unit @ unit[rows.tolist().index(dump.rows["things/0.png"])]
    expected = [(dump.keys[rows[i]], similar[i]) for i in np.argsort(-similar) if dump.keys[rows[i]] != "things/0.png"]
    near = [
        (place if isinstance(place, str) else facts["images"][place]["key"], value)
        for place, value in facts["images"][0]["near"]["stage2"]
    ]
    assert {key for key, _ in near} == {key for key, _ in expected}
    assert [value for _, value in near] == pytest.approx([value for _, value in expected], abs=1e-4)
    here = [facts["images"][place]["key"] for place, _ in facts["images"][0]["near"]["stage2"] if place in (0, 1)]
    assert here == ["things/4.png"]
    assert near[0][0] == "things/twin.png"
    assert facts["compared"] == 6
    assert [place for place, _ in facts["images"][0]["near"]["stage1"]] == [1]  # by other stages, those on the page


def test_neighbours_of_a_part_of_a_large_dump(dump, monkeypatch):
    """If more images than may be read exist, evenly spaced ones are compared, and always the shown ones."""
    from featcli.views import neighbours as module

    monkeypatch.setattr(module, "MOST_BYTES", 3 * dump.stages["stage2"].row_bytes())
    valid = np.flatnonzero(dump.valid).tolist()
    assert module.rows_to_compare(dump, "stage2", [valid[1]]) == sorted({*evenly_spaced(valid, 3), valid[1]})


def test_a_sheet(dump, folder, tmp_path, cli):
    """The picture stands beside the maps of its stages, which are drawn in cells, with captions."""
    target = tmp_path / "made" / "sheet.png"
    run = cli("show", dump.path, "things/0.png", "things/twin.png", "--root", folder, "-o", target)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{target}: 2 images, 2 stages\n"
    sheet = np.asarray(Image.open(target))
    left, top, panel, step, large = 20, 80, 224, 234, 458
    seen = DumpPictures(dump, str(folder))[dump.rows["things/0.png"]]
    shown = sheet[top : top + large, left : left + large]
    assert np.array_equal(shown, np.asarray(seen.resize((large, large), Image.Resampling.LANCZOS)))
    around = np.concatenate([sheet[top - 1, left : left + large], sheet[top : top + large, left + large]])
    assert (around < 200).all()  # an edge makes a white picture visible
    _, colours = study(dump["stage1"], np.flatnonzero(dump.valid).tolist())
    cells = Image.fromarray(colours.components_of(dump["stage1"]["things/0.png"]))
    first = sheet[top : top + panel, left + large + 10 :][:, :panel]
    assert np.array_equal(first, np.asarray(cells.resize((panel, panel), Image.Resampling.NEAREST)))
    second = sheet[top + 2 * step + 20 :][:panel, left + large + 10 :][:, :panel]
    assert np.array_equal(first, second)  # equal pictures look equal
    assert [path.name for path in target.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_without_pictures(dump, tmp_path, cli, monkeypatch):
    """If the pictures are elsewhere, maps are drawn alone, and a message says what to give."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dump.path, tmp_path / "far" / "away" / "d")
    run = cli("show", "far/away/d", "-o", "sheet.webp")
    assert run.code == 0
    assert run.err == "3 pictures of '.' not shown: not there (see --root)\n"
    with Image.open("sheet.webp") as sheet:
        assert sheet.width == 2 * 20 + 458 + 2 * 234


def test_keys_as_they_are_typed():
    """A key, a key without suffix or a pattern is found, the first that exists, in the given order, then by rows."""
    keys = ["a/1.png", "a/2.jpg", "a/2.png", "a/[x].png", "b/a/3.png", "b/*.png", "b/y.png", "v1", "v1.5"]
    rows = {key: row for row, key in enumerate(keys)}

    def found(*texts):
        return [[keys[row] for row in match.rows] for match in match_keys(texts, rows)]

    assert found("b/y", "a/2.png", "a/2") == [["b/y.png"], ["a/2.png"], ["a/2.jpg", "a/2.png"]]
    assert found("b/*.png", "b/*", "a/[x]", "v1") == [["b/*.png"], ["b/*.png"], ["a/[x].png"], ["v1"]]
    assert found("a/*", "a/?") == [keys[:4], keys[:3]]
    assert found("*/[13].png", "[!a]*3*") == [["a/1.png", "b/a/3.png"], ["b/a/3.png"]]
    assert [match.is_pattern for match in match_keys(["b/*.png", "b/*", "b/?.png"], rows)] == [False, False, True]
    for wrong, near in (("a/1.pgn", "a/1.png"), ("A/*", "a/1.png"), ("y", "b/y.png"), ("B/Y?", "b/y.png")):
        with pytest.raises(featcli.UsageError) as refused:
            match_keys(["a/*", wrong], rows)
        assert repr(wrong) in refused.value.message
        assert f"did you mean {near!r}?" in refused.value.hint


def test_patterns_of_keys_are_drawn(dump, folder, tmp_path, cli):
    """Images of a pattern are drawn once, in row order; those without maps are left out, with a message."""
    target = tmp_path / "x.html"
    run = cli("show", dump.path, "things/twin", "things/*", "--root", folder, "-o", target)
    assert (run.code, run.err) == (0, "'things/*': 1 image without maps left out\n")
    keys = [image["key"] for image in facts_of(target)["images"]]
    assert keys == [f"things/{name}.png" for name in ("twin", 0, 1, 2, 4)]


def test_pictures_are_found_where_the_run_had_them(tmp_path, folder, cli, monkeypatch):
    """Without --root pictures are found where extract found them, also for several inputs, and after a move of all.

    No file of the dump says so: its bytes are those of a dump that lies elsewhere.
    """
    shutil.copytree(folder, tmp_path / "a" / "pictures")
    shutil.copytree(folder / "things", tmp_path / "b" / "things")
    monkeypatch.chdir(tmp_path / "a")
    if not hasattr(os, "setxattr"):
        pytest.skip("no extended attributes here")
    try:
        os.setxattr(tmp_path, "user.test", b"")
    except OSError:
        pytest.skip("no extended attributes on this disk")
    options = {**OPTIONS, "pool": "avg"}
    featcli.extract("pictures", output="d", **options)
    featcli.extract(folder, output=tmp_path / "other", **options)
    assert tree(tmp_path / "a" / "d") == tree(tmp_path / "other")
    (tmp_path / "a").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = cli("show", "moved/d", "-o", "x.html")
    assert (run.code, run.err) == (0, "")
    assert run.out == "x.html: 6 images, 2 stages, pictures from 'moved/pictures'\n"
    assert all(image["picture"] for image in facts_of(Path("x.html"))["images"])
    key = "things/0.png"
    assert open_dump("moved/d").picture_path(key) == str(tmp_path / "moved" / "pictures" / key)
    assert open_dump("moved/d").picture_path(key, root=folder) == str(folder / key)
    with pytest.raises(featcli.UsageError, match=r"picture 'things/0\.png': not there"):
        open_dump("moved/d").picture_path(key, root="moved")

    inputs = ["moved/pictures/things", "b/things", "moved/pictures/<script>alert(1)<.png"]
    featcli.extract(inputs, output="several", **options)
    several = open_dump("several")
    for row, key in enumerate(several.keys):
        lead, _, name = key.rpartition("/")
        where = {"": "moved/pictures", "pictures/things": "moved/pictures/things", "b/things": "b/things"}[lead]
        assert several.picture_path(row) == str(tmp_path / where / name)
    shutil.rmtree(tmp_path / "b")
    said = cli("show", "several", "pictures/things/0", "-o", "y.html").out
    assert said == "y.html: 1 image, 2 stages, pictures from 2 folders\n"
    row = several.rows["pictures/things/0.png"]
    several.keys[row] = f"pictures/things/{folder}/things/0.png"  # hostile: an absolute path behind a lead
    with pytest.raises(featcli.UsageError, match="outside of it"):
        several.picture_path(row)
    for noted in (b"", b"{", b"[[1]]", b"3", b'[["", "\\u0000"]]', b'[["", "nowhere"]]', b"[" * 2000):
        os.setxattr("several", "user.featcli.pictures", noted)
        assert remembered_pictures(Path("several")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["things/9.png", "-o", "x.png"], 2, "not in this dump"),
        (["nothing/*", "-o", "x.png"], 2, "no key of this dump is like that"),
        (["things/[3].*", "-o", "x.png"], 2, "it has no maps: not_an_image"),
        (["things/3.png", "-o", "x.png"], 2, "it has no maps: not_an_image"),
        (["-o", "x.pdf"], 2, "no picture has that suffix"),
        (["-o", "x.png", "--root", "nowhere"], 2, "no such folder"),
        (["-o", "x.html", "--num-images", "0"], 2, "must be at least 1"),
        (["-o", "taken.png"], 5, "this file is there already"),
        (["-o", "taken.html"], 5, "this file is there already"),
        (["-o", "x.png", "--stage", "stage9"], 2, "there is no stage 'stage9'"),
        (["-o", "x.webp", "--stage", "stage1", *["things/0.png"] * 40], 2, "this format ends at 16,383"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(dump, tmp_path, cli, monkeypatch, arguments, code, says):
    """A request that is impossible ends in one line with a way out and the documented exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("taken.png", "taken.html"):
        Path(name).write_text("mine")
    run = cli("show", dump.path, *arguments)
    assert (run.code, len(run.err.splitlines())) == (code, 2)
    assert says in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.html", "taken.png"]


def test_pooled_dumps(folder, tmp_path, cli):
    """show refuses vectors with a reason, and the page has pictures, statistics and neighbours of them."""
    featcli.extract(folder, output=tmp_path / "d", pool="avg", **OPTIONS)
    run = cli("show", tmp_path / "d", "-o", tmp_path / "x.png")
    assert run.code == 2
    assert "pooled to vectors" in run.err
    assert cli("show", tmp_path / "d", "-o", tmp_path / "x.html", "--root", folder).code == 0
    facts = facts_of(tmp_path / "x.html")
    assert all(image["maps"] == {} and image["picture"] for image in facts["images"])
    keys = [image["key"] for image in facts["images"]]
    zero = facts["images"][keys.index("things/0.png")]
    assert zero["near"]["stage2"][0] == [keys.index("things/twin.png"), 1.0]


@pytest.mark.parametrize("name", ["x.png", "x.html", "shards/00000.h5", "images.jsonl", "new/x.html"])
@pytest.mark.parametrize("command", ["show", "export"])
def test_nothing_is_written_into_a_dump(dump, tmp_path, cli, command, name):
    """An output inside a dump is refused, even with --overwrite, so that no file of the dump is overwritten."""
    shutil.copytree(dump.path, tmp_path / "d")
    before = tree(tmp_path)
    run = cli(command, tmp_path / "d", "-o", tmp_path / "d" / name, "--overwrite")
    assert run.code in (2, 5)  # 2: this command lacks the suffix
    assert run.code == 2 or "inside the dump" in run.err
    assert tree(tmp_path) == before


def test_chosen_stages(dump, folder, tmp_path, cli):
    """--stage draws only these stages."""
    given = ("--root", folder, "--stage", "stage2")
    assert cli("show", dump.path, *given, "-o", tmp_path / "x.png").code == 0
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width == 2 * 20 + 458 + 234
    assert cli("show", dump.path, *given, "-o", tmp_path / "x.html").code == 0
    assert [stage["name"] for stage in facts_of(tmp_path / "x.html")["stages"]] == ["stage2"]


@pytest.mark.parametrize("options", [{"fit": "native"}, {"dtype": "bfloat16"}, {"pool": "3x3"}], ids=str)
def test_other_dumps(folder, tmp_path, cli, options):
    """Maps of many sizes, of bfloat16 and in grids can be drawn."""
    draw(tmp_path / "p" / "wide.png", 3, (300, 100))
    shutil.copytree(folder, tmp_path / "p", dirs_exist_ok=True)
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS, **options)
    for name in ("x.png", "x.html"):
        assert cli("show", tmp_path / "d", "wide.png", "--root", tmp_path / "p", "-o", tmp_path / name).code == 0
    height, width, _ = picture_of(facts_of(tmp_path / "x.html")["images"][0]["maps"]["stage1"][0]).shape
    assert (width > height) == (options == {"fit": "native"})


COLUMNS = {  # of the seven images in `folder`
    "label": ("text", [None, *["things"] * 6]),
    "split": ("text", ["train", "test", "train", "test", "train", "train", ""]),
    "score": ("float", [0.5, 1, "inf", 3, None, -0.25, 8]),
    "note": ("text", [f"</script><b>{n}</b> a longer note that is not cut off in the middle" for n in range(7)]),
    "size": ("json", [[n, 2**60] for n in range(7)]),
    "id": ("int", [2**60 + n for n in range(7)]),
    "a column with a name that is longer than a phone is wide, without any break: " + "x" * 400: ("bool", [True] * 7),
}


def test_labels_above_images(dump, tmp_path, cli):
    """A picture says the label of an image after its key, if no folder of the key is called so."""
    from featcli.views.show import _titles

    shutil.copytree(dump.path, tmp_path / "d")
    with_columns(tmp_path / "d", {"label": ("text", [None, "things", "a cat", *"dogs"])})
    titles = _titles(open_dump(tmp_path / "d"), [2, 0, 1])
    assert titles == ["things/1.png: a cat", "<script>alert(1)<.png", "things/0.png"]
    assert cli("show", tmp_path / "d", "things/1", "-o", tmp_path / "x.png").code == 0
    printed = cli("inspect", tmp_path / "d").out
    assert "\ncolumns        label (text)\n" in printed


@pytest.fixture(scope="module")
def page(dump, folder, tmp_path_factory):
    from featcli.views.show import Drawing, rows_to_draw
    from featcli.views.survey import survey

    path = tmp_path_factory.mktemp("pages") / "survey.html"
    shutil.copytree(dump.path, path.with_name("dump"))
    with_columns(path.with_name("dump"), COLUMNS)
    dump = open_dump(path.with_name("dump"))
    drawing = Drawing(dump, rows_to_draw(dump, 60), list(dump.stages), DumpPictures(dump, str(folder)))
    survey(drawing, str(path))
    assert not drawing.pictures.missing
    return path


def test_what_a_page_says(dump, page):
    """The facts on a page are those of the dump, it fetches nothing, and no name ends its script."""
    facts = facts_of(page)
    about = dict(facts["about"])
    assert about["images"] == "7: 6 written, 1 failed"
    assert about["fingerprint"] == dump.plan.fingerprint
    assert facts["failures"] == [{k: dump.failures[0][k] for k in ("key", "reason", "detail")}]
    assert [image["key"] for image in facts["images"]] == [key for key in dump.keys if key != "things/3.png"]
    found = {one["name"]: one["values"] for one in facts["columns"]}
    rows = [row for row in range(7) if dump.keys[row] != "things/3.png"]
    for name in ("label", "split", "score", "note"):
        assert found[name] == [COLUMNS[name][1][row] for row in rows]
    assert found["id"] == [str(COLUMNS["id"][1][row]) for row in rows]  # JavaScript would round these numbers
    assert found["size"] == [json.dumps(COLUMNS["size"][1][row]) for row in rows]
    assert max(map(len, found)) < 310
    text = page.read_text("utf-8")
    assert "<script>alert" not in text
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


def test_an_incomplete_dump_on_a_page(dump, tmp_path, cli):
    """A page of an incomplete dump, if asked for, shows the existing rows and says that shards are missing."""
    shutil.copytree(dump.path, tmp_path / "d")
    for gone in ("manifest.json", "shards/00001.json"):
        (tmp_path / "d" / gone).unlink()
    assert cli("show", tmp_path / "d", "-o", tmp_path / "x.html").code == 8
    assert cli("show", tmp_path / "d", "-o", tmp_path / "x.html", "--incomplete").code == 0
    assert "1 shard missing" in dict(facts_of(tmp_path / "x.html")["about"])["images"]


@contextmanager
def browser(width=1200, dark=False):
    """Start headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        pytest.skip("no chromium and chromedriver here")
    options = selenium.ChromeOptions()
    options.binary_location = found["chromium"]
    for name in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        " disable-component-update disable-sync disable-dev-shm-usage"
    ).split():
        options.add_argument(f"--{name}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options.add_argument(f"--user-data-dir={folder}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = selenium.Chrome(options=options, service=selenium.ChromeService(found["chromedriver"]))
        try:
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            yield driver
            assert driver.get_log("browser") == []  # no error, and nothing was refused
        finally:
            driver.quit()


def test_a_page_in_a_browser(page):
    """In a browser stages and views can be chosen, an image opened, and its equal opened as its nearest neighbour."""
    with browser() as driver:
        driver.get(page.as_uri())

        def all_of(selector):
            return driver.find_elements("css selector", selector)

        def texts(selector):
            return [element.text for element in all_of(selector)]

        def names_of_tiles():
            return [text.partition("\n")[0] for text in texts("#images .tile")]

        assert texts("h1") == ["dump"]
        assert texts("#stages button") == ["stage1", "stage2"]
        assert len(all_of("#images .tile img")) == 12  # six pictures, six maps
        assert "<script>alert(1)<.png" in names_of_tiles()
        before = all_of("#images .tile img")[1].get_attribute("src")
        all_of("#stages button")[0].click()
        assert texts("#stage")[0].startswith("stage1: ")
        assert all_of("#images .tile img")[1].get_attribute("src") != before
        assert all_of("#stages button")[0].get_attribute("aria-pressed") == "true"
        assert len(all_of("svg rect")) == 40
        all_of("#views button")[2].click()
        assert len(all_of("#images .tile img")) == 6
        loaded = "return [...document.images].every((image) => image.naturalWidth > 0)"
        assert driver.execute_script(loaded)
        driver.find_element("css selector", "#search input").send_keys("GS/1")
        assert [text for text in names_of_tiles() if text] == ["1.png"]
        assert texts("#hits") == ["1 of 6 on this page"]
        driver.find_element("css selector", "#search input").clear()
        driver.find_element("css selector", "#search input").send_keys(" ")
        all_of("#images .tile")[names_of_tiles().index("0.png")].click()
        assert texts("#key") == ["things/0.png"]
        assert texts("#near .tile")[0] == "twin.png\nthings\n1.000"
        all_of("#near .tile")[0].click()
        assert texts("#key") == ["things/twin.png"]
        driver.find_element("css selector", "dialog header button").click()
        assert not driver.execute_script("return document.querySelector('dialog').open")
        assert texts("#failures td")[:2] == ["things/3.png", "not_an_image"]


def test_columns_on_a_page_in_a_browser(page):
    """Images are coloured by a column and narrowed by its values: classes are chosen, numbers bounded, texts sought."""
    with browser() as driver:
        driver.get(page.as_uri())

        def all_of(selector):
            return driver.find_elements("css selector", selector)

        def texts(selector):
            return [element.text for element in all_of(selector)]

        def choose(selector, text):
            (option,) = [one for one in all_of(f"{selector} option") if one.text.startswith(text)]
            option.click()

        def colours(selector):
            all_dots = "[...document.querySelectorAll(arguments[0])]"
            return driver.execute_script(
                f"return {all_dots}.map((one) => getComputedStyle(one).backgroundColor)", selector
            )

        assert texts("#legend > span") == ["things", "missing"]
        assert texts("#images .value") == ["missing", *["things"] * 5]
        assert texts("#colour option")[:4] == ["nothing", "label", "split", "score"]
        choose("#colour", "split")
        assert texts("#legend > span") == ["train", "test", "empty text"]
        train, test, empty = colours("#legend .dot")
        assert colours("#images .dot") == [train, test, train, test, train, empty]
        assert len({train, empty, test}) == 3
        choose("#colour", "score")
        low, high = texts("#legend > span")[0].split()
        assert (low, high) == ("-0.25", "8")
        least, most = "rgb(68, 1, 84)", "rgb(253, 231, 37)"
        assert [colours("#images .dot")[place] for place in (4, 5, 2)] == [least, most, most]  # 2 is infinite
        choose("#colour", "nothing")
        assert (all_of("#images .dot"), texts("#legend > span")) == ([], [])

        def names():
            return [tile.text.partition("\n")[0] for tile in all_of("#images .tile") if tile.is_displayed()]

        choose("#column", "split")
        choose("#value", "empty text (1)")
        assert (names(), texts("#hits")) == (["twin.png"], ["1 of 6 on this page"])
        choose("#column", "score")
        least, most = all_of("#value input")
        least.send_keys("0.75")
        assert names() == ["0.png", "1.png", "2.png", "twin.png"]
        most.send_keys("2")
        assert names() == ["0.png"]
        choose("#column", "note")
        all_of("#value input")[0].send_keys("B>5</")
        assert names() == ["4.png"]
        all_of("#images .tile")[4].click()
        shown = dict(zip(texts("#columns dt"), texts("#columns dd"), strict=True))
        assert {shown["label"], shown["split"], shown["id"]} == {"things", "train", str(2**60 + 5)}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_on_a_phone_in_either_light(page, dark):
    """On a phone nothing is wider than the screen, and text stands out from its background in light and dark."""
    with browser(width=390, dark=dark) as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        colour = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        paper, ink, faint = (
            luminance(driver.execute_script(colour, *where))
            for where in (("body", "backgroundColor"), ("body", "color"), ("dt", "color"))
        )
        assert (paper < ink) == dark
        assert contrast(paper, ink) > 7
        assert contrast(paper, faint) > 4.5


def luminance(colour):
    """Return the relative luminance: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Return the contrast ratio: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
