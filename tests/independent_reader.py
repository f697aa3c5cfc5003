"""Read dumps by docs/format.md alone: this file imports nothing of featcli."""

import json
import math
from pathlib import Path

import h5py
import numpy as np
import xxhash

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


def read_json(path):
    content = json.loads(path.read_bytes())
    checksum = content.pop("checksum")
    assert checksum == xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode("ascii"))
    return content


def read_shard(path):
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            keys = [name.decode("utf-8", "surrogateescape") for name in file["keys"][:]]
            return keys, {name: file[name][:] for name in file if name != "keys"}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, arrays = json.loads(raw[8:start]), {}
    metadata = header.pop("__metadata__")
    for name, entry in header.items():
        values = np.frombuffer(raw, TYPES[entry["dtype"]], math.prod(entry["shape"]), start + entry["data_offsets"][0])
        arrays[name] = values.reshape(entry["shape"])
    return json.loads(metadata["keys"]), arrays


def read_dump(folder):
    """Return {stage: {key: array}} of the images that were read. Every hash is checked."""
    manifest, maps = read_json(Path(folder) / "manifest.json"), {}
    for record in manifest["shards"]:
        keys, arrays = read_shard(Path(folder) / "shards" / record["file"])
        for output in manifest["outputs"]:
            rows = arrays[output["name"]]
            assert xxhash.xxh3_128_hexdigest(np.ascontiguousarray(rows)) == record["hashes"][output["name"]]
            good = zip(keys, rows, arrays["valid"], strict=True)
            maps.setdefault(output["name"], {}).update({key: row for key, row, valid in good if valid})
    return maps
