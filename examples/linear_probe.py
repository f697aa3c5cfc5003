"""Train a linear classifier on the feature maps of a dump, and say how many unseen images it gets right.

    featcli extract photos -c resnet50 --out-features embedding -o feats
    python examples/linear_probe.py feats

    featcli extract --table train.csv --path-format 'train/{id}.jpg' -c resnet50 --out-features embedding -o dogs
    python examples/linear_probe.py dogs --label breed --train split=train --test split=val

The class of an image is the first folder inside its input, such as `cats` of `photos/cats/old/tom.jpg`, or its cell in
the column `label` of a table, or in another column by --label. Images without a class are left out. Folders named
train, val or test are no classes: extract what is in them. Whole maps are averaged while they are read. A quarter of
each class is held out, or the images that --test names. The script prints the accuracy on those images, with that of
chance and of always naming the most frequent class. It needs scikit-learn: the extra `examples`.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import featcli

NAMED = 8  # values that a message names
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


def rows_where(dump, conditions):
    """Return the rows that fit texts such as `split=val`; of one column any of them. Raises UsageError."""
    wanted = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise featcli.UsageError(f"{condition!r} is no condition", "write COLUMN=VALUE, such as split=val")
        wanted.setdefault(column, []).append(dump.columns.parsed(column, value))
    rows = dump.where(**wanted)
    if not len(rows):
        there = ", ".join(map(str, dump.columns.classes_of(column)[:NAMED]))
        raise featcli.UsageError(f"no image has {' and '.join(conditions)}", f"there are {there}")
    return rows


def probe(features, labels, held_out):
    """Learn from the (N, C) features with their N labels, and test on those that are held out. Raises UsageError."""
    labels = np.asarray(labels)
    names = np.unique(labels)
    if len(names) < 2 or not held_out.any() or len(np.unique(labels[~held_out])) < 2:
        found = ", ".join(map(repr, names[:NAMED].tolist())) + (", ..." if len(names) > NAMED else "") or "none"
        raise featcli.UsageError(
            f"two classes with two images each are needed at the least, not {found}",
            "use a folder for each class, or --label",
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


def chosen_images(dump, features, rows, chosen):
    """Return features and labels of the rows that take part, and (N,) bool: which are held out. Raises UsageError."""
    column, there = chosen.label or "label", ", ".join(dump.columns)
    if column not in dump.columns and (chosen.label or there):
        hint = f"choose one with --label: {there}" if there else "leave --label out, or extract the images of a --table"
        raise featcli.UsageError(f"there is no column {column!r}", hint)
    labels = np.array(dump.columns[chosen.label] if chosen.label else dump.labels, object)[rows]
    takes_part = np.array([label not in ("", None) and label == label for label in labels])  # NaN differs from itself
    tested = np.isin(rows, rows_where(dump, chosen.test)) if chosen.test else np.zeros(len(rows), bool)
    if chosen.train:
        learned = np.isin(rows, rows_where(dump, chosen.train))
        if (learned & tested).any():
            raise featcli.UsageError("some images are in both --train and --test", "name others")
        takes_part &= learned | tested
    features, labels, tested = (
        features[takes_part],
        np.array([str(label) for label in labels[takes_part]]),
        tested[takes_part],
    )
    return features, labels, tested if chosen.test else chosen_to_hold_out(labels, chosen.held_out, chosen.seed)


def main(arguments=None):
    """Read the command line, probe, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="the folder that extract -o made")
    parser.add_argument("--stage", help="or another output; default: the embedding, or the last output of the dump")
    parser.add_argument("--label", metavar="COLUMN", help="the column of classes (default: label, or the folders)")
    parser.add_argument(
        "--train", metavar="COLUMN=VALUE", action="append", help="learn from these images (default: all but the test)"
    )
    parser.add_argument(
        "--test", metavar="COLUMN=VALUE", action="append", help="hold out these images, in place of --held-out"
    )
    parser.add_argument("--held-out", type=float, default=0.25, help="share of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those images (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.held_out < 1:
        parser.error(f"--held-out {chosen.held_out}: a share between 0 and 1")
    try:
        dump = featcli.open_dump(chosen.dump)
        stage = chosen.stage or ("embedding" if "embedding" in dump else list(dump.outputs)[-1])
        features, rows = dump.pooled(stage)  # only a few maps are in memory at a time
        result = probe(*chosen_images(dump, features, rows, chosen))
    except featcli.FeatcliError as error:
        parser.error(str(error))
    print(f"{stage}: learned from {result.learned:,} images, {result.held_out:,} held out")
    print(f"accuracy       {result.accuracy:.3f}")
    print(f"chance         {result.chance:.3f}")
    print(f"most frequent  {result.most_frequent:.3f}")


if __name__ == "__main__":
    main()
