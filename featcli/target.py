"""The folder that `-o` names, before a dump is in it and when one goes: what may be written, and what deleted."""

from __future__ import annotations

import os
from pathlib import Path

from featcli.dump import FAILURES, IMAGES, MANIFEST, OURS, PLAN, SHARDS
from featcli.errors import ConflictError, MachineError, shown
from featcli.writers.publish import PARTIAL, disk_errors


def check_target(path: Path, overwrite: bool) -> None:
    """Whether a dump may come to be at `path`; looks only. Raises ConflictError and MachineError."""
    if path.exists() and not path.is_dir():
        raise ConflictError(f"dump {shown(path)}: there is a file of that name", "use another -o")
    foreign = {name for name in os.listdir(path) if not name.endswith(PARTIAL)} if path.is_dir() else set()
    if not (path / PLAN).exists() and foreign - {IMAGES, SHARDS}:
        raise ConflictError(
            f"dump {shown(path)}: the folder holds other files and no plan.json",
            "use another -o: featcli only writes into an empty folder or a dump of its own",
        )
    folder = existing_parent(path)
    probe = folder / f".featcli-probe-{os.getpid()}{PARTIAL}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"dump {shown(path)}: cannot write in {shown(folder)}: {error.strerror}", "use another -o"
        ) from error


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return path if path.exists() else existing_parent(path.parent)


def stored_bytes(path: Path) -> int:
    """Bytes of the shard files in a folder, whatever state the dump is in."""
    return sum(file.stat().st_size for file in (path / SHARDS).glob("*") if OURS.fullmatch(file.name))


def remove_dump(path: Path) -> None:
    """Delete the files of a dump, and nothing else; the plan last, so that a dump cut short is still known as one."""
    with disk_errors(path):
        if not (path / PLAN).exists():
            return
        (path / MANIFEST).unlink(missing_ok=True)
        for file in [*(path / SHARDS).iterdir()] if (path / SHARDS).is_dir() else []:
            if OURS.fullmatch(file.name):
                file.unlink()
        for name in (FAILURES, IMAGES, PLAN):
            (path / name).unlink(missing_ok=True)
