"""Compare the input of networks of many bands with timm, Pillow and torch, band by band.

For 2, 4, 5 and 13 bands, 8 and 16 bits, side by side and in planes, without compression and with LZW and Deflate, and
for timm's own cut and every --fit: GDAL must read the file as the array that it was made of. Each band of the input
must be, to the bit, what the reference makes of it, and what a network of one channel gets from the band as a grey
picture. An array gives the same as its file, and so does what a plan has on record. Takes some minutes; `make sweep`
installs rasterio.

    python benchmarks/bands.py
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import tifffile
import torch
from PIL import Image, ImageOps

from featcli import load_backbone
from featcli.backbones.preprocessing import recorded_preprocessing
from featcli.backbones.torchvision_operators import import_timm

import_timm()

from timm.data import create_transform  # noqa: E402 (torchvision's operators come first)

SIZE, STEP = 160, 32  # pixels: the input of both networks, and a stride that native sizes are multiples of
NETWORKS = ("test_resnet", "test_vit")
FILES = tuple(product((np.uint8, np.uint16), ("contig", "separate"), (None, "lzw", "deflate")))


def main() -> int:
    """Compare all. Returns 1 if anything differs."""
    found = list(compared())
    for what, is_equal in found:
        if not is_equal:
            print(f"DIFFERS: {what}")
    print(f"{len(found)} bands compared, {sum(not is_equal for _, is_equal in found)} differ")
    return int(not all(is_equal for _, is_equal in found))


def compared() -> Iterator[tuple[str, bool]]:
    """Yield each band with whether all that is compared is equal."""
    warnings.simplefilter("ignore")  # the files have no coordinates
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, grey = Path(folder) / "bands.tif", Path(folder) / "grey.png"
        for name, count, fit in product(NETWORKS, (2, 4, 5, 13), (None, "crop", "squash", "pad", "native")):
            if (name, fit) == ("test_vit", "native"):
                continue  # it has no input of other sizes
            mean, std = (tuple(noise.uniform(0.1, 0.6, count).round(3).tolist()) for _ in range(2))
            options: dict[str, Any] = {"random_init": True, "fit": fit}
            ours = load_backbone(name, num_channels=count, mean=mean, std=std, **options)
            again = recorded_preprocessing(
                ours.preprocessing.settings,
                size=ours.preprocessing.size,
                channels=count,
                resize_mode=ours.preprocessing.resize_mode,
            )
            ones = [
                load_backbone(name, num_channels=1, mean=m, std=s, **options) for m, s in zip(mean, std, strict=True)
            ]
            for dtype, planes, compression in FILES:
                values = noise.integers(0, np.iinfo(dtype).max, (75, 117, count), dtype, endpoint=True)
                stored = values if planes == "contig" else values.transpose(2, 0, 1)
                tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planes, compression=compression)
                with rasterio.open(path) as file:
                    is_confirmed = np.array_equal(file.read().transpose(1, 2, 0), values)
                pixels = ours.preprocess(path)
                is_same = torch.equal(ours.preprocess(values), pixels)
                input_ = ours.preprocessing.normalize(pixels[None])[0]
                greys = [Image.fromarray(np.ascontiguousarray(eight_bits(values)[..., band])) for band in range(count)]
                is_same &= np.array_equal(again.fit([grey.convert("RGB") for grey in greys]), pixels.numpy())
                is_same &= torch.equal(again.normalize(pixels[None])[0], input_)
                for band in range(count):
                    one = np.ascontiguousarray(values[..., band])
                    Image.fromarray(one).save(grey)
                    is_equal = torch.equal(ones[band].preprocess(grey), pixels[band : band + 1])
                    reference = reference_of(ours.preprocessing.settings, fit, mean[band], std[band])
                    is_equal &= torch.equal(reference(greys[band]), input_[band : band + 1])
                    what = f"{name}, band {band} of {count}, {dtype.__name__}, {planes}, {compression}, --fit {fit}"
                    yield what, is_confirmed and is_same and is_equal


def eight_bits(values: Any) -> Any:
    """Return the values as a grey picture has them in 8 bits."""
    return values if values.dtype == np.uint8 else np.rint(values / 257.0).astype(np.uint8)


def reference_of(config: Any, fit: str | None, mean: float, std: float) -> Callable[[Image.Image], torch.Tensor]:
    """Return what timm, or Pillow and torch, make of a grey picture in 8 bits."""
    if fit is None:
        words = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        whole: Callable[[Image.Image], torch.Tensor] = create_transform(
            input_size=(1, SIZE, SIZE), mean=(mean,), std=(std,), is_training=False, **words
        )
        return whole
    how, square = Image.Resampling[config["interpolation"].upper()], (SIZE, SIZE)

    def reference(picture: Image.Image) -> torch.Tensor:
        own = (max(1, round(picture.width / STEP)) * STEP, max(1, round(picture.height / STEP)) * STEP)
        sized = {
            "crop": lambda: ImageOps.fit(picture, square, how),
            "squash": lambda: picture.resize(square, how),
            "pad": lambda: ImageOps.pad(picture, square, how, color=round(255 * mean)),
            "native": lambda: picture.resize(own, how),
        }[fit]()
        return torch.from_numpy(np.asarray(sized).copy()).float().div(255)[None].sub(mean).div(std)

    return reference


if __name__ == "__main__":
    sys.exit(main())
