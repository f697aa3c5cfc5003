"""Define the specs of `featcli.extract` and `featcli.load_backbone`: the options, and what only Python takes."""

# Annotations must not be text here: see commands.py.
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from featcli.errors import UsageError, counted, shown
from featcli.events import Report
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import CHECKPOINT, COMPUTATION, OF_DEVICE, CheckpointSpec, PixelSpec, StageSpec
from featcli.spec.option import Option, OptionField, options_of
from featcli.spec.parsers import checked_key, parse_inputs, precision_of_type
from featcli.spec.words import DEFAULT_LAYOUT, DEFAULT_PRECISION, LAYOUTS, PRECISIONS, Layout, Precision

OF_STAGES = ("out_features", "out_indices")  # a backbone and a call each name stages by one of these, or by none


class Pictures(tuple[Any, ...]):
    """Pictures in memory: of Pillow, or arrays and tensors. Whether they can be used is not checked here."""

    keys: tuple[Any, ...] | None = None  # of a mapping
    __eq__, __hash__ = object.__eq__, object.__hash__  # arrays have no truth value


def inputs_or_pictures(given: Any) -> tuple[Any, ...]:
    """Return paths and URLs as a tuple of text, and pictures as Pictures. Raises UsageError for anything else."""
    if isinstance(given, Pictures | str | os.PathLike):
        return given if isinstance(given, Pictures) else parse_inputs(given)
    is_one = _is_picture(given) and getattr(given, "ndim", 2) < 4
    is_named = isinstance(given, Mapping)
    several = given.values() if is_named else given
    found = (given,) if is_one else _each(several)
    others = [one for one in found if not _is_picture(one)]
    if others and len(others) < len(found):
        raise UsageError(
            f"input {shown(others[0])} stands beside pictures in memory",
            "give paths alone, or pictures alone: PIL.Image.open(path) makes a picture of a path",
        )
    if others and is_named:
        raise UsageError(
            f"input {shown(others[0])} is not a picture, and only pictures are given keys",
            "use PIL.Image.open(path), which makes a picture of a path, and reads it when it is needed",
        )
    if others or not (found or is_named):
        return parse_inputs(found)
    pictures = Pictures(found)
    pictures.keys = tuple(given) if is_named else None
    return pictures


def _each(several: Any) -> tuple[Any, ...]:
    """Return what can be gone through as a tuple, and anything else alone in one."""
    try:
        return tuple(several)
    except TypeError:
        return (several,)


def _is_picture(one: Any) -> bool:
    """Return whether something has pixels. Neither Pillow, numpy nor torch is imported for that."""
    has_values = hasattr(type(one), "__array_interface__") or hasattr(type(one), "__array__")
    return has_values and not isinstance(one, str) and getattr(one, "ndim", 2) >= 2


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BackboneCall(StageSpec, PixelSpec, CheckpointSpec):
    """`featcli.load_backbone` in Python: a checkpoint, its stages and pixels, and how the network is run."""

    checkpoint: Any = field(kw_only=False)
    device: Annotated[str, OF_DEVICE] = "cpu"
    precision: Annotated[
        Precision,
        Option(
            f"Of the computation: {', '.join(PRECISIONS)}.",
            flags=("precision",),
            group=COMPUTATION,
            keep=precision_of_type,
        ),
    ] = DEFAULT_PRECISION
    layout: Annotated[
        Layout, Option(f"Of maps while they are computed: {', '.join(LAYOUTS)}.", flags=("layout",), group=COMPUTATION)
    ] = DEFAULT_LAYOUT
    fold: Annotated[bool, Option("Batch norms into convolutions.", flags=("fold",), group=COMPUTATION)] = False

    def refuse_conflicts(self) -> None:
        """Refuse None as a checkpoint. See Spec."""
        super().refuse_conflicts()
        if self.checkpoint is None:
            self.check_configuration()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractCall(ExtractSpec):
    """`featcli.extract` in Python: the options, and what only Python has.

    That is a report, which is called with every event of the run, pictures in memory with their keys, and a loaded
    backbone as the checkpoint.
    """

    inputs: Annotated[
        Any,
        Option("Paths, URLs, or pictures in memory.", metavar="INPUT", is_argument=True, keep=inputs_or_pictures),
    ] = field(default=(), kw_only=False)
    keys: Sequence[str] | str | None = None
    report: Report | None = None

    def __post_init__(self) -> None:
        if self.keys is not None:
            is_one = isinstance(self.keys, str | os.PathLike)
            object.__setattr__(self, "keys", (self.keys,) if is_one else _each(self.keys))
        super().__post_init__()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs as text; none if they are pictures."""
        return () if self.pictures is not None else super().input_names

    @property
    def pictures(self) -> Pictures | None:
        """The pictures in memory, in row order; None if the inputs are paths."""
        return self.inputs if isinstance(self.inputs, Pictures) else None

    @property
    def picture_keys(self) -> tuple[str, ...]:
        """The key of each picture in memory."""
        assert self.pictures is not None
        keys = self.pictures.keys if self.keys is None else self.keys
        return tuple(checked_key(key) for key in keys or ())

    @property
    def backbone(self) -> Any:
        """The loaded backbone that stands for its checkpoint; None if a checkpoint is given."""
        return self.checkpoint if isinstance(getattr(self.checkpoint, "asked", None), BackboneCall) else None

    def named(self) -> "ExtractCall":
        """Return the same with the checkpoint of the loaded backbone, and the options that it was loaded with.

        An option of this call goes before that of the backbone. Raises UsageError for one that asks for other weights
        or another network.
        """
        if self.backbone is None:
            return self
        loaded: BackboneCall = self.backbone.asked
        mine = {name for name in self.typed if getattr(self, name) is not None}
        for one in options_of(BackboneCall):
            if one.name in mine and one.option.group == CHECKPOINT:
                self._refuse_other(one, loaded)
        if mine.intersection(OF_STAGES):
            mine.update(OF_STAGES)
        names = {one.name for one in options_of(BackboneCall)} & loaded.typed - mine
        options = {name: getattr(loaded, name) for name in names} | {"checkpoint": loaded.checkpoint}
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return ExtractCall(**{**own, **options})

    def _refuse_other(self, option: OptionField, loaded: BackboneCall) -> None:
        """Raise UsageError if an option of the checkpoint is another than that of the loaded backbone."""
        now = getattr(self, option.name)
        before = loaded.is_random if option.name == "random_init" else getattr(loaded, option.name)
        if now != before and (option.is_given(now) or option.is_given(before)):
            raise UsageError(
                f"{option.called} contradicts the loaded backbone",
                f"leave it out, or load another by featcli.load_backbone(..., {option.name}=...)",
            )

    def refuse_conflicts(self) -> None:
        """Refuse options for files beside pictures in memory. See Spec."""
        if self.pictures is not None:
            self._refuse_beside_pictures()
        super().refuse_conflicts()

    def check_configuration(self) -> None:
        """Take a loaded backbone, too. See CheckpointSpec."""
        if self.backbone is None:
            super().check_configuration()

    def refuse_no_input(self) -> None:
        """Take pictures, too, if each has a key. See InputSpec."""
        if self.pictures is None:
            super().refuse_no_input()
            if self.keys is not None:
                raise UsageError("keys need pictures in memory", "leave keys out: the keys of files are their paths")
            return
        if self.keys is not None and self.pictures.keys is not None:
            raise UsageError("keys are given twice", "leave keys out: the mapping has them already")
        if self.keys is None and self.pictures.keys is None:
            raise UsageError(
                "pictures in memory have no keys", "name them in the order of the pictures: keys=['first', 'second']"
            )
        keys = self.picture_keys
        if len(keys) != len(self.pictures):
            raise UsageError(
                f"{counted(len(self.pictures), 'picture')} and {counted(len(keys), 'key')} are given",
                "give one key for each picture",
            )
        if not keys:
            raise UsageError("the list of pictures is empty", "give at least one picture")
        if len({*keys}) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise UsageError(
                f"two pictures would both have the key {shown(twice)}", "give each picture a key of its own"
            )

    def _refuse_beside_pictures(self) -> None:
        """Raise UsageError for options that have no effect on pictures in memory, or cannot have it."""
        beside = (
            (self.engine == "ray", "--engine ray", "leave it out: other processes do not have these pictures"),
            (
                "," in self.device or self.device == "cuda:all",
                f"--device {shown(self.device)}",
                "name one device: other processes do not have these pictures",
            ),
            (self.files_from is not None, "--files-from", "extract the listed files to a dump of their own"),
            (self.table is not None, "--table", "give the pictures their labels by as_torch_dataset(labels=...)"),
            (self.root is not None, "--root", "leave it out: you name the keys of pictures yourself"),
            (self.null, "-0", "leave it out: no names are read from a file"),
            (self.allow_outside, "--allow-outside", "leave it out: no picture is outside of a folder"),
            (self.follow_links, "--follow-links", "leave it out: no folder is looked into"),
            (bool(self.exclude), "--exclude", "leave it out: give only the pictures that you want"),
            (self.limit is not None, "--limit", "leave it out: give only the pictures that you want"),
            (self.decode == "scaled", "--decode scaled", "use --decode exact: scaled is for JPEGs in files"),
        )
        for is_given, option, hint in beside:
            if is_given:
                raise UsageError(f"{option} cannot be used with pictures in memory", hint)
