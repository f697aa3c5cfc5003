"""What takes too long for every run of the tests: `make torture`. Exits 1 where anything is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

import faults
import kills

import conftest  # noqa: F401  (lets timm be imported)

FUZZ = {"FUZZ_EXAMPLES": "2000", "FUZZ_IMAGES": "800"}  # of each test in test_fuzz.py, of each of 27 pictures


def main() -> int:
    """Every fault at every call that changes the disk, or reads, in both formats; a run that is killed a hundred times;
    then hostile dumps and pictures.
    """
    import timm  # noqa: F401  (before the forks: no child need import it)

    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for format_name in ("hdf5", "safetensors"):
            for links in (True, False):
                folder = Path(scratch) / f"{format_name}-{links}"
                for name, scene in faults.scenes(folder, format_name, links):
                    wrong += sweep(
                        scene, folder / f"swept {name}", f"{format_name}, {name}{'' if links else ', links refused'}"
                    )
            for links, locks in ((True, True), (False, True), (True, False), (False, False)):
                folder = Path(scratch) / f"{format_name}-keeps-{links}-{locks}"
                refused = f"{'' if links else ', links refused'}{'' if locks else ', locks refused'}"
                for name, scene in faults.keeping_scenes(folder, format_name, links, locks):
                    wrong += sweep(scene, folder / f"swept {name}", f"{format_name}, {name}{refused}")
            folder = Path(scratch) / f"{format_name}-reads"
            for name, scene in faults.reading_scenes(folder, format_name):
                wrong += sweep_reads(scene, folder / f"swept {name}", f"{format_name}, {name}")
    wrong += kills.main()
    print("\n".join(wrong), flush=True)
    here = Path(__file__).parent
    tests = [str(here / "test_fuzz.py"), str(here / "test_fuzz_images.py")]
    fuzzed = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", *tests], env={**os.environ, **FUZZ}, check=False
    )
    return 1 if wrong or fuzzed.returncode else 0


def sweep(scene: faults.Scene, folder: Path, title: str) -> list[str]:
    """Each fault at each call; what was lost."""
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
    """Each fault at each call that reads, while a dump is made and while it is verified; what was wrong."""
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
