"""Measure what commands cost before and after the images: imports, names, plans, lists, records, the end of a process.

    python benchmarks/start.py --before ../older-tree --rounds 5

Each command is a process of its own, and commands run in turn. `imports` is the share of the time that Python's own
`-X importtime` counts. `extract` is taken apart by its JSON events: `found` is when the images and the checkpoint are
known, `loaded` when its weights are, `start` when the first image may begin, and `end` comes after the manifest. With
--before the same commands run with the package of an older tree, too, in turn, and ratios stand in the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from host import described
from photographs import SMALL, draw
from safetensors.torch import save_file
from shards import make

import featcli
from featcli.backbones.torchvision_operators import import_timm

FEW, ROWS, CLASSES = 10, 1000, 1000
NETWORKS = ("test_resnet", "resnet50", "vit_base_patch16_224")
HERE = Path(__file__).parent.parent
EVENTS = {"choice checkpoint": "found", "choice weights": "loaded", "start": "start", "end": "end"}


def run(words, tree, folder, *options):
    """Return the seconds of a command, of the processor alone, and until each event, and what it said on stderr.

    A run of many images ends at its start.
    """
    path = {**os.environ, "PYTHONPATH": str(tree)}
    before, began, events = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), {}
    command = [sys.executable, *options, "-m", "featcli", *map(str, words)]
    with (folder / "said").open("w") as said:  # a pipe would be full before anybody reads it
        process = subprocess.Popen(command, env=path, cwd=folder, stdout=subprocess.PIPE, stderr=said, text=True)
    if "extract" in words:
        for line in process.stdout:
            event = json.loads(line)
            name = EVENTS.get(" ".join(filter(None, (event["type"], event.get("name")))))
            if name is not None:
                events[name] = time.perf_counter() - began
            if name == "start" and event["images"] > FEW:
                process.kill()  # the images are not what is measured
    process.communicate()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    said = (folder / "said").read_text()
    assert process.returncode in (0, -9), said
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, **events}, said


def share_of_imports(words, tree, folder):
    """Return the share of a command's time that goes into imports."""
    taken, said = run(words, tree, folder, "-X", "importtime")
    lines = [line.split("|") for line in said.splitlines() if line.startswith("import time:") and "[us]" not in line]
    return sum(int(line[0].removeprefix("import time:")) for line in lines) / 1e6 / taken.get("start", taken["seconds"])


def make_names(folder, count):
    """Make a folder of so many pictures, which are links to one, and a list of their names."""
    picture = next(draw(folder / "one", 1, SMALL).iterdir())
    with (folder / "list").open("w") as file:
        for row in range(count):
            path = folder / "many" / f"class{row % CLASSES:04d}" / f"image{row:09d}.jpg"
            if row < CLASSES:
                path.parent.mkdir(parents=True)
            os.link(picture, path)
            file.write(f"{path.relative_to(folder)}\n")


def make_dumps(folder, names, gibibytes):
    """Make a dump of so many vectors in shards of 1,000, and dumps of maps that hold so many GiB."""
    options = {"checkpoint": "test_resnet", "random_init": True, "layout": "channels-first"}
    like = featcli.open_dump(featcli.extract(folder / "few", output=folder / "like", **options).dump).plan
    keys = [f"class{row % CLASSES:04d}/image{row:09d}.jpg" for row in range(names)]
    make(like, folder / "vectors", "hdf5", keys, ROWS, 1)
    maps = [f"{row:06d}.jpg" for row in range(gibibytes * 4 * 1024)]  # of 253 KiB
    make(like, folder / "maps", "hdf5", maps, 1024, 90)
    return folder / "vectors", folder / "maps"


def commands_in(folder, names, gibibytes):
    """Return the commands by what they are, each with its output where it has one."""
    draw(folder / "few", FEW, SMALL)
    make_names(folder, names)
    vectors, maps = make_dumps(folder, names, gibibytes)
    for name in NETWORKS:
        save_file(import_timm().create_model(name).state_dict(), folder / f"{name}.safetensors")
    extract = ["extract", "--json", "-o", folder / "out", "--overwrite"]
    found = {"--help": ["--help"], "models": ["models"], "inspect resnet50": ["inspect", "resnet50"]}
    for name in NETWORKS:
        weights = ["-c", folder / f"{name}.safetensors", "--arch", name]
        found[f"extract {FEW} images, {name}"] = [*extract, folder / "few", *weights]
    with_weights = ["-c", "test_resnet", "--random-init", "--layout", "channels-first", "--no-fold", "--no-compile"]
    found[f"extract {names:,} names of a list"] = [*extract, "--files-from", folder / "list", *with_weights]
    found[f"extract {names:,} files of a folder"] = [*extract, folder / "many", *with_weights]
    of = f"{names:,} rows in {names // ROWS:,} shards"
    found |= {f"{name} {of}": [name, vectors] for name in ("inspect", "verify", "finalize")}
    found[f"export {of}"] = ["export", vectors, "-o", folder / "out.npy", "--overwrite"]
    found[f"verify {gibibytes} GiB"] = ["verify", maps]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--gibibytes", type=int, default=1, help="of the maps that are verified")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="an older tree of featcli")
    parser.add_argument("--folder", type=Path, help="where there is room for files", default=Path("/dev/shm"))
    chosen = parser.parse_args()
    trees = {"after": HERE, **({"before": chosen.before.resolve()} if chosen.before else {})}
    print(f"{described()}, medians of {chosen.rounds}\n")
    print("| command | seconds | of the processor | imports | found | loaded | start | end | before |")
    print("|---|---|---|---|---|---|---|---|---|")
    scratch = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        for name, words in commands_in(scratch, chosen.names, chosen.gibibytes).items():
            times = {tree: [] for tree in trees}
            for _ in range(chosen.rounds + 1):  # the first puts files into memory and compiles modules
                for tree, path in trees.items():
                    times[tree].append(run(words, path, scratch)[0])
            median = {key: statistics.median(one[key] for one in times["after"][1:]) for key in times["after"][-1]}
            ratio = ""
            if chosen.before:
                pairs = zip(times["after"][1:], times["before"][1:], strict=True)
                ratio = f"{statistics.median(one['cpu'] / other['cpu'] for one, other in pairs):.2f}"
            phases = " | ".join(f"{median[phase]:.2f}" if phase in median else "" for phase in EVENTS.values())
            is_whole = "start" not in median or "end" in median
            imports = f"{share_of_imports(words, HERE, scratch):.0%}" if is_whole else ""
            print(
                f"| {name} | {median['seconds']:.2f} | {median['cpu']:.2f} | {imports} | {phases} | {ratio} |",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
