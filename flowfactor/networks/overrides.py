"""What users change about a part after it was written: overridden methods, hooks, and weights made of other tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from flowfactor.networks.controlled import Controlled
from flowfactor.networks.stage_adjoint import NoClosedForm
from flowfactor.networks.time import TimeFeatures
from flowfactor.networks.unsteady import refuse_unsteady


def overridden(part: nn.Module, owner: type[nn.Module], methods: Sequence[str]) -> NoClosedForm | None:
    """Why what ``owner`` knows about its evaluation may not hold for ``part``, an instance of it or of a subclass.

    Args:
        part: The part.
        owner: The class whose closed form is in question.
        methods: The methods that decide what it computes. A subclass may override any other.

    Returns:
        The reason, or None where all of these methods are the owner's.
    """
    for method in methods:
        if method in vars(part):
            return NoClosedForm(f"{method} of this {type(part).__name__} was replaced")
        if getattr(type(part), method) is not getattr(owner, method):
            by = next(kind for kind in type(part).__mro__ if method in vars(kind))
            return NoClosedForm(f"{by.__name__} overrides {method} of {owner.__name__}")
    return None


def features_changed(part: nn.Module) -> NoClosedForm | None:
    """Why closed forms may not hold for the time features of a part."""
    features = part.features
    if type(features) is not TimeFeatures or hooked(features) or "forward" in vars(features):
        return NoClosedForm(f"the time features of this {type(part).__name__} were replaced or have hooks")
    return None


def hooked(part: nn.Module) -> bool:
    """Whether something is called before or after the part's `forward`, but for what makes its weights."""
    return bool(part._forward_hooks) or any(not isinstance(h, WEIGHT_HOOKS) for h in part._forward_pre_hooks.values())


WEIGHT_HOOKS = (BasePruningMethod, WeightNorm, SpectralNorm)  # all of them leave out what they are called with


def refresh_weights(part: nn.Module) -> dict[str, tuple[str, ...]]:
    """Makes anew what pruning, or a norm in the style before parametrizations, makes of a part's own tensors.

    They wait for the part to be called, which solves do not do.

    Returns:
        The names of what was made, and of the parameters that it is made of.
    """
    made: dict[str, tuple[str, ...]] = {}
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(part, ())
            name = str(hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
            made[name] = (f"{name}_orig", f"{name}_g", f"{name}_v")
    return made


def prepare_for_solve(part: nn.Module, costs: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> None:
    """Refreshes weights, and warns of what a solve would ignore: a solve binds a part and never calls its `forward`.

    Args:
        part: A potential or field; the parts that it is made of are included.
        costs: What is integrated beside it, by name.

    Raises:
        ValueError: If a module in them is in training mode and draws at random or looks at the whole batch.
    """
    refuse_unsteady(part)
    for name, cost in costs.items():
        refuse_unsteady(cost, f"cost {name!r}", "a solve asks its costs")
    for one in _parts(part):
        refresh_weights(one)
        name, ignored = type(one).__name__, None
        if hooked(one):
            ignored = f"the forward hooks of {name}"
        elif "forward" in vars(one) or _forward_unbound(type(one)):
            ignored = f"forward of {name}"
        elif one.one_method in vars(one) and "bind" not in vars(one) and not one.binds_one_method():
            ignored = f"{one.one_method}, which was set on an instance of {name}"
        if ignored is not None:
            warnings.warn(
                f"a solve ignores {ignored}: it binds a potential or field once and never calls it; write a subclass "
                f"with {one.one_method} to change what it computes",
                stacklevel=3,
            )


def _parts(part: nn.Module) -> Iterator[Controlled]:
    if isinstance(part, Controlled):
        yield part
    for child in part._modules.values():
        if isinstance(child, (Controlled, nn.ModuleList)):
            yield from _parts(child)


@cache
def _forward_unbound(kind: type) -> bool:
    """Whether a class has a `forward` that comes closer in its ancestry than its `bind`, which therefore ignores it."""
    owners = [next((k for k in kind.__mro__ if method in vars(k)), object) for method in ("forward", "bind")]
    return kind.__mro__.index(owners[0]) < kind.__mro__.index(owners[1])
