"""Compare own preprocessing (`--mean --std --interpolation --crop-pct`) with timm, Pillow and image processors.

For timm models by name and from a weights file, and for each image processor of the types of transformers that featcli
knows, every option alone and all together, with and without `--fit`: the input must be, to the bit, what timm's
`create_transform` gives, what Pillow gives before torchvision's normalisation, or what the processor itself gives with
the same values (its floats to 2e-6). What a plan has on record must give the same input again. Takes a few minutes.

    python benchmarks/preprocessing.py
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from featcli import load_backbone
from featcli.backbones.image_processor import ImageProcessor
from featcli.backbones.preprocessing import Preprocessing, processor_preprocessing, recorded_preprocessing
from featcli.backbones.torchvision_operators import import_timm, import_transformers
from featcli.errors import UsageError
from featcli.spec.words import INTERPOLATIONS
from featcli.views.models import read_facts

import_timm()
transformers = import_transformers()

import timm  # noqa: E402 (torchvision's operators come first)
from timm.data import create_transform, resolve_data_config  # noqa: E402
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # noqa: E402

NOISE = np.random.default_rng(0)
EDGES = ((200, 320), (320, 201), (64, 64), (225, 224), (500, 333))
PICTURES = [Image.fromarray(NOISE.integers(0, 256, (*edges, 3), np.uint8)) for edges in EDGES]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "mean": {"mean": MEAN},
    "mean and std": {"mean": MEAN, "std": STD},
    "one number": {"mean": 0.5, "std": 0.25},
    **{name: {"interpolation": name} for name in INTERPOLATIONS},
    **{f"crop {share}": {"crop_pct": share} for share in (1, 0.9, 0.7)},
    "all": {"mean": MEAN, "std": STD, "interpolation": "lanczos", "crop_pct": 0.8},
}
ATOL = 2e-6  # between the floats of a processor and ours


def main() -> int:
    """Compare all. Returns 1 if anything differs."""
    counts: Counter[str] = Counter()
    for what, outcome in (*of_timm(), *of_processors()):
        counts[outcome] += 1
        if outcome.startswith("differs"):
            print(what, outcome)
    print(dict(counts))
    return int(any(outcome.startswith("differs") for outcome in counts))


def of_timm() -> Iterator[tuple[Any, str]]:
    """Yield every case of timm, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(timm.create_model("test_resnet").state_dict(), path)
        for name, model in (
            ("test_resnet", {"checkpoint": "test_resnet", "random_init": True}),
            ("test_resnet", {"checkpoint": path, "arch": "test_resnet"}),
            ("test_vit", {"checkpoint": "test_vit", "random_init": True}),
        ):
            own = resolve_data_config({}, pretrained_cfg=timm.create_model(name).pretrained_cfg)
            for said, options in OPTIONS.items():
                for fit in (None, "crop", "squash", "pad"):
                    if fit is not None and "crop_pct" in options:
                        continue
                    config = own | {key: three(value) for key, value in options.items()}
                    reference = create_transform(**config) if fit is None else by_pillow(config, fit)
                    ours = load_backbone(**model, **options, fit=fit).preprocessing
                    yield (name, said, fit), outcome_of(ours, reference, recorded(ours), 0)


def of_processors() -> Iterator[tuple[Any, str]]:
    """Yield every case of the image processors that give pictures one size, and how it ended."""
    types = read_facts()["transformers"]["models"]
    of_types = (IMAGE_PROCESSOR_MAPPING_NAMES.get(name) or {} for name in types)
    for name in sorted({names.get("pil") or names.get("torchvision") for names in of_types} - {None}):
        processor = getattr(transformers, name)()
        try:
            (size,) = ImageProcessor(processor).output_sizes()
        except Exception:  # it gives many sizes, or needs one
            continue
        for said, options in OPTIONS.items():
            if "crop_pct" in options:  # the tests have a reference for each way to crop
                continue
            wanted = {key: (value,) * 3 if isinstance(value, float) else value for key, value in options.items()}
            try:
                found = ImageProcessor(processor).overridden(wanted, size, is_sized_by_fit=False)
            except UsageError:
                yield (name, said), "refused"
                continue
            ours = processor_preprocessing(found, size)
            yield (name, said), outcome_of(ours, same_processor(processor, wanted), recorded(ours), ATOL)


def same_processor(processor: Any, options: dict[str, Any]) -> Callable[[Image.Image], Any]:
    """Return the processor itself with these values."""
    same = copy.deepcopy(processor)
    if "mean" in options:
        same.image_mean, same.do_normalize = list(options["mean"]), True
        same.image_std = list(options.get("std", same.image_std if processor.do_normalize else (1.0,) * 3))
    if "interpolation" in options:
        same.resample = Image.Resampling[options["interpolation"].upper()]
    return lambda picture: np.asarray(same(picture, return_tensors="np")["pixel_values"][0])


def by_pillow(config: dict[str, Any], fit: str) -> Callable[[Image.Image], torch.Tensor]:
    """Return what Pillow alone makes of a picture, normalised as torchvision does it."""
    how, size = Image.Resampling[config["interpolation"].upper()], config["input_size"][:0:-1]
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    fill = tuple(round(255 * value) for value in config["mean"])

    def fitted(picture: Image.Image) -> torch.Tensor:
        pixels = {
            "crop": lambda: ImageOps.fit(picture, size, how),
            "squash": lambda: picture.resize(size, how),
            "pad": lambda: ImageOps.pad(picture, size, how, color=fill),
        }[fit]()
        return (torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()).float().div(255) - mean) / std

    return fitted


def three(value: Any) -> Any:
    """Return a number for each colour where one is given for all."""
    return (value,) * 3 if value in (0.5, 0.25) else value


def recorded(ours: Preprocessing) -> Preprocessing:
    """Make it again from what a plan has on record."""
    return recorded_preprocessing(ours.settings, size=ours.size, channels=3, resize_mode=ours.resize_mode)


def outcome_of(ours: Preprocessing, reference: Callable[[Image.Image], Any], again: Preprocessing, atol: float) -> str:
    """Say how the input of all pictures compares with the reference."""
    for picture in PICTURES:
        found = normalised(ours, picture)
        if not torch.equal(found, normalised(again, picture)):
            return "differs from the plan"
        expected = torch.as_tensor(reference(picture))
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=atol):
            return "differs"
    return "equal"


def normalised(preprocessing: Preprocessing, picture: Image.Image) -> torch.Tensor:
    """Return the input of one picture, (C, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(preprocessing.fit(picture)))
    return preprocessing.normalize(pixels[None])[0]


if __name__ == "__main__":
    sys.exit(main())
