"""Measure what other outputs cost beside the deepest maps: `python benchmarks/outputs.py [ARCHITECTURE ...]`.

Runs of both kinds take turns in one process, and the ratio of their processor times is the median of seven pairs. It
counts threads of all kinds, and is the same on a busy machine as far as that can be. Operations are counted in one
forward pass that computes nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import featcli
from featcli.backbones.checkpoint import resolve
from featcli.backbones.stages import Points
from featcli.spec.groups import CheckpointSpec

PAIRS = 7
IMAGES = 96
SAMPLES = Path(__file__).parent.parent / "sample_images"


def seconds(folder: Path, pictures: list[str], name: str, more: bool) -> float:
    """Return the processor time of one run, without that of loading the network, which both have."""
    last = resolve(CheckpointSpec(checkpoint=name, random_init=True)).stage_names[-1][0]
    has_class_token = featcli.load_backbone(name, random_init=True).has_class_token
    options = {"out_features": [last, "embedding"], "pool": ["none", "cls" if has_class_token else "avg"]}
    began: list[float] = []
    featcli.extract(
        pictures,
        checkpoint=name,
        random_init=True,
        output=folder,
        layout="channels-first",
        overwrite=True,
        report=lambda kind, **_: began.append(time.process_time()) if kind == "start" else None,
        **(options if more else {"out_features": last}),
    )
    return time.process_time() - began[0]


def operations(name: str, more: bool) -> int:
    """Return the floating point operations of one forward pass."""
    model = resolve(CheckpointSpec(checkpoint=name, random_init=True))
    network = model.build(Points((len(model.stage_names) - 1,), ("embedding",) if more else ()), "meta")
    with FlopCounterMode(display=False) as counter:
        network.run(model.blank("meta"), with_prefixes=more and network.has_class_token)
    return counter.get_total_flops()


def main(names: list[str]) -> None:
    """Print the ratios of some architectures."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        pictures.mkdir()
        samples = [path for path in sorted(SAMPLES.rglob("*.*")) if path.suffix in (".jpg", ".png", ".webp")]
        for number in range(IMAGES):
            source = samples[number % len(samples)]
            (pictures / f"{number:03}{source.suffix}").write_bytes(source.read_bytes())
        for name in names:
            ratios = []
            for _ in range(PAIRS):
                plain, several = (
                    seconds(Path(scratch) / "dump", [str(pictures)], name, more) for more in (False, True)
                )
                ratios.append(several / plain)
            share = operations(name, True) / operations(name, False)
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"{name:<24} processor time {statistics.median(ratios):.3f} ({spread}), operations {share:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["resnet50", "vit_small_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"])
