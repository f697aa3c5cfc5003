"""Check that every option has a visible effect, or is refused if other options or the model prevent it.

Whoever adds an option adds here what shows its effect. What an option declares that it needs or excludes is tried
automatically; what only a model can tell is listed at the end.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_colour import rgb_profile
from test_spec import COMMANDS

import featcli
from conftest import draw
from featcli.backbones import backbone as backbones
from featcli.cli.signature import in_order_of_help
from featcli.errors import FeatcliError, MachineError, UsageError
from featcli.extraction import growing, recompute
from featcli.spec.calls import BackboneCall
from featcli.spec.option import options_of
from featcli.workers import ray

OUT = "new"  # begins the names of all that a command writes
NOT = object()  # in place of an option of the base that this case lacks


@dataclass(frozen=True)
class Effect:
    """A command without an option and with it, and the fact in which the two differ."""

    option: str
    value: Any
    shows: str
    besides: Mapping[str, Any] = field(default_factory=dict)  # in both runs, in addition to or in place of the base
    there: str = ""  # is copied to the output's place before


SMALL = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "threads": 1, "batch_size": 1}
BASES: dict[str, dict[str, Any]] = {
    "extract": {"inputs": "photos", **SMALL, "output": OUT, "as_json": True},
    "inspect": {"target": "test_resnet", "as_json": True},
    "models": {},
    "verify": {"dump": "dump", "as_json": True},
    "export": {"dump": "dump", "output": f"{OUT}.h5"},
    "show": {"dump": "dump", "output": f"{OUT}.png", "root": "mixed", "stage": "stage4"},
    "finalize": {"dump": OUT},
}
DRY = {"dry_run": True}
LIST = {"inputs": NOT, "files_from": "list"}
TABLE = {"inputs": NOT, "table": "table.csv"}
VIT = {"checkpoint": "test_vit"}
TWO = {"checkpoint": "two.safetensors", "arch": "test_resnet", "random_init": NOT}
TEXT = {"as_json": NOT}
RAY = {"engine": "ray"}
OLD = {"inputs": "mixed", "out_indices": "1,-1", "shard_size": 1}  # as the dump was made
GROW = OLD | {"inputs": "edited"}
ANEW = {"recompute": 1, "checkpoint": "test_resnet", "random_init": True, "inputs": "mixed"}

EFFECTS = {
    "extract": [
        Effect("inputs", "odd", "choice images", DRY),
        Effect("files_from", "list", "choice images", DRY),
        Effect("null", True, "error", DRY | LIST | {"files_from": "zeros"}),
        Effect("root", "photos", "error", {**LIST, "files_from": "short"}),
        Effect("allow_outside", True, "error", DRY | LIST | {"files_from": "outside", "root": "photos"}),
        Effect("table", "one.csv", "choice images", DRY),
        Effect("path_column", "other", "choice columns", DRY | TABLE),
        Effect("path_format", "photos/{id}.png", "choice columns", DRY | TABLE),
        Effect("key_column", "id", "choice columns", DRY | TABLE),
        Effect("unique", True, "error", DRY | TABLE | {"table": "twice.csv"}),
        Effect("label_level", 2, "error"),
        Effect("follow_links", True, "choice images", DRY),
        Effect("exclude", "*.png", "choice images", DRY),
        Effect("limit", 1, "choice images", DRY),
        Effect("checkpoint", "test_vit", "choice checkpoint", DRY),
        Effect("arch", "test_resnet", "error", {**DRY, "checkpoint": "weights.safetensors", "random_init": NOT}),
        Effect("weights_key", "b", "error", TWO),
        Effect("model_arg", "init_values=0.5", "map a.jpg", VIT),
        Effect("random_init", True, "error", {"random_init": NOT}),
        Effect("seed", 3, "map a.jpg"),
        Effect("num_channels", 1, "map a.jpg"),
        Effect("norm", "model", "map a.jpg", VIT),
        Effect("out_indices", "1", "dry_run stages", DRY),
        Effect("out_features", "stage1", "dry_run stages", DRY),
        Effect("image_size", 64, "dry_run stages", DRY),
        Effect("fit", "pad", "map a.jpg"),
        Effect("processor_backend", "torchvision", "error"),  # of a timm model
        Effect("mean", "0.1,0.2,0.3", "map a.jpg"),
        Effect("std", "0.3", "map a.jpg"),
        Effect("interpolation", "box", "map a.jpg"),
        Effect("crop_pct", "0.5", "map a.jpg"),
        Effect("orientation", "ignore", "map turned.jpg", {"inputs": "odd"}),
        Effect("alpha", "white", "map see-through.png", {"inputs": "odd"}),
        Effect("depth_range", "0:9000", "map deep.png", {"inputs": "odd"}),
        Effect("colour", "convert", "map wide.png", {"inputs": "odd"}),
        Effect("max_pixels", 3000, "map noise.jpg", {"inputs": "odd"}),
        Effect("decode", "fast", "map noise.jpg", {"inputs": "odd"}),
        Effect("decode", "scaled", "map noise.jpg", {"inputs": "odd"}),
        Effect("decode", "scaled", "map several.jpg", {"inputs": "odd"}),  # a JPEG with others after it
        Effect("device", "cpu,cpu", "dry_run workers", DRY),
        Effect("precision", "bf16", "map a.jpg"),
        Effect("layout", "channels-last", "choice layout", DRY),
        Effect("fold", True, "choice layout", DRY),
        Effect("compile", True, "settings.compiled"),
        Effect("batch_size", 2, "choice batch size", DRY),
        Effect("threads", 2, "settings.threads"),
        Effect("decode_threads", 7, "choice threads"),
        Effect("decode_processes", 1, "choice threads"),
        Effect("output", f"{OUT}.other", "written"),
        Effect("pool", "avg", "dry_run stages", DRY),
        Effect("dtype", "float16", "dry_run stages", DRY),
        Effect("format", "safetensors", "written"),
        Effect("shard_size", 1, "dry_run shards", DRY),
        Effect("overwrite", True, "error", there="dump"),
        Effect("extend", True, "error", GROW, there="dump"),
        Effect("check_digests", True, "warning text", GROW | {"extend": True}, there="dump"),
        Effect("retry_failed", True, "end extracted", OLD, there="dump"),
        Effect("retry_failed", True, "dry_run images", OLD | DRY, there="dump"),
        Effect("part", "0/3", "dry_run images", DRY | {"shard_size": 1}),
        Effect("engine", "ray", "choice engine"),
        Effect("ray_address", "127.0.0.1:1", "choice engine", RAY),
        Effect("workers", 2, "choice engine", RAY),
        Effect("cpus_per_worker", 3, "choice engine", RAY),
        Effect("gpus_per_worker", 1, "choice engine", RAY),
        Effect("dry_run", True, "written"),
        Effect("rate", 5, "dry_run seconds", DRY),
        Effect("as_json", True, "stdout", DRY | TEXT),
        Effect("quiet", True, "stderr", DRY),
        Effect("verbose", True, "stderr", DRY),
    ],
    "inspect": [
        Effect("target", "test_vit", "checkpoint name"),
        Effect("arch", "test_resnet", "error", {"target": "weights.safetensors"}),
        Effect("model_arg", "init_values=0.5", "checkpoint parameters", {"target": "test_vit"}),
        Effect("image_size", 64, "checkpoint input_size"),
        Effect("num_channels", 1, "checkpoint num_channels"),
        Effect("norm", "model", "checkpoint norm", {"target": "test_vit"}),
        Effect("dtype", "float16", "checkpoint bytes_per_image"),
        Effect("out_indices", "1", "checkpoint share_computed"),
        Effect("out_features", "stage1", "checkpoint share_computed"),
        Effect("as_json", True, "stdout", TEXT),
    ],
    "models": [
        Effect("pattern", "test_vit", "stdout"),
        Effect("vector", "projection", "stdout"),
        Effect("as_json", True, "stdout", {"pattern": "test_vit"}),
    ],
    "verify": [
        Effect("dump", "damaged", "verdict state"),
        Effect("against", "of_file", "against is_equal"),
        Effect("tolerance", 1, "code", {"against": "other"}),
        Effect("repair", True, "code", {"dump": OUT}, there="damaged"),
        Effect("recompute", 1, "error", ANEW | {"recompute": NOT}),
        Effect("check_inputs", True, "error", {"inputs": "photos"}),
        Effect("inputs", "mixed", "recomputed inputs", ANEW | LIST),
        Effect("files_from", "list", "recomputed files_from", ANEW),
        Effect("null", True, "recomputed null", ANEW | LIST),
        Effect("root", "photos", "recomputed root", ANEW | LIST),
        Effect("allow_outside", True, "recomputed allow_outside", ANEW | LIST),
        Effect("table", "table.csv", "recomputed table", ANEW),
        Effect("path_column", "other", "recomputed path_column", ANEW | TABLE),
        Effect("path_format", "photos/{id}.png", "recomputed path_format", ANEW | TABLE),
        Effect("key_column", "id", "recomputed key_column", ANEW | TABLE),
        Effect("unique", True, "recomputed unique", ANEW | TABLE),
        Effect("follow_links", True, "recomputed follow_links", ANEW),
        Effect("exclude", "*.png", "recomputed exclude", ANEW),
        Effect("limit", 1, "recomputed limit", ANEW),
        Effect("checkpoint", "test_vit", "recomputed checkpoint", ANEW),
        Effect("arch", "test_resnet", "recomputed arch", ANEW),
        Effect("weights_key", "b", "recomputed weights_key", ANEW | {"arch": "test_resnet"}),
        Effect("model_arg", "init_values=0.5", "recomputed model_arg", ANEW),
        Effect("random_init", True, "recomputed random_init", ANEW | {"dump": "of_file", "random_init": NOT}),
        Effect("seed", 3, "recomputed seed", ANEW),
        Effect("device", "cpu", "recomputed device", ANEW),
        Effect("as_json", True, "stdout", TEXT),
        Effect("quiet", True, "stdout", TEXT),
    ],
    "export": [
        Effect("dump", "begun", "error"),
        Effect("output", f"{OUT}.jsonl", "written"),
        Effect("to", "jsonl", "written", {"output": OUT}),
        Effect("stage", "stage1", "written"),
        Effect("pool", "avg", "written"),
        Effect("dtype", "float16", "written"),
        Effect("keep_failed", True, "written"),
        Effect("more", ["third"], "written"),
        Effect("others", ["again=dump"], "written"),
        Effect("keys", ["b.png"], "written"),
        Effect("where", ["label=trip"], "written"),
        Effect("incomplete", True, "error", {"dump": "begun"}),
        Effect("overwrite", True, "error", {"output": f"{OUT}.h5"}, there="list"),
        Effect("quiet", True, "stdout"),
    ],
    "show": [
        Effect("dump", "begun", "error"),
        Effect("output", f"{OUT}.html", "written"),
        Effect("keys", ["b.png"], "written"),
        Effect("root", "photos/trip", "stderr"),
        Effect("stage", "stage1", "written"),
        Effect("num_images", 1, "written"),
        Effect("allow_outside", True, "stderr", {"dump": "outer", "root": "photos"}),
        Effect("others", ["again=dump"], "written"),
        Effect("incomplete", True, "error", {"dump": "begun"}),
        Effect("overwrite", True, "error", there="list"),
        Effect("quiet", True, "stdout"),
    ],
    "finalize": [
        Effect("dump", "begun", "error", there="unfinished"),
        Effect("as_json", True, "stdout", there="unfinished"),
        Effect("quiet", True, "stdout", there="unfinished"),
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make a folder with pictures of every kind that an option is about, dumps, lists, and a weights file."""
    folder = tmp_path_factory.mktemp("world")
    photos, odd, mixed = folder / "photos", folder / "odd", folder / "mixed"
    for number, name in enumerate(("a.jpg", "b.png", "trip/c.png")):
        draw(photos / name, number, (40, 32))
    shutil.copytree(photos, mixed)
    (mixed / "bad.jpg").write_bytes(b"\xff\xd8\xff" + bytes(200))
    shutil.copytree(mixed, folder / "edited")
    draw(folder / "edited" / "new.png", 9)
    (folder / "edited" / "a.jpg").write_bytes((mixed / "a.jpg").read_bytes()[:-1] + b"?")
    draw(folder / "linked" / "far.png", 5, (40, 32))
    (photos / "link").symlink_to(folder / "linked")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    odd.mkdir()
    noise.save(odd / "noise.jpg")
    noise.save(odd / "several.jpg", "MPO", save_all=True, append_images=[noise.resize((40, 30))])
    colours = np.full((32, 40, 4), (200, 30, 90, 255), np.uint8)
    colours[:, :20, 3] = 0
    Image.fromarray(colours).save(odd / "see-through.png")
    Image.fromarray(np.linspace(0, 4095, 32 * 40).reshape(32, 40).astype(np.uint16)).save(odd / "deep.png")
    Image.new("RGB", (40, 32), (200, 30, 90)).save(odd / "wide.png", icc_profile=rgb_profile())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos / "a.jpg").save(odd / "turned.jpg", exif=exif)
    (folder / "list").write_text(f"{photos}/b.png\n")
    (folder / "zeros").write_text("photos/b.png\0")
    (folder / "table.csv").write_text("id,path,other\nb,photos/b.png,photos/a.jpg\n")
    (folder / "one.csv").write_text("path\nodd/wide.png\n")
    (folder / "twice.csv").write_text("path\nphotos/b.png\nphotos/b.png\n")
    (folder / "short").write_text("b.png\n")
    (folder / "outside").write_text("../linked/far.png\n")
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, folder / "weights.safetensors")
    save_file(
        {f"{of}.{key}": tensor.clone() for of in "ab" for key, tensor in weights.items()}, folder / "two.safetensors"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        featcli.extract("mixed", **SMALL, out_indices=[1, -1], output="dump", shard_size=1)
        outside = {"files_from": "outside", "root": "photos", "allow_outside": True}
        featcli.extract(**outside, **SMALL, output="outer")
        featcli.extract("photos/trip", **SMALL, out_indices=[1, -1], output="third")
        featcli.extract("photos/trip", **SMALL, out_indices=[1, -1], output="third")
        of_file = {"checkpoint": "weights.safetensors", "arch": "test_resnet", "random_init": False}
        featcli.extract("mixed", **SMALL | of_file, output="of_file")
        featcli.extract("mixed", **SMALL | {"precision": "bf16"}, out_indices=[1, -1], output="other", shard_size=1)
        for name in ("unfinished", "begun", "damaged"):
            shutil.copytree("dump", name)
        for name in ("unfinished", "begun"):
            Path(name, "manifest.json").unlink()
        Path("begun/shards/00001.json").unlink()
        shard = Path("damaged/shards/00000.h5")
        shard.write_bytes(shard.read_bytes()[:-1])
        yield folder


class OneNode:
    """Stands for Ray, on one machine."""

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 8.0, "GPU": 2.0}

    def nodes(self):
        return [{"Alive": True, "Resources": self.cluster_resources()}]


def no_worker(*_):
    """Stand for the work of Ray's workers."""
    raise MachineError("there are none")


def no_job(asked, *_):
    """Stand for making rows again, and report what would be made."""
    said = {one.name: getattr(asked, one.name) for one in options_of(type(asked))}
    raise UsageError("recomputed", json.dumps(said, default=str))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Replace slow work (compiling, Ray, recomputing) by a report of it."""
    monkeypatch.setattr(backbones, "compiled", lambda function: function)
    monkeypatch.setattr(ray, "imported_ray", OneNode)
    monkeypatch.setattr(ray.RayEngine, "run", no_worker)
    monkeypatch.setattr(recompute, "prepare", no_job)
    monkeypatch.setattr(growing, "_sample", lambda _: [])  # which compares all of a few pictures


def typed(name: str, options: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield the words of a command with these options."""
    yield name
    for one in sorted(in_order_of_help(COMMANDS[name]), key=lambda one: one.option.is_argument):
        value = options.get(one.name, NOT)
        if value is NOT:
            continue
        value = [str(out) + text.removeprefix(OUT) if text.startswith(OUT) else text for text in texts_of(value)]
        if one.option.is_argument:
            yield from value
        elif value == ["True"]:
            yield one.called
        else:
            yield from (one.called, *value)


def texts_of(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def flat(facts: Mapping[str, Any], above: str) -> dict[str, Any]:
    """Return facts by the path to them."""
    found = {above: facts}
    for name, value in facts.items():
        found[f"{above}.{name}"] = value
    return found


def facts_of(cli, name: str, options: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return everything visible about a run: what it says, what it ends with, what it writes."""
    run = cli(*typed(name, options, out))
    assert "Traceback" not in run.err
    error = re.search("featcli: error: (.*)", run.err)
    facts: dict[str, Any] = {"code": run.code, "error": error and error[1]}
    facts |= {"stdout": run.out.replace(str(out), OUT), "stderr": re.sub(r"[\d.]+ (images/)?s\b", "", run.err)}
    hint = re.search("hint: ({.*})", run.err)
    for key, value in json.loads(hint[1]).items() if hint else ():
        facts[f"recomputed {key}"] = value
    for line in run.out.splitlines() if options.get("as_json") is True else ():
        event = json.loads(line)
        kind = event.pop("type", "row")
        if kind == "choice":
            facts[f"choice {event.pop('name')}"] = event
        for key, value in event.items():
            facts.setdefault(f"{kind} {key}", value)
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    facts["written"] = {str(path.relative_to(out.parent)): sha256(path.read_bytes()).hexdigest() for path in files}
    if name == "extract" and (out / "manifest.json").exists():
        plan = json.loads((out / "plan.json").read_text())
        facts |= flat(plan["settings"], "settings")
        with featcli.open_dump(out) as dump:
            facts["keys"] = list(dump.keys)
            *_, last = dump.stages
            for key, is_valid in zip(dump.keys, dump.valid, strict=True):
                facts[f"map {key}"] = dump[last][key].tobytes() if is_valid else None
    return facts


OF_COMMANDS = [(name, effect) for name, effects in EFFECTS.items() for effect in effects]


@pytest.fixture(scope="module")
def seen():
    """Keep what bases have shown, because many are the same."""
    return {}


@pytest.mark.parametrize(
    ("name", "effect"), OF_COMMANDS, ids=[f"{name}-{effect.option}-{effect.shows}" for name, effect in OF_COMMANDS]
)
def test_an_option_has_an_effect(cli, world, tmp_path, seen, name, effect):
    """With the option the fact differs from that without it."""

    def observed(folder, options):
        out = tmp_path / folder / "out"
        out.parent.mkdir()
        if effect.there and (world / effect.there).is_dir():
            shutil.copytree(world / effect.there, out)
        elif effect.there:
            shutil.copy(world / effect.there, str(out) + options["output"].removeprefix(OUT))
        return facts_of(cli, name, options, out)

    base = {**BASES[name], **effect.besides}
    key = f"{name} {sorted(base.items(), key=str)} {effect.there}"
    if key not in seen:
        seen[key] = observed("without", base)
    without, given = seen[key], observed("with", base | {effect.option: effect.value})
    assert without.get(effect.shows) != given.get(effect.shows)
    if effect.shows != "error":
        errors = filter(None, (without["error"], given["error"]))
        assert [
            error
            for error in errors
            if not re.search("recomputed|there are none|verify found 1 damage|not equal to", error)
        ] == []


def load(options):
    """Return everything visible about a backbone."""
    try:
        backbone = featcli.load_backbone(**options)
    except FeatcliError as error:
        return {"error": error.message}
    pixels = {
        "pixels": Image.new("RGB", (40, 32), (200, 30, 90)),
        **{path.stem: path for path in Path("odd").iterdir()},
    }
    for name, picture in pixels.items():
        try:
            pixels[name] = backbone.preprocess(picture).numpy().tobytes()
        except FeatcliError as error:
            pixels[name] = error.message
    numbers = {"preprocessing": backbone.preprocessing.summary}
    return {"error": None, "digest": backbone.digest, **pixels, **numbers, **backbone.to_dict()}


OF_LOADING = {
    "checkpoint": Effect("checkpoint", "test_vit", "digest"),
    "arch": Effect("arch", "test_resnet", "error", {"checkpoint": "weights.safetensors", "random_init": False}),
    "weights_key": Effect("weights_key", "b", "error", TWO | {"random_init": False}),
    "model_arg": Effect("model_arg", {"init_values": 0.5}, "settings", {"checkpoint": "test_vit"}),
    "random_init": Effect("random_init", True, "error", {"random_init": False}),
    "seed": Effect("seed", 3, "digest"),
    "num_channels": Effect("num_channels", 1, "num_channels"),
    "norm": Effect("norm", "model", "settings", {"checkpoint": "test_vit"}),
    "image_size": Effect("image_size", 64, "image_size"),
    "fit": Effect("fit", "pad", "pixels"),
    "processor_backend": Effect("processor_backend", "torchvision", "error"),
    "mean": Effect("mean", [0.1, 0.2, 0.3], "preprocessing"),
    "std": Effect("std", 0.3, "preprocessing"),
    "interpolation": Effect("interpolation", Image.Resampling.BOX, "noise"),
    "crop_pct": Effect("crop_pct", 0.5, "noise"),
    "out_indices": Effect("out_indices", [1], "out_indices"),
    "out_features": Effect("out_features", "stage1", "out_features"),
    "orientation": Effect("orientation", "ignore", "turned"),
    "alpha": Effect("alpha", "white", "see-through"),
    "depth_range": Effect("depth_range", (0, 4095), "deep"),
    "colour": Effect("colour", "convert", "wide"),
    "max_pixels": Effect("max_pixels", 100, "noise"),
    "decode": Effect("decode", "scaled", "noise", {"image_size": 32}),
    "device": Effect("device", "cuda:99", "error"),
    "precision": Effect("precision", "bf16", "precision"),
    "layout": Effect("layout", "channels-last", "layout"),
    "fold": Effect("fold", True, "folded"),
}


@pytest.mark.parametrize("effect", OF_LOADING.values(), ids=OF_LOADING)
def test_a_keyword_has_an_effect(world, effect):
    """With the keyword `load_backbone` gives another fact than without it."""
    base = {"checkpoint": "test_resnet", "random_init": True, **effect.besides}
    assert load(base).get(effect.shows) != load(base | {effect.option: effect.value}).get(effect.shows)


def test_no_option_is_left_out():
    """Every option of every command, and every keyword, is in the lists above."""
    for name, spec in COMMANDS.items():
        assert {effect.option for effect in EFFECTS[name]} == {one.name for one in options_of(spec)}, name
    assert OF_LOADING.keys() == {one.name for one in fields(BackboneCall)}


def of_declared():
    """Yield (command, options, name in the message) for each option without one it needs, or with one it excludes."""
    for name, spec in COMMANDS.items():
        named = {one.name: one for one in options_of(spec)}
        for effect in {effect.option: effect for effect in EFFECTS[name]}.values():
            one = named[effect.option]
            base = {**BASES[name], **(ANEW if name == "verify" else {}), effect.option: effect.value}
            if (needed := one.option.needs) is not None:
                instead = LIST if needed.name == "inputs" else {needed.name: NOT}
                yield name, base | instead, (one.named, named[needed.name].named)
            for other in one.option.excludes:
                value = other.value or next(e.value for e in EFFECTS[name] if e.option == other.name)
                beside = TABLE if needed is not None and needed.name == "table" else {}
                yield name, base | beside | {other.name: value}, (one.named, named[other.name].named)


FOR_RECOMPUTE = {effect.option: effect for effect in EFFECTS["verify"] if effect.shows.startswith("recomputed")}
BESIDE_DUMP = [effect for effect in EFFECTS["inspect"] if effect.option not in ("target", "as_json")]
REFUSED = [
    *of_declared(),
    *(("verify", {**BASES["verify"], one.option: one.value}, ("--recompute",)) for one in FOR_RECOMPUTE.values()),
    *(("inspect", {"target": "dump", one.option: one.value}, ("'dump' is a dump",)) for one in BESIDE_DUMP),
    ("extract", {"decode": "scaled", "fit": "native"}, ("--decode scaled", "--fit native")),
    ("extract", {"norm": "model"}, ("--norm model", "test_resnet")),
    ("extract", {"norm": "model", "checkpoint": "test_convnext", **DRY}, ("--norm model", "test_convnext")),
    ("extract", {"fold": True, "checkpoint": "test_vit", **DRY}, ("--fold", "test_vit")),
    ("extract", {"pool": "cls"}, ("--pool cls", "no class token")),
    ("extract", {"pool": "40x40"}, ("--pool 40x40", "cells")),
    ("extract", {"arch": "test_resnet"}, ("--arch", "weights file")),
    ("extract", {"arch": "test_resnet", "checkpoint": "weights.safetensors"}, ("--random-init", "would not be read")),
    ("extract", {"follow_links": True, "inputs": "photos/a.jpg"}, ("--follow-links", "folder")),
    ("extract", {"engine": "ray", "device": "cpu,cpu"}, ("--device 'cpu,cpu'", "--engine ray")),
    ("inspect", {"norm": "model"}, ("--norm model", "test_resnet")),
    ("export", {"overwrite": True, "output": f"{OUT}-folder"}, ("--overwrite", "folder")),
    ("export", {"to": "npy", "output": f"{OUT}.h5"}, ("--to npy", "suffix says hdf5")),
]


@pytest.mark.parametrize(
    ("name", "options", "says"), REFUSED, ids=[f"{name}-{'-'.join(says)}" for name, _, says in REFUSED]
)
def test_an_idle_option_is_refused(cli, world, tmp_path, name, options, says):
    """An option that others or the model make idle ends with exit code 2 and is named, and nothing is written."""
    run = cli(*typed(name, {**BASES[name], **options}, tmp_path / "out"))
    assert run.code == 2
    error, hint = [line for line in run.err.splitlines() if line.startswith(("featcli: error: ", "hint: "))]
    assert [text for text in says if text not in error + hint] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("extract", {"seed": 0, "random_init": NOT, "checkpoint": "weights.safetensors", "arch": "test_resnet"}),
        ("extract", {"norm": "raw", "num_channels": 3, "layout": "channels-first"}),
        ("extract", {"overwrite": True}),
        ("extract", {"retry_failed": True}),
        ("extract", {"follow_links": True, "inputs": "odd"}),
        ("extract", {"exclude": "*.gif", "limit": 10**9}),
        ("extract", {"depth_range": "0:9", "alpha": "white", "orientation": "ignore", "decode": "scaled"}),
        ("extract", {"decode": "fast", "fit": "native", "image_size": 64}),
        ("extract", {"decode": "fast", "interpolation": "lanczos"}),
        ("inspect", {"target": "dump", "dtype": "float32"}),
        ("verify", {"device": "auto", "recompute": 0}),
        ("export", {"keep_failed": True, "incomplete": True, "overwrite": True}),
    ],
)
def test_what_only_this_data_makes_idle_is_let(cli, world, tmp_path, name, options):
    """Options that only this data makes idle are allowed, and values that equal the documented default, too."""
    run = cli(*typed(name, {**BASES[name], **options}, tmp_path / "out"))
    assert (run.code, "error" in run.err) == (0, False), run.err


def test_a_generator_without_shuffling(world):
    """A loader that does not shuffle refuses a generator."""
    data = featcli.open_dump("dump").as_torch_dataset("stage4")
    assert len(list(data.loader(shuffle=True, generator=torch.Generator()))) == 1
    with pytest.raises(UsageError, match="generator needs shuffle=True"):
        data.loader(generator=torch.Generator())
