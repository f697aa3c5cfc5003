"""Train a UperNet with featcli's module as backbone, and one with the backbone of transformers: the losses are equal.

    python examples/train_upernet.py sample_images/nature --demo
    python examples/train_upernet.py photos openmmlab/upernet-swin-tiny

With `--demo` the UperNet is a small one of random weights, which needs no download. It learns how bright each place of
a picture is, in four classes, so any folder of pictures will do. The script needs transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import featcli
from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # helps if torch is CPU-only; elsewhere it does nothing

CLASSES = 4


def make_demo(folder):
    """Save a small UperNet of random weights with its image processor."""
    import transformers

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    config = transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(**sizes, out_features=stages),
        hidden_size=16,
        auxiliary_channels=8,
        auxiliary_in_channels=64,
        num_labels=CLASSES,
    )
    transformers.UperNetForSemanticSegmentation(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def upernets(checkpoint):
    """Return transformers' own model, the same with featcli's module in it, and the backbone for its preprocessing."""
    import transformers

    read = transformers.UperNetForSemanticSegmentation.from_pretrained
    how = {"num_labels": CLASSES, "ignore_mismatched_sizes": True}  # gives a new head if it had other classes
    torch.manual_seed(0)
    own = read(checkpoint, **how)
    torch.manual_seed(0)
    ours = read(checkpoint, **how)
    backbone = featcli.load_backbone(checkpoint)
    ours.backbone = backbone.as_module()  # a network of its own, so the frozen one stays as it is
    return own, ours, backbone


def train(model, pixels, labels, steps):
    """Return the losses of so many steps of AdamW over all pictures at once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # for random dropout
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses(checkpoint, pictures, steps=20):
    """Return the losses with transformers' backbone, and with featcli's."""
    import transformers

    own, ours, backbone = upernets(checkpoint)
    found = backbone.preprocess(pictures)
    levels = torch.linspace(0, 255, CLASSES + 1)[1:-1]
    labels = torch.bucketize(found.float().mean(1), levels)
    pixels = backbone.preprocessing.normalize(found)
    transformers.logging.set_verbosity_error()
    return train(own, pixels, labels, steps), train(ours, pixels, labels, steps)


def main(arguments=None):
    """Read the command line, train both, and print the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="a folder of pictures, of which the first eight are taken")
    parser.add_argument("checkpoint", nargs="?", help="a UperNet: folder or hub id")
    parser.add_argument("--demo", action="store_true", help="a small UperNet of random weights")
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args(arguments)
    if chosen.demo == (chosen.checkpoint is not None):
        parser.error("name a checkpoint, or ask for --demo")
    pictures = sorted(path for path in Path(chosen.pictures).glob("*") if path.is_file())[:8]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if chosen.demo:
                make_demo(folder)
            own, ours = losses(folder if chosen.demo else chosen.checkpoint, pictures, chosen.steps)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    for step, (one, other) in enumerate(zip(own, ours, strict=True)):
        print(f"step {step:2}  {one:.6f}  {other:.6f}")
    print(f"the losses differ by {max(abs(one - other) for one, other in zip(own, ours, strict=True)):.2g} at the most")


if __name__ == "__main__":
    main()
