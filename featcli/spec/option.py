"""Define what specs are made of: dataclass fields.

Their annotations say how an option looks in a shell, and what is valid.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from featcli.errors import UsageError, one_of, shown

P = ParamSpec("P")
R = TypeVar("R")
# Each takes the option as messages call it, then its text or value, and raises UsageError.
Parser = Callable[[str, str], Any]
Check = Callable[[str, Any], object]


@dataclass(frozen=True)
class Other:
    """Another option of the same spec that an option needs or excludes, and what to do about it."""

    name: str
    hint: str
    value: Any = None  # the value that matters; None stands for any that is not the default


@dataclass(frozen=True)
class Option:
    """How a field is given in a shell: `Annotated[int, Option("Larger pictures are failures.")]`."""

    help: str
    flags: tuple[str, ...] = ()  # by default --name-of-the-field
    group: str = ""  # its heading in the help
    metavar: str | None = None
    is_argument: bool = False  # given by its place, without a flag
    parse: Parser | None = None  # text from the shell -> value, if the text is not the value
    check: Check | None = None  # for what the type does not say
    keep: Callable[[Any], Any] | None = None  # value -> what the field holds, such as a tuple for a generator
    offers: tuple[str, ...] = ()  # words that a shell offers, if the type does not name them
    known_as: tuple[str, ...] = ()  # names in other programs, which the hint for a wrong name knows
    is_model: bool = False  # whether a shell offers the names of models
    stands_for: Any = None  # what None means, if that is one of the values
    needs: Other | None = None  # without it this option has no effect
    excludes: tuple[Other, ...] = ()  # with one of these this option has no effect, or no sense


@dataclass(frozen=True)
class OptionField:
    """An option, and the field that declares it."""

    name: str
    type: Any  # without the Option
    option: Option
    default: Any  # dataclasses.MISSING if it must be given

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    @property
    def is_repeated(self) -> bool:
        """Whether it takes any number of values, such as INPUT; its default is then ()."""
        return bool(self.default == ())

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags as they are written in a shell; a switch has two, `--fold/--no-fold`."""
        name = self.name.replace("_", "-")
        return self.option.flags or (f"--{name}/--no-{name}" if self.kinds == {bool, type(None)} else f"--{name}",)

    @property
    def called(self) -> str:
        """The name in messages: its long flag."""
        return self.flags[-1].partition("/")[0]

    @property
    def named(self) -> str:
        """The name in messages about a place: the word for an argument, or a long flag."""
        return (self.option.metavar or "").strip("[]. ") if self.option.is_argument else self.called

    def is_given(self, value: Any) -> bool:
        """Return whether a value differs from the default."""
        return value is not None and value != self.default and value != self.option.stands_for

    @property
    def kinds(self) -> set[Any]:
        """The types of its values; for `int | Literal["auto"]` these are int and Literal."""
        parts = get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)
        return {get_origin(part) or part for part in parts if not isinstance(part, str)}

    @property
    def words(self) -> tuple[str, ...]:
        """The words that it takes, if its type names them."""
        parts = (self.type,) if get_origin(self.type) is Literal else get_args(self.type)
        return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))

    def kept(self, value: Any) -> Any:
        """Return what the field holds for a value. Raises UsageError for one that is wrong by itself."""
        kinds = self.kinds - {type(None)}
        if value is self.default or (value is None and kinds != self.kinds):
            return value
        kept = value if self.option.keep is None else self.option.keep(value)
        kept = str(kept) if isinstance(kept, str) else kept  # numpy's text becomes Python's
        if kinds == {Literal}:
            one_of(self.called, kept if isinstance(kept, str) else repr(kept), self.words)
        if kinds == {bool}:
            if type(kept).__name__ not in ("bool", "bool_", "int") or kept not in (0, 1):
                raise UsageError(f"{self.called} {shown(kept)} is neither on nor off", "give True or False")
            kept = bool(kept)
        if kinds <= {str, os.PathLike} and not isinstance(kept, tuple(kinds)):
            raise UsageError(f"{self.called} {shown(kept)} is not a text", "give it as in a shell, as one text")
        if kinds & {int, float} and kinds <= {int, float, Literal}:
            kept = kept if isinstance(kept, str) and kept in self.words else self._number(kept, float not in kinds)
        if self.option.check is not None:
            self.option.check(self.named, kept)
        return kept

    def _number(self, value: Any, is_whole: bool) -> int | float:
        """Return a number of Python, of numpy or in a text as Python has it. Raises UsageError for anything else."""
        kind: Any = Integral if is_whole else Real
        with suppress(ValueError):
            if (isinstance(value, str) and value.isascii()) or (
                isinstance(value, kind) and not isinstance(value, bool)
            ):
                return int(value) if is_whole or isinstance(value, Integral) else float(value)
        what = "whole number" if is_whole and isinstance(value, Real) else "number"
        raise UsageError(f"{self.called} {shown(str(value))} is not a {what}", "leave it out for the default")


class Spec:
    """Something that can be asked for: a frozen dataclass of options. Wrong values raise UsageError when it is made.

    Its `__eq__`, `__hash__` and `__repr__` are written here, because a dataclass would make them for every spec, which
    takes a tenth of the time of `featcli --help`.
    """

    typed = frozenset[str]()  # options that stood in a command line or a call, even with their default

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, one.name) == getattr(other, one.name) for one in options_of(type(self)))

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in options_of(type(self))))

    def __repr__(self) -> str:
        given = (f"{one.name}={getattr(self, one.name)!r}" for one in options_of(type(self)))
        return f"{type(self).__name__}({', '.join(given)})"

    def __post_init__(self) -> None:
        for field in options_of(type(self)):
            object.__setattr__(self, field.name, field.kept(getattr(self, field.name)))
        self.refuse_conflicts()

    def refuse_conflicts(self) -> None:
        """Raise UsageError for options that do not go together, or have no effect with others.

        Most options say so themselves, by `needs` and `excludes`. A group adds what depends on more, after it calls
        `super()`.
        """
        for one in options_of(type(self)):
            needed = one.option.needs
            if not (needed or one.option.excludes) or not one.is_given(getattr(self, one.name)):
                continue
            if needed is not None and not self.has(needed):
                raise UsageError(f"{one.named} needs {self._named(needed)}", needed.hint)
            for other in one.option.excludes:
                if self.has(other):
                    raise UsageError(f"{self._shown(one)} cannot be used with {self._named(other)}", other.hint)

    def is_given(self, name: str) -> bool:
        """Return whether an option has another value than its default."""
        return any(one.name == name and one.is_given(getattr(self, name)) for one in options_of(type(self)))

    def has(self, other: Other) -> bool:
        """Return whether the other option is given, or has the value that matters.

        False if the group has no such option.
        """
        return self.is_given(other.name) if other.value is None else getattr(self, other.name, None) == other.value

    def refuse_given(self, names: Iterable[str], what: str, hint: str) -> None:
        """Raise UsageError if one of these options is given; `what` says why."""
        given = next((one for one in options_of(type(self)) if one.name in names and self.is_given(one.name)), None)
        if given is not None:
            raise UsageError(f"{given.named} {what}", hint)

    def _named(self, other: Other) -> str:
        named = next(one.named for one in options_of(type(self)) if one.name == other.name)
        return named if other.value is None else f"{named} {other.value}"

    def _shown(self, one: OptionField) -> str:
        """Return the option, with its value if that is one of some words."""
        return f"{one.named} {getattr(self, one.name)}" if one.words and len(one.words) > 1 else one.named


def options_of(spec: type[Spec]) -> tuple[OptionField, ...]:
    """Return the options of a spec in the order of its fields, without fields that are no options."""
    return _options_of(spec)  # type: ignore[arg-type]  # mypy takes the hash of a spec for that of its class


@functools.cache
def _options_of(spec: type[Spec]) -> tuple[OptionField, ...]:
    found = []
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]  # every spec is a dataclass
        if get_origin(field.type) is Annotated:
            kind, option = get_args(field.type)[:2]
            found.append(OptionField(field.name, kind, option, field.default))
    return tuple(found)


def shared_options(asked: Spec, other: type[Spec]) -> dict[str, Any]:
    """Return the options of a spec that another has, too, by name, without those that None leaves at their default."""
    names = {field.name for field in options_of(other)} & {field.name for field in options_of(type(asked))}
    found = {name: getattr(asked, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def narrowed(asked: Any, spec: Callable[P, R]) -> R:
    """Return a smaller spec with its fields taken from a larger one."""
    return spec(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(spec)})  # type: ignore


def takes(spec: Callable[P, object]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function of one spec the keywords of that spec.

    Editors, type checkers, `help()` and `typing.get_type_hints` see every keyword with its type. A keyword that is
    unknown or missing raises TypeError with the name of the function, as Python itself does.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        hints = get_type_hints(spec)  # without the options
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(spec).parameters.values()
        ]
        returned = inspect.signature(function).return_annotation
        signature = inspect.Signature(parameters, return_annotation=returned)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind_partial(*args, **kwargs)  # before a mistyped one is called missing
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            asked = spec(*args, **kwargs)
            object.__setattr__(asked, "typed", frozenset(bound.arguments))
            return function(asked)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {**{one.name: one.annotation for one in parameters}, "return": returned}
        return call

    return decorate
