"""Run the rest of a MaskFormer or Mask2Former on stored feature maps, and say whether that equals the whole model.

    featcli extract photos -c facebook/maskformer-swin-tiny-ade --image-size 512x512 -o maps
    python examples/maskformer_replay.py facebook/maskformer-swin-tiny-ade maps photos

With `--demo` both steps are done for a small MaskFormer of random weights, which needs no download:

    python examples/maskformer_replay.py maskformer maps sample_images/nature --demo

The script prints for each output of the model whether it is the same bit for bit, or else the largest difference. After
a run on a GPU or in another layout the last digits differ. It needs transformers. docs/replay.md tells more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageOps

import featcli
from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # helps if torch is CPU-only; elsewhere it does nothing

OUTPUTS = ("class_queries_logits", "masks_queries_logits")


def make_demo(folder, pictures, output):
    """Save a small MaskFormer of random weights with its image processor, and dump its maps. Raises UsageError."""
    import transformers

    if Path(folder).exists():
        raise featcli.UsageError(f"{folder} is there already", "name a new folder for the demo")
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(embed_dim=24, depths=[1] * 4, num_heads=[1, 2, 2, 4], out_features=stages)
    layers = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    decoder = transformers.DetrConfig(d_model=32, num_queries=20, **layers)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, **sizes)
    transformers.MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    featcli.extract(pictures, checkpoint=folder, output=output)


def pixels_of(paths, preprocessing):
    """Return the pictures as the model takes them, (B, 3, H, W)."""
    prepared = []
    for path in paths:
        if not path.is_file():
            raise featcli.UsageError(f"{path}: no such picture", "give the folder that was extracted")
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
            prepared.append(torch.from_numpy(preprocessing.fit(upright)))
    return preprocessing.normalize(torch.stack(prepared))


def differences(checkpoint, dump, pictures):
    """Return {output: the largest difference between replay and whole model, or 0.0} over all images of the dump."""
    from transformers import AutoModelForUniversalSegmentation

    model = AutoModelForUniversalSegmentation.from_pretrained(checkpoint).eval()
    seen = dump.preprocessing  # made from its plan
    largest = dict.fromkeys(OUTPUTS, torch.tensor(0.0))
    # The last bits depend on how many images go through the network together, so it is the number of the extraction.
    for run in dump.walk(at_once=dump.plan.settings["batch_size"]):
        with torch.inference_mode():
            whole = model(pixel_values=pixels_of([Path(pictures, key) for key in run.keys], seen))
            again = featcli.replay(model, run.maps, size=seen.size)
        for name in OUTPUTS:
            largest[name] = torch.maximum(largest[name], (whole[name] - again[name]).abs().max())  # NaN stays NaN
    return {name: difference.item() for name, difference in largest.items()}


def main(arguments=None):
    """Read the command line, make the demo if it is asked for, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a MaskFormer or Mask2Former: folder or hub id")
    parser.add_argument("dump", help="the folder that extract -o made")
    parser.add_argument("pictures", help="the folder that was extracted")
    parser.add_argument("--demo", action="store_true", help="make the checkpoint and the dump first")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.demo:
            make_demo(chosen.checkpoint, chosen.pictures, chosen.dump)
        dump = featcli.open_dump(chosen.dump)
        found = differences(chosen.checkpoint, dump, chosen.pictures)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    for name, largest in found.items():
        print(f"{name}  {'the same bit for bit' if largest == 0 else f'differs by {largest:.2g} at the most'}")


if __name__ == "__main__":
    main()
