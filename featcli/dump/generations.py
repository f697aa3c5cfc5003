"""Know the generations of a dump that grew: each is a dump of its own below `more`, with rows from 0.

The first generation is the root. Its manifest names the others: once it is replaced, a generation is part of the dump.
Until then readers see the dump as it was, and afterwards a generation that is gone is damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcli.dump.atomic_file import disk_errors, sync_folder
from featcli.dump.checksummed_json import CHECKSUM, hash_json, publish_checksummed, read_checksummed, why_refused
from featcli.dump.folder import MANIFEST, PLAN, SHARDS, Dump
from featcli.dump.lock import one_at_a_time
from featcli.dump.plan import FORMAT_VERSIONS, Extends, Plan, with_fingerprint
from featcli.dump.records import manifest_content, totals_of
from featcli.errors import ConflictError, DamagedError, MachineError, shown
from featcli.system.faults import machine_errors
from featcli.system.files import is_folder, is_there, names_in, read_start

MORE = "more"
GROWN_VERSION = 3  # format version of the manifest of a dump that grew, which older readers refuse
GROWN = b'{\n "format_version": %d,' % GROWN_VERSION  # how such a manifest begins
GENERATIONS, IS_OPEN = "generations", "is_open"  # fields of that manifest
NOT_ADDED = "not the generation that was added"
PUT_BACK = "put that folder back: without it the rows behind it have other numbers"
NOT_OF_DUMP = "move that folder away: nothing in it is part of the dump yet, and --extend makes it anew"
MEND = "run featcli verify --repair, then its extract command again"


@dataclass(frozen=True)
class Generation:
    """What the manifest of the root says of a generation."""

    number: int
    fingerprint: str  # of its plan
    rows: int
    manifest: str | None  # the checksum of its manifest; None while shards of it are made again

    def to_json(self) -> dict[str, Any]:
        """Return the fields as the manifest has them."""
        return vars(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Generation:
        """Return a generation that a manifest names. Raises KeyError, TypeError or ValueError for anything else."""
        found = cls(**content)
        is_text = isinstance(found.fingerprint, str) and isinstance(found.manifest, str | None)
        if type(found.number) is not int or type(found.rows) is not int or not is_text:
            raise ValueError("a generation that is none")
        return found

    @classmethod
    def of(cls, dump: Dump, manifest: str | None) -> Generation:
        """Return what is to be said of a generation, whose manifest has this checksum. See `manifest`."""
        assert dump.plan.extends is not None
        return cls(dump.plan.extends.generation, dump.plan.fingerprint, dump.plan.num_images, manifest)


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


@dataclass(frozen=True)
class Generations:
    """All generations that are part of a dump, the first one too, as its manifest says at one moment."""

    dumps: list[Dump]
    is_unfinished: list[bool]  # of each: whether it is not complete, or is made again

    @property
    def are_complete(self) -> bool:
        """Whether no row is missing and none is made again."""
        return not any(self.is_unfinished)


def all_generations(root: Dump, with_lists: bool = True) -> Generations:
    """Return all generations of a dump, complete or not. `with_lists` says that their lists of images are needed.

    Raises DamagedError if one is gone or another one is in its place, and MachineError.
    """
    named, is_open = read_named(root)
    dumps = [root]
    for number in range(1, len(named) + 1):
        path = folder_of(root.path, number)
        try:
            dump = Dump.existing(path)
            if dump is None:
                raise DamagedError(f"dump {shown(root.path)}: its generation {MORE}/{path.name} is gone", PUT_BACK)
        except DamagedError:
            if is_there(root.path / MANIFEST):
                raise
            named = named[: number - 1]  # it was there a moment ago: another process deletes the dump
            break
        if with_lists:
            dump.refuse_short_list()
        dumps.append(dump)
    if found := others(dumps, named):
        name = f"{MORE}/{found[0].path.name}"
        raise DamagedError(f"dump {shown(root.path)}: {name} is {NOT_ADDED}", PUT_BACK)
    is_whole = [root.is_complete() and not is_open]
    is_whole += [one.manifest is not None and dump.is_complete() for one, dump in zip(named, dumps[1:], strict=True)]
    return Generations(dumps, [not one for one in is_whole])


def others(dumps: Sequence[Dump], named: Sequence[Generation]) -> list[Dump]:
    """Return the dumps behind the first that are not the generations that its manifest names."""
    root, rows, found = dumps[0], dumps[0].plan.num_images, []
    for number, (one, dump) in enumerate(zip(named, dumps[1:], strict=True), 1):
        expected = Extends(root.plan.fingerprint, number, rows)
        if (dump.plan.fingerprint, one.number, dump.plan.extends) != (one.fingerprint, number, expected):
            found.append(dump)
        rows += one.rows
    return found


def generations_of(root: Dump) -> list[Dump]:
    """Return the generations that are part of a dump, without the first, complete or not.

    Raises as `all_generations` does.
    """
    return all_generations(root).dumps[1:]


def named_generations(root: Dump) -> list[Generation]:
    """Return the generations that the manifest of a dump names. Raises DamagedError and MachineError."""
    return read_named(root)[0]


def read_named(root: Dump) -> tuple[list[Generation], bool]:
    """Return the generations that the manifest of a dump names, and whether shards of the first are made again.

    Where that is gone they are those in the folder, as `_generations_there` says. Raises DamagedError and MachineError.
    """
    if not has_grown(root.path):
        return [], False
    if not is_there(root.path / MANIFEST):
        return _generations_there(root), False
    try:
        content = _read_manifest(root.path)
        return [Generation.from_json(one) for one in content.get(GENERATIONS, ())], bool(content.get(IS_OPEN, False))
    except DamagedError:
        if is_there(root.path / MANIFEST):
            raise
        return _generations_there(root), False  # another process has removed it meanwhile, to make shards again
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"dump {shown(root.path)}: {MANIFEST} is damaged ({why_refused(error)})", MEND) from error


def known_generations(root: Dump) -> list[Generation]:
    """Return the generations that the manifest names, or those in the folder if it cannot be read."""
    with suppress(DamagedError):
        return named_generations(root)
    return _generations_there(root)


def next_generation(root: Dump) -> Dump | None:
    """Return the generation that was begun and is not part of the dump yet.

    Raises ConflictError if another dump is in its place or its format is of another version, DamagedError and
    MachineError.
    """
    return _begun_by(root, _next_extends(root))


def _next_extends(root: Dump) -> Extends:
    """Return what the plan of the next generation has to say of those before it. Raises MachineError."""
    known = known_generations(root)
    rows = root.plan.num_images + sum(one.rows for one in known)
    return Extends(root.plan.fingerprint, len(known) + 1, rows)


def _begun_by(root: Dump, extends: Extends) -> Dump | None:
    try:
        begun = Dump.existing(folder_of(root.path, extends.generation))
    except DamagedError as error:
        raise DamagedError(error.message, NOT_OF_DUMP) from error
    if begun is None:
        refuse_gap(root, extends.generation)
    if begun is not None and begun.plan.extends != extends:
        raise ConflictError(
            f"dump {shown(root.path)}: {shown(begun.path)} is not a generation of it", "move it somewhere else"
        )
    return begun


def refuse_gap(root: Dump, number: int) -> None:
    """Raise DamagedError if the next generation, of this number, is gone: others are there that follow it."""
    behind = [one for one in all_folders(root.path) if int(one.name) > number and is_there(one / PLAN)]
    if behind and not is_there(folder_of(root.path, number) / PLAN):
        name = f"{MORE}/{number:05d}"
        raise DamagedError(
            f"dump {shown(root.path)}: {name} is gone, and {MORE}/{behind[-1].name} was made behind it",
            f"put {name} back from a copy; or move all folders behind it away, and run the command with --extend, which"
            " adds their images anew",
        )


def begun_generation(root: Dump) -> dict[str, Any] | None:
    """Return number, images and safe images of the generation that was begun and is not part of the dump yet.

    `problem` says why no run can go on with it; "" as a rule. Raises MachineError.
    """
    if not has_grown(root.path):
        return None
    extends = _next_extends(root)
    number = extends.generation
    try:
        begun = _begun_by(root, extends)
        if begun is None:
            return None
        kept = begun.rows_kept()  # comes first, because a run may commit a shard meanwhile
        records = [*begun.records()]
    except (ConflictError, DamagedError, MachineError) as error:
        return {"generation": number, "images": 0, "safe": 0, "problem": error.message}
    there = {record["shard"] for record in records}
    safe = totals_of(records)["images"] + sum(rows for shard, rows in kept.items() if shard not in there)
    return {"generation": number, "images": begun.plan.num_images, "safe": safe, "problem": ""}


def with_generations(manifest: Mapping[str, Any], generations: Sequence[Generation]) -> dict[str, Any]:
    """Return the manifest of a root whose generations are these."""
    if not generations:
        return dict(manifest)  # as of a dump that has not grown
    grown = {**manifest, "format_version": GROWN_VERSION}
    return {**grown, GENERATIONS: [one.to_json() for one in generations]}


def commit(root: Dump, generation: Dump) -> None:
    """Make a complete generation part of the dump, or note that it was completed again. Raises MachineError.

    The manifest of the root is read and replaced while no other process does that, so that none is lost. Without a
    manifest the root is not complete, and whatever completes it names all complete generations.
    """
    with disk_errors(root.path), one_at_a_time(root.path / SHARDS):
        if not is_there(root.path / MANIFEST):
            return
        named = named_generations(root)
        one = Generation.of(generation, hash_json(_read_manifest(generation.path)))
        if one.number > len(named) + 1:
            raise MachineError(
                f"dump {shown(root.path)}: generation {one.number} cannot follow {len(named)}", "was one removed?"
            )
        _name(root, [*named[: one.number - 1], one, *named[one.number :]])


def note_again(generation: Dump) -> None:
    """Note in the manifest of the root that shards of a generation are made again, if it is part of the dump.

    Until `commit` the dump is incomplete then, whatever a kill leaves. Raises OSError, DamagedError and MachineError.
    """
    extends = generation.plan.extends
    root = None if extends is None else Dump.existing(generation.path.absolute().parents[1])
    if extends is None or root is None or root.plan.fingerprint != extends.fingerprint:
        return
    with one_at_a_time(root.path / SHARDS):
        if not is_there(root.path / MANIFEST):  # the dump is incomplete anyway
            return
        named = named_generations(root)
        if extends.generation <= len(named):
            named[extends.generation - 1] = replace(named[extends.generation - 1], manifest=None)
            _name(root, named)


def _name(root: Dump, generations: Sequence[Generation]) -> None:
    """Replace what the manifest says of the generations, and leave what it says of the first one."""
    content = _read_manifest(root.path)
    now = with_generations({name: value for name, value in content.items() if name != GENERATIONS}, generations)
    if now != content:
        publish_checksummed(root.path / MANIFEST, now, replace=True)


def publish_manifest(root: Dump, generations: Sequence[Generation]) -> dict[str, Any]:
    """Write the manifest of a complete root from its records. Returns its content. Raises OSError and MachineError."""
    manifest = with_generations(manifest_content(root.plan, list(root.records())), generations)
    publish_checksummed(root.path / MANIFEST, manifest, replace=True)
    return manifest


def open_manifest(root: Dump) -> bool:
    """Say that shards of the root are made again: its manifest says so if it names generations, or else is removed.

    Returns whether it says so. Raises OSError and MachineError.
    """
    with one_at_a_time(root.path / SHARDS):
        known = known_generations(root) if is_there(root.path / MANIFEST) else []
        if known:
            content = with_generations(with_fingerprint(root.plan), known)
            publish_checksummed(root.path / MANIFEST, {**content, IS_OPEN: True}, replace=True)
        else:
            (root.path / MANIFEST).unlink(missing_ok=True)
            sync_folder(root.path)
        return bool(known)


def _generations_there(root: Dump) -> list[Generation]:
    """Return the generations in the folder, as far as each follows the one before, up to the last complete one.

    One whose plan is damaged ends the list. They stand in for a manifest that cannot be read: only a complete dump
    grows, so all of them but the last were part of it for certain.
    """
    found: list[Generation] = []
    rows, count = root.plan.num_images, 0
    with suppress(DamagedError):
        for path in _folders(root.path):
            dump = Dump.existing(path)
            extends = None if dump is None else dump.plan.extends
            if dump is None or extends is None:
                break
            if (extends.fingerprint, extends.rows) != (root.plan.fingerprint, rows):
                break
            found.append(Generation.of(dump, _manifest_of(dump)))
            rows += dump.plan.num_images
            count = count if found[-1].manifest is None else len(found)
    return found[:count]


def _manifest_of(dump: Dump) -> str | None:
    """Return the checksum of the manifest of a generation; None if there is none, or it is damaged."""
    with suppress(DamagedError):
        return hash_json(_read_manifest(dump.path)) if dump.is_complete() else None
    return None


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
