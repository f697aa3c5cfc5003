"""Compare what a run says about vectors before the norm with what timm's own model does; a part of `make sweep`.

`python benchmarks/norms.py [NAME ...]` takes these architectures of timm, or the smallest one in each of its model
files if that has at most a hundred million parameters. Weights are random, and norms are made such that none leaves its
input as it is. What a model pools is found by values alone: its raw map of the last stage, that map after one of its
norms, or something else. It prints one line for each vector, and ends with 1 if a run says what is not true.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PICTURE = REPOSITORY / "sample_images" / "nature" / "sea.jpg"
LARGEST = 100_000_000  # parameters
AS_IT_IS, AFTER_NORM, AFTER_ANOTHER, AFTER_MORE = "the raw map", "--norm model", "a norm that no option gives", "more"
SAYS = {AS_IT_IS: "", AFTER_NORM: "--norm model does so, too", AFTER_ANOTHER: "no option gives maps after it"}


def smallest() -> list[str]:
    """Return the smallest architecture in each of timm's model files, by what `make sweep` found."""
    import timm

    found: dict[str, tuple[int, str]] = {}
    with (REPOSITORY / "featcli" / "views" / "models.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["library"] == "timm" and row["name"]:
                module = timm.models.model_entrypoint(row["name"]).__module__
                one = int(row["parameters"]), row["name"]
                found[module] = min(found.get(module, one), one)
    return sorted(name for parameters, name in found.values() if parameters <= LARGEST)


def made(name: str) -> Any:
    """Return a model of timm whose norms change their input."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for norm in norms_of(model):
            for key, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5) if "bias" not in key and "mean" not in key else tensor.normal_()
    return model


def norms_of(model: Any) -> list[Any]:
    """Return every module whose class is called a norm and that has no weights of more than one dimension."""
    named = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return [module for module in named if all(weight.squeeze().ndim < 2 for weight in module.parameters())]


def forms(raw: Any) -> Iterator[Any]:
    """Yield a map (B, C, H, W) in every order of axes that a norm may want."""
    yield raw
    yield raw.permute(0, 2, 3, 1)
    yield raw.flatten(2).transpose(1, 2)


def values(found: Any) -> Any:
    """Return the values of a tensor without their order, because it does not matter which axes it has."""
    return found.detach().float().flatten().sort().values


def is_same(one: Any, other: Any) -> bool:
    """Return whether two tensors have the same values, in any order."""
    import torch

    return one.numel() == other.numel() and torch.allclose(values(one), values(other), rtol=1e-4, atol=1e-5)


def last_of(model: Any, pixels: Any, norm: bool, of_class_token: bool) -> Any:
    """Return what the last stage gives: its map, or its class token."""
    how = {"norm": norm, "output_fmt": "NCHW", "intermediates_only": True}
    if of_class_token:
        return model.forward_intermediates(pixels, **how, return_prefix_tokens=True)[-1][1][:, 0]
    return model.forward_intermediates(pixels, **how)[-1]


def ended_by(model: Any, pixels: Any, raw: Any, of_class_token: bool) -> Any:
    """Return what the model pools: the last tensor that it ends in, only its patches, or only its class token."""
    ended = model.forward_features(pixels)
    while isinstance(ended, list | tuple):
        ended = ended[-1]
    ended = ended["x"] if isinstance(ended, dict) else ended
    if of_class_token:
        return ended[:, 0]
    patches = raw.shape[2] * raw.shape[3]
    return ended[:, -patches:] if ended.ndim == 3 and ended.shape[2] == raw.shape[1] else ended


def after_norms(model: Any, raw: Any, of_class_token: bool) -> Iterator[Any]:
    """Yield what each norm of the model makes of the last stage's output, by itself or before a ReLU."""
    for norm in norms_of(model):
        for form in [raw] if of_class_token else forms(raw):
            with suppress(Exception):  # it has other channels, or wants another order of axes
                after = norm(form)
                yield after
                yield after.relu()


def pooled_by_timm(model: Any, pixels: Any, of_class_token: bool) -> str:
    """Return what the model pools."""
    raw = last_of(model, pixels, False, of_class_token)
    ended = ended_by(model, pixels, raw, of_class_token)
    if is_same(ended, raw):
        return AS_IT_IS
    with suppress(Exception):  # a model may refuse in its own way
        if is_same(ended, last_of(model, pixels, True, of_class_token)):
            return AFTER_NORM
    return AFTER_ANOTHER if any(is_same(ended, one) for one in after_norms(model, raw, of_class_token)) else AFTER_MORE


def said_by_featcli(name: str, pool: str) -> str | None:
    """Return what a dry run says about such vectors, after the colon; None if it refuses them."""
    from featcli.errors import UsageError
    from featcli.extraction.planning import dry_run
    from featcli.spec.commands import ExtractSpec

    said: list[str] = []
    asked = ExtractSpec(PICTURE, checkpoint=name, random_init=True, output="never-written", pool=pool)
    try:
        dry_run(asked, lambda kind, **facts: said.append(str(facts.get("text", ""))))
    except UsageError:
        return None
    return next((text.rpartition(": ")[2] for text in said if "is pooled before" in text), "")


def main(names: list[str]) -> int:
    """Compare each. The exit code is 1 if one is wrong, or if values told nothing about any."""
    from featcli.backbones.torchvision_operators import declare_missing_operators

    declare_missing_operators()
    import torch

    wrong = judged = 0
    for name in names or smallest():
        model = made(name)
        pixels = torch.rand(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        for pool in ("avg", "cls"):
            said = said_by_featcli(name, pool)
            if said is None:
                continue
            try:
                with torch.inference_mode():
                    pools = pooled_by_timm(model, pixels, pool == "cls")
            except Exception as error:  # the line names whatever it is
                pools = f"{type(error).__name__}: {error}"
            is_judged = pools in SAYS  # for more than a norm, such as class attention, values tell nothing
            is_wrong = is_judged and said != SAYS[pools]
            judged, wrong = judged + is_judged, wrong + is_wrong
            verdict = "WRONG" if is_wrong else "right" if is_judged else "open"
            sys.stdout.write(f"{verdict}  {name}  {pool}  {pools}  {said or '-'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{wrong} wrong of {judged} that values tell of\n")
    return int(wrong > 0 or not judged)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
