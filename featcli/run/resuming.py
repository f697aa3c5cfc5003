"""Word the settings of a run as the plan that it resumes does, so that a library's new words make no other run.

A plan holds what the checkpoint's files and the user set. Plans of an older featcli hold a whole configuration, or the
network as torch prints it, and every plan holds an image processor with its defaults. Another version of a library may
word these differently although nobody changed anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from featcli.backbones.image_processor import probe_pictures
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.own_preprocessing import OVERRIDES
from featcli.backbones.preprocessing import Preprocessing, recorded_preprocessing
from featcli.dump.plan import Plan
from featcli.dump.settings import Settings
from featcli.events import Report
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.colour import settings_of
from featcli.spec.groups import PixelSpec

LIBRARIES = ("torch", "timm", "transformers")  # names in `environment` of the libraries that describe a backbone
OTHERS = ("colour", "fit", "largest", OVERRIDES)  # words of options that a plan lacks where nobody gave them
NAME_OF_CODE = "image_processor_type"  # a library's name for its own code
ODD_SIZES = ((157, 211), (83, 61))  # H, W of pictures that fit no rounding, beside the larger probes


@dataclass(frozen=True)
class InMannerOf:
    """The plan of a dump, whose words settings are given in."""

    plan: Plan
    environment: Mapping[str, str]  # of this process
    report: Report

    def settings(self, found: Settings, model: ModelSpec, preprocessing: Preprocessing) -> Settings:
        """Return the settings, with the plan's words for whatever nobody set.

        A warning names what was worded differently.
        """
        before = self.plan.settings
        backbone, reworded = model.settings_beside(before.backbone, self._is_same_library)
        found = replace(found, backbone=backbone)
        words = self._reworded(found, preprocessing)
        if words:
            kept = {name: value for name, value in found.preprocessing.items() if name not in words}
            kept |= {name: before.preprocessing[name] for name in words if name in before.preprocessing}
            found = replace(found, preprocessing=kept)
        reworded += [f"preprocessing.{name}" for name in words]
        if reworded:
            text = f"the libraries describe some things in other words than when this dump was begun: {_few(reworded)}"
            self.report("warning", text=f"{text}; no file and no option sets these, so the plan keeps its words")
        return found

    @property
    def _is_same_library(self) -> bool:
        now, before = self.environment, self.plan.environment
        return all(now.get(name) == before.get(name) for name in LIBRARIES if name in before)

    def _reworded(self, found: Settings, preprocessing: Preprocessing) -> list[str]:
        """Return the names of preprocessing settings that only one of the two has, if both give the same pictures."""
        before, now = self.plan.settings.preprocessing, found.preprocessing
        names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        if not names or any(name in before and name in now for name in names if name != NAME_OF_CODE):
            return []
        if not _is_asked_alike(before, now):
            return []
        try:
            recorded = recorded_preprocessing(
                before, size=found.input_size, channels=found.channels, resize_mode=found.resize_mode
            )
        except Exception:  # this library no longer knows the plan's words
            return []
        return names if _give_the_same(recorded, preprocessing) else []


def _is_asked_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether options say the same of pictures in two plans. The older one may lack an option at its default.

    Pixels cannot tell: most options change no pixel of most pictures, and --fit replaces the way to compare them.
    """
    default = settings_of(PixelSpec())
    return all(before.get(name, default.get(name)) == now.get(name, default.get(name)) for name in (*default, *OTHERS))


def _give_the_same(one: Preprocessing, two: Preprocessing) -> bool:
    """Return whether two ways of preprocessing give the same pixels for some pictures, and normalise them alike."""
    if any(getattr(one, name) != getattr(two, name) for name in ("dtype", "scale", "mean", "std", "channels")):
        return False
    noise = np.random.default_rng(0)
    odd = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ODD_SIZES]
    tried: list[Any] = [*probe_pictures(), *odd]
    tried = tried if one.channels in OF_COLOURS else [[picture] * one.channels for picture in tried]
    return all(np.array_equal(one.fit(picture), two.fit(picture)) for picture in tried)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
