"""Parts of one's own by name: in builders, configurations, on the command line, and in saved models.

What is registered is built where its name is given, with options of its own beside it:

    @flowfactor.register_potential("well")
    class Well(flowfactor.potentials.Potential): ...

    flowfactor.models.build_vae(potential={"name": "well", "depth": 2.0})

A saved model says the name alone. Whoever loads it registers the class first: nothing is imported because a file says so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class UnknownPartError(ValueError):
    """A name that no part has, or none that is registered here."""


BUILT_IN: Mapping[str, tuple[str, ...]] = {
    "potential": ("mlp", "resnet", "convex", "paper", "displacement", "stationary"),
    "field": ("helmholtz", "gradient", "free"),
    "prior": (
        "normal",
        "mixture",
        "vamp",
        "diffusion",
        "diffusion-mixture",
        "standard_normal",
        "gaussian_mixture",
        "augmented",
    ),
    "encoder": (),
    "objective": ("path", "marginal"),
    "estimator": ("balanced", "gumbel", "enumerate"),
    "likelihood": ("bernoulli", "gaussian"),
}
"""The kinds of parts, and the names that are flowfactor's own."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_KNOWN: dict[str, dict[str, Any]] = {}
_OWN: dict[str, Mapping[str, type[Any]]] = {}


class Recorded:
    """Base of all parts: remembers the arguments that it was made with, so that a saved model can say them."""

    kind_of_part: ClassVar[str] = ""

    unwritten: ClassVar[tuple[str, ...]] = ("generator",)
    """Arguments that make no difference once the weights are there, or that the model has anyway."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes the part, and keeps what it is made with."""
        self = object.__new__(cls)
        renamed = former_names(cls)
        # A generator cannot be copied.
        kept = {renamed.get(name, name): value for name, value in kwargs.items() if name != "generator"}
        object.__setattr__(self, "_arguments", (args, kept))
        return self

    def _fill_in(self, **values: Any) -> None:
        """Notes what the constructor chose for arguments that were left open."""
        object.__setattr__(self, "_filled_in", getattr(self, "_filled_in", {}) | values)


def register(kind: str, name: str, thing: T, taken: Mapping[str, Any] | tuple[str, ...] = ()) -> T:
    """Registers something by its name.

    Args:
        kind: What it is, such as ``"potential"``.
        name: Its name: a letter, then letters, digits, ``-`` and ``_``.
        thing: What the name stands for, such as a class.
        taken: Names that are flowfactor's own.

    Returns:
        The thing.

    Raises:
        TypeError: If the name is no string.
        ValueError: If it is no such name, or another thing has it. (It may be defined again, as in a notebook.)
    """
    if not isinstance(name, str):
        raise TypeError(f'a {kind} is registered by its name, a string, got {name!r}: @register_{kind}("my-{kind}")')
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name of a {kind} must be a letter, then letters, digits, '-' or '_', got {name!r}")
    known = _KNOWN.setdefault(kind, {})
    if name in taken or (name in known and _place(known[name]) != _place(thing)):
        whose = "flowfactor's own" if name in taken else f"already that of {known[name]!r}"
        raise ValueError(f"the name {name!r} of a {kind} is {whose}: choose another one")
    known[name] = thing
    return thing


def registered(kind: str) -> Mapping[str, Any]:
    """What users have registered of a kind, by name; see `register`."""
    return MappingProxyType(_KNOWN.setdefault(kind, {}))


def register_potential(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a `flowfactor.potentials.Potential` of one's own: decorates its class.

    Builders make it with those of ``dim``, ``num_flows`` and ``generator`` that its constructor takes.

    Args:
        name: Its name in settings and saved models.

    Returns:
        A decorator of the class.

    Raises:
        TypeError: If what is decorated is no class of a potential.
        ValueError: If the name is taken or cannot be one.

    Example:
        >>> import flowfactor as ff
        >>> @ff.register_potential("bowl")
        ... class Bowl(ff.potentials.Potential):
        ...     def __init__(self, dim, num_flows=1, *, depth=1.0):
        ...         super().__init__(dim, num_flows)
        ...         self.depth = depth
        ...     def flow_potential(self, z, t, k):
        ...         return -0.5 * self.depth * z.square().sum(-1)
        >>> model = ff.models.build_vae((1, 8, 8), 2, 4, field="gradient", potential={"name": "bowl", "depth": 2.0})
        >>> model.flow.field.potential.depth
        2.0
    """
    return _decorator("potential", name)


def register_field(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a `flowfactor.fields.Field` of one's own, as `register_potential` does potentials."""
    return _decorator("field", name)


def register_prior(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a `flowfactor.priors.Prior` of one's own, as `register_potential` does potentials.

    Builders make it with those of ``dim``, ``num_flows``, ``encoder`` and ``generator`` that its constructor takes.
    """
    return _decorator("prior", name)


def register_encoder(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a module of one's own that encodes or decodes frames or sequences, as `register_potential` does potentials.

    Builders make it with those of ``latent_dim``, ``channels``, ``image_size``, ``likelihood``, ``num_flows`` and
    ``num_frames`` that they know and its constructor takes.
    """
    return _decorator("encoder", name)


def register_objective(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a `flowfactor.objectives.Objective` of one's own, as `register_potential` does potentials."""
    return _decorator("objective", name)


def register_estimator(name: str) -> Callable[[type[T]], type[T]]:
    """Registers a `flowfactor.models.FactorEstimator` of one's own, as `register_potential` does potentials."""
    return _decorator("estimator", name)


def parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor; those of its bases too, where it hands further ones on."""
    found: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls):
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        found = {**named, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def former_names(cls: type[Any]) -> Mapping[str, str]:
    """New names of a constructor's arguments by former ones; those of the class that defines the constructor."""
    owner = next(base for base in inspect.getmro(cls) if "__init__" in vars(base))
    return vars(owner).get("renamed_arguments", {})


def make(kind: str, given: str | Mapping[str, Any], **known: Any) -> Any:
    """Makes a part that is registered, or one of flowfactor's that `declare` told of.

    Args:
        kind: Its kind.
        given: Its name, or a mapping with the name and options.
        **known: What the builder knows, such as sizes; what the constructor takes of these is handed over.

    Returns:
        The part.

    Raises:
        UnknownPartError: If there is no part of that name.
        ValueError: If it has no such option.
    """
    name, options = split(kind, given)
    classes = _classes(kind)
    if not isinstance(name, str) or name not in classes:
        names = (*BUILT_IN[kind], *registered(kind))
        own = f" (one of your own is registered first, by @flowfactor.register_{kind}({name!r}))"
        raise UnknownPartError(
            f"{kind} must be one of the known ones, got the unknown {kind} {name!r}: choose {', '.join(map(repr, names))}"
            + own * (f"register_{kind}" in globals())
        )
    taken = parameters(classes[name])
    unknown = sorted(set(options) - set(taken) - set(former_names(classes[name])))
    if unknown:
        told = [option for option in taken if option not in known]
        raise ValueError(f"the {kind} {name!r} has no setting {', '.join(unknown)}; it has {', '.join(told) or 'none'}")
    return classes[name](**{key: value for key, value in known.items() if key in taken} | options)


def declare(kind: str, **classes: type[Any]) -> Mapping[str, type[Any]]:
    """Tells which of flowfactor's own classes the names of a kind stand for; returns them."""
    _OWN[kind] = classes
    return classes


def kind_of(cls: type[Any]) -> str:
    """The kind of a class of parts; any module may encode or decode."""
    return getattr(cls, "kind_of_part", "encoder" if hasattr(cls, "forward") else "")


def name_of(cls: type[Any]) -> str | None:
    """The name of a class of parts, flowfactor's own or registered; None where it has none."""
    return next((name for name, known in _classes(kind_of(cls)).items() if _place(known) == _place(cls)), None)


def _classes(kind: str) -> dict[str, type[Any]]:
    return {**_OWN.get(kind, {}), **registered(kind)}


def split(kind: str, given: str | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Splits a name, or a mapping with a name and options, into the two; raises TypeError where it is neither."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{kind} must be a name or a mapping with a name and options, got {type(given).__name__}")
    options = dict(given)
    return options.pop("name", None), options


def _decorator(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    def decorate(cls: type[T]) -> type[T]:
        if not isinstance(cls, type) or kind_of(cls) != kind:
            raise TypeError(f"@register_{kind} stands before a class of the kind {kind}, got {cls!r}")
        if "name" in parameters(cls):
            raise ValueError(
                f"{cls.__name__} is made with a 'name', which is what tells the {kind} from others in settings"
            )
        register(kind, name, cls, BUILT_IN[kind])
        if not issubclass(cls, Recorded):
            cls.__new__ = staticmethod(Recorded.__new__)
        return cls

    return decorate


def _place(thing: Any) -> Any:
    return (thing.__module__, thing.__qualname__) if hasattr(thing, "__qualname__") else id(thing)
