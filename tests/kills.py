"""Kill one run of one shard again and again: `python tests/kills.py`, which `make torture` runs, too.

Each try is a forked process that works at a fixed pace and meets SIGKILL at a random moment; the next one runs the same
command. A try loses what all tries so far have made and is not on the disk. That may be only the rows of the last
minute, which is shorter here, and those of the batches that were on their way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

from conftest import draw, tree

KINDS: dict[str, dict[str, Any]] = {
    "vectors": {"pool": "avg", "image_size": 32},
    "maps": {"out_indices": "1,-1", "image_size": 32},
    "native": {"fit": "native", "image_size": 64},
    "several": {"out_features": ["stage2", "stage4", "embedding"], "pool": ["none", "avg", "gem"], "image_size": 32},
}
FORMATS = ("hdf5", "safetensors")
BATCH = 2
IN_FLIGHT = 4  # batches: one at the backbone, one at the writer, two between them
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "threads": 1, "decode_threads": 1, "batch_size": BATCH}
OPTIONS |= {"layout": "channels-last", "fold": True}  # otherwise a trial may choose either way


@dataclass
class Kill:
    """The cost of one kill."""

    computed: int  # images, by that try
    lost: int  # rows that were made and are not on the disk
    allowed: int  # rows that a minute at this pace makes, and those of batches on their way


@dataclass
class Told:
    """The result of a shard after all of its kills."""

    title: str
    rows: int
    kills: list[Kill] = field(default_factory=list)
    computed: int = 0  # images, by all tries
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lost = sorted(kill.lost for kill in self.kills) or [0]
        of_all = f"{self.rows:5} | {len(self.kills):5} | {self.computed:8} | {sum(lost):5}"
        of_one = f"{lost[len(lost) // 2]:6} | {lost[-1]:4}"
        return f"| {self.title:20} | {of_all} | {of_one} | {'; '.join(self.wrong) or 'equal'} |"


HEADER = "| shard                |  rows | kills | computed |  lost | median | most | bytes |\n" + 8 * "|---" + "|"


def killed(
    folder: Path, kind: str, format_name: str, kills: int, seconds: float, pace: float, rows: int, longest: float
) -> Told:
    """Kill a run this often, let it end, and compare.

    `seconds` stand for the minute, `pace` is that of an image, and `longest` is the number of such minutes that a try
    may live.
    """
    told = Told(f"{kind}, {format_name}", rows)
    options = {**OPTIONS, **KINDS[kind], "format": format_name, "shard_size": rows}
    whole, dump, chance = folder / f"whole {told.title}", folder / told.title, random.Random(told.title)
    _wait(_begun(folder, whole, options, 0.0, 1e9))
    safe = 0
    while len(told.kills) < kills:
        _told_by(dump).unlink(missing_ok=True)
        child = _begun(folder, dump, options, pace, seconds)
        while not any(kind_ == "batch" for _, kind_, _ in _events(dump)):  # it has begun
            time.sleep(0.05)
        time.sleep(chance.uniform(0.2, longest) * seconds)
        os.kill(child, signal.SIGKILL)
        if _wait(child) != -signal.SIGKILL:
            told.wrong.append(f"ended after {len(told.kills)} kills")
            break
        events = _events(dump)
        computed = sum(facts["images"] for _, kind_, facts in events if kind_ == "batch")
        had, safe = safe, _safe(dump)
        kill = Kill(computed, had + computed - safe, round(seconds / pace) + IN_FLIGHT * BATCH)
        told.kills.append(kill)
        told.computed += computed
        if kill.lost > kill.allowed or safe < had:
            told.wrong.append(f"kill {len(told.kills)}: {kill}, safe {had} -> {safe}")
    code = _wait(_begun(folder, dump, options, 0.0, seconds))
    told.computed += sum(facts["images"] for _, kind_, facts in _events(dump) if kind_ == "batch")
    if code not in (0, 3) or tree(dump) != tree(whole):
        told.wrong.append(f"the last run ended in {code}, or in other bytes")
    if hidden := [path.name for path in dump.rglob(".*")]:
        told.wrong.append(f"left: {hidden}")
    if told.computed != rows + sum(kill.lost for kill in told.kills):
        told.wrong.append("rows were made twice, or not at all")
    return told


def _begun(folder: Path, dump: Path, options: dict[str, Any], pace: float, seconds: float) -> int:
    """Return a forked process that extracts and notes its events beside the dump."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import featcli
        from featcli.pixels import batches
        from featcli.run import sink

        sink.KEEP_SECONDS = seconds
        read = batches.read_pixels

        def slow(*arguments: Any) -> Any:
            time.sleep(pace)
            return read(*arguments)

        batches.read_pixels = slow
        with open(_told_by(dump), "wb", buffering=0) as file:

            def report(kind: str, **facts: Any) -> None:
                if kind in ("batch", "kept", "resumed", "warning"):
                    file.write(f"{json.dumps([time.monotonic(), kind, facts])}\n".encode())

            code = featcli.extract(folder / "photos", output=dump, report=report, **options).exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _told_by(dump: Path) -> Path:
    return dump.with_name(f"events of {dump.name}")


def _events(dump: Path) -> list[Any]:
    """Return the events of the last try."""
    lines = _told_by(dump).read_text().splitlines() if _told_by(dump).exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def _safe(dump: Path) -> int:
    """Return the number of rows on the disk."""
    from featcli.dump.folder import Dump

    found = Dump.existing(dump)
    if found is None:
        return 0
    return sum(found.rows_kept().values()) + sum(len(found.plan.shard(one)) for one in found.numbered(".json"))


def main(
    kinds: Sequence[str] = tuple(KINDS),
    formats: Sequence[str] = FORMATS,
    kills: int = 100,
    seconds: float = 1.0,
    longest: float = 3.5,
    pace: float = 0.04,
    rows: int = 4000,
) -> list[str]:
    """Kill a run of each kind and print a table. Returns what is wrong."""
    import timm  # noqa: F401  (before the forks, so that no child has to import it)

    import featcli.extraction.extract  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(rows):
            draw(folder / "photos" / f"{number:05d}.png", number, (32 + 8 * (number % 3), 40))
        (folder / "photos" / "00003.png").write_bytes(b"broken")
        cases = [(kind, name) for kind in kinds for name in formats]
        with ProcessPoolExecutor(len(cases), get_context("fork")) as pool:
            how = {"kills": kills, "seconds": seconds, "longest": longest, "pace": pace, "rows": rows}
            found = list(pool.map(partial(killed, folder, **how), *zip(*cases, strict=True)))
    print(HEADER, *found, sep="\n", flush=True)
    return [f"{told.title}: {text}" for told in found for text in told.wrong]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", choices=KINDS, nargs="+")
    parser.add_argument("--formats", choices=FORMATS, nargs="+")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seconds", type=float, help="that stand for the minute")
    parser.add_argument("--longest", type=float, help="of those minutes, that a try is let live")
    parser.add_argument("--pace", type=float, help="seconds of an image")
    parser.add_argument("--rows", type=int)
    asked = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    sys.exit(1 if main(**asked) else 0)
