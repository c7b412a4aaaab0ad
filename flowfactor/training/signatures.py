"""The settings that there are, with their types and help.

Those of flowfactor's own are read from source: nothing that takes long is imported for it.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowfactor._datasets import DATASETS
from flowfactor._methods import METHODS
from flowfactor.training.settings import kinds, read, unknown_key

_ROOT = Path(__file__).parent.parent
_KNOWN = {
    **{kind.__name__: kind for kind in (bool, int, float, str, tuple, list, dict)},
    "Any": Any,
    "Literal": Literal,
    "Mapping": Mapping,
    "Sequence": Sequence,
}
_NO_SETTINGS = ("self", "name", "generator")


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        name: Its name.
        kind: Its type.
        default: Its value where it is not given.
        help: What it means.
    """

    name: str
    kind: Any
    default: Any
    help: str


def of_dataclass(kind: type[Any]) -> list[Setting]:
    """The settings that are the fields of a dataclass.

    Args:
        kind: The dataclass.

    Returns:
        The settings, in order.
    """
    helps = _helps(inspect.getdoc(kind) or "")
    made = []
    for entry in fields(kind):
        factory = entry.default_factory
        default = factory() if callable(factory) else entry.default
        made.append(Setting(entry.name, kinds(kind)[entry.name], default, helps.get(entry.name, "")))
    return made


@cache
def of_source(place: str, other: Any = None) -> dict[str, Setting]:
    """The settings that a function, a constructor or a dataclass takes, from its source.

    Args:
        place: Where it stands, such as ``"models/build.py:build_vae"``.
        other: What stands for an annotation that no file can write down; None leaves such arguments out.

    Returns:
        Those that can be written down, by name: parts that only Python can make are left out.

    Example:
        >>> of_source("models/build.py:build_vae")["latent_dim"].default
        48
    """
    file, _, name = place.partition(":")
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if getattr(node, "name", None) == name)
    assert isinstance(found, (ast.FunctionDef, ast.ClassDef))
    helps = _helps(ast.get_docstring(found) or "")
    settings = {}
    for entry, annotation, default in _parameters(found):
        kind = _annotated(annotation, other)
        if kind is not None and entry not in _NO_SETTINGS:
            value = _evaluated(default) if default else None
            settings[entry] = Setting(entry, kind, value, helps.get(entry, ""))
    return settings


def of_callable(made: Callable[..., Any], other: Any = None) -> dict[str, Setting]:
    """The settings that a function or a class of the user's takes, from its signature.

    Args:
        made: The function or class; where a constructor hands ``**kwargs`` on, the arguments of its base count too.
        other: What stands for an annotation that no file can write down; None leaves such arguments out.

    Returns:
        The settings by name. Without an annotation any value will do.

    Example:
        >>> def build(image_shape, num_flows, latent_dim, *, width: int = 8): ...
        >>> of_callable(build)["width"].default
        8
    """
    owners = [made]
    if isinstance(made, type):
        owners = [base.__dict__["__init__"] for base in made.__mro__ if "__init__" in base.__dict__]
    helps = _helps(inspect.getdoc(made) or "")
    settings: dict[str, Setting] = {}
    for owner in owners:
        taken = inspect.signature(owner).parameters.values()
        try:
            hints = get_type_hints(owner)
        except (NameError, TypeError):  # names that are imported for type checkers alone
            hints = {}
        for found in taken:
            if found.kind in (found.VAR_POSITIONAL, found.VAR_KEYWORD) or found.name in _NO_SETTINGS:
                continue
            kind = _writable(hints.get(found.name, Any), other)
            if kind is not None:
                default = None if found.default is found.empty else found.default
                settings.setdefault(found.name, Setting(found.name, kind, default, helps.get(found.name, "")))
        if not any(found.kind is found.VAR_KEYWORD for found in taken):
            break
    return settings


def _collected(places: Sequence[str | Callable[..., Any]], other: Any = None) -> dict[str, Setting]:
    made: dict[str, Setting] = {}
    for place in places:
        found = of_source(place, other) if isinstance(place, str) else of_callable(place, other)
        made |= {name: setting for name, setting in found.items() if name not in made}
    return made


def model_settings(method: str) -> dict[str, Setting]:
    """The settings of a method's model.

    Args:
        method: One of `flowfactor.models.METHODS`.

    Returns:
        The settings by name.

    Example:
        >>> "beta" in model_settings("beta-vae"), "beta" in model_settings("ours")
        (True, False)
    """
    return _collected(METHODS[method].settings_from)


def data_settings(name: str) -> dict[str, Setting]:
    """The options of a data set, in ``data.options``.

    Args:
        name: A name that ``data.name`` takes.

    Returns:
        The options by name.

    Example:
        >>> list(data_settings("digits"))
        ['colour', 'start', 'direction', 'ranges']
    """
    source = DATASETS[name]
    found = _collected(source.options_from, Any)
    return {option: setting for option, setting in found.items() if option not in source.hidden}


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the options of a data set what it takes.

    Args:
        name: A name that ``data.name`` takes.
        options: What was given.

    Returns:
        The options.

    Raises:
        TypeError: If there is no such option.
        ValueError: If a value is of another type.
    """
    known = data_settings(name)
    unknown = [option for option in options if option not in known]
    if unknown and not DATASETS[name].open_ended:
        told = unknown_key(f"data.options.{unknown[0]}", [f"data.options.{option}" for option in known])
        raise TypeError(f"{told} (an option of the data set {name})")
    return {
        option: read(f"data.options.{option}", known[option].kind, value) if option in known else value
        for option, value in options.items()
    }


def read_model(method: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the settings of a method's model what its builder takes; see `flowfactor.training.settings.read`."""
    known = model_settings(method)
    made = {}
    for name, value in model.items():
        if name not in known:
            raise unknown_key(f"model.{name}", list(known))
        made[name] = read(f"model.{name}", known[name].kind, value)
    return made


def _parameters(found: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of each parameter, or of each field of a dataclass."""
    function: Any = found
    if isinstance(found, ast.ClassDef):
        function = next((part for part in found.body if getattr(part, "name", None) == "__init__"), None)
        if function is None:
            for part in found.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    yield part.target.id, part.annotation, part.value
            return
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    arguments = [*positional, *given.kwonlyargs]
    for argument, default in zip(arguments, [*defaults, *given.kw_defaults], strict=True):
        yield argument.arg, argument.annotation, default


def _annotated(annotation: ast.expr | None, other: Any) -> Any:
    """The type that an annotation leaves where values are plain, or None where none of it can be written down."""
    members = []
    for part in _flat(annotation):
        known = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)} <= {*_KNOWN}
        members.append((_evaluated(part, _KNOWN) or types.NoneType) if known else other)
    return _either(members)


def _writable(kind: Any, other: Any) -> Any:
    """The part of a type that a file can hold, as the reader of settings knows it; ``other`` where there is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _either([_writable(member, None) for member in arguments]) or other
    if kind in (Any, bool, int, float, str, types.NoneType) or origin is Literal:
        return kind
    if isinstance(kind, type) and issubclass(kind, Path):
        return str
    if kind in (dict, Mapping) or origin in (dict, Mapping):
        return dict[str, Any]
    if kind in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        inner = [_writable(member, None) for member in arguments if member is not Ellipsis]
        if None in inner:
            return other
        exact = origin is tuple and Ellipsis not in arguments and inner
        return tuple[tuple(inner)] if exact else list[inner[0] if inner else Any]
    return other


def _either(members: Sequence[Any]) -> Any:
    """The union of types, less those that are None; None where no value but null is left."""
    kept = [member for member in members if member is not None]
    if all(member is types.NoneType for member in kept):
        return None
    return Any if Any in kept else reduce(or_, kept)


def _evaluated(expression: ast.expr, names: Mapping[str, Any] | None = None) -> Any:
    """The value of an expression of our own source; its text where it is made of names of its module."""
    try:
        return eval(compile(ast.Expression(expression), "source", "eval"), {"__builtins__": {}}, names)
    except NameError:
        return ast.unparse(expression)


def _flat(annotation: ast.expr | None) -> Iterator[ast.expr]:
    if isinstance(annotation, ast.BinOp):
        yield from _flat(annotation.left)
        yield from _flat(annotation.right)
    elif annotation is not None:
        yield annotation


def _helps(docstring: str) -> dict[str, str]:
    """What a docstring of Google's style says of each argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n(?: {8}.*|(?=\n)))*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
