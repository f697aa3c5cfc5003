"""Measure featcli on a GPU beside what bounds it: decoding, the bare forward pass, a raw write. gpu.sh runs this.

    python benchmarks/gpu.py PICTURES FOLDER [--device cuda] [--models ...] [--images N] [--rounds N] [--seconds N]

Parts run in order of their worth, then all again, for as many rounds as there are seconds. A part that has lately taken
longer than what is left is not begun, and one that fails is a line and not the end. What a part compares runs in turn
within it, so ratios are taken in one round; the table has their medians. featcli is run by its command line alone. Its
pace is that from the first committed shard to the last, as in a long run: the start of processes, and the first batch,
which nothing hides, are left out. `whole` is the pace that the run itself reports, with both.

    decode    Pillow alone, JPEG -> 224x224, on all cores, in threads and in processes; `fast` by simplejpeg and torch
    forward   timm's model alone, in the same precision and batch, on pixels that are on the device
    write     the bytes of the dump's shards written raw and synced
    loader    timm's loader with a worker for each core, and its model, vectors kept and saved

FOLDER gets results.jsonl, a line for each part and round, and table.md. Numbers are images per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from photographs import SMALL, draw
from PIL import Image

MODELS = ("resnet50", "vit_base_patch16_224")
EDGE, RESIZED = 224, 235  # pixels of the input, and of the shorter edge before its middle is cut out
CHUNK = 25  # pictures that a decode process is given at once
LONGEST = 150  # seconds that a command may take
CORES = len(os.sched_getaffinity(0))
SLOWEST = ("forward", "decode", "write")  # of which the slowest bounds a run


# Bounds. This process never imports torch, so that processes that decode can be forked from it.


def pillow(path):
    """Decode a JPEG as `--decode exact` has to, by Pillow alone."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        scale = RESIZED / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - EDGE) // 2, (image.height - EDGE) // 2
        return image.crop((left, top, left + EDGE, top + EDGE)).tobytes()


def fast(path):
    """Decode a JPEG as `--decode fast` has to, by simplejpeg and torch alone."""
    import simplejpeg
    import torch

    torch.set_num_threads(1)
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(path.read_bytes(), "RGB", strict=True)).permute(2, 0, 1)
    scale = RESIZED / min(pixels.shape[1:])
    size = [round(edge * scale) for edge in pixels.shape[1:]]
    resized = torch.nn.functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)
    top, left = ((edge - EDGE) // 2 for edge in size)
    return resized[..., top : top + EDGE, left : left + EDGE].contiguous()


def all_of(decode, paths):
    """Decode some pictures one after another. Returns how many there were."""
    for path in paths:
        decode(path)
    return len(paths)


def paced(pool, decode, paths):
    """Return pictures per second of a pool."""
    parts = [paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK)]
    list(pool.map(all_of, [decode] * CORES, [paths[:2]] * CORES))  # imports, and threads or processes begin
    began = time.perf_counter()
    count = sum(pool.map(all_of, [decode] * len(parts), parts))
    return count / (time.perf_counter() - began)


def written(path, num_bytes, images):
    """Return images per second of a raw write of so many bytes, synced."""
    block = os.urandom(1 << 24)
    os.sync()
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for first in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - first])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return images / seconds


def serve_forward(device):
    """Answer lines `MODEL PRECISION BATCH COUNT` on stdin with images per second of timm's bare forward pass."""
    timm, torch = imported()
    models = {}
    for line in sys.stdin:
        name, precision, batch, count = line.split()
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        if (name, precision) not in models:
            models[name, precision] = ready(timm.create_model(name, num_classes=0), torch, device, dtype)
        model = models[name, precision]
        size = model.pretrained_cfg["input_size"]
        pixels = torch.rand(int(batch), *size, device=device, dtype=dtype)
        pixels = pixels.to(memory_format=layout_of(name, torch))
        rounds = max(1, int(count) // len(pixels))
        with torch.inference_mode():
            for _ in range(2):
                model.forward_features(pixels)
            finish(torch, device)
            began = time.perf_counter()
            for _ in range(rounds):
                model.forward_features(pixels)
            finish(torch, device)
        print(rounds * len(pixels) / (time.perf_counter() - began), flush=True)


def run_loader(name, device, pictures, count, batch, target):
    """Print images per second of timm's loader with a worker for each core, its model, and vectors kept and saved."""
    timm, torch = imported()
    import numpy as np

    folder = Path(target, "loaded")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "x").mkdir(parents=True)
    for path in sorted(Path(pictures).iterdir())[:count]:
        (folder / "x" / path.name).symlink_to(path.resolve())
    dtype = torch.bfloat16
    model = ready(timm.create_model(name, num_classes=0), torch, device, dtype)
    config = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    keep = ("input_size", "interpolation", "mean", "std", "crop_pct")
    on_gpu = device != "cpu"
    began = time.perf_counter()
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder)), batch_size=batch, num_workers=CORES, use_prefetcher=on_gpu,
        **{"img_dtype": dtype, "device": torch.device(device)} if on_gpu else {}, **{one: config[one] for one in keep},
    )  # fmt: skip
    vectors = []
    with torch.inference_mode():
        for pixels, _ in loader:
            ordered = pixels.to(device, dtype).to(memory_format=layout_of(name, torch))
            vectors.append(model(ordered).float().cpu().numpy())
    np.save(folder / "vectors.npy", np.concatenate(vectors))
    print(count / (time.perf_counter() - began), flush=True)


def imported():
    """Import timm, also where torchvision does not fit the build of torch, and torch."""
    from featcli.backbones.torchvision_operators import import_timm

    timm = import_timm()
    import torch

    return timm, torch


def ready(model, torch, device, dtype):
    """Return a model as a good script runs it."""
    model = model.eval().to(device, dtype)
    return model.to(memory_format=layout_of(model.pretrained_cfg["architecture"], torch))


def layout_of(name, torch):
    """Return the layout in which a network is fast: channels last for convolutions."""
    return torch.contiguous_format if "vit" in name else torch.channels_last


def finish(torch, device):
    """Wait for the device."""
    if device != "cpu":
        torch.accelerator.synchronize(device)


# Runs of featcli, and the parts.


@dataclass
class Bench:
    """All that parts need. Each `part_...` returns (images/s by way, other facts)."""

    chosen: argparse.Namespace
    began: float = field(default_factory=time.monotonic)
    rounds: dict = field(default_factory=lambda: defaultdict(list))  # part -> [images/s by way]
    took: dict = field(default_factory=dict)  # part -> seconds of its last round

    def __post_init__(self):
        self.pool = ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("fork"))
        with suppress(Exception):
            list(self.pool.map(int, range(CORES)))  # all are forked now
        self.paths = sorted(self.chosen.pictures.iterdir())[: self.chosen.images]
        self.names, self.dump = self.chosen.folder / "names", self.chosen.folder / "dump"
        self.names.write_text("".join(f"{path.name}\n" for path in self.paths))
        self.given = ("--files-from", self.names, "--root", self.chosen.pictures)

    @cached_property
    def one_device(self):
        """The device by number, as a list of several names it."""
        return "cuda:0" if self.chosen.device == "cuda" else self.chosen.device

    @property
    def left(self):
        """Seconds that are left."""
        return self.chosen.seconds - (time.monotonic() - self.began)

    @cached_property
    def forward_server(self):
        """The process that measures the bare forward pass."""
        command = [sys.executable, __file__, "forward", self.chosen.device]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as featcli sets it for itself
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def forward(self, model, precision):
        """Return images per second of the bare forward pass."""
        self.forward_server.stdin.write(f"{model} {precision} {self.chosen.batch} {self.chosen.forward_images}\n")
        self.forward_server.stdin.flush()
        if not (answer := self.forward_server.stdout.readline()):
            del self.forward_server  # another one is started next time
            raise RuntimeError(f"the bare forward pass of {model} ended; errors are in the log")
        return float(answer)

    def decode(self, way, decode=pillow):
        """Return pictures per second of decoding alone."""
        if way == "processes":
            return paced(self.pool, decode, self.paths)
        with ThreadPoolExecutor(CORES) as pool:
            return paced(pool, decode, self.paths)

    def command(self, *words):
        """Return what a command printed, each line with its time. Raises RuntimeError if it failed or was ended."""
        if self.left <= 0:
            raise TimeoutError("no seconds are left")
        with open(self.chosen.folder / "errors.log", "w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            seconds = min(LONGEST, self.left + 10)
            limit = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))  # with all that it started
            limit.daemon = True
            limit.start()
            lines = [(time.perf_counter(), line) for line in process.stdout]
            code = process.wait()
            limit.cancel()
            errors.seek(0)
            if code:
                raise RuntimeError(f"exit code {code}: {' '.join(map(str, words[:4]))}: {errors.read().strip()[-300:]}")
        return lines

    def featcli(self, model, *options, shard=0):
        """Run `featcli extract`. Returns (images per second, facts), as the module says."""
        shutil.rmtree(self.dump, ignore_errors=True)
        batch = self.chosen.batch
        own = {"--precision": "bf16", "--batch-size": batch, "--device": self.one_device}
        own |= {} if "vit" in model or "--layout" in options else {"--layout": "channels-last", "--fold": None}
        own["--shard-size"] = shard or max(batch, len(self.paths) // 12 // batch * batch)
        asked = [
            word for name, value in own.items() if name not in options for word in (name, value) if word is not None
        ]
        words = ("-m", "featcli", "extract", *self.given, "-o", self.dump, "-c", model, "--random-init", "--json", "-q")
        events = [(when, json.loads(line)) for when, line in self.command(*words, *asked, *options)]
        shards = [(when, event["rows"]) for when, event in events if event["type"] == "shard"]
        end = events[-1][1]
        facts = {"whole": round(end["extracted"] / end["pace"]["seconds"], 1), "pace": end["pace"]}
        rate = facts["whole"]
        if len(shards) > 1:
            rate = sum(rows for _, rows in shards[1:]) / (shards[-1][0] - shards[0][0])
        return rate, facts

    def part_decode(self):
        """Decode alone, without featcli."""
        rates = {f"Pillow, {way}": self.decode(way) for way in ("processes", "threads")}
        facts = {}
        try:
            rates |= {f"fast, {way}": self.decode(way, fast) for way in ("processes", "threads")}
        except ImportError as error:  # simplejpeg is an extra
            facts["error, fast"] = repr(error)
        return rates, facts | {f"{way} / Pillow": rate / rates["Pillow, processes"] for way, rate in rates.items()}

    def part_run(self, model, stored, precision="bf16"):
        """Run featcli beside the three that bound it."""
        options = ["--pool", "avg"] if stored == "vectors" else []
        options += ["--precision", precision]
        rates, facts = {}, {}
        rates["forward"] = self.forward(model, precision)
        rates["decode"] = self.decode("processes")
        rates["featcli"], facts["featcli"] = self.featcli(model, *options, "--decode-processes", "0")
        num_bytes = sum(path.stat().st_size for path in (self.dump / "shards").iterdir())
        rates["write"] = written(self.chosen.folder / "raw", num_bytes, len(self.paths))
        more = str(max(2, CORES // 8))
        rates["in processes"], facts["in processes"] = self.featcli(model, *options, "--decode-processes", more)
        slowest = min(SLOWEST, key=rates.get)
        best = max(rates["featcli"], rates["in processes"])
        facts |= {f"/ {way}": rates["featcli"] / rates[way] for way in SLOWEST}
        whole_run = max(facts[way]["whole"] for way in ("featcli", "in processes"))
        ratios = {"best / slowest": best / rates[slowest], "whole run / slowest": whole_run / rates[slowest]}
        return rates, {**facts, "slowest": slowest, **ratios}

    def part_choices(self, model):
        """Workers on one device, levels of decoding, compilation, and what featcli chooses by itself."""
        one = self.one_device
        ways = {
            "one worker": [],
            "two workers": ["--device", f"{one},{one}"],
            "four workers": ["--device", ",".join([one] * 4)],
            "decode fast": ["--decode", "fast"],
            "decode fast, in processes": ["--decode", "fast", "--decode-processes", str(max(2, CORES // 8))],
            "compiled": ["--compile"],
            "all automatic": [*"--precision auto --batch-size auto --layout auto --device".split(), self.chosen.device],
        }
        rates, facts = {}, {}
        for name, options in ways.items():
            try:
                rates[name], facts[name] = self.featcli(model, "--pool", "avg", *options, shard=self.chosen.batch)
            except Exception as error:  # compilation needs a compiler, and fast needs simplejpeg
                facts[f"error, {name}"] = repr(error)[-300:]
        return rates, facts | {f"{name} / one": rate / rates["one worker"] for name, rate in rates.items()}

    def part_loader(self, model):
        """Run timm's loader and model in a process of their own, and featcli."""
        counts = (len(self.paths), self.chosen.batch)
        words = ("loader", model, self.chosen.device, self.chosen.pictures, *counts, self.chosen.folder)
        rates = {"loader": float(self.command(__file__, *words)[-1][1])}
        _, facts = self.featcli(model, "--pool", "avg")
        rates["featcli"] = facts["whole"]  # the loader's start counts, too
        return rates, {"featcli": facts, "featcli / loader": rates["featcli"] / rates["loader"]}

    def part_recompute(self, model):
        """Extract some pictures of a dump again, on this device and on the CPU."""
        self.featcli(model, "--pool", "avg")
        words = ("-m", "featcli", "verify", self.dump, *self.given, "--recompute", 16, "--device")
        return {}, {"said": {one: self.command(*words, one)[-1][1].strip() for one in (self.chosen.device, "cpu")}}

    def parts(self):
        """Return every part by name, in order of worth."""
        models = self.chosen.models
        found = {"decode alone": self.part_decode}
        for stored in ("vectors", "maps"):
            for model in models:
                found[f"{model}, {stored}"] = lambda model=model, stored=stored: self.part_run(model, stored)
        found["choices"] = lambda: self.part_choices(models[0])
        found["loader"] = lambda: self.part_loader(models[0])
        found["recompute"] = lambda: self.part_recompute(models[0])
        found[f"{models[0]}, vectors, fp32"] = lambda: self.part_run(models[0], "vectors", "fp32")
        return found

    def run(self):
        """Run all parts, for as many rounds as there are seconds."""
        with open(self.chosen.folder / "results.jsonl", "a") as results:
            for number in range(1, self.chosen.rounds + 1):
                for name, part in self.parts().items():
                    if self.left < self.took.get(name, 5):
                        continue
                    began = time.monotonic()
                    line = {"round": number, "part": name}
                    try:
                        rates, facts = part()
                        line |= {"images/s": {way: round(rate, 1) for way, rate in rates.items()}, **facts}
                        self.rounds[name].append(line)
                    except Exception as error:
                        line["error"] = repr(error)[-400:]
                    self.took[name] = time.monotonic() - began
                    results.write(json.dumps({**line, "seconds": round(self.took[name])}) + "\n")
                    results.flush()
                    (self.chosen.folder / "table.md").write_text(self.table())
                    print(
                        f"{time.monotonic() - self.began:.0f} s: {name}, round {number}",
                        line.get("error", ""),
                        flush=True,
                    )
        shutil.rmtree(self.dump, ignore_errors=True)

    def median(self, name, value):
        """Return the median over the rounds of what `value` takes from a line; - if no round has it."""
        found = []
        for line in self.rounds[name]:
            with suppress(KeyError):
                found.append(value(line))
        return statistics.median(found) if found else None

    def table(self):
        """Return the tables of docs/speed.md."""
        batch = self.chosen.batch
        lines = [f"{len(self.paths):,} JPEGs, batches of {batch}, {CORES} cores, images/s; medians of the rounds", ""]
        ways, ratios = (*SLOWEST, "featcli", "in processes"), ("best / slowest", "whole run / slowest")
        head = ["", "rounds", *ways, *ratios]
        lines += [row(*head), "|---" * len(head) + "|"]
        for name in (name for name in self.parts() if ", " in name):
            rates = [self.median(name, lambda line, way=way: line["images/s"][way]) for way in ways]
            found = [self.median(name, lambda line, ratio=ratio: line[ratio]) for ratio in ratios]
            lines.append(row(name, len(self.rounds[name]), *map(whole, rates), *map(share, found)))
        lines += ["", "| | rounds | images/s | ratio |", "|---|---|---|---|"]
        for name, of_ratio in (("decode alone", " / Pillow"), ("choices", " / one"), ("loader", "featcli / loader")):
            ways = dict.fromkeys(way for line in self.rounds[name] for way in line["images/s"])
            for way in ways:
                rate = self.median(name, lambda line, way=way: line["images/s"][way])
                key = f"{way}{of_ratio}" if of_ratio.startswith(" ") else of_ratio
                ratio = self.median(name, lambda line, key=key: line[key])
                lines.append(row(f"{name}: {way}", len(self.rounds[name]), whole(rate), share(ratio)))
        said = [text for line in self.rounds["recompute"] for text in line["said"].items()]
        return "\n".join([*lines, "", *(f"recompute on {device}: {text}" for device, text in said)]) + "\n"


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def whole(rate):
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def share(ratio):
    return "-" if ratio is None else f"{ratio:.2f}"


def main():
    if sys.argv[1:2] == ["forward"]:
        return serve_forward(sys.argv[2])
    if sys.argv[1:2] == ["loader"]:
        name, device, pictures, count, batch, target = sys.argv[2:]
        return run_loader(name, device, pictures, int(count), int(batch), target)
    if sys.argv[1:2] == ["draw"]:
        draw(Path(sys.argv[2]), int(sys.argv[3]), SMALL, CORES)
        return None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--forward-images", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300)
    Bench(parser.parse_args()).run()
    return None


if __name__ == "__main__":
    main()
