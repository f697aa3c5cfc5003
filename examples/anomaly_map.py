"""Find what is unlike a set of normal images, and where in the picture, in the manner of PatchCore.

    featcli extract normal -c resnet50 --out-features stage2,stage3 -o normal_feats
    featcli extract tested -c resnet50 --out-features stage2,stage3 -o tested_feats
    python examples/anomaly_map.py normal_feats tested_feats --output heat.png

The maps of the stages are averaged over 3x3 positions and resized to the largest map. At each position they make one
vector. Vectors of the normal images are drawn at random, the same number from each image. A greedy coreset keeps some
of them as a memory bank: it always adds the vector that is farthest from those in the bank. The score of a position is
its distance to the nearest vector of the bank.

The script prints the tested images by their highest score, with its place in the map. The sheet shows the first of them
as the network saw them, and again under their heat. There is no colour up to the highest score of the normal images.
Above it the colours go from red over yellow to white, which is the highest score of all. So a colour means the same
score in every picture.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import avg_pool2d, interpolate

import featcli

CANDIDATES = 10  # drawn vectors for each one that is kept
GAP, LINE = 8, 16  # pixels of the sheet
MUST_AGREE = ("backbone", "weights_digest", "preprocessing")


def vectors(dump, stages):
    """Yield (key, (H, W, C)) for each image: all stages in one vector at each position of the largest map."""
    for run in dump.walk(stages):
        for number, key in enumerate(run.keys):
            maps = [torch.from_numpy(run.maps[stage][number]).float()[None] for stage in stages]
            size = max(found.shape[2:] for found in maps)
            averages = [avg_pool2d(found, 3, stride=1, padding=1, count_include_pad=False) for found in maps]
            resized = [interpolate(found, size, mode="bilinear") for found in averages]
            yield key, torch.cat(resized, 1)[0].permute(1, 2, 0)


def coreset(candidates, size):
    """Return the places of at most `size` of the (M, C) candidates. Each is the farthest from those chosen before."""
    if size >= len(candidates):
        return list(range(len(candidates)))
    chosen, distances = [0], torch.full((len(candidates),), torch.inf)
    while len(chosen) < size:
        distances = torch.minimum(distances, torch.cdist(candidates, candidates[chosen[-1:]])[:, 0])
        chosen.append(int(distances.argmax()))
    return chosen


def memory_bank(dump, stages, size=1000, seed=0):
    """Return (size, C) vectors of normal images, as far apart as possible, and the (size,) numbers of their images."""
    random, drawn, images = torch.Generator().manual_seed(seed), [], []
    from_each = math.ceil(CANDIDATES * size / max(1, dump.valid.sum()))
    for number, (_, found) in enumerate(vectors(dump, stages)):
        flat = found.flatten(0, 1)
        drawn.append(flat[torch.randperm(len(flat), generator=random)[:from_each]])
        images += [number] * len(drawn[-1])
    kept = coreset(torch.cat(drawn), size)
    return torch.cat(drawn)[kept], torch.tensor(images)[kept]


def anomaly_maps(normal, tested, stages, size=1000, seed=0):
    """Return {key: (H, W) scores} for the dump `tested`, the highest score first, and the highest score of `normal`.

    A normal image is compared with what the bank has of the others, because with its own vectors it would score too
    low. Raises UsageError.
    """
    if not normal.valid.any():
        raise featcli.UsageError("the normal dump holds no maps", "its failures.jsonl says why")
    for name in stages:
        if any(len(dump[name].stage.shape) != 3 for dump in (normal, tested)):
            raise featcli.UsageError(f"stage {name!r} holds no maps", "extract with --pool none")
    is_other = any(normal.plan.settings[name] != tested.plan.settings[name] for name in MUST_AGREE)
    if is_other or any(normal.outputs[name].shape != tested.outputs[name].shape for name in stages):
        raise featcli.UsageError("the dumps were extracted in two ways", "extract both with the same options")
    bank, images = memory_bank(normal, stages, size, seed)
    scores = {key: distances(found, bank) for key, found in vectors(tested, stages)}
    highest = 0.0
    for number, (_, found) in enumerate(vectors(normal, stages)):
        others = bank[images != number]
        if len(others):
            highest = max(highest, float(distances(found, others).max()))
    return dict(sorted(scores.items(), key=lambda item: -item[1].max())), highest


def distances(found, bank):
    """Return (H, W): the distance from each position of (H, W, C) to the nearest vector of the bank."""
    return torch.cdist(found.flatten(0, 1), bank).amin(1).view(found.shape[:2])


def heat_of(scores, low, high, size):
    """Return (*size, 4) of 0 to 1 for (H, W) scores: colours, and how much of the picture they hide."""
    scaled = (scores - low) / max(high - low, 1e-12)
    share = interpolate(scaled[None, None], size, mode="bilinear")[0, 0].clamp(0, 1).numpy()
    green, blue = np.clip([2 * share - 0.4, 3 * share - 2], 0, 1)
    return np.stack([np.ones_like(share), green, blue, 0.9 * share**0.5], 2)


def overlay(picture, scores, low, high):
    """Return (H, W, 3) of 0 to 255, as the network saw it, under the heat of its scores."""
    heat = heat_of(scores, low, high, picture.shape[:2])
    return (1 - heat[..., 3:]) * picture + 255 * heat[..., 3:] * heat[..., :3]


def seen(dump, key, root=None):
    """Return (H, W, 3) of 0 to 255: the picture of a row as the network saw it, or grey if its file cannot be found."""
    try:
        pixels = dump.preprocess(dump.picture_path(key, root))
    except featcli.FeatcliError as error:
        print(error, file=sys.stderr)
        return np.full((*dump.plan.settings.input_size, 3), 128.0)
    pixels = pixels.float()
    if pixels.max() <= 1:  # its processor scales by itself
        pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-12)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def sheet(dump, found, low, high, root=None):
    """Draw each image of {key: scores} beside itself under its heat, and the scale below."""
    pairs = [(seen(dump, key, root), key, scores) for key, scores in found.items()]
    edge = max(max(picture.shape) for picture, _, _ in pairs)
    columns = math.ceil(len(pairs) ** 0.5 / 1.5)
    width, height = 2 * edge + 3 * GAP, edge + GAP + LINE
    rows = math.ceil(len(pairs) / columns)
    drawn = Image.new("RGB", (columns * width + GAP, rows * height + 3 * LINE + GAP), "white")
    draw = ImageDraw.Draw(drawn)
    for number, (picture, key, scores) in enumerate(pairs):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        draw.text((left, top), f"{scores.max():.3g}  {key}".encode("ascii", "backslashreplace").decode(), "black")
        for place, pixels in enumerate((picture, overlay(picture, scores, low, high))):
            tile = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
            drawn.paste(tile, (left + place * (edge + GAP), top + LINE))
    ramp = torch.linspace(low, high, 2 * edge).expand(2, -1)
    bar = overlay(np.full((LINE, 2 * edge, 3), 128.0), ramp, low, high)
    top = GAP + rows * height
    drawn.paste(Image.fromarray(bar.round().astype(np.uint8)), (GAP, top))
    draw.text((GAP, top + LINE + 2), f"{low:.3g}, the highest of the normal images", "black")
    draw.text((GAP + 2 * edge, top + LINE + 2), f"{high:.3g}", "black", anchor="ra")
    return drawn


def main(arguments=None):
    """Read the command line, compare the dumps, print, and draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", help="the dump of normal images")
    parser.add_argument("tested", help="the dump of images to be tested, extracted with the same options")
    parser.add_argument("--stages", default="stage2,stage3", help="default: %(default)s")
    parser.add_argument("--bank", type=int, default=1000, help="vectors that are kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--output", help="draw the tested images with the highest scores on this sheet, as PNG")
    parser.add_argument("--num-images", type=int, default=6, help="on the sheet (default: %(default)s)")
    parser.add_argument("--root", help="folder of the tested images (default: where extract found them)")
    chosen = parser.parse_args(arguments)
    for name in ("bank", "num_images"):
        if vars(chosen)[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {vars(chosen)[name]}: must be at least 1")
    if chosen.output and not Path(chosen.output).absolute().parent.is_dir():
        parser.error(f"--output {chosen.output}: no such folder")
    stages = chosen.stages.split(",")
    try:
        normal, tested = featcli.open_dump(chosen.normal), featcli.open_dump(chosen.tested)
        found, low = anomaly_maps(normal, tested, stages, chosen.bank, chosen.seed)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    for key, scores in found.items():
        row, column = divmod(int(scores.argmax()), scores.shape[1])
        print(f"{scores.max():.4g}  {key!r}  at row {row}, column {column} of {scores.shape[0]}x{scores.shape[1]}")
    if chosen.output and found:
        high = float(next(iter(found.values())).max())
        first = dict(list(found.items())[: chosen.num_images])
        sheet(tested, first, min(low, high), high, chosen.root).save(chosen.output, "PNG")


if __name__ == "__main__":
    main()
