"""The user's columns in what `featcli export` writes, read by the library that each format belongs to."""

import errno
import json
import math
import os
import shutil

import h5py
import numpy as np
import pytest
import xxhash
from safetensors import safe_open

import featcli
from conftest import draw, tree, with_columns
from featcli import open_dump
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed
from featcli.export.content import content_of
from featcli.export.export import export
from featcli.export.formats import export_format, format_of
from featcli.spec.commands import ExportCommand

FILES = ["x.h5", "x.safetensors", "x.npy", "folder", "x.jsonl", "x.parquet"]
ODD = ['Ünï\n"quoted",\'\\', "", "007", "inf", "日本", "a,b;c\td\r\n", "null", " "]
COLUMNS = {  # name: (kind, cells of eight rows); row 3 is broken
    "label": ("text", ["cat", "dog", "cat", "dog", "eel", "cat", "dog", "eel"]),
    "odd": ("text", ODD),
    "odd missing": ("text", [None, *ODD[:5], None, ""]),
    "count": ("int", [0, -1, 2**53 + 1, 5, -(2**63), 2**63 - 1, 7, 8]),
    "some": ("int", [None, 1, 2, 3, None, 2**53, -(2**53), 0]),
    "vast": ("int", [None, 2**53 + 1, 2, 3, 4, 2**63 - 1, -(2**63), 0]),
    "score": ("float", [0.1, -0.0, 1e308, 5e-324, 1 / 3, "inf", "-inf", 2]),
    "rare": ("float", [0.1, None, 1e308, None, -0.0, "inf", 3, None]),
    "flag": ("bool", [True, False] * 4),
    "maybe": ("bool", [True, None, False, None, None, True, False, True]),
    "boxes": ("json", [[1, 2], [], [3.5], [0], [1], [9], None, [2]]),
    "tags": ("json", [{"a": 1}, {"b": {"c": ["x", "ü"]}}, {}, {"a": 2}, None, {"a": -7, "b": {"c": []}}, {}, {"a": 0}]),
    "any": ("json", ["x", 1, {"a": [None, True]}, 2.5, None, [], False, "null"]),
    "wide": ("json", [2**70, 1, 2, 3, 4, 5, 6, 7]),
    "mixed": ("json", [2.5, True, None, 1, 2, 3, 4, 5]),
    "empty": ("json", [{}, {}, None, {}, {}, {}, {}, {}]),
    "words": ("json", ["a", "b", None, "c", "d", "e", "f", "g"]),
    "none": ("text", [None] * 8),
    # names that are taken in a file, and names that only look odd
    "key": ("text", list("abcdefgh")),
    "row": ("int", list(range(100, 108))),
    "valid": ("bool", [False] * 8),
    "keys": ("int", [3] * 8),
    "stage1": ("text", ["mine"] * 8),
    "column.key": ("int", [4] * 8),
    "odd missing.missing": ("text", list("ABCDEFGH")),
    "a/b": ("int", [1] * 8),
    "a_b": ("int", [2] * 8),
    ".": ("text", ["dot"] * 8),
    "ü \"'": ("text", ["named"] * 8),
}
RENAMED = {name: f"column.{name}" for name in ("row", "valid", "keys", "stage1")} | {"key": "column.column.key"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Make a dump of eight pictures in shards of three, the fourth of them broken."""
    made = tmp_path_factory.mktemp("columns")
    for i in range(8):
        draw(made / "p" / f"{i}.png", i)
    (made / "p" / "3.png").write_bytes(b"no picture")
    options = {
        "checkpoint": "test_resnet",
        "random_init": True,
        "out_indices": (1,),
        "pool": "avg",
        "shard_size": 3,
        "batch_size": 1,
    }
    featcli.extract(made / "p", output=made / "d", **options)
    return made / "d"


@pytest.fixture(scope="module")
def dump(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumps") / "d"
    shutil.copytree(plain, path)
    with_columns(path, COLUMNS)
    return open_dump(path)


def written(dump, output, **options):
    """Run `featcli export` from Python."""
    return export(dump, ExportCommand(dump=str(dump.path), output=str(output), **options))


def read_back(path):
    """Return the columns of an export by the names that they have there, as lists, by the format's own library."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {name: of_hdf5(file, name) for name in file if "kind" in file[name].attrs}
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return json.loads(file.metadata()["columns"])
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        mine = [field.name for field in table.schema if b"kind" in (field.metadata or {})]
        return {name: of_parquet(table, name) for name in mine}
    beside = {".npy": path.with_suffix(".images.jsonl"), "": path / "images.jsonl"}
    lines = [json.loads(line) for line in beside.get(path.suffix, path).read_text().splitlines()]
    mine = [name for name in lines[0] if name not in ("key", "row", "valid", "stage1")]
    return {name: [line[name] for line in lines] for name in mine}


def of_hdf5(file, name):
    dataset, kind = file[name], file[name].attrs["kind"]
    if h5py.check_string_dtype(dataset.dtype) is None:
        values = [None if value != value else value for value in dataset[:].tolist()]
        return values if None not in values or kind == "float" else [v if v is None else int(v) for v in values]
    texts = dataset.asstr()[:].tolist()
    if kind != "text":
        return [json.loads(text) for text in texts]
    mask = file[name].attrs.get("missing")
    missing = [False] * len(texts) if mask is None else file[mask][:]
    return [None if is_missing else text for text, is_missing in zip(texts, missing, strict=True)]


def of_parquet(table, name):
    import pyarrow

    field, values = table.schema.field(name), table[name].to_pylist()
    if field.metadata[b"kind"] == b"json" and field.type == pyarrow.string():
        return [None if value is None else json.loads(value) for value in values]
    return values


def plain_values(values, kind):
    """Return the values of a column as Python's own; JSON and HDF5 have others for infinity, and for true and false."""
    python = {"float": float, "bool": lambda value: bool(value) if value in (0, 1) else value}.get(
        kind, lambda value: value
    )
    return [value if value is None else python(value) for value in values]


def comparable(value):
    """Return a value in a form whose equality tells -0.0 from 0, true from 1, but not absent fields from null."""
    if isinstance(value, dict):
        return {name: comparable(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [comparable(one) for one in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__, value
    return "number", value, math.copysign(1, value)


@pytest.mark.parametrize("keep_failed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_columns_round_trip(dump, tmp_path, name, keep_failed):
    """Every format gives back every cell of the rows in it, to the last bit, and tells missing cells from others."""
    content = written(dump, tmp_path / name, keep_failed=keep_failed)
    assert content.columns == {column: RENAMED.get(column, column) for column in COLUMNS}
    found = read_back(tmp_path / name)
    links = {"a/b": "a_b", "a_b": "column.a_b", ".": "column.."} if name == "x.h5" else {}
    rows = [row for row in range(8) if keep_failed or row != 3]
    for column, (kind, cells) in COLUMNS.items():
        values = found.pop(links.get(column, RENAMED.get(column, column)))
        assert comparable(plain_values(values, kind)) == comparable(plain_values([cells[row] for row in rows], kind)), (
            column
        )
    assert not found


def test_types_of_columns(dump, tmp_path):
    """Parquet and HDF5 have the types of the columns: whole numbers, doubles, truth values, text, and nested JSON."""
    parquet = pytest.importorskip("pyarrow.parquet")
    written(dump, tmp_path / "x.parquet")
    written(dump, tmp_path / "x.h5")
    schema = parquet.read_schema(tmp_path / "x.parquet")
    types = {name: str(schema.field(RENAMED.get(name, name)).type) for name in COLUMNS}
    nested = {"boxes": "list<element: double>", "tags": "struct<a: int64, b: struct<c: list<element: string>>>"}
    plain = {"bool": "bool", "int": "int64", "float": "double", "text": "string", "json": "string"}
    assert types == {name: nested.get(name, plain[kind]) for name, (kind, _) in COLUMNS.items()}
    assert schema.field("column.row").metadata[b"column"] == b"row"
    with h5py.File(tmp_path / "x.h5") as file:
        kinds = {name: file[name].dtype.kind for name in ("count", "some", "vast", "score", "flag", "maybe", "label")}
        assert (file["a_b"].attrs["column"], file["column.a_b"].attrs["column"]) == ("a/b", "a_b")
        assert file["none"].attrs["missing"] == "none.missing"
        assert (file["flag"].dtype, np.isnan(file["maybe"][:]).tolist().count(True)) == (bool, 2)
    assert kinds == {"count": "i", "some": "f", "vast": "O", "score": "f", "flag": "b", "maybe": "f", "label": "O"}


@pytest.mark.parametrize("name", ["x.h5", "x.jsonl", "x.parquet"])
def test_columns_in_pieces(dump, tmp_path, monkeypatch, name):
    """Rows that are missing in between, and cells that are taken two at a time, change no cell and no type."""
    shutil.copytree(dump.path, tmp_path / "d")
    (tmp_path / "d" / "shards" / "00001.json").unlink()
    for module, limit in (("hdf5_columns", "AT_ONCE"), ("arrow_columns", "AT_ONCE"), ("parquet", "ROWS")):
        monkeypatch.setattr(f"featcli.export.{module}.{limit}", 2)
    written(open_dump(tmp_path / "d", incomplete=True), tmp_path / name)
    found = read_back(tmp_path / name)
    for column in ("label", "odd", "some", "tags", "boxes", "any"):
        kind, cells = COLUMNS[column]
        values = [None if kind == "json" and value == "null" else value for value in found[column]]
        assert comparable(values) == comparable(
            [None if cell == "null" and kind == "json" else cell for cell in [*cells[:3], *cells[6:]]]
        )
    if name == "x.parquet":
        assert pytest.importorskip("pyarrow.parquet").ParquetFile(tmp_path / name).num_row_groups > 1


def test_labels_of_folders_are_a_column(dump, tmp_path):
    """The folder of each image is the column `label` of every export, without a table, and beside one with a table."""
    for key in ("cats/1.png", "cats/2.png", "dogs/1.png", "apart.png"):
        draw(tmp_path / "p" / key, len(key))
    options = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1,), "pool": "avg"}
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **options)
    for name in FILES:
        written(open_dump(tmp_path / "d"), tmp_path / name)
        assert read_back(tmp_path / name) == {"label": [None, "cats", "cats", "dogs"]}
    both = open_dump([tmp_path / "d", dump.path])
    for name in ("both.h5", "both.parquet", "both.jsonl"):
        content = content_of(both, ["stage1"], None, None, keeps_failed=True, rows=[1, 3, 6, 7, 11])
        (tmp_path / name).touch()
        export_format(format_of(name)).write(content, tmp_path / name)
        found = read_back(tmp_path / name)
        assert found["label"] == ["cats", "dogs", *(COLUMNS["label"][1][row] for row in (2, 3, 7))]
        assert found["vast"] == [None, None, *(COLUMNS["vast"][1][row] for row in (2, 3, 7))]


def test_a_name_that_is_taken_is_told(dump, tmp_path, cli):
    """The last line of an export names each column that has another name in the file."""
    assert "column 'stage1' is 'column.stage1' in it" in cli("export", dump.path, "-o", tmp_path / "x.jsonl").out
    run = cli("export", dump.path, "-o", "-")
    assert "column 'row' is 'column.row' in it" in run.err


def test_texts_that_hdf5_cannot_hold(plain, tmp_path, cli):
    """A zero byte, at which HDF5 would cut a text, is refused with a way out; Parquet and JSON lines hold it."""
    shutil.copytree(plain, tmp_path / "d")
    with_columns(tmp_path / "d", {"text": ("text", ["a\0b", None, *"cdefgh"]), "j": ("json", ["a\0b"] * 8)})
    before = tree(tmp_path)
    run = cli("export", tmp_path / "d", "-o", tmp_path / "x.h5")
    assert (run.code, len(run.err.splitlines())) == (2, 2)
    assert "column 'text': 'a\\x00b' has a zero byte in it" in run.err
    assert tree(tmp_path) == before
    for name in ("x.parquet", "x.jsonl", "x.safetensors", "folder"):
        written(open_dump(tmp_path / "d"), tmp_path / name)
        assert read_back(tmp_path / name)["text"][:2] == ["a\0b", None]


@pytest.mark.parametrize("module", ["featcli.export.arrays", "featcli.dump.formats.safetensors"])
def test_columns_that_no_header_holds(dump, tmp_path, cli, monkeypatch, module):
    """Columns that are too long for the header of a safetensors file are refused with a way out, before any row."""
    monkeypatch.setattr(f"{module}.MAX_HEADER_BYTES", 100)
    before = tree(tmp_path)
    run = cli("export", dump.path, "-o", tmp_path / "x.safetensors")
    assert (run.code, len(run.err.splitlines())) == (2, 2)
    assert "columns of 7 images do not fit into the header" in run.err
    assert ".parquet" in run.err
    assert tree(tmp_path) == before


WRONG = [("bool", '"cat"'), ("text", "1"), ("float", "1e400"), ("float", "NaN"), ("json", "[-Infinity]"),
         ("int", "2.5"), ("int", str(2**63)), ("float", '"Inf"'), ("bool", 'null, "x": 1'), ("bool", "}")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "cell"), [(name, "bool", "true") for name in FILES] + [("x.jsonl", *wrong) for wrong in WRONG]
)
def test_damaged_columns(plain, tmp_path, cli, name, kind, cell):
    """Columns of another hash, of other kinds than the plan says, or with what JSON lacks, end the export at once."""
    shutil.copytree(plain, tmp_path / "d")
    with_columns(tmp_path / "d", {"x": (kind, [None] * 8)})
    path = tmp_path / "d" / "columns.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], f'{{"x": {cell}}}', lines[7], ""]))
    if cell != "true":  # nothing but the cell itself is wrong
        plan = read_checksummed(tmp_path / "d" / "plan.json")
        plan["columns"]["digest"] = xxhash.xxh3_128(path.read_bytes()).hexdigest()
        publish_checksummed(tmp_path / "d" / "plan.json", plan, replace=True)
    before = tree(tmp_path)
    run = cli("export", tmp_path / "d", "-o", tmp_path / name)
    assert (run.code, len(run.err.splitlines())) == (4, 2)
    assert "columns.jsonl is damaged" in run.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_full_disk_below_hdf5(dump, tmp_path, cli, monkeypatch, after):
    """A disk that is full while h5py writes columns ends the export in one line, and leaves no file."""
    from featcli.export import hdf5_columns

    calls = iter(range(1000))
    real = hdf5_columns.write_all

    def full(*arguments):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(hdf5_columns, "write_all", full)
    before = tree(tmp_path)
    run = cli("export", dump.path, "-o", tmp_path / "x.h5")
    assert next(calls) == after + 1  # nothing was written behind what could not be
    assert (run.code, len(run.err.splitlines())) == (7, 2)
    assert "no space left" in run.err
    assert tree(tmp_path) == before


def test_a_table_through_every_export(plain, tmp_path):
    """What a table says of its pictures, in its own order, comes out of every export as it went in."""
    order = [5, 0, 3, 7, 1]
    names = [f"{i}.png" for i in order]
    table = {
        "path": names,
        "label": ["cat", None, "eel", "", "日本\n"],
        "id": [2**53 + 1, 0, -1, 7, 8],
        "score": [0.1, None, math.inf, -0.0, 1e308],
        "flag": [True, False, None, True, True],
        "box": [[1, 2], [3], None, [], [4]],
    }
    options = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1,), "pool": "avg", "shard_size": 3}
    featcli.extract(table=table, root=plain.parent / "p", output=tmp_path / "d", **options)
    dump = open_dump(tmp_path / "d")
    assert dump.keys == names
    mine = {name: cells for name, cells in table.items() if name != "path"}
    for name in FILES:
        written(dump, tmp_path / name, keep_failed=True)
        found = read_back(tmp_path / name)
        for kind, (column, cells) in zip(("text", "int", "float", "bool", "json"), mine.items(), strict=True):
            assert comparable(plain_values(found[column], kind)) == comparable(cells), (name, column)


@pytest.mark.parametrize("name", FILES)
def test_chosen_rows_have_their_own_cells(dump, tmp_path, cli, name):
    """Rows that --where and --keys choose have the cells of these rows, whatever lies between them."""
    run = cli(
        "export", dump.path, "-o", tmp_path / name, "--where", "flag=false", "--keys", "[1-6].png", "--keep-failed"
    )
    assert run.code == 0, run.err
    found = read_back(tmp_path / name)
    for column in ("label", "odd", "tags"):
        assert comparable(found[column]) == comparable([COLUMNS[column][1][row] for row in (1, 3, 5)])
