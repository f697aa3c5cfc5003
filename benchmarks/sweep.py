"""Every architecture of timm through `inspect`: `make sweep`. Writes featcli/models.csv and docs/sweep.md.

What is done is kept in build/sweep.jsonl, so that a sweep that was stopped goes on; `make clean` forgets it.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DONE = REPOSITORY / "build" / "sweep.jsonl"


def timm_architecture(name: str) -> dict:
    """What `inspect` says of an architecture, and what half of it costs; or the exception."""
    from featcli.backbones import Request, resolve

    began = time.perf_counter()
    try:
        source = resolve(Request(name, random_init=True))
        stages = source.stages
        found = {
            "parameters": source.num_parameters,
            "input": [source.channels, *source.input_size],
            "strides": [max(stage.stride) for stage in stages],
            "channels": [stage.channels for stage in stages],
            "shapes": [stage.shape for stage in stages],
            "names": [stage.name for stage in stages],
            "middle_share": source.share([(len(stages) - 1) // 2]),
            "class_token": source.build([0], "meta").class_tokens is not None,
        }
    except Exception as error:  # whatever it is, the table names it
        found = {"exception": f"{type(error).__name__}: {error}"}
    return {"library": "timm", "name": name, **found, "seconds": round(time.perf_counter() - began, 2)}


def run(workers: int) -> None:
    """Sweep what is not done yet."""
    from featcli.backbones.torchvision_operators import declare_missing_operators

    declare_missing_operators()
    import timm

    DONE.parent.mkdir(exist_ok=True)
    done = {json.loads(line)["name"] for line in DONE.read_text().splitlines()} if DONE.exists() else set()
    left = [name for name in timm.list_models() if name not in done]
    with DONE.open("a") as out, ProcessPoolExecutor(workers) as pool:
        for number, facts in enumerate(pool.map(timm_architecture, left), 1):
            out.write(json.dumps(facts) + "\n")
            out.flush()
            print(f"{number}/{len(left)} {facts['name']} {facts.get('exception', '')}", file=sys.stderr)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
