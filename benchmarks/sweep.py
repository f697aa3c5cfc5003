"""Run every architecture of timm through `inspect`, every model type of transformers through `extract`: `make sweep`.

It writes docs/sweep.md and featcli/views/models.csv. Finished work is kept in build/sweep.jsonl, so that a sweep that
was stopped is resumed; `make clean` forgets it.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DONE = REPOSITORY / "build" / "sweep.jsonl"
PAGE = REPOSITORY / "docs" / "sweep.md"
FACTS = REPOSITORY / "featcli" / "views" / "models.csv"
REFUSED = ("dinat", "siglip2_vision_model")  # types that one would expect to work
sys.path.insert(0, str(REPOSITORY / "tests"))  # small configurations, and what transformers itself gives for them


def run(workers: int) -> None:
    """Sweep what is not done yet, then write the page and the table."""
    from featcli.backbones.torchvision_operators import declare_missing_operators

    declare_missing_operators()
    import timm
    from test_hidden_states import TYPES
    from test_vectors import LARGER
    from tiny_transformers import TINY

    tasks = [("timm", name) for name in timm.list_models()]
    tasks += [("transformers", name) for name in sorted({*TINY, *TYPES, *REFUSED})]
    tasks += [("larger", name) for name in LARGER]
    DONE.parent.mkdir(exist_ok=True)
    done = read_done()
    left = [task for task in tasks if task not in done]
    with DONE.open("a") as out, ProcessPoolExecutor(workers) as pool:
        for number, facts in enumerate(pool.map(sweep_one, left), 1):
            out.write(json.dumps(facts) + "\n")
            out.flush()
            print(f"{number}/{len(left)} {facts['name']} {facts.get('exception', '')}", file=sys.stderr)
    done = read_done()
    rows = [done[task] for task in tasks]
    write_facts(rows)
    write_page(rows)


def read_done() -> dict[tuple[str, str], dict]:
    """Return what earlier sweeps found, by library and name."""
    lines = DONE.read_text().splitlines() if DONE.exists() else []
    return {(facts["library"], facts["name"]): facts for facts in map(json.loads, lines)}


def sweep_one(task: tuple[str, str]) -> dict:
    """Return what featcli finds about a model, or the exception that it raises."""
    library, name = task
    began = time.perf_counter()
    try:
        found = {"timm": timm_architecture, "transformers": transformers_type, "larger": larger_type}[library](name)
    except Exception as error:  # the page names whatever it is
        found = {"exception": f"{type(error).__name__}: {error}"}
    return {"library": library, "name": name, **found, "seconds": round(time.perf_counter() - began, 2)}


def timm_architecture(name: str) -> dict:
    """Return what `inspect` says about an architecture, and what the first half of its stages costs.

    For one architecture in each of timm's model files, the maps are compared with timm's.
    """
    import test_timm_parity
    import test_vectors

    from featcli.backbones.checkpoint import resolve
    from featcli.spec.groups import CheckpointSpec

    facts = facts_of(resolve(CheckpointSpec(checkpoint=name, random_init=True)))
    if name in test_timm_parity.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            facts["differences"] = test_timm_parity.differences(name, Path(scratch))
    if name in smallest_of_files() and facts["vectors"]:
        facts["of_vectors"] = list(test_vectors.differences_of_timm(name, vectors=tuple(facts["vectors"])).values())
    return facts


@cache
def smallest_of_files() -> set[str]:
    """Name the architecture of each of timm's model files that has the fewest parameters."""
    import timm

    from featcli.views.models import read_facts

    known, files = read_facts()["timm"]["models"], {}
    for name in set(timm.list_models()) & set(known):
        files.setdefault(timm.models.model_entrypoint(name).__module__, []).append((known[name]["parameters"], name))
    return {min(several)[1] for several in files.values()}


def transformers_type(name: str) -> dict:
    """Inspect the type's own configuration; save, extract and compare a small one, stage by stage."""
    import transformers

    from featcli.backbones.checkpoint import resolve
    from featcli.spec.groups import CheckpointSpec

    config = transformers.CONFIG_MAPPING[name]()
    facts = facts_of(resolve(CheckpointSpec(checkpoint=config))) | {"differences": compare_rows(name)}
    return facts | larger_type(name)


def larger_type(name: str) -> dict:
    """Compare the vectors of each class of a type that makes any with what transformers itself gives."""
    import test_vectors

    differences = []
    for kind in test_vectors.kinds_of(name):
        with tempfile.TemporaryDirectory() as scratch:
            test_vectors.save(kind, Path(scratch), model_type=name)
            differences += test_vectors.differences_of_transformers(kind, Path(scratch)).values()
    return {"of_vectors": differences}


def facts_of(model) -> dict:
    """Return shapes and costs, from the meta device."""
    from featcli.backbones.stages import Points

    stages = model.stages
    return {
        "parameters": model.num_parameters,
        "input": [model.channels, *model.input_size],
        "strides": [max(stage.stride) for stage in stages],
        "names": [stage.name for stage in stages],
        "vectors": {vector.name: vector.remark for vector in model.vectors},
        "middle_share": model.share(Points(((len(stages) - 1) // 2,))),
    }


def compare_rows(name: str) -> list[float]:
    """Return for each stage the largest difference from what transformers gives for the same pixels.

    Rows of a dump are compared, and the map of a backbone that is cut after that stage.
    """
    import test_hidden_states
    import test_transformers_types
    import torch

    from featcli import extract, load_backbone, open_dump

    module = test_transformers_types if name in test_transformers_types.TINY else test_hidden_states
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        module.save(name, folder)
        backbone = load_backbone(folder, out_indices="all")
        pictures = sorted(module.SAMPLES.rglob("*.jpg"))[:2]
        pixels = torch.stack([backbone.preprocess(module.upright(path)) for path in pictures])
        expected = module.reference(name, folder, backbone.preprocessing.normalize(pixels))
        extract([str(path) for path in pictures], checkpoint=folder, out_indices="all", output=Path(scratch) / "dump")
        dump = open_dump(Path(scratch) / "dump")
        rows = [torch.from_numpy(dump[stage][:]) for stage in dump.stages]
        cuts = [load_backbone(folder, out_features=[stage])(pixels)[stage] for stage in dump.stages]
    return [
        max((found - maps).abs().max().item() for found in both)
        for *both, maps in zip(rows, cuts, expected, strict=True)
    ]


def write_facts(rows: list[dict]) -> None:
    """Write featcli/views/models.csv, which `featcli models` reads."""
    import timm
    import transformers

    with FACTS.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["library", "name", "parameters", "input", "stages", "strides", "vectors", "tags"])
        for library in (timm, transformers):
            out.writerow([library.__name__, "", "", "", "", "", "", library.__version__])
            for row in rows:
                if row["library"] != library.__name__ or "exception" in row:
                    continue
                names, tags = row["names"], tags_of(row["name"]) if library is timm else []
                out.writerow(
                    [
                        row["library"],
                        row["name"],
                        row["parameters"],
                        "x".join(map(str, row["input"])),
                        names[0] if len(names) == 1 else f"{names[0]}:{names[-1]}",
                        " ".join(map(str, row["strides"])),
                        " ".join(row["vectors"]),
                        " ".join(tags),
                    ]
                )


def tags_of(name: str) -> list[str]:
    """Return timm's tags of trained weights, the default first."""
    import timm

    default = timm.get_pretrained_cfg(name).tag
    tags = [full.partition(".")[2] for full in timm.list_pretrained(name)]
    return sorted(filter(None, tags), key=lambda tag: tag != default)


def write_page(rows: list[dict]) -> None:
    """Write docs/sweep.md."""
    import timm
    import torch
    import transformers

    architectures = [row for row in rows if row["library"] == "timm"]
    types = [row for row in rows if row["library"] == "transformers"]
    good = [row for row in architectures if "exception" not in row]
    compared = [row for row in types if "exception" not in row]
    larger = [row for row in rows if row["library"] == "larger"]
    differences = [difference for row in compared for difference in row["differences"]]
    stages, equal, largest = len(differences), differences.count(0.0), max(differences)
    shares = [row["middle_share"] for row in good]
    maps = [difference for row in good for difference in row.get("differences", ())]
    text = [
        "# The sweep",
        "",
        f"Written by `make sweep` with timm {timm.__version__}, transformers {transformers.__version__} and torch"
        f" {torch.__version__}.",
        "",
        "## timm",
        "",
        f"{len(good)} of {len(architectures)} architectures of `timm.list_models()` can be inspected: their stages,"
        " with names, strides and shapes from a forward pass on the meta device.",
        "",
        *table(("number of stages", "architectures"), tally(len(row["names"]) for row in good)),
        *table(("first and last stage", "architectures"), tally(f"{r['names'][0]}, {r['names'][-1]}" for r in good)),
        *table(("strides", "architectures"), tally(strides_of(row) for row in good)),
        f"Cut after its middle stage, the median architecture computes {statistics.median(shares):.0%} of the whole"
        f" model; {sum(share > 0.97 for share in shares)} save less than 3 %:"
        f" {', '.join(row['name'] for row in good if row['middle_share'] > 0.97) or 'none'}.",
        "",
        f"Of {sum('differences' in row for row in good)} architectures, one in each of timm's model files, every row of"
        " a dump and the map of a backbone that is cut in the middle were compared with what timm itself gives:"
        f" {maps.count(0.0)} of {len(maps)} maps are equal bit for bit, the largest difference is {max(maps):.0e}.",
        "",
        *said_of_vectors(good, "architectures, the smallest of each of timm's model files that has a head"),
        *exceptions(architectures),
        "## transformers",
        "",
        f"{len(compared)} of {len(types)} model types, each with a small configuration and random weights, were saved,"
        f" read by `extract`, and compared with what transformers' own class gives: {equal} of {stages} stages are"
        f" equal bit for bit, the largest difference in the others is {largest:.0e}.",
        "",
        *table(
            ("model type", "stages", "equal", "strides by default", "middle stage computes"),
            [
                (
                    row["name"],
                    len(row["differences"]),
                    row["differences"].count(0.0),
                    strides_of(row),
                    f"{row['middle_share']:.0%}",
                )
                for row in compared
            ],
        ),
        *said_of_vectors([*compared, *larger], "model types, and every class of them that makes a vector"),
        "In a second pass, since the layers run otherwise than for the maps:"
        f" {', '.join(row['name'] for row in compared if any(row['vectors'].values())) or 'none'}.",
        "",
        *exceptions([*types, *larger]),
    ]
    PAGE.write_text("\n".join(text).rstrip() + "\n")


def said_of_vectors(rows: list[dict], what: str) -> list[str]:
    """Say how the vectors of models, and the maps beside them, compare with the library's own."""
    compared = [row for row in rows if "of_vectors" in row]
    found = [difference for row in compared for difference in row["of_vectors"]]
    return [
        f"Of {len(compared)} {what}, the vectors and the maps beside them were compared with what the library itself"
        f" gives: {found.count(0.0)} of {len(found)} are equal bit for bit, the largest difference is"
        f" {max(found, default=0.0):.0e}.",
        "",
    ]


def strides_of(row: dict) -> str:
    """Return the strides, once if they are all equal."""
    return " ".join(map(str, row["strides"][:1] if len(set(row["strides"])) == 1 else row["strides"]))


def tally(values) -> list[tuple[object, int]]:
    """Return how often each value occurs, with rare ones together."""
    counts = Counter(values).most_common()
    rare = sum(count for _, count in counts[12:])
    return counts[:12] + ([("others", rare)] if rare else [])


def table(header: tuple[str, ...], rows) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def exceptions(rows: list[dict]) -> list[str]:
    """Return everything that was refused, by name."""
    failed = [f"- `{row['name']}`: {row['exception']}" for row in rows if "exception" in row]
    return ["Exceptions:", "", *failed, ""] if failed else ["No exceptions.", ""]


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
