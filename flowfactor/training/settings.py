"""One reader of settings, for files, command lines and Python alike: values become what annotations say."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from flowfactor._checks import did_you_mean
from flowfactor.errors import require


class SettingError(ValueError):
    """A setting is unknown, or its value is not what it has to be.

    Args:
        key: Its dotted name.
        problem: What is wrong with it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


def read(key: str, kind: Any, value: Any) -> Any:
    """Makes a value what its annotation says, or tells what is wrong with it.

    Text where no text is expected is read as on the command line, since YAML 1.1 takes 1e-3 for text.

    Args:
        key: Name of the setting.
        kind: Its annotation: `bool`, `int`, `float`, `str`, a `Literal`, lists, tuples and mappings of these, unions, `Any`.
        value: What was given for it.

    Returns:
        The value, plain and of that type.

    Raises:
        SettingError: If it is of another type.

    Example:
        >>> read("train.learning_rate", float, "1e-3"), read("train.steps", int | None, None)
        (0.001, None)
        >>> read("train.steps", int | None, 10.5)
        Traceback (most recent call last):
        ...
        flowfactor.training.settings.SettingError: train.steps must be a whole number or null, got 10.5
    """
    given = value
    if isinstance(value, str) and value.strip() and not any(_takes_text(member) for member in _members(kind)):
        value = _parse(value)
        if isinstance(value, str):  # it was in quotes
            value = _parse(value)
    try:
        return _fitted(kind, value)
    except _MisfitError as misfit:
        near = did_you_mean(given, _literals(kind)) if isinstance(given, str) else ""
        shown = short(misfit.value if misfit.place else given)
        raise SettingError(key + misfit.place, f"must be {misfit.expected}, got {shown}{near}") from None


def read_text(key: str, kind: Any, text: str) -> Any:
    """Reads a setting from the text of a command line; see `read`.

    Example:
        >>> read_text("output", str, "007"), read_text("data.root", str | None, "null")
        ('007', None)
    """
    members = _members(kind)
    if not any(_takes_text(member) for member in members):
        return read(key, kind, text if text.strip() else None)
    parsed = _parse(text)
    if kind is Any:
        return read(key, kind, parsed)
    # What can be text is text, but for null, and lists and mappings, where these are possible.
    if not isinstance(parsed, (dict, list, types.NoneType)) or not text.strip():
        return read(key, kind, text)
    try:
        return _fitted(kind, parsed)
    except _MisfitError:
        return read(key, kind, text)


def check_settings(settings: Any, section: str) -> None:
    """Makes every field of a dataclass of settings what its annotation says, in place.

    Args:
        settings: The dataclass.
        section: What its keys begin with, such as ``"train."``.

    Raises:
        SettingError: If a value is of another type.
    """
    for name, kind in kinds(type(settings)).items():
        setattr(settings, name, read(section + name, kind, getattr(settings, name)))


def kinds(kind: type[Any]) -> dict[str, Any]:
    """The annotation of every field of a dataclass; one of names out of a registry is of those that it has now."""
    return {
        name: Literal[tuple(hint.__metadata__[0])] if get_origin(hint) is Annotated else hint
        for name, hint in _hints(kind).items()
    }


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(kind)}


def unknown_key(key: str, known: Sequence[str]) -> SettingError:
    """The error of a key that there is not, with the one of its section (or given as a whole) that may have been meant."""
    section = key.rpartition(".")[0]
    near = did_you_mean(key, [name if "." in name else f"{section}.{name}".strip(".") for name in known])
    return SettingError(key, f"is no setting{near}" if near else f"is no setting: choose among {', '.join(known)}")


def short(value: Any) -> str:
    """A value in no more than 80 letters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no longer ones
        return "a number of more than 4300 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


class _MisfitError(Exception):
    """A value is not of a type."""

    def __init__(self, expected: str, value: Any, place: str = "") -> None:
        super().__init__(expected)
        self.expected, self.value, self.place = expected, value, place


def _parse(text: str) -> Any:
    require("yaml", extra="train")
    from flowfactor.training._yaml import parse

    return parse(text)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _takes_text(kind: Any) -> bool:
    return kind is str or kind is Any or get_origin(kind) is Literal


def _literals(kind: Any) -> Iterator[str]:
    for member in _members(kind):
        if get_origin(member) is Literal:
            yield from (name for name in get_args(member) if isinstance(name, str))


def _fitted(kind: Any, value: Any) -> Any:
    """The value as of a type; raises `_MisfitError`."""
    misfits: list[_MisfitError] = []
    for member in _members(kind):
        try:
            return _fitted_to_one(member, value)
        except _MisfitError as misfit:
            misfits.append(misfit)
    # The one that got furthest into a list or mapping says most.
    deepest = max(misfits, key=lambda misfit: len(misfit.place))
    if deepest.place or len(misfits) == 1:
        raise deepest
    raise _MisfitError(" or ".join(describe_kind(member) for member in _members(kind)), value)


def _fitted_to_one(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain(value)
    if kind in (None, types.NoneType):
        fits, made = value is None, None
    elif kind is bool:
        fits, made = isinstance(value, bool), value
    elif kind is int:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        made = int(value) if fits else None
    elif kind is float:
        fits = _is_number(value)
        made = float(value) if fits else None
    elif kind is str:
        fits = isinstance(value, (str, os.PathLike))
        made = os.fspath(value) if fits else None
    elif origin is Literal:
        fits, made = isinstance(value, (str, int)) and value in arguments, value
    elif origin in (list, Sequence):
        return _fitted_list(kind, [arguments[0]] * _length(value), value, list)
    elif origin is tuple:
        return _fitted_list(kind, arguments, value, tuple)
    elif kind in (dict, Mapping) or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _MisfitError(describe_kind(kind), value)
        return _plain(value)
    else:
        raise TypeError(f"there is no reader of {kind}")
    if not fits:
        raise _MisfitError(describe_kind(kind), value)
    return made


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else 0


def _fitted_list(kind: Any, members: Sequence[Any], value: Any, make: type[Any]) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != len(members):
        raise _MisfitError(describe_kind(kind), value)
    try:
        return make(_fitted(member, entry) for member, entry in zip(members, value, strict=True))
    except _MisfitError as misfit:
        raise _MisfitError(describe_kind(kind), value) from misfit


def _plain(value: Any, place: str = "") -> Any:
    """The same in plain values: what JSON and YAML can hold."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if _is_number(value):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry, place) for entry in value]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise _MisfitError("a mapping whose keys are text", value, place)
        return {name: _plain(entry, f"{place}.{name}") for name, entry in value.items()}
    expected = "a finite number" if isinstance(value, Real) else "numbers, text, lists or mappings"
    raise _MisfitError(expected, value, place)


def describe_kind(kind: Any) -> str:
    """What an annotation asks for, in words.

    Example:
        >>> describe_kind(int | None), describe_kind(Literal["wall", "processor"]), describe_kind(tuple[float, float])
        ('a whole number or null', 'one of wall, processor', 'a list of 2 numbers')
    """
    origin, arguments = get_origin(kind), get_args(kind)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind in plain:
        return plain[kind]
    if kind in (None, types.NoneType):
        return "null"
    if origin is Literal:
        names = ", ".join(map(str, arguments))
        return f"one of {names}" if len(arguments) > 1 else names
    if origin in (Union, types.UnionType):
        return " or ".join(describe_kind(member) for member in arguments)
    if origin in (list, Sequence, tuple):
        count = f"{len(arguments)} " if origin is tuple else ""
        return f"a list of {count}{_PLURAL.get(arguments[0], 'values')}"
    if kind in (dict, Mapping) or origin in (dict, Mapping):
        return "a mapping"
    return "a value"


_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
