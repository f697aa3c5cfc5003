"""What was asked, frozen before the first image is decoded, and the fingerprint that tells two plans apart."""

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
from featcli.spec.words import Dtype

if TYPE_CHECKING:
    from featcli.inputs.image_list import ImageList
    from featcli.pixels.sizes import Sizes

FORMAT_VERSION = 1
COUNTED = "counted"  # what is counted of pictures, in the provenance
STAGE_NAME = re.compile(r"\w[\w.-]*(?<!\.shapes)(?<!\.shape)", re.ASCII)
NOT_STAGES = ("keys", "key", "row", VALID)  # what else there is in a shard and in exports


class OtherVersionError(ValueError):
    """A plan of another version of the format."""


@dataclass(frozen=True)
class StoredStage:
    """A stage as the dump holds it."""

    name: str
    index: int
    module: str
    stride: tuple[int, int]
    map_shape: tuple[int | None, ...]  # (C, H, W) before pooling; None where it is the image's own
    shape: tuple[int | None, ...]  # what is stored of one image; None likewise
    dtype: Dtype

    @property
    def is_ragged(self) -> bool:
        """Whether the maps of images differ in size."""
        return None in self.shape

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        """What is stored of an image whose input has this (H, W)."""
        own = (0, size[0] // self.stride[0], size[1] // self.stride[1])
        return tuple(own[axis] if edge is None else edge for axis, edge in enumerate(self.shape))

    def row_bytes(self, size: tuple[int, int] = (0, 0)) -> int:
        """Bytes of what is stored of an image; where maps differ in size, of one whose input has this (H, W)."""
        return math.prod(self.shape_at(size)) * ITEM_BYTES[self.dtype]

    def shapes(self, sizes: np.ndarray) -> np.ndarray:
        """(rows, 3): the (C, H, W) of each row, of a stage whose maps differ in size. `sizes`: (rows, 2) of inputs."""
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
        """As plan.json has it."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples as lists


def bytes_of_rows(stages: Iterable[StoredStage], sizes: Sizes, rows: range) -> int:
    """Bytes of what is stored of these rows over all stages. `sizes`: of the images' inputs."""
    return sum(stage._bytes_of(sizes, rows) for stage in stages)


Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def arrays_of(stages: Sequence[StoredStage], num_rows: int, shapes: Mapping[str, np.ndarray]) -> Arrays:
    """Every array of so many rows, as a file has them. `shapes`: (rows, 3) of stages whose maps differ in size."""
    arrays: Arrays = {}
    for stage in stages:
        values = (int(shapes[stage.name].astype("int64").prod(1).sum()),) if stage.is_ragged else None
        arrays[stage.name] = stage.dtype, values or (num_rows, *stage.shape_at((0, 0)))
    arrays[VALID] = "uint8", (num_rows,)
    return arrays | {f"{stage.name}{SHAPES}": ("uint32", (num_rows, 3)) for stage in stages if stage.is_ragged}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What of a plan is known before any weight is read: which rows of which stages, shard by shard."""

    stages: tuple[StoredStage, ...]
    num_images: int
    keys_digest: str  # xxh3-128 over the keys in row order
    shard_rows: int

    @property
    def num_shards(self) -> int:
        """The last shard may be short."""
        return -(-self.num_images // self.shard_rows)

    def shard(self, number: int) -> range:
        """The rows of a shard."""
        first = number * self.shard_rows
        return range(first, min(first + self.shard_rows, self.num_images))

    def arrays(self, number: int, shapes: Mapping[str, np.ndarray]) -> Arrays:
        """Every array of a shard: name -> (dtype, shape). `shapes`: (rows, 3) of stages whose maps differ."""
        return arrays_of(self.stages, len(self.shard(number)), shapes)

    def shard_bytes(self, number: int, sizes: Sizes) -> int:
        """Bytes of what is stored of the rows of a shard over all stages."""
        return bytes_of_rows(self.stages, sizes, self.shard(number))


@dataclass(frozen=True, kw_only=True)
class Plan(Outline):
    """Everything that decides the bytes of a dump. Holds no times, hosts or absolute paths."""

    settings: Settings
    images_digest: str  # xxh3-128 over images.jsonl: the keys and the sizes of their files when they were listed
    provenance: Mapping[str, Any]  # names for people: the same bytes may come from a file of another name
    environment: Mapping[str, str]  # what can move the last bits and cannot be repeated at will

    @property
    def row_bytes(self) -> int:
        """Bytes of what is stored of an image over all stages; where maps differ in size, of one of the common size."""
        return sum(stage.row_bytes(self.settings.input_size) for stage in self.stages)

    @property
    def leads(self) -> Mapping[str, str] | None:
        """What leads the keys of several inputs -> folder, tar or file. None in plans of before that was said."""
        return self.provenance.get("leads")

    @property
    def counts_traits(self) -> bool:
        """Whether its records say what is true of how many pictures: those of dumps of earlier versions do not."""
        return COUNTED in self.provenance

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 over all that can change a byte of the result: not sizes of files, provenance or environment."""
        content = self.to_json()
        for field in ("fingerprint", "images_digest", "provenance", "environment"):
            del content[field]
        return hash_json(content)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
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
        """The plan in a plan.json. Raises KeyError, TypeError or ValueError for anything else."""
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
    """Raise ValueError where a field is not what its readers rely on: the file may be anybody's."""
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
    """The edges of a shape that must be numbers: height and width may be each image's own."""
    return shape[:1] if shape[1:] == (None, None) else shape


def with_fingerprint(plan: Plan) -> dict[str, Any]:
    """The plan as it is written."""
    return plan.to_json() | {"fingerprint": plan.fingerprint}


def digest_keys(keys: Iterable[str]) -> str:
    """xxh3-128 over keys, each followed by a zero byte."""
    digest = xxhash.xxh3_128()
    for key in keys:
        digest.update(os.fsencode(key) + b"\0")
    return digest.hexdigest()


def digest_images(images: ImageList) -> str:
    """xxh3-128 over what images.jsonl will be."""
    digest = xxhash.xxh3_128()
    for line in image_lines(images):
        digest.update(line)
    return digest.hexdigest()


def image_lines(images: ImageList) -> Iterator[bytes]:
    """The lines of images.jsonl."""
    for key, size in zip(images.keys, images.sizes, strict=True):
        yield json.dumps({"key": key, "bytes": size}).encode("ascii") + b"\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, old value, new value) for every field in which two JSON objects differ."""
    for name in dict.fromkeys([*old, *new]):
        one, two = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from differences(one, two, f"{above}{name}.")
        elif one != two:
            yield above + name, one, two


def environment_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """`torch 2.9 -> 2.10` for everything in which an environment differs from the one before."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]


def refuse_other_plan(path: str, old: Plan, new: Plan) -> None:
    """Raise ConflictError naming the fields in which the plan of an existing dump differs from the one asked for."""
    if old.fingerprint == new.fingerprint:
        return
    fields = [
        f"{field}: {_short(one)} there, {_short(two)} now"
        for field, one, two in differences(_for_people(old), _for_people(new))
    ]
    raise ConflictError(
        f"dump {path} was made with another plan: {'; '.join(fields[:4])}"
        + (f"; and {len(fields) - 4} more" if len(fields) > 4 else ""),
        "use another -o, or --overwrite to delete what is there and start anew",
    )


def other_images(path: str, before: Sequence[str], now: Sequence[str]) -> ConflictError:
    """The refusal of a plan that is the same but for its images, naming the first that came or went."""
    gone, new = sorted({*before} - {*now}), sorted({*now} - {*before})
    texts = [
        f"{len(names):,} {'is' if len(names) == 1 else 'are'} {what}, first {shown(names[0])}"
        for names, what in ((gone, "gone"), (new, "new"))
        if names
    ]
    if gone and len(gone) == len(before) and len(new) == len(now):
        help_ = "a dump takes its images from one command (after find, give it --files-from -)"
    elif gone:
        help_ = "put the images back" + (" and take the new ones away" if new else "")
    else:
        help_ = "extract the new images to a dump of their own" if new else "give the inputs in the order of then"
    return ConflictError(
        f"dump {path} was made of other images: {'; '.join(texts) or 'in another order'}",
        f"{help_}, use another -o for all, or --overwrite to delete what is there and start anew",
    )


def _for_people(plan: Plan) -> dict[str, Any]:
    """The fields of a plan by which people tell one from another."""
    stages = [f"{s.name} {shown_shape(s.shape)} {s.dtype}" for s in plan.stages]
    images = {"images": plan.num_images, "keys_digest": plan.keys_digest}
    return {
        "stages": ", ".join(stages),
        **{name: value for name, value in plan.provenance.items() if name not in ("leads", COUNTED)},  # for programs
        **plan.settings.to_json(),
        **images,
        "shard_rows": plan.shard_rows,
    }


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
