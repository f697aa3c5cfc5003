"""Run what takes too long for every run of the tests: `make torture`. Exits with 1 if anything is lost."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

import faults
import growth
import hostile_tables
import kills

import conftest  # noqa: F401  (lets timm be imported)

FUZZ = {"FUZZ_EXAMPLES": "2000", "FUZZ_IMAGES": "800"}  # of each test in test_fuzz.py; of each of 27 pictures


PARTS = ("writes", "keeps", "grows", "reads", "kills", "tables", "fuzz")


def main(arguments: list[str] | None = None) -> int:
    """Run all long tests, and return the exit code.

    Each fault meets each call that changes the disk or reads, in both formats; runs are killed while a folder grows;
    a run of one shard is killed a hundred times; then come hostile tables, dumps and pictures.
    """
    import timm  # noqa: F401  (before the forks, so that no child has to import it)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", choices=kills.FORMATS, nargs="+", default=kills.FORMATS)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="of the work; all by default")
    chosen = parser.parse_args(arguments)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for format_name in chosen.formats:
            folder = Path(scratch) / format_name
            if "writes" in chosen.parts:
                wrong += writes(folder, format_name)
            if "keeps" in chosen.parts:
                wrong += keeps(folder, format_name)
            if "grows" in chosen.parts:
                wrong += grows(folder, format_name)
            for name, scene in faults.reading_scenes(folder / "reads", format_name) if "reads" in chosen.parts else ():
                wrong += sweep_reads(scene, folder / "reads" / f"swept {name}", f"{format_name}, {name}")
    if "grows" in chosen.parts:
        wrong += growth.main(chosen.formats)
    if "kills" in chosen.parts:
        wrong += kills.main(formats=chosen.formats)
    if "tables" in chosen.parts:
        wrong += hostile_tables.main()
    print("\n".join(wrong), flush=True)
    return 1 if wrong or ("fuzz" in chosen.parts and fuzz()) else 0


def writes(folder: Path, format_name: str) -> list[str]:
    """Make whole shards, with hard links and without. Returns what was lost."""
    wrong = []
    for links in (True, False):
        for name, scene in faults.scenes(folder / f"links {links}", format_name, links):
            title = f"{format_name}, {name}{'' if links else ', links refused'}"
            wrong += sweep(scene, folder / f"links {links}" / f"swept {name}", title)
    return wrong


def keeps(folder: Path, format_name: str) -> list[str]:
    """Make unfinished shards, with hard links and locks and without. Returns what was lost."""
    wrong = []
    for links, locks in ((True, True), (False, True), (True, False), (False, False)):
        refused = f"{'' if links else ', links refused'}{'' if locks else ', locks refused'}"
        below = folder / f"keeps {links} {locks}"
        for name, scene in faults.keeping_scenes(below, format_name, links, locks):
            wrong += sweep(scene, below / f"swept {name}", f"{format_name}, {name}{refused}")
    return wrong


def grows(folder: Path, format_name: str) -> list[str]:
    """Extend a dump, with hard links and without, and mend one that grew. Returns what was lost."""
    wrong = []
    for links in (True, False):
        below = folder / f"grows {links}"
        scenes = [*faults.growing_scenes(below, format_name, links)]
        scenes += [*faults.grown_scenes(below / "grown", format_name)] if links else []
        for name, scene in scenes:
            title = f"{format_name}, grows: {name}{'' if links else ', links refused'}"
            wrong += sweep(scene, below / f"swept {name}", title)
    return wrong


def fuzz() -> int:
    """Read hostile dumps and pictures. Returns the exit code of the tests."""
    here = Path(__file__).parent
    tests = [str(here / "test_fuzz.py"), str(here / "test_fuzz_images.py")]
    command = [sys.executable, "-m", "pytest", "-n", "2", *tests]
    return subprocess.run(command, env={**os.environ, **FUZZ}, check=False).returncode


def sweep(scene: faults.Scene, folder: Path, title: str) -> list[str]:
    """Try each fault at each call. Returns what was lost."""
    folder.mkdir(parents=True)
    scene.rehearse(folder / "whole")
    print(f"{title}: {len(scene.calls)} calls, {dict(Counter(scene.calls))}")
    wrong = []
    for fault in faults.FAULTS:
        found = [scene.survives(folder / f"{fault}-{at}", fault, at) for at in range(len(scene.calls))]
        print(f"  {fault:<7} {found.count('')} of {len(found)} survived", flush=True)
        wrong += filter(None, found)
    return wrong


def sweep_reads(scene: faults.Scene, folder: Path, title: str) -> list[str]:
    """Try each fault at each call that reads, while a dump is made and while it is verified. Returns what was wrong."""
    folder.mkdir(parents=True)
    scene.rehearse(folder / "whole", faults.READS)
    print(f"{title}: {len(scene.calls)} reads, {dict(Counter(scene.calls))}")
    checked = len(faults.checks(folder / "whole")[0].calls)
    wrong = []
    for fault in faults.READ_FAULTS:
        found = [scene.survives_reading(folder / f"{fault}-{at}", fault, at) for at in range(len(scene.calls))]
        verified = [faults.checks(folder / "whole", fault, at)[1] for at in range(checked)]
        print(
            f"  {fault:<19} {found.count('')} of {len(found)} survived,"
            f" {verified.count('')} of {len(verified)} while it was verified",
            flush=True,
        )
        wrong += filter(None, [*found, *verified])
    return wrong


if __name__ == "__main__":
    sys.exit(main())
