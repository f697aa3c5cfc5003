"""Measure what a row costs before the first image is read: peak memory, and seconds, of a list and of a folder.

    python benchmarks/rows.py --urls 10000000 --files 1000000

A child process lists the images, makes the plan, and begins or resumes the dump, up to the event `start`. Then it ends.
A run of ten rows is subtracted, so that what remains is due to the rows. `open` is a process that reads the keys of the
dump and finds a row by its key. Files are empty, and nothing is fetched.
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
    least, begun = (child("read", str(folder / f"dump of {n}")) for n in (FEW, count))
    return good & measured(f"{what}: open", count, begun, least)


def listed(path, count):
    other = path.with_name(f"{path.name} from the end")
    write_list(path, range(count), "memory://bucket/")
    write_list(other, reversed(range(count)), "memory://bucket/")
    same = {"files_from": str(path)}
    return {"begin": same, "resume": same, "resume in another order": {"files_from": str(other)}}


def in_folder(path, count):
    make_files(path, count)
    same = {"inputs": [str(path)]}
    return {"begin": same, "resume": same}


INPUTS = {"urls": listed, "files": in_folder}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--urls", type=int, default=1_000_000, help="URLs of a list")
    parser.add_argument("--files", type=int, default=100_000, help="files in folders")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, *args = chosen.child
        {"extract": extract, "read": read_keys}[kind](*map(json.loads, args))
        return
    good = True
    for name, options_of in INPUTS.items():
        count = getattr(chosen, name)
        with tempfile.TemporaryDirectory() as folder:
            good &= count <= FEW or try_input(name, count, options_of, Path(folder))
    sys.exit(0 if good else f"a row takes more than {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
