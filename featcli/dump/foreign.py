"""Find files among the shards of a dump, or its generations, that are no part of it.

They were copied there by mistake, or are of another plan's dump. They are named and left alone. If another plan has a
record, or a shard file without a record, for a shard of this dump, that is an error: see `Dump.committed`. Partial
files do not count: a process writes them, a record names them, or they are removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from featcli.dump.atomic_file import PARTIAL_NAME
from featcli.dump.folder import SHARD_FILE, SHARDS, Dump
from featcli.dump.generations import MORE, folder_of, known_generations
from featcli.dump.unfinished import RECORD_NAME, named_file
from featcli.errors import counted
from featcli.system.files import is_folder, names_in

NO_NAME = "no name that featcli gives"


@dataclass(frozen=True)
class ForeignFile:
    """A file that is no part of the dump."""

    file: str  # its path below the dump
    what: str


def foreign_files(dump: Dump, names: Iterable[str] | None = None) -> list[ForeignFile]:
    """Return the files among the shards that are not read, in order. Raises MachineError.

    `names` are those in the folder of shards; without them it is listed.
    """
    folder = dump.path / SHARDS
    found = {name: _why_foreign(dump, name) for name in sorted(dump.names() if names is None else names)}
    records = {name: named_file(folder / name) for name in found if RECORD_NAME.fullmatch(name)}
    ours = {file for record, file in records.items() if not found[record]}
    for record, file in records.items():
        if found[record] and file in found and file not in ours and PARTIAL_NAME.fullmatch(file):
            found[file] = f"{record} names it"
    return [ForeignFile(f"{SHARDS}/{name}", why) for name, why in found.items() if why] + _foreign_generations(dump)


def _foreign_generations(dump: Dump) -> list[ForeignFile]:
    """Return what lies among the generations and is none, in order. One that was begun is none of these."""
    names = {name for name in names_in(dump.path / MORE) if not PARTIAL_NAME.fullmatch(name)}
    if not names:
        return []
    count = len(known_generations(dump))
    ours = {folder_of(dump.path, number).name for number in range(1, count + 2)}
    why = f"the dump has only {counted(count + 1, 'generation')}"
    return [ForeignFile(f"{MORE}/{name}", why if name.isdecimal() else NO_NAME) for name in sorted(names - ours)]


def _why_foreign(dump: Dump, name: str) -> str:
    """Return why a file among the shards is not read; "" if it belongs to the dump."""
    named, unfinished = SHARD_FILE.fullmatch(name), RECORD_NAME.fullmatch(name)
    if PARTIAL_NAME.fullmatch(name):
        return ""
    digits = unfinished[1] if unfinished else name.partition(".")[0]
    if (named is None and unfinished is None) or digits != f"{int(digits):05d}":
        return "a folder" if is_folder(dump.path / SHARDS / name) else NO_NAME
    if named is not None and named[1] not in (dump.format.SUFFIX, ".json"):
        return f"this dump is of {dump.plan.settings.format}"
    if int(digits) >= dump.plan.num_shards:
        return f"the plan has only {counted(dump.plan.num_shards, 'shard')}"
    begun = dump.unfinished_shard(int(digits)) if unfinished else None
    return begun.problem if begun is not None and begun.is_foreign else ""
