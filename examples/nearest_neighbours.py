"""Find the images of a dump that are most like one of them, by the cosine similarity of their averaged feature maps.

    featcli extract photos -c resnet50 --out-features embedding -o feats
    python examples/nearest_neighbours.py feats cats/tom.jpg

Whole maps are averaged while they are read. The script prints the keys of the nearest images, the most similar first,
each with its similarity. A similarity of 1 means that both averages have the same direction. It needs scikit-learn: the
extra `examples`.
"""

from __future__ import annotations

import argparse

from sklearn.neighbors import NearestNeighbors

import featcli


def nearest(features, keys, key, count=5):
    """Return the `count` images most like the one with that key, as (key, similarity), without itself.

    Raises UsageError.
    """
    if key not in keys:
        raise featcli.UsageError(
            f"no map of {key!r} in this dump", "it failed, or a key is the path below the folder that was extracted"
        )
    row = keys.index(key)
    index = NearestNeighbors(n_neighbors=min(count + 1, len(keys)), metric="cosine").fit(features)
    distances, rows = index.kneighbors(features[row : row + 1])
    found = [(keys[other], 1 - distance) for distance, other in zip(distances[0], rows[0], strict=True) if other != row]
    return found[:count]


def main(arguments=None):
    """Read the command line, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", help="the folder that extract -o made")
    parser.add_argument("key", help="of the image to start from: its path below the folder that was extracted")
    parser.add_argument("--stage", help="or another output; default: the embedding, or the last output of the dump")
    parser.add_argument("-k", "--count", type=int, default=5, help="how many (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.count < 1:
        parser.error(f"--count {chosen.count}: must be at least 1")
    try:
        dump = featcli.open_dump(chosen.dump)
        features, rows = dump.pooled(
            chosen.stage or ("embedding" if "embedding" in dump else list(dump.outputs)[-1])
        )  # only a few maps are in memory at a time
        found = nearest(features, [dump.keys[row] for row in rows], chosen.key, chosen.count)
    except featcli.FeatcliError as error:
        parser.error(str(error))
    for key, similarity in found:
        print(f"{similarity:.4f}  {key!r}")


if __name__ == "__main__":
    main()
