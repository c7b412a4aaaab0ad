"""Smooth activations with their first two derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], tuple[Callable[[], Tensor], Tensor, Callable[[], Tensor]]]
"""``a -> (value, first derivative, second derivative)``; what is not always needed comes as a thunk."""


def _tanh(a: Tensor) -> tuple[Callable[[], Tensor], Tensor, Callable[[], Tensor]]:
    h = torch.tanh(a)
    first = 1 - h * h
    return lambda: h, first, lambda: -2 * h * first


def _softplus(a: Tensor) -> tuple[Callable[[], Tensor], Tensor, Callable[[], Tensor]]:
    first = torch.sigmoid(a)
    return lambda: F.softplus(a), first, lambda: first * (1 - first)


def _logcosh(a: Tensor) -> tuple[Callable[[], Tensor], Tensor, Callable[[], Tensor]]:
    # The antiderivative of tanh. |a| + log1p(exp(-2|a|)) - ln 2 is stable but has no second derivative at 0 for
    # autograd; softplus says the same without the kink.
    first = torch.tanh(a)
    return lambda: F.softplus(2 * a) - a - math.log(2.0), first, lambda: 1 - first * first


ACTIVATIONS: dict[str, Activation] = {"tanh": _tanh, "softplus": _softplus, "logcosh": _logcosh}


def activation_named(name: str) -> Activation:
    """Looks up an activation; raises ValueError with the known names for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
