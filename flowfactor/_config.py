"""Parts as JSON values, so that a model can be saved as config.json and rebuilt from it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowfactor.registry import Recorded, UnknownPartError, former_names, kind_of, make, name_of, registered

T = TypeVar("T", bound="Named")

_PACKAGES = ("potentials", "fields", "encoders", "priors", "regularizers")


class Configured(Recorded):
    """A part that tells its constructor arguments."""

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values: ``type(part)(**part.config)`` rebuilds the architecture."""
        written = {key: (value, _value(value)) for key, value in _arguments(self).items()}
        return {key: value if _holds_custom(plain) else plain for key, (value, plain) in written.items()}


class Named(Configured):
    """A part that settings name by a word, with options beside it."""

    @property
    def config(self) -> dict[str, Any]:
        """Name and constructor arguments, as JSON values, from which the architecture is rebuilt."""
        return {"name": name_of(type(self)) or type(self).__name__, **super().config}


def named(kind: type[T], given: T | str | Mapping[str, Any]) -> T:
    """Gives a part from what a user or a config file names.

    Args:
        kind: The base class of its kind.
        given: A part (returned as it is), a name, or a mapping of name and options such as its `Named.config`.

    Returns:
        The part.

    Raises:
        ValueError: If the name or an option is unknown.
        TypeError: If it is none of these.
    """
    if isinstance(given, kind):
        return given
    if not isinstance(given, (str, Mapping)):
        raise TypeError(
            f"{kind.kind_of_part} must be a {kind.__name__}, a name or a config mapping, got {type(given).__name__}"
        )
    return make(kind.kind_of_part, given)


def describe(part: Any, by_type: bool = False) -> dict[str, Any] | None:
    """Writes a part as JSON values; None for one of the user's own that is not registered.

    Args:
        part: A potential, field, encoder, decoder, prior, force, objective or estimator.
        by_type: Whether to write those that have names by their types too, as constructors of users' parts need it.

    Returns:
        ``{"type": "potentials.MLPPotential", "arguments": {...}}``, or `Named.config`; None where the part, or one inside
        it, is neither flowfactor's nor registered, and has to be handed over again by whoever loads the model.
    """
    part = uncompiled(part)
    by_name = isinstance(part, Named) and not by_type
    name = name_of(type(part)) if by_name else type_name(type(part))
    if name is None or not hasattr(part, "_arguments"):
        return None
    written = {key: _value(value, _is_foreign(part)) for key, value in _arguments(part).items()}
    if _holds_custom(written):
        return None
    return {"name": name, **written} if by_name else {"type": name, "arguments": written}


def uncompiled(part: Any) -> Any:
    """Gives what `torch.compile` wrapped, or what is not wrapped as it is."""
    return getattr(part, "_orig_mod", part)


def plain_name(name: str) -> str:
    """Gives the name of a weight as it is where nothing is compiled.

    Example:
        >>> plain_name("decoder._orig_mod.layers.0.weight")
        'decoder.layers.0.weight'
    """
    return name.replace("_orig_mod.", "")


def rebuild(config: dict[str, Any]) -> Any:
    """Rebuilds what `describe` wrote; only parts of flowfactor and registered ones can be named.

    Args:
        config: The description.

    Returns:
        The part, with fresh weights.

    Raises:
        ValueError: If the type is unknown.
    """
    cls = _class_of(str(config.get("type", "")))
    arguments = {key: read(value) for key, value in config["arguments"].items()}
    for old, new in former_names(cls).items():
        if old in arguments:
            arguments[new] = arguments.pop(old)
    positional = arguments.pop("*", [])
    if not positional:
        return cls(**arguments)
    # Arguments before the variadic ones have to be given by position.
    signature = list(inspect.signature(cls.__init__).parameters.values())[1:]
    variadic = [p.kind for p in signature].index(inspect.Parameter.VAR_POSITIONAL)
    leading = [arguments.pop(p.name) for p in signature[:variadic] if p.name in arguments]
    return cls(*leading, *positional, **arguments)


def type_name(cls: type[Any]) -> str | None:
    """What a file calls a class of parts: ``"potentials.MLPPotential"``, ``"potential:well"`` where it is registered."""
    name = name_of(cls)
    if name in registered(kind_of(cls)):
        return f"{kind_of(cls)}:{name}"
    for package in _PACKAGES:
        if cls.__name__ in (module := importlib.import_module(f"flowfactor.{package}")).__all__:
            return f"{package}.{cls.__name__}" if getattr(module, cls.__name__) is cls else None
    return None


def _class_of(name: str) -> type[Any]:
    """The class of a `type_name`: nothing else is ever made, or imported, for a file."""
    kind, colon, own = name.partition(":")
    if colon and own in registered(kind):
        return registered(kind)[own]
    if colon:
        raise UnknownPartError(
            f"a model file names the {kind} {own!r}, which is not registered here: import the module that has "
            f"@flowfactor.register_{kind}({own!r}) before its class"
        )
    package, _, cls = name.partition(".")
    known = importlib.import_module(f"flowfactor.{package}") if package in _PACKAGES else None
    found = getattr(known, cls) if known is not None and cls in known.__all__ else None
    if not isinstance(found, type) or not issubclass(found, Recorded):
        raise ValueError(f"a model file names the part {name!r}, which this flowfactor does not have")
    return found


_CUSTOM: Any = object()


def _arguments(part: Recorded) -> dict[str, Any]:
    """The arguments of a part's constructor, ``"*"`` for variadic ones."""
    args, kwargs = part._arguments
    signature = inspect.signature(type(part).__init__)
    bound = signature.bind(part, *args, **kwargs)
    if isinstance(part, Configured) or _is_foreign(part):
        bound.apply_defaults()
    arguments: dict[str, Any] = {}
    unwritten = getattr(part, "unwritten", Recorded.unwritten)
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.name not in bound.arguments or parameter.name in unwritten:
            continue
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= value
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = value
        elif value:
            arguments["*"] = value
    return arguments | getattr(part, "_filled_in", {})


def _is_foreign(part: object) -> bool:
    return not type(part).__module__.startswith("flowfactor.")


def _holds_custom(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_custom, value.values()))
    return value is _CUSTOM or (isinstance(value, list) and any(map(_holds_custom, value)))


def _value(value: Any, by_type: bool = False) -> Any:
    if isinstance(value, Tensor):
        # Its values come back with the weights.
        return {"tensor": list(value.shape)} if value.ndim else value.item()
    if isinstance(value, (nn.Module, Recorded)):
        written = describe(value, by_type)
        return _CUSTOM if written is None else written
    if isinstance(value, Mapping):
        return {key: _value(v, by_type) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(v, by_type) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):  # such as NumPy's
        return int(value)
    return _CUSTOM


def read(value: Any) -> Any:
    """Makes the parts that JSON values describe, wherever they stand in them."""
    if isinstance(value, dict) and "type" in value:
        return rebuild(value)
    if isinstance(value, dict) and "tensor" in value:
        return torch.zeros(value["tensor"])
    if isinstance(value, dict):
        return {key: read(v) for key, v in value.items()}
    if isinstance(value, list):
        return [read(v) for v in value]
    return value
