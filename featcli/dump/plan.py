"""Freeze what was asked before the first image is decoded, with a fingerprint that tells two plans apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from featcli.dump.checksummed_json import hash_json
from featcli.dump.columns import PlannedColumns
from featcli.dump.formats.layout import ITEM_BYTES, SHAPES, VALID
from featcli.dump.settings import Settings, is_count
from featcli.errors import ConflictError, shown, shown_shape
from featcli.inputs.keys import MANY, Keys, missing_from
from featcli.spec.commands import ExtractSpec
from featcli.spec.option import options_of
from featcli.spec.words import Dtype

if TYPE_CHECKING:
    from featcli.inputs.image_list import ImageList
    from featcli.pixels.sizes import Sizes

FORMAT_VERSION = 2
FORMAT_VERSIONS = (1, 2)  # that are read; a dump that was begun by one of them is resumed by it
MAP = ("C", "H", "W")
REGISTERS = ("R", "C")
OF_STAGE = ("name", "index", "module", "stride", "map_shape", "shape", "dtype")  # in format version 1
COUNTED = "counted"  # in the provenance: what is counted of pictures
IN_MEMORY = "in_memory"  # in the provenance of a dump whose pictures were in the memory of a caller
LABEL_LEVEL = "label_level"  # in the provenance: which folder inside its input is the label, if not the first
NOT_CHOSEN = ("leads", COUNTED, IN_MEMORY, LABEL_LEVEL, "licence", "class_names")  # of the provenance
BY_ITSELF = ("threads", "batch_size", "format", "pool")  # settings of a dump alone; outputs say how maps were pooled
OUTPUT_NAME = re.compile(r"\w[\w.-]*(@[\w+]+)?(?<!\.shapes)(?<!\.shape)", re.ASCII)
# Fields of a plan whose names differ from those of their options.
NOT_AS_OPTIONS = {
    "shard_rows": "--shard-size",
    "folded": "--fold",
    "compiled": "--compile",
    "input_size": "--image-size",
    "weights_digest": "digest of the weights",
    "weights_files": "files of the weights",
    "keys_digest": "digest of the keys",
}
NOT_OUTPUTS = ("keys", "key", "row", VALID)  # names of other things in a shard and in exports


class OtherVersionError(ValueError):
    """A plan of another version of the format."""


@dataclass(frozen=True)
class Output:
    """One stored array: a point of the network, and how its map was reduced."""

    name: str  # of the array: the point, with the reduction behind an @ where the stage has several
    point: str  # a stage, or one of spec.words.VECTORS
    reduction: str  # of the map; none for a vector
    axes: tuple[str, ...]  # of what is stored of one image: C, H and W; R counts registers
    shape: tuple[int | None, ...]  # what is stored of an image; None for an edge that depends on the image
    dtype: Dtype
    module: str  # the library's own name of the point
    index: int | None = None  # the library's own, of a stage
    stride: tuple[int, int] | None = None  # input pixels per cell of a stage: (vertical, horizontal)
    map_shape: tuple[int | None, ...] | None = None  # (C, H, W) of a stage before the reduction; None likewise

    @property
    def is_of_stage(self) -> bool:
        """Whether it is made of a feature map, not a vector of the model's own."""
        return self.map_shape is not None

    @property
    def is_map(self) -> bool:
        """Whether what is stored has positions: (C, H, W)."""
        return self.axes == MAP

    @property
    def is_ragged(self) -> bool:
        """Whether the maps of images differ in size."""
        return None in self.shape

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape that is stored of an image whose input has this (H, W)."""
        own = (0, *(edge // step for edge, step in zip(size, self.stride or (1, 1), strict=True)))
        return tuple(own[axis] if edge is None else edge for axis, edge in enumerate(self.shape))

    def row_bytes(self, size: tuple[int, int] = (0, 0)) -> int:
        """Return the bytes that are stored of an image; if maps differ in size, of one whose input has this (H, W)."""
        return math.prod(self.shape_at(size)) * ITEM_BYTES[self.dtype]

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """Return (rows, 3): the (C, H, W) of each row of a stage whose maps differ in size.

        `sizes` are (rows, 2) of inputs.
        """
        cells = self._cells(sizes)
        return np.column_stack([np.full(len(cells), self.shape[0]), cells]).astype("<u4")

    def _bytes_of(self, sizes: Sizes, rows: range) -> int:
        if sizes.own is None or not self.is_ragged:
            return self.row_bytes() * len(rows)
        return self.row_bytes(self.stride or (1, 1)) * int(self._cells(sizes.own_of(rows)).prod(1).sum())

    def _cells(self, sizes: np.ndarray) -> np.ndarray:
        cells: np.ndarray = sizes.astype(np.int64) // np.array(self.stride or (1, 1))
        return cells

    @property
    def channels(self) -> int:
        """C of what is stored."""
        return self.shape[self.axes.index("C")] or 0

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """(n, ...) rows of one size as (n, C, positions): registers count as positions, a vector has one."""
        if self.axes == REGISTERS:
            return np.swapaxes(rows, 1, 2)
        return np.reshape(rows, (len(rows), self.channels, -1))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plan.json holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def as_stage(self) -> dict[str, Any]:
        """As plan.json of format version 1 has it, and `--json` has stages."""
        content = self.to_json()
        return {name: content[name] for name in OF_STAGE}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Output:
        """An output in a plan.json. Raises KeyError, TypeError or ValueError for anything else."""
        lists = ("axes", "shape", "stride", "map_shape")
        return cls(**{**content, **{name: None if content[name] is None else tuple(content[name]) for name in lists}})

    @classmethod
    def from_stage(cls, content: Mapping[str, Any], reduction: str) -> Output:
        """A stage in a plan.json of format version 1. Raises as `from_json` does."""
        if content.keys() != set(OF_STAGE):
            raise ValueError("a stage with other fields")
        axes = MAP[: len(content["shape"])]
        return cls.from_json({**content, "point": content["name"], "reduction": reduction, "axes": axes})


def bytes_of_rows(outputs: Iterable[Output], sizes: Sizes, rows: range) -> int:
    """Return the bytes that are stored of these rows over all outputs. `sizes` are those of the images' inputs."""
    return sum(output._bytes_of(sizes, rows) for output in outputs)


Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def arrays_of(outputs: Sequence[Output], num_rows: int, shapes: Mapping[str, np.ndarray]) -> Arrays:
    """Return every array of so many rows as a file holds them.

    `shapes` are (rows, 3), for stages whose maps differ in size.
    """
    arrays: Arrays = {}
    for one in outputs:
        values = (int(shapes[one.name].astype("int64").prod(1).sum()),) if one.is_ragged else None
        arrays[one.name] = one.dtype, values or (num_rows, *one.shape_at((0, 0)))
    arrays[VALID] = "uint8", (num_rows,)
    return arrays | {f"{one.name}{SHAPES}": ("uint32", (num_rows, 3)) for one in outputs if one.is_ragged}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The part of a plan that is known before any weight is read: which rows of which stages, shard by shard."""

    outputs: tuple[Output, ...]
    num_images: int
    keys_digest: str  # xxh3-128 of the keys in row order
    shard_rows: int

    @property
    def reductions(self) -> str:
        """The reductions of its outputs, such as `none,cls`, for people."""
        of_stages = [one for one in self.outputs if one.is_of_stage]
        return ",".join(dict.fromkeys(one.reduction for one in of_stages or self.outputs))

    @property
    def num_shards(self) -> int:
        """The number of shards. The last one may be short."""
        return -(-self.num_images // self.shard_rows)

    def shard(self, number: int) -> range:
        """Return the rows of a shard."""
        first = number * self.shard_rows
        return range(first, min(first + self.shard_rows, self.num_images))

    def arrays(self, number: int, shapes: Mapping[str, np.ndarray]) -> Arrays:
        """Return every array of a shard: name -> (dtype, shape).

        `shapes` are (rows, 3), for stages whose maps differ in size.
        """
        return arrays_of(self.outputs, len(self.shard(number)), shapes)

    def shard_bytes(self, number: int, sizes: Sizes) -> int:
        """Return the bytes that are stored of the rows of a shard over all stages."""
        return bytes_of_rows(self.outputs, sizes, self.shard(number))


@dataclass(frozen=True)
class Extends:
    """The dump whose generation a plan is of."""

    fingerprint: str  # of the first generation's plan
    generation: int  # its number: 1 is the first that was added
    rows: int  # in all generations before

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Extends:
        """Return the field `extends` of a plan.json. Raises KeyError, TypeError or ValueError for anything else."""
        found = cls(**content)
        if not isinstance(found.fingerprint, str) or not (is_count(found.generation) and is_count(found.rows)):
            raise ValueError("a dump that it cannot extend")
        return found


@dataclass(frozen=True, kw_only=True)
class Plan(Outline):
    """Everything that decides the bytes of a dump. It holds no times, hosts or absolute paths."""

    settings: Settings
    images_digest: str  # xxh3-128 over images.jsonl: the keys and the sizes of their files when they were listed
    provenance: Mapping[str, Any]  # names for people: the same bytes may come from a file of another name
    environment: Mapping[str, str]  # what can move the last bits and cannot be repeated at will
    columns: PlannedColumns | None = None  # the user's; None if there are none
    extends: Extends | None = None  # None for the first generation
    format_version: int = FORMAT_VERSION

    @property
    def row_bytes(self) -> int:
        """Bytes of what is stored of an image over all stages; where maps differ in size, of one of the common size."""
        return sum(output.row_bytes(self.settings.input_size) for output in self.outputs)

    def options(self) -> dict[str, Any]:
        """The options that ask for just these outputs, by name."""
        of_stages = [one for one in self.outputs if one.is_of_stage]
        pools: dict[str, list[str]] = {}
        for one in of_stages:
            pools.setdefault(one.point, []).append(one.reduction)
        vectors = tuple(one.point for one in self.outputs if not one.is_of_stage)
        return {
            "out_indices": tuple(dict.fromkeys(one.index for one in of_stages)) or None,
            "out_features": vectors or None,
            "pool": next(iter(pools.values())) if len({*map(tuple, pools.values())}) == 1 else pools,
            "dtype": self.outputs[0].dtype,
        }

    @property
    def leads(self) -> Mapping[str, str] | None:
        """The kind (folder, tar or file) of each input by what leads its keys.

        None in older plans, which do not say it.
        """
        return self.provenance.get("leads")

    @property
    def label_level(self) -> int:
        """Which folder inside its input is the label of an image: 1 is the first."""
        return int(self.provenance.get(LABEL_LEVEL, 1))

    @property
    def counts_traits(self) -> bool:
        """Whether its records count traits of pictures. Dumps of earlier versions do not."""
        return COUNTED in self.provenance

    @property
    def is_in_memory(self) -> bool:
        """Whether its pictures were in the memory of a caller, and in no file that could be found again."""
        return bool(self.provenance.get(IN_MEMORY, False))

    @property
    def has_digests(self) -> bool:
        """Whether its records hold the digests of the pictures' files."""
        return self.format_version > 1

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of all that can change a byte of the shards.

        That is all but sizes of files, the user's columns, provenance and environment.
        """
        content = self.to_json()
        for field in ("fingerprint", "images_digest", "columns", "provenance", "environment"):
            content.pop(field, None)
        return hash_json(content)

    def to_json(self) -> dict[str, Any]:
        """Return the content of plan.json. It shares what is in its fields with the plan, and must not be changed."""
        is_first = self.format_version == 1
        return {
            "format_version": self.format_version,
            "fingerprint": "",
            **({} if self.extends is None else {"extends": vars(self.extends)}),
            "settings": self.settings.to_json(),
            **({"stages": [one.as_stage() for one in self.outputs]} if is_first else {}),
            **({} if is_first else {"outputs": [one.to_json() for one in self.outputs]}),
            "num_images": self.num_images,
            "keys_digest": self.keys_digest,
            "images_digest": self.images_digest,
            **({} if self.columns is None else {"columns": self.columns.to_json()}),
            "shard_rows": self.shard_rows,
            "provenance": dict(self.provenance),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Return the plan of a plan.json. Raises KeyError, TypeError or ValueError for anything else."""
        version = content["format_version"]
        if type(version) is not int or version not in FORMAT_VERSIONS:
            known = " and ".join(map(str, FORMAT_VERSIONS))
            raise OtherVersionError(f"format version {version}, this featcli reads {known}")
        settings = Settings.from_json(content["settings"])
        if version == 1:
            outputs = tuple(Output.from_stage(stage, settings.first_pool) for stage in content["stages"])
        else:
            outputs = tuple(map(Output.from_json, content["outputs"]))
        _check_types(content, outputs)
        plan = cls(
            settings=settings,
            outputs=outputs,
            num_images=content["num_images"],
            keys_digest=content["keys_digest"],
            images_digest=content["images_digest"],
            shard_rows=content["shard_rows"],
            provenance=content["provenance"],
            environment=content["environment"],
            columns=PlannedColumns.from_json(content["columns"]) if "columns" in content else None,
            extends=Extends.from_json(content["extends"]) if "extends" in content else None,
            format_version=version,
        )
        if plan.fingerprint != content["fingerprint"]:
            raise ValueError("its fingerprint does not fit its content")
        return plan


def _check_types(content: Mapping[str, Any], outputs: Sequence[Output]) -> None:
    """Raise ValueError if a field is not what its readers rely on: anybody may have written the file."""
    counts = [content["num_images"], content["shard_rows"]]
    counts += [edge for one in outputs for edge in (*_known(one.shape), *_known(one.map_shape or ()))]
    counts += [edge for one in outputs for edge in one.stride or ()]
    if not all(map(is_count, counts)):
        raise ValueError("a number that is not a whole one above zero")
    texts = [content["keys_digest"], content["images_digest"]]
    texts += [
        text for one in outputs for text in (one.name, one.point, one.reduction, one.module, one.dtype, *one.axes)
    ]
    texts += [content["provenance"]["checkpoint"], content["provenance"]["weights"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name that is not a text")
    leads = content["provenance"].get("leads", {})
    if not isinstance(leads, dict) or not all(isinstance(kind, str) for kind in leads.values()):
        raise ValueError("leads that are none")
    if not all(len(one.axes) == len(one.shape) and len(one.stride or (1, 1)) == 2 for one in outputs):
        raise ValueError("axes that do not fit a shape")
    if not all(OUTPUT_NAME.fullmatch(one.name) and one.name not in NOT_OUTPUTS for one in outputs):
        raise ValueError("an output whose name is none")  # names become those of files, arrays and columns
    if not outputs or len({one.name for one in outputs}) < len(outputs) or not isinstance(content["environment"], dict):
        raise ValueError("no outputs, or two of one name")


def _known(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Return the edges of a shape that must be numbers. Height and width may depend on the image."""
    return shape[:1] if shape[1:] == (None, None) else shape


def with_fingerprint(plan: Plan) -> dict[str, Any]:
    """Return the plan as it is written."""
    return plan.to_json() | {"fingerprint": plan.fingerprint}


def digest_keys(keys: Keys) -> str:
    """Return the xxh3-128 of keys, each followed by a zero byte."""
    return xxhash.xxh3_128_hexdigest(keys.content)


def digest_images(images: ImageList) -> str:
    """Return the xxh3-128 of what images.jsonl will be."""
    digest = xxhash.xxh3_128()
    for line in image_lines(images):
        digest.update(line)
    return digest.hexdigest()


def image_lines(images: ImageList) -> Iterator[bytes]:
    """Yield the lines of images.jsonl, many at once."""
    as_json = json.JSONEncoder().encode
    lines = (
        f'{{"key": {as_json(key)}, "bytes": {size}}}\n' for key, size in zip(images.keys, images.sizes, strict=True)
    )
    while some := "".join(islice(lines, MANY)):
        yield some.encode("ascii")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted field, old value, new value) for every field in which two JSON objects differ."""
    for name in dict.fromkeys([*old, *new]):
        one, two = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from differences(one, two, f"{above}{name}.")
        elif one != two:
            yield above + name, one, two


def environment_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a text such as `torch 2.9 -> 2.10` for everything that has changed in an environment."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]


def refuse_other_plan(path: str, old: Plan, new: Plan, is_extended: bool = False) -> None:
    """Raise ConflictError with the fields in which the plan of an existing dump differs from the one asked for.

    `is_extended` says that the new plan is of a generation that is to be added.
    """
    if old.fingerprint == new.fingerprint:
        return
    differing: dict[str, str] = {}  # by option, because one option may set several fields
    for field, one, two in differences(_for_people(old), _for_people(new)):
        name = _as_option(field)
        differing.setdefault(name, f"{name}: {_short(one)} there, {_short(two)} now")
    fields = [*differing.values()]
    raise ConflictError(
        f"dump {path} was made with another plan: {'; '.join(fields[:4])}"
        + (f"; and {len(fields) - 4} more" if len(fields) > 4 else ""),
        "use another -o, or --overwrite to delete what is there and start anew"
        if old.extends is None and not is_extended
        else "leave these options out: a dump grows with those that it has; or use another -o",
    )


def first_difference(one: Plan, other: Plan) -> str:
    """Return how two plans first differ in what all rows of a dump have in common, or "" if they do not.

    That are the settings and the outputs. The number of threads, the batch size and the format of shards are of no
    account.
    """
    ours, theirs = ({n: v for n, v in plan.settings.to_json().items() if n not in BY_ITSELF} for plan in (one, other))
    if ours != theirs and one.settings.weights_digest != other.settings.weights_digest:  # names tell people more
        ours, theirs = ({**_chosen(plan), **found} for plan, found in ((one, ours), (other, theirs)))
    for field, before, now in differences(ours, theirs):
        return f"{_as_option(field)} is {_short(before)} in the first and {_short(now)} in the second"
    mine, others = ({output.name: output.to_json() for output in plan.outputs} for plan in (one, other))
    for name in dict.fromkeys([*mine, *others]):
        if name not in mine or name not in others:
            return f"the {'second' if name in mine else 'first'} has no output {shown(name)}"
        for field, before, now in differences(mine[name], others[name]):
            what = f"{field} of output {shown(name)}"
            return f"{what} is {_short(before)} in the first and {_short(now)} in the second"
    return ""


def other_images(path: str, before: Keys, now: Keys) -> ConflictError:
    """Return the error for a plan that differs only in its images. It names the first that came or went."""
    gone, new = missing_from(now, before), missing_from(before, now)
    texts = [
        f"{len(names):,} {'is' if len(names) == 1 else 'are'} {what}, first {shown(min(names))}"
        for names, what in ((gone, "gone"), (new, "new"))
        if len(names)
    ]
    if len(gone) == len(before):
        help_ = "give all images in one command (those of find with --files-from -)"
    elif len(new):
        help_ = "give --extend, which adds the new images to a complete dump"
        help_ += " and keeps the rows of those that are gone" if len(gone) else ""
    else:
        help_ = "put the images back"
    return ConflictError(
        f"dump {path} was made of other images: {'; '.join(texts)}",
        f"{help_}, use another -o for all, or --overwrite to delete what is there and start anew",
    )


def _for_people(plan: Plan) -> dict[str, Any]:
    """Return the fields of a plan by which people tell one from another."""
    outputs = [
        " ".join([one.name, *([one.reduction] if one.reduction != "none" else []), shown_shape(one.shape), one.dtype])
        for one in plan.outputs
    ]
    images = {"images": plan.num_images, "keys_digest": plan.keys_digest}
    return {
        "outputs": ", ".join(outputs),
        **_chosen(plan),
        **plan.settings.to_json(),
        **images,
        "shard_rows": plan.shard_rows,
    }


def _chosen(plan: Plan) -> dict[str, Any]:
    """Return what the provenance says of choices."""
    return {name: value for name, value in plan.provenance.items() if name not in NOT_CHOSEN}


def _as_option(field: str) -> str:
    """Return the option that sets a field of a plan, or words if there is none. A library's own word stays as it is."""
    place, _, name = field.rpartition(".")
    if place not in ("", "backbone", "preprocessing"):
        return field
    options = {one.name: one.named for one in options_of(ExtractSpec)}
    return NOT_AS_OPTIONS.get(name) or options.get(name, field)


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
