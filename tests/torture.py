"""Every fault at every call that changes the disk, in both formats: `make torture`. Exits 1 where something is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use the threads of its parent

import faults

from conftest import draw, tree

IN_THE_KERNEL = "pwrite64,ftruncate"  # how HDF5's own code lays out a file, unseen by Python


def main() -> int:
    import timm  # noqa: F401  (before the forks: no child need import it)

    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        for i in range(5):
            draw(photos / f"{i}.png", i, (32, 32))
        for format_name in ("hdf5", "safetensors"):
            for links in (True, False):
                wrong += sweep(photos, Path(scratch) / f"{format_name}-{links}", format_name, links)
            if shutil.which("strace"):
                wrong += sweep_kernel(photos, Path(scratch) / f"{format_name}-kernel", format_name)
            else:
                print("  strace is not installed: no faults inside HDF5")
    print("\n".join(wrong))
    return 1 if wrong else 0


def sweep(photos: Path, folder: Path, format_name: str, links: bool) -> list[str]:
    """Each fault at each call that Python makes; what was lost."""
    folder.mkdir()
    whole = faults.run(photos, folder / "whole", format_name, links=links)
    expected = tree(folder / "whole")
    print(f"{format_name}{'' if links else ', links refused'}: {len(whole.calls)} calls, {dict(Counter(whole.calls))}")
    wrong = []
    for fault in faults.FAULTS:
        dumps = [folder / f"{fault}-{at}" for at in range(len(whole.calls))]
        found = [faults.survives(photos, expected, dump, format_name, fault, i, links) for i, dump in enumerate(dumps)]
        print(f"  {fault:<7} {found.count('')} of {len(found)} survived", flush=True)
        wrong += filter(None, found)
    return wrong


def sweep_kernel(photos: Path, folder: Path, format_name: str) -> list[str]:
    """Each fault at each system call in IN_THE_KERNEL; what was lost."""
    folder.mkdir()
    _, trace = traced(photos, folder / "whole", format_name, f"trace={IN_THE_KERNEL}")
    expected = tree(folder / "whole")
    by_thread = Counter(re.findall(r"^(\d+) +\w+\(", trace, re.MULTILINE))
    print(f"{format_name}, in the kernel: {sum(by_thread.values())} calls of {IN_THE_KERNEL}")
    wrong = []
    for fault, effect in {"kill": "signal=SIGKILL", "ENOSPC": "error=ENOSPC", "EIO": "error=EIO"}.items():
        found = []
        for at in range(1, max(by_thread.values()) + 1):  # strace counts the calls of each thread by themselves
            dump, where = folder / f"{fault}-{at}", f"{format_name}, {fault} at system call {at}"
            code, _ = traced(photos, dump, format_name, f"inject={IN_THE_KERNEL}:{effect}:when={at}")
            right = code == (-9 if fault == "kill" else 7)
            lost = faults.recovers(photos, expected, dump, format_name, where, fault == "kill")
            found.append(lost if right else f"{where}: ended in {code}")
        print(f"  {fault:<7} {found.count('')} of {len(found)} survived", flush=True)
        wrong += filter(None, found)
    return wrong


def traced(photos: Path, dump: Path, format_name: str, expression: str) -> tuple[int, str]:
    """Extract in a forked child under strace: its exit code (-9: killed) and the trace."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            code = faults.extract_quietly(photos, dump, format_name)
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    with tempfile.NamedTemporaryFile("r", suffix=".trace") as trace:
        command = ["strace", "-f", "-o", trace.name, "-e", expression, "-p", str(child)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert "attached" in strace.stderr.readline()
            os.kill(child, signal.SIGCONT)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, trace.read()


if __name__ == "__main__":
    sys.exit(main())
