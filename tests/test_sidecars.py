"""Check the files beside pictures in tars, which are columns, and --label-level, which says which folder is a label."""

import shutil

import fsspec
import numpy as np
import pytest
from test_tables import listed
from test_tars import packed

from conftest import draw
from featcli import extract, open_dump
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed
from featcli.errors import ConflictError, UsageError
from featcli.inputs import archives, sidecars
from featcli.inputs.listing import find
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
# What webdataset.TarWriter writes: the suffixes of a key in the order of the alphabet. Its WebDataset(...).decode()
# gives the same cells for each key, with several pictures of one key as one sample.
SHARD = [
    ("000.cls", b"3"), ("000.jpg", b"p"), ("000.json", b'{"a": [1, 2]}'), ("000.txt", b"a cat"),
    ("d/001.cls", b"1"), ("d/001.jpg", b"p"), ("d/001.json", b'{"a": null}'), ("d/001.txt", b"zwei\nZeilen"),
    ("d/002.cls", b"7"), ("d/002.left.jpg", b"p"), ("d/002.right.jpg", b"p"),
    ("003.jpg", b"p"),
    ("004.cls", b"9"), ("004.__url__", b"x"),
]  # fmt: skip
KEYS = ["000.jpg", "d/001.jpg", "d/002.left.jpg", "d/002.right.jpg", "003.jpg"]
COLUMNS = {
    "cls": [3, 1, 7, 7, None],
    "json": [{"a": [1, 2]}, {"a": None}, None, None, None],
    "txt": ["a cat", "zwei\nZeilen", None, None, None],
    "label": [None, "d", "d", "d", None],
}
KINDS = {"cls": "int", "json": "json", "txt": "text", "label": "text"}


def test_a_shard_of_webdataset(tmp_path):
    """Each picture is a row, in the order of the tar, with the cells of its key, also behind a URL."""
    tar = packed(tmp_path / "a.tar", SHARD)
    fsspec.filesystem("memory").pipe_file("/sidecars/a.tar", tar.read_bytes())
    for name in (str(tar), "memory://sidecars/a.tar"):
        assert listed(inputs=[name]) == (KEYS, COLUMNS, KINDS)
        skipped = find(InputSpec([name])).ignored
        assert dict(skipped) == {".cls": 1, ".__url__": 1}  # 004 has no picture


def test_excluded_and_limited_pictures_take_their_cells_along(tmp_path):
    """What --exclude and --limit leave out changes no other row, and no kind of a column."""
    tar = packed(tmp_path / "a.tar", SHARD)
    keys, columns, kinds = listed(inputs=[tar], exclude=["*left*", "000*"], limit=2)
    assert (keys, columns["cls"], columns["label"]) == (["d/001.jpg", "d/002.right.jpg"], [1, 7], ["d", "d"])
    assert kinds == KINDS
    assert listed(inputs=[tar], exclude=["d/*"])[1] == {
        name: [COLUMNS[name][0], COLUMNS[name][4]] for name in ("cls", "json", "txt")
    }


def test_several_tars_and_folders(tmp_path):
    """Columns are those of all inputs; what one of them lacks is missing there."""
    for name in ("f/cat/1.png", "f/2.png"):
        draw(tmp_path / name, 0, (8, 8))
    one = packed(tmp_path / "one.tar", [("1.jpg", b"p"), ("1.cls", b"4")])
    two = packed(tmp_path / "two.tar", [("2.json", b"1.5"), ("2.jpg", b"p"), ("x/3.cls", b"0.5"), ("x/3.jpg", b"p")])
    none = packed(tmp_path / "none.tar", [("4.jpg", b"p")])
    keys, columns, kinds = listed(inputs=[tmp_path / "f", two, one, none])
    assert keys == ["f/2.png", "f/cat/1.png", "two/2.jpg", "two/x/3.jpg", "one/1.jpg", "none/4.jpg"]
    assert columns == {
        "cls": [None, None, None, 0.5, 4.0, None],
        "json": [None, None, 1.5, None, None, None],
        "label": [None, "cat", None, "x", None, None],
    }
    assert kinds == {"cls": "float", "json": "float", "label": "text"}
    assert listed(inputs=[none])[1] == {}


@pytest.mark.parametrize(
    ("members", "column", "cells"),
    [
        ([("a.cls", b"007\n"), ("a.jpg", b"")], "cls", ["007"]),
        ([("a.cls", b"cat \r\n"), ("a.jpg", b""), ("b.jpg", b""), ("b.cls", b"\n")], "cls", ["cat", None]),
        ([("a.cls", b"1"), ("a.jpg", b""), ("b.cls", b"x"), ("b.jpg", b"")], "cls", ["1", "x"]),
        ([("a.txt", b"12"), ("a.jpg", b"")], "txt", ["12"]),
        ([("a.txt", "\u00e9\r\n".encode()), ("a.jpg", b"")], "txt", ["\u00e9"]),
        ([("a.txt", b""), ("a.jpg", b"")], "txt", [""]),
        ([("a.json", b"[NaN, 1e400]"), ("a.jpg", b"")], "json", [[None, "inf"]]),
        ([("a.json", b"null"), ("a.jpg", b""), ("b.json", b"3"), ("b.jpg", b"")], "json", [None, 3]),
        ([("a.JSON", b"true"), ("a.JPG", b"")], "json", [True]),
        ([("./x/a.cls", b"5"), ("./x/a.jpg", b""), ("y/a.cls", b"6"), ("y/a.jpg", b"")], "cls", [5, 6]),
        ([("x/a.jpg", b""), ("a.cls", b"5"), ("a.jpg", b"")], "cls", [None, 5]),
        ([("a.v1.jpg", b""), ("a.v2.png", b""), ("a.cls", b"5"), ("ab.jpg", b"")], "cls", [5, 5, None]),
        ([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"5"), ("b.cls", b"6"), ("c.cls", b"7"), ("c.jpg", b"")],
         "cls", [None, None, 7]),  # webdataset, too, takes only what stands together
        ([("a.jpg", b""), ("a.b.cls", b"5"), ("a.cls", b"6")], "cls", [6]),
    ],
)  # fmt: skip
def test_cells_of_sidecars(tmp_path, members, column, cells):
    """Cells are of the group of members that begin alike; cls is a number or text, txt always text, json what it is."""
    _, columns, _ = listed(inputs=[packed(tmp_path / "a.tar", members)])
    assert columns[column] == cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"x": 1,\n"y" 2}', "'a.json': it is not JSON: .* at line 2, character 5"),
        ("a.json", b"", "'a.json': it is not JSON: Expecting value at line 1, character 1"),
        ("a.json", b'{"x": 1, "x": 2}', "'a.json': the field 'x' stands in it twice"),
        ("a.json", b'"\\ud800"', "'a.json': it holds half of a character"),
        ("a.json", b"[" * 100_000, "'a.json': it is nested too deeply"),
        ("a.cls", b"\xff", "'a.cls': byte 1 is not UTF-8"),
        ("a.txt", b"ab\xe4c", "'a.txt': byte 3 is not UTF-8"),
        ("a.txt", b"x" * 2000, "'a.txt': it has more than 1,000 bytes"),
        ("a.cls.", b"", None),
        ("a.cls", b"6", "there are two of 'a.cls'"),
    ],
)
def test_damaged_sidecars_are_refused(tmp_path, monkeypatch, cli, name, content, message):
    """A sidecar that cannot be read is refused by tar and member with exit code 2, before anything is written."""
    for module in (archives, sidecars):
        monkeypatch.setattr(module, "LARGEST", 1000 if "1,000" in str(message) else 100_000)
    twice = [("a.cls", b"5")] if message and "two" in message else []
    tar = packed(tmp_path / "bad.tar", [*twice, (name, content), ("a.jpg", b"p")])
    if message is None:
        assert listed(inputs=[tar])[1] == {}
        return
    with pytest.raises(UsageError, match=message) as refused:
        listed(inputs=[tar])
    assert str(tar) in refused.value.message
    assert refused.value.hint
    ran = cli("extract", tar, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "-q")
    assert (ran.code, len(ran.err.splitlines()), (tmp_path / "d").exists()) == (2, 2, False)


def test_sidecars_of_no_picture_are_not_read(tmp_path):
    """A sidecar without a picture is counted as skipped, whatever it holds."""
    tar = packed(tmp_path / "a.tar", [("a.jpg", b""), ("b.json", b"{"), ("b.mp3", b""), ("c.cls", b"\xff")])
    assert dict(find(InputSpec([str(tar)])).ignored) == {".json": 1, ".mp3": 1, ".cls": 1}
    assert listed(inputs=[tar])[:2] == (["a.jpg"], {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Make pictures in folders two deep, and a tar of the same with sidecars, in another order."""
    made = tmp_path_factory.mktemp("levels")
    names = ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png"]
    for i, name in enumerate(names):
        draw(made / "in" / name, i, (32, 32))
    members = [(name, (made / "in" / name).read_bytes()) for name in reversed(names)]
    members = [one for i, pair in enumerate(members) for one in (pair, (pair[0].replace("png", "cls"), b"%d" % i))]
    packed(made / "t.tar", members)
    return made


@pytest.fixture(scope="module")
def of_tar(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("of_tar") / "d"
    extract(pictures / "t.tar", output=output, label_level=2, **OPTIONS)
    return output


def test_a_dump_of_a_tar(of_tar, pictures):
    """Sidecars come back as columns, beside the labels of the folders of the level that was asked for."""
    with open_dump(of_tar) as dump:
        assert dump.columns.kinds == {"cls": "int", "label": "text"}
        np.testing.assert_array_equal(dump.columns["cls"], [0, 1, 2])
        assert dump.columns["label"].tolist() == dump.labels == ["cat", "dog", "cat"]
        assert dump.classes == ["cat", "dog"]
    for level in (2, None):  # the dump knows its level
        assert extract(pictures / "t.tar", output=of_tar, label_level=level, **OPTIONS).extracted == 0
    with pytest.raises(ConflictError, match="it was made with --label-level 2"):
        extract(pictures / "t.tar", output=of_tar, label_level=1, **OPTIONS)


def test_dumps_from_before_columns_are_resumed(of_tar, pictures, tmp_path):
    """A dump of a tar that was begun by a version that read no sidecars goes on without columns."""
    shutil.copytree(of_tar, tmp_path / "d")
    plan = read_checksummed(tmp_path / "d" / "plan.json")
    del plan["columns"]
    publish_checksummed(tmp_path / "d" / "plan.json", plan, replace=True)
    (tmp_path / "d" / "columns.jsonl").unlink()
    for shard in (tmp_path / "d" / "shards").iterdir():
        shard.unlink()
    assert extract(pictures / "t.tar", output=tmp_path / "d", **OPTIONS).extracted == 3
    with open_dump(tmp_path / "d") as dump, open_dump(of_tar) as before:
        assert "cls" not in dump.columns
        assert dump.labels == ["cat", "dog", "cat"]
        np.testing.assert_array_equal(dump["stage4"][:], before["stage4"][:])
    assert not (tmp_path / "d" / "columns.jsonl").exists()


@pytest.mark.parametrize(
    ("inputs", "level", "labels"),
    [
        (["in"], None, ["train", "train", "val"]),
        (["in"], 2, ["cat", "dog", "cat"]),
        (["in/train", "in/val"], 1, ["cat", "dog", "cat"]),
        (["in/train/cat", "in/train/dog", "in/val"], 1, ["", "", "cat"]),
        (["in/train/cat", "in/train/dog"], None, ["cat", "dog"]),
        (["in", "in/train/cat/1.png"], 2, ["", "cat", "dog", "cat"]),
    ],
)
def test_levels_of_folders(pictures, tmp_path, inputs, level, labels):
    """The label is the folder at that level inside its input; an image that lies in none there has none."""
    extract([pictures / name for name in inputs], output=tmp_path / "d", label_level=level, **OPTIONS)
    with open_dump(tmp_path / "d") as dump:
        assert dump.labels == labels
        assert dump.columns["label"].tolist() == [label or None for label in labels]
        assert dump.plan.provenance.get("label_level", 1) == (level or 1)


def test_levels_of_lists_and_tables(pictures, tmp_path, monkeypatch):
    """Levels count the folders of a listed path below the root; a column `label` of a table stands against them."""
    monkeypatch.chdir(pictures)
    names = ["in/val/cat/3.png", "in/train/dog/2.png"]
    for level, labels in ((1, ["in", "in"]), (3, ["cat", "dog"])):
        extract(files_from=names, output=tmp_path / f"l{level}", label_level=level, **OPTIONS)
        with open_dump(tmp_path / f"l{level}") as dump:
            assert dump.labels == labels
        extract(table={"path": names, "n": [1, 2]}, output=tmp_path / f"t{level}", label_level=level, **OPTIONS)
        with open_dump(tmp_path / f"t{level}") as dump:
            assert dump.columns["label"].tolist() == dump.labels == labels
    with pytest.raises(UsageError, match="--label-level cannot be used: the table in memory has a column 'label'"):
        extract(table={"path": names, "label": [1, 2]}, output=tmp_path / "x", label_level=1, **OPTIONS)
    extract(table={"path": names, "n": [1, 2]}, output=tmp_path / "none", **OPTIONS)
    with open_dump(tmp_path / "none") as dump:
        assert list(dump.columns) == ["n"]


@pytest.mark.parametrize("inputs", [["in"], ["t.tar"], ["in", "t.tar"]])
def test_a_level_that_is_nowhere(pictures, tmp_path, cli, inputs):
    """A level at which no image lies in a folder is refused with exit code 2, before anything is written."""
    words = [pictures / name for name in inputs]
    ran = cli("extract", *words, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "--label-level", 3)
    assert (ran.code, (tmp_path / "d").exists()) == (2, False)
    assert "--label-level 3: no image lies in 3 folders, one in another, inside its INPUT" in ran.err


def test_files_that_stand_apart_are_said(tmp_path):
    """Files that do not follow the picture of their name, as in a tar that nobody sorted, are counted in a warning."""
    entries = [("a.jpg", b"p"), ("b.jpg", b"p"), ("a.cls", b"1"), ("b.cls", b"2"), ("c.txt", b"x")]
    listing = find(InputSpec([packed(tmp_path / "a.tar", entries)]))
    (remark,) = listing.remarks
    assert remark == "2 files are left out, not being beside the picture of that name: pack with tar --sort=name"
    assert dict(listing.ignored) == {".cls": 2, ".txt": 1}
