"""Make a dump: the plan first, then a file and a record for each shard, the manifest last.

A record is published after its shard file, and the manifest after all records, so whatever exists is complete.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcli.dump.atomic_file import FULL, disk_errors, publish_lines, sync_folder, take_partial
from featcli.dump.checksummed_json import publish_checksummed
from featcli.dump.columns import COLUMNS, PlannedColumns
from featcli.dump.folder import BEFORE, FAILURES, IMAGES, MANIFEST, PLAN, SHARDS, Dump
from featcli.dump.formats.layout import Array, is_stage
from featcli.dump.generations import (
    commit,
    generations_of,
    has_grown,
    known_generations,
    next_generation,
    note_again,
    open_manifest,
    publish_manifest,
)
from featcli.dump.lock import one_at_a_time
from featcli.dump.plan import Plan, image_lines, with_fingerprint
from featcli.dump.records import failure_lines, manifest_content, record_content, totals_of
from featcli.dump.shard import RESERVE, ShardSummary, ShardWriter
from featcli.dump.unfinished import RowsMade, Unfinished, record_path, remove_partials, remove_unused
from featcli.errors import ConflictError, IncompleteError, MachineError, counted, shown
from featcli.events import Report, silent
from featcli.inputs.columns import ListedColumns
from featcli.inputs.image_list import ImageList
from featcli.system.faults import RESUMES, is_of_machine
from featcli.system.files import is_there, open_regular


def create(path: Path, plan: Plan, images: ImageList, columns: ListedColumns | None = None) -> bool:
    """Freeze the plan. Returns False if another exists by now, which is possible without locks.

    Raises ConflictError if the columns are no longer those of the plan, and MachineError.
    """
    with disk_errors(path):
        # List and columns come before the plan, so that a folder with a plan also has what it froze. Those of another
        # plan, which may have come while they were written, stay: they may be in another order.
        files = {IMAGES: image_lines(images)}
        if columns is not None and plan.columns is not None:
            files[COLUMNS] = _as_planned(columns, plan.columns)
        for name, lines in files.items():
            if not publish_lines(path / name, lines, replace=True, unless=path / PLAN):
                return False
        return publish_checksummed(path / PLAN, with_fingerprint(plan))


def _as_planned(columns: ListedColumns, planned: PlannedColumns) -> Iterator[bytes]:
    """Yield the lines of columns.jsonl. Raises ConflictError at the end if they are not the planned ones."""
    digest = xxhash.xxh3_128()
    for line in columns.lines():
        digest.update(line)
        yield line
    if digest.hexdigest() != planned.digest:
        raise ConflictError("the columns of the images were changed while they were read", "run the command again")


def resume(
    dump: Dump, plan: Plan, images: ImageList, retry_failed: bool = False, columns: ListedColumns | None = None
) -> dict[int, int]:
    """Make a dump ready to be resumed. Returns row -> size in bytes now, for images whose size has changed.

    `plan` is what is asked for now, and `columns` are equal to those of the dump. Raises ConflictError if the plan
    differs from that of the dump, or if an image has changed. With `retry_failed`, images that failed may have changed.
    """
    dump.refuse_other_plan(plan, images)
    if plan.images_digest == dump.plan.images_digest and not dump.has_its_list():
        with disk_errors(dump.path):
            publish_lines(dump.path / IMAGES, image_lines(images), replace=True)
    if columns is not None and dump.plan.columns is not None and not dump.has_its_columns():
        with disk_errors(dump.path):
            publish_lines(dump.path / COLUMNS, _as_planned(columns, dump.plan.columns), replace=True)
    resized = dump.refuse_changed_images(plan, images, retry_failed)
    for number in dump.numbered(".json" + BEFORE):
        if dump.is_committed(number):  # a kill left it after the shard was made again
            _before(dump, number).unlink(missing_ok=True)
    _remove_left(dump, retry_failed)
    return resized


def _remove_left(dump: Dump, retry_failed: bool) -> None:
    """Remove what a kill, another process or a copy of the folder has left of committed shards."""
    for one in dump.unfinished():
        is_again = retry_failed and one.number in dump.found.failed  # its rows are of the shard that is made again
        if dump.is_committed(one.number) and not (is_again or one.is_foreign):
            remove_partials(dump.shard_path(one.number))
            one.remove()


@dataclass
class BegunShard:
    """A shard that is being made: its file, and what is known about the rows in it."""

    number: int
    file: ShardWriter
    made: RowsMade


@dataclass(frozen=True)
class DumpWriter:
    """Makes shards of a dump, and commits them."""

    dump: Dump
    environment: Mapping[str, str]  # of this process
    again: frozenset[int] = frozenset()  # committed shards that are made again
    # Row -> size in bytes, for images whose size has changed since they were listed.
    resized: Mapping[int, int] = field(default_factory=dict)
    retry_failed: bool = False  # failed images are tried again, so rows of other runs are not resumed

    def is_done(self, number: int) -> bool:
        """Return whether a shard is committed and will not be made again."""
        return number not in self.again and self.dump.is_committed(number)

    def start(self, number: int, keys: Sequence[str], shapes: Mapping[str, np.ndarray]) -> BegunShard:
        """Begin a shard under a partial name. `shapes` are (rows, 3), for stages whose maps differ in size."""
        return BegunShard(number, self._file(number, keys, shapes), RowsMade())

    def take_up(
        self,
        number: int,
        keys: Sequence[str],
        shapes: Mapping[str, np.ndarray],
        starts: Sequence[int],
        report: Report = silent,
    ) -> BegunShard | None:
        """Resume a shard that another run began, at the start of a batch. Returns None if there is no such shard.

        `starts` are the first rows of its batches. A record that does not fit its file is dropped with a warning.
        Raises MachineError if the rows cannot be read back.
        """
        found = self.dump.unfinished_shard(number)
        if found is None:
            return None
        problem = found.problem
        if found.content is not None and found.partial is not None:
            with _reading_back(found.partial):
                begun = self._take_up(number, found.content, found.partial, keys, shapes, starts)
            if isinstance(begun, BegunShard):
                return begun
            problem = begun
        if problem and self.dump.unfinished_shard(number) == found:  # otherwise another process has resumed the shard
            found.remove()
            remove_unused(self.dump.path / SHARDS)  # the file that a damaged record named
            rows = counted(found.rows, "row") if found.rows else "rows"
            text = f"unfinished shard {number}: {problem}: its {rows} are made again"
            report("warning", text=text)
            report("kept", shard=number, rows=0)
        report("resumed", shard=number, rows=0)
        return None

    def _take_up(
        self,
        number: int,
        record: Mapping[str, Any],
        partial: Path,
        keys: Sequence[str],
        shapes: Mapping[str, np.ndarray],
        starts: Sequence[int],
    ) -> BegunShard | str:
        """Return the shard, or why it is dropped. The text is empty if another process has it."""
        rows, made = self.dump.plan.shard(number), RowsMade.from_json(record)
        most = rows.start + made.count
        if self.retry_failed:  # images that failed are tried again, and others may have changed
            sizes = {*record.get("sizes", {}).items()} ^ {*self._sizes(number).get("sizes", {}).items()}
            most = min([most, *(failure.row for failure in made.failures), *(int(row) for row, _ in sizes)])
        stop = max(start for start in (rows.start, *starts) if start <= most)  # the last batch commits a shard
        if stop == rows.start:
            return "no whole batch is worth keeping"
        source = self._source(number, partial)
        if isinstance(source, str):
            return source
        descriptor, is_own = source
        if os.fstat(descriptor).st_size - record["bytes"] not in (0, RESERVE):
            os.close(descriptor)
            return "its file is of another size"
        with ExitStack() as copied_from, ExitStack() as given_up:
            if not is_own:
                copied_from.callback(os.close, descriptor)
            mine = self._file(number, keys, shapes, (descriptor, partial) if is_own else None)
            given_up.callback(mine.close if is_own else mine.abort)
            layout, kept = mine.layout.arrays, ShardSummary(record["file"], record["bytes"], record["hashes"])
            wanted = {name: _bytes_of(layout[name], shapes.get(name), stop - rows.start) for name in _stages(layout)}
            hashed = {name: _bytes_of(layout[name], shapes.get(name), made.count) for name in _stages(layout)}
            if not mine.take_up(descriptor, wanted, hashed, kept):
                return "its rows are not those that were kept"
            given_up.pop_all()
        made.cut(range(rows.start, stop))
        return BegunShard(number, mine, made)

    def _source(self, number: int, partial: Path) -> tuple[int, bool] | str:
        """Return a descriptor of the file with the rows, and whether this process owns the file now.

        It does if no other process may write to it. Otherwise rows are copied from it, also if it has its final name
        already, or belongs to another user who allows only reading. If there is no such file, a text says why. It is
        empty if another process has the shard.
        """
        taken = take_partial(partial)
        if taken is not None:
            descriptor, is_locked = taken
            can_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            return descriptor, is_locked and can_write and os.fstat(descriptor).st_nlink == 1
        if is_there(partial) or is_there(self.dump.record_path(number)):
            return ""  # its writer lives, or has committed the shard
        try:
            return open_regular(self.dump.shard_path(number)), False
        except (FileNotFoundError, ValueError):
            return "its file is gone"

    def _file(
        self,
        number: int,
        keys: Sequence[str],
        shapes: Mapping[str, np.ndarray],
        partial: tuple[int, Path] | None = None,
    ) -> ShardWriter:
        dump = self.dump
        arrays = dump.plan.arrays(number, shapes)
        return ShardWriter(dump.shard_path(number), dump.format, arrays, keys, dump.attributes(number), partial)

    def keep(self, begun: BegunShard) -> bool:
        """Put the rows of an unfinished shard on the disk, then the record that says so.

        Raises OSError and MachineError.

        Returns False if another process has committed it, or has more rows of it on the disk.
        """
        other = self.dump.unfinished_shard(begun.number)
        is_other = other is not None and other.partial != begun.file.partial
        if self.is_done(begun.number) or (is_other and self._is_further(other, begun)):
            return False
        _refuse_if_gone(begun)
        written = begun.file.keep()
        record = begun.made.to_json(self.dump.plan, begun.number, written)
        record |= {"environments": self._environments(begun.made), **self._sizes(begun.number)}
        path = record_path(self.dump.path / SHARDS, begun.number)
        try:
            publish_checksummed(path, record, replace=True)
        except OSError as error:
            if error.errno not in FULL:
                raise
            begun.file.make_room()
            publish_checksummed(path, record, replace=True)
        if other is not None and is_other:
            other.remove_partial()
        return True

    def _is_further(self, other: Unfinished | None, begun: BegunShard) -> bool:
        return bool(other and other.partial is not None and other.rows >= begun.made.count and is_there(other.partial))

    def leave(self, begun: BegunShard) -> None:
        """Leave an unfinished shard. If its record names its file, the file stays for whoever resumes it."""
        is_named = True
        with suppress(MachineError):  # nobody can tell whether the record names it, so it stays
            kept = self.dump.unfinished_shard(begun.number)
            is_named = kept is not None and kept.partial == begun.file.partial
        begun.file.close() if is_named else begun.file.abort()

    def commit(self, begun: BegunShard, beside: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
        """Commit a shard whose rows are written: name its file, then publish its record. Returns the record.

        Returns None if another process was faster. `beside` are the arrays that are no stages.
        """
        number = begun.number
        record = self._record(number, begun.file.finish(beside), begun.made)
        path, before = self.dump.record_path(number), _before(self.dump, number)
        with one_at_a_time(self.dump.path / SHARDS) as is_locked:
            if self.is_done(number):
                begun.file.abort()
                self._forget_unfinished(number, is_locked)
                return None
            _refuse_if_gone(begun)
            if is_there(path):  # from here on the shard is not committed, but what it says about failed images is kept
                path.replace(before)
                sync_folder(self.dump.path / SHARDS)
            begun.file.publish()
            publish_checksummed(path, record, replace=True)
            before.unlink(missing_ok=True)
            self._forget_unfinished(number, is_locked)  # last, because until now only these rows could be resumed
        return record

    def _forget_unfinished(self, number: int, is_locked: bool) -> None:
        if not is_locked:  # without locks, other files than the named one may be left
            remove_partials(self.dump.shard_path(number))
        kept = self.dump.unfinished_shard(number)
        if kept is not None:
            kept.remove()

    def _record(self, number: int, written: ShardSummary, made: RowsMade) -> dict[str, Any]:
        plan = self.dump.plan
        record = record_content(plan, number, written, made.failures, made.digests)
        if plan.counts_traits:
            counts = dict(sorted(made.all_traits.items()))
            record["pictures"] = {"read": len(plan.shard(number)) - len(made.failures), **counts}
        record |= self._sizes(number)
        if made.least_batch is not None:
            record["batch_size"] = made.least_batch
        others = [one for one in self._environments(made) if one != dict(self.environment)]
        if others or self.environment != plan.environment:
            record["environment"] = dict(self.environment)
        if others:  # earlier processes, which made some of the rows
            record["environments"] = others
        return record

    def _sizes(self, number: int) -> dict[str, Any]:
        """Return the sizes of images in a shard that have changed since they were listed, as records hold them."""
        rows = self.dump.plan.shard(number)
        sizes = {str(row): size for row, size in self.resized.items() if row in rows}
        return {"sizes": sizes} if sizes else {}

    def _environments(self, made: RowsMade) -> list[dict[str, str]]:
        """Return the environments of all processes that made rows of a shard, each once, this one last."""
        mine = dict(self.environment)
        return [*(dict(one) for one in made.environments if dict(one) != mine), mine]


def _refuse_if_gone(begun: BegunShard) -> None:
    """Raise MachineError if the file of a shard has lost its name, because everything written to it would be lost."""
    if not is_there(begun.file.partial):
        raise MachineError(
            f"unfinished shard {shown(begun.file.partial)}: it was removed while it was being written",
            f"did somebody remove it, or a machine that does not see the locks of this one? Then {RESUMES}",
        )


def _stages(arrays: Iterable[str]) -> list[str]:
    return [name for name in arrays if is_stage(name)]


def _bytes_of(array: Array, shapes: np.ndarray | None, count: int) -> int:
    """Return the bytes of the first `count` rows of an array. `shapes` are (rows, 3), if maps differ in size."""
    rows = count if shapes is None else int(shapes[:count].astype(np.int64).prod(1).sum())
    return rows * array.row_bytes


@contextmanager
def _reading_back(partial: Path) -> Iterator[None]:
    """Turn an error while rows on the disk are read into one that says what to do if it stays."""
    try:
        yield
    except OSError as error:
        is_refused = isinstance(error, PermissionError) and error.filename == str(partial)
        if not is_of_machine(error) and not is_refused:
            raise
        raise MachineError(
            f"unfinished shard {shown(partial)}: {os.strerror(error.errno or 0)}",
            f"check the disk, or delete that file to have the shard made anew; {RESUMES}",
        ) from error


def reopen(dump: Dump) -> None:
    """Say that the dump is not complete, before any shard of it changes. Raises DamagedError and MachineError.

    The manifest of the dump that a generation belongs to says so, too.
    """
    with disk_errors(dump.path):
        note_again(dump)
        open_manifest(dump)


def finalize(dump: Dump, retry_failed: bool = False) -> dict[str, Any]:
    """Write failures.jsonl, then manifest.json, from the records. Returns the content of the manifest.

    What is left of unfinished shards is removed first, except of those that `retry_failed` makes again. Raises
    IncompleteError if a record is missing, and MachineError.
    """
    records = list(dump.records())
    if len(records) < dump.plan.num_shards:
        way_out = "run its extract command again to complete it"
        if unrecorded := dump.unrecorded():
            file, record = dump.shard_path(unrecorded[0]).name, dump.record_path(unrecorded[0]).name
            way_out += f"; {file} is there without its record {record}, and does not count"
        raise IncompleteError(
            f"dump {shown(dump.path)}: it lacks {dump.plan.num_shards - len(records):,} of"
            f" {counted(dump.plan.num_shards, 'shard')}",
            way_out,
        )
    with disk_errors(dump.path):
        _remove_left(dump, retry_failed)
        remove_unused(dump.path / SHARDS)
        publish_lines(dump.path / FAILURES, failure_lines(records), replace=True)
        if not has_grown(dump.path):
            manifest = manifest_content(dump.plan, records)
            publish_checksummed(dump.path / MANIFEST, manifest, replace=True)
            return manifest
        with one_at_a_time(dump.path / SHARDS):
            return publish_manifest(dump, known_generations(dump))


def finalize_all(root: Dump) -> dict[str, Any]:
    """Write the last files of all generations, also of one whose shards are all there but which is not named yet.

    Returns the totals of the dump. Raises as `finalize` does.
    """
    totals: dict[str, Any] = finalize(root)["totals"]
    begun = next_generation(root)
    is_whole = begun is not None and not begun.committed().missing
    for dump in [*generations_of(root), *([begun] if begun is not None and is_whole else [])]:
        dump.refuse_damaged_shards()
        if not dump.is_complete():
            finalize(dump)
        commit(root, dump)
    added = generations_of(root)
    return totals_of(record for dump in (root, *added) for record in dump.records()) if added else totals


def _before(dump: Dump, number: int) -> Path:
    """Return the path of a shard's record while the shard is made again."""
    path = dump.record_path(number)
    return path.with_name(path.name + BEFORE)
