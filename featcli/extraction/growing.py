"""Decide which generation of a dump a run works on next, and with which of the images that were found.

Each is found by what is on the disk at that moment, so that several runs, and runs after a kill, come to the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcli.dump.folder import MANIFEST, PLAN, Dump, in_use
from featcli.dump.generations import MORE, all_generations, folder_of, has_grown, next_generation, refuse_gap
from featcli.dump.lock import FolderLock, is_in_use
from featcli.dump.plan import Extends, Outline, digest_keys, other_images
from featcli.dump.records import split_digests
from featcli.errors import ConflictError, DamagedError, counted, shown
from featcli.events import Report, silent
from featcli.extraction.columns_again import as_known
from featcli.extraction.picture_check import digests_of
from featcli.extraction.pictures_again import digests_in_memory
from featcli.extraction.planning import Extension, refusal_of
from featcli.extraction.planning import dry_run as of_one
from featcli.inputs.image_list import MISSING, WHOLE, Image, ImageList, is_url
from featcli.inputs.keys import Keys, first_rows, missing_from
from featcli.inputs.listing import Listing, find
from featcli.pixels.failure import NOT_READ
from featcli.reading.reader import DumpReader, reader_of
from featcli.spec.commands import ExtractSpec
from featcli.spec.words import AUTO
from featcli.system.files import is_there

LOOKED_AT = 100  # images of the dump that are not given: whether they have other keys now
NAMED = 10  # changed images that are named
SAMPLED = 16  # images of the dump that are given, of unchanged size: whether their bytes are those of the rows
EXTEND = "give --extend, which adds them, or use another -o for all"


@dataclass(frozen=True)
class Step:
    """A generation to make or to resume, and its images."""

    path: Path
    listing: Listing
    root: Dump
    extends: Extends | None = None  # of a generation that is to be begun

    def options(self, asked: ExtractSpec) -> ExtractSpec:
        """Return the options of this generation: those of the dump, where none was given."""
        own = replace(asked, output=str(self.path), extend=False, check_digests=False)
        begun = Dump.existing(self.path)
        if begun is not None and begun.plan.extends is not None:  # as it was begun, whatever the first generation was
            return replace(own, batch_size=None, threads=AUTO, shard_size=None)
        return own

    @property
    def extension(self) -> Extension | None:
        """What the plan of a generation that is to be begun follows from."""
        return None if self.extends is None else Extension(self.root, self.extends)

    def tell(self, report: Report) -> None:
        """Say which generation all that follows is about, if it is not the first."""
        if self.path != self.root.path:
            state = "new" if self.extends else "complete" if is_there(self.path / MANIFEST) else "begun already"
            reason = f"{state}, with {counted(len(self.listing.images), 'image')}"
            report("choice", name="generation", value=int(self.path.name), reason=reason)


@dataclass(frozen=True)
class Growth:
    """A dump as it is now, beside the images that were found."""

    root: Dump
    dumps: list[Dump]  # all generations that are part of the dump
    is_unfinished: list[bool]  # of each: whether it lacks something, also its list, or is made again
    is_damaged: list[bool]  # of each: whether it was complete, and shards of it are gone or of another size
    listing: Listing
    places: np.ndarray  # for each row of the dump its place in the listing, or -1 if it is gone
    new: np.ndarray  # places of images that are not in the dump, in their order

    @classmethod
    def of(cls, root: Dump, listing: Listing) -> Growth:
        """Compare the keys of the dump with those that were found.

        A list of images that is damaged is taken for the images that no other generation has, if they are the planned
        ones. Raises DamagedError and MachineError.
        """
        if root.plan.leads is None and (older := listing.older()) is not None:  # its keys are those of an older version
            listing = replace(listing, images=older)
        generations = all_generations(root, with_lists=False)
        dumps, images = generations.dumps, listing.images
        lists = [_keys_in(dump) for dump in dumps]
        lost = [number for number, keys in enumerate(lists) if keys is None]
        if lost:
            known = Keys(key for keys in lists if keys is not None for key in keys)
            (new,) = np.nonzero(first_rows(known, images.keys)[len(known) :] >= len(known))
            rest = images.taken(new).keys
            if len(lost) > 1 or digest_keys(rest) != dumps[lost[0]].plan.keys_digest:
                dumps[lost[0]].keys()  # says what is wrong with it
            lists[lost[0]] = rest
        known = Keys(key for keys in lists for key in keys or ())
        first = first_rows(known, images.keys)[len(known) :]
        places = np.full(len(known), -1)
        is_new = first >= len(known)
        places[first[~is_new]] = np.flatnonzero(~is_new)
        is_damaged = [
            not is_one and bool(dump.found.missing)
            for dump, is_one in zip(dumps, generations.is_unfinished, strict=True)
        ]
        is_unfinished = [
            is_one or is_damaged[number] or number in lost or not dump.has_its_columns()
            for number, (dump, is_one) in enumerate(zip(dumps, generations.is_unfinished, strict=True))
        ]
        return cls(root, dumps, is_unfinished, is_damaged, listing, places, np.flatnonzero(is_new))

    @property
    def rows(self) -> int:
        """The number of rows in all generations."""
        return len(self.places)

    def places_of(self, number: int) -> np.ndarray:
        """Return the places in the listing of the images of a generation."""
        first = sum(dump.plan.num_images for dump in self.dumps[:number])
        return self.places[first : first + self.dumps[number].plan.num_images]

    def with_images(self, images: ImageList) -> Listing:
        """Return the listing with some of its images."""
        return replace(self.listing, images=images, total=len(images))

    def frozen(self, number: int) -> Listing:
        """Return the images of a generation as they were listed for it. Raises ConflictError as `_frozen` does."""
        return self.with_images(_frozen(self, self.dumps[number], self.places_of(number)))

    def begin(self, places: np.ndarray) -> Step:
        """Return the step that begins the next generation with the images at these places of the listing."""
        number = len(self.dumps)
        extends = Extends(self.root.plan.fingerprint, number, self.rows)
        listing = self.with_images(self.listing.images.taken(places))
        return Step(folder_of(self.root.path, number), listing, self.root, extends)

    def begin_any(self) -> Step:
        """Return a step that would add an image that is there: what it is refused for, every other one is, too."""
        return self.begin(np.arange(1))

    def step(self, dump: Dump, images: ImageList) -> Step:
        """Return the step that resumes a generation with these images."""
        return Step(dump.path, self.with_images(images), self.root)


def _keys_in(dump: Dump) -> Keys | None:
    """Return the keys of a generation; None if its list is damaged. Raises MachineError."""
    try:
        return dump.packed_keys()
    except DamagedError:
        return None


def refuse_generation(path: Path) -> None:
    """Raise ConflictError for the folder of a generation, which nobody extracts into by itself."""
    more = path.absolute().parent
    if more.name == MORE and is_there(more.parent / PLAN):
        raise ConflictError(
            f"dump {shown(path)}: this folder is for a generation of dump {shown(more.parent)}",
            f"use -o {shown(more.parent)} --extend",
        )


def steps_of_all(growth: Growth, retry_failed: bool, report: Report) -> list[Step]:
    """Return what a run without --extend has to do: the first generation, which says that there is nothing left, and
    others that lack something, hold failures to try again, or are of pictures in memory, which may be others now.

    Raises ConflictError unless the images are those of the dump, or of its first generations. With `retry_failed` only
    those of generations with failures are needed, and new ones are left for --extend, with a warning.
    """
    root, images = growth.root, growth.listing.images
    if retry_failed and not root.plan.is_in_memory and (growth.places >= 0).any():
        return _steps_of_failed(growth, report)
    if len(growth.new) and (growth.places >= 0).any():
        first = shown(images.keys[int(growth.new[0])])
        raise ConflictError(
            f"dump {shown(root.path)} holds {counted(growth.rows, 'image')}, and {len(growth.new):,} more are given,"
            f" first {first}",
            EXTEND,
        )
    there = [bool((growth.places_of(number) >= 0).all()) for number in range(len(growth.dumps))]
    is_gone = [bool((growth.places_of(number) < 0).all()) for number in range(len(growth.dumps))]
    count = there.index(False) if False in there else len(there)
    if not count or not all(is_gone[count:]):
        known = Keys(key for dump in growth.dumps for key, _ in dump.images())
        raise other_images(shown(root.path), known, images.keys)
    steps = []
    for number, dump in enumerate(growth.dumps[:count]):
        if number == 0 or retry_failed or growth.is_unfinished[number] or root.plan.is_in_memory:
            steps.append(growth.step(dump, images.taken(growth.places_of(number))))
    return steps


def _steps_of_failed(growth: Growth, report: Report) -> list[Step]:
    """Return the steps that try failed images again, and finish what lacks something. Other generations stay as they
    are, whatever has become of their images.

    Failed images that are gone stay failures. Raises ConflictError if other images of such a generation are gone,
    because its shards are made again as a whole.
    """
    if count := len(growth.new):
        text = (
            f"{counted(count, 'image')} {'is' if count == 1 else 'are'} not in the dump yet: --extend adds such images"
        )
        report("warning", text=text)
    steps = []
    for number, dump in enumerate(growth.dumps):
        places = growth.places_of(number)
        is_wanted = growth.is_unfinished[number] or bool(dump.found.failed)
        gone = np.flatnonzero(places < 0)
        if is_wanted and len(gone) and dump.found.failed_rows.issuperset(gone.tolist()):
            steps.append(growth.step(dump, _without_failed(growth, dump, number)))
            continue
        if is_wanted and len(gone):
            raise ConflictError(
                f"dump {shown(growth.root.path)}: {counted(len(gone), 'image')} of {shown(dump.path)}"
                f" {'is' if len(gone) == 1 else 'are'} gone, first {shown(dump.packed_keys()[int(gone[0])])}",
                "put the images back: shards with failed images are made again from all their images",
            )
        if is_wanted or (number == 0 and (places >= 0).all()):  # the first one says that there is nothing left
            steps.append(growth.step(dump, growth.listing.images.taken(places)))
    return steps


def _without_failed(growth: Growth, dump: Dump, number: int) -> ImageList:
    """Return the images of a generation of which only failed ones are gone, with their present sizes."""
    images, places = growth.frozen(number).images, growth.places_of(number)
    for row in np.flatnonzero(places >= 0).tolist():
        images.sizes[row] = growth.listing.images.sizes[int(places[row])]
    return images


def next_step(growth: Growth, others_work: bool) -> Step | None:
    """Return what a run with --extend does next: finish what was begun, under its own list, or begin a generation.

    None if there is nothing left. `others_work` says whether another process has the folder of the first generation.
    Raises ConflictError if another process makes a generation of other images.
    """
    root, images = growth.root, growth.listing.images
    refuse_gap(root, len(growth.dumps))  # comes first: it takes work to finish what cannot be added to
    for number, dump in enumerate(growth.dumps):
        if growth.is_unfinished[number]:
            places = growth.places_of(number)
            if growth.is_damaged[number]:
                _refuse_lost_rows(growth, dump, places)
            is_same = not len(growth.new) and bool((places >= 0).all())
            if not is_same and (others_work if dump is root else _is_worked_on(dump.path)):
                raise in_use(root.path)
            return growth.step(dump, _frozen(growth, dump, places))
    begun = next_generation(root)
    if begun is not None:
        keys = _keys_in(begun)
        if keys is None and digest_keys(images.taken(growth.new).keys) == begun.plan.keys_digest:
            return growth.step(begun, images.taken(growth.new))  # its list is written again
        first = first_rows(images.keys, keys or begun.packed_keys())[len(images) :]
        places = np.where(first < len(images), first, -1)
        if not np.array_equal(np.sort(places), growth.new) and _is_worked_on(begun.path):
            raise in_use(root.path)
        return growth.step(begun, _frozen(growth, begun, places))
    if not len(growth.new):
        return None
    return growth.begin(growth.new)


def _refuse_lost_rows(growth: Growth, dump: Dump, places: np.ndarray) -> None:
    """Raise DamagedError if shards of a complete generation cannot be made again as they were.

    Some of their images are gone or have changed, and the file may still hold their rows.
    """
    try:
        listed = [*dump.images()]
    except DamagedError:  # the list is written again first, for which all images have to be there
        return
    now, sizes = growth.listing.images.sizes, dump.found.sizes
    for number in dump.found.missing:
        lost = [
            listed[row][0]
            for row in dump.plan.shard(number)
            if row not in dump.found.failed_rows
            and (places[row] < 0 or now[int(places[row])] != sizes.get(row, listed[row][1]))
        ]
        if lost:
            file = dump.shard_path(number).relative_to(growth.root.path)
            raise DamagedError(
                f"dump {shown(growth.root.path)}: {file} is damaged, and {len(lost):,} of its images"
                f" {'is' if len(lost) == 1 else 'are'} gone or changed, first {shown(lost[0])}",
                "put the file back from a copy; or run featcli verify --repair, which sets it aside, and then this"
                " command: images that are not as they were become failures",
            )


def _is_worked_on(path: Path) -> bool:
    """Return whether another process has the folder of a generation."""
    with FolderLock(path) as lock:
        return not lock.alone()


def _frozen(growth: Growth, dump: Dump, places: np.ndarray) -> ImageList:
    """Return the images of an unfinished generation as they were listed for it, in its order.

    Files that are gone or changed by now become failures, if the folder that they were in is certainly one of those
    that are given: it holds other images of the dump. Raises ConflictError for all others that are gone.
    """
    images = growth.listing.images
    if (places >= 0).all() and _keys_in(dump) is None:  # then its list is written again
        return images.taken(places)
    keys = dump.packed_keys()
    found, numbers = images.taken(places[places >= 0]), np.asarray(images.numbers)
    known = {*numbers[growth.places[growth.places >= 0]].tolist(), *found.numbers}
    folders = [
        (number, one.leads)
        for number, one in enumerate(images.origins)
        if not one.tar and one.storage is not None and one.columns is None
    ]
    (gone,) = np.nonzero(places < 0)
    for row in gone.tolist():
        number = next((number for number, lead in folders if keys[row].startswith(lead)), None)
        if number is not None:
            found.add(keys[row], number, MISSING, WHOLE)
        if number is None or not (number in known or is_there(found.path(len(found) - 1))):
            raise ConflictError(
                f"dump {shown(growth.root.path)}: it is unfinished, and {counted(len(gone), 'image')} of it"
                f" {'is' if len(gone) == 1 else 'are'} not given, first {shown(keys[row])}",
                "give the inputs that hold them, which finishes it, and then the new ones",
            )
    ordered = found.in_order_of(keys)
    assert ordered is not None
    for row, (_, size) in enumerate(dump.images()):
        ordered.sizes[row] = dump.found.sizes.get(row, size)
    return ordered


def report_growth(growth: Growth, asked: ExtractSpec, report: Report) -> None:
    """Say how many images are new, which have changed since they were extracted, and how many are gone.

    Raises ConflictError if images of the dump have other keys now, because they would be added once more.
    """
    images, gone = growth.listing.images, int((growth.places < 0).sum())
    value = f"{len(growth.new):,} new, {growth.rows:,} there"
    numbers = len(growth.dumps)
    facts = {"new": len(growth.new), "there": growth.rows, "gone": gone, "generations": numbers}
    report("choice", name="growth", value=value, reason=counted(numbers, "generation"), **facts)
    if gone == growth.rows:
        text = f"none of the {counted(gone, 'image')} of the dump is given: are INPUT and --root those of before?"
        report("warning", text=text)
    elif gone:
        text = f"{counted(gone, 'image')} of the dump {'is' if gone == 1 else 'are'} not given any more: old rows stay"
        report("warning", text=text)
    reader = reader_of(growth.dumps)
    _refuse_other_keys(growth, reader)
    changed = [
        row
        for row, size in enumerate(reader.sizes)
        if growth.places[row] >= 0
        and MISSING not in (size, now := images.sizes[int(growth.places[row])])
        and size != now
    ]
    there = np.flatnonzero(growth.places >= 0).tolist() if asked.check_digests else _sample(growth)
    if there:
        changed = sorted({*changed, *_other_digests(growth, there, reader.digests, asked)})
    failed = {failure["row"] for failure in reader.failures}
    if repaired := [row for row in changed if row in failed]:
        more = f", and {counted(len(repaired) - 1, 'other')}" if len(repaired) > 1 else ""
        text = f"{shown(reader.keys[repaired[0]])} failed and has changed since{more}: --retry-failed tries it again"
        report("warning", text=text)
    changed = [row for row in changed if row not in failed]
    if changed:
        names = ", ".join(shown(reader.keys[row]) for row in changed[:NAMED])
        more = f", and {counted(len(changed) - NAMED, 'other')}" if len(changed) > NAMED else ""
        report("warning", text=f"{names}{more} changed since extracted: old rows stay, and --overwrite makes all anew")
    _report_cells(growth, reader, asked.label_level, report)


def _report_cells(growth: Growth, reader: DumpReader, label_level: int | None, report: Report) -> None:
    """Say which cells of rows that are there a table or a tar gives otherwise now, because they are not changed.

    Raises ConflictError for a column whose cells are of another kind than those of the dump.
    """
    listed = as_known(growth.root, growth.listing.columns(label_level))
    if listed is None or not (growth.places >= 0).any():
        return
    known = [name for name in listed.kinds if name in reader.columns.kinds]
    new = [name for name in listed.kinds if name not in reader.columns.kinds]
    hashes = np.fromiter((_hash(cells, known) for cells in reader.columns.cells(known)), np.uint64, growth.rows)
    rows = np.full(len(growth.listing.images), -1)
    there = np.flatnonzero(growth.places >= 0)
    rows[growth.places[there]] = there
    other, lacking = [], 0
    for place, line in listed.found():
        row = int(rows[place])
        if row < 0:
            continue
        cells = json.loads(line)
        if _hash(cells, known) != hashes[row]:
            other.append(row)
        lacking += any(cells[name] is not None for name in new)
    if other:
        first = shown(reader.keys[min(other)])
        report("warning", text=f"cells of {counted(len(other), 'old row')} are others now, first {first}: they stay")
    if lacking:
        names = ", ".join(map(shown, new))
        text = f"the dump has no column {names} yet: {counted(lacking, 'old row')} will have no cell there"
        report("warning", text=text)


def _hash(cells: Mapping[str, Any], names: Sequence[str]) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps([cells[name] for name in names]).encode("ascii"))


def _refuse_other_keys(growth: Growth, reader: DumpReader) -> None:
    """Raise ConflictError if an image of the dump has another key now, by what leads the keys of several inputs."""
    images = growth.listing.images
    gone = np.flatnonzero(growth.places < 0)[:LOOKED_AT].tolist() if len(growth.new) else []
    leads = {one.leads for one in images.origins}
    before = {"", *(f"{lead}/" for dump in growth.dumps for lead in dump.plan.leads or ())}
    others = [
        (row, lead + key.removeprefix(one))
        for row, key in ((row, reader.keys[row]) for row in gone)
        for one in before
        for lead in leads
        if key.startswith(one) and lead != one
    ]
    first = first_rows(images.keys, Keys(key for _, key in others))[len(images) :].tolist() if others else []
    for (row, now), place in zip(others, first, strict=True):
        if place < len(images) and images.sizes[place] == reader.sizes[row] and _is_it(growth, row, images[place]):
            raise ConflictError(
                f"dump {shown(growth.root.path)}: its image {shown(reader.keys[row])} is given as {shown(now)} now",
                "give the inputs as before, or only new ones: keys of several inputs are led by their names",
            )


def _is_it(growth: Growth, row: int, image: Image) -> bool:
    """Return whether a picture is that of a row, by its bytes, as far as the dump knows them."""
    for dump in growth.dumps:
        if row < dump.plan.num_images:
            record = dump.record_of(row // dump.plan.shard_rows) if dump.plan.has_digests else None
            if record is None:
                return True
            known = split_digests(record["digests"])[row % dump.plan.shard_rows]
            return known in (NOT_READ, *digests_of([image]))
        row -= dump.plan.num_images
    return False


def dry_run(asked: ExtractSpec, report: Report = silent, rate: float | None = None) -> Outline | None:
    """Say what `extract` would do: see featcli.extraction.planning. None if --extend finds nothing new."""
    refuse_generation(asked.dump_path)
    root = None if asked.overwrite else Dump.existing(asked.dump_path)
    if root is None or not (asked.extend or asked.retry_failed or has_grown(root.path)):
        return of_one(asked, report, rate)
    growth = Growth.of(root, find(asked))
    if not asked.extend:
        steps = steps_of_all(growth, asked.retry_failed, report)
        outlines = [_dry_run(one, asked, report, rate) for one in steps]
        return outlines[-1] if outlines else None
    if not any(growth.is_unfinished):
        report_growth(growth, asked, report)
    step = next_step(growth, is_in_use(root.path))
    if step is None:
        one = growth.begin_any()
        outline = of_one(one.options(asked), silent, None, one.listing, one.extension)
        if text := refusal_of(root, outline.outputs):
            report("warning", text=text)
        return None
    outline = _dry_run(step, asked, report, rate)
    if left := len(missing_from(step.listing.images.keys, growth.listing.images.taken(growth.new).keys)):
        text = f"the run finishes this generation first; then it adds {counted(left, 'more image')}, not counted here"
        report("warning", text=text)
    return outline


def _dry_run(step: Step, asked: ExtractSpec, report: Report, rate: float | None) -> Outline:
    step.tell(report)
    return of_one(step.options(asked), report, rate, step.listing, step.extension)


def _sample(growth: Growth) -> list[int]:
    """Return some rows whose pictures are compared in any case: another folder may hold others of the same names.

    None for pictures in memory and at URLs, and for dumps without digests.
    """
    images, there = growth.listing.images, np.flatnonzero(growth.places >= 0)
    if images.are_in_memory or not len(there) or not all(dump.plan.has_digests for dump in growth.dumps):
        return []
    some = there[np.unique(np.linspace(0, len(there) - 1, SAMPLED).astype(int))].tolist()
    return [row for row in some if not is_url(images.path(int(growth.places[row])))]


def _other_digests(growth: Growth, rows: Sequence[int], digests: Sequence[str], asked: ExtractSpec) -> list[int]:
    """Return those of the rows whose pictures have other bytes now."""
    images = growth.listing.images
    rows = [row for row in rows if digests[row]]
    found = [images[int(growth.places[row])] for row in rows]
    now = digests_in_memory(found, asked) if images.are_in_memory else digests_of(found)
    return [row for row, digest in zip(rows, now, strict=True) if digest not in ("", NOT_READ, digests[row])]
