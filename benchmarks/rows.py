"""Measure what a row costs before the first image is read: peak memory, and seconds, of a list, a table and a folder.

    python benchmarks/rows.py --urls 10000000 --table 10000000 --files 1000000

A child process lists the images, makes the plan, and begins or resumes the dump, up to the event `start`. Then it ends.
A run of ten rows is subtracted, so that what remains is due to the rows. `open` is a process that reads the keys of the
dump and finds a row by its key, and `columns` one that reads three columns. Files are empty, and nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW = 10
MOST_BYTES = 400  # that a row may take


def name_of(row):
    """Return a key of about 60 bytes. The names are in no order, as those of most lists."""
    return f"images/{row * 7919 % 1000:03d}/{row * 2654435761 % 2**32:08x}/a-photograph-of-something-{row:09d}.jpg"


def write_table(path, rows, begin):
    """Write four columns beside the paths: few classes, few splits, a number, and a text of its own for each row."""
    with path.open("w") as file:
        file.write("path,label,split,score,caption\n")
        file.writelines(
            f"{begin}{name_of(row)},class {row % 1000},{'train' if row % 10 else 'val'},{row % 997 / 8},picture {row}\n"
            for row in rows
        )


def write_list(path, rows, begin):
    with path.open("w") as file:
        file.writelines(f"{begin}{name_of(row)}\n" for row in rows)


def make_files(folder, count):
    for row in range(count):
        path = folder / f"{row % 1000:03d}" / f"a-photograph-of-something-in-the-world-{row:012d}.jpg"
        if row < 1000:
            path.parent.mkdir(parents=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def extract(options, dump):
    """Begin or resume a dump, print the peak and the seconds, and end before the first image is read."""
    import featcli

    began = time.perf_counter()

    def report(kind, **facts):
        if kind == "start":
            say(began)

    featcli.extract(
        **options, output=dump, checkpoint="test_resnet", random_init=True, image_size=32, pool="avg", report=report,
        batch_size=64, threads=1, decode_threads=1, layout="channels-first", fold=False, device="cpu",
    )  # fmt: skip


def read_keys(dump):
    """Read all keys of a dump, and find the row of one by its key. The dump is not complete."""
    import featcli

    began = time.perf_counter()
    reader = featcli.open_dump(dump, incomplete=True)
    assert reader.rows[reader.keys[len(reader) // 2]] == len(reader) // 2
    say(began)


def read_columns(dump):
    """Read three columns of a dump, and choose rows by them. The dump is not complete."""
    import featcli

    began = time.perf_counter()
    reader = featcli.open_dump(dump, incomplete=True)
    assert reader.columns["score"].dtype == "float64"
    assert len(reader.where(label="class 3", split="val")) <= len(reader)
    say(began)


def say(began):
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": seconds}), flush=True)
    os._exit(0)


def child(kind, *args):
    command = [sys.executable, __file__, "--child", kind, *map(json.dumps, args)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(what, count, begun, least):
    """Print what the rows cost beyond those of the least run."""
    rows = count - FEW
    each, seconds = (begun["peak"] - least["peak"]) / rows, begun["seconds"] - least["seconds"]
    print(f"{what:<44} {count:>11,} rows {each:7.0f} bytes a row {seconds:8.1f} s", flush=True)
    return each <= MOST_BYTES


def try_input(what, count, options_of, folder):
    """Measure a first run, resumed ones, and reading. `options_of` prepares runs of so many rows."""
    good = True
    few, many = (options_of(folder / f"{what} {n}", n) for n in (FEW, count))
    for name in few:
        runs = (few[name], FEW), (many[name], count)
        least, begun = (child("extract", one, str(folder / f"dump of {n}")) for one, n in runs)
        good &= measured(f"{what}: {name}", count, begun, least)
    for kind in ("open", *(["columns"] if what == "table" else [])):
        least, begun = (child(kind, str(folder / f"dump of {n}")) for n in (FEW, count))
        good &= measured(f"{what}: {kind}", count, begun, least)
    return good


def listed(path, count):
    other = path.with_name(f"{path.name} from the end")
    write_list(path, range(count), "memory://bucket/")
    write_list(other, reversed(range(count)), "memory://bucket/")
    same = {"files_from": str(path)}
    return {"begin": same, "resume": same, "resume in another order": {"files_from": str(other)}}


def in_table(path, count):
    path, other = path.with_suffix(".csv"), path.with_suffix(".other.csv")
    write_table(path, range(count), "memory://bucket/")
    write_table(other, reversed(range(count)), "memory://bucket/")
    same = {"table": str(path)}
    return {"begin": same, "resume": same, "resume in another order": {"table": str(other)}}


def in_folder(path, count):
    make_files(path, count)
    same = {"inputs": [str(path)]}
    return {"begin": same, "resume": same}


INPUTS = {"urls": listed, "table": in_table, "files": in_folder}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--urls", type=int, default=1_000_000, help="URLs of a list")
    parser.add_argument("--table", type=int, default=1_000_000, help="URLs of a CSV with four other columns")
    parser.add_argument("--files", type=int, default=100_000, help="files in folders")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, *args = chosen.child
        {"extract": extract, "open": read_keys, "columns": read_columns}[kind](*map(json.loads, args))
        return
    good = True
    for name, options_of in INPUTS.items():
        count = getattr(chosen, name)
        with tempfile.TemporaryDirectory() as folder:
            good &= count <= FEW or try_input(name, count, options_of, Path(folder))
    sys.exit(0 if good else f"a row takes more than {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
