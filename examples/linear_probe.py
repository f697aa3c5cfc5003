"""Train a linear classifier on the feature maps of a dump, and say how many unseen images it gets right.

    featcli extract photos -c resnet50 --out-features embedding -o feats
    python examples/linear_probe.py feats

The class of an image is the first folder inside its input, such as `cats` of `photos/cats/old/tom.jpg`. Images above
all folders are left out. Folders named train, val or test are no classes: extract what is in them. Whole maps are
averaged while they are read. A quarter of each class is held out. The script prints the accuracy on those images, with
that of chance and of always naming the most frequent class. It needs scikit-learn: the extra `examples`.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featcli

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class Probe(NamedTuple):
    """The result: three shares of the held-out images, and how many images were used for training and for the test."""

    accuracy: float
    chance: float
    most_frequent: float
    learned: int
    held_out: int


def chosen_to_hold_out(labels, share, seed):
    """Return (N,) bool: that share of each class, at least one image, but never its only one."""
    order, held_out = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for name in np.unique(labels):
        rows = order.permutation(np.flatnonzero(labels == name))
        held_out[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return held_out


def probe(features, labels, share=0.25, seed=0):
    """Learn from some of the (N, C) features with their N labels, and test on the others. Raises UsageError."""
    labels = np.asarray(labels)
    names, held_out = np.unique(labels), chosen_to_hold_out(labels, share, seed)
    if len(names) < 2 or not held_out.any():
        found = ", ".join(map(repr, names.tolist())) or "none"
        raise featcli.UsageError(
            f"two classes with two images each are needed at the least, not {found}", "use a folder for each class"
        )
    if {name.lower() for name in names} <= SPLITS:
        raise featcli.UsageError(
            f"{', '.join(map(repr, names.tolist()))} are splits, not classes",
            "extract photos/train photos/val, not photos",
        )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features[~held_out], labels[~held_out])
    found, counts = np.unique(labels[~held_out], return_counts=True)
    return Probe(
        accuracy=float(classifier.score(features[held_out], labels[held_out])),
        chance=1 / len(names),
        most_frequent=float((labels[held_out] == found[counts.argmax()]).mean()),
        learned=int((~held_out).sum()),
        held_out=int(held_out.sum()),
    )


def main(arguments=None):
    """Read the command line, probe, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="the folder that extract -o made")
    parser.add_argument("--stage", help="or another output; default: the embedding, or the last output of the dump")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those images (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.held_out < 1:
        parser.error(f"--held-out {chosen.held_out}: a share between 0 and 1")
    try:
        dump = featcli.open_dump(chosen.dump)
        stage = chosen.stage or ("embedding" if "embedding" in dump else list(dump.outputs)[-1])
        features, rows = dump.pooled(stage)  # only a few maps are in memory at a time
        labels = np.array([dump.labels[row] for row in rows])
        result = probe(features[labels != ""], labels[labels != ""], chosen.held_out, chosen.seed)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    print(f"{stage}: learned from {result.learned:,} images, {result.held_out:,} held out")
    print(f"accuracy       {result.accuracy:.3f}")
    print(f"chance         {result.chance:.3f}")
    print(f"most frequent  {result.most_frequent:.3f}")


if __name__ == "__main__":
    main()
