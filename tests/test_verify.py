"""Check that `verify` finds all damage, that `--repair` and the next run undo it, `--retry-failed` and `finalize`."""

import json
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import featcli
from conftest import draw, tree
from featcli import open_dump
from featcli.dump import records
from featcli.dump.folder import Dump
from featcli.dump.verify import repair, verify
from featcli.dump.writer import finalize, finalize_all
from featcli.errors import ConflictError, DamagedError, IncompleteError, UsageError
from featcli.views.inspection import inspect_dump

TINY = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4}
COMMAND = ["-c", "test_resnet", "--random-init", "--batch-size", 4, "--shard-size", 4]


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def made(request, tmp_path_factory):
    """Make a dump of ten pictures, two of them broken, and return the folder of the pictures, too."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(10):
        draw(folder / "photos" / f"{i}.png", i)
    for i in (2, 9):
        (folder / "photos" / f"{i}.png").write_bytes(b"no picture")
    featcli.extract(folder / "photos", output=folder / "d", format=request.param, out_indices="all", **TINY)
    return folder


@pytest.fixture
def dump(made, tmp_path):
    """Return a copy of it to damage."""
    shutil.copytree(made / "d", tmp_path / "d")
    return tmp_path / "d"


def again(made, dump, **options):
    format_name = open_dump(made / "d").plan.settings.format
    return featcli.extract(made / "photos", output=dump, format=format_name, out_indices="all", **TINY, **options)


def test_a_whole_dump(made):
    """An undamaged dump gives no findings, and nothing in it changes."""
    before = tree(made / "d")
    verdict = verify(made / "d")
    assert (verdict.state, verdict.damages, verdict.missing_shards) == ("whole", [], 0)
    assert verdict.bytes == sum(
        len(content) for name, content in before.items() if not name.endswith((".json", ".jsonl"))
    )
    assert not verdict.nan
    assert not verdict.inf
    assert tree(made / "d") == before


def test_every_flipped_byte_is_found(dump):
    """A changed byte, anywhere in any file of a dump, is found in that file."""
    rng, files = random.Random(0), [path for path in sorted(dump.rglob("*")) if path.is_file()]
    for turn in range(150):
        path = files[turn % len(files)]
        before = path.read_bytes()
        place = rng.randrange(len(before))
        after = bytearray(before)
        after[place] ^= rng.randrange(1, 256)
        path.write_bytes(after)
        verdict = verify(dump)
        path.write_bytes(before)
        name = str(path.relative_to(dump))
        assert verdict.state == "damaged", (name, place)
        assert any(damage.file == name or name == "images.jsonl" for damage in verdict.damages), (name, place)
    assert verify(dump).state == "whole"


@pytest.mark.parametrize(
    "name", ["plan.json", "images.jsonl", "shards/00001.json", "shards/00001", "failures.jsonl", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "longer"])
def test_files_that_are_gone_or_cut(dump, name, damage):
    """A file that is gone, empty, shorter or longer is damage or missing work, and never an exception."""
    (path,) = [
        p
        for p in dump.rglob("*")
        if str(p.relative_to(dump)).startswith(name)
        and (name[-5:] == p.name[-5:] or p.suffix in (".h5", ".safetensors"))
    ]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-3], "longer": content + b"\n"}[damage])
    verdict = verify(dump)
    assert verdict.state == ("incomplete" if (damage, name) in [("gone", "manifest.json")] else "damaged")


def test_all_damage_is_found_at_once(dump, cli):
    """Several damages are all named at once, each with its file, and the exit code is 4."""
    shard = Dump.existing(dump).shard_path(0)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    Dump.existing(dump).shard_path(2).unlink()
    (dump / "failures.jsonl").write_text("")
    shown = cli("verify", dump)
    assert shown.code == 4
    assert f"shards/{shard.name}: " in shown.out
    assert f"shards/00002{shard.suffix}: gone" in shown.out
    assert "failures.jsonl: not what the records say" in shown.out
    assert shown.err.splitlines()[1].startswith("hint: run featcli verify --repair")
    facts = cli("verify", dump, "--json").events[0]
    assert (facts["type"], facts["state"]) == ("verdict", "damaged")
    assert {damage["shard"] for damage in facts["damages"]} == {0, 2, None}


def test_repair(made, dump, cli):
    """Damaged shards are put aside, the others stay, and the same extraction brings every byte back."""
    before = tree(dump)
    shard = Dump.existing(dump).shard_path(1)
    content = bytearray(shard.read_bytes())
    content[-5] ^= 255
    shard.write_bytes(content)
    (dump / "shards" / "00002.json").write_text("{}")
    repaired = cli("verify", dump, "--repair")
    assert repaired.code == 8, repaired.err
    assert (dump / "shards" / f"{shard.name}.damaged").exists()
    assert verify(dump).state == "incomplete"
    again(made, dump)
    assert verify(dump).state == "whole"
    after = {name: content for name, content in tree(dump).items() if not name.endswith(".damaged")}
    assert after == before


def test_repair_of_a_plan(dump):
    """A damaged plan is written again from the manifest, and a damaged image list is refused with the reason."""
    before = tree(dump)
    (dump / "plan.json").write_text("{")
    repair(verify(dump))
    assert tree(dump) == before
    (dump / "images.jsonl").write_text("{")
    with pytest.raises(DamagedError, match="cannot be made again without the images"):
        repair(verify(dump))


def test_no_dump(tmp_path):
    """A folder that is no dump is a usage error."""
    with pytest.raises(UsageError, match=r"no plan\.json"):
        verify(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_that_are_not_finite(tmp_path, monkeypatch, dtype):
    """Infinite and undefined values in rows of good pictures are counted by stage as torch finds them.

    So they are when a shard is read in several pieces, the last of which is shorter.
    """
    pictures = [draw(tmp_path / "photos" / f"{i}.png", i) for i in range(3)]
    pictures[1].write_bytes(b"no picture")
    featcli.extract(tmp_path / "photos", output=tmp_path / "d", dtype=dtype, **TINY)
    dump = Dump.existing(tmp_path / "d")
    path = dump.shard_path(0)
    array = dump.format.read_layout(str(path), 3).arrays["stage4"]
    monkeypatch.setattr("featcli.dump.verify.PIECE_BYTES", 2 * array.row_bytes)
    assert verify(tmp_path / "d").state == "whole"
    content = bytearray(path.read_bytes())
    bits = np.random.default_rng(0).bytes(3 * array.row_bytes)  # any number that there is
    content[array.offset : array.end] = bits
    path.write_bytes(content)
    good = torch.frombuffer(bytearray(bits), dtype=getattr(torch, dtype)).reshape(3, -1)[[0, 2]]
    verdict = verify(tmp_path / "d")
    expected = int(good.isinf().sum()), int(good.isnan().sum())
    assert (verdict.inf["stage4"], verdict.nan["stage4"]) == expected
    assert expected[1] > 0


def test_recompute(made, cli):
    """Images extracted again, in their batches, have the same bits, and another checkpoint is refused."""
    arguments = ["verify", made / "d", made / "photos", "--random-init", "--recompute", 20]
    shown = cli(*arguments, "-c", "test_resnet")
    assert shown.code == 0, shown.err
    assert "8 images extracted anew: 8 equal bit for bit" in shown.out
    refused = cli(*arguments, "-c", "test_resnet", "--seed", 1)
    assert (refused.code, "digest of the weights" in refused.err) == (5, True)
    assert cli("verify", made / "d", "--recompute", 2).code == 2


def test_recompute_refuses_before_it_reads(made, monkeypatch, cli):
    """A checkpoint that is not the plan's, or is missing, is refused before the first byte of a shard is read."""
    monkeypatch.setattr("featcli.dump.verify.verify", lambda *_: pytest.fail("the dump was read"))
    given = ["verify", made / "d", made / "photos", "--recompute", 2]
    assert cli(*given, "-c", "test_vit", "--random-init").code == 5
    assert cli(*given, "-c", "no_such_model").code == 2


def test_recompute_takes_the_checkpoint_from_the_plan(made, tmp_path, cli):
    """Checkpoint, random weights and seed come from the plan if none is given, but a local checkpoint must be named."""
    pictures, weights = made / "photos", tmp_path / "w.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    seeded, local = ("test_resnet", "--random-init", "--seed", 3), (weights, "--arch", "test_resnet")
    for name, given in (("seeded", seeded), ("local", local)):
        assert cli("extract", pictures, "-c", *given, "--pool", "avg", "-o", tmp_path / name).code == 3
    shown = cli("verify", tmp_path / "seeded", pictures, "--recompute", 20)
    assert (shown.code, "8 equal bit for bit" in shown.out) == (0, True)
    for other in (("--random-init", "--seed", 0), ("-c", weights)):  # a seed that is the default, and trained weights
        refused = cli("verify", tmp_path / "seeded", pictures, "--recompute", 20, *other)
        assert (refused.code, "random weights, seed 3: its feature maps mean nothing" in refused.err) == (5, True)
    refused = cli("verify", tmp_path / "local", pictures, "--recompute", 20)
    assert refused.code == 2
    assert "this dump was made with 'w.safetensors'" in refused.err
    assert "hint: give it with -c/--checkpoint\n" in refused.err
    shown = cli("verify", tmp_path / "local", pictures, "--recompute", 20, "-c", weights)
    assert (shown.code, "8 equal bit for bit" in shown.out) == (0, True)


def test_recompute_of_greys(made, tmp_path, cli):
    """The number of channels comes from the plan, for backbones of both libraries."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], embedding_size=16)
    config.save_pretrained(tmp_path / "resnet")
    for name, checkpoint in (("timm", "test_resnet"), ("transformers", tmp_path / "resnet")):
        given = ("-c", checkpoint, "--random-init", "--image-size", 64)
        dump = tmp_path / name
        assert cli("extract", made / "photos", *given, "--num-channels", 1, "-o", dump).code == 3
        shown = cli("verify", dump, made / "photos", "-c", checkpoint, "--random-init", "--recompute", 20)
        assert "8 equal bit for bit" in shown.out, shown.err


def test_recompute_finds_what_hashes_cannot(made, dump, cli):
    """A dump with other values, sealed with right hashes, is found by --recompute."""
    found = Dump.existing(dump)
    from featcli.dump.checksummed_json import publish_checksummed
    from featcli.dump.shard import REST, hash_rest

    for number in range(found.plan.num_shards):
        path, record = found.shard_path(number), found.record_of(number)
        layout = found.format.read_layout(str(path), len(found.plan.shard(number)))
        array = layout.arrays["stage4"]
        content = bytearray(path.read_bytes())
        values = np.frombuffer(content, np.float32, offset=array.offset, count=(array.end - array.offset) // 4)
        content[array.offset : array.end] = (values * 2).tobytes()
        path.write_bytes(content)
        import xxhash

        record["hashes"]["stage4"] = xxhash.xxh3_128_hexdigest(bytes(content[array.offset : array.end]))
        stages = [a for name, a in layout.arrays.items() if name != "valid"]
        with path.open("rb") as file:
            record["hashes"][REST] = hash_rest(file.fileno(), layout.size, stages)
        publish_checksummed(found.record_path(number), record, replace=True)
    finalize(found)
    assert verify(dump).state == "whole"
    shown = cli("verify", dump, made / "photos", "-c", "test_resnet", "--random-init", "--recompute", 3)
    assert (shown.code, "other values for 3 images" in shown.err) == (4, True)


def test_retry_failed(made, tmp_path):
    """Repaired images are made again, and the dump's rows are those of a run in which they were never broken."""
    shutil.copytree(made, tmp_path / "copy")
    photos, dump = tmp_path / "copy" / "photos", tmp_path / "copy" / "d"
    draw(photos / "2.png", 2)
    with pytest.raises(ConflictError, match="changed since") as refused:
        again(tmp_path / "copy", dump)
    assert "--retry-failed" in refused.value.hint
    kept = (dump / "shards" / "00001.json").read_bytes()
    outcome = again(tmp_path / "copy", dump, retry_failed=True)
    assert (outcome.failed, outcome.extracted) == (1, 6)  # the shards of 2.png and of 9.png
    assert (dump / "shards" / "00001.json").read_bytes() == kept
    assert verify(dump).state == "whole"
    fresh = again(tmp_path / "copy", tmp_path / "fresh")
    found, expected = open_dump(dump), open_dump(fresh.dump)
    for stage in expected.stages:
        assert np.array_equal(found[stage][:], expected[stage][:], equal_nan=True)
    assert [f["key"] for f in found.failures] == ["9.png"]
    assert again(tmp_path / "copy", dump).extracted == 0  # the repaired image is as it was when it was read


def test_retry_does_not_forgive_other_changes(made, tmp_path):
    """A good image that changed is refused, also with --retry-failed."""
    shutil.copytree(made, tmp_path / "copy")
    draw(tmp_path / "copy" / "photos" / "3.png", 77)
    with pytest.raises(ConflictError, match=r"first '3\.png'"):
        again(tmp_path / "copy", tmp_path / "copy" / "d", retry_failed=True)


def test_finalize(dump, cli):
    """`finalize` writes the last two files again, to the byte, and refuses while a shard is missing."""
    before = tree(dump)
    for name in ("manifest.json", "failures.jsonl"):
        (dump / name).unlink()
    assert cli("verify", dump).code == 8
    assert cli("finalize", dump).code == 0
    assert tree(dump) == before
    (dump / "shards" / "00001.json").unlink()
    with pytest.raises(IncompleteError, match="1 of 3 shards"):
        finalize(Dump.existing(dump))
    assert cli("finalize", dump).code == 8
    Dump.existing(dump).shard_path(0).unlink()
    assert cli("finalize", dump).code == 4


def test_no_record_is_read_more_often_than_needed(made, monkeypatch):
    """`inspect` reads each record once, and `finalize` twice: before its lock and under it."""
    read: list[str] = []
    plain = records.read_checksummed
    monkeypatch.setattr(records, "read_checksummed", lambda path: read.append(path.name) or plain(path))
    inspect_dump(made / "d")
    assert sorted(read) == ["00000.json", "00001.json", "00002.json"]
    read.clear()
    Dump.existing(made / "d").refuse_damaged_shards()
    finalize_all(Dump.existing(made / "d"))
    assert sorted(read) == sorted(["00000.json", "00001.json", "00002.json"] * 2)


def test_a_list_is_read_line_by_line(dump):
    """A list of images whose lines are JSON only together, or that is JSON in another way, is damaged."""
    path, line = dump / "images.jsonl", b'{"key": "0.png", "bytes": 1}\n'
    for wrong in (line.replace(b", ", b"\n"), line * 2 + b"\n", line + b"[]\n", line.replace(b"1", b'"1"'), b"\xff\n"):
        path.write_bytes(wrong + b" " * path.stat().st_size)
        with pytest.raises(DamagedError, match=r"images\.jsonl is damaged"):
            Dump.existing(dump).keys()


def test_records_say_what_they_must(dump):
    """A record with fields of wrong types, sealed as if it were right, is damage and no exception."""
    from featcli.dump.checksummed_json import publish_checksummed

    found = Dump.existing(dump)
    record = json.loads((dump / "shards" / "00000.json").read_text())
    del record["checksum"]
    changes = [
        {"rows": "4"}, {"bytes": None}, {"hashes": []}, {"hashes": {"stage4": 1}}, {"failures": 3}, {"shard": 1},
        {"failures": [{"key": 1, "row": 2, "reason": "x", "detail": ""}]}, {"failures": [{"row": 99}]}, {"sizes": 3},
        {"file": "../../etc/passwd"}, {"sizes": {"-1": 3}},
    ]  # fmt: skip
    for change in changes:
        publish_checksummed(found.record_path(0), record | change, replace=True)
        assert verify(dump).state == "damaged", change
        with pytest.raises(DamagedError):
            list(found.records())


def test_a_reader_written_from_the_format_page(made):
    """Forty lines that know only docs/format.md read every good row of both formats."""
    from independent_reader import read_dump

    found, expected = read_dump(made / "d"), open_dump(made / "d")
    assert list(found) == list(expected.stages)
    good = [key for key, valid in zip(expected.keys, expected.valid, strict=True) if valid]
    for stage, maps in found.items():
        assert list(maps) == good
        assert all(np.array_equal(maps[key], expected[stage][key]) for key in good)


def test_a_dump_of_a_later_version(tmp_path, photos, cli):
    """A dump of a later version is not called damaged, and each command names a way out that keeps it."""
    from featcli.dump.checksummed_json import publish_checksummed, read_checksummed

    featcli.extract(photos, output=tmp_path / "d", checkpoint="test_resnet", random_init=True)
    plan = tmp_path / "d" / "plan.json"
    publish_checksummed(plan, {**read_checksummed(plan), "format_version": 3}, replace=True)
    for command in (["verify"], ["inspect"], ["verify", "--repair"], ["export", "-o", tmp_path / "x.h5"]):
        run = cli(command[0], tmp_path / "d", *command[1:])
        assert run.code == 5
        assert "format version 3, this featcli reads 1 and 2\nhint: use the featcli that made it" in run.err
