"""Check every byte of a dump against what was written. All damage is found before anything is reported."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcli.dump.atomic_file import disk_errors, sync_folder
from featcli.dump.checksummed_json import checksummed, hash_json, publish_checksummed, why_refused
from featcli.dump.columns import COLUMNS
from featcli.dump.folder import (
    ASIDE,
    BEFORE,
    FAILURES,
    IMAGES,
    MANIFEST,
    PLAN,
    RELIST,
    SHARDS,
    Dump,
    in_use,
    no_dump,
    unmoved,
)
from featcli.dump.foreign import ForeignFile, foreign_files
from featcli.dump.formats import FORMATS
from featcli.dump.formats.layout import NUMPY_TYPES, VALID, Array, Layout, fill_rows, is_stage, values_of
from featcli.dump.generations import (
    MORE,
    NOT_ADDED,
    Generation,
    begun_generation,
    folder_of,
    named_generations,
    open_manifest,
    others,
    plan_of_manifest,
    read_named,
    with_generations,
)
from featcli.dump.lock import FolderLock, is_in_use
from featcli.dump.plan import with_fingerprint
from featcli.dump.records import failure_lines, manifest_content
from featcli.dump.shard import REST, hash_rest
from featcli.errors import ConflictError, DamagedError, counted, printable, shown
from featcli.events import Report, silent
from featcli.system.faults import ABSENT, refuse_of_machine
from featcli.system.files import is_link, is_there, open_regular, read_start, state_at

PIECE_BYTES = 4 * 1024**2  # that are read at once: what stays in the cache of a core while it is hashed and counted
# The bits of the exponent in the types of two bytes, which numpy would have to turn into others to look at them. All of
# them are set in a number that is not finite.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True)
class Damage:
    """Something in a dump that is not as it was written."""

    file: str  # its path below the dump
    what: str
    shard: int | None = None  # the shard to make again, if that mends it


@dataclass
class Verdict:
    """What `verify` found."""

    dump: str
    images: int = 0
    shards: int = 0
    missing_shards: int = 0
    unfinished_shards: list[dict[str, int]] = field(default_factory=list)  # as Dump.unfinished_shards returns them
    has_manifest: bool = False
    in_use: bool = False  # by a process of this machine, when the last byte was read
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    foreign_files: list[ForeignFile] = field(default_factory=list)
    nan: Counter[str] = field(default_factory=Counter)  # stage -> values in rows of images that were read
    inf: Counter[str] = field(default_factory=Counter)
    generations: list[Verdict] = field(default_factory=list)  # that were added; what is there of them counts above, too
    begun: dict[str, Any] | None = None  # a generation that is not part of the dump yet, as begun_generation returns it

    @property
    def state(self) -> str:
        """damaged, incomplete or whole."""
        return "damaged" if self.damages else "whole" if self.has_manifest else "incomplete"

    @property
    def way_out(self) -> str:
        """What can be done about its damage."""
        if lost := self.lost_generations:
            more = f" and {counted(len(lost) - 1, 'other')}" if len(lost) > 1 else ""
            return f"put {lost[0]}{more} back from a copy: nothing else has the rows"
        if any(Path(one.file).name in (IMAGES, COLUMNS) for one in self.damages):
            return RELIST
        return (
            "run featcli verify --repair: it mends a plan, and sets damaged shards aside for the next extract"
            " to make again"
        )

    @property
    def lost_generations(self) -> list[str]:
        """The folders of generations that are gone, or replaced by another dump."""
        return [one.file for one in self.damages if re.fullmatch(rf"{MORE}/\d+", one.file)]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for programs."""
        lists = {name: [vars(one) for one in getattr(self, name)] for name in ("damages", "foreign_files")}
        count = 1 + len(self.generations)  # with the first
        return {"type": "verdict", "state": self.state, **vars(self), **lists, "generations": count}

    def add(self, generation: Verdict, below: str) -> None:
        """Add what was found in a generation, whose folder is `below` the dump."""
        self.generations.append(generation)
        for name in ("images", "shards", "missing_shards", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(generation, name))
        self.unfinished_shards += generation.unfinished_shards
        self.has_manifest = self.has_manifest and generation.has_manifest
        self.damages += [replace(one, file=f"{below}/{one.file}", shard=None) for one in generation.damages]
        self.foreign_files += [replace(one, file=f"{below}/{one.file}") for one in generation.foreign_files]
        self.nan.update(generation.nan)
        self.inf.update(generation.inf)


def verify(path: str | os.PathLike[str], report: Report = silent) -> Verdict:
    """Check structure, plan, counts and every byte of a dump. Changes nothing, and reads no other file.

    Raises UsageError if there is no dump, and MachineError if the dump cannot be read, which is no damage.
    """
    with unmoved(Path(path)):
        verdict = _checked(Path(path), report)
    verdict.in_use = is_in_use(Path(path))
    return verdict


@dataclass
class _Check:
    """What is known of a generation."""

    verdict: Verdict
    dump: Dump | None = None  # if its plan could be read
    keys: Sequence[str] | None = None  # of its list, until its shards are read; None if the list is damaged
    records: list[dict[str, Any]] = field(default_factory=list)
    is_open: bool = False  # whether the manifest of the root says that shards of the dump are made again
    manifest: str = ""  # the checksum of its manifest, if that is what the records say

    @property
    def is_readable(self) -> bool:
        """Whether its plan could be read, and its list was not too short for it."""
        return self.verdict.shards > 0


def _checked(folder: Path, report: Report) -> Verdict:
    """Check a dump and the generations that were added to it."""
    if not any(is_there(folder / name) for name in (PLAN, MANIFEST, SHARDS)):
        raise no_dump(folder)
    root = _check_lists(folder)
    had_manifest = is_there(folder / MANIFEST)  # comes first, because a run may end meanwhile
    named = _named(root)
    report("start", images=root.verdict.images + sum(one.rows for one in named), done=0)
    generations = [_check_lists(folder_of(folder, one.number)) for one in named]
    for check in (root, *generations):  # after all lists: between shards, which fill the cache, small files take longer
        _check_shards(check, report)
    root.verdict.has_manifest = root.verdict.has_manifest and had_manifest
    for generation in generations:
        _check_last_files(generation)
        is_gone = generation.dump is None and not generation.verdict.damages
        if is_gone and had_manifest:  # else it was there a moment ago: another process deletes the dump
            root.verdict.damages.append(Damage(file=f"{MORE}/{Path(generation.verdict.dump).name}", what="gone"))
    dumps = [check.dump for check in (root, *generations) if check.dump is not None]
    if len(dumps) == len(named) + 1:
        found = others(dumps, named)
        root.verdict.damages += [Damage(file=f"{MORE}/{dump.path.name}", what=NOT_ADDED) for dump in found]
    _check_last_files(root, generations)
    for generation in generations:
        root.verdict.add(generation.verdict, f"{MORE}/{Path(generation.verdict.dump).name}")
    if root.dump is not None:
        root.verdict.begun = begun_generation(root.dump)
    return root.verdict


def _named(root: _Check) -> list[Generation]:
    """Return the generations that the manifest of the dump names."""
    named: list[Generation] = []
    if root.dump is not None and root.is_readable:
        with _noting(root.verdict, MANIFEST):
            named, is_open = read_named(root.dump)
            root.is_open = is_open or any(one.manifest is None for one in named)
    return named


def _check_lists(folder: Path) -> _Check:
    """Check the plan and the lists of a generation."""
    verdict = Verdict(str(folder))
    check = _Check(verdict)
    with _noting(verdict, PLAN):
        check.dump = Dump.existing(folder)
    dump = check.dump
    if dump is None:
        return check
    with _noting(verdict, IMAGES):
        dump.refuse_short_list()
    if verdict.damages:
        return check
    verdict.images, verdict.shards = dump.plan.num_images, dump.plan.num_shards
    with _noting(verdict, IMAGES):
        check.keys = dump.keys()
    with _noting(verdict, COLUMNS):
        for _ in dump.cells():
            pass
    return check


def _check_shards(check: _Check, report: Report) -> None:
    """Read the shards of a generation, and look for files that are none of it.

    What there is of them is found out only now: since the lists were read, a run may have gone on for hours.
    """
    dump, verdict = check.dump, check.verdict
    if dump is None or not check.is_readable:
        return
    if not is_there(dump.path):
        check.dump = None
        return
    has_manifest = is_there(dump.path / MANIFEST)  # comes first, because a run may end meanwhile
    verdict.has_manifest = has_manifest and not check.is_open
    names = dump.names()
    shards = dump.numbered(".json", names)
    verdict.missing_shards = dump.plan.num_shards - len(shards)
    verdict.unfinished_shards = dump.unfinished_shards(names)
    for number in shards:
        _check_shard(check, dump, number)
        report("batch", images=len(dump.plan.shard(number)))
    check.keys = None
    names = dump.names()
    for number in dump.unrecorded(names):
        with _noting(verdict, f"{SHARDS}/{dump.shard_path(number).name}", number):
            dump.refuse_foreign_file(number)
    verdict.foreign_files = foreign_files(dump, names)


@contextmanager
def _noting(verdict: Verdict, file: str, shard: int | None = None) -> Iterator[None]:
    """Add damage that is found inside the block to the verdict. Raises MachineError for what cannot be read."""
    try:
        yield
    except (DamagedError, OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError):
            refuse_of_machine("file", Path(verdict.dump) / file, error, strict=True)
        text = error.message if isinstance(error, DamagedError) else str(error)
        for path in (Path(verdict.dump) / file, Path(verdict.dump)):  # the verdict names the file itself
            text = text.partition(f"{shown(path)}: ")[2] or text
        text = text.removeprefix(f"{file} is ")
        verdict.damages.append(Damage(file=file, what=printable(text), shard=shard))


def _check_shard(check: _Check, dump: Dump, number: int) -> None:
    """Compare the file of a shard with its record."""
    name, verdict, record = f"{SHARDS}/{dump.record_path(number).name}", check.verdict, None
    with _noting(verdict, name, number):
        record = dump.record_of(number)
    if record is None:
        return
    check.records.append(record)
    for failure in record["failures"]:
        if check.keys is not None and check.keys[failure["row"]] != failure["key"]:
            what = f"row {failure['row']} is another image"
            verdict.damages.append(Damage(file=name, what=what, shard=number))
    file = f"{SHARDS}/{record['file']}"
    with _noting(verdict, file, number):
        for what in _wrong_in_shard(dump, record, check.keys, verdict):
            verdict.damages.append(Damage(file=file, what=what, shard=number))


def _wrong_in_shard(
    dump: Dump, record: Mapping[str, Any], keys: Sequence[str] | None, verdict: Verdict
) -> Iterator[str]:
    path, rows = dump.shard_path(record["shard"]), dump.plan.shard(record["shard"])
    found = state_at(path)
    if found is None:
        yield "gone"
        return
    size = found.st_size
    if size != record["bytes"]:
        yield f"{size} bytes, {record['bytes']} were written"
        return
    layout = dump.format.read_layout(str(path), len(rows))
    verdict.bytes += size
    if layout.attributes != dump.attributes(record["shard"]):
        yield "it belongs to another dump"
    if keys is not None and list(layout.keys) != list(keys[rows.start : rows.stop]):
        yield "its keys are not those of the image list"
    valid = np.ones(len(rows), np.uint8)
    valid[[failure["row"] - rows.start for failure in record["failures"]]] = 0
    descriptor = open_regular(path)
    try:
        _, starts = dump.checked_shapes(record["shard"], descriptor, layout)
        yield from _wrong_bytes(descriptor, layout, record, valid, starts, verdict)
    finally:
        os.close(descriptor)


def _wrong_bytes(
    descriptor: int,
    layout: Layout,
    record: Mapping[str, Any],
    valid: np.ndarray,
    starts: Mapping[str, np.ndarray],
    verdict: Verdict,
) -> Iterator[str]:
    if os.pread(descriptor, len(valid), layout.arrays[VALID].offset) != valid.tobytes():
        yield "its valid rows are not those of its record"
    stages = {name: array for name, array in layout.arrays.items() if is_stage(name)}
    for name, array in stages.items():
        digest, nan, inf = xxhash.xxh3_128(), 0, 0
        for first, rows in _pieces(descriptor, array):
            digest.update(rows.data)
            if not _are_finite(rows, array.dtype):  # which is found out much faster than what they are
                values = values_of(rows[_of_valid(valid, starts.get(name), first, len(rows))])
                nan += int(np.count_nonzero(np.isnan(values)))
                inf += int(np.count_nonzero(np.isinf(values)))
        if digest.hexdigest() != record["hashes"][name]:
            yield f"bytes of {name} are not those that were written"
        verdict.nan.update({name: nan} if nan else {})
        verdict.inf.update({name: inf} if inf else {})
    if hash_rest(descriptor, layout.size, list(stages.values())) != record["hashes"][REST]:
        yield "bytes beside its maps are not those that were written"


def _are_finite(stored: np.ndarray, dtype: str) -> bool:
    """Return whether all numbers are finite, as they are stored with this dtype."""
    if dtype not in EXPONENTS:
        return bool(np.isfinite(stored).all())
    exponents = stored.view(np.uint16) & EXPONENTS[dtype]
    return not (exponents == EXPONENTS[dtype]).any()


def _of_valid(valid: np.ndarray, starts: np.ndarray | None, first: int, count: int) -> np.ndarray:
    """Return which of `count` rows from `first` on are of images that were read; of values, if maps differ in size."""
    if starts is None:
        return np.asarray(valid[first : first + count] == 1)
    of_values: np.ndarray = np.repeat(valid == 1, np.diff(starts.clip(first, first + count)))
    return of_values


def _pieces(descriptor: int, array: Array) -> Iterator[tuple[int, np.ndarray]]:
    """Yield runs of rows of an array as (first row, rows)."""
    step = max(1, PIECE_BYTES // max(1, array.row_bytes))
    content = np.empty((min(step, array.shape[0]), *array.shape[1:]), NUMPY_TYPES[array.dtype])
    for first in range(0, array.shape[0], step):
        rows = content[: array.shape[0] - first]
        fill_rows(rows, descriptor, array, first)
        yield first, rows


def _check_last_files(check: _Check, generations: Sequence[_Check] | None = None) -> None:
    """Check that failures.jsonl and manifest.json repeat what the records, and in the root the generations, say."""
    dump, verdict = check.dump, check.verdict
    if dump is None or not verdict.has_manifest:
        return
    if len(check.records) < dump.plan.num_shards:
        if verdict.missing_shards:
            what = f"there, though {counted(verdict.missing_shards, 'shard')} not"
            verdict.damages.append(Damage(file=MANIFEST, what=what))
        return
    expected = {FAILURES: b"".join(failure_lines(check.records))}
    is_known = all(one.manifest for one in generations or ()) and not verdict.lost_generations  # what it has to say
    if is_known and not any(one.file == MANIFEST for one in verdict.damages):  # they were read from it before
        manifest = manifest_content(dump.plan, check.records)
        if generations is not None:
            with _noting(verdict, MANIFEST):
                manifest = with_generations(manifest, _as_named(dump, generations))
        check.manifest = hash_json(manifest)
        expected = {MANIFEST: checksummed(manifest, check.manifest), **expected}
    for name, content in expected.items():
        with _noting(verdict, name):
            if not _is_at(dump.path / name, content):
                raise ValueError("not what the records say")


def _as_named(root: Dump, generations: Sequence[_Check]) -> list[Generation]:
    """Return what the manifest of the root has to say of these generations, and of those that were added meanwhile."""
    ours = [Generation.of(one.dump, one.manifest) for one in generations if one.dump is not None]
    return ours + named_generations(root)[len(ours) :]


def _is_at(path: Path, content: bytes) -> bool:
    """Return whether a file has this content. Raises OSError, and ValueError if it is gone or no regular file."""
    try:
        return read_start(path, len(content) + 1) == content
    except OSError as error:
        if error.errno in ABSENT:
            raise ValueError("gone") from error
        raise


def repair(verdict: Verdict) -> list[str]:
    """Put damaged files aside, so that the next `extract` makes them again. Returns what was done, file by file.

    A plan is written again from an undamaged manifest, and everything else is judged by it. A damaged image list raises
    DamagedError, because only `extract` can make it again.
    """
    done = []
    if lost := verdict.lost_generations:
        raise DamagedError(f"dump {shown(verdict.dump)}: {lost[0]} is gone or another dump", verdict.way_out)
    for generation in verdict.generations:
        if generation.damages:
            below = f"{MORE}/{Path(generation.dump).name}"
            done += [f"{below}: {what}" for what in repair(generation)]
    own = [one for one in verdict.damages if not one.file.startswith(f"{MORE}/")]
    return [*done, *_repaired(replace(verdict, damages=own))] if own else done


def _repaired(verdict: Verdict) -> list[str]:
    """Repair one generation by itself. See `repair`."""
    folder, done = Path(verdict.dump), []
    _refuse_damaged_list(verdict)
    if is_link(folder / SHARDS):
        raise ConflictError(
            f"dump {shown(folder)}: its shards folder is a link, and what it leads to may be another dump's",
            "repair the dump that the shards are of",
        )
    with disk_errors(folder), FolderLock(folder) as lock:
        if not lock.alone():
            raise in_use(folder)
        verdict = _own(folder)  # what was damaged may have been made again by a process that has ended since
        if any(damage.file == PLAN for damage in verdict.damages):
            _restore_plan(folder)
            done.append(f"{PLAN} written anew from {MANIFEST}")
            verdict = _own(folder)  # by the repaired plan
        _refuse_damaged_list(verdict)
        had_manifest = is_there(folder / MANIFEST)
        if verdict.damages and had_manifest and open_manifest(Dump.at(folder)):
            done.append(f"{MANIFEST} written anew: the next extract completes it")
        elif verdict.damages and had_manifest:
            done.append(f"{MANIFEST} taken away: the next extract writes it anew")
        if verdict.damages and is_there(folder / FAILURES):
            (folder / FAILURES).unlink()
            done.append(f"{FAILURES} taken away: the next extract writes it anew")
        sync_folder(folder)
        for number in sorted({damage.shard for damage in verdict.damages if damage.shard is not None}):
            for path in _files_of(folder, number):
                path.replace(path.with_name(path.name + ASIDE))
                sync_folder(folder / SHARDS)
                done.append(f"{SHARDS}/{path.name} put aside as {path.name}{ASIDE}")
    return done


def _own(folder: Path) -> Verdict:
    """Check a dump, and leave out what is wrong in generations that were added to it."""
    verdict = verify(folder)
    return replace(verdict, damages=[one for one in verdict.damages if not one.file.startswith(f"{MORE}/")])


def _refuse_damaged_list(verdict: Verdict) -> None:
    for file, of in ((IMAGES, "images"), (COLUMNS, "table or the tars")):
        if any(damage.file == file for damage in verdict.damages):
            raise DamagedError(
                f"dump {shown(verdict.dump)}: {file} cannot be made again without the {of}",
                f"run its extract command again: it writes the file anew, if the {of} are as they were",
            )


def _files_of(folder: Path, number: int) -> list[Path]:
    """Return the files of a shard, its record first, because a shard without a record is not committed."""
    suffix = FORMATS[Dump.plan_in(folder).settings.format].SUFFIX
    names = [f"{number:05d}{end}" for end in (".json", ".json" + BEFORE, suffix)]
    return [folder / SHARDS / name for name in names if state_at(folder / SHARDS / name, follow_links=False)]


def _restore_plan(folder: Path) -> None:
    try:
        plan = plan_of_manifest(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"dump {shown(folder)}: plan.json is damaged, and manifest.json cannot stand in for it"
            f" ({why_refused(error)})",
            "start anew with --overwrite",
        ) from error
    publish_checksummed(folder / PLAN, with_fingerprint(plan), replace=True)
