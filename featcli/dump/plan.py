"""Freeze what was asked before the first image is decoded, with a fingerprint that tells two plans apart."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from featcli.dump.checksummed_json import hash_json
from featcli.dump.formats.layout import ITEM_BYTES, SHAPES, VALID
from featcli.dump.settings import Settings, is_count
from featcli.errors import ConflictError, shown, shown_shape
from featcli.spec.commands import ExtractSpec
from featcli.spec.option import options_of
from featcli.spec.words import Dtype

if TYPE_CHECKING:
    from featcli.inputs.image_list import ImageList
    from featcli.pixels.sizes import Sizes

FORMAT_VERSION = 1
COUNTED = "counted"  # in the provenance: what is counted of pictures
STAGE_NAME = re.compile(r"\w[\w.-]*(?<!\.shapes)(?<!\.shape)", re.ASCII)
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
NOT_STAGES = ("keys", "key", "row", VALID)  # names of other things in a shard and in exports


class OtherVersionError(ValueError):
    """A plan of another version of the format."""


@dataclass(frozen=True)
class StoredStage:
    """A stage as the dump holds it."""

    name: str
    index: int
    module: str
    stride: tuple[int, int]
    map_shape: tuple[int | None, ...]  # (C, H, W) before pooling; None for an edge that depends on the image
    shape: tuple[int | None, ...]  # what is stored of an image; None likewise
    dtype: Dtype

    @property
    def is_ragged(self) -> bool:
        """Whether the maps of images differ in size."""
        return None in self.shape

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape that is stored of an image whose input has this (H, W)."""
        own = (0, size[0] // self.stride[0], size[1] // self.stride[1])
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
        return self.row_bytes(self.stride) * int(self._cells(sizes.own_of(rows)).prod(1).sum())

    def _cells(self, sizes: np.ndarray) -> np.ndarray:
        cells: np.ndarray = sizes.astype(np.int64) // np.array(self.stride)
        return cells

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plan.json holds them."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples as lists


def bytes_of_rows(stages: Iterable[StoredStage], sizes: Sizes, rows: range) -> int:
    """Return the bytes that are stored of these rows over all stages. `sizes` are those of the images' inputs."""
    return sum(stage._bytes_of(sizes, rows) for stage in stages)


Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def arrays_of(stages: Sequence[StoredStage], num_rows: int, shapes: Mapping[str, np.ndarray]) -> Arrays:
    """Return every array of so many rows as a file holds them.

    `shapes` are (rows, 3), for stages whose maps differ in size.
    """
    arrays: Arrays = {}
    for stage in stages:
        values = (int(shapes[stage.name].astype("int64").prod(1).sum()),) if stage.is_ragged else None
        arrays[stage.name] = stage.dtype, values or (num_rows, *stage.shape_at((0, 0)))
    arrays[VALID] = "uint8", (num_rows,)
    return arrays | {f"{stage.name}{SHAPES}": ("uint32", (num_rows, 3)) for stage in stages if stage.is_ragged}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The part of a plan that is known before any weight is read: which rows of which stages, shard by shard."""

    stages: tuple[StoredStage, ...]
    num_images: int
    keys_digest: str  # xxh3-128 of the keys in row order
    shard_rows: int

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
        return arrays_of(self.stages, len(self.shard(number)), shapes)

    def shard_bytes(self, number: int, sizes: Sizes) -> int:
        """Return the bytes that are stored of the rows of a shard over all stages."""
        return bytes_of_rows(self.stages, sizes, self.shard(number))


@dataclass(frozen=True, kw_only=True)
class Plan(Outline):
    """Everything that decides the bytes of a dump. It holds no times, hosts or absolute paths."""

    settings: Settings
    images_digest: str  # xxh3-128 of images.jsonl: the keys, and the sizes of their files when listed
    provenance: Mapping[str, Any]  # names for people: a file of another name may hold the same bytes
    environment: Mapping[str, str]  # what can change the last bits and cannot be set by an option

    @property
    def row_bytes(self) -> int:
        """Bytes that are stored of an image over all stages; if maps differ in size, of one of the common size."""
        return sum(stage.row_bytes(self.settings.input_size) for stage in self.stages)

    @property
    def leads(self) -> Mapping[str, str] | None:
        """The kind (folder, tar or file) of each input by what leads its keys.

        None in older plans, which do not say it.
        """
        return self.provenance.get("leads")

    @property
    def counts_traits(self) -> bool:
        """Whether its records count traits of pictures. Dumps of earlier versions do not."""
        return COUNTED in self.provenance

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of all that can change a byte of the result: without sizes of files, provenance and environment."""
        content = self.to_json()
        for field in ("fingerprint", "images_digest", "provenance", "environment"):
            del content[field]
        return hash_json(content)

    def to_json(self) -> dict[str, Any]:
        """Return the content of plan.json."""
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": "",
            "settings": self.settings.to_json(),
            "stages": [asdict(stage) for stage in self.stages],
            "num_images": self.num_images,
            "keys_digest": self.keys_digest,
            "images_digest": self.images_digest,
            "shard_rows": self.shard_rows,
            "provenance": dict(self.provenance),
            "environment": dict(self.environment),
        }
        return json.loads(json.dumps(content))  # type: ignore[no-any-return]  # tuples as lists, once for all

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Return the plan of a plan.json. Raises KeyError, TypeError or ValueError for anything else."""
        if content["format_version"] != FORMAT_VERSION:
            raise OtherVersionError(f"format version {content['format_version']}, this featcli reads {FORMAT_VERSION}")
        stages = tuple(
            StoredStage(**{**stage, **{name: tuple(stage[name]) for name in ("stride", "map_shape", "shape")}})
            for stage in content["stages"]
        )
        settings = Settings.from_json(content["settings"])
        _check_types(content, stages)
        plan = cls(
            settings=settings,
            stages=stages,
            num_images=content["num_images"],
            keys_digest=content["keys_digest"],
            images_digest=content["images_digest"],
            shard_rows=content["shard_rows"],
            provenance=content["provenance"],
            environment=content["environment"],
        )
        if plan.fingerprint != content["fingerprint"]:
            raise ValueError("its fingerprint does not fit its content")
        return plan


def _check_types(content: Mapping[str, Any], stages: Sequence[StoredStage]) -> None:
    """Raise ValueError if a field is not what its readers rely on: anybody may have written the file."""
    counts = [content["num_images"], content["shard_rows"]]
    counts += [edge for stage in stages for edge in (*_known(stage.shape), *_known(stage.map_shape), *stage.stride)]
    if not all(map(is_count, counts)):
        raise ValueError("a number that is not a whole one above zero")
    texts = [content["keys_digest"], content["images_digest"]]
    texts += [text for stage in stages for text in (stage.name, stage.module, stage.dtype)]
    texts += [content["provenance"]["checkpoint"], content["provenance"]["weights"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name that is not a text")
    leads = content["provenance"].get("leads", {})
    if not isinstance(leads, dict) or not all(isinstance(kind, str) for kind in leads.values()):
        raise ValueError("leads that are none")
    if not all(STAGE_NAME.fullmatch(stage.name) and stage.name not in NOT_STAGES for stage in stages):
        raise ValueError("a stage whose name is none")  # names become those of files, arrays and columns
    if (
        not stages
        or len({stage.name for stage in stages}) < len(stages)
        or not isinstance(content["environment"], dict)
    ):
        raise ValueError("no stages, or two of one name")


def _known(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Return the edges of a shape that must be numbers. Height and width may depend on the image."""
    return shape[:1] if shape[1:] == (None, None) else shape


def with_fingerprint(plan: Plan) -> dict[str, Any]:
    """Return the plan as it is written."""
    return plan.to_json() | {"fingerprint": plan.fingerprint}


def digest_keys(keys: Iterable[str]) -> str:
    """Return the xxh3-128 of keys, each followed by a zero byte."""
    digest = xxhash.xxh3_128()
    for key in keys:
        digest.update(os.fsencode(key) + b"\0")
    return digest.hexdigest()


def digest_images(images: ImageList) -> str:
    """Return the xxh3-128 of what images.jsonl will be."""
    digest = xxhash.xxh3_128()
    for line in image_lines(images):
        digest.update(line)
    return digest.hexdigest()


def image_lines(images: ImageList) -> Iterator[bytes]:
    """Yield the lines of images.jsonl."""
    for key, size in zip(images.keys, images.sizes, strict=True):
        yield json.dumps({"key": key, "bytes": size}).encode("ascii") + b"\n"


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


def refuse_other_plan(path: str, old: Plan, new: Plan) -> None:
    """Raise ConflictError with the fields in which the plan of an existing dump differs from the one asked for."""
    if old.fingerprint == new.fingerprint:
        return
    fields = [
        f"{_as_option(field)}: {_short(one)} there, {_short(two)} now"
        for field, one, two in differences(_for_people(old), _for_people(new))
    ]
    raise ConflictError(
        f"dump {path} was made with another plan: {'; '.join(fields[:4])}"
        + (f"; and {len(fields) - 4} more" if len(fields) > 4 else ""),
        "use another -o, or --overwrite to delete what is there and start anew",
    )


def other_images(path: str, before: Sequence[str], now: Sequence[str]) -> ConflictError:
    """Return the error for a plan that differs only in its images. It names the first that came or went."""
    gone, new = sorted({*before} - {*now}), sorted({*now} - {*before})
    texts = [
        f"{len(names):,} {'is' if len(names) == 1 else 'are'} {what}, first {shown(names[0])}"
        for names, what in ((gone, "gone"), (new, "new"))
        if names
    ]
    if gone and len(gone) == len(before) and len(new) == len(now):
        help_ = "give all images in one command (those of find with --files-from -)"
    elif gone:
        help_ = "put the images back" + (" and take the new ones away" if new else "")
    else:
        help_ = (
            "extract the new images to a dump of their own" if new else "give the inputs in the same order as before"
        )
    what = f"other images: {'; '.join(texts)}" if texts else "the same images in another order"
    return ConflictError(
        f"dump {path} was made of {what}",
        f"{help_}, use another -o for all, or --overwrite to delete what is there and start anew",
    )


def _for_people(plan: Plan) -> dict[str, Any]:
    """Return the fields of a plan by which people tell one from another."""
    stages = [f"{s.name} {shown_shape(s.shape)} {s.dtype}" for s in plan.stages]
    images = {"images": plan.num_images, "keys_digest": plan.keys_digest}
    return {
        "stages": ", ".join(stages),
        **{name: value for name, value in plan.provenance.items() if name not in ("leads", COUNTED)},  # for programs
        **plan.settings.to_json(),
        **images,
        "shard_rows": plan.shard_rows,
    }


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
