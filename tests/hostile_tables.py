"""Read damaged and hostile tables in processes of their own, for `make torture`, and count what does not end well.

A table is to be listed, or refused by a FeatcliError, and never to take more than MOST bytes of memory.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MOST = 1536 << 20  # bytes of memory that one table may take
LIMIT = 24 << 30  # bytes of addresses of a process: libraries reserve more than they use
AT_ONCE = 2000  # damaged tables for one process
TOKENS = (b'"', b",", b"\n", b"\r", b"\t", b";", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"[" * 3000, b"}", b"1" * 5000)
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def main(examples: int = 40_000, seed: int = 0) -> list[str]:
    """Read all tables, and return what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in bombs():
            wrong += _child(Path(scratch), "bomb", name, 0, 1)[1]
        print(f"hostile tables: {len(wrong)} of {len(bombs())} ended badly", flush=True)
        first, crashed = 0, []
        while first < examples:
            done, bad = _child(Path(scratch), "damage", str(seed), first, min(examples, first + AT_ONCE))
            first, crashed = done, crashed + bad
        print(f"damaged tables: {len(crashed)} of {examples} ended badly", flush=True)
    return wrong + crashed


def _child(folder: Path, kind: str, what: str, first: int, end: int) -> tuple[int, list[str]]:
    """Read some tables in a process. Returns the number of the next one, and what went wrong."""
    command = [sys.executable, __file__, str(folder), kind, what, str(first), str(end)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    wrong = [line for line in ran.stdout.splitlines() if line.startswith("wrong: ")]
    if ran.returncode == 0:
        return end, wrong
    at = int((folder / "at").read_text() or first) if (folder / "at").exists() else first
    return at + 1, [*wrong, f"wrong: {kind} {what} {at}: exit code {ran.returncode}: {ran.stderr[-300:]}"]


def damaged(random_source: random.Random, content: bytes, other: bytes) -> bytes:
    """Return a table with some damage."""
    found = bytearray(content)
    for _ in range(random_source.randint(1, 4)):
        at, way = random_source.randint(0, max(0, len(found) - 1)), random_source.randrange(7)
        if way == 0 and found:
            found[at] ^= 1 << random_source.randrange(8)
        elif way == 1:
            del found[at : at + random_source.randint(1, 40)]
        elif way == 2:
            found[at:at] = random_source.choice(TOKENS)
        elif way == 3:
            size = random_source.choice((1, 2, 4, 8))
            number = random_source.choice(EXTREMES) & ((1 << 8 * size) - 1)
            found[at : at + size] = number.to_bytes(size, "little")
        elif way == 4:
            begin = random_source.randint(0, len(other))
            found[at : at + random_source.randint(0, 20)] = other[begin : begin + random_source.randint(1, 60)]
        elif way == 5:
            found[at:at] = found[at : at + random_source.randint(1, 60)]
        elif random_source.random() < 0.2:
            del found[at:]
    return bytes(found)


def seeds() -> dict[str, bytes]:
    """Return whole tables of every format and type by the suffix of their files, with numbers before it."""
    import pyarrow
    from pyarrow import parquet
    from test_real_tables import REAL
    from test_sidecars import SHARD
    from test_tables import FORMATS
    from test_tars import packed

    found = dict(FORMATS)
    found |= {f"{number}-{real.file}": real.content for number, real in enumerate(REAL.values())}
    path = pyarrow.array(["b.png", "sub/a.png", "c.png"])
    numbers = pyarrow.array([1, None, 2_000_000_001])
    text = pyarrow.array(["x" * 40, None, "y"])
    columns = {
        "ns": numbers.cast(pyarrow.timestamp("ns")),
        "tz": numbers.cast(pyarrow.timestamp("us", "Europe/Berlin")),
        "lasts": numbers.cast(pyarrow.duration("ns")),
        "date": pyarrow.array([1, None, 2], pyarrow.int32()).cast(pyarrow.date32()),
        "dictionary": text.dictionary_encode(),
        "view": text.cast(pyarrow.string_view()),
        "large": text.cast(pyarrow.large_string()),
        "list": pyarrow.array([[1, 2], None, []]),
        "fixed": pyarrow.array([[1, 2], None, [3, 4]], pyarrow.list_(pyarrow.int64(), 2)),
        "struct": pyarrow.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
        "map": pyarrow.array([[("k", 1)], None, []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "decimal": pyarrow.array([1, None, 2]).cast(pyarrow.decimal128(20, 0)),
        "half": pyarrow.array([0.5, None, 2], pyarrow.float32()).cast(pyarrow.float16()),
        "uuid": pyarrow.array([bytes(16), None, bytes(range(16))], pyarrow.uuid()),
        "null": pyarrow.nulls(3),
        "bool": pyarrow.array([True, None, False]),
    }
    of_arrow = {
        "runs": pyarrow.RunEndEncodedArray.from_arrays([2, 3], [5, 6]),
        "union": pyarrow.UnionArray.from_sparse(pyarrow.array([0, 1, 0], pyarrow.int8()), [numbers, text]),
        "dense": pyarrow.UnionArray.from_dense(
            pyarrow.array([0, 1, 0], pyarrow.int8()), pyarrow.array([0, 0, 1], pyarrow.int32()), [numbers, text]
        ),
        "listview": pyarrow.array([[1], None, [2, 3]], pyarrow.list_view(pyarrow.int64())),
    }
    for name, column in {**columns, **of_arrow}.items():
        table, file = pyarrow.table({"path": path, name: column}), io.BytesIO()
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd" if len(name) % 2 else None)
        with pyarrow.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
        found[f"{name}.arrow"] = file.getvalue()
        if name in columns:
            for version, compression in (("1.0", "none"), ("2.0", "snappy")):
                file = io.BytesIO()
                parquet.write_table(table, file, data_page_version=version, compression=compression)
                found[f"{name}-{version}.parquet"] = file.getvalue()
    with tempfile.TemporaryDirectory() as scratch:
        found["shard.tar"] = packed(Path(scratch) / "shard.tar", SHARD).read_bytes()
    return found


def bombs() -> dict[str, Callable[[Path], Path]]:
    """Return what writes hostile tables, by name."""

    def text(name: str, *pieces: bytes) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            with open(folder / name, "wb") as file:
                file.writelines(pieces)
            return folder / name

        return write

    def typed(name: str, make: Callable[[], object], **options: object) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            import pyarrow
            from pyarrow import parquet

            made = pyarrow.table(make())
            if name.endswith("parquet"):
                parquet.write_table(made, folder / name, compression="zstd", **options)
            else:
                with pyarrow.ipc.new_file(folder / name, made.schema) as writer:
                    writer.write_table(made)
            return folder / name

        return write

    def nulls(count: int) -> object:
        import pyarrow

        return pyarrow.ListArray.from_arrays([0, count], pyarrow.nulls(count, pyarrow.int8()))

    def runs() -> object:
        import pyarrow

        return pyarrow.RunEndEncodedArray.from_arrays([2_000_000_000], ["b.png"])

    def encrypted(folder: Path) -> Path:
        whole = typed("e.parquet", lambda: {"path": ["b.png"]})(folder).read_bytes()
        (folder / "e.parquet").write_bytes(b"PARE" + whole[4:-4] + b"PARE")
        return folder / "e.parquet"

    big = b"x" * (1 << 20)
    return {
        "a line without end": text("t.csv", b"path\n", *[big] * 200),
        "a quoted cell without end": text("t.csv", b'path\n"', *[big + b"\n"] * 200),
        "a million columns": text("t.csv", b"path," * 1_000_000, b"\n"),
        "ten thousand columns": text(
            "t.csv", ",".join(["path", *(f"c{i}" for i in range(9_999))]).encode() + b"\n",
            *[b"b.png" + b",a" * 9_999 + b"\n"] * 500,
        ),
        "lists in a line": text("t.jsonl", b'{"path": "b.png", "x": [', b"[]," * 5_000_000, b"[]]}\n"),
        "objects in a line": text("t.jsonl", b'{"path": "b.png", "x": [', b'{"a":1},' * 2_000_000, b"1]}\n"),
        "fields in a line": text(
            "t.jsonl", b'{"path": "b.png"', *(f',"{i:07d}":0'.encode() for i in range(1_200_000)), b"}\n"
        ),
        "fields of many lines": text(
            "t.jsonl", *(json.dumps({"path": "b.png", f"c{i}": 1}).encode() + b"\n" for i in range(20_000))
        ),
        "digits": text("t.jsonl", b'{"path": "b.png", "x": ', b"9" * 10_000_000, b"}\n"),
        "nested": text("t.jsonl", b'{"path": "b.png", "x": ', b'{"a":' * 2_000_000, b"\n"),
        "a huge cell": typed("t.parquet", lambda: {"path": ["b.png"], "x": ["x" * 900_000_000]}),
        "a huge cell twice": typed("t.parquet", lambda: {"path": ["b.png", "a.png"], "x": ["x" * 400_000_000, None]}),
        "one large cell many times": typed(
            "t.parquet", lambda: {"path": [*map(str, range(8000))], "x": ["x" * (1 << 20)] * 999 + [""] * 7001}
        ),
        "a list of missing values": typed("t.parquet", lambda: {"path": ["b.png"], "x": nulls(400_000_000)}),
        "a path many times": typed("t.parquet", lambda: {"path": ["b.png"] * 30_000_000}),
        "two billion rows": typed("t.arrow", lambda: {"path": runs()}),
        "encrypted": encrypted,
    }  # fmt: skip


def _listed(path: Path) -> None:
    from featcli.inputs.columns import listed_columns
    from featcli.inputs.listing import find
    from featcli.spec.groups import InputSpec

    listing = find(InputSpec([str(path)]) if path.suffix == ".tar" else InputSpec(table=path))
    columns = listed_columns(listing.images, listing.leads)
    for _ in () if columns is None else columns.lines():
        pass


def _read(folder: Path, kind: str, what: str, first: int, end: int) -> None:
    """Read the tables of a process, and print what goes wrong."""
    from featcli.errors import FeatcliError

    whole = [] if kind == "bomb" else sorted(seeds().items())
    for name in ("b.png", "c.png", "a.jpg", "sub/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    os.chdir(folder)
    if kind == "bomb":
        path = _made(folder, what)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for at in range(first, end):
        (folder / "at").write_text(str(at))
        if kind != "bomb":
            source = random.Random(f"{what} {at}")
            name, content = source.choice(whole)
            path = folder / f"damaged{Path(name).suffix}"
            path.write_bytes(damaged(source, content, source.choice(whole)[1]))
        before = _most_memory(anew=True)
        said = ""
        try:
            _listed(path)
        except FeatcliError as error:
            said = "" if error.hint and "\n" not in error.message else f"no one line and hint: {error.message!r:.200}"
            if kind == "bomb":
                print(f"refused: {error.message:.200}")
        except BaseException as error:  # whatever it is, it ends here and is told
            said = f"{type(error).__name__}: {error!s:.200}"
        rise = _most_memory() - before
        if kind == "bomb":
            print(f"took {rise >> 20} MiB")
        if said or rise > MOST:
            print(f"wrong: {kind} {what} {at} ({path.name}): {said or f'{rise >> 20} MiB'}", flush=True)


def _most_memory(anew: bool = False) -> int:
    """Return the most bytes of memory that this process has had, from now on if it is to count anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _made(folder: Path, what: str) -> Path:
    """Write a hostile table in a child, because what it takes must not count."""
    child = os.fork()
    if child == 0:
        bombs()[what](folder)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{what} could not be made")
    names = ("t.csv", "t.jsonl", "t.parquet", "t.arrow", "e.parquet")
    return max((folder / name for name in names if (folder / name).exists()), key=lambda path: path.stat().st_mtime_ns)


if __name__ == "__main__":
    _read(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
