"""Read names of tensors in weights files: prefixes around them, and names that other code gave the same tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from featcli.errors import CheckpointError, nearest, shown

DEEPEST_PREFIX = 4  # names in one prefix, such as module.student.backbone.model
MOST_PREFIXES = 4  # prefixes that are tried with a library's converter
HEADS = ("head", "fc", "classifier")
LIKE = 0.75  # similarity from which a name counts as another one renamed
AVERAGED = re.compile(r"teacher|ema|target")  # in prefixes of weights that are averages of other weights
# efficientnet_pytorch's names of the parts of a network -> timm's.
EFFICIENTNET_PYTORCH = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
EFFICIENTNET_PYTORCH |= {"_fc": "classifier"}
# The same for its blocks: those of the first stage, which does not expand its channels, and all others.
_FIRST_BLOCKS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_BLOCKS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_OTHER_BLOCKS |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A way to read the names in a weights file."""

    prefix: str  # the prefix that was removed
    tensors: Tensors
    strangers: list[str]  # names of all tensors without the prefix
    format: str = ""  # the code that the names came from, if they were changed


def readings(tensors: Mapping[str, torch.Tensor], expected: Collection[str], plain: Reading) -> Iterator[Reading]:
    """Yield the ways in which names may be meant that a model does not know: as they are first, then `plain`.

    Each prefix that most of the tensors have is removed, and each known format of names is tried.
    """
    prefixes = ["", plain.prefix, *leading_prefixes(tensors, len(expected) // 2)]
    for prefix in dict.fromkeys(prefixes):
        under = under_prefix(prefix, tensors)
        yield under
        for format_, rename in FORMATS.items():
            renamed = rename(under.tensors, expected)
            if renamed is not None:
                yield Reading(prefix=prefix, tensors=renamed, strangers=under.strangers, format=format_)


def under_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Reading:
    """Remove a prefix from the names that have it."""
    return Reading(
        prefix=prefix,
        tensors={key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)},
        strangers=[key for key in tensors if not key.startswith(prefix)],
    )


def without_heads(reading: Reading, heads: Iterable[str]) -> Reading:
    """Leave out tensors below classifiers at the root, because some converters look for these in a model."""
    starts = tuple(f"{name}." for name in (*HEADS, *heads))
    left_out = [key for key in reading.tensors if key.startswith(starts)]
    tensors = {key: tensor for key, tensor in reading.tensors.items() if not key.startswith(starts)}
    return replace(reading, tensors=tensors, strangers=[*reading.strangers, *left_out])


def leading_prefixes(names: Iterable[str], least: int) -> list[str]:
    """Return the prefixes, such as `backbone.`, that at least so many names have, the most common first.

    A list of layers is no prefix, because a number follows it.
    """
    counts = Counter[str]()
    lists = set[str]()
    for name in names:
        parts = name.split(".")
        for end in range(1, min(len(parts), DEEPEST_PREFIX + 1)):
            prefix = ".".join(parts[:end]) + "."
            counts[prefix] += 1
            if parts[end].isdigit():
                lists.add(prefix)
    found = [prefix for prefix, count in counts.most_common() if count >= max(least, 1) and prefix not in lists]
    return found[:MOST_PREFIXES]


def from_flat_names(tensors: Mapping[str, torch.Tensor], expected: Collection[str]) -> Tensors | None:
    """Rename the tensors of timm's `features_only` models, with `stages_0.` for `stages.0.`; None if there are none.

    The source is `_module_list` in timm/models/_features.py: the children of a Sequential are named with an underscore.
    """
    dotted = {name.replace(".", "_", 1).partition(".")[0]: ".".join(name.split(".", 2)[:2]) for name in expected}
    renamed = {_with_head(name, dotted): tensor for name, tensor in tensors.items()}
    return None if renamed.keys() == tensors.keys() else renamed


def _with_head(name: str, heads: Mapping[str, str]) -> str:
    head, dot, rest = name.partition(".")
    return heads.get(head, head) + dot + rest


def from_efficientnet_pytorch(tensors: Mapping[str, torch.Tensor], expected: Collection[str]) -> Tensors | None:
    """Rename the tensors of efficientnet_pytorch, which counts blocks through all stages; None if there are none.

    The source is `EfficientNet` and `MBConvBlock` in efficientnet_pytorch/model.py.
    """
    if "_conv_stem.weight" not in tensors:
        return None
    places = (re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in expected)
    blocks = sorted({(int(place[1]), int(place[2])) for place in places if place})
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if found is None:
            head, dot, rest = name.partition(".")
            renamed[EFFICIENTNET_PYTORCH.get(head, head) + dot + rest] = tensor
        elif int(found[1]) < len(blocks):
            stage, block = blocks[int(found[1])]
            expands = f"_blocks.{found[1]}._expand_conv.weight" in tensors
            parts = _SQUEEZE | (_OTHER_BLOCKS if expands else _FIRST_BLOCKS)
            renamed[f"blocks.{stage}.{block}.{parts.get(found[2], found[2])}.{found[3]}"] = tensor
        else:
            renamed[name] = tensor
    return renamed


def from_vissl(tensors: Mapping[str, torch.Tensor], expected: Collection[str]) -> Tensors | None:
    """Rename the tensors of vissl's RegNets (SEER) as torchvision's, which timm converts; None if there are none.

    timm also converts vissl's, but only inside a container, which is gone once the file was read. The source is
    `_filter_fn` in timm/models/regnet.py.
    """
    if "_feature_blocks.conv1.stem.0.weight" not in tensors:
        return None
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        key = name.replace("_feature_blocks.conv1.stem.", "stem.")
        key = re.sub(r"^_feature_blocks\.res\d\.block(\d)-(\d+)\.", r"trunk_output.block\1.block\1-\2.", key)
        renamed[re.sub(r"(block\d-\d+)\.bn\.", r"\1.proj.1.", key)] = tensor
    return renamed


FORMATS: dict[str, Callable[[Mapping[str, torch.Tensor], Collection[str]], Tensors | None]] = {
    "features_only": from_flat_names,
    "efficientnet_pytorch": from_efficientnet_pytorch,
    "vissl": from_vissl,
}


def strip_prefix(path: Path, tensors: Mapping[str, torch.Tensor], expected: Collection[str]) -> Reading:
    """Remove the prefix (`module.`, `backbone.`, `encoder.body.` ...) that fits most expected names.

    If none fits, the tensors stay as they are, because the library may know another way to read them. Raises
    CheckpointError if two prefixes fit all expected names, as a student's and a teacher's do.
    """
    fits = count_prefixes(tensors, expected)
    best = most_fitting(fits)
    if fits[best] == len(expected):
        refuse_equals(path, [prefix for prefix in sorted(fits) if fits[prefix] == fits[best]])
    return under_prefix(best, tensors)


def refuse_equals(path: Path, prefixes: list[str]) -> None:
    """Raise CheckpointError if more than one prefix fits best."""
    if len(prefixes) > 1:
        keys = [prefix.removesuffix(".") for prefix in prefixes if prefix]
        keys.sort(key=lambda key: not AVERAGED.search(key))  # usually the better model
        raise CheckpointError(
            f"checkpoint {shown(path)}: two sets of weights in it fit equally well, {prefixes[0]}* and {prefixes[1]}*",
            f"choose one: --weights-key {' or '.join(keys[:2])}",
        )


def in_its_place(absent: str, others: Iterable[str]) -> str:
    """Return the end of a sentence with the name in a file that is most like an absent one; "" if none is."""
    near = nearest(absent, others, 1, LIKE)
    return f"; it has {near[0]} in place of the first" if near else ""


def count_prefixes(found: Iterable[str], expected: Collection[str]) -> Counter[str]:
    """Return how many of the expected names are found under each prefix."""
    names, fits = set(expected), Counter[str]()
    for key in found:
        starts = [0, *(i + 1 for i, char in enumerate(key) if char == ".")]
        fits.update(key[:start] for start in starts if key[start:] in names)
    return fits


def find_prefix(found: Iterable[str], expected: Collection[str]) -> str:
    """Return the prefix under which most of the expected names are found; "" if none is."""
    return most_fitting(count_prefixes(found, expected))


def most_fitting(fits: Counter[str]) -> str:
    """Return the prefix with the highest count, the first by name among equals; "" if there is none."""
    return max(sorted(fits), key=fits.__getitem__, default="")
