"""K networks in one: their tensors ``[K, ...]``, how they begin, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from flowfactor.networks.batching import ENTERS, Stack
from flowfactor.networks.controlled import Controlled
from flowfactor.networks.overrides import refresh_weights


def own_tensors(module: nn.Module) -> Stack:
    """What a module's own parameters are to its formulas, by name: those made by parametrizations and pruning too."""
    made = refresh_weights(module)
    sources = {source for names in made.values() for source in names}
    names = [name for name, _ in module.named_parameters(recurse=False) if name not in sources] + list(made)
    if is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return {name: getattr(module, name) for name in names}


def uniform(
    shape: Sequence[int], fan_in: int, gain: float = 1.0, generator: torch.Generator | None = None
) -> nn.Parameter:
    """A parameter drawn uniformly with variance ``gain^2 / fan_in`` (LeCun et al. 1998)."""
    bound = gain * math.sqrt(3.0 / fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def enter_context(module: Controlled, *biases: str, generator: torch.Generator | None = None) -> None:
    """Gives a part of stacked networks, where it takes a context, the weights by which that enters its biases.

    Args:
        module: The part, whose biases are there already, ``[K, 1, H]`` or ``[K, H]``.
        *biases: Their names.
        generator: Source of the initial weights.
    """
    C = module.context_dim
    for name in biases if C else ():
        bias = getattr(module, name)
        setattr(module, name + ENTERS, uniform((len(bias), bias.shape[-1], C), C, generator=generator))


def one_or_no_time(time_features: int, time: str) -> int:
    """Checks the time features of a part that takes time as it is, as ``time``, or not at all; raises ValueError."""
    if time_features not in (0, 1):
        raise ValueError(
            f"time_features must be 1, the time as {time}, or 0 for a part without time, got {time_features}"
        )
    return int(time_features)


def check_sizes(name: str, sizes: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Checks a tuple of positive layer sizes; raises ValueError otherwise."""
    sizes = tuple(sizes)
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 1 for s in sizes)
    if not whole or (count is not None and len(sizes) != count):
        wanted = "positive integers" if count is None else f"{count} positive integers"
        raise ValueError(f"{name} must be {wanted}, got {sizes}")
    return tuple(int(s) for s in sizes)
