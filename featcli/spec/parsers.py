"""What options say, as values: counts, sizes, ranges, stages, grids, parts. Pure functions; each raises UsageError."""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

from featcli.errors import UsageError, shown
from featcli.spec.option import Check
from featcli.spec.words import ALL, AUTO, EXPORT_FORMATS, FORMATS, OTHER_WORDS, POOLS

Size = tuple[int, int]  # (H, W)
Path = str | os.PathLike[str]
GRID = re.compile(r"([1-9]\d*)x([1-9]\d*)")
SIDE = re.compile(r"[1-9]\d*", re.ASCII)
LEAVE_OUT = "leave it out for the default"
HOW_PARTS = "give it as i/n, such as 0/4: the first of four parts"


def path_text(path: Any) -> Any:
    """A path as text; whatever is no path as it is."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def device_text(device: Any) -> Any:
    """A torch.device as text, several as a list in one text; whatever is none as it is."""
    if isinstance(device, tuple | list):
        return ",".join(str(device_text(one)) for one in device)
    return str(device) if _is_of_torch(device, "device") else device


def type_name(value: Any) -> Any:
    """The name of a dtype of torch or numpy, `float16`, also by another word for it; whatever is none as it is."""
    if _is_of_torch(value, "dtype"):
        return str(value).removeprefix("torch.")
    name = value.__name__ if isinstance(value, type) else getattr(value, "name", value)
    return _our_word("dtype", name) if isinstance(name, str) else value


def precision_of_type(value: Any) -> Any:
    """The precision that a dtype is the type of, `bf16`; whatever is no dtype as it is."""
    return _our_word("precision", type_name(value))


def pool_name(value: Any) -> Any:
    """The word for a pooling, also by another word for it; a grid of equal sides by one number, as `7x7`."""
    is_side = isinstance(value, Integral | str) and SIDE.fullmatch(str(value))
    return f"{value}x{value}" if is_side else _our_word("pool", value)


def format_name(value: Any) -> Any:
    """The word for a file format, also by another word for it."""
    return _our_word("format", value)


def dump_format(value: Any) -> Any:
    """The word for the format of a dump. Raises UsageError for those that only export writes."""
    name = format_name(value)
    if isinstance(name, str) and name in set(EXPORT_FORMATS) - set(FORMATS):
        raise UsageError(
            f"a dump cannot be stored as {name}", f"featcli export writes {name} from a dump, by --to {name}"
        )
    return name


def _our_word(option: str, value: Any) -> Any:
    """The word of featcli for one of other programs; any other value as it is."""
    return OTHER_WORDS[option].get(value, value) if isinstance(value, str) else value


def _is_of_torch(value: Any, name: str) -> bool:
    """Whether a value is of that class of torch, which takes seconds to import."""
    return (type(value).__module__, type(value).__name__) == ("torch", name)


def size_as_given(size: Any) -> Any:
    """A size as plain numbers and text, of numpy's numbers and arrays too; whatever is none as it is."""
    plain = size.tolist() if hasattr(size, "tolist") else size
    if isinstance(plain, tuple | list):
        return tuple(size_as_given(edge) for edge in plain)
    return int(plain) if isinstance(plain, Integral) and not isinstance(plain, bool) else plain


def depth_as_given(depth: Any) -> Any:
    """Two numbers, black and white, as the text `0:4095`; whatever is no such pair as it is."""
    plain = depth.tolist() if hasattr(depth, "tolist") else depth
    is_pair = isinstance(plain, tuple | list) and len(plain) == 2
    if not is_pair or not all(isinstance(edge, Real) and not isinstance(edge, bool) for edge in plain):
        return plain
    return ":".join(str(int(edge) if isinstance(edge, Integral) else float(edge)) for edge in plain)


def parse_inputs(inputs: Any) -> tuple[str, ...]:
    """A path or a URL, or any number of them, as a tuple of text."""
    if isinstance(inputs, str | os.PathLike):
        return (path_text(inputs),)
    try:
        found = tuple(path_text(one) for one in inputs)
    except TypeError:
        found = (inputs,)
    for one in found:
        if not isinstance(one, str):
            raise UsageError(f"input {shown(one)}: neither a path nor a URL", "give text, or a pathlib.Path")
    return found


def parse_number(option: str, text: str, kind: type[int] | type[float]) -> int | float:
    """A number of that type."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{option} {shown(text)}: not {what}", LEAVE_OUT) from None


def parse_model_args(asked: Any) -> tuple[str, ...]:
    """Arguments of a model, from texts such as `init_values=1e-5` or a mapping, as texts whose values are JSON."""
    if isinstance(asked, str):
        asked = (asked,)
    if isinstance(asked, Mapping):
        found = {str(name): value for name, value in asked.items()}
    else:
        found = {}
        for text in asked if isinstance(asked, Iterable) else (asked,):
            name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
            if not (equals and name.isidentifier()):
                raise UsageError(f"--model-arg {shown(text)}: not NAME=VALUE", "such as --model-arg init_values=1e-5")
            if name in found and found[name] != _value_of(value):
                raise UsageError(f"--model-arg {name} is given twice, with different values", "give it once")
            found[name] = _value_of(value)
    try:
        return tuple(f"{name}={json.dumps(value)}" for name, value in found.items())
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model-arg: {error}", "give numbers, words, or lists and dictionaries of them") from None


def as_given(name: str, value: Any) -> str:
    """An argument as it is written in a shell."""
    return shlex.quote(f"{name}={json.dumps(value)}")


def model_args(texts: Sequence[str]) -> dict[str, Any]:
    """What `parse_model_args` keeps, as values by name."""
    return {name: json.loads(value) for name, _, value in (text.partition("=") for text in texts)}


def _value_of(text: str) -> Any:
    """A value as JSON or Python write it; any other text is a word."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_count(option: str, text: str) -> int | str:
    """`auto`, or how many."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise UsageError(f"{option} {shown(text)}: neither a number nor {AUTO}", LEAVE_OUT) from None


def count_up_to(most: int, or_auto: bool = True) -> Check:
    """A check: a whole number from 1 to `most`, or `auto`."""

    def check(option: str, value: Any) -> None:
        if or_auto and isinstance(value, str) and value == AUTO:
            return
        _refuse_below(option, value, 1, LEAVE_OUT, kind=int)
        if value > most:
            raise UsageError(f"{option} {value}: must be at most {most}", LEAVE_OUT)

    return check


def at_least(least: int, hint: str = LEAVE_OUT) -> Check:
    """A check: a number that is not smaller."""
    return lambda option, value: _refuse_below(option, value, least, hint)


def between(least: int, most: int, hint: str = LEAVE_OUT, most_said: str = "") -> Check:
    """A check: a number from `least` to `most`, which messages may write in another way."""

    def check(option: str, value: Any) -> None:
        _refuse_no_number(option, value)
        if not least <= value <= most:
            raise UsageError(f"{option} {value}: must be from {least} to {most_said or most}", hint)

    return check


def _refuse_below(option: str, value: Any, least: int, hint: str, kind: type = Real) -> None:
    _refuse_no_number(option, value, kind)
    if value < least:
        raise UsageError(f"{option} {value}: must be at least {least}", hint)


def _refuse_no_number(option: str, value: Any, kind: type = Real) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{option} {shown(str(value))}: not a number", LEAVE_OUT)


def parse_size(text: str | int | Size | None, option: str = "--image-size") -> Size | None:
    """`"224"`, `"224x288"`, 224 or (224, 288) as (H, W), None as None."""
    if text is None:
        return None
    text = "x".join(map(str, text)) if isinstance(text, tuple | list) else str(text)
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise UsageError(
            f"{option} {shown(text)}: not a size", "write for example 224, or 224x288 (height first), up to 99999"
        )
    return int(match[1]), int(match[2] or match[1])


def parse_depth_range(text: str | None, option: str = "--depth-range") -> tuple[float, float] | None:
    """`"0:4095"` as (0, 4095), None as None."""
    if text is None:
        return None
    match = re.fullmatch(r"(-?[\d.]+(?:e[+-]?\d+)?):(-?[\d.]+(?:e[+-]?\d+)?)", text)
    try:
        low, high = (float(value) for value in match.groups()) if match else (0.0, 0.0)
    except ValueError:
        low = high = 0.0
    if not -1e38 < low < high < 1e38:
        raise UsageError(f"{option} {shown(text)}: not a range", "write the values of black and white, such as 0:4095")
    return low, high


def parse_indices(asked: Any) -> tuple[int, ...] | Literal["all"] | None:
    """`"1,2,-1"`, `"(1, 2, -1)"`, (1, 2, -1), an array or one number as a tuple; `"all"` and None as they are."""
    if asked is None or (isinstance(asked, str) and asked.strip() == ALL):
        return None if asked is None else ALL
    if isinstance(asked, str):
        parts: Any = listed_in(asked)
    else:
        parts = _each(asked)
    found = tuple(_index(part) for part in parts)
    wrong = next((part for part, index in zip(parts, found, strict=True) if index is None), None)
    if None in found and isinstance(asked, str):
        raise UsageError(
            f"--out-indices {shown(asked)}: not a list of whole numbers",
            "write for example --out-indices 1,2,-1, or a range of names: --out-features stage1:stage3",
        )
    if None in found:
        raise UsageError(f"--out-indices {shown(wrong)}: no stage has that index", "see featcli inspect")
    return tuple(index for index in found if index is not None)


def parse_features(asked: Any) -> tuple[str, ...] | None:
    """`"stem,stage2:stage4"`, `"['stem', 'stage2']"` or a sequence as its parts, None as None.

    Ranges are opened when the names are known.
    """
    if asked is None:
        return None
    if not isinstance(asked, str):
        names = _each(asked)
        wrong = next((one for one in names if not isinstance(one, str)), "")
        if not isinstance(wrong, str):
            raise UsageError(f"--out-features {shown(wrong)}: no stage has that name", "see featcli inspect")
        return tuple(map(str, names))  # of numpy's text, too
    parts = tuple(listed_in(asked))
    if not all(parts):
        raise UsageError(
            f"--out-features {shown(asked)}: an empty name", "write for example --out-features stem,stage2"
        )
    return parts


def listed_in(text: str) -> list[str]:
    """List the parts of a text with commas, which may be written as Python writes a tuple or a list.

    One comma may stand behind the last part, and quotes around each.
    """
    inner = text.strip()
    is_python = inner[:1] + inner[-1:] in ("()", "[]")
    parts = [part.strip() for part in (inner[1:-1] if is_python else inner).split(",")]
    if not parts[-1] and (is_python or len(parts) > 1):
        parts.pop()
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts]


def _each(asked: Any) -> tuple[Any, ...]:
    """All that an iterable gives; what is none, such as one number, by itself."""
    try:
        return tuple(asked)
    except TypeError:
        return (asked,)


def _index(value: Any) -> int | None:
    """A whole number of Python, numpy or torch, or the text of one; None for all else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[+-]?\d{1,9}", value.strip(), re.ASCII) else None
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith(("bool", "bool_")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def parse_pool(name: str) -> Size | None:
    """The grid (H, W) that `7x7` means; None for a name of POOLS."""
    if name in POOLS:
        return None
    if grid := GRID.fullmatch(name):
        return int(grid[1]), int(grid[2])
    raise UsageError(f"--pool cannot be {shown(name)}", f"it can be {', '.join(POOLS)}, or a grid such as 7x7")


def parse_part(text: str) -> tuple[int, int] | Literal["auto"]:
    """`"1/4"` as (1, 4): the second of four parts; `"auto"` as it is."""
    if text == AUTO:
        return AUTO
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None:
        raise UsageError(f"--part {shown(text)}: no part", f"{HOW_PARTS}, or {AUTO}")
    index, count = int(found[1]), int(found[2])
    refuse_no_part(index, count)
    return index, count


def refuse_no_part(index: int, count: int) -> None:
    """Raise UsageError unless there is such a part."""
    if not 0 <= index < count:
        raise UsageError(f"--part {index}/{count}: i/n needs 0 <= i < n", HOW_PARTS)
