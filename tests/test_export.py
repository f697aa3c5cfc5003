import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import adaptive_avg_pool2d

import featcli
from conftest import Featcli, draw, little_memory, tree
from featcli import open_dump
from featcli.dump.checksummed_json import hash_json, publish_checksummed, read_checksummed
from featcli.errors import UsageError
from featcli.export.export import export
from featcli.reading.reader import Run
from featcli.spec.commands import ExportCommand

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1, 2), "batch_size": 2, "shard_size": 4}
FILES = ["x.h5", "x.safetensors", "x.npy", "x.jsonl", "x.parquet"]


def exported(dump, output, **options):
    """Run `featcli export` from Python."""
    return export(dump, ExportCommand(dump=str(dump.path), output=str(output), **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a dump of seven pictures, one of them broken, one with a name that needs escapes."""
    made = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        draw(made / f"{i}.png", i)
    (made / "3.png").write_bytes(b"no picture")
    draw(made / "Ü\n.png", 9)
    os.rename(draw(made / "bytes.png", 8), os.fsencode(made) + b"/caf\xe9.png")
    return made


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def dump(request, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumps") / request.param
    featcli.extract(folder, output=path, format=request.param, **OPTIONS)
    return open_dump(path)


def read_back(path, dump):
    """Return (keys, {stage: array}) of an exported file, read by the format's own library."""
    if path.is_dir():
        lines = [json.loads(line) for line in (path / "images.jsonl").read_text().splitlines()]
        return [line["key"] for line in lines], {file.stem: np.load(file) for file in sorted(path.glob("*.npy"))}
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            keys = [os.fsdecode(key) for key in file["keys"][:]]
            return keys, {name: file[name][:] for name in file if name not in ("keys", "valid")}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            keys = json.loads(file.metadata()["keys"])
            return keys, {name: file.get_tensor(name) for name in file.keys() if name != "valid"}  # noqa: SIM118
    if path.suffix == ".npy":
        lines = [json.loads(line) for line in path.with_suffix(".images.jsonl").read_text().splitlines()]
        return [line["key"] for line in lines], {"stage2": np.load(path)}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        names = [name for name in rows[0] if name != "key"]
        maps = {name: np.array([row[name] for row in rows if row[name] is not None], np.float32) for name in names}
        return [row["key"] for row in rows], maps
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    keys = [dump.keys[row] for row in table["row"].to_pylist()]
    names = [name for name in table.column_names if name not in ("key", "row")]
    shapes = {name: json.loads(table.schema.field(name).metadata[b"shape"]) for name in names}
    return keys, {name: np.stack(table[name].to_numpy()).reshape(-1, *shapes[name]) for name in names}


@pytest.mark.parametrize("name", [*FILES, "folder"])
def test_every_format_holds_the_same_maps(dump, tmp_path, cli, name):
    """The format's own library reads the stored numbers, bit for bit, each with its key, without failed rows."""
    path = tmp_path / "made" / name
    run = cli("export", dump.path, "-o", path, *(["--stage", "stage2"] if name == "x.npy" else []))
    assert (run.code, run.err) == (0, "")
    assert "6 of 7 images, " in run.out
    keys, maps = read_back(path, dump)
    assert keys == [key for key in dump.keys if key != "3.png"]
    assert list(maps) == (["stage2"] if name == "x.npy" else ["stage1", "stage2"])
    for stage, found in maps.items():
        assert np.array_equal(found, dump[stage][dump.valid])
        assert found.dtype in (np.float32, torch.float32)
    left = {path.name, "x.images.jsonl"} if name == "x.npy" else {path.name}
    assert {file.name for file in path.parent.iterdir()} == left  # no half file beside it


@pytest.mark.parametrize("name", ["x.h5", "x.safetensors", "x.jsonl", "x.parquet"])
def test_failed_rows_kept(dump, tmp_path, cli, name):
    """With --keep-failed, row i is image i again: NaN and not valid, or null."""
    assert cli("export", dump.path, "-o", tmp_path / name, "--keep-failed").code == 0
    row = dump.rows["3.png"]
    if name == "x.h5":
        with h5py.File(tmp_path / name) as file:
            assert np.isnan(file["stage1"][row]).all()
            assert file["valid"][:].tolist() == dump.valid.tolist()
            assert np.array_equal(file["stage1"][:], dump["stage1"][:], equal_nan=True)
    elif name == "x.safetensors":
        with safe_open(tmp_path / name, "pt") as file:
            assert file.get_tensor("stage1")[row].isnan().all()
            assert file.get_tensor("valid").tolist() == dump.valid.tolist()
    elif name == "x.jsonl":
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert lines[row] == {"key": "3.png", "stage1": None, "stage2": None}
        assert [line["stage1"] is None for line in lines] == (~dump.valid).tolist()
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / name)
        assert [value is None for value in table["stage2"].to_pylist()] == (~dump.valid).tolist()
        there = [value for value in table["stage2"].to_pylist() if value is not None]
        assert np.array_equal(there, dump["stage2"][dump.valid].reshape(len(there), -1))


def test_pooled_and_cast(dump, tmp_path, cli):
    """--pool and --dtype give what torch gives for the stored maps, and bfloat16 stays if the format has it."""
    maps = dump["stage1"].tensor(dump.valid)
    expected = {"avg": maps.mean((2, 3)), "max": maps.amax((2, 3)), "2x3": adaptive_avg_pool2d(maps, (2, 3))}
    for pool, pooled in expected.items():
        path = tmp_path / f"{pool}.safetensors"
        assert (
            cli("export", dump.path, "-o", path, "--stage", "stage1", "--pool", pool, "--dtype", "bfloat16").code == 0
        )
        with safe_open(path, "pt") as file:
            assert torch.equal(file.get_tensor("stage1"), pooled.bfloat16())
            assert file.metadata()["pool"] == pool
    assert cli("export", dump.path, "-o", tmp_path / "x.npy", "--stage", "stage1", "--dtype", "float16").code == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), maps.half().numpy())


def test_bfloat16_dumps(folder, tmp_path, cli):
    """A bfloat16 dump is bfloat16 in safetensors, and has the same numbers as float32 in numpy and JSON."""
    featcli.extract(folder, output=tmp_path / "d", dtype="bfloat16", pool="avg", **OPTIONS)
    dump = open_dump(tmp_path / "d")
    for name in ("x.safetensors", "x.jsonl", "folder"):
        assert cli("export", tmp_path / "d", "-o", tmp_path / name, "-q").code == 0
        found = read_back(tmp_path / name, dump)[1]["stage2"]
        if name == "x.safetensors":
            assert torch.equal(found, dump["stage2"].tensor(dump.valid))
        else:
            assert np.array_equal(found, dump["stage2"][dump.valid])
            assert found.dtype == np.float32


def test_keys_that_no_header_can_hold(dump, tmp_path, monkeypatch):
    """Keys that do not fit into a safetensors file are refused, with its name and the formats that take them."""
    monkeypatch.setattr("featcli.dump.formats.safetensors.MAX_HEADER_BYTES", 100)
    with pytest.raises(UsageError) as refused:
        exported(dump, tmp_path / "x.safetensors")
    assert refused.value.message == (
        f"-o '{tmp_path / 'x.safetensors'}': the keys of 6 images do not fit into the header of a safetensors file"
    )
    assert refused.value.hint == "name a .h5, .parquet or .jsonl file, or a folder"
    assert list(tmp_path.iterdir()) == []


def test_json_lines_on_stdout(dump, cli):
    """`-o -` prints an object for each image, key first, with digits that give the exact float32 back."""
    run = cli("export", dump.path, "-o", "-", "--stage", "stage2", "--pool", "avg")
    assert (run.code, run.err) == (0, f"{dump.path}: 1 failed image left out\n")
    lines = run.out.splitlines()
    assert all(line.startswith('{"key": ') for line in lines)
    rows = [json.loads(line) for line in lines]
    assert [row["key"] for row in rows] == [key for key in dump.keys if key != "3.png"]
    expected = dump["stage2"].tensor(dump.valid).mean((2, 3)).numpy()
    assert np.array_equal(np.array([row["stage2"] for row in rows], np.float32), expected)
    assert len(lines[0]) < 40 + 15 * expected.shape[1]  # fewer than the 17 digits of a double


def test_a_reader_that_goes_away(dump):
    """`featcli export -o - | head -1` ends without a message."""
    with Featcli("export", dump.path, "-o", "-") as exporting:
        exporting.stdout.read(10)
        exporting.stdout.close()
        assert exporting.stderr.read() == ""
    assert exporting.returncode == 141


def test_values_that_are_not_finite():
    """NaN and infinity, which JSON lacks, are null, and every line is valid JSON."""
    from featcli.export import jsonl

    def written(row):
        run = Run([0], ["a.png"], {"stage1": row[None]})
        content = SimpleNamespace(dump=SimpleNamespace(valid=[True]), runs_with_cells=lambda: [(run, [{}])])
        (line,) = jsonl.lines(content)
        return json.loads(line, parse_constant=pytest.fail)["stage1"]

    array = np.array([[1.5, np.nan], [np.inf, -1e-7]], np.float32)
    assert written(array) == [[1.5, None], [None, -1e-7]]
    assert np.array_equal(np.float32(written(np.float16([0.1, 65504]))), np.float16([0.1, 65504]))


def test_maps_of_many_sizes(tmp_path, cli):
    """A native dump is exported with its shapes; arrays need pooled maps."""
    draw(tmp_path / "p" / "a.png", 1, (160, 96))
    draw(tmp_path / "p" / "b.png", 2, (96, 160))
    (tmp_path / "p" / "ab.png").write_bytes(b"")
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS, fit="native")
    dump = open_dump(tmp_path / "d")
    rows = [0, 2]
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.h5").code == 0
    with h5py.File(tmp_path / "x.h5") as file:
        expected = [dump["stage1"][row] for row in rows]
        assert file["stage1.shapes"][:].tolist() == [list(maps.shape) for maps in expected]
        assert np.array_equal(file["stage1"][:], np.concatenate([maps.ravel() for maps in expected]))
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert np.array_equal(np.array(lines[1]["stage2"], np.float32), dump["stage2"][2])
    pyarrow = pytest.importorskip("pyarrow.parquet")
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.parquet", "--keep-failed").code == 0
    table = pyarrow.read_table(tmp_path / "x.parquet")
    assert table["stage1"].to_pylist()[1] is None
    assert np.array_equal(np.float32(table["stage1"].to_pylist()[2]), dump["stage1"][2].ravel())
    assert table["stage1.shape"].to_pylist()[2] == list(dump["stage1"][2].shape)
    refused = cli("export", tmp_path / "d", "-o", tmp_path / "x.npy", "--stage", "stage1")
    assert refused.code == 2
    assert "many sizes" in refused.err
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.npy", "--stage", "stage1", "--pool", "avg").code == 0
    pooled = np.stack([torch.from_numpy(dump["stage1"][row]).mean((1, 2)).numpy() for row in rows])
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), pooled, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["-o", "x.foo"], 2, "no format has that suffix"),
        (["-o", "x.npy"], 2, "holds one stage, not 2"),
        (["-o", "x.h5", "--to", "csv"], 2, "--to cannot be 'csv'"),
        (["-o", "-", "--to", "hdf5"], 2, "only JSON lines can be streamed"),
        (["-o", "x.h5", "--pool", "cls"], 2, "maps hold no class token"),
        (["-o", "x.h5", "--pool", "median"], 2, "--pool cannot be 'median'"),
        (["-o", "x.npy", "--dtype", "bfloat16", "--stage", "stage1"], 2, "npy has no such type"),
        (["-o", "x.h5", "--to", "npy"], 2, "its suffix says hdf5"),
        (["-o", "x.h5", "--pool", "99x99"], 2, "finer than stage 'stage1'"),
        (["-o", "x.h5", "--stage", "stage1,stage1"], 2, "chooses stage1 twice"),
        (["-o", "x.h5", "--stage", "stage7"], 2, "there is no stage 'stage7'"),
        (["-o", "taken.h5"], 5, "this file is there already"),
        (["-o", "full"], 5, "this folder is not empty"),
        (["-o", "full", "--to", "hdf5"], 5, "there is a folder of that name"),
        (["-o", "taken.h5/x.h5"], 7, "check the disk"),
        (["-o", "pipe", "--to", "jsonl", "--overwrite"], 5, "not a regular file"),
        (["-o", "late.npy", "--stage", "stage1"], 5, "'late.images.jsonl': this file is there already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(dump, tmp_path, cli, monkeypatch, arguments, code, says):
    """A request that is impossible ends in one line with a way out and the documented exit code, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("taken.h5", "full/file", "late.images.jsonl"):
        (tmp_path / name).write_text("mine")
    os.mkfifo("pipe")
    before = tree(tmp_path)
    run = cli("export", dump.path, *arguments)
    assert (run.code, len(run.err.splitlines())) == (code, 2)
    assert says in run.err
    assert tree(tmp_path) == before


def test_overwrite_takes_the_place_at_once(dump, tmp_path, cli):
    """--overwrite replaces the file at once by a complete one."""
    (tmp_path / "x.h5").write_text("old")
    assert cli("export", dump.path, "-o", tmp_path / "x.h5", "--overwrite").code == 0
    with h5py.File(tmp_path / "x.h5") as file:
        assert len(file["keys"]) == 6


def test_pooled_dumps_are_not_pooled_again(folder, tmp_path, cli):
    """A dump of maxima is not pooled to averages, which would be neither."""
    featcli.extract(folder, output=tmp_path / "d", pool="max", **OPTIONS)
    run = cli("export", tmp_path / "d", "-o", tmp_path / "x.h5", "--pool", "avg")
    assert run.code == 2
    assert "was pooled by max already" in run.err
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.h5", "--pool", "max").code == 0


def test_numbers_that_a_type_cannot_hold(dump, tmp_path, monkeypatch):
    """A value beyond float16 is refused instead of becoming infinite."""
    from featcli.reading.stage_array import StageArray

    real = StageArray.__getitem__
    monkeypatch.setattr(StageArray, "__getitem__", lambda array, index: real(array, index) * np.float32(1e9))
    with pytest.raises(UsageError, match="too large for float16"):
        export(dump, ExportCommand(dump=str(dump.path), output=str(tmp_path / "x.h5"), dtype="float16"))
    assert not list(tmp_path.iterdir())


def test_incomplete_dumps(dump, tmp_path, cli):
    """An incomplete dump is exported only if asked for, with the rows that exist."""
    shutil.copytree(dump.path, tmp_path / "d")
    for gone in ("manifest.json", "shards/00000.json"):
        (tmp_path / "d" / gone).unlink()
    run = cli("export", tmp_path / "d", "-o", tmp_path / "x.jsonl")
    assert run.code == 8
    assert "--incomplete" in run.err
    assert cli("export", tmp_path / "d", "-o", tmp_path / "x.jsonl", "--incomplete", "--keep-failed").code == 0
    keys = [json.loads(line)["key"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert keys == dump.keys[4:]


@pytest.mark.parametrize("stages", [(1,), (1, 2)])
@pytest.mark.parametrize("name", [*FILES, "folder", "-"])
def test_dumps_without_a_row(tmp_path, cli, name, stages):
    """If every image failed, exports are complete files without rows."""
    if name == "x.npy" and len(stages) > 1:
        return
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"no picture")
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **{**OPTIONS, "out_indices": stages})
    run = cli("export", tmp_path / "d", "-o", tmp_path / name if name != "-" else "-")
    assert run.code == 0
    assert "; 1 failed image left out\n" in run.out or run.err == f"{tmp_path / 'd'}: 1 failed image left out\n"
    if name in ("x.h5", "x.safetensors", "x.npy", "folder"):
        keys, maps = read_back(tmp_path / name, open_dump(tmp_path / "d"))
        assert (keys, {len(found) for found in maps.values()}) == ([], {0})


@pytest.mark.parametrize("name", ["x.npy", "folder", "x.h5"])
def test_an_export_that_fails_late(dump, tmp_path, cli, monkeypatch, name):
    """A full disk, or a value that does not fit, leaves the old file alone, and no new one."""
    from featcli.export.content import Content

    assert cli("export", dump.path, "-o", tmp_path / "x.npy", "--stage", "stage1").code == 0
    before = tree(tmp_path)
    real = Content.runs

    def cut_short(content):
        yield from list(real(content))[:1]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Content, "runs", cut_short)
    run = cli("export", dump.path, "-o", tmp_path / name, "--stage", "stage2", *["--overwrite"] * (name == "x.npy"))
    assert run.code == 7
    assert "no space left" in run.err
    assert tree(tmp_path) == before


def test_hostile_names_of_stages(dump, tmp_path, cli):
    """A dump whose stages are named like paths is damaged, and nothing is written for it."""
    for name in ("../../escaped", "/tmp/escaped", "a/b", "..", "", "keys", "x.shapes", "new\nline", "\ud800"):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(dump.path, tmp_path / "d")
        plan = read_checksummed(tmp_path / "d" / "plan.json")
        plan["outputs"][0]["name"] = name
        body = {k: v for k, v in plan.items() if k not in ("fingerprint", "images_digest", "provenance", "environment")}
        plan["fingerprint"] = hash_json(body)
        publish_checksummed(tmp_path / "d" / "plan.json", plan, replace=True)
        before = tree(tmp_path)
        run = cli("export", tmp_path / "d", "-o", tmp_path / "out")
        assert run.code == 4
        assert "an output whose name is none" in run.err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["x.h5", "x.safetensors", "folder", "x.jsonl", "x.parquet"])
def test_memory_does_not_grow_with_the_dump(tmp_path, large, name):
    """An export of a dump takes less than a third of its size in memory."""
    dump = open_dump(large)
    exported(dump, tmp_path / f"first{name}", pool="avg")  # so that imports do not count
    size = sum(file.stat().st_size for file in (large / "shards").glob("*.h5"))
    with little_memory(size // 3):
        exported(dump, tmp_path / name, pool="2x2" if name == "x.jsonl" else None)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Make a dump of 100 MB: 512 images of 196 kB each."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(512):
        draw(folder / "p" / f"{i:03d}.png", i, (32, 32))
    options = {**OPTIONS, "out_indices": (0, 1), "batch_size": 32, "shard_size": 128, "image_size": "128"}
    featcli.extract(folder / "p", output=folder / "d", **options)
    return folder / "d"


def test_a_killed_export_leaves_no_half_file(dump, tmp_path):
    """A killed export leaves nothing under the final name, whatever the name, and the next one cleans up."""
    script = (
        "import os, sys, featcli; from featcli.export.arrays import ArrayFile\n"
        "from featcli.export.export import export; from featcli.spec.commands import ExportCommand\n"
        "whole = ArrayFile.write\n"
        "def write(*arguments): whole(*arguments); os.kill(os.getpid(), 9)\n"
        "ArrayFile.write = write\n"
        "export(featcli.open_dump(sys.argv[1]), ExportCommand(dump=sys.argv[1], output=sys.argv[2]))\n"
    )
    target = tmp_path / "my file [1].h5"
    killed = subprocess.run([sys.executable, "-c", script, str(dump.path), str(target)], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    (tmp_path / f".my file [1].h5.other.{'0' * 16}.partial").touch()  # of another export
    exported(dump, target)
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 2
