"""Modules that remember how they were made, so that a model can be saved as config.json and rebuilt from it."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGES = ("potentials", "fields", "encoders", "regularizers")
_DROPPED = ("self", "generator")


class Recorded:
    """Keeps the constructor's arguments of a module in ``_arguments``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))
        return self


def describe(module: nn.Module) -> dict[str, Any] | None:
    """Writes a part of flowfactor as JSON values; None for a part of the user's own.

    Args:
        module: A potential, field, encoder, decoder or force.

    Returns:
        ``{"type": "potentials.MLPPotential", "arguments": {...}}``, or None where the part, or one inside it, is not
        flowfactor's and has to be handed over again by whoever loads the model.
    """
    module = uncompiled(module)
    name = _public_name(type(module))
    if name is None:
        return None
    if name.startswith("encoders."):
        return {"type": name, "arguments": module.config}
    recorded: Any = module
    args, kwargs = recorded._arguments
    signature = inspect.signature(type(module).__init__)
    bound = signature.bind(module, *args, **kwargs)
    positional = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    arguments: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        if key in _DROPPED:
            continue
        written = [_value(v) for v in value] if key == positional else _value(value)
        if written is _CUSTOM or (isinstance(written, list) and _CUSTOM in written):
            return None
        arguments["*" if key == positional else key] = written
    return {"type": name, "arguments": arguments}


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


def rebuild(config: dict[str, Any]) -> nn.Module:
    """Rebuilds what `describe` wrote; only public classes of flowfactor can be named.

    Args:
        config: The description.

    Returns:
        The module, with fresh weights.

    Raises:
        ValueError: If the type is unknown.
    """
    name = config.get("type", "")
    package, _, cls = str(name).partition(".")
    known = importlib.import_module(f"flowfactor.{package}") if package in _PACKAGES else None
    if known is None or cls not in known.__all__:
        raise ValueError(f"a model file names the part {name!r}, which this flowfactor does not have")
    arguments = {key: _read(value) for key, value in config["arguments"].items()}
    for old, new in getattr(getattr(known, cls), "renamed_arguments", {}).items():
        if old in arguments:
            arguments[new] = arguments.pop(old)
    positional = arguments.pop("*", [])
    if not positional:
        return getattr(known, cls)(**arguments)
    # Arguments before the variadic ones have to be given by position.
    names = list(inspect.signature(getattr(known, cls).__init__).parameters)[1:]
    leading = [arguments.pop(n) for n in names if n in arguments and names.index(n) < _variadic(getattr(known, cls))]
    return getattr(known, cls)(*leading, *positional, **arguments)


_CUSTOM: Any = object()


def _variadic(cls: type) -> int:
    kinds = [p.kind for p in inspect.signature(cls.__init__).parameters.values()][1:]
    return kinds.index(inspect.Parameter.VAR_POSITIONAL)


def _public_name(cls: type) -> str | None:
    for package in _PACKAGES:
        if cls.__name__ in (module := importlib.import_module(f"flowfactor.{package}")).__all__:
            return f"{package}.{cls.__name__}" if getattr(module, cls.__name__) is cls else None
    return None


def _value(value: Any) -> Any:
    if isinstance(value, nn.Module):
        written = describe(value)
        return _CUSTOM if written is None else written
    if isinstance(value, Tensor) and not value.ndim:
        return value.item()
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape)}  # its values come back with the weights
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):  # such as NumPy's
        return int(value)
    return _CUSTOM


def _read(value: Any) -> Any:
    if isinstance(value, dict) and "type" in value:
        return rebuild(value)
    if isinstance(value, dict) and "tensor" in value:
        return torch.zeros(value["tensor"])
    if isinstance(value, list):
        return [_read(v) for v in value]
    return value


def solver_config(solver: Any) -> dict[str, Any]:
    """Writes a Solver as JSON values."""
    return asdict(solver)
