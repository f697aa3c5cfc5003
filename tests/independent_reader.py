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


FITS = {
    "bool": lambda cell: isinstance(cell, bool),
    "int": lambda cell: type(cell) is int and -(2**63) <= cell < 2**63,
    "float": lambda cell: type(cell) in (int, float) or cell in ("inf", "-inf"),
    "text": lambda cell: isinstance(cell, str),
    "json": lambda cell: True,
}


def read_columns(folder):
    """Return {column: list of cells in row order}, numbers with infinity, None where one is missing; and the kinds."""
    plan, raw = read_json(Path(folder) / "plan.json"), (Path(folder) / "columns.jsonl").read_bytes()
    columns = plan["columns"]
    assert xxhash.xxh3_128_hexdigest(raw) == columns["digest"]
    rows = [json.loads(line) for line in raw.decode("ascii").splitlines()]
    assert len(rows) == plan["num_images"]
    found = {name: [] for name in columns["kinds"]}
    for row in rows:
        assert list(row) == list(found)
        for name, cell in row.items():
            kind = columns["kinds"][name]
            assert cell is None or FITS[kind](cell)
            found[name].append(float(cell) if kind == "float" and cell is not None else cell)
    return found, columns["kinds"]


def read_labels(folder):
    """Return the label of each row, None for none."""
    plan = read_json(Path(folder) / "plan.json")
    if "columns" in plan:
        columns, _ = read_columns(folder)
        return columns.get("label", [None] * plan["num_images"])
    provenance, found = plan["provenance"], []
    leads, level = provenance["leads"], provenance.get("label_level", 1)
    keys = [json.loads(line)["key"] for line in (Path(folder) / "images.jsonl").read_text("ascii").splitlines()]
    for key in keys:
        mine = [lead for lead in leads if key.startswith(lead + "/")]
        lead = max(mine, key=lambda lead: lead.count("/"), default="")
        folders = key.removeprefix(lead + "/" if lead else "").split("/")[:-1]
        found.append((lead, folders[level - 1] if len(folders) >= level else None))
    if level == 1 and all(label is None for _, label in found):
        return [lead if leads.get(lead, "tar") != "tar" else None for lead, _ in found]
    return [label for _, label in found]
