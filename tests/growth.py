"""Let a folder grow and kill every run that follows it: `python tests/growth.py`, which `make torture` runs, too.

Each command is a forked process that meets SIGKILL at a random moment, until one ends. Pictures come between the
commands, also while a generation is unfinished. Nothing that was committed may change, readers see a dump that is whole
all the time, and in the end all rows are those of fresh dumps of each generation's images.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

from conftest import draw, tree

OPTIONS: dict[str, Any] = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "out_indices": "1,-1"}
OPTIONS |= {
    "threads": 1,
    "decode_threads": 1,
    "batch_size": 2,
    "shard_size": 4,
    "layout": "channels-last",
    "fold": True,
}


def grown(folder: Path, format_name: str, times: int, most: int, seconds: float, seed: int) -> list[str]:
    """Let a dump grow this often, by up to `most` pictures at a time. Returns what is wrong.

    A run that is killed lives up to `seconds`, and longer with each that is.
    """
    photos, dump, chance = folder / "photos", folder / "dump", random.Random(seed)
    wrong: list[str] = []
    committed: dict[str, bytes] = {}
    ended = Counter[str]()
    while ended["grown"] < times:
        for _ in range(chance.randint(1, most)):
            number = len(list(photos.glob("*"))) if photos.exists() else 0
            draw(photos / f"{chance.randrange(16**6):06x} {number}.png", number, (32, 40))
        if chance.random() < 0.2:
            next(iter(sorted(photos.iterdir(), key=lambda path: -path.stat().st_mtime_ns))).write_bytes(b"broken")
        life = seconds
        while (code := _run(photos, dump, format_name, chance.uniform(0.05, life))) == -signal.SIGKILL:
            ended["killed"] += 1
            life *= 1.1  # on a slow machine, one has to end
            wrong += _seen(dump, committed)
            if chance.random() < 0.2:
                break  # pictures come before the next run
        if code not in (0, 3, 9, -signal.SIGKILL):  # 9 if all pictures are broken
            wrong.append(f"a run ended in {code}")
            break
        ended["grown"] += code != -signal.SIGKILL
        wrong += _seen(dump, committed)
        committed = {name: content for name, content in tree(dump).items() if name != "manifest.json"}
        if code == -signal.SIGKILL:
            committed = {name: content for name, content in committed.items() if name in _named(dump)}
    if not wrong:
        wrong += _compared(folder, photos, dump, format_name)
    print(
        f"{format_name}: {dict(ended)}, {len(_generations(dump))} generations, {'; '.join(wrong) or 'equal'}",
        flush=True,
    )
    return [f"{format_name}, seed {seed}: {text}" for text in wrong]


def _run(photos: Path, dump: Path, format_name: str, seconds: float) -> int:
    """Extract in a forked process, which is killed after so many seconds. Returns how it ended."""
    child = os.fork()
    if not child:
        code = 1
        try:
            import featcli

            code = featcli.extract(photos, output=dump, extend=True, **OPTIONS, format=format_name).exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _generations(dump: Path) -> list[Path]:
    """Return the folders of the generations that are part of the dump."""
    from featcli.dump.folder import Dump
    from featcli.dump.generations import generations_of

    root = Dump.existing(dump)
    return [] if root is None else [dump, *(one.path for one in generations_of(root))]


def _named(dump: Path) -> set[str]:
    """Return the files of the generations that are part of the dump."""
    if not (dump / "manifest.json").exists():
        return set()
    files = {path for folder in _generations(dump)[1:] for path in folder.rglob("*")}
    files |= {path for path in dump.rglob("*") if "more" not in path.relative_to(dump).parts}
    return {str(path.relative_to(dump)) for path in files if path.is_file()}


def _seen(dump: Path, committed: dict[str, bytes]) -> list[str]:
    """Say what is wrong with a dump after a run: files that changed, damage, a reader that sees less than before."""
    from featcli import open_dump
    from featcli.dump.verify import verify

    if not (dump / "plan.json").exists():
        return []
    now = tree(dump)
    wrong = [f"{name} changed" for name, content in committed.items() if now.get(name) != content]
    wrong += [f"verify found {verdict.damages}"] if (verdict := verify(dump)).damages else []
    if "manifest.json" in committed or (dump / "manifest.json").exists():
        with open_dump(dump) as found:
            keys = [key for path in _generations(dump) for key in _keys(path)]
            wrong += [] if found.keys == keys else ["readers see other keys"]
    return wrong


def _keys(path: Path) -> list[str]:
    from featcli.dump.folder import Dump

    return Dump.at(path).keys()


def _compared(folder: Path, photos: Path, dump: Path, format_name: str) -> list[str]:
    """Compare all rows with those of a fresh dump of each generation's images."""
    import featcli

    wrong, first = [], 0
    whole = featcli.open_dump(dump)
    if sorted(whole.keys) != sorted(path.name for path in photos.iterdir()):
        wrong.append("images are missing, or there twice")
    for number, path in enumerate(_generations(dump)):
        keys, below = _keys(path), folder / f"only {number}"
        below.mkdir()
        for key in keys:
            shutil.copy(photos / key, below / key)
        featcli.extract(below, output=folder / f"fresh {number}", **OPTIONS, format=format_name)
        fresh, rows = featcli.open_dump(folder / f"fresh {number}"), slice(first, first + len(keys))
        if fresh.keys != keys or (fresh.valid != whole.valid[rows]).any():
            wrong.append(f"generation {number} has other images")
        wrong += [
            f"{name} of generation {number} differs"
            for name in fresh.stages
            if fresh[name][:].tobytes() != whole[name][rows].tobytes()
        ]
        first += len(keys)
    return wrong


def main(formats: list[str], times: int = 10, most: int = 12, seconds: float = 0.5, seed: int = 0) -> list[str]:
    """Let a dump of each format grow. Returns what is wrong."""
    import timm  # noqa: F401  (before the forks, so that no child has to import it)
    import torch

    import featcli.extraction.extract  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = [grown(Path(scratch) / name, name, times, most, seconds, seed) for name in formats]
    return [text for of_one in found for text in of_one]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", choices=("hdf5", "safetensors"), nargs="+", default=["hdf5", "safetensors"])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--most", type=int, default=12, help="pictures that come at a time")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a run lives at most, if it is killed")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(1 if main(**vars(parser.parse_args())) else 0)
