"""Read, check and write what was chosen for a run, the `settings` of plan.json. Nobody else does so.

The words of libraries (`backbone`, `preprocessing`) stay as they are. Others ask `Settings` by name for what they need
of these, so that only this module knows where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from featcli.backbones.execution import LAYOUTS, PRECISIONS
from featcli.backbones.own_preprocessing import OF_PREPROCESSING, OVERRIDES
from featcli.pixels.resize import ResizeMode
from featcli.spec.groups import PixelSpec
from featcli.spec.option import options_of
from featcli.spec.parsers import Size
from featcli.spec.words import NATIVE, Fit, Format, Layout, Norm, Precision, ProcessorBackend

MOST = 1 << 53  # largest count of anything: every reader of JSON has it exactly
BESIDE = ("unknown", "as_read")  # fields that are not settings
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings(Mapping[str, Any]):
    """All that can change a byte of the result, besides stages and images.

    A field with a default was added later. A plan without it means the default, and it is written only if it differs
    from that, so that older plans keep their fingerprint.

    It is also a mapping for users, with the names of plan.json: `dump.plan.settings["batch_size"]`.
    """

    backbone: Mapping[str, Any]  # the architecture, in the library's words
    weights_digest: str
    preprocessing: Mapping[str, Any]  # in the library's words, with those of --fit and PixelSpec
    precision: Precision
    layout: Layout  # of maps in memory during the computation
    folded: bool
    compiled: bool
    batch_size: int
    threads: int
    pool: str | None = None  # of all maps, in plans of format version 1 alone: outputs say it since
    format: Format
    unknown: Mapping[str, Any] = field(default_factory=dict)  # settings of another version: kept, and compared
    as_read: tuple[str, ...] = ()  # names in the order in which they were read

    @classmethod
    def from_json(cls: type[S], content: Mapping[str, Any]) -> S:
        """Return the settings of a plan. Raises KeyError, TypeError or ValueError for anything else."""
        known = {one.name: one for one in cls._settings()}
        chosen = {
            name: content[name] if one.default is MISSING else content.get(name, one.default)
            for name, one in known.items()
        }
        unknown = {name: value for name, value in content.items() if name not in known}
        settings = cls(**chosen, unknown=unknown, as_read=tuple(content))
        settings._check()
        return settings

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plan.json holds them, in the order in which they were read, or that of the fields."""
        written = [one.name for one in self._settings() if getattr(self, one.name) != one.default]
        names = dict.fromkeys([*self.as_read, *written, *self.unknown])
        return {name: self.unknown[name] if name in self.unknown else getattr(self, name) for name in names}

    def __getitem__(self, name: str) -> Any:
        return self.to_json()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())

    def __repr__(self) -> str:
        return repr(self.to_json())

    @classmethod
    def _settings(cls) -> Iterator[Field[Any]]:
        return (one for one in fields(cls) if one.name not in BESIDE)

    def _check(self) -> None:
        """Raise ValueError if a setting is not what its readers rely on: anybody may have written the file."""
        if not (is_count(self.batch_size) and is_count(self.threads)):
            raise ValueError("a number that is not a whole one above zero")
        if self.precision not in PRECISIONS or self.layout not in LAYOUTS:
            raise ValueError("a precision or layout of another version")
        if not (isinstance(self.folded, bool) and isinstance(self.compiled, bool)):
            raise ValueError("a choice that is neither true nor false")
        if not (isinstance(self.format, str) and isinstance(self.first_pool, str)):
            raise ValueError("a name that is not a text")
        overrides = self.preprocessing.get(OVERRIDES, {})
        if not (isinstance(overrides, Mapping) and overrides.keys() <= set(OF_PREPROCESSING)):
            raise ValueError("preprocessing that no option sets")
        size = self.backbone["input_size"]
        if not (isinstance(size, list) and len(size) == 2 and all(map(is_count, size))):
            raise ValueError("an input size that is none")

    @property
    def first_pool(self) -> str:
        """How all maps were reduced, in a plan of format version 1."""
        return "none" if self.pool is None else self.pool

    @property
    def input_size(self) -> Size:
        """The (H, W) of the backbone's input; if pictures keep their own sizes, the one that measures batches."""
        height, width = self.backbone["input_size"]
        return height, width

    @property
    def norm(self) -> Norm:
        """Whether maps come before (`raw`) or after (`model`) the backbone's final norm, if it has one."""
        norm: Norm = self.backbone.get("norm", "raw")
        return norm

    @property
    def timm_architecture(self) -> str | None:
        """The name of the architecture if it is timm's, else None."""
        words = self.backbone
        return words.get("architecture") if words.get("library") == "timm" else None

    @property
    def num_channels(self) -> int | None:
        """The number of input channels if the library's words name it, else None, which means three."""
        words = self.backbone
        of_timm, of_transformers = words.get("options", {}), words.get("config", {})
        found: int | None = words.get("num_channels") or of_timm.get("in_chans") or of_transformers.get("num_channels")
        return found

    @property
    def channels(self) -> int:
        """The number of input channels."""
        return self.num_channels or 3

    @property
    def pixel_rules(self) -> PixelSpec:
        """The rules by which pictures were read.

        Raises KeyError, TypeError and UsageError for rules of another version.
        """
        words = self.preprocessing
        depth = words["depth_range"]
        return PixelSpec(
            orientation=words["orientation"],
            alpha=words["alpha"],
            depth_range=":".join(map(str, depth)) if isinstance(depth, list) else None,
            max_pixels=words["max_pixels"],
            decode=words["decode"],
            colour=words.get("colour", "ignore"),  # a later field
        )

    def options(self) -> dict[str, Any]:
        """Return the options that ask for these settings, by name. Raises as `pixel_rules` does."""
        rules = self.pixel_rules
        of_pixels = {one.name: getattr(rules, one.name) for one in options_of(PixelSpec)}
        return {
            **of_pixels,
            "norm": self.norm,
            "num_channels": self.num_channels,
            "fit": self.fit,
            "processor_backend": self.processor_backend,
            **self.overrides,
            "image_size": self.largest,
            "precision": self.precision,
            "layout": self.layout,
            "fold": self.folded,
            "compile": self.compiled,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "format": self.format,
        }

    @property
    def pixels_are_exact(self) -> bool:
        """Whether JPEGs and sizes were those of --decode exact."""
        return bool(self.preprocessing.get("decode", "exact") == "exact")

    @property
    def sizes_by_processor(self) -> bool:
        """Whether an image processor of transformers resized pictures."""
        return self.fit is None and "image_processor_type" in self.preprocessing

    @property
    def fit(self) -> Fit | None:
        """How pictures got their size; None for the checkpoint's own way."""
        return self.preprocessing.get("fit")

    @property
    def processor_backend(self) -> ProcessorBackend | None:
        """What an image processor resized pictures with, if it was not the default."""
        return "torchvision" if self.fit is None and self.preprocessing.get("backend") == "torchvision" else None

    @property
    def overrides(self) -> dict[str, Any]:
        """The options for preprocessing that differ from the checkpoint, by name."""
        return dict(self.preprocessing.get(OVERRIDES, {}))

    @property
    def is_native(self) -> bool:
        """Whether each picture keeps a size of its own."""
        return self.fit == NATIVE

    @property
    def largest(self) -> Size | None:
        """The (H, W) that pictures with sizes of their own were shrunk into; None if there was no limit."""
        edges = self.preprocessing.get("largest")
        return edges and tuple(edges)

    @property
    def resize_mode(self) -> ResizeMode | None:
        """How pictures got their size; None for the checkpoint's own way."""
        if self.fit is None:
            return None
        step = self.preprocessing.get("step", (1, 1))
        return ResizeMode(self.fit, self.largest if self.is_native else self.input_size, tuple(step))

    @property
    def can_be_repeated(self) -> bool:
        """Whether all is known that is needed to extract the images again."""
        words = {"norm", "input_size"} <= self.backbone.keys()
        return words and {"depth_range", "decode"} <= self.preprocessing.keys()


def is_count(value: object) -> bool:
    """Return whether a value from JSON is a whole number above zero that every reader has exactly."""
    return type(value) is int and 0 < value < MOST
