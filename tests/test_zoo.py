"""Check dumps of each version of the format as they were first written: later featcli read, verify and resume them."""

import hashlib
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from safetensors.torch import load_file

from conftest import tree
from featcli import open_dump

ZOO = Path(__file__).parent / "zoo"
MADE = json.loads((ZOO / "commands.json").read_text())
COMMANDS = MADE["commands"]
OF_A_GREY_LEVEL = 1000  # times as wide, because another Pillow may round single pixels to the next grey
CLOSE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}  # as a share of the largest number in a row

each_dump = pytest.mark.parametrize("name", COMMANDS)


def read_json(path):
    return json.loads(path.read_text())


def hashed(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def arrays_of(shard):
    """Return the arrays of a shard file as float32, by libraries that know nothing of featcli."""
    if shard.suffix == ".h5":
        with h5py.File(shard) as file:
            return {name: file[name][:].astype(np.float32) for name in file if name != "keys"}
    return {name: tensor.float().numpy() for name, tensor in load_file(shard).items()}


def test_no_file_changes():
    """Every file of the zoo is what it was when it was added."""
    lines = (line.split("  ", 1) for line in (ZOO / "SHA256SUMS").read_text().splitlines())
    expected = {name: digest for digest, name in lines}
    parts = ("pictures", "mended", "weights", "dumps")
    files = [path for part in parts for path in (ZOO / part).rglob("*") if path.is_file()]
    files += [ZOO / name for name in ("pictures.tar", "list.txt")]
    assert {path.relative_to(ZOO).as_posix(): hashed(path) for path in files} == expected


def test_the_readme_has_every_command():
    """The README of the zoo shows each dump with the command that made it, and nothing else."""
    shown = re.findall(r"^## (\w+)$.*?^featcli (.*?)$", (ZOO / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert dict(shown) == COMMANDS
    assert sorted(path.name for path in (ZOO / "dumps").iterdir()) == sorted(COMMANDS)


@each_dump
def test_reading(name):
    """Keys, failures and all numbers are those that h5py, safetensors and json read from its files."""
    folder = ZOO / "dumps" / name
    dump, manifest = open_dump(folder), read_json(folder / "manifest.json")
    listed = [json.loads(line)["key"] for line in (folder / "images.jsonl").read_text().splitlines()]
    assert dump.keys == listed
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert dump.failures == failures
    assert np.flatnonzero(~dump.valid).tolist() == [failure["row"] for failure in failures]
    assert list(dump.outputs) == [one["name"] for one in manifest.get("outputs") or manifest["stages"]]
    for record in manifest["shards"]:
        arrays = arrays_of(folder / "shards" / record["file"])
        rows = range(record["first_row"], record["first_row"] + record["rows"])
        assert np.array_equal(arrays["valid"], dump.valid[rows.start : rows.stop])
        for stage in dump.outputs:
            maps = [dump[stage][row] for row in rows]
            assert np.array_equal(np.concatenate([one.ravel() for one in maps]), arrays[stage].ravel(), equal_nan=True)
            assert [np.isfinite(one).all() for one in maps] == dump.valid[rows.start : rows.stop].tolist()
            if (shapes := arrays.get(f"{stage}.shapes")) is not None:
                assert [one.shape for one in maps] == [tuple(shape) for shape in shapes]


@each_dump
def test_digests_of_pictures(name):
    """Dumps of format version 2 hold the digest of each file that was read; those of version 1 hold none."""
    folder = ZOO / "dumps" / name
    records = [read_json(path) for path in sorted(folder.glob("shards/*.json"))]
    if read_json(folder / "plan.json")["format_version"] == 1:
        assert all("digests" not in record for record in records)
        return
    dump, pictures = open_dump(folder), {}
    for path in (ZOO / "pictures").rglob("*.*"):
        pictures[f"pictures/{path.relative_to(ZOO / 'pictures')}"] = pictures[path.name] = path.read_bytes()
        pictures[str(path.relative_to(ZOO / "pictures"))] = path.read_bytes()
    with tarfile.open(ZOO / "pictures.tar") as tar:
        for member in tar:
            if member.isfile():
                pictures[f"pictures.tar/{member.name.removeprefix('./')}"] = tar.extractfile(member).read()
    stored = "".join(record["digests"] for record in records)
    for row, key in enumerate(dump.keys):
        assert stored[32 * row : 32 * row + 32] == dump.digests[row] == xxhash.xxh3_128_hexdigest(pictures[key]), key


@each_dump
def test_verifying(name, cli):
    """verify finds every byte of it as it was written."""
    run = cli("verify", ZOO / "dumps" / name, "--json")
    (verdict,) = run.events
    assert (run.code, verdict["state"], verdict["damages"]) == (0, "whole", [])


@each_dump
def test_exporting(name, tmp_path, cli):
    """JSON lines and a safetensors file hold the numbers of all images that were read."""
    folder = ZOO / "dumps" / name
    dump = open_dump(folder)
    rows = np.flatnonzero(dump.valid).tolist()
    run = cli("export", folder, "-o", "-")
    assert (run.code, [line["key"] for line in run.events]) == (0, [dump.keys[row] for row in rows])
    for stage in dump.outputs:
        for row, line in zip(rows, run.events, strict=True):
            assert np.array_equal(np.array(line[stage], np.float32), dump[stage][row].astype(np.float32))
    assert cli("export", folder, "-o", tmp_path / "all.safetensors").code == 0
    exported = arrays_of(tmp_path / "all.safetensors")
    for stage in dump.outputs:
        values = np.concatenate([dump[stage][row].ravel() for row in rows]).astype(np.float32)
        assert np.array_equal(exported[stage].ravel(), values)


@each_dump
def test_going_on(name, tmp_path, monkeypatch, cli):
    """After a loss of a shard and the last files, the command of each dump makes the same bytes again.

    With another library or processor, maps may differ in their last digits.
    """
    before, plan = tree(ZOO / "dumps" / name), read_json(ZOO / "dumps" / name / "plan.json")
    if plan["settings"]["backbone"]["library"] == "transformers":
        pytest.importorskip("transformers")
    shutil.copytree(ZOO, tmp_path / "zoo", copy_function=shutil.copyfile)  # its files are as old as this test
    monkeypatch.chdir(tmp_path / "zoo")
    dump = Path("dumps", name)
    lost = next(path for path in sorted(dump.glob("shards/*.json")) if "sizes" not in read_json(path))
    for path in (*lost.parent.glob(f"{lost.stem}.*"), dump / "manifest.json", dump / "failures.jsonl"):
        path.unlink()
    run = cli(*shlex.split(COMMANDS[name]))
    assert run.code == (3 if before["failures.jsonl"] else 0), run.err
    after, environment = tree(dump), read_json(lost).get("environment", plan["environment"])
    if environment == plan["environment"] and is_same_processor():
        compare(before, after, is_exact=True)
        told = [line for line in run.err.splitlines() if line.startswith("warning")]
        assert not [line for line in told if not re.search("pictures has|gem took", line)]
    else:
        is_exact = {**environment, "featcli": plan["environment"]["featcli"]} == plan["environment"]
        compare(before, after, is_exact and is_same_processor())
        is_same_pillow = environment.get("pillow") == plan["environment"].get("pillow")
        compare_maps(open_dump(ZOO / "dumps" / name), open_dump(dump), 1 if is_same_pillow else OF_A_GREY_LEVEL)


def is_same_processor():
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found is not None and found[1] == MADE["processor"]


def compare(before, after, is_exact):
    """Compare all that does not depend on versions or the processor, and the bytes of shards if maps are exact."""
    assert after.keys() == before.keys()
    for file in before:
        if file.endswith((".json", ".jsonl")):
            assert facts(after[file], is_exact) == facts(before[file], is_exact), file
        elif is_exact:
            assert after[file] == before[file], file


def compare_maps(before, after, wider):
    for stage, stored in before.outputs.items():
        for row in np.flatnonzero(before.valid):
            expected = before[stage][row].astype(np.float32)
            most = max(CLOSE[stored.dtype], CLOSE["float32"] * wider) * np.abs(expected).max()
            np.testing.assert_allclose(after[stage][row].astype(np.float32), expected, rtol=0, atol=most)


def facts(text, is_exact):
    """Return what JSON says that does not depend on versions of libraries, nor on the processor if that is another.

    The words that tell people why an image failed are left out, too.
    """

    def of(value):
        if isinstance(value, list):
            return [of(one) for one in value]
        if not isinstance(value, dict):
            return value
        moving = {"checksum", "detail"} | ({"environment"} if "shard" in value else set())
        moving |= set() if is_exact else {"hashes"}
        return {name: of(one) for name, one in value.items() if name not in moving}

    try:
        return of(json.loads(text))
    except ValueError:
        return [of(json.loads(line)) for line in text.splitlines()]
