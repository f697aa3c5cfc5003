"""Check that files among the shards that are no part of the dump are named, never read and never deleted."""

import json
import os
import re
import shutil
from collections import Counter

import pytest

import featcli
from conftest import draw, tree
from featcli.dump.checksummed_json import checksummed
from featcli.dump.folder import Dump
from featcli.dump.foreign import foreign_files
from featcli.dump.unfinished import remove_unused
from featcli.dump.writer import DumpWriter, finalize
from featcli.errors import DamagedError
from featcli.pixels.failure import NOT_READ

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 2, "shard_size": 2, "image_size": 32}
GIVEN = ["-c", "test_resnet", "--random-init", "--batch-size", 2, "--shard-size", 2, "--image-size", 32]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make six pictures, their dump in three shards, and two others: one of other weights, one of the other format."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(6):
        draw(folder / "photos" / f"{i}.png", i, (32, 32))
    for name, other in (("d", {}), ("weights", {"seed": 5}), ("format", {"format": "safetensors"})):
        featcli.extract(folder / "photos", output=folder / name, **OPTIONS, **other)
    return folder


@pytest.fixture
def dump(made, tmp_path):
    """Return a copy of the dump, to put files into."""
    shutil.copytree(made / "d", tmp_path / "d")
    return tmp_path / "d"


def put(made, dump):
    """Put files that are no part of the dump among its shards. Returns file -> why it is none."""
    shards, own = dump / "shards", (made / "d" / "shards" / "00001.h5").read_bytes()
    other = (made / "format" / "shards" / "00001.safetensors").read_bytes()
    beyond, alien = "the plan has only 3 shards", "no name that featcli gives"
    files = {
        "00003.h5": (own, beyond),
        "00007.json": (b"{}", beyond),
        "00001.safetensors": (other, "this dump is of hdf5"),
        "00001 (1).h5": (own, alien),
        "000001.h5": (own, alien),
        "00001.txt": (b"mine", alien),
        ".00001.h5.Ab3dEf": (own, alien),  # rsync is copying
    }
    for name, (content, _) in files.items():
        (shards / name).write_bytes(content)
    (shards / "shards").mkdir()
    return {f"shards/{name}": why for name, (_, why) in files.items()} | {"shards/shards": "a folder"}


def test_what_is_no_part_of_a_dump_is_named(made, dump, cli):
    """finalize, inspect and verify name foreign files, a few for people and all for programs; the dump is whole."""
    for name in (".00001.h5.0123456789abcdef.partial", ".00001.unfinished.json"):
        (dump / "shards" / name).touch()
    (dump / "shards" / "00001.h5.damaged").touch()  # repair has put it aside
    assert cli("finalize", dump, "--json").events[0]["foreign_files"] == []
    put_there = put(made, dump)
    before = tree(dump)
    for command in ("finalize", "inspect", "verify"):
        run = cli(command, dump, "--json")
        assert run.code == 0
        assert {one["file"]: one["what"] for one in run.events[0]["foreign_files"]} == put_there
        said = cli(command, dump)
        assert (
            "shards/00001 (1).h5: not of this dump, and not read: no name that featcli gives\n" in said.err + said.out
        )
        assert "3 more files beside the shards not of this dump: --json names all" in said.err + said.out
    assert tree(dump) == before


def test_what_is_no_part_of_a_dump_stays(made, dump, cli):
    """Resuming, repairing and overwriting leave foreign files, except those named like a shard or a record."""
    mine = {name for name in put(made, dump) if name != "shards/shards"}
    before = tree(dump)
    featcli.extract(made / "photos", output=dump, **OPTIONS)
    assert tree(dump) == before
    path = dump / "shards" / "00001.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert cli("verify", dump, "--repair", "-q").code == 8
    featcli.extract(made / "photos", output=dump, **OPTIONS)
    assert {name: content for name, content in tree(dump).items() if not name.endswith(".damaged")} == before
    featcli.extract(made / "photos", output=dump, overwrite=True, **OPTIONS)
    kept = {name for name in tree(dump) if name in mine}
    assert kept == {"shards/00001 (1).h5", "shards/00001.txt", "shards/.00001.h5.Ab3dEf"}


@pytest.fixture(scope="module")
def begun(made):
    """Make what a run leaves if it stops in shard 1: a record and a file with one row, of this plan and of another."""
    left = {}
    for name in ("d", "weights"):
        path = made / f"{name} begun"
        shutil.copytree(made / name, path)
        for file in ("manifest.json", "shards/00001.json", "shards/00001.h5"):
            (path / file).unlink()
        dump = Dump.at(path)
        writer, first = DumpWriter(dump, dump.plan.environment), dump.plan.shard(1)[:1]
        shard = writer.start(1, dump.keys()[2:4], {})
        shard.file.write({"stage4": featcli.open_dump(made / name)["stage4"][2:3]})
        shard.made.add(first, [], Counter(), Counter(), [NOT_READ])
        assert writer.keep(shard)
        writer.leave(shard)
        left[name] = sorted((path / "shards").glob(".*"), reverse=True)
    return left


BEYOND = "the plan has only 3 shards"
ALIEN = "no name that featcli gives"
OTHER = "it belongs to another dump"


@pytest.mark.parametrize("is_committed", [False, True], ids=["missing", "committed"])
@pytest.mark.parametrize(
    ("plan", "record", "file", "why"),
    [
        ("d", 1, 1, None),
        ("d", 1, None, None),
        ("d", None, 1, None),
        ("d", None, 9, None),
        ("d", 9, 9, BEYOND),
        ("d", 9, 1, BEYOND),
        ("d", 9, None, BEYOND),
        ("weights", 9, 9, BEYOND),
        ("weights", 1, 1, OTHER),
        ("weights", 1, None, OTHER),
        ("d", 2, 1, "it is of another shard"),
        ("d", ".9.unfinished.json", 9, ALIEN),
        ("d", ".000001.unfinished.json", 1, ALIEN),
        ("d", "00001.unfinished.json", 1, ALIEN),
        ("d", ".00001.unfinished.json.bak", 1, ALIEN),
    ],
)
def test_what_is_left_of_unfinished_shards(made, begun, dump, plan, record, file, why, is_committed):
    """A foreign record of unfinished rows is named with its file, and stays unless a shard needs its name.

    Rows of the dump's own are counted if record and file exist; anything useless is removed.
    """
    shards, (its_record, its_file) = dump / "shards", begun[plan]
    for name in () if is_committed else ("manifest.json", "shards/00001.json", "shards/00001.h5"):
        (dump / name).unlink()
    there = tree(dump)
    file_name = its_file.name.replace("00001", f"{file or 1:05d}")
    name = f".{record:05d}.unfinished.json" if isinstance(record, int) else record
    if name:
        content = json.loads(its_record.read_text())
        del content["checksum"]
        (shards / name).write_bytes(checksummed({**content, "file": file_name}))
    if file:
        shutil.copy(its_file, shards / file_name)
    is_read = name and re.fullmatch(r"\.\d{5,}\.unfinished\.json", name)  # otherwise a partial file that nobody names
    expected = {name: why} | ({file_name: f"{name} names it"} if file and is_read else {}) if why else {}
    before, found = tree(dump), Dump.at(dump)
    assert {
        one.file.removeprefix("shards/"): one.what.partition(": its")[0] for one in foreign_files(found)
    } == expected
    is_kept = (plan, record, file, is_committed) == ("d", 1, 1, False)
    assert found.unfinished_shards() == ([{"shard": 1, "kept": 1, "rows": 2}] if is_kept else [])
    told = []
    if is_committed:
        finalize(found)
    else:
        remove_unused(shards)  # every run does this
        report, keys = (lambda kind, **_: told.append(kind)), found.keys()[2:4]
        assert DumpWriter(found, {}).take_up(1, keys, {}, [2], report) is None  # one row is no whole batch
    left = {f"shards/{one}": before[f"shards/{one}"] for one in expected if is_committed or record != 1}
    assert tree(dump) == there | left
    assert told == (["warning", "kept", "resumed"] if record == 1 and not is_committed else [])


@pytest.mark.parametrize("suffixes", [(".h5",), (".json",), (".h5", ".json")], ids=["file", "record", "both"])
@pytest.mark.parametrize("is_committed", [False, True], ids=["missing", "committed"])
def test_a_shard_of_another_plan(made, dump, cli, suffixes, is_committed):
    """A shard of another plan is refused wherever it matters, put aside by repair, and made again."""
    before, shards = tree(dump), dump / "shards"
    (dump / "manifest.json").unlink()
    for suffix in (".h5", ".json"):
        if not is_committed:
            (shards / f"00001{suffix}").unlink()
    for suffix in suffixes:
        shutil.copy(made / "weights" / "shards" / f"00001{suffix}", shards)
    there = {*tree(shards).values()}
    looks = ["finalize", "verify", *([] if suffixes == (".h5",) and is_committed else ["inspect"])]  # by sizes
    for command in looks:
        run = cli(command, dump)
        assert run.code == 4
        assert "it belongs to another dump" in run.out + run.err
    if "inspect" in looks:
        with pytest.raises(DamagedError, match="it belongs to another dump"):
            featcli.extract(made / "photos", output=dump, **OPTIONS)
    assert cli("verify", dump, "--repair", "-q").code == 8
    assert {*tree(shards).values()} == there
    featcli.extract(made / "photos", output=dump, **OPTIONS)
    assert {name: content for name, content in tree(dump).items() if not name.endswith(".damaged")} == before


def test_both_fingerprints_are_shown(made, dump, cli):
    """A user who mixed up two dumps is shown both fingerprints."""
    shutil.copy(made / "weights" / "shards" / "00001.json", dump / "shards")
    said = cli("finalize", dump).err
    for name in ("weights", "d"):
        assert json.loads((made / name / "plan.json").read_text())["fingerprint"] in said


def test_a_record_that_was_not_copied(dump, cli):
    """A shard file without its record counts as missing, and finalize names it."""
    for name in ("shards/00001.json", "manifest.json"):
        (dump / name).unlink()
    run = cli("finalize", dump)
    assert run.code == 8
    assert "00001.h5 is there without its record 00001.json, and does not count" in run.err


def test_parts_made_apart(made, tmp_path, cli):
    """Parts of one plan in folders of their own become one dump when their shards are put together."""
    here, there = tmp_path / "here", tmp_path / "there"
    assert cli("extract", made / "photos", *GIVEN, "-o", here, "--part", "0/2", "-q").code == 0
    (there / "shards").mkdir(parents=True)
    for name in ("plan.json", "images.jsonl"):
        shutil.copy(here / name, there)
    assert cli("extract", made / "photos", *GIVEN, "-o", there, "--part", "1/2", "-q").code == 0
    for path in (there / "shards").iterdir():
        os.rename(path, here / "shards" / path.name)
    assert cli("finalize", here, "-q").code == 0
    assert tree(here) == tree(made / "d")


def test_what_verify_says_of_a_damaged_file(dump, cli):
    """A damaged record is named once, in our words, and what a mended plan reveals is found at once."""
    (dump / "shards" / "00001.json").write_text("{")
    assert cli("verify", dump).out.startswith("shards/00001.json: it is damaged (not JSON)\n")
    (dump / "plan.json").write_text("")
    assert cli("verify", dump).out.startswith("plan.json: damaged (empty)\n")
    run = cli("verify", dump, "--repair")
    assert run.code == 8
    assert "shards/00001.json put aside as 00001.json.damaged" in run.err


def test_finalizing_a_dump_without_a_picture(tmp_path, cli):
    """`finalize --json` gives its exit code, which is 9 if not one image could be read."""
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert cli("extract", tmp_path / "a.jpg", *GIVEN, "-o", tmp_path / "d", "-q").code == 9
    run = cli("finalize", tmp_path / "d", "--json")
    assert (run.code, run.events[0]["exit_code"]) == (9, 9)
