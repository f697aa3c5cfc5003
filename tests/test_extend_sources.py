"""Check --extend for dumps of every version of the format, and for images of every source."""

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_zoo import COMMANDS, ZOO

from conftest import draw, tree
from featcli import extract, open_dump
from featcli.dump.verify import verify
from featcli.errors import ConflictError

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
OPTIONS |= {"batch_size": 2, "shard_size": 2, "decode_threads": 1}
SOME = ["tar", "grid"]  # the others take longer, and show no more


def more_pictures(folder):
    """Add a picture to each source of the zoo. Returns its keys."""
    for below in ("pictures", "mended", "pictures/nature"):
        draw(folder / below / "zz.png", 99, (40, 48))
    with tarfile.open(folder / "pictures.tar", "a") as tar:
        tar.add(folder / "pictures" / "zz.png", "zz.png")
    with (folder / "list.txt").open("a") as file:
        file.write("zz.png\n")


@pytest.mark.parametrize("name", SOME)
def test_dumps_of_the_zoo(name, tmp_path, monkeypatch, cli):
    """A dump of any version grows by generations of its version, and nothing that it held is changed."""
    plan = json.loads((ZOO / "dumps" / name / "plan.json").read_text())
    if plan["settings"]["backbone"]["library"] == "transformers":
        pytest.importorskip("transformers")
    shutil.copytree(ZOO, tmp_path / "zoo", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "zoo")
    path = Path("dumps", name)
    before = tree(path)
    more_pictures(Path())
    ran = cli(*shlex.split(COMMANDS[name]), "--extend")
    assert ran.code == (3 if before["failures.jsonl"] else 0), ran.err
    after = tree(path)
    assert {file for file in before if after[file] != before[file]} == {"manifest.json"}
    versions = [json.loads(after[file])["format_version"] for file in ("manifest.json", "more/00001/plan.json")]
    assert versions == [3, plan["format_version"]]
    verdict = verify(path)
    assert (verdict.state, len(verdict.generations)) == ("whole", 1)
    old = [json.loads(line)["key"] for line in before["images.jsonl"].splitlines()]
    dump = open_dump(path)
    assert dump.keys[: len(old)] == old
    assert all(Path(key).name == "zz.png" for key in dump.keys[len(old) :])
    assert dump.valid[len(old) :].all()
    assert len(dump) > len(old)
    assert cli(*shlex.split(COMMANDS[name])).code == ran.code
    assert tree(path) == after


def pictures(*names):
    """Return pictures in memory by key."""
    made = {}
    for name in names:
        made[name] = np.random.default_rng(ord(name[0])).integers(0, 256, (40, 40, 3), np.uint8)
    return made


def test_pictures_in_memory(tmp_path):
    """A dump of pictures in memory grows by those with new keys; one that is another now is refused on resuming."""
    path, had, new = tmp_path / "d", pictures("b", "d"), pictures("a", "c", "e")
    extract(had, output=path, **OPTIONS)
    outcome = extract(had | new, output=path, extend=True, **OPTIONS)
    assert (outcome.extracted, outcome.written) == (3, 5)
    extract(new, output=tmp_path / "fresh", **OPTIONS)
    with open_dump(path) as dump, open_dump(tmp_path / "fresh") as fresh:
        assert dump.keys == [*"bdace"]
        np.testing.assert_array_equal(dump["stage4"][2:], fresh["stage4"][:])
    before = tree(path)
    assert extract([*had.values()], keys=[*had], output=path, extend=True, **OPTIONS).extracted == 0
    assert extract(had | new, output=path, **OPTIONS).extracted == 0
    with pytest.raises(ConflictError, match="the picture 'c' is another"):
        extract(had | new | {"c": 255 - new["c"]}, output=path, **OPTIONS)
    texts = []
    extract(
        had | new | {"c": 255 - new["c"]},
        output=path,
        extend=True,
        check_digests=True,
        report=lambda kind, **facts: texts.append(facts.get("text", "")),
        **OPTIONS,
    )
    assert any(text.startswith("'c' changed since") for text in texts)
    assert tree(path) == before


def test_pictures_behind_urls(tmp_path):
    """A remote folder that grows is extended as a local one is."""
    fsspec = pytest.importorskip("fsspec")
    system, path = fsspec.filesystem("memory"), tmp_path / "d"
    for names in ("bd", "ac", "e"):
        for name in names:
            local = draw(tmp_path / f"{name}.png", ord(name), (40, 40))
            system.pipe_file(f"/growing/{name}.png", local.read_bytes())
        extract("memory://growing", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert (dump.keys, dump.valid.all()) == ([f"{name}.png" for name in "bdace"], True)
    assert len(verify(path).generations) == 2


def test_tars_that_come(tmp_path):
    """Other tars beside the first make generations, whose keys are led by the names of the tars."""
    path, tars = tmp_path / "d", []
    for number, names in enumerate(("ab", "cd", "ef")):
        tars.append(tmp_path / f"{number}.tar")
        with tarfile.open(tars[-1], "w") as tar:
            for name in names:
                tar.add(draw(tmp_path / f"{name}.png", ord(name), (40, 40)), f"in/{name}.png")
    extract(tars[:2], output=path, **OPTIONS)
    extract(tars, output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [f"{n}/in/{name}.png" for n, names in enumerate(("ab", "cd", "ef")) for name in names]
    whole = tree(path)
    assert extract(tars[1:], output=path, extend=True, **OPTIONS).extracted == 0
    assert tree(path) == whole


def test_lists_keep_their_order(tmp_path):
    """New rows of a list have the order of the list, also if they stand before older ones in it."""
    path = tmp_path / "d"
    for name in "abcdef":
        draw(tmp_path / "in" / f"{name}.png", ord(name), (40, 40))
    for names in ("db", "fdbae"):
        (tmp_path / "list.txt").write_text("".join(f"{name}.png\n" for name in names))
        extract(files_from=tmp_path / "list.txt", root=tmp_path / "in", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [f"{name}.png" for name in "dbfae"]


def test_a_dump_that_was_made_by_parts(tmp_path):
    """Whoever made a dump, it grows like any other, by one run or by parts, which make the same bytes."""
    inside = tmp_path / "in"
    for name in "bdfh":
        draw(inside / f"{name}.png", ord(name), (40, 40))
    for part in ("0/2", "1/2"):
        extract(inside, output=tmp_path / "d", part=part, **OPTIONS)
    for name in "aceg":
        draw(inside / f"{name}.png", ord(name), (40, 40))
    by_parts = shutil.copytree(tmp_path / "d", tmp_path / "parts")
    extract(inside, output=tmp_path / "d", extend=True, **OPTIONS)
    for part in ("1/2", "0/2"):
        extract(inside, output=by_parts, extend=True, part=part, **OPTIONS)
    assert tree(by_parts) == tree(tmp_path / "d")


def test_other_leads(tmp_path, monkeypatch):
    """Images whose keys are led otherwise than in the dump are not added once more; other images of such names are."""
    monkeypatch.chdir(tmp_path)
    for number, names in enumerate(("ab", "cd", "ab")):
        for name in names:
            draw(Path(f"day{number}", f"{name}.png"), 10 * number + ord(name), (40, 40))
    extract("day0", output="one", **OPTIONS)
    before = tree(Path("one"))
    with pytest.raises(ConflictError, match=re.escape("its image 'a.png' is given as 'day0/a.png' now")):
        extract(["day0", "day1"], output="one", extend=True, **OPTIONS)
    assert tree(Path("one")) == before
    extract(["day0", "day1"], output="two", **OPTIONS)
    with pytest.raises(ConflictError, match=re.escape("its image 'day0/a.png' is given as 'a.png' now")):
        extract("day0", output="two", extend=True, **OPTIONS)
    extract(["day1", "day2"], output="one", extend=True, **OPTIONS)
    with open_dump("one") as dump:
        assert dump.keys == ["a.png", "b.png", "day1/c.png", "day1/d.png", "day2/a.png", "day2/b.png"]
