"""What lies among the shards of a dump and is no part of it: copied there by mistake, or from the dump of another plan.

It is named and left alone. A record, or a shard file without one, that another plan has for a shard of this one is more
than that: see `Dump.committed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from featcli.dump.folder import OURS, SHARD_FILE, SHARDS, Dump
from featcli.errors import counted
from featcli.system.files import is_folder, names_in


@dataclass(frozen=True)
class ForeignFile:
    """A file that is no part of the dump."""

    file: str  # below the dump
    what: str


def foreign_files(dump: Dump) -> list[ForeignFile]:
    """Name what lies among the shards and is not read, in order. Raises MachineError."""
    folder = dump.path / SHARDS
    found = {name: _why_foreign(dump, folder / name) for name in sorted(names_in(folder))}
    return [ForeignFile(f"{SHARDS}/{name}", why) for name, why in found.items() if why]


def _why_foreign(dump: Dump, path: Path) -> str:
    """Say why a file is not read; nothing where it is of the dump."""
    named = SHARD_FILE.fullmatch(path.name)
    if named is None and OURS.fullmatch(path.name):  # of an unfinished shard
        return ""
    digits = path.name.partition(".")[0]
    if named is None or digits != f"{int(digits):05d}":
        return "a folder" if is_folder(path) else "no name that featcli gives"
    if named[1] not in (dump.format.SUFFIX, ".json"):
        return f"this dump is of {dump.plan.settings.format}"
    if int(digits) >= dump.plan.num_shards:
        return f"the plan has only {counted(dump.plan.num_shards, 'shard')}"
    return ""
