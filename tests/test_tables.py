"""Check --table: rows in its order, columns of the right kind, and what is wrong in it refused with its place."""

import codecs
import csv
import io
import json
import math
import os
import pickle
import re
import shlex
import sys
import tarfile
import threading
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SAMPLES, draw, tree
from featcli import extract, open_dump
from featcli.errors import ConflictError, FeatcliError, UsageError
from featcli.inputs.cells import SMALL, kind_of_text
from featcli.inputs.columns import listed_columns
from featcli.inputs.listing import find
from featcli.reading import columns as reading_columns
from featcli.reading.named import rows_named
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
NAMES = ["b.png", "sub/a.png", "c.png", "a.png"]
TABLE = {
    "path": NAMES,
    "label": ["cat", "dog", None, "cat"],
    "count": [3, 1, 2, -4],
    "score": [0.5, 1.0, -2.25, 1e-05],
    "weight": [1.5, None, 2.5, 3.5],
    "code": ["007", "x,y", 'say "hi"\nthen', "é"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make files that the paths of TABLE name. Nobody decodes them."""
    made = tmp_path_factory.mktemp("table")
    for name in NAMES:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(b"picture")
    return made


def rows_of(table):
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def as_csv(table, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows_of(table))
    return text.getvalue().encode()


def as_json_lines(table):
    return "".join(json.dumps(row) + "\n" for row in rows_of(table)).encode()


def as_arrow(table, kind):
    import pyarrow
    from pyarrow import feather, parquet

    made, file = pyarrow.table(table), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(made, file, row_group_size=3)
    elif kind == "feather":
        feather.write_feather(made, file)
    else:
        with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(file, made.schema) as writer:
            writer.write_table(made)
    return file.getvalue()


def listed(**options):
    """Return the keys and the columns of what is listed."""
    listing = find(InputSpec(options.pop("inputs", ()), **options))
    columns = listed_columns(listing.images, listing.leads)
    lines = [] if columns is None else [json.loads(line) for line in columns.lines()]
    kinds = {} if columns is None else dict(columns.kinds)
    return list(listing.images.keys), {name: [line[name] for line in lines] for name in kinds}, kinds


KINDS = {"label": "text", "count": "int", "score": "float", "weight": "float", "code": "text"}
COLUMNS = {name: values for name, values in TABLE.items() if name != "path"}
FORMATS = {
    "t.csv": as_csv(TABLE),
    "crlf.csv": as_csv(TABLE).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").replace(b"hi\"\"\r\n", b"hi\"\"\n"),
    "bom.csv": codecs.BOM_UTF8 + as_csv(TABLE),
    "excel.csv": as_csv(TABLE, ";"),
    "t.tsv": as_csv(TABLE, "\t"),
    "t.txt": as_csv(TABLE),
    "t.jsonl": as_json_lines(TABLE),
    "bom.ndjson": codecs.BOM_UTF8 + as_json_lines(TABLE),
    "lines": as_json_lines(TABLE),
    "t.parquet": as_arrow(TABLE, "parquet"),
    "t.arrow": as_arrow(TABLE, "file"),
    "stream.arrow": as_arrow(TABLE, "stream"),
    "t.feather": as_arrow(TABLE, "feather"),
    "noname": as_arrow(TABLE, "parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(folder, name):
    """CSV, TSV, JSON Lines, Parquet and Arrow give rows in their order, and cells of the same kinds and values."""
    (folder / name).write_bytes(FORMATS[name])
    assert listed(table=folder / name) == (NAMES, COLUMNS, KINDS)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_table_from_stdin(folder, monkeypatch, name):
    """A table from a pipe is the same; its paths are relative to the current folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(FORMATS[name])))
    assert listed(table="-") == (NAMES, COLUMNS, KINDS)


class Frame:
    """A fake of a pandas table: `columns`, and `iloc` by place."""

    def __init__(self, table):
        self.columns = np.array(list(table), object)
        arrays = [np.array([math.nan if v is None else v for v in values]) for values in table.values()]
        self.iloc = SimpleNamespace()
        self.iloc = type("Places", (), {"__getitem__": lambda _, at: SimpleNamespace(array=arrays[at[1]])})()


def test_tables_in_memory(folder, monkeypatch):
    """A mapping of lists, of arrays, an Arrow table and one like pandas' give what the same table in a file gives."""
    import pyarrow

    monkeypatch.chdir(folder)
    numbers = {name: TABLE[name] for name in ("path", "count", "score", "weight")}
    arrays = {name: np.array(values, object if name == "path" else float) for name, values in numbers.items()}
    arrays["count"] = arrays["count"].astype(np.int32)
    assert listed(table=TABLE) == listed(table=pyarrow.table(TABLE)) == (NAMES, COLUMNS, KINDS)
    want = NAMES, {n: v for n, v in COLUMNS.items() if n in numbers}, {n: k for n, k in KINDS.items() if n in numbers}
    assert listed(table=arrays) == listed(table=Frame(numbers)) == want


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", "0", ""], "int"),
        (["1", "007"], "text"),
        (["1", "+1"], "text"),
        (["1", "-0"], "text"),
        (["1", " 1"], "text"),
        (["1_000", "2"], "text"),
        (["9223372036854775807", "-9223372036854775808"], "int"),
        (["9223372036854775808"], "text"),
        (["1", "0.5"], "float"),
        (["9007199254740993", "0.5"], "text"),
        (["1.50", "2.25"], "text"),
        (["0.00001", "3.2e-7", "-1e-12", "0.5"], "float"),
        (["0.000010"], "text"),
        (["3.20e-7"], "text"),
        (["1e-400"], "text"),
        (["0.00001000000000000000001"], "text"),
        (["1e-05", "1.0", "-0.0"], "float"),
        (["1e5"], "text"),
        (["nan", "0.5"], "text"),
        (["inf", "0.5"], "text"),
        (["True", "False"], "text"),
        (["NA", "1"], "text"),
        (["\uff11"], "text"),
        (["", ""], "text"),
    ],
)
def test_kinds_of_csv_columns(folder, cells, kind):
    """Cells are numbers only where each is written as Python writes it, so that different ones stay different."""
    table = {"path": [f"{i}.png" for i in range(len(cells))], "x": cells}
    for name in table["path"]:
        (folder / name).touch()
    (folder / "kinds.csv").write_bytes(as_csv(table))
    _, columns, kinds = listed(table=folder / "kinds.csv")
    as_python = {"int": int, "float": float, "text": str}[kind]
    assert (columns["x"], kinds["x"]) == ([as_python(cell) if cell else None for cell in cells], kind)


@given(st.text(max_size=8) | st.integers().map(str) | st.floats().map(str) | st.from_regex(SMALL, fullmatch=True))
def test_different_cells_stay_different(text):
    """A cell that is taken as a number can be written again as it was, but for where the point of a small one is."""
    kind = kind_of_text(text)
    if kind == "float" and str(float(text)) != text:
        assert abs(float(text)) < 1
        assert Decimal(text).as_tuple().digits == Decimal(str(float(text))).as_tuple().digits
    else:
        assert kind == "text" or str(int(text) if kind == "int" else float(text)) == text


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([True, None], "bool", [True, None]),
        ([1, 2.5], "float", [1.0, 2.5]),
        ([1, True], "json", [1, True]),
        ([1, "1"], "json", [1, "1"]),
        ([2**70, 1], "json", [2**70, 1]),
        ([2**53 + 1, 0.5], "json", [2**53 + 1, 0.5]),
        ([[1, 2], {"a": None}], "json", [[1, 2], {"a": None}]),
        ([math.nan, 1.5], "float", [None, 1.5]),
        ([math.inf, -math.inf], "float", ["inf", "-inf"]),
        ([[math.inf], [math.nan]], "json", [["inf"], [None]]),
        ([None, None], "text", [None, None]),
        (["", None], "text", ["", None]),
    ],
)
def test_kinds_of_values(folder, monkeypatch, values, kind, stored):
    """Typed cells keep their types. Values of several types stay as they are, and NaN is a missing value."""
    monkeypatch.chdir(folder)
    (folder / "t.jsonl").write_bytes(as_json_lines({"path": NAMES[:2], "x": values}))
    for table in ("t.jsonl", {"path": NAMES[:2], "x": values}):
        _, columns, kinds = listed(table=table)
        assert (columns["x"], kinds["x"]) == (stored, kind)


BROKEN = {
    "empty": (b"", "it is empty"),
    "only a header": (b"path,label\n", "it has no rows"),
    "no header": (b"b.png,cat\nc.png,dog\n", "its first line holds 'b.png' and not the names of columns"),
    "no paths": (b"id,label\n1,cat\n", "no column is called path, image, .*: there are 'id', 'label'"),
    "two of paths": (b"image,file_name\nb.png,c.png\n", "'image' or 'file_name' could be the column of paths"),
    "names twice": (b"path,label,label\nb.png,1,2\n", "line 1: columns 2 and 3 are both called 'label'"),
    "no name": (b"path,,label\nb.png,1,2\n", "line 1: column 2 has no name"),
    "too few": (b"path,label\nb.png,cat\nc.png\n", "line 3: it has 1 cell, and the header 2 columns: column 'label'"),
    "too many": (b"path,label\nb.png,cat,5\n", "line 2: it has 3 cells, and the header 2 columns: nothing in the"),
    "line after lines": (b'path,x\nb.png,"a\nb\nc"\nc.png\n', "line 5: it has 1 cell"),
    "quote open": (b'path,label\nb.png,cat\nc.png,"dog\n', "line 3: a quoted cell begins in it that never ends"),
    "quote inside": (b'path,label\nb.png,"a" b\n', "line 2: there is text behind a quoted cell"),
    "latin": ("path,label\nb.png,caf\u00e9\n".encode("latin1"), "line 2: character 10 is the byte 0xe9, which is not"),
    "utf-16": ("path,label\n".encode("utf-16"), "line 1: it is UTF-16"),
    "zero": (b"path,label\nb.png,a\0b\n", "line 2: there is a zero byte in it"),
    "long cell": (b"path,x\nb.png,ok\nc.png," + b"y" * 200_000 + b"\n", "line 3: a cell begins in it that has more"),
    "path missing": (b"path,label\nb.png,1\n,2\n", "line 3: column 'path' is empty"),
    "path twice": (b"path,n\nb.png,1\nc.png,2\n./b.png,3\n", "line 4: it names 'b.png', as line 2 does"),
    "outside": (b"path,n\nb.png,1\n../x.png,2\n", "line 3: listed image '../x.png': it is outside"),
    "none there": (b"path\nq.png\nr.png\n", "none of its paths names a file that is there, as '.*q.png'"),
    "not json": (b'{"path": "b.png"}\n{"path": b.png}\n', "line 2: it is not JSON: Expecting value at character 10"),
    "no object": (b'{"path": "b.png"}\n["c.png"]\n', "line 2: it is not a JSON object"),
    "field twice": (b'{"path": "b.png", "path": "c.png"}\n', "line 1: the field 'path' stands in it twice"),
    "path no text": (b'{"path": "b.png"}\n{"path": 5}\n', "line 2: column 'path' holds 5, which is not a path"),
    "path null": (b'{"path": "b.png"}\n{"x": 5}\n', "line 2: column 'path' is empty"),
    "half a character": (b'{"path": "b.png", "x": "\\ud800"}\n', "line 1: it holds half of a character"),
    "deep": (b'{"path": "b.png", "x": ' + b"[" * 99_999 + b"}\n", "line 1: it is nested too deeply|not JSON"),
    "parquet cut short": (as_arrow(TABLE, "parquet")[:-9], "it is not a whole Parquet file"),
    "arrow cut short": (as_arrow(TABLE, "file")[:-9], "it is not a whole Arrow file"),
    "bytes": (as_arrow({"path": ["b.png"], "x": [b"1"]}, "parquet"), "column 'x' holds bytes"),
    "zip": (b"PK\x03\x04" + bytes(99), "it is a ZIP archive, not a table"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_refused_with_its_place(folder, tmp_path, cli, kind):
    """A broken table ends in one line that names the place, exit code 2, and nothing is written."""
    content, message = BROKEN[kind]
    table = folder / ("broken.jsonl" if content[:1] == b"{" else "broken")
    table.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        listed(table=table)
    assert str(table) in refused.value.message.replace("'", "")
    assert refused.value.hint
    ran = cli("extract", "--table", table, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "-q")
    assert (ran.code, len(ran.err.splitlines()), (tmp_path / "d").exists()) == (2, 2, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_column": "lable"}, "--path-column 'lable': table '.*' has no such column"),
        ({"key_column": "id"}, "--key-column 'id': table '.*' has no such column"),
        ({"path_format": "{id}.png"}, "--path-format '{id}.png': table '.*' has no column 'id'"),
        ({"path_format": "all.png"}, "it names no column"),
        ({"path_format": "{count"}, "--path-format '{count'"),
        ({"path_format": "{label}.png"}, "line 4: column 'label' is empty"),
        ({"path_format": "{code:03d}.png"}, "line 3: column 'code' holds 'x,y', which is not a whole number"),
        ({"key_column": "label"}, "line 4: column 'label' is empty"),
        ({"key_column": "code"}, "line 4: key .* it has a character that no key can have"),
        ({"root": "nowhere"}, "--root 'nowhere': there is no such folder"),
    ],
)
def test_options_that_do_not_fit_the_table(folder, options, message):
    """An option that names what the table does not have is refused, with what it has."""
    (folder / "t.csv").write_bytes(FORMATS["t.csv"])
    with pytest.raises(UsageError, match=message):
        listed(table=folder / "t.csv", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"path_column": "x", "inputs": ["."]},
        {"path_format": "{x}", "inputs": ["."]},
        {"key_column": "x", "inputs": ["."]},
        {"unique": True, "inputs": ["."]},
        {"root": ".", "inputs": ["."]},
        {"table": "t.csv", "files_from": "l.txt"},
        {"table": "t.csv", "path_column": "x", "path_format": "{x}"},
        {"table": ""},
        {"table": 5},
        {"table": {"path": ["a", "b"], "x": [1]}},
        {"table": {}},
        {"table": {"path": "a.png"}},
    ],
)
def test_options_that_need_each_other(options):
    """Options of tables without a table, or beside what excludes them, are refused."""
    with pytest.raises(UsageError):
        listed(**options)


@pytest.mark.parametrize(
    ("table", "options", "hint"),
    [
        ("id,kind\n7a,x\n", {}, "give --path-format 'train/{id}.jpg'"),
        ("kind,name\nx,7a.jpg\n", {}, "give --path-column name --root {here}/train"),
        ("kind,name\nx,train/7a.jpg\n", {}, "give --path-column name, which holds 'train/7a.jpg'"),
        ("n,image_id\n7a,7a\n", {}, "give --path-format 'train/{image_id}.jpg'"),
        ("n,key\n7a,7a\n7b,012\n", {}, "'images/{id}.jpg'"),
        ("i d\n7a\n", {}, "give --path-format 'train/{i d}.jpg'"),
        ("i:d\n7a\n", {}, "'images/{id}.jpg'"),
        ("path\n7a\n", {}, "give --path-format 'train/{path}.jpg'"),
        ("path\n7a.jpg\n", {}, "give --path-column path --root {here}/train"),
        ("id\n7a\n", {"path_format": "{id}.jpg"}, "give --path-format 'train/{id}.jpg'"),
        ("id\n7a\n", {"path_format": "train/{id}"}, "give --path-format 'train/{id}.jpg'"),
        ("id\n12\n", {"path_format": "{id:03d}"}, "give --path-format 'a {{b}}/{id:03d}.png'"),
        ("id\n7b\n", {"path_format": "{id}.jpg"}, "give --root FOLDER, or --path-format"),
    ],
)
def test_hints_name_the_folder_and_suffix_of_pictures(tmp_path, table, options, hint):
    """If no path names a file, the hint has the options by which a picture is found in a folder beside the table."""
    for name in ("train/7a.jpg", "a {b}/012.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(UsageError) as refused:
        listed(table=tmp_path / "t.csv", **options)
    wanted = hint.replace("{here}", str(tmp_path))
    assert wanted in refused.value.hint
    if "train" in hint and not options:  # the options that are named are those that help
        words = shlex.split(wanted.partition(",")[0].removeprefix("give "))
        named = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
        assert len(listed(table=tmp_path / "t.csv", **named)[0]) == 1


def test_a_folder_that_holds_the_pictures_of_the_table(tmp_path):
    """A picture is no second row where a folder or file that is given holds it, whatever its key is there."""
    for name in ("train/7.jpg", "train/8.jpg", "more/7.jpg"):
        draw(tmp_path / name, 0, (8, 8))
    (tmp_path / "t.csv").write_text("id,label\n7,x\n8,y\n")
    table = {"table": tmp_path / "t.csv", "root": tmp_path / "train", "path_format": "{id}.jpg"}
    for inputs in ([tmp_path / "train"], [tmp_path], [tmp_path / "more", tmp_path / "train" / "7.jpg"]):
        for options in (table, table | {"key_column": "id"}):
            with pytest.raises(UsageError, match=r"line 2: .* is also in an INPUT"):
                listed(inputs=inputs, **options)
    assert listed(inputs=[tmp_path / "more"], **table)[0] == ["more/7.jpg", "7.jpg", "8.jpg"]
    assert listed(inputs=[tmp_path], exclude=["*/train/*"], **table)[0][1:] == ["7.jpg", "8.jpg"]


def test_paths_of_other_columns(folder):
    """--path-format makes paths of columns, also with zeros before a number; ids stay columns."""
    (folder / "img").mkdir()
    for name in ("img/0007_x.jpg", "img/0012_y.jpg"):
        (folder / name).touch()
    for content in (b"id,kind\n12,y\n7,x\n", b'{"id": 12, "kind": "y"}\n{"id": 7, "kind": "x"}\n'):
        (folder / "ids").write_bytes(content)
        keys, columns, _ = listed(table=folder / "ids", path_format="img/{id:04d}_{kind}.jpg")
        assert (keys, columns) == (["img/0012_y.jpg", "img/0007_x.jpg"], {"id": [12, 7], "kind": ["y", "x"]})


@pytest.mark.parametrize("cell", ["7" * 5000, "٣"])
def test_numbers_that_no_path_can_hold(folder, cell):
    """Digits without end, or those of other alphabets, are refused like any other wrong path."""
    (folder / "long.csv").write_text(f"id,x\n{cell},1\n")
    for text in ("{id:012d}.jpg", "{id:0999999999d}.jpg"):
        with pytest.raises(UsageError, match=r"names a file that is there|not a whole number|longer than a name"):
            listed(table=folder / "long.csv", path_format=text)


def test_a_field_without_a_name(folder):
    """A first field of JSON Lines that has no name is called index, as in a CSV, and keeps its cells."""
    (folder / "index.jsonl").write_text('{"": 5, "path": "a.png"}\n{"": 6, "path": "b.png"}\n')
    assert listed(table=folder / "index.jsonl")[1] == {"index": [5, 6]}


def test_numbers_that_are_kept_as_text(folder):
    """Cells of a CSV that are texts in the dump, and numbers by themselves, are kept as they are written."""
    (folder / "codes.csv").write_text("path,code\na.png,1\nb.png,2.5\nc.png,1e-5\n")
    columns = find(InputSpec(table=folder / "codes.csv")).columns(None)
    assert columns.kinds == {"code": "float"}
    as_text = replace(columns, kinds={"code": "text"})
    assert [json.loads(line)["code"] for line in as_text.lines()] == ["1", "2.5", "1e-5"]


def test_a_table_in_memory_stays_where_it_is():
    """Workers are told the options of a run without its table, which may be large or belong to no other process."""
    asked = InputSpec(table={"path": ["a.png"], "x": [threading.Lock()]})
    assert pickle.loads(pickle.dumps(asked)).table.table is None


def test_labels_of_folders_of_any_name():
    """A label that is no text of UTF-8 is escaped in a table of Arrow, as a key is."""
    pytest.importorskip("pyarrow")
    name = os.fsdecode(b"d\xff")
    columns = reading_columns.Columns({"label": "text", "x": "json"}, lambda _: iter([{"label": name, "x": name}]), 1)
    assert reading_columns.as_arrow(columns, [f"{name}/a.png"]).to_pylist() == [
        {"key": "d\\udcff/a.png", "label": "d\\udcff", "x": '"d\\udcff"'}
    ]


def test_rows_of_one_picture(folder):
    """A key column gives rows of one picture keys of their own; --unique takes the first row of each key."""
    (folder / "boxes.csv").write_bytes(b"id,path,x\nq,b.png,1\nr,b.png,2\ns,./b.png,3\n")
    keys, columns, _ = listed(table=folder / "boxes.csv", key_column="id")
    assert (keys, columns) == (["q", "r", "s"], {"path": ["b.png"] * 3, "x": [1, 2, 3]})
    keys, columns, _ = listed(table=folder / "boxes.csv", unique=True)
    assert (keys, columns) == (["b.png"], {"id": ["q"], "x": [1]})
    (folder / "boxes.csv").write_bytes(b"id,path,x\nq,b.png,1\nr,c.png,2\nq,c.png,3\n")
    with pytest.raises(UsageError, match="line 4: it has the key 'q', as line 2 does"):
        listed(table=folder / "boxes.csv", key_column="id")
    keys, columns, _ = listed(table=folder / "boxes.csv", key_column="id", unique=True)
    assert (keys, columns["x"]) == (["q", "r"], [1, 2])


def test_excluded_and_limited_rows_keep_their_cells(folder):
    """Rows that are left out take their cells with them, and no others."""
    (folder / "t.csv").write_bytes(FORMATS["t.csv"])
    keys, columns, kinds = listed(table=folder / "t.csv", exclude=["sub/*"], limit=2)
    assert (keys, columns["count"], columns["code"]) == (["b.png", "c.png"], [3, 2], ["007", 'say "hi"\nthen'])
    assert kinds == KINDS  # of the whole table, so that a part of it has the same


def test_folders_come_before_the_table(tmp_path):
    """Images of folders come first, and have the label of their folder in the table's column, and no other cell."""
    for name in ("in/cat/2.png", "in/cat/1.png", "in/top.png", "t/x.png", "t/y.png"):
        draw(tmp_path / name, 0, (8, 8))
    (tmp_path / "t" / "t.csv").write_text("path,label,n\ny.png,dog,1\nx.png,,2\n")
    keys, columns, _ = listed(inputs=[tmp_path / "in"], table=tmp_path / "t" / "t.csv")
    assert keys == ["in/cat/1.png", "in/cat/2.png", "in/top.png", "y.png", "x.png"]
    assert columns == {"label": ["cat", "cat", None, "dog", None], "n": [None, None, None, 1, 2]}
    (tmp_path / "t" / "t.csv").write_text("path\n../in/top.png\n")
    with pytest.raises(UsageError, match=r"line 2: 'top.png' is also in an INPUT"):
        listed(inputs=[tmp_path / "in" / "top.png"], table=tmp_path / "t" / "t.csv", root=tmp_path / "in")


def test_urls_in_a_table():
    """Paths may be URLs; a --root that is one leads the others."""
    _, columns, _ = found = listed(table={"image": ["https://h/a.jpg", "https://k/b/c.jpg"], "x": [1, 2]})
    assert found[0] == ["h/a.jpg", "k/b/c.jpg"]
    assert columns == {"x": [1, 2]}
    assert listed(table={"image": ["a.jpg", "https://h/d/b.jpg"]}, root="https://h/d")[0] == ["a.jpg", "b.jpg"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    made = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(NAMES):
        draw(made / name, i, (40, 40))
    (made / "c.png").write_bytes(b"no picture")
    return made


@pytest.fixture(scope="module")
def dumped(photos, tmp_path_factory):
    (photos / "t.csv").write_bytes(as_csv(TABLE))
    path = tmp_path_factory.mktemp("dumped") / "d"
    extract(table=photos / "t.csv", output=path, batch_size=2, shard_size=2, **OPTIONS)
    return path


def test_a_dump_keeps_rows_and_columns(dumped, photos, tmp_path):
    """Row i is line i, with the maps that its picture gives by itself; columns come back with their types."""
    alone = tmp_path / "alone"
    extract(photos, output=alone, **OPTIONS)
    with open_dump(dumped) as dump, open_dump(alone) as other:
        assert (dump.keys, [one["key"] for one in dump.failures]) == (NAMES, ["c.png"])
        for key in ("a.png", "sub/a.png"):
            np.testing.assert_array_equal(dump["stage4"][key], other["stage4"][key])
        columns = dump.columns
        assert {name: array.dtype.str[1:] for name, array in columns.items()} == {
            "label": "O", "count": "i8", "score": "f8", "weight": "f8", "code": "O"
        }  # fmt: skip
        assert columns["label"].tolist() == TABLE["label"]
        np.testing.assert_array_equal(columns["count"], TABLE["count"])
        np.testing.assert_array_equal(columns["weight"], [1.5, np.nan, 2.5, 3.5])
        assert dump.table.to_pydict() == {"key": NAMES, **COLUMNS}
        assert (dump.labels, dump.classes) == (TABLE["label"], ["cat", "dog"])
        assert dump.plan.columns.classes == ("cat", "dog")


def test_a_reader_of_columns_written_from_the_format_page(photos, tmp_path):
    """A reader that knows only docs/format.md finds the same cells of every kind, and the paths of rows with keys."""
    from independent_reader import read_columns, read_labels

    table = {
        "path": ["b.png", "a.png", "a.png"],
        "name": ["x", "y", "z"],
        "flag": [True, None, False],
        "many": [2**63 - 1, -(2**63), None],
        "share": [math.inf, -math.inf, 1],
        "label": ["caf\u00e9\u2028", None, ""],
        "box": [[1, {"a": math.inf}], None, "text"],
        "none": [None, math.nan, None],
    }
    extract(table=table, root=photos, key_column="name", output=tmp_path / "d", **OPTIONS)
    columns, kinds = read_columns(tmp_path / "d")
    with open_dump(tmp_path / "d") as dump:
        assert kinds == dict(dump.columns.kinds)
        assert columns == {name: list(dump.columns.values_of(name)) for name in dump.columns}
        assert read_labels(tmp_path / "d") == dump.labels == columns["label"]
    want = {name: values for name, values in table.items() if name != "name"}
    assert columns == want | {"box": [[1, {"a": "inf"}], None, "text"], "none": [None] * 3}
    assert [*kinds.values()] == ["text", "bool", "int", "float", "text", "json", "text"]


@pytest.mark.parametrize(
    ("inputs", "level", "labels"),
    [
        (["split"], 2, [None, "cat", "dog"]),
        (["split/train", "split/val"], None, [None, "cat", "dog"]),
        (["split/train/cat", "split/val/dog"], None, ["cat", "dog"]),
        (["split/train/cat", "split/val/dog/1.png"], None, [None, "cat"]),
        (["split/train/cat", "dog.tar"], None, ["cat", None]),
    ],
)
def test_a_reader_of_labels_written_from_the_format_page(tmp_path, monkeypatch, inputs, level, labels):
    """A reader that knows only docs/format.md finds the labels of folders that a dump gives."""
    from independent_reader import read_labels

    monkeypatch.chdir(tmp_path)
    for name in ("train/cat/1.png", "train/2.png", "val/dog/1.png"):
        draw(tmp_path / "split" / name, 0, (8, 8))
    with tarfile.open("dog.tar", "w") as tar:
        tar.add("split/val/dog/1.png", "1.png")
    extract(inputs, output="d", **OPTIONS, **({} if level is None else {"label_level": level}))
    with open_dump("d") as dump:
        assert read_labels("d") == labels == [label or None for label in dump.labels]


def test_rows_by_value(dumped):
    """`where` gives the numbers of the rows with these cells; what no cell can be is refused."""
    with open_dump(dumped) as dump:
        assert dump.where(label="cat").tolist() == [0, 3]
        assert dump.where(label=["dog", None]).tolist() == [1, 2]
        assert dump.where(label="cat", count=-4).tolist() == dump.where({"label": "cat"}, count=-4).tolist() == [3]
        assert dump.where(weight=None).tolist() == [1]
        assert dump.where(count=2.5).tolist() == []
        for wrong, message in (({"lable": 1}, "no column 'lable'"), ({"label": 1}, "texts"), ({"count": "1"}, "whole")):
            with pytest.raises(UsageError, match=message):
                dump.where(**wrong)


def test_columns_as_labels(dumped):
    """A column gives labels: texts as numbers of classes, numbers as they are; a missing one is refused by key."""
    with open_dump(dumped) as dump:
        data = dump.as_torch_dataset("stage4", labels="label")
        assert ([data[i][1].item() for i in range(3)], data.classes) == ([0, 1, 0], ["cat", "dog"])  # c.png failed
        assert dump.as_torch_dataset("stage4", labels="score")[2][1].item() == 1e-05
        assert dump.as_torch_dataset("stage4", labels=True)[1][1].item() == 1
        with pytest.raises(UsageError, match=r"'sub/a.png' has no weight"):
            dump.as_torch_dataset("stage4", labels="weight")
        assert len(dump.as_torch_dataset("stage4", labels="weight", rows=[0, 3])) == 2
        with pytest.raises(UsageError, match="no column 'labl'"):
            dump.as_torch_dataset("stage4", labels="labl")


def test_resuming_needs_the_same_cells(dumped, photos):
    """The same table resumes, in any order of rows and columns; another cell is refused with key and both values."""
    before = tree(dumped)
    shuffled = {name: TABLE[name][::-1] for name in reversed(TABLE)}
    for content in (as_csv(TABLE), as_csv(shuffled), as_csv(TABLE, ";")):
        (photos / "again.csv").write_bytes(content)
        assert extract(table=photos / "again.csv", output=dumped, shard_size=2, batch_size=2, **OPTIONS).extracted == 0
    same = {"output": dumped, "shard_size": 2, "batch_size": 2, **OPTIONS}
    for order in (1, -1):
        other = {name: values[::order] for name, values in (TABLE | {"count": [3, 1, 9, -4]}).items()}
        with pytest.raises(ConflictError, match=r"column 'count' of 'c.png' was 2, and is 9 now"):
            extract(table=other, root=photos, **same)
    fewer = {name: TABLE[name] for name in ("path", "label")}
    with pytest.raises(ConflictError, match="column 'count' is gone"):
        extract(table=fewer, root=photos, **same)
    with pytest.raises(ConflictError, match="column 'new' is new"):
        extract(table={**TABLE, "new": [1, 2, 3, 4]}, root=photos, **same)
    with pytest.raises(ConflictError, match="column 'count' held int, and now holds text"):
        extract(table=TABLE | {"count": list("abcd")}, root=photos, **same)
    with pytest.raises(ConflictError, match="it was made with the columns label, count"):
        extract(files_from=[photos / name for name in NAMES], root=photos, **same)
    assert tree(dumped) == before


def test_cells_that_only_look_alike(photos, tmp_path):
    """A number or an object that is written in another way is another cell, and named like any other."""
    table = {"path": NAMES, "n": [None, 1, 2, 3], "zero": [0.0] * 4, "flag": [None, True, False, True]}
    table |= {"object": [{"a": 1, "b": 2}] * 4, "empty": [None] * 4}
    extract(table=table, root=photos, output=tmp_path / "d", **OPTIONS)
    for name, cell in (("zero", "-0.0"), ("object", '{"b": 2, "a": 1}'), ("object", '{"a": 1.0, "b": 2}')):
        with pytest.raises(ConflictError, match=f"column '{name}' of 'b.png' was .*, and is {re.escape(cell)} now"):
            extract(table=table | {name: [json.loads(cell)] * 4}, root=photos, output=tmp_path / "d", **OPTIONS)
    with open_dump(tmp_path / "d") as dump:
        for where in ("object.none=1", "object.a=9", "empty=x"):  # columns that have no values, or none that is there
            with pytest.raises(UsageError, match="no row has"):
                rows_named(dump, where=[where])
        for flag in (True, np.bool_(True), np.array([True])):
            assert dump.where(flag=flag).tolist() == [1, 3]
        assert dump.where(n=np.arange(2)).tolist() == [1]
        labels = dump.as_torch_dataset("stage4", labels="n", rows=[1, 3])[[0, 1]][1]
        assert (labels.tolist(), str(labels.dtype)) == ([1, 3], "torch.int64")


def test_columns_are_damaged_like_lists(dumped, photos, cli, tmp_path):
    """A changed byte of columns.jsonl is damage, which reading and verify name, and the extract command mends."""
    import shutil

    path = tmp_path / "d"
    shutil.copytree(dumped, path)
    whole = (path / "columns.jsonl").read_bytes()
    for wrong in (whole.replace(b"cat", b"cow", 1), whole[:-9], None):
        (path / "columns.jsonl").unlink(missing_ok=True)
        if wrong is not None:
            (path / "columns.jsonl").write_bytes(wrong)
        for name in KINDS:  # a damaged cell may be that of any column
            with open_dump(path) as dump, pytest.raises(FeatcliError, match=r"columns.jsonl is damaged"):
                dump.columns[name]
        ran = cli("verify", path)
        assert ran.code == 4
        assert "columns.jsonl" in ran.out + ran.err
        assert "columns.jsonl cannot be made again" in cli("verify", "--repair", path).err
        extract(table=photos / "t.csv", output=path, shard_size=2, batch_size=2, **OPTIONS)
        assert (path / "columns.jsonl").read_bytes() == whole


def test_pictures_of_rows_with_keys_of_their_own(photos, tmp_path, cli):
    """Where a column holds the keys, the pictures are found again by the column of paths."""
    (photos / "boxes.csv").write_text("id,path\nq,b.png\nr,b.png\n")
    extract(table=photos / "boxes.csv", key_column="id", output=tmp_path / "d", **OPTIONS)
    with open_dump(tmp_path / "d") as dump:
        assert dump.picture_path("r", root=photos) == str(photos / "b.png")
        assert dump.columns["path"].tolist() == ["b.png", "b.png"]
        np.testing.assert_array_equal(dump["stage4"]["q"], dump["stage4"]["r"])
    ran = cli("verify", tmp_path / "d", "--inputs", "--table", photos / "boxes.csv", "--key-column", "id")
    assert ran.code == 0


def test_a_changed_table_is_noticed(folder, monkeypatch):
    """A table that changes while it is read ends the command, rather than giving rows of two states."""
    table = folder / "growing.csv"
    table.write_bytes(as_csv(TABLE))
    listing = find(InputSpec(table=table))
    columns = listed_columns(listing.images, listing.leads)
    table.write_bytes(as_csv(TABLE | {"label": ["bird"] * 4}))
    with pytest.raises(FeatcliError, match="changed while it was read"):
        list(columns.lines())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_any_bytes_are_a_table_or_refused(folder, data):
    """Whatever a table holds, it is listed or refused in one line, and each row that is listed has its cells."""
    whole = data.draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(FORMATS[whole])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    table = folder / f"fuzz.{whole.rpartition('.')[2]}"
    table.write_bytes(content)
    refused = None
    try:
        keys, columns, _ = listed(table=table)
    except FeatcliError as error:
        refused = error
    if refused is None:
        assert all(len(cells) == len(keys) for cells in columns.values())
    else:
        assert refused.hint
        assert "\n" not in refused.message


def test_the_samples_as_a_table(tmp_path, cli):
    """The command of the documentation: a table beside the pictures, its columns said before the run."""
    (tmp_path / "t.csv").write_text("path,label\nnature/sea.jpg,sea\nthings/flower.png,flower\n")
    options = ["-c", "test_resnet", "--random-init", "--pool", "avg", "-o", tmp_path / "d"]
    ran = cli("extract", "--table", tmp_path / "t.csv", "--root", SAMPLES, *options)
    assert ran.code == 0
    assert "label (text)" in ran.err
    assert json.loads(cli("inspect", tmp_path / "d", "--json").out)["columns"] == {"label": "text"}
