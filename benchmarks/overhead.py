"""How much of a run is not the backbone? `make bench` prints ratios; absolute times mean little on shared machines.

In turn, in one process, medians of several rounds:

    forward   the backbone alone, on pixels that are ready, maps thrown away: the least that any tool can take
    featcli   `featcli.extract`: decode, forward, hash, write, fsync, commit
    recipe    the usual script: image processor and AutoBackbone, or transform and timm model, picture by
              picture, appended to HDF5

The pictures are JPEGs of 500x375 drawn like those in sample_images.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

import featcli
from featcli.machine import available_cores

sys.path.insert(0, str(Path(__file__).parent.parent / "sample_images"))
from draw import landscape

from featcli.backbones.from_timm import timm


def draw_pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        picture = landscape(375, 500, i * 7, (110, 150, 205), (90, 130, 80))
        picture.save(folder / f"{i:04d}.jpg", quality=90)


def forward(backbone, pixels, count):
    for _ in range(count // len(pixels)):
        backbone(pixels)


def recipe(name, stages, pictures, target):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with h5py.File(target, "w") as file, torch.inference_mode():
        for path in sorted(pictures.iterdir()):
            maps = model.forward_intermediates(
                transform(Image.open(path).convert("RGB"))[None],
                indices=stages,
                output_fmt="NCHW",
                intermediates_only=True,
            )
            for index, found in zip(stages, maps, strict=True):
                if str(index) not in file:
                    file.create_dataset(
                        str(index), (0, *found.shape[1:]), "f4", maxshape=(None, *found.shape[1:]), chunks=True
                    )
                data = file[str(index)]
                data.resize(len(data) + 1, 0)
                data[-1] = found[0].numpy()


def timed(work, *arguments, **options):
    began = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - began


def measure(name, stages, pictures, count, rounds, scratch):
    options = {"checkpoint": name, "random_init": True, "out_indices": stages, "batch_size": 16}
    backbone = featcli.load_backbone(name, random_init=True, out_indices=stages)
    pixels = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8)
    backbone(pixels)
    seconds = {"forward": [], "featcli": [], "recipe": []}
    for _ in range(rounds):
        seconds["forward"].append(timed(forward, backbone, pixels, count))
        outcome = featcli.extract(pictures, output=scratch / "dump", overwrite=True, **options)
        seconds["featcli"].append(outcome.seconds)  # from the first image to the manifest, as the others
        seconds["recipe"].append(timed(recipe, name, stages, pictures, scratch / "maps.h5"))
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    size = np.prod([s.shape for s in backbone.selected], axis=1).sum() * 4 * count / 1e6
    print(
        f"{name:<32} {'+'.join(s.name for s in backbone.selected):<24} {size:>6.0f} MB"
        f"   featcli / forward {medians['featcli'] / medians['forward']:.2f}"
        f"   recipe / featcli {medians['recipe'] / medians['featcli']:.2f}"
        f"   ({count / medians['featcli']:.1f} images/s)",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    print(
        f"{available_cores()} cores, {platform.machine()} {torch.backends.cpu.get_cpu_capability()},"
        f" torch {torch.__version__}, {torch.get_num_threads()} threads; {chosen.images} images,"
        f" medians of {chosen.rounds}"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        draw_pictures(scratch / "pictures", chosen.images)
        for name, stages in (
            ("resnet50", [4]),
            ("resnet50", [0, 1, 2, 3, 4]),
            ("resnet50", [2]),
            ("vit_small_patch16_224", [11]),
        ):
            work = scratch / f"{name}-{len(stages)}-{stages[0]}"
            work.mkdir()
            measure(name, stages, scratch / "pictures", chosen.images, chosen.rounds, work)


if __name__ == "__main__":
    main()
