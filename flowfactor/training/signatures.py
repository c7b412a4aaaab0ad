"""The settings that there are, with their types and help, read from source: nothing that takes long is imported for it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

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

_VAE = ("models/build.py:build_vae", "models/flow_vae.py:FlowFactorizedVAE")
_SPARSE = ("models/build.py:build_sparse_vae", "models/sparse.py:SparseTransformationVAE")


def _baseline(place: str) -> tuple[str, str]:
    return ("models/baselines/build.py:build_baseline", f"models/baselines/{place}")


METHOD_SOURCES: Mapping[str, tuple[str, str]] = {
    "ours": _VAE,
    "ours-weak": _VAE,
    "sta": _SPARSE,
    "free": _VAE,
    "euler-no-pde": _VAE,
    "paper-code": _baseline("paper_code.py:PaperCodeVAE"),
    "vae": _baseline("vae.py:VAE"),
    "beta-vae": _baseline("vae.py:BetaVAE"),
    "factor-vae": _baseline("factor_vae.py:FactorVAE"),
    "slow-vae": _baseline("slow_vae.py:SlowVAE"),
    "topographic-vae": _baseline("topographic_vae.py:TopographicVAE"),
    "po-flow": _baseline("po_flow.py:PoFlow"),
}
"""What builds the model of each of `flowfactor.models.METHODS`, in their order, and the class that takes its settings."""


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
def of_source(place: str) -> dict[str, Setting]:
    """The settings that a function, a constructor or a dataclass takes, from its source.

    Args:
        place: Where it stands, such as ``"models/build.py:build_vae"``.

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
        kind = _annotated(annotation)
        if kind is not None and entry not in _NO_SETTINGS:
            value = eval(compile(ast.Expression(default), file, "eval"), {"__builtins__": {}}) if default else None
            settings[entry] = Setting(entry, kind, value, helps.get(entry, ""))
    return settings


def model_settings(method: str) -> dict[str, Setting]:
    """The settings of a method's model.

    Args:
        method: One of `METHOD_SOURCES`.

    Returns:
        The settings by name.

    Example:
        >>> "beta" in model_settings("beta-vae"), "beta" in model_settings("ours")
        (True, False)
    """
    builder, model = METHOD_SOURCES[method]
    return {**of_source(builder), **{n: s for n, s in of_source(model).items() if n not in of_source(builder)}}


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


def _annotated(annotation: ast.expr | None) -> Any:
    """The type that an annotation leaves where values are plain, or None where none of it can be written down."""
    members = [
        part for part in _flat(annotation) if {n.id for n in ast.walk(part) if isinstance(n, ast.Name)} <= {*_KNOWN}
    ]
    evaluated = [
        eval(compile(ast.Expression(part), "annotation", "eval"), {"__builtins__": {}}, _KNOWN) for part in members
    ]
    if all(kind is None for kind in evaluated):
        return None
    return reduce(or_, (type(None) if kind is None else kind for kind in evaluated))


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
