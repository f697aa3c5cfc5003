"""Compare featcli with the least that any tool could take, and with the scripts that people write, in ratios.

Ways run in turn, and ratios are medians of several rounds, on JPEGs of 500x375 with the detail of photographs:

    forward   the same network, precision, layout and threads on pixels that are ready; maps thrown away
    decode    files into pixels alone, on all cores
    write     the stored bytes written raw and synced, alone
    bound     on a CPU forward + (decode + one copy into what is stored + raw write and fsync) in core-seconds / cores;
              on a GPU the slowest of forward, decode and write
    featcli   `featcli.extract`, from the first image to the manifest
    recipe    the documents' own: image processor and AutoBackbone, picture by picture, appended to HDF5
    batched   the same in batches
    script    timm's create_dataset, create_loader and features_only, appended to HDF5

The last three run in a process of their own (others.py). Weights are random, because speed does not depend on them.
`error` is what a precision does to the maps, against the library's own fp32: the largest difference as a share of the
largest number, and the least cosine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import numpy as np
import torch
from host import described
from others import CONFIGS
from photographs import SMALL, draw
from PIL import Image

import featcli
from featcli.backbones.backbone import as_run
from featcli.extraction.planning import prepare
from featcli.inputs.listing import find
from featcli.pixels import batches
from featcli.pixels.batches import SizedImages
from featcli.pixels.decoder import Decoder
from featcli.pixels.sizes import Sizes
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import InputSpec, PixelSpec
from featcli.system.machine import available_cores, kept_memory

BATCH = 32
SECONDS = 10  # that a run of featcli should take, about
FEWEST_BATCHES = 4  # so that the first batch, which nothing hides, and the last commit do not count much


@dataclass(frozen=True)
class Case:
    """A model and the stages of it that are dumped."""

    name: str
    stages: str  # for people
    indices: tuple[int, ...]  # timm's, or transformers'
    compiled: bool = False  # whether --compile is tried, too


CASES = [
    Case("resnet50", "last", (4,), compiled=True),
    Case("resnet50", "all", (0, 1, 2, 3, 4), compiled=True),
    Case("swin_tiny_patch4_window7_224", "last", (3,)),
    Case("swin_tiny_patch4_window7_224", "all", (0, 1, 2, 3)),
    Case("vit_small_patch16_224", "last", (11,)),
    Case("vit_small_patch16_224", "all", tuple(range(12))),
    Case("convnext_tiny", "last", (3,)),
    Case("convnext_tiny", "all", (0, 1, 2, 3)),
    Case("efficientnet_b0", "last", (4,)),
    Case("efficientnet_b0", "all", (0, 1, 2, 3, 4)),
    Case("transformers-swin", "last", (4,)),
    Case("transformers-swin", "all", (0, 1, 2, 3, 4)),
    Case("transformers-swin", "middle", (2,)),
    Case("transformers-dinov2", "last", (12,)),
    Case("transformers-dinov2", "all", tuple(range(13))),
    Case("transformers-dinov2", "middle", (6,)),
]


class Ways:
    """All the ways to the maps of one case. Each returns seconds per image."""

    def __init__(self, case, paths, scratch, device):
        self.case, self.paths, self.scratch, self.device = case, paths, scratch, torch.device(device)
        self.folder = paths[0].parent
        self._others = self._start_others()
        self.checkpoint = CONFIGS.get(case.name, case.name)
        self.options = {"checkpoint": self.checkpoint, "random_init": True, "out_indices": case.indices}
        self.options["device"] = device
        # featcli's choices on this machine are found once. The runs are then given them, as a resumed run is.
        self.chosen = {precision: self._choose(precision) for precision in ("fp32", "bf16")}

    def _start_others(self):
        words = [self.case.name, ",".join(map(str, self.case.indices)), self.folder, self.scratch, self.device]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        return subprocess.Popen(
            [sys.executable, Path(__file__).with_name("others.py"), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _choose(self, precision):
        events = {}
        output = str(self.scratch / "chosen")
        config = ExtractSpec((str(self.folder),), output=output, precision=precision, **self.options)
        prepare(config, None, lambda kind, **facts: events.setdefault(facts.get("name"), facts))
        layout, _, folded = events["layout"]["value"].partition(", ")
        return {"layout": layout, "fold": bool(folded), "precision": precision}

    def backbone(self, precision):
        """Return the backbone as featcli runs it."""
        chosen = self.chosen.get(precision) or {**self.chosen["fp32"], "precision": precision}
        return featcli.load_backbone(**self.options, **chosen)

    def finished(self):
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def forward(self, precision, count):
        """Run the network alone on pixels that are ready."""
        backbone = self.backbone(precision)
        pixels = torch.randint(0, 256, (BATCH, 3, *backbone.preprocessing.size), dtype=torch.uint8).to(self.device)
        with torch.inference_mode(), kept_memory():
            ready = as_run(backbone.preprocessing.normalize(pixels), backbone.execution)
            backbone.network.maps(ready)
            self.finished()
            began = time.perf_counter()
            for _ in range(count // BATCH):
                backbone.network.maps(ready)
            self.finished()
            return (time.perf_counter() - began) / count

    def copy(self, precision):
        """Return the core-seconds of one copy of the maps into the stored dtype and layout."""
        backbone = self.backbone(precision)
        pixels = torch.randint(0, 256, (BATCH, 3, *backbone.preprocessing.size), dtype=torch.uint8)
        maps = {name: found.cpu() for name, found in backbone(pixels).items()}
        targets = {name: torch.ones(found.shape) for name, found in maps.items()}  # memory that exists already
        began = time.process_time()
        for name, found in maps.items():
            targets[name].copy_(found)
        return (time.process_time() - began) / BATCH

    def decode(self, count):
        """Return the core-seconds of files into pixels, by featcli's own threads."""
        backbone = self.backbone("fp32")
        images = find(InputSpec(tuple(map(str, self.paths[:count])))).images
        pictures = SizedImages(images, Sizes(backbone.preprocessing.size))
        reading = Decoder(PixelSpec(), backbone.preprocessing, available_cores())
        began = time.process_time()
        rows = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
        with closing(batches.read(reading, ((pictures, some) for some in rows))) as decoded:
            for _ in decoded:
                pass
        return (time.process_time() - began) / count

    def write(self, count, clock):
        """Write what is stored raw, with fsync, and time it by a clock."""
        size = sum(np.prod(stage.shape) * 4 for stage in self.backbone("fp32").selected)
        batch = np.random.default_rng(0).bytes(int(size) * BATCH)
        os.sync()
        began = clock()
        with open(self.scratch / "raw", "wb", buffering=0) as file:
            for _ in range(count // BATCH):
                file.write(batch)
            os.fsync(file.fileno())
        return (clock() - began) / (count // BATCH * BATCH)

    def featcli(self, precision, count, compiled=False):
        """Run featcli from the first image to the manifest."""
        given = {**self.options, **self.chosen[precision], "compile": compiled, "batch_size": BATCH}
        outcome = featcli.extract(self.paths[:count], output=self.scratch / "dump", overwrite=True, **given)
        return outcome.seconds / count

    def other(self, *words):
        """Run one of the ways of others.py."""
        self._others.stdin.write(" ".join(map(str, words)) + "\n")
        self._others.stdin.flush()
        return float(self._others.stdout.readline())

    def close(self):
        """End the process of the other ways."""
        self._others.communicate()

    def error(self, precision):
        """Return (largest relative difference, least cosine) of 8 pictures' maps against the library's own fp32."""
        plain = featcli.load_backbone(**self.options)
        pixels = torch.stack([plain.preprocess(Image.open(path)) for path in self.paths[:8]])
        expected, found = plain(pixels), self.backbone(precision)(pixels)
        largest, cosine = 0.0, 1.0
        for name, maps in expected.items():
            one, other = maps.cpu().flatten(1), found[name].cpu().float().flatten(1)
            largest = max(largest, float((one - other).abs().max() / one.abs().max()))
            cosine = min(cosine, float(torch.cosine_similarity(one, other).min()))
        return largest, cosine


def measure(case, paths, scratch, chosen):
    """Print the ratios of one case."""
    ways = Ways(case, paths, scratch, chosen.device)
    ways.other("recipe", 2, 1)  # starts it, and does what only the first call does
    todo = [
        ("decode", lambda: ways.decode(8 * BATCH)),
        ("write cpu", lambda: ways.write(2 * BATCH, time.process_time)),
        ("write", lambda: ways.write(2 * BATCH, time.perf_counter)),
        ("recipe", lambda: ways.other("recipe", BATCH, 1)),  # nothing overlaps there, so every picture takes as long
        ("batched", lambda: ways.other("recipe", 2 * BATCH, BATCH)),
    ]
    if case.name not in CONFIGS:
        todo.append(("script", lambda: ways.other("script", FEWEST_BATCHES * BATCH)))
    for precision in ("fp32", "bf16"):
        count = round(SECONDS / ways.forward(precision, BATCH) / BATCH)
        count = BATCH * min(len(paths) // BATCH, max(count, FEWEST_BATCHES))
        way = {"precision": precision, "count": count}
        forward = (f"forward {precision}", lambda precision=precision: ways.forward(precision, BATCH))
        run = (f"featcli {precision}", lambda way=way: ways.featcli(**way))
        # These are measured before and after the others, because the speed of a shared machine drifts.
        todo += [(f"copy {precision}", lambda precision=precision: ways.copy(precision)), forward, run, forward]
        if case.compiled:
            todo.append((f"compiled {precision}", lambda way=way: ways.featcli(**way, compiled=True)))
    report(case, ways, [one_round(todo) for _ in range(chosen.rounds)])
    ways.close()


def one_round(todo):
    """Return seconds per image of each way; the mean if it was measured twice."""
    seconds = {}
    for name, way in todo:
        os.sync()  # otherwise this way would pay for writes of the way before
        seconds.setdefault(name, []).append(way())
    return {name: statistics.mean(found) for name, found in seconds.items()}


def report(case, ways, rounds):
    """Print one line for each precision."""

    def ratio(above, below):
        """Return the median over the rounds, or - if it was not tried. A side is a way, or sums several."""
        sides = [side if callable(side) else lambda seconds, way=side: seconds[way] for side in (above, below)]
        try:
            return f"{statistics.median(sides[0](seconds) / sides[1](seconds) for seconds in rounds):8.2f}"
        except KeyError:
            return f"{'-':>8}"

    for precision in ("fp32", "bf16"):

        def decode(seconds):
            return seconds["decode"] / available_cores()

        def bound(seconds, precision=precision):
            forward = seconds[f"forward {precision}"]
            if ways.device.type != "cpu":
                return max(forward, decode(seconds), seconds["write"])
            beside = seconds[f"copy {precision}"] + seconds["write cpu"]
            return forward + decode(seconds) + beside / available_cores()

        run = f"featcli {precision}"
        largest, cosine = ways.error(precision)
        chosen = ways.chosen[precision]
        cells = [
            f"{case.name[:26]:<26} {case.stages:<6} {precision}",
            "".join(ratio(run, least) for least in (bound, f"forward {precision}", decode, "write")),
            *(ratio(way, run) for way in ("recipe", "batched", "script")),
            ratio("recipe", f"compiled {precision}"),
            f"  {1 / statistics.median(seconds[run] for seconds in rounds):6.1f}/s  {largest:.0e} {cosine:.6f}",
            f" {chosen['layout']}{', folded' if chosen['fold'] else ''}",
        ]
        print(" ".join(cells), flush=True)
    largest, cosine = ways.error("fp16")
    print(f"{case.name[:26]:<26} {case.stages:<6} fp16 {'':>71}  {largest:.0e} {cosine:.6f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cases whose name and stages hold this, such as 'resnet50 all'")
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"{described()}; {chosen.device}, batches of {BATCH}, medians of {chosen.rounds}\n"
        f"{'':<38}  featcli /                                   ... / featcli  recipe /\n"
        f"{'model':<26} {'stages':<6} {'':<4}   bound forward  decode   write    recipe  batched   script compiled"
        f"    featcli  error"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pictures = draw(chosen.pictures or scratch / "pictures", 1000, SMALL, available_cores())
        paths = sorted(pictures.resolve().iterdir())
        for case in CASES:
            if chosen.only in f"{case.name} {case.stages}":
                measure(case, paths, scratch, chosen)


if __name__ == "__main__":
    sys.exit(main())
