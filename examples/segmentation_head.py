"""Train a 1x1 convolution on stored feature maps to say what each pixel shows, and measure it on held-out images.

    featcli extract photos -c resnet50 --out-features stage3 --fit squash -o feats
    python examples/segmentation_head.py feats masks

The mask of `cats/tom.jpg` is `masks/cats/tom.png`. It has one channel of 8 bits, whose values are the classes, and 255
for pixels without class. Images without a mask are left out. Masks are resized to the network's input without regard to
proportions, so the dump must be one of `--fit squash`, and masks must be upright as the picture is after its EXIF
orientation. A quarter of the images is held out. The script prints the mean IoU on them, over the classes that occur,
with that of predicting the most frequent class everywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

import featcli

NO_CLASS = 255


def masks_of(dump, folder):
    """Return {key: (H, W) uint8} for the images that have a mask with at least one pixel of a class.

    Raises UsageError.
    """
    masks, (height, width) = {}, dump.plan.settings["backbone"]["input_size"]
    for key in (dump.keys[row] for row in dump.valid.nonzero()[0]):
        path = Path(folder, key).with_suffix(".png")
        if path.is_file():
            with Image.open(path) as picture:
                if picture.mode not in ("1", "L", "P"):
                    raise featcli.UsageError(f"{path}: a mask of mode {picture.mode}", "make it one channel of 8 bits")
                mask = np.array(picture.resize((width, height), Image.Resampling.NEAREST), np.uint8)
            if (mask != NO_CLASS).any():
                masks[key] = torch.from_numpy(mask)
    if len(masks) < 2:
        raise featcli.UsageError(f"{folder}: masks for {len(masks)} images", "two at the least, PNG files named by key")
    return masks


def batches(dump, stage, masks, keys, shuffle=False):
    """Yield maps (B, C, h, w) and masks (B, H, W) of those keys. The loader reads each batch as a whole."""
    for maps, found in dump.as_torch_dataset(stage, labels=masks, rows=keys).loader(8, shuffle=shuffle):
        yield maps.float(), found.long()


def train(dump, stage, masks, keys, classes, epochs):
    """Return a head (B, C, h, w) -> (B, classes, H, W), trained on the images of those keys."""
    channels, size = dump[stage].shape[1], tuple(next(iter(masks.values())).shape)
    norm, convolution = nn.BatchNorm2d(channels, affine=False), nn.Conv2d(channels, classes, 1)
    head = nn.Sequential(norm, convolution, nn.Upsample(size, mode="bilinear"))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        for maps, targets in batches(dump, stage, masks, keys, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(head(maps), targets, ignore_index=NO_CLASS).backward()
            optimizer.step()
    return head.eval()


@torch.inference_mode()
def mean_iou(predict, dump, stage, masks, keys, classes):
    """Return the mean IoU over the classes in the masks of those keys.

    `predict` is a function (B, C, h, w) -> (B, H, W), or one class.
    """
    pixels = torch.zeros(classes, classes, dtype=torch.float64)  # true class by predicted class
    for maps, targets in batches(dump, stage, masks, keys):
        pairs = (targets * classes + predict(maps))[targets != NO_CLASS]
        pixels += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    right, are = pixels.diagonal(), pixels.sum(1)
    return float((right / (are + pixels.sum(0) - right))[are > 0].mean())


def measure(dump, stage, folder, epochs=20, seed=0):
    """Return the mean IoU of a trained head, and that of the most frequent class, on held-out images.

    Raises UsageError.
    """
    if dump.plan.settings["preprocessing"].get("fit") != "squash":
        raise featcli.UsageError("masks fit only maps of whole pictures", "extract with --fit squash")
    if len(dump[stage].shape) != 4:
        raise featcli.UsageError(f"stage {stage!r} holds no maps", "extract with --pool none")
    torch.manual_seed(seed)
    masks = masks_of(dump, folder)
    keys = [list(masks)[item] for item in torch.randperm(len(masks))]
    held_out, learned = keys[: max(1, len(keys) // 4)], keys[max(1, len(keys) // 4) :]
    counts = sum(torch.bincount(masks[key].flatten(), minlength=256)[:NO_CLASS] for key in learned)
    most_frequent = int(counts.argmax())
    classes = 1 + max(int(mask[mask != NO_CLASS].max()) for mask in masks.values())
    head = train(dump, stage, masks, learned, classes, epochs)
    of_head = mean_iou(lambda maps: head(maps).argmax(1), dump, stage, masks, held_out, classes)
    return of_head, mean_iou(lambda maps: most_frequent, dump, stage, masks, held_out, classes)


def main(arguments=None):
    """Read the command line, train, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="the folder that extract -o made")
    parser.add_argument("masks", help="the folder of masks, named as the images are")
    parser.add_argument("--stage", help="default: the last one of the dump")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the head and what is held out (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        dump = featcli.open_dump(chosen.dump)
        stage = chosen.stage or list(dump.stages)[-1]
        of_head, of_most_frequent = measure(dump, stage, chosen.masks, chosen.epochs, chosen.seed)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    print(f"{stage}: mean IoU on held-out images")
    print(f"head           {of_head:.3f}")
    print(f"most frequent  {of_most_frequent:.3f}")


if __name__ == "__main__":
    main()
