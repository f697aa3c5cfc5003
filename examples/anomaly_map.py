"""Find what is unlike a set of normal images, and where in the picture, in the manner of PatchCore.

    featcli extract normal -c resnet50 --out-features stage2,stage3 -o normal_feats
    featcli extract tested -c resnet50 --out-features stage2,stage3 -o tested_feats
    python examples/anomaly_map.py normal_feats tested_feats --output heat.png

At each position the maps of the stages, averaged over 3x3 positions and resized to the largest map, make one vector.
Vectors of the normal images are drawn at random, as many from each, and of those a memory bank is kept by a greedy
coreset: each time the one farthest from all that are in it. The score of a position is its distance to the nearest
vector of the bank. Printed are the tested images by their highest score, with its place in the map. The heat map of the
first of them is as large as the network's input, from black for no distance to white for the highest score.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

import featcli

CANDIDATES = 10  # vectors that are drawn for each one kept
MUST_AGREE = ("backbone", "weights_digest", "preprocessing", "pool")


def vectors(dump, stages):
    """(key, (H, W, C)) for each image: all stages in one vector at each position of the largest map."""
    for run in dump.walk(stages):
        for number, key in enumerate(run.keys):
            maps = [torch.from_numpy(run.maps[stage][number]).float()[None] for stage in stages]
            size = max(found.shape[2:] for found in maps)
            averages = [avg_pool2d(found, 3, stride=1, padding=1, count_include_pad=False) for found in maps]
            resized = [interpolate(found, size, mode="bilinear") for found in averages]
            yield key, torch.cat(resized, 1)[0].permute(1, 2, 0)


def coreset(candidates, size):
    """At most `size` of the (M, C) candidates, chosen greedily: each the farthest from those before it."""
    chosen, distances = [0], torch.full((len(candidates),), torch.inf)
    while len(chosen) < min(size, len(candidates)):
        distances = torch.minimum(distances, torch.cdist(candidates, candidates[chosen[-1:]])[:, 0])
        chosen.append(int(distances.argmax()))
    return candidates[chosen]


def memory_bank(dump, stages, size=1000, seed=0):
    """(size, C): vectors of normal images that lie as far apart as possible."""
    random, drawn = torch.Generator().manual_seed(seed), []
    from_each = math.ceil(CANDIDATES * size / max(1, dump.valid.sum()))
    for _, found in vectors(dump, stages):
        flat = found.flatten(0, 1)
        drawn.append(flat[torch.randperm(len(flat), generator=random)[:from_each]])
    return coreset(torch.cat(drawn), size)


def anomaly_maps(normal, tested, stages, size=1000, seed=0):
    """{key: (H, W) scores} for each image of the dump `tested`, the highest score first. Raises UsageError."""
    if not normal.valid.any():
        raise featcli.UsageError("the normal dump holds no maps", "its failures.jsonl says why")
    for name in stages:
        if any(len(dump[name].stage.shape) != 3 for dump in (normal, tested)):
            raise featcli.UsageError(f"stage {name!r} holds no maps", "extract with --pool none")
    if any(normal.plan.settings[name] != tested.plan.settings[name] for name in MUST_AGREE):
        raise featcli.UsageError("the dumps were extracted in two ways", "extract both with the same options")
    bank = memory_bank(normal, stages, size, seed)
    scores = {
        key: torch.cdist(found.flatten(0, 1), bank).amin(1).view(found.shape[:2])
        for key, found in vectors(tested, stages)
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1].max()))


def heat_map(scores, stride):
    """(H, W) scores -> a picture of H and W times the stride, from black over red and yellow to white."""
    share = (scores / scores.max().clamp(min=1e-12)).numpy()
    colors = np.clip(np.stack([3 * share, 3 * share - 1, 3 * share - 2], 2), 0, 1)
    picture = Image.fromarray((255 * colors).round().astype(np.uint8))
    return picture.resize((picture.width * stride[1], picture.height * stride[0]), Image.Resampling.BICUBIC)


def main(arguments=None):
    """Read the command line, compare the dumps, write the heat map, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", help="the dump of normal images")
    parser.add_argument("tested", help="the dump of images to be tested, extracted with the same options")
    parser.add_argument("--stages", default="stage2,stage3", help="default: %(default)s")
    parser.add_argument("--bank", type=int, default=1000, help="vectors that are kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--output", help="write the heat map of the image with the highest score there, as PNG")
    chosen = parser.parse_args(arguments)
    if chosen.bank < 1:
        parser.error(f"--bank {chosen.bank}: must be at least 1")
    if chosen.output and not Path(chosen.output).absolute().parent.is_dir():
        parser.error(f"--output {chosen.output}: no such folder")
    stages = chosen.stages.split(",")
    try:
        normal, tested = featcli.open_dump(chosen.normal), featcli.open_dump(chosen.tested)
        found = anomaly_maps(normal, tested, stages, chosen.bank, chosen.seed)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    for key, scores in found.items():
        row, column = divmod(int(scores.argmax()), scores.shape[1])
        print(f"{scores.max():.4g}  {key!r}  at row {row}, column {column} of {scores.shape[0]}x{scores.shape[1]}")
    if chosen.output and found:
        stride = min(tested[stage].stage.stride for stage in stages)
        heat_map(next(iter(found.values())), stride).save(chosen.output, "PNG")


if __name__ == "__main__":
    main()
