"""Compare own preprocessing (`--mean --std --interpolation --crop-pct`) with timm, Pillow and image processors.

For timm models by name and from a weights file, and for each image processor of the types of transformers that featcli
knows, every option alone and all together, with and without `--fit`: the input must be, to the bit, what timm's
`create_transform` gives, what Pillow gives before torchvision's normalisation, or what the processor itself gives with
the same values (its floats to 2e-6). What a plan has on record must give the same input again. Then networks of one to
five channels: every crop mode of timm with `--decode exact` and `fast` (within the bound of `fast`), and image
processors for greys. Takes a few minutes.

    python benchmarks/preprocessing.py
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from featcli import load_backbone
from featcli.backbones.image_processor import ImageProcessor
from featcli.backbones.preprocessing import (
    Preprocessing,
    processor_preprocessing,
    recorded_preprocessing,
    timm_preprocessing,
)
from featcli.backbones.torchvision_operators import import_timm, import_transformers
from featcli.errors import UsageError
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.torch_resize import FURTHEST
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
    for what, outcome in (*of_timm(), *of_processors(), *of_channels(), *of_greys()):
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


def one_size_processors() -> Iterator[str]:
    """Yield the names of the image processors that give pictures one size."""
    types = read_facts()["transformers"]["models"]
    of_types = (IMAGE_PROCESSOR_MAPPING_NAMES.get(name) or {} for name in types)
    for name in sorted({names.get("pil") or names.get("torchvision") for names in of_types} - {None}):
        try:
            (_,) = ImageProcessor(getattr(transformers, name)()).output_sizes()
        except Exception:  # it gives many sizes, or needs one
            continue
        yield name


def of_processors() -> Iterator[tuple[Any, str]]:
    """Yield every case of the image processors that give pictures one size, and how it ended."""
    for name in one_size_processors():
        processor = getattr(transformers, name)()
        (size,) = ImageProcessor(processor).output_sizes()
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


def of_channels() -> Iterator[tuple[Any, str]]:
    """Yield every crop mode of timm for networks of some numbers of channels, and how it ended.

    timm itself is given the grey, or each band, of a picture, and the mean that belongs to it.
    """
    means, stds = (0.5, 0.4, 0.2, 0.6, 0.3), (0.25, 0.2, 0.3, 0.22, 0.28)
    for mode, how, size, kept, channels, numbers in product(
        ("center", "squash", "border"),
        INTERPOLATIONS,
        ((32, 32), (32, 48), (48, 32)),
        (1.0, 0.875),
        range(1, 6),
        (1, 3, 5),
    ):
        if numbers not in (1, channels) and channels not in OF_COLOURS:
            continue  # refused: nobody says which number is whose
        config = {"input_size": (3, *size), "interpolation": how, "crop_pct": kept, "crop_mode": mode}
        numbered = config | {"mean": means[:numbers], "std": stds[:numbers]}
        ours = timm_preprocessing(numbered, channels, "", None)
        again = recorded_preprocessing(ours.settings, size=size, channels=channels, resize_mode=None)
        for level in ("exact", "fast") if channels in OF_COLOURS else ("exact",):
            most = 0 if level == "exact" else FURTHEST + (channels == 1)  # the grey of a picture comes before its size
            yield (mode, how, size, kept, channels, numbers, level), channels_compared(config, ours, again, level, most)


def channels_compared(config: Any, ours: Preprocessing, again: Preprocessing, level: Any, most: float) -> str:
    """Say how the input of all pictures compares with timm's, and by how many levels of 255 it may differ."""
    by_three = ours.channels == len("RGB")
    for picture in PICTURES:
        bands = [picture.getchannel(band % 3) for band in range(ours.channels)]
        grey_or_bands = [picture.convert("L")] if ours.channels == 1 else bands
        given = picture if ours.channels in OF_COLOURS else [band.convert("RGB") for band in bands]
        pairs = (
            [(ours.mean, ours.std)] if by_three else [((m,), (s,)) for m, s in zip(ours.mean, ours.std, strict=True)]
        )
        expected = torch.cat(
            [
                create_transform(**config, mean=mean, std=std)(one)
                for one, (mean, std) in zip([picture] if by_three else grey_or_bands, pairs, strict=True)
            ]
        )
        for found in (normalised(one, given, level) for one in (ours, again)):
            if found.shape != expected.shape:
                return "differs in shape"
            levels = (found - expected).abs() * 255 * torch.tensor(ours.std)[:, None, None]
            if levels.max() > most + (0.01 if most else 0):
                return "differs"
    return "equal" if not most else "near"


def of_greys() -> Iterator[tuple[Any, str]]:
    """Yield every image processor for networks of one channel, with one number and with three, and how it ended."""
    for name in one_size_processors():
        for means, stds in (((0.45,), (0.22,)), ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))):
            processor, own = (getattr(transformers, name)() for _ in range(2))
            processor.do_normalize = own.do_normalize = True
            processor.image_mean, processor.image_std = list(means), list(stds)
            (size,) = ImageProcessor(processor).output_sizes()
            try:
                ours = processor_preprocessing(ImageProcessor(processor), size, channels=1)
            except UsageError:
                yield (name, "greys", len(means)), "refused"
                continue
            again = recorded_preprocessing(ours.settings, size=size, channels=1, resize_mode=None)

            reference = partial(grey_by, own, sum(means) / len(means), sum(stds) / len(stds))
            yield (name, "greys", len(means)), outcome_of(ours, reference, again, ATOL)


def grey_by(own: Any, mean: float, std: float, picture: Image.Image) -> Any:
    """Return what a processor makes of the grey of a picture, or of three equal colours if it takes no greys."""
    grey = picture.convert("L")
    for given in (grey, grey.convert("RGB")):
        count = len(given.getbands())
        own.image_mean, own.image_std = [mean] * count, [std] * count
        with suppress(ValueError, IndexError):
            return np.asarray(own(given, return_tensors="np")["pixel_values"][0])[:1]
    raise AssertionError(f"{type(own).__name__} takes no greys")


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


def normalised(preprocessing: Preprocessing, picture: Any, level: Any = "exact") -> torch.Tensor:
    """Return the input of one picture, or of its bands, (C, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(preprocessing.fit_for(level)(picture)))
    return preprocessing.normalize(pixels[None])[0]


if __name__ == "__main__":
    sys.exit(main())
