"""Check --table on tables as programs and data sets write them, byte for byte, and on those with one thing broken."""

import codecs
import datetime
import decimal
import io
import re
import uuid
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from test_tables import listed

from featcli.errors import UsageError

FILES = ("a.jpg", "b.png", "d/c.jpg", "train/0a1f.jpg", "train/77ec.jpg", "12/1.jpeg", "12/2.png", "000000000139.jpg",
         "data/000001.jpg", "data/000002.jpg")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make files that the tables below name. Nobody decodes them."""
    made = tmp_path_factory.mktemp("real")
    for name in FILES:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(b"picture")
    return made


class Real(NamedTuple):
    """A table as a program writes it, what it must give, and what it is broken by."""

    file: str
    content: bytes
    keys: list[str]
    columns: dict[str, list]
    kinds: dict[str, str]
    broken: list[tuple[bytes, bytes, str]]  # bytes that are replaced, by what, and the message
    options: dict = {}  # noqa: RUF012


def as_parquet(table, **types):
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({name: pyarrow.array(v, types.get(name)) for name, v in table.items()}), file)
    return file.getvalue()


REAL = {
    # datasets.load_dataset("imagefolder") reads the same; every value is text or a number there, too.
    "imagefolder metadata.csv": Real(
        "metadata.csv",
        b'file_name,additional_feature,text\na.jpg,1,"A cat, asleep"\nd/c.jpg,2,\n',
        ["a.jpg", "d/c.jpg"],
        {"additional_feature": [1, 2], "text": ["A cat, asleep", None]},
        {"additional_feature": "int", "text": "text"},
        [
            (b'"A cat, asleep"', b"A cat, asleep", "line 2: it has 4 cells, and the header 3 columns"),
            (b"asleep", b"\xe4sleep", "line 2: character 17 is the byte 0xe4, which is not UTF-8"),
            (b"d/c.jpg", b"./a.jpg", "line 3: it names 'a.jpg', as line 2 does"),
        ],
    ),
    "imagefolder metadata.jsonl": Real(
        "metadata.jsonl",
        b'{"file_name": "a.jpg", "objects": {"bbox": [[302.0, 109.0, 73.0, 52.0]], "categories": [0]}}\n'
        b'{"file_name": "b.png", "objects": {"bbox": [], "categories": []}, "text": "none"}\n',
        ["a.jpg", "b.png"],
        {
            "objects": [{"bbox": [[302.0, 109.0, 73.0, 52.0]], "categories": [0]}, {"bbox": [], "categories": []}],
            "text": [None, "none"],
        },
        {"objects": "json", "text": "text"},
        [
            (b", \"text\"", b" \"text\"", "line 2: it is not JSON: Expecting ',' delimiter at character 66"),
            (b'"text": "none"', b'"file_name": "c"', "line 2: the field 'file_name' stands in it twice"),
            (b'"b.png"', b"7", "line 2: column 'file_name' holds 7, which is not a path"),
        ],
    ),
    # What fiftyone.utils.csv writes: lists as text with commas, None as nothing, everything else by str().
    "FiftyOne CSVDataset": Real(
        "labels.csv",
        b'filepath,tags,ground_truth.label,uniqueness\r\n000001.jpg,"val,good",cat,0.5\r\n000002.jpg,,,0.25\r\n',
        ["000001.jpg", "000002.jpg"],
        {"tags": ["val,good", None], "ground_truth.label": ["cat", None], "uniqueness": [0.5, 0.25]},
        {"tags": "text", "ground_truth.label": "text", "uniqueness": "float"},
        [
            (b'good"', b"good", "line 2: a quoted cell begins in it that never ends"),
            (b"tags", b"filepath", "line 1: columns 1 and 2 are both called 'filepath'"),
        ],
        {"root": "data"},
    ),
    # As the open data of iNaturalist, whose files are called .csv. pandas gives the text the same quotes.
    "iNaturalist photos": Real(
        "photos.csv",
        b"photo_id\textension\tposition\tnote\n1\tjpeg\t0\tcalled \"Oak\", 5' high\n2\tpng\t1\t\n",
        ["12/1.jpeg", "12/2.png"],
        {
            "photo_id": [1, 2], "extension": ["jpeg", "png"], "position": [0, 1],
            "note": ['called "Oak", 5\' high', None],
        },
        {"photo_id": "int", "extension": "text", "position": "int", "note": "text"},
        [
            (b"called \"Oak\"", b"\"Oak\" it is", "line 2: there is text behind a quoted cell"),
            (b"\tpng", b"", "line 3: it has 3 cells, and the header 4 columns: column 'note' is not there"),
            (b"2\tpng", b"2\t", "line 3: column 'extension' is empty"),
        ],
        {"path_format": "12/{photo_id}.{extension}"},
    ),
    "Kaggle dog breeds": Real(
        "labels.csv",
        b"id,breed\n77ec,dingo\n0a1f,boston_bull\n",
        ["train/77ec.jpg", "train/0a1f.jpg"],
        {"id": ["77ec", "0a1f"], "breed": ["dingo", "boston_bull"]},
        {"id": "text", "breed": "text"},
        [
            (b"77ec,", b",", "line 2: column 'id' is empty"),
            (b"0a1f,", b"77ec,", "line 3: it names 'train/77ec.jpg', as line 2 does"),
        ],
        {"path_format": "train/{id}.jpg"},
    ),
    "Kaggle cassava": Real(
        "train.csv",
        b"image_id,label\nb.png,0\na.jpg,3\n",
        ["b.png", "a.jpg"],
        {"label": [0, 3]},
        {"label": "int"},
        [(b"a.jpg,3", b"a.jpg,3,4", "line 3: it has 3 cells"),
         (b"image_id", b"img", "'image_id': table .* no such col")],
        {"path_column": "image_id"},
    ),
    "Kaggle whales": Real(
        "whales.csv",
        b"Image,Id\nb.png,w_f48451c\na.jpg,new_whale\n",
        ["b.png", "a.jpg"],
        {"Id": ["w_f48451c", "new_whale"]},
        {"Id": "text"},
        [(b"Id\n", b"path\n", "'Image' or 'path' could be the column of paths"),
         (b"a.jpg", b"../x/a.jpg", "line 3: .* outside")],
    ),
    # pandas.read_csv gives created_at as text and lead_time as floats, too.
    "Label Studio CSV": Real(
        "project-1.csv",
        b"annotation_id,annotator,choice,created_at,id,image,lead_time,updated_at\n"
        b"1,1,Adult,2021-03-09T21:52:49.513742Z,7,https://h.org/u/1.jpg,4.288,2021-03-09T21:52:49.513742Z\n"
        b'2,1,"{""choices"":[""Adult"",""Toy""]}",2021-03-09T22:16:08Z,8,https://h.org/u/2.jpg,3.5,2021-03-09T22:16:08Z\n',
        ["h.org/u/1.jpg", "h.org/u/2.jpg"],
        {
            "annotation_id": [1, 2], "annotator": [1, 1], "choice": ["Adult", '{"choices":["Adult","Toy"]}'],
            "created_at": ["2021-03-09T21:52:49.513742Z", "2021-03-09T22:16:08Z"], "id": [7, 8],
            "lead_time": [4.288, 3.5], "updated_at": ["2021-03-09T21:52:49.513742Z", "2021-03-09T22:16:08Z"],
        },
        {
            "annotation_id": "int", "annotator": "int", "choice": "text", "created_at": "text", "id": "int",
            "lead_time": "float", "updated_at": "text",
        },
        [
            (b"https://h.org/u/2", b"/data/upload/2", "line 3: listed image '/data/upload/2.jpg': it is outside"),
            (b'""Adult"",', b'"Adult",', "line 3: there is text behind a quoted cell"),
        ],
    ),
    "Label Studio TSV": Real(
        "project-1.tsv",
        b"annotation_id\tannotator\tchoice\tid\timage\r\n1\t1\tAdult\t7\ta.jpg\r\n",
        ["a.jpg"],
        {"annotation_id": [1], "annotator": [1], "choice": ["Adult"], "id": [7]},
        {"annotation_id": "int", "annotator": "int", "choice": "text", "id": "int"},
        [(b"Adult", b"Ad\0lt", "line 2: there is a zero byte in it"),
         (b"\tchoice", b"\t", "line 1: column 3 has no name")],
    ),
    "COCO ids": Real(
        "captions.csv",
        b"image_id,caption\n139,A room\n",
        ["000000000139.jpg"],
        {"image_id": [139], "caption": ["A room"]},
        {"image_id": "int", "caption": "text"},
        [(b"139", b"139.0", "line 2: column 'image_id' holds '139.0', which is not a whole number")],
        {"path_format": "{image_id:012d}.jpg"},
    ),
    # pandas reads 007 as 7 and True as a bool; here a cell is a number only if it can be written again as it was.
    "pandas to_csv": Real(
        "pandas.csv",
        b',path,label,n,score,ok,when,code\n0,b.png,cat,3,0.5,True,2024-01-02 00:00:00,007\n'
        b'1,a.jpg,,,1e-05,False,,"\xc3\xa9""q"", z"\n',
        ["b.png", "a.jpg"],
        {
            "index": [0, 1], "label": ["cat", None], "n": [3, None], "score": [0.5, 1e-05], "ok": ["True", "False"],
            "when": ["2024-01-02 00:00:00", None], "code": ["007", 'é"q", z'],
        },
        {"index": "int", "label": "text", "n": "int", "score": "float", "ok": "text", "when": "text", "code": "text"},
        [(b"label", b"", "line 1: column 3 has no name"), (b"0,b.png", b"b.png", "line 2: it has 7 cells")],
    ),
    # pandas writes times as milliseconds here, and / as \/.
    "pandas to_json lines": Real(
        "pandas.jsonl",
        b'{"path":"d\\/c.jpg","n":3,"score":0.5,"ok":true,"when":1704153600000,"cat":"x"}\n'
        b'{"path":"b.png","n":null,"score":null,"ok":false,"when":null,"cat":null}\n',
        ["d/c.jpg", "b.png"],
        {"n": [3, None], "score": [0.5, None], "ok": [True, False], "when": [1704153600000, None], "cat": ["x", None]},
        {"n": "int", "score": "float", "ok": "bool", "when": "int", "cat": "text"},
        [(b"}\n{", b"},\n{", "line 1: it is not JSON: Extra data"),
         (b'"b.png"', b"null", "line 2: column 'path' is empty")],
    ),
    "pandas to_csv as Excel wants it": Real(
        "excel.csv",
        codecs.BOM_UTF8 + b"path;label;price\r\nb.png;cat;0,5\r\nd/c.jpg;\"a;b\";1,25\r\n",
        ["b.png", "d/c.jpg"],
        {"label": ["cat", "a;b"], "price": ["0,5", "1,25"]},  # numbers with commas stay text
        {"label": "text", "price": "text"},
        [
            (codecs.BOM_UTF8, b"sep=;\r\n", "line 1: it holds 'sep=', which is for Excel alone"),
            (b'"a;b"', b"a;b", "line 3: it has 4 cells, and the header 3 columns"),
            (codecs.BOM_UTF8 + b"path", "path".encode("utf-16"), "line 1: it is UTF-16, not UTF-8"),
        ],
    ),
    # polars reads 0.00001 and 3.2e-7 as floats, and "" as an empty text, which is a missing one here.
    "polars write_csv": Real(
        "polars.csv",
        b'path,score,big,ok,day,code\nb.png,0.00001,1e20,true,2024-01-02,007\na.jpg,3.2e-7,1.0,,2024-01-02,""\n',
        ["b.png", "a.jpg"],
        {
            "score": [1e-05, 3.2e-07], "big": ["1e20", "1.0"], "ok": ["true", None], "day": ["2024-01-02"] * 2,
            "code": ["007", None],
        },
        {"score": "float", "big": "text", "ok": "text", "day": "text", "code": "text"},
        [(b"path,", b"paths,", "no column is called path, .*: there are 'paths', 'score'")],
    ),
    "polars write_ndjson": Real(
        "polars.ndjson",
        b'{"path":"b.png","n":3,"tags":["a"],"d":"PT5S"}\n{"path":"a.jpg","n":null,"tags":[],"d":null}\n',
        ["b.png", "a.jpg"],
        {"n": [3, None], "tags": [["a"], []], "d": ["PT5S", None]},
        {"n": "int", "tags": "json", "d": "text"},
        [(b"[]", b"[" * 100_000, "line 2: it is nested too deeply"), (b"\n{", b'\n["a"]{', "line 2: it is not JSON")],
    ),
    "DuckDB COPY": Real(
        "duck.csv",
        b"path,label,score,ok,d,l,s\nb.png,cat,0.5,true,1.50,\"[a, b]\",{'x': 1}\na.jpg,\"\",1e-05,,2.25,[],\n",
        ["b.png", "a.jpg"],
        {
            "label": ["cat", None], "score": [0.5, 1e-05], "ok": ["true", None], "d": ["1.50", "2.25"],
            "l": ["[a, b]", "[]"], "s": ["{'x': 1}", None],
        },
        {"label": "text", "score": "float", "ok": "text", "d": "text", "l": "text", "s": "text"},
        [(b'"[a, b]"', b"[a, b]", "line 2: it has 8 cells, and the header 7 columns")],
    ),
    # DuckDB, pandas and datasets write JSON Lines under this suffix, too.
    "DuckDB COPY to JSON": Real(
        "duck.json",
        b'{"path":"b.png","n":3,"score":100000000000000000000.0,"m":{"k":2}}\n{"path":"a.jpg","n":2,"score":0.00001,"m":{}}\n',
        ["b.png", "a.jpg"],
        {"n": [3, 2], "score": [1e20, 1e-05], "m": [{"k": 2}, {}]},
        {"n": "int", "score": "float", "m": "json"},
        [
            (b"{\"path", b"[{\"path", r"a file of JSON as a whole is not read"),  # an array of objects
            (b"{\"path\"", b"{\n\"path\"", "line 1: it is not JSON"),  # objects over several lines
        ],
    ),
    # R quotes texts and names of rows; NA is a text of R's, as any other text is.
    "R write.csv": Real(
        "r.csv",
        b'"","path","label","n"\n"1","b.png","cat",NA\n"2","a.jpg",NA,2\n',
        ["b.png", "a.jpg"],
        {"index": [1, 2], "label": ["cat", "NA"], "n": ["NA", "2"]},
        {"index": "int", "label": "text", "n": "text"},
        [(b'"a.jpg"', b'"a".jpg', "line 3: there is text behind a quoted cell"),
         (b'"",', b"", "line 2: it has 4 cells")],
    ),
    "Google Sheets": Real(
        "sheet.tsv",
        b"path\tlabel\tsays\r\nb.png\tcat\t5\" pipe, \"new\"\r\na.jpg\t\t",
        ["b.png", "a.jpg"],
        {"label": ["cat", None], "says": ['5" pipe, "new"', None]},
        {"label": "text", "says": "text"},
        [(b'5" pipe', b'"pipe" 5', "line 2: there is text behind a quoted cell")],
    ),
    "LibreOffice": Real(
        "calc.csv",
        b'Path,Label,Note\n"b.png","cat","two\nlines"\n"a.jpg","dog",\n',
        ["b.png", "a.jpg"],
        {"Label": ["cat", "dog"], "Note": ["two\nlines", None]},
        {"Label": "text", "Note": "text"},
        [(b'"dog",', b'"dog"', "line 4: it has 2 cells"), (b"\n\"a", b"\n,,\n\"a", "line 4: column 'Path' is empty")],
    ),
    "Open Images": Real(
        "train-images.csv",
        b"ImageID,Subset,OriginalURL,Rotation\n77ec,train,https://h.org/1_o.jpg,0.0\n0a1f,train,https://h.org/2_o.jpg,\n",
        ["train/77ec.jpg", "train/0a1f.jpg"],
        {
            "ImageID": ["77ec", "0a1f"], "Subset": ["train", "train"],
            "OriginalURL": ["https://h.org/1_o.jpg", "https://h.org/2_o.jpg"], "Rotation": [0.0, None],
        },
        {"ImageID": "text", "Subset": "text", "OriginalURL": "text", "Rotation": "float"},
        [(b"0a1f", b"77ec", "line 3: it names 'train/77ec.jpg', as line 2 does")],
        {"path_format": "{Subset}/{ImageID}.jpg"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_tables_of_real_programs(folder, monkeypatch, name):
    """The bytes that a program writes give its rows in their order, and its cells as the right kinds."""
    monkeypatch.chdir(folder)
    real = REAL[name]
    (folder / real.file).write_bytes(real.content)
    assert listed(table=real.file, **real.options) == (real.keys, real.columns, real.kinds)


@pytest.mark.parametrize("name", REAL)
def test_broken_tables_of_real_programs(folder, tmp_path, monkeypatch, cli, name):
    """The same table with one thing broken is refused with its place and exit code 2, before anything is written."""
    monkeypatch.chdir(folder)
    real = REAL[name]
    for number, (whole, wrong, message) in enumerate(real.broken):
        assert whole in real.content
        (folder / f"broken-{real.file}").write_bytes(real.content.replace(whole, wrong, 1))
        options = {"table": f"broken-{real.file}", **real.options}
        with pytest.raises(UsageError, match=message) as refused:
            listed(**options)
        assert f"broken-{real.file}" in refused.value.message
        assert refused.value.hint
        if number:
            continue
        words = [word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", value)]
        ran = cli("extract", *words, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "-q")
        assert (ran.code, len(ran.err.splitlines()), (tmp_path / "d").exists()) == (2, 2, False)


def test_parquet_of_real_programs(folder):
    """Categories, times, nullable numbers, lists, objects and ids of Parquet are what they are in their programs."""
    import pyarrow

    when = datetime.datetime(2024, 1, 2, 3, 4, 5, 123456)
    table = {
        "path": ["b.png", "a.jpg"],
        "cat": pyarrow.array(["x", None]).dictionary_encode(),
        "when": pyarrow.array([when, None], pyarrow.timestamp("us")),
        "berlin": pyarrow.array([when, None], pyarrow.timestamp("ms", "+01:00")),
        "exact": pyarrow.array([1_700_000_000_123_456_789, -1], "int64").cast(pyarrow.timestamp("ns")),
        "lasts": pyarrow.array([1_000_000_001, None], "int64").cast(pyarrow.duration("ns")),
        "day": [datetime.date(2024, 1, 2), None],
        "n": pyarrow.array([3, None], "int8"),
        "price": [decimal.Decimal("1.50"), None],
        "tags": [["a"], []],
        "at": [{"x": 1, "y": None}, None],
        "map": pyarrow.array([[("k", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "uuid": pyarrow.array([uuid.UUID(int=1).bytes, None], pyarrow.uuid()),
        "__index_level_0__": [7, 5],
    }
    (folder / "types.parquet").write_bytes(as_parquet(table))
    keys, columns, kinds = listed(table=folder / "types.parquet")
    assert keys == ["b.png", "a.jpg"]
    assert columns == {
        "cat": ["x", None],
        "when": ["2024-01-02T03:04:05.123456", None],
        "berlin": ["2024-01-02T04:04:05.123000+01:00", None],
        "exact": ["2023-11-14T22:13:20.123456789", "1969-12-31T23:59:59.999999999"],
        "lasts": ["0:00:01.000000001", None],
        "day": ["2024-01-02", None],
        "n": [3, None],
        "price": ["1.50", None],
        "tags": [["a"], []],
        "at": [{"x": 1, "y": None}, None],
        "map": [[["k", 2]], []],
        "uuid": ["00000000-0000-0000-0000-000000000001", None],
        "__index_level_0__": [7, 5],
    }
    assert {name: kind for name, kind in kinds.items() if kind != "text"} == {
        "n": "int", "tags": "json", "at": "json", "map": "json", "__index_level_0__": "int"
    }  # fmt: skip


def test_pictures_inside_parquet_are_refused(folder):
    """A Parquet of the Hub holds the bytes of pictures: it is refused by the column. One of paths alone is a table."""
    import pyarrow

    of_image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    deep = pyarrow.list_(of_image)
    for column, kind in (("image", of_image), ("deep", deep), ("view", pyarrow.binary_view())):
        empty = pyarrow.table({"path": ["b.png"], column: pyarrow.nulls(1, kind)})
        with pyarrow.ipc.new_file(folder / "hub.arrow", empty.schema) as writer:
            writer.write_table(empty)
        with pytest.raises(UsageError, match=f"column '{column}' holds bytes"):
            listed(table=folder / "hub.arrow")
    (folder / "hub.parquet").write_bytes(as_parquet({"image": [{"bytes": b"1", "path": "b.png"}], "label": [0]}))
    with pytest.raises(UsageError, match="column 'image' holds bytes") as refused:
        listed(table=folder / "hub.parquet")
    assert "write the pictures to files or to a tar" in refused.value.hint
    (folder / "hub.parquet").write_bytes(as_parquet({"image": ["b.png"], "label": [0], "at": [{"binary": 1}]}))
    assert listed(table=folder / "hub.parquet")[1] == {"label": [0], "at": [{"binary": 1}]}


def test_urls_with_captions(folder):
    """The Parquet of LAION and img2dataset has its URLs in a column of its own, which the message finds."""
    table = {"key": ["0007", "0008"], "url": ["https://h.org/1.jpg", "https://h.org/x?id=2"], "caption": ["a", None]}
    (folder / "laion.parquet").write_bytes(as_parquet(table))
    with pytest.raises(UsageError, match="there are 'key', 'url', 'caption'") as refused:
        listed(table=folder / "laion.parquet")
    assert refused.value.hint == "give --path-column url, which holds 'https://h.org/1.jpg'"
    keys, columns, _ = listed(table=folder / "laion.parquet", path_column="url", key_column="key")
    assert keys == ["0007", "0008"]
    assert columns == {"url": ["h.org/1.jpg", "h.org/x?id=2"], "caption": ["a", None]}


@pytest.mark.parametrize(
    ("file", "content", "message", "hint"),
    [
        ("train.txt", b"d/c.jpg 0\na.jpg 1\n", "and spaces separate its cells", "(echo path,label; sed 's/  */,/g'"),
        ("images.txt", b"1 001.Albatross/x_0046.jpg\n", "spaces separate its cells", "(echo id,path; sed"),
        ("lists.txt", b"a.jpg\nb.png\n", "its first line holds 'a.jpg'", "--files-from"),
        ("min.json", b'[\n{"image": "a.jpg", "id": 7},\n{"image": "b.png"}\n]', "as a whole", "jq -c '.[]'"),
        ("coco.json", b'{"info": {"year": 2017}, "images": [{}]}', "as a whole", "jq -c '.images[]'"),
        ("ids.csv", b"ImageID,label\n77ed,1\n77ee,1\n", "there are 'ImageID', 'label'", "'images/{ImageID}.jpg'"),
        ("ids.csv", b"ImageID,label\n77ec,1\n", "there are 'ImageID', 'label'", "'train/{ImageID}.jpg'"),
        ("odd.csv", b"my pic,label\nd/c.jpg,1\n", "there are 'my pic'", "give --path-column 'my pic', which holds"),
        ("photos.tsv", b'path\tsays\na.jpg\t"Oak" it\n', "line 2: there is", """sed 's/"/""/g; s/[^\\t]*/"&"/g'"""),
        ("t.xlsx", b"PK\x03\x04" + bytes(40), "an Excel workbook", "save it as CSV UTF-8"),
        ("t.csv.gz", b"\x1f\x8b\x08" + bytes(40), "not a table that can be read", "zcat TABLE.csv.gz | featcli"),
    ],
)  # fmt: skip
def test_hints_for_what_people_have(folder, monkeypatch, file, content, message, hint):
    """Files that people take for tables are refused with what makes one of them, or the option that reads them."""
    monkeypatch.chdir(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        listed(table=file)
    assert hint in refused.value.hint
    if "echo" in hint:  # the command of the hint makes a table that is read
        header = re.search("echo ([a-z,]*);", refused.value.hint)[1]
        (folder / "made.csv").write_text(header + "\n" + re.sub("  *", ",", content.decode()))
        if file == "train.txt":
            assert listed(table="made.csv")[:2] == (["d/c.jpg", "a.jpg"], {"label": [0, 1]})


class Column(list):
    """A fake of an array of pandas: a list that gives such lists."""

    def __getitem__(self, at):
        return list(self)[at]


def frame_of(names, columns, index=None, levels=1):
    """Return a fake of a pandas table, with the attributes that one has."""
    names = type("Names", (list,), {"nlevels": levels})(names)
    places = type("Places", (), {"__getitem__": lambda _, at: SimpleNamespace(array=Column(columns[at[1]]))})()
    return SimpleNamespace(columns=names, iloc=places, index=index)


def test_tables_of_pandas_in_memory(folder, monkeypatch):
    """An index with a name is a column, as in files that pandas writes; without a name it is none."""
    monkeypatch.chdir(folder)
    values = SimpleNamespace(array=Column(["b.png", "a.jpg"]))
    index = SimpleNamespace(names=["path"], get_level_values=lambda place: [values][place])
    assert listed(table=frame_of([0], [[1, 2]], index))[:2] == (["b.png", "a.jpg"], {"0": [1, 2]})
    index.names = [None]
    assert listed(table=frame_of(["path"], [["b.png"]], index))[:2] == (["b.png"], {})
    with pytest.raises(UsageError, match="table in memory: the names of its columns have several levels"):
        listed(table=frame_of([("a", "b")], [["b.png"]], levels=2))
    with pytest.raises(UsageError, match="table in memory: columns 1 and 2 are both called 'path'"):
        listed(table=frame_of(["path", "path"], [["b.png"], ["a.jpg"]]))


def test_times_in_memory(folder, monkeypatch):
    """Times and durations of numpy and Arrow are the same text as in Parquet, to the nanosecond."""
    import pyarrow

    monkeypatch.chdir(folder)
    nano = np.array([1_700_000_000_123_456_789, -1_000], "i8")
    want = ["2023-11-14T22:13:20.123456789", "1969-12-31T23:59:59.999999"]
    path = ["b.png", "a.jpg"]
    for times in (nano.view("M8[ns]"), list(nano.view("M8[ns]")), pyarrow.array(nano.view("M8[ns]"))):
        table = {"path": path, "t": times}
        table = table if not isinstance(times, pyarrow.Array) else pyarrow.table(table)
        assert listed(table=table)[1] == {"t": want}
    days = np.array(["2024-01-02", "NaT"], "M8[D]")
    lasts = np.array([1_500, "NaT"], "m8[ms]")
    assert listed(table={"path": path, "d": days, "l": lasts})[1] == {
        "d": ["2024-01-02", None],
        "l": ["0:00:01.500000", None],
    }


def test_cells_that_cannot_be_kept(folder, monkeypatch):
    """A cell that no column can hold is refused with its row and its column."""
    monkeypatch.chdir(folder)
    loop = []
    loop.append(loop)
    for cell, message in (
        (b"1", "holds a cell of type bytes"),
        ("\ud800", "not valid text"),
        (loop, "nested too deeply"),
    ):
        with pytest.raises(UsageError, match=f"table in memory, row 2: column 'x' .*{message}"):
            listed(table={"path": ["b.png", "a.jpg"], "x": [None, cell]})


def test_small_files_that_claim_much(folder):
    """A Parquet whose rows are larger than a row may be is refused before it is read; so is a path that repeats."""
    import pyarrow

    nulls = pyarrow.ListArray.from_arrays([0, 20_000_000], pyarrow.nulls(20_000_000, pyarrow.int8()))
    (folder / "nulls.parquet").write_bytes(as_parquet({"path": ["b.png"], "x": nulls}))
    with pytest.raises(UsageError, match=r"^table '[^']*nulls.parquet': its rows have 80,000,\d* bytes each, more"):
        listed(table=folder / "nulls.parquet")
    repeated = pyarrow.table({"path": pyarrow.RunEndEncodedArray.from_arrays([2_000_000_000], ["b.png"])})
    with pyarrow.ipc.new_file(folder / "runs.arrow", repeated.schema) as writer:
        writer.write_table(repeated)
    with pytest.raises(UsageError, match=r"row 2: it names 'b.png', as row 1 does"):
        listed(table=folder / "runs.arrow")


def test_values_that_python_lacks(folder, monkeypatch):
    """A value that Python cannot hold, such as a time in a far year, is refused with its column."""
    import pyarrow

    monkeypatch.chdir(folder)
    far = pyarrow.table({"path": ["b.png"], "t": pyarrow.array([1 << 62], "int64").cast(pyarrow.timestamp("s"))})
    with pyarrow.ipc.new_file(folder / "far.arrow", far.schema) as writer:
        writer.write_table(far)
    for table, called in (("far.arrow", "table 'far.arrow'"), (far, "table in memory")):
        with pytest.raises(UsageError, match=f"^{called}: column 't' cannot be read: "):
            listed(table=table)
