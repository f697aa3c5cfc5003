"""Turn what options say into values: counts, sizes, ranges, stages, grids, parts.

Pure functions that raise UsageError.
"""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal

from featcli.errors import UsageError, shown
from featcli.spec.option import Check
from featcli.spec.words import ALL, AUTO, EXPORT_FORMATS, FORMATS, OTHER_WORDS, POOLS

Size = tuple[int, int]  # (H, W)
Path = str | os.PathLike[str]
GRID = re.compile(r"([1-9]\d*)x([1-9]\d*)")
SIDE = re.compile(r"[1-9]\d*", re.ASCII)
ONLY_ONE = re.compile(r"\b(cpu|mps):0(?![^,])")  # a machine has only one device of these kinds
LEAVE_OUT = "leave it out for the default"
HOW_PARTS = "give it as i/n, such as 0/4: the first of four parts"


def path_text(path: Any) -> Any:
    """Return a path as text. Anything else is returned as it is."""
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def device_text(device: Any) -> Any:
    """Return a torch.device as text, and several as a list in one text; cpu:0 is cpu. Anything else stays as it is."""
    if isinstance(device, tuple | list):
        return ",".join(str(device_text(one)) for one in device)
    text = str(device) if _is_of_torch(device, "device") else device
    return ONLY_ONE.sub(r"\1", text) if isinstance(text, str) else text


def type_name(value: Any) -> Any:
    """Return the name of a dtype, such as `float16`, for one of torch or numpy or another word.

    Anything else is returned as it is.
    """
    if _is_of_torch(value, "dtype"):
        return str(value).removeprefix("torch.")
    name = value.__name__ if isinstance(value, type) else getattr(value, "name", value)
    return _our_word("dtype", name) if isinstance(name, str) else value


def precision_of_type(value: Any) -> Any:
    """Return the precision that computes in a dtype, such as `bf16`. Anything else is returned as it is."""
    return _our_word("precision", type_name(value))


def pool_name(value: Any) -> Any:
    """Return featcli's word for a pooling; one number becomes a grid of equal sides, such as `7x7`."""
    is_side = isinstance(value, Integral | str) and SIDE.fullmatch(str(value))
    return f"{value}x{value}" if is_side else _our_word("pool", value)


def format_name(value: Any) -> Any:
    """Return featcli's word for a file format."""
    return _our_word("format", value)


def dump_format(value: Any) -> Any:
    """Return featcli's word for the format of a dump. Raises UsageError for formats that only export writes."""
    name = format_name(value)
    if isinstance(name, str) and name in set(EXPORT_FORMATS) - set(FORMATS):
        raise UsageError(
            f"a dump cannot be stored as {name}", f"use featcli export --to {name}, which writes it from a dump"
        )
    return name


def _our_word(option: str, value: Any) -> Any:
    """Return featcli's word for one of another program. Any other value is returned as it is."""
    return OTHER_WORDS[option].get(value, value) if isinstance(value, str) else value


def _is_of_torch(value: Any, name: str) -> bool:
    """Return whether a value is of a class of torch, without importing torch, which takes seconds."""
    return (type(value).__module__, type(value).__name__) == ("torch", name)


def size_as_given(size: Any) -> Any:
    """Return a size as plain numbers or text, also one of numpy. Anything else is returned as it is."""
    plain = size.tolist() if hasattr(size, "tolist") else size
    if isinstance(plain, tuple | list):
        return tuple(size_as_given(edge) for edge in plain)
    return int(plain) if isinstance(plain, Integral) and not isinstance(plain, bool) else plain


def numbers_as_given(numbers: Any) -> Any:
    """Return numbers, in a text such as `0.5,0.5,0.5`, a list or an array, as a tuple. Anything else stays as it is."""
    plain = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    parts = listed_in(plain) if isinstance(plain, str) else _each(plain)
    try:
        return plain if any(isinstance(part, bool) for part in parts) else tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return plain


def interpolation_name(value: Any) -> Any:
    """Return the word for a filter of Pillow or torchvision, such as `Resampling.BOX`. Anything else stays as it is."""
    return value.name.lower() if isinstance(value, Enum) else value


def depth_as_given(depth: Any) -> Any:
    """Return two numbers, black and white, as the text `0:4095`. Anything else is returned as it is."""
    plain = depth.tolist() if hasattr(depth, "tolist") else depth
    is_pair = isinstance(plain, tuple | list) and len(plain) == 2
    if not is_pair or not all(isinstance(edge, Real) and not isinstance(edge, bool) for edge in plain):
        return plain
    return ":".join(str(int(edge) if isinstance(edge, Integral) else float(edge)) for edge in plain)


def parse_inputs(inputs: Any) -> tuple[str, ...]:
    """Return a path or URL, or any number of them, as a tuple of text. Raises UsageError."""
    if isinstance(inputs, str | os.PathLike):
        return (path_text(inputs),)
    try:
        found = tuple(path_text(one) for one in inputs)
    except TypeError:
        found = (inputs,)
    for one in found:
        if not isinstance(one, str):
            raise UsageError(f"input {shown(one)} is neither a path nor a URL", "give text, or a pathlib.Path")
    return found


def list_as_given(names: Any) -> Any:
    """Return the name of a file that lists images as text, or the listed paths of a Python list as a tuple of text.

    Raises UsageError for anything else, and for an empty name in a list.
    """
    if isinstance(names, str | os.PathLike):
        return path_text(names)
    if not isinstance(names, Iterable):
        raise UsageError(f"--files-from {shown(names)} is neither a file nor a list of paths", "give one of the two")
    found = tuple(path_text(one) for one in names)
    for one in found:
        if not isinstance(one, str):
            raise UsageError(f"listed image {shown(one)} is neither a path nor a URL", "give text, or a pathlib.Path")
        if not one:
            raise UsageError("a listed image is empty", "leave it out of the list, or write its path")
    return tuple(map(str, found))  # numpy's text becomes Python's


class TableInMemory:
    """A table in the memory of a Python program. What it holds is looked at when its rows are needed."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableInMemory) and self.table is other.table

    def __hash__(self) -> int:
        return id(self.table)

    def __reduce__(self) -> tuple[type[TableInMemory], tuple[None]]:
        """Leave the table behind: other processes are given their images one by one."""
        return TableInMemory, (None,)


def table_as_given(table: Any) -> str | TableInMemory:
    """Return the name of a file that holds a table as text, and any other table as it is. Raises UsageError."""
    if isinstance(table, str | os.PathLike):
        name = path_text(table)
        if not name:
            raise UsageError("--table is empty", "is a shell variable unset?")
        return str(name)
    return table if isinstance(table, TableInMemory) else TableInMemory(table)


def checked_key(key: Any) -> str:
    """Return a key that a user gives as text. Raises UsageError for one that the path of a file could not be."""
    text = os.fspath(key) if isinstance(key, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UsageError(f"key {shown(key)} is not a text", "give texts such as 'cats/1': str(key) makes one")
    parts = text.removeprefix("/").split("/")
    if {"", ".", ".."} & {*parts}:
        raise UsageError(
            f"key {shown(text)}: it is empty, or has an empty part, '.' or '..' in it", "write the key without that"
        )
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text) or not _can_be_a_name(text):
        raise UsageError(f"key {shown(text)}: it has a character that no key can have", "write the key without it")
    return str(text)


def _can_be_a_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def patterns_as_given(patterns: Any) -> tuple[str, ...]:
    """Return patterns of keys, one or several, as a tuple of text. Raises UsageError for anything else."""
    several = patterns if isinstance(patterns, Iterable) and not isinstance(patterns, str) else (patterns,)
    found = tuple(several)
    for one in found:
        if not isinstance(one, str):
            raise UsageError(f"--exclude {shown(one)} is not a text", "give a pattern of keys such as 'val/*'")
        if not one:
            raise UsageError("--exclude is empty", "is a shell variable unset? Leave it out to exclude nothing")
    return tuple(dict.fromkeys(map(str, found)))


def names_and_values(option: str, texts: Sequence[str]) -> None:
    """Check texts that are `NAME=VALUE`. Raises UsageError."""
    for text in texts:
        name, equals, _ = text.partition("=")
        if not (name and equals):
            raise UsageError(f"{option} {shown(text)} is not NAME=VALUE", "name a column and a value: split=train")


def no_empty_text(option: str, texts: Sequence[str]) -> None:
    """Check that no text is empty. Raises UsageError."""
    if not all(texts):
        raise UsageError(f"{option} is empty", "is a shell variable unset?")


def parse_number(option: str, text: str, kind: type[int] | type[float]) -> int | float:
    """Return a number of a type. Raises UsageError."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{option} {shown(text)} is not {what}", LEAVE_OUT) from None


def parse_model_args(asked: Any) -> tuple[str, ...]:
    """Return arguments of a model as texts with values in JSON, from texts such as `init_values=1e-5` or a mapping."""
    if isinstance(asked, str):
        asked = (asked,)
    if isinstance(asked, Mapping):
        found = {str(name): value for name, value in asked.items()}
    else:
        found = {}
        for text in asked if isinstance(asked, Iterable) else (asked,):
            name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
            if not (equals and name.isidentifier()):
                raise UsageError(
                    f"--model-arg {shown(text)} is not NAME=VALUE", "write for example --model-arg init_values=1e-5"
                )
            if name in found and found[name] != _value_of(value):
                raise UsageError(f"--model-arg {name} is given twice, with different values", "give it once")
            found[name] = _value_of(value)
    try:
        return tuple(f"{name}={json.dumps(value)}" for name, value in found.items())
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model-arg: {error}", "give numbers, words, or lists and dictionaries of them") from None


def as_given(name: str, value: Any) -> str:
    """Return an argument as it is written in a shell."""
    return shlex.quote(f"{name}={json.dumps(value)}")


def model_args(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values by name that `parse_model_args` has made texts of."""
    return {name: json.loads(value) for name, _, value in (text.partition("=") for text in texts)}


def _value_of(text: str) -> Any:
    """Return a value that JSON or Python would write so; any other text is a word."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_count(option: str, text: str) -> int | str:
    """Return `auto`, or a count. Raises UsageError."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise UsageError(f"{option} {shown(text)} is neither a number nor {AUTO}", LEAVE_OUT) from None


def count_up_to(most: int, or_auto: bool = True, least: int = 1) -> Check:
    """Return a check for a whole number from `least` to `most`, or `auto`."""

    def check(option: str, value: Any) -> None:
        if or_auto and isinstance(value, str) and value == AUTO:
            return
        _refuse_below(option, value, least, LEAVE_OUT, kind=int)
        if value > most:
            raise UsageError(f"{option} must be at most {most}, not {value}", LEAVE_OUT)

    return check


def at_least(least: int, hint: str = LEAVE_OUT) -> Check:
    """Return a check for a number that is at least `least`."""
    return lambda option, value: _refuse_below(option, value, least, hint)


def between(least: int, most: int, hint: str = LEAVE_OUT, most_said: str = "") -> Check:
    """Return a check for a number from `least` to `most`, which messages may write in another way."""

    def check(option: str, value: Any) -> None:
        _refuse_no_number(option, value)
        if not least <= value <= most:
            raise UsageError(f"{option} must be from {least} to {most_said or most}, not {value}", hint)

    return check


def within_picture(above_zero: bool) -> Check:
    """Return a check for numbers within the values of a picture, 0 to 1. With `above_zero` 0 is refused."""

    def check(option: str, values: Any) -> None:
        if not (isinstance(values, tuple) and values):
            hint = f"write one number for each channel, such as {option} 0.5,0.5,0.5, or one for all"
            raise UsageError(f"{option} {shown(str(values))} is not a list of numbers", hint)
        for value in values:
            if not 0 <= value <= 1 or (above_zero and value == 0):
                least = "above 0 and at most 1" if above_zero else "from 0 to 1"
                raise UsageError(
                    f"{option} must be {least}, not {value:g}",
                    "divide numbers for 0 to 255 by 255: it is for values of a picture from 0 to 1",
                )

    return check


def _refuse_below(option: str, value: Any, least: int, hint: str, kind: type = Real) -> None:
    _refuse_no_number(option, value, kind)
    if value < least:
        raise UsageError(f"{option} must be at least {least}, not {value}", hint)


def _refuse_no_number(option: str, value: Any, kind: type = Real) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{option} {shown(str(value))} is not a number", LEAVE_OUT)


def parse_size(text: str | int | Size | None, option: str = "--image-size") -> Size | None:
    """Return `"224"`, `"224x288"`, 224 or (224, 288) as (H, W), and None as None. Raises UsageError."""
    if text is None:
        return None
    text = "x".join(map(str, text)) if isinstance(text, tuple | list) else str(text)
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise UsageError(
            f"{option} {shown(text)} is not a size", "write for example 224, or 224x288 (height first), up to 99999"
        )
    return int(match[1]), int(match[2] or match[1])


def parse_depth_range(text: str | None, option: str = "--depth-range") -> tuple[float, float] | None:
    """Return `"0:4095"` as (0, 4095), and None as None. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"(-?[\d.]+(?:e[+-]?\d+)?):(-?[\d.]+(?:e[+-]?\d+)?)", text)
    try:
        low, high = (float(value) for value in match.groups()) if match else (0.0, 0.0)
    except ValueError:
        low = high = 0.0
    if not -1e38 < low < high < 1e38:
        raise UsageError(
            f"{option} {shown(text)} is not a range", "write the values of black and white, such as 0:4095"
        )
    return low, high


def parse_indices(asked: Any) -> tuple[int, ...] | Literal["all"] | None:
    """Return `"1,2,-1"`, `"(1, 2, -1)"`, (1, 2, -1), an array or one number as a tuple; `"all"` and None as they are.

    Raises UsageError.
    """
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
            f"--out-indices {shown(asked)} is not a list of whole numbers",
            "write for example --out-indices 1,2,-1, or a range of names: --out-features stage1:stage3",
        )
    if None in found:
        raise UsageError(
            f"--out-indices {shown(wrong)}: no stage has that index", "run featcli inspect, which lists the stages"
        )
    return tuple(index for index in found if index is not None)


def parse_features(asked: Any) -> tuple[str, ...] | None:
    """Return the parts of `"stem,stage2:stage4"`, `"['stem', 'stage2']"` or a sequence, and None as None.

    Ranges stay as they are until the names are known. Raises UsageError.
    """
    if asked is None:
        return None
    if not isinstance(asked, str):
        names = _each(asked)
        wrong = next((one for one in names if not isinstance(one, str)), "")
        if not isinstance(wrong, str):
            raise UsageError(
                f"--out-features {shown(wrong)}: no stage has that name", "run featcli inspect, which lists the stages"
            )
        return tuple(map(str, names))  # numpy's text becomes Python's
    parts = tuple(listed_in(asked))
    if not all(parts):
        raise UsageError(
            f"--out-features {shown(asked)}: one of the names is empty", "write for example --out-features stem,stage2"
        )
    return parts


def listed_in(text: str) -> list[str]:
    """Return the parts of a text with commas. It may be written as Python writes a tuple or a list.

    One comma may stand after the last part, and quotes around each.
    """
    inner = text.strip()
    is_python = inner[:1] + inner[-1:] in ("()", "[]")
    parts = [part.strip() for part in (inner[1:-1] if is_python else inner).split(",")]
    if not parts[-1] and (is_python or len(parts) > 1):
        parts.pop()
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts]


def _each(asked: Any) -> tuple[Any, ...]:
    """Return all items of an iterable, or a single value by itself."""
    try:
        return tuple(asked)
    except TypeError:
        return (asked,)


def _index(value: Any) -> int | None:
    """Return a whole number of Python, numpy, torch or in a text; None for anything else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[+-]?\d{1,9}", value.strip(), re.ASCII) else None
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith(("bool", "bool_")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def parse_pool(name: str) -> Size | None:
    """Return the grid (H, W) of `7x7`, or None for a name of POOLS. Raises UsageError."""
    if name in POOLS:
        return None
    if isinstance(name, str) and (grid := GRID.fullmatch(name)):
        return int(grid[1]), int(grid[2])
    raise UsageError(f"--pool cannot be {shown(str(name))}", f"use {', '.join(POOLS)}, or a grid such as 7x7")


def parse_pools(asked: Any) -> tuple[str, ...]:
    """Reductions as texts, `none,cls` for all maps first, then `stage4=avg,cls` for those of one stage.

    They come as such texts, one or several, or as a mapping of lists by stage. Raises UsageError.
    """
    for_all: list[str] = []
    of_stage: dict[str, list[str]] = {}
    if isinstance(asked, Mapping):
        pairs = [(str(name), value) for name, value in asked.items()]
    else:
        parts = [asked] if isinstance(asked, str | Integral) or not isinstance(asked, Iterable) else list(asked)
        pairs = [one.rpartition("=")[::2] if isinstance(one, str) else ("", one) for one in parts]
    for stage, value in pairs:
        several = isinstance(value, Iterable) and not isinstance(value, str)
        names = [pool_name(one) for one in (value if several else listed_in(str(value)))]
        into = of_stage.setdefault(stage, []) if stage else for_all
        for name in names:
            parse_pool(name)
            if name in into:
                raise UsageError(f"--pool names {name} twice", "give each reduction once")
            into.append(name)
    texts = [",".join(for_all)] if for_all else []
    return (*texts, *(f"{stage}={','.join(names)}" for stage, names in of_stage.items()))


def pools_by_stage(texts: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What `parse_pools` keeps: the reductions for all maps, empty where none are given, and those by stage."""
    pairs = [text.rpartition("=")[::2] for text in texts]
    lists = [(stage, tuple(names.split(","))) for stage, names in pairs]
    return next((names for stage, names in lists if not stage), ()), {stage: names for stage, names in lists if stage}


def parse_part(text: str) -> tuple[int, int] | Literal["auto"]:
    """Return `"1/4"` as (1, 4), the second of four parts, and `"auto"` as it is. Raises UsageError."""
    if text == AUTO:
        return AUTO
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None:
        raise UsageError(f"--part {shown(text)} is not a part", f"{HOW_PARTS}, or {AUTO}")
    index, count = int(found[1]), int(found[2])
    refuse_no_part(index, count)
    return index, count


def refuse_no_part(index: int, count: int) -> None:
    """Raise UsageError if there is no such part."""
    if not 0 <= index < count:
        raise UsageError(f"--part {index}/{count}: i is counted from 0, so it must be less than n", HOW_PARTS)
