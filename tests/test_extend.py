"""Check --extend: a dump grows by generations, whose rows follow, and nothing that was there is touched."""

import json
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from conftest import draw, tree
from featcli import extract, open_dump
from featcli.dump import generations
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed
from featcli.dump.folder import BEFORE, Dump
from featcli.dump.lock import FolderLock
from featcli.dump.verify import verify
from featcli.dump.writer import reopen
from featcli.errors import ConflictError, DamagedError, FeatcliError, IncompleteError, MachineError
from featcli.extraction.growing import Growth

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
OPTIONS |= {"batch_size": 2, "shard_size": 2}
FLAGS = ["--random-init"]  # the same for a command
FLAGS += [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "random_init"]
FIRST, SECOND, THIRD = ["b.png", "d.png", "f.png"], ["a.png", "c.png"], ["e/1.png", "g.png", "z.png"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate([*FIRST, *SECOND, *THIRD]):
        draw(made / name, seed, (40, 40))
    (made / "c.png").write_bytes(b"no picture")
    return made


@pytest.fixture
def folder(pictures, tmp_path):
    """Make a folder that holds the first pictures, and gets others by `add`."""
    made = tmp_path / "in"
    add(pictures, made, FIRST)
    return made


def add(pictures, folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(pictures / name, folder / name)


def grown(pictures, folder, output, **options):
    """Make a dump of three generations."""
    outcomes = []
    for names in (FIRST, SECOND, THIRD):
        add(pictures, folder, names)
        outcomes.append(extract(folder, output=output, extend=True, **OPTIONS | options))
    return outcomes


@pytest.fixture(scope="module")
def three(pictures, tmp_path_factory):
    made = tmp_path_factory.mktemp("three")
    grown(pictures, made / "in", made / "d")
    return made


def test_a_dump_grows_by_what_is_new(pictures, folder, tmp_path):
    """Each generation has the rows of the images that came, after those that were there, with their own maps."""
    outcomes = grown(pictures, folder, tmp_path / "d")
    assert [(one.extracted, one.written, one.failed) for one in outcomes] == [(3, 3, 0), (2, 4, 1), (3, 7, 1)]
    assert [one.exit_code for one in outcomes] == [0, 3, 3]
    with open_dump(tmp_path / "d") as dump:
        assert dump.keys == [*FIRST, *SECOND, *THIRD]
        assert dump.valid.tolist() == [True, True, True, True, False, True, True, True]
        assert [(one["key"], one["row"]) for one in dump.failures] == [("c.png", 4)]
        for names in (FIRST, SECOND, THIRD):
            alone = tmp_path / names[0].replace("/", "-")
            extract(files_from=names, root=folder, output=alone, **OPTIONS)
            with open_dump(alone) as other:
                np.testing.assert_array_equal(dump["stage4"][names], other["stage4"][:])
        np.testing.assert_array_equal(dump["stage4"][[7, 0, 5]], [dump["stage4"][row] for row in (7, 0, 5)])
        assert [run.rows for run in dump.walk()] == [[0, 1], [2], [3], [5, 6], [7]]


def test_nothing_that_was_there_is_touched(pictures, folder, tmp_path):
    """Only manifest.json of the first generation is replaced; every other file stays what it was."""
    extract(folder, output=tmp_path / "d", **OPTIONS)
    for names in (SECOND, THIRD):
        before = tree(tmp_path / "d")
        add(pictures, folder, names)
        extract(folder, output=tmp_path / "d", extend=True, **OPTIONS)
        after = tree(tmp_path / "d")
        assert {name for name in before if after.get(name) != before[name]} == {"manifest.json"}
    before = tree(tmp_path / "d")
    outcome = extract(folder, output=tmp_path / "d", extend=True, **OPTIONS)
    assert (outcome.extracted, outcome.exit_code, tree(tmp_path / "d") == before) == (0, 3, True)


def test_the_manifest_names_the_generations(three):
    """It has another format version, and number, fingerprint, rows and checksum of the manifest of each generation."""
    manifest = read_checksummed(three / "d" / "manifest.json")
    assert manifest["format_version"] == 3
    for number, (one, names) in enumerate(zip(manifest["generations"], (SECOND, THIRD), strict=True), 1):
        path = three / "d" / "more" / f"{number:05d}"
        raw = json.loads((path / "manifest.json").read_bytes())
        assert one == {
            "number": number,
            "fingerprint": raw["fingerprint"],
            "rows": len(names),
            "manifest": raw["checksum"],
        }
        extends = {"fingerprint": manifest["fingerprint"], "generation": number, "rows": 3 + 2 * (number - 1)}
        assert raw["extends"] == extends


def test_plain_extract_of_a_dump_that_grew(three, pictures, tmp_path):
    """All of its images, or those of its first generations, resume it; others are refused, new ones with the hint."""
    before = tree(three / "d")
    assert extract(three / "in", output=three / "d", **OPTIONS).extracted == 0
    for names in (FIRST, [*SECOND, *FIRST]):
        assert extract(files_from=names, root=three / "in", output=three / "d", **OPTIONS).extracted == 0
    for names, hint in (([*FIRST, *THIRD], ""), (FIRST[:2], ""), (SECOND, "")):
        with pytest.raises(ConflictError, match="made of other images"):
            extract(files_from=names, root=three / "in", output=three / "d", **OPTIONS)
        assert hint == ""
    add(pictures, tmp_path / "more", [*FIRST, *SECOND, *THIRD])
    draw(tmp_path / "more" / "new.png", 99)
    with pytest.raises(ConflictError, match=r"8 images, and 1 more are given, first 'new.png'") as refused:
        extract(tmp_path / "more", output=three / "d", **OPTIONS)
    assert "--extend" in refused.value.hint
    assert tree(three / "d") == before


def test_new_images_are_refused_with_the_hint(pictures, folder, tmp_path):
    """A dump that has not grown yet names --extend, too."""
    extract(folder, output=tmp_path / "d", **OPTIONS)
    add(pictures, folder, SECOND)
    with pytest.raises(ConflictError, match="2 are new") as refused:
        extract(folder, output=tmp_path / "d", **OPTIONS)
    assert "--extend" in refused.value.hint


@pytest.mark.parametrize("other", [{"pool": "max"}, {"image_size": 64}, {"seed": 1}, {"format": "safetensors"}])
def test_another_option_is_refused(three, pictures, tmp_path, other):
    """A generation has the outputs and settings of the dump; threads and batch size are taken from it."""
    shutil.copytree(three, tmp_path / "copy")
    draw(tmp_path / "copy" / "in" / "new.png", 99)
    path = tmp_path / "copy" / "d"
    before = tree(path)
    with pytest.raises(ConflictError, match="was made with another plan"):
        extract(tmp_path / "copy" / "in", output=path, extend=True, **OPTIONS | other)
    assert tree(path) == before
    free = {name: value for name, value in OPTIONS.items() if name not in ("threads", "batch_size", "shard_size")}
    extract(tmp_path / "copy" / "in", output=path, extend=True, **free)
    plan = read_checksummed(path / "more" / "00003" / "plan.json")
    assert (plan["settings"]["threads"], plan["settings"]["batch_size"], plan["shard_rows"]) == (1, 2, 2)


def note(texts, event, **facts):
    texts += [facts["text"]] if event == "warning" else []


def test_changed_and_gone_pictures_are_said(three, tmp_path):
    """A picture of another size is named and its row stays; --check-digests finds one of the same size, too."""
    shutil.copytree(three, tmp_path / "copy")
    path = tmp_path / "copy" / "d"
    inside = tmp_path / "copy" / "in"
    (inside / "b.png").unlink()
    (inside / "d.png").write_bytes(b"another")
    raw = bytearray((inside / "f.png").read_bytes())
    raw[-1] ^= 1
    (inside / "f.png").write_bytes(raw)
    before = tree(path)
    for check, named in ((False, "'d.png'"), (True, "'d.png', 'f.png' changed since extracted:")):
        texts = []
        report = partial(note, texts)
        extract(inside, output=path, extend=True, check_digests=check, report=report, **OPTIONS)
        assert any(text.startswith(named) for text in texts), texts
        assert any(text.startswith("1 image of the dump is not given any more") for text in texts)
    assert tree(path) == before


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", ["commit", "finalize", "create"])
def test_a_killed_run_is_finished_first(pictures, folder, tmp_path, monkeypatch, moment):
    """A generation that was begun is finished under its own list; images that came since make the next one."""
    path = tmp_path / "d"
    extract(folder, output=path, **OPTIONS)
    add(pictures, folder, SECOND)

    def killed(*_, **__):
        raise Killed

    from featcli.extraction import extract as module

    with monkeypatch.context() as patch:
        if moment == "commit":
            patch.setattr(module, "commit", killed)
        elif moment == "finalize":
            patch.setattr(module, "finalize", killed)
        else:
            patch.setattr(module, "_make", killed)
        with pytest.raises(Killed):
            extract(folder, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == FIRST  # as it was
    add(pictures, folder, THIRD)
    outcome = extract(folder, output=path, extend=True, **OPTIONS)
    assert (outcome.written, outcome.failed, outcome.is_complete) == (7, 1, True)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *SECOND, *THIRD]


def test_gone_pictures_of_an_unfinished_generation(pictures, folder, tmp_path, monkeypatch):
    """A file that is gone before its generation is finished becomes a failure: its row is in the frozen list."""
    path = tmp_path / "d"
    extract(folder, output=path, **OPTIONS)
    add(pictures, folder, THIRD)
    from featcli.extraction import extract as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(folder, output=path, extend=True, **OPTIONS)
    (folder / "g.png").unlink()
    assert extract(folder, output=path, extend=True, **OPTIONS).failed_by_reason == {"not_found": 1}
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *THIRD]


@pytest.fixture
def begun(pictures, folder, tmp_path):
    """Make a dump of two generations, and begin a third one: two of its images are committed, one more is kept."""
    path = tmp_path / "d"
    extract(folder, output=path, **OPTIONS)
    add(pictures, folder, SECOND)
    extract(folder, output=path, extend=True, **OPTIONS)
    add(pictures, folder, THIRD)
    for seed, name in enumerate(("y.png", "zz.png")):
        draw(folder / name, seed, (40, 40))

    def stop(kind, **_):
        seen.append(kind)
        if kind == "batch" and seen.count(kind) == 3:
            raise Killed

    seen = []
    with pytest.raises(Killed):
        extract(folder, output=path, extend=True, report=stop, **OPTIONS | {"batch_size": 1})
    return path


def test_what_was_begun_is_said(begun, folder, cli):
    """inspect, verify and finalize name a generation that is not part of the dump yet, which is whole without it."""
    expected = {"generation": 2, "images": 5, "safe": 3, "problem": ""}
    for command in ("inspect", "verify", "finalize"):
        run = cli(command, begun)
        assert (run.code, run.out.count("generation 2, 3 of 5 images are safe")) == (0, 1), run
        assert cli(command, begun, "--json").events[-1]["begun"] == expected
    with FolderLock(begun):
        assert "generation 2, 3 of 5 images are safe" in cli("verify", begun).out
    extract(folder, output=begun, extend=True, **OPTIONS)
    for command in ("inspect", "verify", "finalize"):
        assert "safe" not in cli(command, begun).out
        assert cli(command, begun, "--json").events[-1]["begun"] is None


@pytest.mark.parametrize("what", ["a damaged plan", "a damaged record", "a later version", "another dump"])
def test_what_was_begun_cannot_be_taken_up(begun, folder, cli, what):
    """If a run cannot go on with what lies in the next place, verify and inspect say why: the dump is whole."""
    third = begun / "more" / "00002"
    if what == "a damaged plan":
        (third / "plan.json").write_bytes(b"{}")
    elif what == "a damaged record":
        (third / "shards" / "00000.json").write_bytes(b"{}")
    elif what == "a later version":
        plan = read_checksummed(third / "plan.json")
        publish_checksummed(third / "plan.json", plan | {"format_version": 99}, replace=True)
    else:
        shutil.rmtree(third)
        extract(folder, output=begun.with_name("x"), **OPTIONS)
        begun.with_name("x").rename(third)
    why = {"a later version": "format version 99", "another dump": "is not a generation of it"}.get(what, "is damaged")
    for command in ("inspect", "verify"):
        run = cli(command, begun, "--json")
        assert run.code == 0, run.err
        assert run.events[-1]["begun"]["generation"] == 2
        assert why in run.events[-1]["begun"]["problem"]
        assert why in cli(command, begun).out
    before = tree(begun)
    assert cli("finalize", begun).code in (4, 5)
    with pytest.raises((ConflictError, DamagedError), match=why) as refused:
        extract(folder, output=begun, extend=True, **OPTIONS)
    assert ("move that folder away" in refused.value.hint) == (what == "a damaged plan")
    assert tree(begun) == before


def test_what_was_begun_beside_a_lost_manifest(begun, cli):
    """Complete generations are none that was begun, also if the manifest that names them is gone."""
    (begun / "manifest.json").unlink()
    assert cli("verify", begun, "--json").events[-1]["begun"]["generation"] == 2
    assert cli("finalize", begun, "--json").events[-1]["begun"]["safe"] == 3


def test_an_unfinished_dump_is_finished_first(pictures, folder, tmp_path, monkeypatch):
    """The first generation, too, is finished under its own list before it is extended."""
    path = tmp_path / "d"
    from featcli.extraction import extract as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(folder, output=path, extend=True, **OPTIONS)
    add(pictures, folder, SECOND)
    extract(folder, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *SECOND]
    assert (path / "more" / "00001").is_dir()


def test_repaired_pictures_are_said(three, pictures, tmp_path):
    """A picture that failed and has changed since is named with the option that tries it again."""
    shutil.copytree(three, tmp_path / "copy")
    shutil.copy(pictures / "b.png", tmp_path / "copy" / "in" / "c.png")
    texts = []
    extract(
        tmp_path / "copy" / "in", output=tmp_path / "copy" / "d", extend=True, report=partial(note, texts), **OPTIONS
    )
    assert texts == ["'c.png' failed and has changed since: --retry-failed tries it again"]


def test_other_cells_of_old_rows_are_said(pictures, folder, tmp_path):
    """Cells of rows that are there are not changed: a run says which differ now, and which column is new."""
    path, texts = tmp_path / "d", []
    same = {"root": folder, "output": path, "extend": True, "report": partial(note, texts), **OPTIONS}
    extract(table={"path": FIRST, "label": ["x", "y", "z"]}, **same)
    before = tree(path)
    extract(table={"path": FIRST[::-1], "label": ["z", "other", "x"], "split": ["a", "b", None]}, **same)
    assert texts == [
        "cells of 1 old row are others now, first 'd.png': they stay",
        "the dump has no column 'split' yet: 2 old rows will have no cell there",
    ]
    with pytest.raises(ConflictError, match="held text, and now holds int"):
        extract(table={"path": FIRST, "label": [1, 2, 3]}, **same)
    assert tree(path) == before


@pytest.mark.parametrize("other", [{"pool": "max"}, {"checkpoint": "test_vit"}, {"seed": 3}])
def test_another_option_is_refused_with_nothing_new(three, other):
    """A wrong command is refused at once, not on the day when an image comes."""
    with pytest.raises(ConflictError, match="was made with another plan"):
        extract(three / "in", output=three / "d", extend=True, **OPTIONS | other)


def test_recompute_without_the_images_that_are_gone(three, tmp_path, cli):
    """verify --recompute draws from the images that are there."""
    shutil.copytree(three / "in", tmp_path / "in")
    (tmp_path / "in" / "b.png").unlink()
    options = ["--recompute", 9, "-c", "test_resnet", "--random-init", "--json"]
    ran = cli("verify", three / "d", tmp_path / "in", *options)
    assert (ran.code, ran.events[-1]["images"], ran.events[-1]["equal"]) == (0, 6, 6)


def test_parts_make_a_generation_together(pictures, folder, tmp_path):
    """The first part makes the plan of the generation, the others join it, and the last one commits it.

    Each gets shards, and says how many are missing.
    """
    path, options, missing = tmp_path / "d", {**OPTIONS, "batch_size": 1, "shard_size": None}, []
    extract(folder, output=path, **options)
    add(pictures, folder, [*SECOND, *THIRD])

    def report(kind, **facts):
        if kind == "end":
            missing.append((facts["is_complete"], facts["missing_shards"], facts["shards"] > facts["missing_shards"]))

    for part in ("0/2", "1/2"):
        with open_dump(path) as dump:
            assert dump.keys == FIRST
        extract(folder, output=path, extend=True, part=part, report=report, **options)
    added = len([*SECOND, *THIRD])
    assert missing == [(False, added // 2, True), (True, 0, True)]
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *sorted([*SECOND, *THIRD])]


@pytest.mark.parametrize("locks", [True, False])
def test_two_runs_at_once(pictures, folder, tmp_path, monkeypatch, locks):
    """Two runs with the same new images join; one with others is refused or follows, and no row is lost."""
    path = tmp_path / "d"
    extract(folder, output=path, **OPTIONS)
    add(pictures, folder, [*SECOND, *THIRD])
    if not locks:
        monkeypatch.setattr(FolderLock, "_take", lambda lock, kind: setattr(lock, "is_real", False) or True)
    outcomes = []

    def run():
        try:
            outcomes.append(extract(folder, output=path, extend=True, **OPTIONS).is_complete)
        except FeatcliError as error:
            outcomes.append(error.exit_code)

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert True in outcomes
    assert set(outcomes) <= {True, 5}
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *sorted([*SECOND, *THIRD])]
    assert len(list((path / "more").iterdir())) == 1


def test_damage_in_a_generation(three, tmp_path, cli):
    """verify names it below `more`, --repair sets the shard aside, and the extract command makes it again."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    whole = tree(path)
    shard = path / "more" / "00002" / "shards" / "00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    ran = cli("verify", path, "--json")
    assert ran.code == 4
    assert [one["file"] for one in ran.events[0]["damages"]] == ["more/00002/shards/00000.h5"]
    assert cli("verify", path, "--repair").code == 8
    with pytest.raises(IncompleteError):
        open_dump(path)
    extract(inside, output=path, **OPTIONS)
    assert cli("verify", path).code == 0
    after = {name: content for name, content in tree(path).items() if not name.endswith(".damaged")}
    assert after == whole


@pytest.mark.parametrize("wrong", ["shard", "manifest", "plan", "failures"])
def test_damage_in_the_first_generation(three, tmp_path, cli, wrong):
    """Whatever is damaged in the root, its generations are not lost."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    whole = tree(path)
    name = {"shard": "shards/00000.h5", "manifest": "manifest.json", "plan": "plan.json", "failures": "failures.jsonl"}
    file = path / name[wrong]
    file.write_bytes(file.read_bytes()[:-1] + b"?" if wrong == "failures" else file.read_bytes()[1:])
    if wrong == "failures":
        file.write_bytes(b"{}\n")
    assert cli("verify", path).code == 4
    assert cli("verify", path, "--repair").code in (0, 8)
    extract(inside, output=path, **OPTIONS)
    assert cli("verify", path).code == 0
    after = {name: content for name, content in tree(path).items() if not name.endswith(".damaged")}
    assert after == whole


def empty(path):
    """Leave an empty folder in the place of the second generation."""
    shutil.rmtree(path / "more" / "00001")
    (path / "more" / "00001").mkdir()


def put_another(path):
    """Put the second generation in the place of the third."""
    shutil.rmtree(path / "more" / "00002")
    shutil.copytree(path / "more" / "00001", path / "more" / "00002")


LOST = {
    "gone": (lambda path: shutil.rmtree(path / "more" / "00001"), ["more/00001: gone"], "more/00001"),
    "empty": (empty, ["more/00001: gone"], "more/00001"),
    "all": (
        lambda path: shutil.rmtree(path / "more"),
        [f"more/0000{n}: gone" for n in (1, 2)],
        "more/00001 and 1 other",
    ),
    "another": (put_another, ["more/00002: not the generation that was added"], "more/00002"),
}


@pytest.mark.parametrize("is_harmed", [False, True])
@pytest.mark.parametrize("how", LOST)
def test_a_generation_that_is_lost(three, tmp_path, cli, how, is_harmed):
    """Every reader refuses a dump that lost a generation. verify names it, and what else is damaged, and no more."""
    shutil.copytree(three, tmp_path / "copy")
    path = tmp_path / "copy" / "d"
    lose, damages, named = LOST[how]
    lose(path)
    if is_harmed:
        (path / "failures.jsonl").write_bytes(b"{}\n")
        damages = [*damages, "failures.jsonl: not what the records say"]
    with pytest.raises(DamagedError, match=r"more/0000\d is (gone|not the generation that was added)"):
        open_dump(path)
    assert cli("inspect", path).code == 4
    run = cli("verify", path)
    assert (run.code, run.out.splitlines()[:-1]) == (4, damages)
    assert f"hint: put {named} back from a copy" in run.err
    run = cli("verify", path, "--repair")
    assert (run.code, f"hint: put {named} back from a copy" in run.err) == (4, True)


@pytest.mark.parametrize("harm", ["file gone", "file cut", "record gone"])
@pytest.mark.parametrize("place", [".", "more/00001", "more/00002"])
@pytest.mark.parametrize("extend", [False, True])
def test_a_shard_that_is_gone_from_a_dump_that_grew(three, pictures, tmp_path, harm, place, extend):
    """The extract command, with --extend or without, makes such a shard again, in whichever generation it is."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    whole = tree(path)
    shards = path / place / "shards"
    shard, record = (next(shards.glob(f"00000{end}")) for end in (".[!j]*", ".json"))
    if harm == "record gone":
        record.unlink()
    elif harm == "file cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        shard.unlink()
    outcome = extract(inside, output=path, extend=extend, **OPTIONS)
    assert (outcome.is_complete, outcome.extracted > 0) == (True, True)
    assert tree(path) == whole


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_damaged_shard_whose_images_are_gone(three, pictures, tmp_path, cli, what):
    """--extend makes no row into a failure by itself: it refuses until --repair has set the damaged file aside."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    shard = next((path / "more" / "00002" / "shards").glob("00000.[!j]*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    (inside / "e" / "1.png").unlink() if what == "gone" else draw(inside / "e" / "1.png", 99, (50, 50))
    before = tree(path)
    with pytest.raises(DamagedError, match=r"more/00002/shards/00000.* is damaged, and 1 of its images is gone"):
        extract(inside, output=path, extend=True, **OPTIONS)
    assert tree(path) == before
    assert cli("verify", path, "--repair").code == 8
    outcome = extract(inside, output=path, extend=True, **OPTIONS)
    assert (outcome.is_complete, outcome.failed) == (True, 2)
    assert shard.with_name(shard.name + ".damaged").read_bytes() == before[str(shard.relative_to(path))]


@pytest.mark.parametrize("has_grown", [False, True])
def test_failed_images_are_tried_again_in_a_folder_that_lives(pictures, folder, tmp_path, has_grown):
    """--retry-failed needs only the images of generations with failures, and says that it leaves new ones."""
    path, said = tmp_path / "d", []
    if has_grown:
        extract(folder, output=path, **OPTIONS)
    else:
        shutil.rmtree(folder)
    add(pictures, folder, SECOND)
    extract(folder, output=path, extend=has_grown, **OPTIONS)
    with open_dump(path) as dump:
        before = {key: dump["stage4"][key] for key in dump.keys}
    add(pictures, folder, THIRD)
    if has_grown:
        (folder / "b.png").unlink()
        draw(folder / "d.png", 99, (50, 50))
    shutil.copy(pictures / "a.png", folder / "c.png")
    options = OPTIONS | {"retry_failed": True, "report": lambda kind, **facts: said.append((kind, facts.get("text")))}
    outcome = extract(folder, output=path, **options)
    assert (outcome.extracted, outcome.failed, outcome.is_complete) == (2, 0, True)
    assert said.count(("warning", "3 images are not in the dump yet: --extend adds such images")) == 1
    with open_dump(path) as dump:
        assert dump.keys == [*before]
        for key in before:
            np.testing.assert_array_equal(dump["stage4"][key], before["a.png" if key == "c.png" else key])
    assert verify(path).state == "whole"
    again = extract(folder, output=path, **OPTIONS | {"retry_failed": True})
    assert (again.extracted, again.is_complete) == (0, True)


def test_failed_images_whose_shard_cannot_be_made_again(three, pictures, tmp_path):
    """--retry-failed refuses if another image of such a generation is gone: its row would be lost."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    (inside / "a.png").unlink()
    shutil.copy(pictures / "b.png", inside / "c.png")
    before = tree(path)
    with pytest.raises(ConflictError, match=r"1 image of '.*more/00001' is gone, first 'a.png'"):
        extract(inside, output=path, retry_failed=True, **OPTIONS)
    assert tree(path) == before


@pytest.mark.parametrize("has_grown", [False, True])
def test_failed_images_that_are_gone_stop_no_other(pictures, folder, tmp_path, has_grown):
    """--retry-failed tries the others if a failed image was thrown away, which stays a failure."""
    path, good = tmp_path / "d", (pictures / "c.png").with_name("a.png")
    if has_grown:
        extract(folder, output=path, **OPTIONS)
    for name in ("x.png", "y.png"):
        (folder / name).write_bytes(b"no picture")
    extract(folder, output=path, extend=has_grown, **OPTIONS)
    (folder / "x.png").unlink()
    shutil.copy(good, folder / "y.png")
    for _ in range(2):  # another time nothing is left to do
        outcome = extract(folder, output=path, retry_failed=True, **OPTIONS)
        assert (outcome.written, outcome.failed_by_reason) == (4, {"not_found": 1})
    extract(good, output=tmp_path / "fresh", **OPTIONS)
    with open_dump(path) as dump, open_dump(tmp_path / "fresh") as fresh:
        np.testing.assert_allclose(dump["stage4"]["y.png"], fresh["stage4"][0], rtol=0, atol=1e-6)
    assert verify(path).state == "whole"


def test_generations_behind_a_lost_one(three, tmp_path, cli):
    """If no manifest names a generation that is gone, --extend does not make another one in its place."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "more" / "00001")
    before = tree(path)
    for options in (["--dry-run"], []):
        ran = cli("extract", inside, "-o", path, *FLAGS, "--extend", *options)
        assert (ran.code, "more/00001 is gone, and more/00002 was made behind it" in ran.err) == (4, True), ran.err
    for command in ("inspect", "verify"):
        assert "more/00001 is gone, and more/00002 was made behind it" in cli(command, path).out
    assert tree(path) == before


def test_a_generation_that_is_made_again_while_it_is_verified(three, tmp_path):
    """What a run sets aside in a generation while others are read is no damage: the dump is incomplete meanwhile."""
    shutil.copytree(three, tmp_path / "copy")
    path = tmp_path / "copy" / "d"
    record = path / "more" / "00001" / "shards" / "00000.json"

    def set_aside(kind, **_):
        if kind == "batch" and record.exists():
            reopen(Dump.at(path / "more" / "00001"))
            record.rename(record.with_name(record.name + BEFORE))

    verdict = verify(path, set_aside)
    assert (verdict.state, verdict.damages, verdict.missing_shards) == ("incomplete", [], 1)


def test_a_lost_manifest_loses_no_generation(three, tmp_path, cli):
    """Without the manifest that names the generations, the dump is incomplete and counts all rows.

    Its extract command completes it.
    """
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    whole = tree(path)
    (path / "manifest.json").unlink()
    facts = cli("inspect", path, "--json").events[0]
    assert (facts["images"], facts["state"], len(facts["generations"])) == (8, "incomplete", 3)
    ran = cli("verify", path, "--json")
    assert (ran.code, ran.events[0]["images"], ran.events[0]["shards"]) == (8, 8, 5)
    with pytest.raises(IncompleteError):
        open_dump(path)
    assert extract(inside, output=path, **OPTIONS).extracted == 0
    assert tree(path) == whole


@pytest.mark.parametrize("wrong", ["a damaged shard", "no manifest"])
def test_a_lost_manifest_and_an_incomplete_generation(three, tmp_path, cli, wrong):
    """Without the manifest that names them, a generation that is not complete hides none of those behind it."""
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    whole = tree(path)
    (path / "manifest.json").unlink()
    if wrong == "no manifest":
        (path / "more" / "00001" / "manifest.json").unlink()
        assert cli("finalize", path).code == 0
        assert tree(path) == whole
        return
    shard = path / "more" / "00001" / "shards" / "00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert cli("verify", path, "--repair").code == 8
    facts = cli("inspect", path, "--json").events[0]
    assert (facts["images"], facts["foreign_files"], facts["begun"]) == (8, [], None)
    extract(inside, output=path, **OPTIONS)
    assert {name: content for name, content in tree(path).items() if not name.endswith(".damaged")} == whole


def test_a_dump_that_is_deleted_while_it_is_read(three, tmp_path, monkeypatch, cli):
    """A generation that goes behind the manifest of the dump, as with --overwrite, is not called damage."""
    find = generations._generations_there

    def deleted(root):
        found = find(root)
        shutil.rmtree(root.path / "more" / "00002", ignore_errors=True)
        return found

    monkeypatch.setattr(generations, "_generations_there", deleted)
    for command in ("inspect", "verify"):
        path = shutil.copytree(three / "d", tmp_path / command)
        (path / "manifest.json").unlink()
        assert cli(command, path).code == 8


def test_a_damaged_manifest_is_named_once(three, tmp_path):
    """Verify says once what is wrong with the manifest that names the generations."""
    shutil.copytree(three / "d", tmp_path / "d")
    (tmp_path / "d" / "manifest.json").write_bytes(b"{}")
    assert [one.file for one in verify(tmp_path / "d").damages] == ["manifest.json"]


def test_failed_images_are_tried_again_in_all_generations(three, pictures, tmp_path, monkeypatch):
    """--retry-failed goes over all generations, and the manifest follows. The images are compared with them once."""
    compared, compare = [], Growth.of
    monkeypatch.setattr(Growth, "of", lambda *given: compared.append(given) or compare(*given))
    shutil.copytree(three, tmp_path / "copy")
    path, inside = tmp_path / "copy" / "d", tmp_path / "copy" / "in"
    shutil.copy(pictures / "b.png", inside / "c.png")
    outcome = extract(inside, output=path, retry_failed=True, **OPTIONS)
    assert (outcome.written, outcome.failed, outcome.is_complete, len(compared)) == (8, 0, True, 1)
    with open_dump(path) as dump:
        np.testing.assert_array_equal(dump["stage4"]["c.png"], dump["stage4"]["b.png"])
    with open_dump(path) as dump:
        assert dump.valid.all()


def test_overwrite_removes_all_generations(three, pictures, folder, tmp_path):
    """--overwrite leaves no generation of what was there."""
    shutil.copytree(three / "d", tmp_path / "d")
    extract(folder, output=tmp_path / "d", overwrite=True, **OPTIONS)
    extract(folder, output=tmp_path / "new", **OPTIONS)
    assert tree(tmp_path / "d") == tree(tmp_path / "new")


def test_every_command_sees_one_dump(three, tmp_path, cli):
    """inspect, verify, export, show and recompute count the rows of all generations."""
    path = three / "d"
    facts = cli("inspect", path, "--json").events[0]
    assert (facts["images"], facts["written"], facts["state"], facts["shards"]) == (8, 7, "complete", 5)
    assert [one["images"] for one in facts["generations"]] == [3, 2, 3]
    assert "generations    3: 3 + 2 + 3 images" in cli("inspect", path).out
    verdict = cli("verify", path, "--json").events[0]
    assert (verdict["images"], verdict["shards"], verdict["state"], verdict["generations"]) == (8, 5, "whole", 3)
    options = ["--recompute", 7, "-c", "test_resnet", "--random-init"]
    recomputed = cli("verify", path, three / "in", *options, "--json").events[-1]
    assert (recomputed["images"], recomputed["equal"]) == (7, 7)
    assert cli("export", path, "-o", tmp_path / "x.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [key for key in [*FIRST, *SECOND, *THIRD] if key != "c.png"]
    assert cli("show", path, "-o", tmp_path / "x.html", "--root", three / "in").code == 0
    assert cli("finalize", path).code == 0


def test_columns_of_generations(pictures, folder, tmp_path):
    """Columns are joined, null where a generation lacks one; a type that differs is refused, one that fits is taken."""
    path = tmp_path / "d"
    add(pictures, folder, [*SECOND, *THIRD])
    first = {"path": FIRST, "label": ["x", "y", None], "score": [1.5, 2.0, 0.5], "code": ["007", "8", "9"]}
    csv = tmp_path / "t.csv"

    def write(table):
        rows = zip(*table.values(), strict=True)
        text = "\n".join([",".join(table), *(",".join("" if c is None else str(c) for c in row) for row in rows)])
        csv.write_text(text + "\n")

    write(first)
    extract(table=csv, root=folder, output=path, extend=True, **OPTIONS)
    write({"path": SECOND, "score": [1, 2], "code": [12, 1.5], "more": ["", ""], "label": ["", ""]})
    extract(table=csv, root=folder, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.columns["label"].tolist() == ["x", "y", None, None, None]
        assert dump.columns["score"].tolist() == [1.5, 2.0, 0.5, 1.0, 2.0]
        assert dump.columns["code"].tolist() == ["007", "8", "9", "12", "1.5"]
        assert dump.columns["more"].tolist() == [None] * 5
    before = tree(path)
    write({"path": THIRD, "score": ["high", "low", ""]})
    with pytest.raises(ConflictError, match="column 'score' held float, and now holds text"):
        extract(table=csv, root=folder, output=path, extend=True, **OPTIONS)
    assert tree(path) == before


def test_a_column_without_cells_becomes_of_any_kind(pictures, folder, tmp_path):
    """A column whose cells are all missing takes the kind of the first cell that comes, in any generation."""
    path = tmp_path / "d"
    add(pictures, folder, [*SECOND, *THIRD])
    for names, score in ((FIRST, [None] * 3), (SECOND, [2.5, None]), (THIRD, [None] * 3)):
        extract(table={"path": names, "score": score}, root=folder, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.columns.kinds == {"score": "float"}
        np.testing.assert_array_equal(dump.columns["score"], [np.nan] * 3 + [2.5] + [np.nan] * 4)
    with pytest.raises(ConflictError, match="held float, and now holds text"):
        draw(folder / "new.png", 77)
        extract(table={"path": ["new.png"], "score": ["high"]}, root=folder, output=path, extend=True, **OPTIONS)


def test_labels_of_a_dump_that_grew(pictures, tmp_path):
    """Labels of folders are those of a fresh dump of all images, in whatever generation they came."""
    path, inside = tmp_path / "d", [tmp_path / "a", tmp_path / "b"]
    for folder in inside:
        add(pictures, folder, FIRST[:1])
    extract(inside, output=path, extend=True, **OPTIONS)
    assert open_dump(path).labels == ["a", "b"]
    add(pictures, inside[0] / "sub", FIRST[1:2])
    extract(inside, output=path, extend=True, **OPTIONS)
    extract(inside, output=tmp_path / "fresh", **OPTIONS)
    with open_dump(path) as dump, open_dump(tmp_path / "fresh") as fresh:
        assert dict(zip(dump.keys, dump.labels, strict=True)) == dict(zip(fresh.keys, fresh.labels, strict=True))
        assert dump.columns["label"].tolist() == [None, None, "sub"]


def test_dry_run_of_an_extension(three, tmp_path, cli):
    """--dry-run counts the new images, and writes nothing."""
    shutil.copytree(three, tmp_path / "copy")
    draw(tmp_path / "copy" / "in" / "new.png", 99)
    before = tree(tmp_path / "copy" / "d")
    command = ["extract", tmp_path / "copy" / "in", "-o", tmp_path / "copy" / "d", *FLAGS, "--dry-run"]
    ran = cli(*command, "--extend", "--json")
    assert ran.code == 0
    assert ran.events[-1]["images"] == 1
    (tmp_path / "copy" / "in" / "new.png").unlink()
    ran = cli(*command)
    assert (ran.code, "it would be resumed" in ran.err, "refused" in ran.err) == (0, True, False)
    assert tree(tmp_path / "copy" / "d") == before


@pytest.mark.parametrize("other", [[], ["--dtype=float16"], ["--pool=none"]])
def test_dry_run_says_that_an_extension_would_be_refused(three, tmp_path, cli, other):
    """--dry-run --extend with other stages than those of the dump says that the run would be refused."""
    draw(tmp_path / "new.png", 99)
    for source in (tmp_path / "new.png", three / "in"):  # with a new image, and with none
        ran = cli("extract", source, "-o", three / "d", *FLAGS, *other, "--extend", "--dry-run")
        assert (ran.code, "--extend would be refused" in ran.err) == (0, bool(other))
        is_told = "would be extended, if weights and settings are the same" in ran.err
        assert is_told == (not other and source.name == "new.png")


def test_dry_run_says_what_it_leaves_out(begun, folder, cli):
    """--dry-run --extend counts the generation that is unfinished, and says how many images the run adds after it."""
    draw(folder / "new.png", 99)
    ran = cli("extract", folder, "-o", begun, *FLAGS, "--extend", "--dry-run")
    assert (ran.code, "then it adds 1 more image, not counted here" in ran.err) == (0, True)
    assert "generation     2  (begun already, with 5 images)" in ran.err
    (folder / "new.png").unlink()
    ran = cli("extract", folder, "-o", begun, *FLAGS, "--extend", "--dry-run")
    assert (ran.code, "not counted here" in ran.err) == (0, False)


def test_other_pictures_of_the_same_names(tmp_path):
    """A folder whose pictures have the names and sizes of those in the dump adds none, and the run says so."""
    texts = []
    for seed, name in enumerate(("january/1.bmp", "january/2.bmp", "february/1.bmp", "february/2.bmp")):
        draw(tmp_path / name, seed, (40, 40))
    options = {"output": tmp_path / "d", "extend": True, "report": partial(note, texts), **OPTIONS}
    extract(tmp_path / "january", **options)
    assert extract(tmp_path / "january", **options).extracted == 0
    assert not any("changed" in text for text in texts)
    assert extract(tmp_path / "february", **options).extracted == 0
    assert any(text.startswith("'1.bmp', '2.bmp' changed since extracted") for text in texts)


def test_a_full_disk_at_the_commit(pictures, folder, tmp_path, monkeypatch):
    """If the manifest cannot be replaced, readers see the dump as it was, and the next run commits what is there."""
    path = tmp_path / "d"
    extract(folder, output=path, **OPTIONS)
    add(pictures, folder, SECOND)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(generations, "publish_checksummed", full)
        with pytest.raises(MachineError, match="no space left"):
            extract(folder, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == FIRST
    assert extract(folder, output=path, extend=True, **OPTIONS).extracted == 0
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *SECOND]
    assert Path(path / "more" / "00001").is_dir()
