"""Every fault at every call that changes the disk, in both formats: `make torture`. Exits 1 where something is lost."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

import faults

from conftest import draw, tree


def main() -> int:
    import timm  # noqa: F401  (before the forks: no child need import it)

    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        for i in range(5):
            draw(photos / f"{i}.png", i, (32, 32))
        for format_name in ("hdf5", "safetensors"):
            whole = faults.run(photos, Path(scratch) / format_name, format_name)
            expected = tree(Path(scratch) / format_name)
            print(f"{format_name}: {len(whole.calls)} calls, {dict(Counter(whole.calls))}")
            for fault in faults.FAULTS:
                lost = []
                for at in range(len(whole.calls)):
                    dump = Path(scratch) / f"{format_name}-{fault}-{at}"
                    lost.append(faults.survives(photos, expected, dump, format_name, fault, at))
                print(f"  {fault:<7} {lost.count('')} of {len(lost)} survived", flush=True)
                wrong += filter(None, lost)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
