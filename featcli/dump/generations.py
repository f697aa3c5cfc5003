"""Know the generations of a dump that grew: each is a dump of its own below `more`, with rows from 0.

The first generation is the root. Its manifest names the others: once it is replaced, a generation is part of the dump.
Until then readers see the dump as it was, and afterwards a generation that is gone is damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcli.dump.atomic_file import disk_errors
from featcli.dump.checksummed_json import CHECKSUM, hash_json, publish_checksummed, read_checksummed, why_refused
from featcli.dump.folder import MANIFEST, SHARDS, Dump
from featcli.dump.lock import one_at_a_time
from featcli.dump.plan import FORMAT_VERSIONS, Plan, with_fingerprint
from featcli.dump.records import manifest_content
from featcli.errors import DamagedError, MachineError, shown
from featcli.system.faults import machine_errors
from featcli.system.files import is_folder, is_there, names_in, read_start

MORE = "more"
GROWN_VERSION = 3  # format version of the manifest of a dump that grew, which older readers refuse
GROWN = b'{\n "format_version": %d,' % GROWN_VERSION  # how such a manifest begins
GENERATIONS, IS_OPEN = "generations", "is_open"  # fields of that manifest
MEND = "run featcli verify --repair, then its extract command again"


@dataclass(frozen=True)
class Generation:
    """What the manifest of the root says of a generation."""

    number: int
    fingerprint: str  # of its plan
    rows: int
    manifest: str  # the checksum of its manifest

    def to_json(self) -> dict[str, Any]:
        """Return the fields as the manifest has them."""
        return vars(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Generation:
        """Return a generation that a manifest names. Raises KeyError, TypeError or ValueError for anything else."""
        found = cls(**content)
        if type(found.number) is not int or type(found.rows) is not int or not isinstance(found.fingerprint, str):
            raise ValueError("a generation that is none")
        return found

    @classmethod
    def of(cls, dump: Dump) -> Generation:
        """Return what is to be said of a complete generation. Raises DamagedError and MachineError."""
        assert dump.plan.extends is not None
        checksum = hash_json(_read_manifest(dump.path))
        return cls(dump.plan.extends.generation, dump.plan.fingerprint, dump.plan.num_images, checksum)


def folder_of(root: Path, number: int) -> Path:
    """Return the folder of a generation, which need not exist."""
    return root / MORE / f"{number:05d}"


def has_grown(root: Path) -> bool:
    """Return whether there may be generations, by the folder that holds them and the first bytes of the manifest.

    Raises MachineError.
    """
    if is_folder(root / MORE):
        return True
    try:
        with machine_errors("file", root / MANIFEST, strict=True):
            return read_start(root / MANIFEST, len(GROWN)) == GROWN
    except (OSError, ValueError):
        return False


def is_complete(dump: Dump) -> bool:
    """Return whether the first generation, or any other by itself, is complete: no shard of it is made again."""
    if not dump.is_complete():
        return False
    return not has_grown(dump.path) or not _read_manifest(dump.path).get(IS_OPEN, False)


def generations_of(root: Dump) -> list[Dump]:
    """Return the generations that are part of a dump, without the first, complete or not.

    Raises DamagedError if one is gone or another one is in its place, and MachineError.
    """
    found = []
    rows = root.plan.num_images
    for number, one in enumerate(named_generations(root), 1):
        path = folder_of(root.path, number)
        if not is_there(path):
            raise DamagedError(
                f"dump {shown(root.path)}: its generation {MORE}/{path.name} is gone",
                "put that folder back: without it the rows behind it have other numbers",
            )
        dump = Dump.at(path)
        extends = dump.plan.extends
        is_ours = dump.plan.fingerprint == one.fingerprint and one.number == number and extends is not None
        if not is_ours or (extends.fingerprint, extends.rows) != (root.plan.fingerprint, rows):  # type: ignore[union-attr]
            raise DamagedError(
                f"dump {shown(root.path)}: {MORE}/{path.name} is not the generation that was added",
                "put that folder back: without it the rows behind it have other numbers",
            )
        rows += one.rows
        found.append(dump)
    return found


def named_generations(root: Dump) -> list[Generation]:
    """Return the generations that the manifest of a dump names. Raises DamagedError and MachineError."""
    if not has_grown(root.path) or not is_there(root.path / MANIFEST):
        return []
    try:
        return [Generation.from_json(one) for one in _read_manifest(root.path).get(GENERATIONS, ())]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"dump {shown(root.path)}: {MANIFEST} is damaged ({why_refused(error)})", MEND) from error


def known_generations(root: Dump) -> list[Generation]:
    """Return the generations that the manifest names, or the complete ones that are there if it cannot be read."""
    with suppress(DamagedError):
        if is_there(root.path / MANIFEST):
            return named_generations(root)
    return complete_generations(root)


def next_generation(root: Dump) -> Dump | None:
    """Return the generation that was begun and is not part of the dump yet. Raises DamagedError and MachineError."""
    return Dump.existing(folder_of(root.path, len(named_generations(root)) + 1))


def with_generations(manifest: Mapping[str, Any], generations: Sequence[Generation]) -> dict[str, Any]:
    """Return the manifest of a root whose generations are these."""
    if not generations:
        return dict(manifest)  # as of a dump that has not grown
    grown = {**manifest, "format_version": GROWN_VERSION}
    return {**grown, GENERATIONS: [one.to_json() for one in generations]}


def commit(root: Dump, generation: Dump) -> None:
    """Make a complete generation part of the dump, or note that it was completed again. Raises MachineError.

    The manifest of the root is read and replaced while no other process does that, so that none is lost.
    """
    with disk_errors(root.path), one_at_a_time(root.path / SHARDS):
        named = named_generations(root)
        one = Generation.of(generation)
        if one.number > len(named) + 1:
            raise MachineError(
                f"dump {shown(root.path)}: generation {one.number} cannot follow {len(named)}", "was one removed?"
            )
        now = [*named[: one.number - 1], one, *named[one.number :]]
        if now != named:
            publish_manifest(root, now)


def publish_manifest(root: Dump, generations: Sequence[Generation]) -> dict[str, Any]:
    """Write the manifest of a complete root from its records. Returns its content. Raises OSError and MachineError."""
    manifest = with_generations(manifest_content(root.plan, list(root.records())), generations)
    publish_checksummed(root.path / MANIFEST, manifest, replace=True)
    return manifest


def open_manifest(root: Dump) -> None:
    """Say in the manifest of a dump that grew that shards of the root are made again. Its generations stay named.

    Raises OSError and MachineError.
    """
    content = with_generations(with_fingerprint(root.plan), known_generations(root))
    publish_checksummed(root.path / MANIFEST, {**content, IS_OPEN: True}, replace=True)


def complete_generations(root: Dump) -> list[Generation]:
    """Return the generations in the folder that are complete, as far as each follows the one before.

    Damaged ones end the list. They stand in for a manifest that cannot be read.
    """
    found: list[Generation] = []
    rows = root.plan.num_images
    with suppress(DamagedError):
        for path in _folders(root.path):
            dump = Dump.existing(path)
            extends = None if dump is None else dump.plan.extends
            if dump is None or extends is None or not dump.is_complete():
                break
            if (extends.fingerprint, extends.rows) != (root.plan.fingerprint, rows):
                break
            found.append(Generation.of(dump))
            rows += dump.plan.num_images
    return found


def _folders(root: Path) -> Iterator[Path]:
    number = 1
    while is_folder(folder_of(root, number)):
        yield folder_of(root, number)
        number += 1


def all_folders(root: Path) -> list[Path]:
    """Return the folders of all generations but the first, the last one first, whatever state they are in."""
    names = [name for name in names_in(root / MORE) if name.isdecimal() and name == f"{int(name):05d}"]
    return [root / MORE / name for name in sorted(names, reverse=True)]


def plan_of_manifest(folder: Path) -> Plan:
    """Return the plan that a manifest holds, also that of a dump that grew.

    Raises what `read_checksummed` and `Plan.from_json` raise.
    """
    content = read_checksummed(folder / MANIFEST)
    versions = [content["format_version"]] if content["format_version"] != GROWN_VERSION else [*FORMAT_VERSIONS]
    *others, last = versions
    for version in others:
        with suppress(KeyError, TypeError, ValueError):
            return Plan.from_json({**content, "format_version": version})
    return Plan.from_json({**content, "format_version": last})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = read_checksummed(path / MANIFEST)
    except (ValueError, TypeError) as error:
        raise DamagedError(f"dump {shown(path)}: {MANIFEST} is damaged ({why_refused(error)})", MEND) from error
    content.pop(CHECKSUM, None)
    return content
