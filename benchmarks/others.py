"""Run the scripts that people write instead, in a process with OpenMP's own settings for waiting threads.

`python others.py MODEL INDICES PICTURES SCRATCH DEVICE` reads lines from stdin and answers each with seconds per image:

    recipe COUNT BATCH    image processor and AutoBackbone, as in the transformers documents, fp32
    script COUNT          timm's create_dataset, create_loader and features_only, fp32

Both append the maps to HDF5.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import h5py
import torch
from PIL import Image

from featcli.backbones.timm_model import timm

import transformers  # isort: skip  (after timm, which deals with torchvision)

LOADED_BATCH = 32  # of timm's loader
CONFIGS = {
    "transformers-swin": transformers.SwinConfig(),
    "transformers-dinov2": transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224),
}


class Appended:
    """Maps appended to HDF5 as scripts do it: a resizable dataset for each stage."""

    def __init__(self, path):
        self._file = h5py.File(path, "w")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def append(self, maps):
        """Append maps (B, C, H, W), one for each stage."""
        for name, found in enumerate(maps):
            rows = found.float().cpu().numpy()
            if str(name) not in self._file:
                shape = rows.shape[1:]
                self._file.create_dataset(str(name), (0, *shape), "f4", maxshape=(None, *shape), chunks=True)
            data = self._file[str(name)]
            data.resize(len(data) + len(rows), 0)
            data[-len(rows) :] = rows


class Others:
    """The ways to the maps of some stages of a model with random weights. Each returns seconds per image."""

    def __init__(self, model, indices, pictures, scratch, device):
        self.model, self.indices, self.scratch, self.device = model, indices, scratch, torch.device(device)
        self.paths = sorted(pictures.iterdir())
        if model in CONFIGS:
            config = transformers.AutoConfig.for_model(**CONFIGS[model].to_dict())
            config.out_indices = list(indices)
            self.processor = transformers.ViTImageProcessor()
        else:
            config = transformers.TimmBackboneConfig(
                backbone=model, out_indices=list(indices), use_pretrained_backbone=False
            )
            self.processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 224})
        self.library = transformers.AutoBackbone.from_config(config).eval().to(self.device)

    def recipe(self, count, batch_size):
        """Run image processor and AutoBackbone."""
        began = time.perf_counter()
        with Appended(self.scratch / "recipe.h5") as file, torch.no_grad():
            for first in range(0, count, batch_size):
                pictures = [Image.open(path).convert("RGB") for path in self.paths[first : first + batch_size]]
                given = self.processor(pictures, return_tensors="pt").to(self.device)
                file.append(self.library(**given).feature_maps)
        return (time.perf_counter() - began) / count

    def script(self, count):
        """Run timm's loader and features_only."""
        model = timm.create_model(self.model, features_only=True, out_indices=self.indices).eval().to(self.device)
        config = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
        folder = self.scratch / f"first-{count}"
        if not folder.exists():
            folder.mkdir()
            for path in self.paths[:count]:
                (folder / path.name).symlink_to(path)
        keep = ("input_size", "interpolation", "mean", "std", "crop_pct")
        began = time.perf_counter()
        loader = timm.data.create_loader(
            timm.data.create_dataset("", root=str(folder)), batch_size=LOADED_BATCH, num_workers=2,
            use_prefetcher=False, **{name: config[name] for name in keep},
        )  # fmt: skip
        with Appended(self.scratch / "script.h5") as file, torch.no_grad():
            for pixels, _ in loader:
                file.append(model(pixels.to(self.device)))
        return (time.perf_counter() - began) / count


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, indices, pictures, scratch, device = sys.argv[1:]
    others = Others(model, tuple(map(int, indices.split(","))), Path(pictures), Path(scratch), device)
    for line in sys.stdin:
        way, *numbers = line.split()
        print(getattr(others, way)(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
