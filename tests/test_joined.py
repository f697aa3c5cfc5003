import json
import pickle
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash
from independent_reader import read_shard
from PIL import Image
from safetensors import safe_open

import featcli
from conftest import draw
from featcli import open_dump
from featcli.dump.checksummed_json import checksummed, read_checksummed
from featcli.dump.plan import first_difference
from featcli.errors import ConflictError, IncompleteError, UsageError
from featcli.export.export import export
from featcli.reading.named import open_named
from featcli.spec.commands import ExportCommand

RESNET = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1, 2), "batch_size": 2, "shard_size": 2}
VIT = {**RESNET, "checkpoint": "test_vit", "out_indices": None, "out_features": "embedding", "batch_size": 4}
NAMES = ("stage1", "stage2")
INDICES = (0, 7, -1, slice(None), slice(3, 9, 2), slice(0), [8, 2, 3, 4], [], "dogs/5.png", ["dogs/6.png", 1])


def stored(dump):
    """Return (keys, {name: rows as float32, or a list of maps}, valid) of a dump, read without featcli."""
    keys, maps, valid = [], {}, []
    for path in sorted(p for p in Path(dump, "shards").iterdir() if p.suffix in (".h5", ".safetensors")):
        of_shard, arrays = read_shard(path)
        keys += of_shard
        valid += arrays.pop("valid").astype(bool).tolist()
        for name in [name for name in arrays if not name.endswith(".shapes")]:
            rows = arrays[name]
            rows = (rows.astype("u4") << 16).view("f4") if rows.dtype == np.uint16 else rows
            if (shapes := arrays.get(f"{name}.shapes")) is not None:
                ends = np.cumsum(shapes.astype(int).prod(1))[:-1]
                rows = [one.reshape(shape) for one, shape in zip(np.split(rows, ends), shapes, strict=True)]
            maps.setdefault(name, []).extend(rows)
    return keys, maps, valid


def equal(ours, theirs):
    """Return whether arrays, or lists of arrays, have the same numbers, with NaN where the other has it."""
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return np.array_equal(np.asarray(ours), np.asarray(theirs), equal_nan=True)


def rows_of(keys, index):
    """Return the rows that an index means, as numpy would."""
    rows = list(range(len(keys)))
    if isinstance(index, list):
        return [keys.index(one) if isinstance(one, str) else one for one in index]
    return keys.index(index) if isinstance(index, str) else rows[index]


def exported(path):
    """Return (keys, {output: rows}) of an exported file, read by the format's own library, without other columns."""
    if path.is_dir():
        lines = [json.loads(line) for line in (path / "images.jsonl").read_text().splitlines()]
        return [line["key"] for line in lines], {file.stem: np.load(file) for file in path.glob("*.npy")}
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            arrays = {name: file[name][:] for name in file}
        return [key.decode() for key in arrays["keys"]], {n: one for n, one in arrays.items() if one.dtype.kind == "f"}
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return json.loads(file.metadata()["keys"]), {n: one for n, one in arrays.items() if n != "valid"}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    names = [name for name, value in rows[0].items() if isinstance(value, list)]
    return [row["key"] for row in rows], {n: np.array([row[n] for row in rows], np.float32) for n in names}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Draw two folders of pictures with other keys; one picture of each is broken."""
    made = tmp_path_factory.mktemp("pictures")
    for i in range(9):
        draw(made / ("one/cats" if i < 4 else "two/dogs") / f"{i}.png", i, (60 + 8 * i, 80))
    for broken in ("one/cats/2.png", "two/dogs/7.png"):
        whole = (made / broken).read_bytes()
        (made / broken).write_bytes(whole[: len(whole) // 2])
    return made


@pytest.fixture(scope="module")
def dumps(pictures, tmp_path_factory):
    """Make small dumps by name: of the two folders, and of all pictures in memory, backwards and by another model."""
    made = tmp_path_factory.mktemp("dumps")
    one, two = pictures / "one", pictures / "two"
    keys = sorted(path.relative_to(one).as_posix() for path in one.rglob("*.png"))

    def extract(name, images, **options):
        featcli.extract(images, output=made / name, **{**RESNET, **options})

    extract("one", one)
    extract("two", two, format="safetensors", shard_size=3, batch_size=1, threads=1)
    for kind, options in (("half", {"dtype": "bfloat16"}), ("native", {"fit": "native"})):
        extract(f"{kind}1", one, **options)
        extract(f"{kind}2", two, **options, format="safetensors", shard_size=4)
    with ExitStack() as opened:
        backwards = {key: opened.enter_context(Image.open(one / key)) for key in reversed(keys)}
        extract("vit", backwards, **VIT)
    extract("seed", one, seed=1, pool="avg")
    return made


@pytest.mark.parametrize("kind", ["", "half", "native"])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_along_rows(dumps, kind, order):
    """Rows of several dumps follow one another: by every index they are what the files of each hold."""
    paths = [dumps / (f"{kind}{i}" if kind else ("one", "two")[i - 1]) for i in order]
    parts = [stored(path) for path in paths]
    keys, valid = ([value for part in parts for value in part[i]] for i in (0, 2))
    dump = open_dump(paths)
    assert (len(dump), dump.keys, dump.valid.tolist()) == (9, keys, valid)
    assert [dump.rows[key] for key in keys] == list(range(9))
    for name in NAMES:
        maps, expected = dump[name], [row for part in parts for row in part[1][name]]
        assert len(maps) == 9
        for index in (*INDICES, np.array(valid)):
            rows = np.flatnonzero(index).tolist() if isinstance(index, np.ndarray) else rows_of(keys, index)
            several = [rows] if isinstance(rows, int) else rows
            wanted = [expected[row] for row in several]
            for found in (maps[index], maps.tensor(index)):
                found = [found] if isinstance(rows, int) else list(found)
                assert equal([np.asarray(one.float() if torch.is_tensor(one) else one) for one in found], wanted)
        whole = maps[:, 0] if kind != "native" else [one[0] for one in expected]
        assert equal(list(whole), [one[0] for one in expected])
        walked = [
            (row, one) for run in dump.walk(name, at_once=2) for row, one in zip(run.rows, run.maps[name], strict=True)
        ]
        assert [row for row, _ in walked] == np.flatnonzero(valid).tolist()
        assert equal([one for _, one in walked], [expected[row] for row, _ in walked])
        features, rows = dump.pooled(name, rows=[8, 0])
        means = [expected[row].mean((1, 2), dtype=np.float32) for row in (0, 8)]
        assert rows.tolist() == [0, 8]
        np.testing.assert_allclose(features, means, rtol=1e-5)
    assert sum(len(run.rows) for run in dump.walk("stage1", failed=True)) == 9


def test_what_dumps_along_rows_say(dumps, pictures):
    """Keys, sizes, digests, labels, failures and paths of pictures are those of each dump, one after the other."""
    parts = [open_dump(dumps / name) for name in ("one", "two")]
    dump = open_dump(parts)
    for name in ("sizes", "digests", "labels"):
        assert getattr(dump, name) == [value for part in parts for value in getattr(part, name)]
    assert dump.classes == ["cats", "dogs"]
    assert [(one["key"], one["row"]) for one in dump.failures] == [("cats/2.png", 2), ("dogs/7.png", 7)]
    assert (dump.num_failed, dump.num_missing, dump.norm, dump.plan) == (2, 0, "raw", parts[0].plan)
    assert dump.picture_path("dogs/5.png", pictures / "two") == str(pictures / "two/dogs/5.png")
    assert dump.picture_path(0) == str(pictures / "one/cats/0.png")
    assert dump.picture_path(-1) == str(pictures / "two/dogs/8.png")
    assert list(dump.dumps) == [str(dumps / "one"), str(dumps / "two")]
    assert dump.dumps[str(dumps / "two")].keys == parts[1].keys
    assert repr(dump) == f"<dump '{dumps}/one' and '{dumps}/two': 9 images, 2 failed, stages stage1, stage2>"
    assert open_dump([dumps / "one"]).keys == parts[0].keys


def test_mapped_shards_along_rows(dumps):
    """Shards are numbered over all dumps, and each is mapped without a copy."""
    dump = open_dump([dumps / "one", dumps / "two"])
    found = [dump.as_numpy("stage2", shard) for shard in range(4)]
    assert [len(one) for one in found] == [2, 2, 3, 2]
    assert equal(np.concatenate(found), dump["stage2"][:])
    with pytest.raises(IndexError, match="shard 4 of 4"):
        dump.as_numpy("stage2", 4)


def test_along_outputs(dumps):
    """Rows of dumps along outputs are in the order of the first; others are matched by key, and valid is so in all."""
    parts = {name: stored(dumps / name) for name in ("one", "vit", "seed")}
    dump = open_dump({name: dumps / name for name in parts})
    assert list(dump.outputs) == ["one.stage1", "one.stage2", "vit.embedding", "seed.stage1", "seed.stage2"]
    assert list(dump.stages) == ["one.stage1", "one.stage2", "seed.stage1", "seed.stage2"]
    assert (dump.keys, dump.valid.tolist()) == (parts["one"][0], [True, True, False, True])
    assert parts["vit"][0] == parts["one"][0][::-1]
    for name, (keys, maps, _) in parts.items():
        for stage, rows in maps.items():
            expected = np.array([rows[keys.index(key)] for key in dump.keys])
            for index in (*INDICES[3:5], 0, -1, [3, 0], dump.valid, "cats/3.png", []):
                found = dump[f"{name}.{stage}"][index]
                if isinstance(index, str):
                    index = dump.keys.index(index)
                assert equal(found, expected[index] if not isinstance(index, list) else expected[np.array(index, int)])
                assert equal(dump[f"{name}.{stage}"].tensor(index), found)
            assert equal(dump[f"{name}.{stage}"][:, 0], expected[:, 0])
    runs = list(dump.walk(at_once=1))
    assert [run.keys for run in runs] == [["cats/0.png"], ["cats/1.png"], ["cats/3.png"]]
    assert all(equal(maps, dump[name][run.rows]) for run in runs for name, maps in run.maps.items())
    assert [(one["key"], one["row"], one["dump"]) for one in dump.failures] == [
        ("cats/2.png", 2, name) for name in ("one", "vit", "seed")
    ]
    assert (dump.num_failed, dump.labels, dump.sizes) == (1, ["cats"] * 4, open_dump(dumps / "one").sizes)
    assert ", 1 failed, " in repr(dump)
    assert dump.chosen_outputs(["vit.embedding", "one.stage1:one.stage2"]) == list(dump.outputs)[:3]
    assert dump.pooled("vit.embedding")[0].shape == (3, dump.outputs["vit.embedding"].channels)
    assert ("one.stage2" in dump, "stage2" in dump) == (True, False)


@pytest.mark.parametrize("kind", ["half", "native"])
def test_dumps_along_rows_and_along_outputs(dumps, tmp_path, kind):
    """Dumps along rows go along outputs, in another order, too: also bfloat16, and maps that differ in size."""
    dump = open_dump({"a": [dumps / "one", dumps / "two"], "b": [dumps / f"{kind}2", dumps / f"{kind}1"]})
    (keys, maps, _), (more_keys, more_maps, _) = stored(dumps / f"{kind}2"), stored(dumps / f"{kind}1")
    expected = [*maps["stage1"], *more_maps["stage1"]]
    expected = [expected[[*keys, *more_keys].index(key)] for key in dump.keys]
    ours = dump["b.stage1"]
    assert equal(list(ours[:]), expected)
    assert equal([ours[row] for row in range(-1, -10, -1)], expected[::-1])
    assert equal([one.float().numpy() for one in ours.tensor([8, 0, 3])], [expected[row] for row in (8, 0, 3)])
    runs = [(run.rows, run.maps["b.stage1"]) for run in dump.walk("b.stage1", at_once=2)]
    assert all(equal(list(found), [expected[row] for row in rows]) for rows, found in runs)
    assert dump.valid.tolist() == [True, True, False, True, True, True, True, False, True]
    if kind == "native":
        assert ours.map_shapes([7, 2]).tolist() == [list(expected[row].shape) for row in (7, 2)]
        export(dump, ExportCommand(dump="", output=str(tmp_path / "x.h5"), stage="b.stage1"))
        with h5py.File(tmp_path / "x.h5") as file:
            assert equal(file["b.stage1"][:], np.concatenate([expected[row].ravel() for row in (0, 1, 3, 4, 5, 6, 8)]))


def test_what_dumps_along_outputs_have_not_in_common(dumps):
    """What one plan alone can say is refused along outputs, with the way to ask a dump by itself."""
    dump = open_dump({"a": dumps / "one", "b": dumps / "vit"})
    for ask in (
        lambda: dump.plan,
        lambda: dump.norm,
        lambda: dump.preprocessing,
        lambda: dump.records,
        lambda: dump.load_backbone(),
        lambda: dump.preprocess("x.png"),
    ):
        with pytest.raises(UsageError, match=r"dump\.dumps\['a'\]"):
            ask()
    assert dump.dumps["b"].keys == open_dump(dumps / "vit").keys
    assert dump.dumps["b"].preprocess(Image.new("RGB", (9, 9))).shape[0] == 3
    assert equal(dump.dumps["b"]["embedding"][0], dump["b.embedding"][3])
    assert equal(dump.as_numpy("a.stage1", 1), dump["a.stage1"][2:])
    with pytest.raises(UsageError, match="another order"):
        dump.as_numpy("b.embedding")


def test_datasets_of_joined_dumps(dumps):
    """Items, labels and shuffled batches of joined dumps are the rows of each."""
    dump = open_dump([dumps / "one", dumps / "two"])
    data = dump.as_torch_dataset("stage2", labels=True)
    assert data.keys == [key for key, is_valid in zip(dump.keys, dump.valid, strict=True) if is_valid]
    batches = list(data.loader(3, shuffle=True, generator=torch.Generator().manual_seed(0)))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([maps for maps, _ in batches]), dump["stage2"].tensor(data.rows)[order])
    assert Counter(torch.cat([labels for _, labels in batches]).tolist()) == {0: 3, 1: 4}
    beside = open_dump({"r": dumps / "one", "v": dumps / "vit"}).as_torch_dataset(["r.stage2", "v.embedding"])
    assert equal(beside[[2, 0]]["v.embedding"], open_dump(dumps / "vit")["embedding"][["cats/3.png", "cats/0.png"]])
    assert equal(beside[2]["r.stage2"], open_dump(dumps / "one")["stage2"]["cats/3.png"])


@pytest.mark.parametrize("along", ["rows", "outputs"])
def test_joined_dumps_are_pickled_and_closed(dumps, along):
    """A pickled reader of several dumps reads the same, and one that was closed opens its files again."""
    dump = open_dump([dumps / "one", dumps / "two"] if along == "rows" else {"a": dumps / "one", "v": dumps / "vit"})
    name = list(dump.outputs)[-1]
    before = dump[name][:]
    with pickle.loads(pickle.dumps(dump)) as again:
        assert (again.keys, list(again.outputs)) == (dump.keys, list(dump.outputs))
        assert equal(again[name][:], before)
    dump.close()
    assert equal(dump[name][:], before)
    with pytest.warns(FutureWarning, match=r"dump\.stages"):
        assert list(dump) == list(dump.stages)


def test_joined_dumps_that_lack_shards(dumps, tmp_path):
    """Dumps that are not complete are refused as one alone is, and with `incomplete` rows that are not there say so."""
    shutil.copytree(dumps / "two", tmp_path / "two")
    (tmp_path / "two/manifest.json").unlink()
    for file in (tmp_path / "two/shards").glob("00001.*"):
        file.unlink()
    for joined in ([dumps / "one", tmp_path / "two"], {"a": dumps / "two", "b": tmp_path / "two"}):
        with pytest.raises(IncompleteError, match="it is not complete"):
            open_dump(joined)
    dump = open_dump([dumps / "one", tmp_path / "two"], incomplete=True)
    assert (dump.num_missing, dump.valid.tolist()) == (2, [True, True, False, True, True, True, True, False, False])
    assert equal(dump["stage1"][6], open_dump(dumps / "two")["stage1"][2])
    with pytest.raises(IncompleteError, match="row 8 is not extracted yet"):
        dump["stage1"][[6, 8]]
    dump = open_dump({"a": dumps / "two", "b": tmp_path / "two"}, incomplete=True)
    assert (dump.num_missing, dump.valid.tolist()) == (2, [True, True, True, False, False])
    assert [run.rows for run in dump.walk("a.stage1", failed=True)] == [[0, 1, 2]]


def test_dumps_of_both_format_versions():
    """Dumps of format versions 1 and 2 are read as one, and the version of a plan is no difference along rows."""
    zoo = Path(__file__).parent / "zoo/dumps"
    dump = open_dump({"first": zoo / "maps", "second": zoo / "several"})
    (keys, maps, valid), (_, others, also) = stored(zoo / "maps"), stored(zoo / "several")
    assert (dump.keys, dump.valid.tolist()) == (keys, valid)
    assert also == valid
    assert equal(dump["first.stage2"][:], maps["stage2"])
    assert equal(dump["second.stage2@cls"][:], others["stage2@cls"])
    with pytest.raises(UsageError, match="maps': it is of format version 1"):
        _ = dump.digests
    plan = open_dump(zoo / "several").plan
    settings = replace(plan.settings, pool="none", threads=9, batch_size=9, format="hdf5")
    assert first_difference(plan, replace(plan, format_version=1, settings=settings)) == ""
    assert first_difference(plan, replace(plan, settings=replace(settings, folded=True))).startswith("--fold is false")


def test_dumps_that_are_not_one(dumps, tmp_path, pictures):
    """Dumps that do not fit are refused, and the first difference is named: a setting, an output, a key or a name."""
    featcli.extract(pictures / "two", output=tmp_path / "avg", **RESNET | {"pool": "avg"})
    featcli.extract(pictures / "two", output=tmp_path / "one", **RESNET | {"out_indices": (2,)})
    featcli.extract(pictures / "two", output=tmp_path / "white", **RESNET | {"alpha": "white"})
    one, two, vit = (dumps / name for name in ("one", "two", "vit"))
    grid = {
        "both have 'cats/0.png'": [one, one],
        'checkpoint is "test_resnet" in the first and "test_vit" in the second': [one, vit],
        'weights is "random weights, seed 0: its feature maps mean nothing" in the first and "ra': [
            one,
            dumps / "seed",
        ],
        "the second has no output 'stage1'": [one, tmp_path / "one"],
        "the first has no output 'stage1'": [tmp_path / "one", one],
        'reduction of output \'stage1\' is "none" in the first and "avg" in the second': [one, tmp_path / "avg"],
        'dtype of output \'stage1\' is "float32" in the first and "bfloat16" in the second': [one, dumps / "half2"],
        '--alpha is "drop" in the first and "white" in the second': [one, two, tmp_path / "white"],
        "'cats/0.png' is in a, and not in b": {"a": one, "b": two},
    }
    for text, joined in grid.items():
        with pytest.raises(ConflictError) as error:
            open_dump(joined)
        assert text in error.value.message, (text, error.value.message)
        assert error.value.hint
    assert "open_dump([a, b])" in error.value.hint
    for name in ("a.b", "", "ä", "-a", "a b", "a/b", 3):
        with pytest.raises(UsageError, match="cannot stand before"):
            open_dump({name: one, "b": vit})
    for nothing in ([], {}):
        with pytest.raises(UsageError, match="no dump"):
            open_dump(nothing)
    with pytest.raises(UsageError, match=r"dumps along rows: dumps along outputs"):
        open_dump([open_dump({"a": one, "b": vit}), two])
    with pytest.raises(UsageError, match="there is no such folder"):
        open_dump([one, tmp_path / "none"])


def with_columns(dump, to, kinds, rows):
    """Copy a dump to where it has these columns."""
    shutil.copytree(dump, to)
    lines = b"".join(json.dumps(dict(zip(kinds, row, strict=True))).encode("ascii") + b"\n" for row in rows)
    (to / "columns.jsonl").write_bytes(lines)
    columns = {"digest": xxhash.xxh3_128_hexdigest(lines), "kinds": kinds}
    (to / "plan.json").write_bytes(checksummed({**read_checksummed(to / "plan.json"), "columns": columns}))
    return to


def test_columns_along_rows(dumps, tmp_path):
    """Columns along rows are those of all dumps; where a dump lacks one, its cells are missing."""
    one = with_columns(dumps / "one", tmp_path / "one", {"split": "text", "n": "int"}, [["a", 1], ["b", 2]] * 2)
    dump = open_dump([one, dumps / "two"])
    assert dump.columns.kinds == {"split": "text", "n": "int", "label": "text"}
    assert dump.columns["split"].tolist() == ["a", "b", "a", "b", *[None] * 5]
    assert equal(dump.columns["n"], [1, 2, 1, 2, *[np.nan] * 5])
    assert dump.labels == [None] * 4 + ["dogs"] * 5
    assert (dump.classes, dump.where(split="b").tolist()) == (["dogs"], [1, 3])
    assert dump.where(n=None).tolist() == [4, 5, 6, 7, 8]
    two = with_columns(dumps / "two", tmp_path / "two", {"n": "int", "x": "json"}, [[None, [i]] for i in range(5)])
    dump = open_dump([one, two])
    assert list(dump.columns) == ["split", "n", "x"]
    assert dump.columns["x"].tolist() == [None] * 4 + [[i] for i in range(5)]
    with pytest.raises(UsageError, match="no column is called label"):
        _ = dump.labels
    assert open_dump([dumps / "one", dumps / "two"]).columns["label"].tolist() == ["cats"] * 4 + ["dogs"] * 5
    other = with_columns(dumps / "two", tmp_path / "other", {"n": "text"}, [["1"]] * 5)
    with pytest.raises(ConflictError, match="column 'n' holds whole numbers in the first and texts in the second"):
        open_dump([one, other])


def test_columns_along_outputs(dumps, tmp_path):
    """Columns along outputs are matched by key. One that stands in several dumps is equal in all, or refused."""
    one = with_columns(dumps / "one", tmp_path / "one", {"n": "int", "score": "float"}, [[i, "inf"] for i in range(4)])
    vit = with_columns(dumps / "vit", tmp_path / "vit", {"n": "int", "s": "text"}, [[3 - i, str(i)] for i in range(4)])
    dump = open_dump({"a": one, "b": vit, "c": dumps / "seed"})
    assert list(dump.columns) == ["n", "score", "s"]
    assert (dump.columns["n"].tolist(), dump.columns["s"].tolist()) == ([0, 1, 2, 3], ["3", "2", "1", "0"])
    assert dump.where(s=["3", "0"], n=3).tolist() == [3]
    dump = open_dump({"a": dumps / "one", "b": vit})
    assert (dump.labels, dump.columns["n"].tolist()) == (["cats"] * 4, [0, 1, 2, 3])
    off = with_columns(dumps / "vit", tmp_path / "off", {"n": "int"}, [[3], [2], [7], [0]])
    with pytest.raises(ConflictError, match=r"column 'n' .*: the cell of 'cats/1.png' is 1 in a and 7 in b"):
        _ = open_dump({"a": one, "b": off}).columns["n"]
    text = with_columns(dumps / "vit", tmp_path / "text", {"n": "text"}, [["3"], ["2"], ["1"], ["0"]])
    with pytest.raises(ConflictError, match=r"column 'n' .*: it holds whole numbers in a and texts in b"):
        _ = open_dump({"a": one, "b": text}).columns


def test_pictures_that_changed_between_two_dumps(dumps, tmp_path, pictures):
    """Digests of dumps along outputs are those of all, and refused where one key stood for two files."""
    dump = open_dump({"a": dumps / "one", "b": dumps / "seed"})
    assert dump.digests == open_dump(dumps / "one").digests
    shutil.copytree(pictures / "one", tmp_path / "one")
    draw(tmp_path / "one/cats/3.png", 33)
    featcli.extract(tmp_path / "one", output=tmp_path / "changed", **RESNET)
    with pytest.raises(ConflictError, match=r"picture 'cats/3.png' was another file for a than for b"):
        _ = open_dump({"a": dumps / "one", "b": tmp_path / "changed"}).digests


@pytest.mark.parametrize("name", ["x.h5", "x.safetensors", "x.jsonl", "x.parquet", "x"])
def test_exports_of_joined_dumps(dumps, tmp_path, cli, name):
    """An export of dumps along rows or outputs holds what exports of each hold, in every format."""
    one, two, vit = (dumps / name for name in ("one", "two", "vit"))
    options = ("--pool", "avg", "-q", "-o")
    for number, arguments in enumerate(((one, "--pool", "avg"), (two, "--pool", "avg"), (vit,))):
        assert cli("export", *arguments, "-q", "-o", tmp_path / f"{number}{name}").code == 0
    parts = [exported(tmp_path / f"{n}{name}") for n, path in enumerate((one, two, vit))]
    assert cli("export", one, two, *options, tmp_path / f"rows{name}").code == 0
    keys, maps = exported(tmp_path / f"rows{name}")
    assert keys == parts[0][0] + parts[1][0]
    for stage in NAMES:
        assert equal(maps[stage], np.concatenate([part[1][stage] for part in parts[:2]]))
    others = ("--with", vit, "--with", f"seeds={dumps / 'seed'}")
    assert cli("export", one, *others, *options, tmp_path / f"o{name}").code == 0
    keys, maps = exported(tmp_path / f"o{name}")
    assert keys == parts[0][0]
    assert set(maps) == {"one.stage1", "one.stage2", "vit.embedding", "seeds.stage1", "seeds.stage2"}
    assert equal(maps["one.stage2"], parts[0][1]["stage2"])
    assert equal(maps["vit.embedding"], np.flip(np.asarray(parts[2][1]["embedding"]), 0))


def test_what_exports_of_joined_dumps_say(dumps, tmp_path, cli):
    """A file says of which dumps it is: their fingerprints, checkpoints and weights, and how many of their images."""
    one, two, vit = (open_dump(dumps / name).plan for name in ("one", "two", "vit"))
    cli("export", dumps / "one", dumps / "two", "-o", tmp_path / "rows.h5")
    cli("export", dumps / "one", "--with", f"v={dumps / 'vit'}", "--keep-failed", "-o", tmp_path / "outputs.h5")
    with h5py.File(tmp_path / "rows.h5") as file:
        said = {name: value.decode() for name, value in file.attrs.items()}
    assert said["fingerprint"] == f"{one.fingerprint},{two.fingerprint}"
    assert (said["checkpoint"], said["images"]) == ("test_resnet", "7 of 9")
    with h5py.File(tmp_path / "outputs.h5") as file:
        said = {name: value.decode() for name, value in file.attrs.items()}
        assert np.isnan(file["v.embedding"][2]).all()
    assert (said["one.fingerprint"], said["v.fingerprint"]) == (one.fingerprint, vit.fingerprint)
    assert (said["one.checkpoint"], said["v.checkpoint"]) == ("test_resnet", "test_vit")
    assert said["images"] == "4 of 4"
    assert "fingerprint" not in said


def test_exports_of_some_rows(dumps, tmp_path, cli):
    """Exports hold the images that --keys and --where name, in row order, and say what was left out of these alone."""
    kinds, rows = {"split": "text", "n": "int"}, [["a", 0], ["b", 1], ["a", 2], [None, 3]]
    made = with_columns(dumps / "one", tmp_path / "d", kinds, rows)
    grid = {
        ("--keys", "cats/3"): [3],
        ("--keys", "cats/3.png", "--keys", "*/[01]"): [0, 1, 3],
        ("--where", "split=a", "--keep-failed"): [0, 2],
        ("--where", "split=b", "--where", "split="): [1, 3],
        ("--where", "n=1", "--where", "n=2"): [1],
        ("--where", "split=a", "--where", "n=0"): [0],
        ("--where", "label=x", "--keys", "*"): "there is no column 'label'",
        ("--where", "split=c"): "no row has split = 'c'",
        ("--where", "split=b", "--where", "n=0"): "each occurs, but in other rows",
        ("--where", "split=b", "--keys", "*/0"): "no image of --keys has what --where asks for",
        ("--where", "n=one"): "column 'n' holds whole numbers",
        ("--where", "split"): "is not NAME=VALUE",
        ("--keys", "dogs/*"): "no key of this dump is like that",
        ("--keys", ""): "--keys is empty",
    }
    for number, (options, expected) in enumerate(grid.items()):
        run = cli("export", made, *options, "-o", tmp_path / f"{number}.jsonl")
        if isinstance(expected, str):
            assert (run.code, expected in run.err) == (2, True), (options, run.err)
            continue
        lines = (tmp_path / f"{number}.jsonl").read_text().splitlines()
        assert [json.loads(line)["key"] for line in lines] == [f"cats/{row}.png" for row in expected]
        assert ("failed" in run.out) == ("n=2" in options or 2 in expected)


def test_joined_dumps_in_a_command(dumps, tmp_path, cli, pictures, monkeypatch):
    """--with puts dumps of the same keys beside the first, and others behind it; names must differ, and be of use."""
    monkeypatch.chdir(pictures)  # wherever these tests lie, noted folders are told from here
    one, two, vit = (dumps / name for name in ("one", "two", "vit"))
    rows = open_named([str(one)], [str(two)])
    assert rows.keys == open_dump([one, two]).keys
    assert list(open_named([str(one)], [str(vit)]).dumps) == ["one", "vit"]
    shutil.copytree(vit, tmp_path / "vit.2=b")
    beside = open_named([str(vit)], [str(tmp_path / "vit.2=b")])
    assert list(beside.dumps) == ["vit", "vit-2-b"]
    for arguments, code, text in (
        ((one, "--with", one), 2, "two dumps are called one"),
        ((one, "--with", f"a={two}"), 2, "no name is needed"),
        ((one, two, "--with", vit), 5, "'dogs/4.png' is in one, and not in vit"),
        ((two, "--with", vit), 5, "they have no key in common, with such as 'dogs/4.png' and 'cats/3.png'"),
        ((one, vit), 5, "along outputs: open_dump({'a': ..., 'b': ...}), as --with does"),
        ((one, one), 5, "both have 'cats/0.png'"),
        ((one, "--with", vit, "--stage", "nope"), 2, "there is no output 'nope' in any of the dumps"),
        ((one, ""), 2, "DUMP is empty"),
    ):
        run = cli("export", *arguments, "-o", tmp_path / "x.h5")
        assert (run.code, text in run.err) == (code, True), run.err
    shown = cli("show", one, "cats/3", "--with", f"v={vit}", "--with", dumps / "half1", "-o", tmp_path / "x.png")
    assert (shown.code, shown.out.partition(": ")[2]) == (0, "1 image, 4 stages, pictures from 'one'\n")
    shown = cli("show", one, "cats/3", "*/5", "--with", two, "--root", pictures / "two", "-o", tmp_path / "y.png")
    assert (shown.code, shown.err) == (0, f"1 picture of '{pictures / 'two'}' not shown: not there (see --root)\n")
    for number, arguments in enumerate([("--with", two), ("--with", vit, "--stage", "stage2,vit.embedding")]):
        assert cli("show", one, *arguments, "--num-images", "1", "-o", tmp_path / f"{number}.html").code == 0
    page = (tmp_path / "1.html").read_text()
    texts = ("one and vit", "one: checkpoint", "vit: weights", "one.stage2", "vit.embedding")
    assert [text for text in texts if text not in page] == []
    assert "one.stage1" not in page
