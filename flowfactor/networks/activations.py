"""Smooth activations with their first three derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation by a base b(a), from which its value and all its derivatives follow.

    Called with a, it gives the value, the first and the second derivative; what is not always needed comes as a thunk.

    Attributes:
        base: b of a.
        quick_base: The same where no derivatives are taken of it.
        value: The activation, of a and b.
        quick: The same where no derivatives are taken of it.
        first: Its first derivative s, of b.
        second: Its second derivative s', of b and s.
        third: Its third derivative, of b, s and s'.
    """

    base: Callable[[Tensor], Tensor]
    quick_base: Callable[[Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]
    quick: Callable[[Tensor, Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor, Tensor], Tensor]
    third: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        """Pickles the name: the functions have none."""
        return activation_named, (next(name for name, known in ACTIVATIONS.items() if known is self),)

    def __call__(self, a: Tensor) -> tuple[Callable[[], Tensor], Tensor, Callable[[], Tensor]]:
        b = self.base(a)
        s = self.first(b)
        return lambda: self.value(a, b), s, lambda: self.second(b, s)


def one_minus_square(x: Tensor) -> Tensor:
    """``1 - x * x`` in one pass."""
    return torch.addcmul(x.new_ones(()), x, x, value=-1)


def _minus_twice(x: Tensor, y: Tensor) -> Tensor:
    """``-2 x y`` in one pass."""
    return torch.addcmul(x.new_zeros(()), x, y, value=-2)


_MINUS_ONE = torch.tensor(-1.0, dtype=torch.float32, device="cpu")


def quick_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    r"""$\tanh x$ where no derivatives are taken of it.

    On processors torch.tanh takes six times as long as torch.sigmoid, and longer still on slices that threads share. In
    single precision this is $2 \sigma(2 x) - 1$ there, which is off by a rounding of 1 at most.

    Args:
        x: Where.
        out: Where the result goes; x itself perhaps.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return torch.tanh(x, out=out)
    # Sums in place of products with numbers, each of which torch would first make a tensor of.
    s = torch.add(x, x, out=out).sigmoid_()
    return torch.add(_MINUS_ONE, s, alpha=2, out=s)


ACTIVATIONS = {
    "tanh": Activation(
        torch.tanh,
        quick_tanh,
        lambda a, b: b,
        lambda a, b: b,
        one_minus_square,
        lambda b, s: _minus_twice(b, s),
        lambda b, s, s_prime: torch.addcmul(-2 * s, b, b, value=4) * s,
    ),
    "softplus": Activation(
        torch.sigmoid,
        torch.sigmoid,
        lambda a, b: F.softplus(a),
        lambda a, b: F.softplus(a),
        lambda b: b,
        lambda b, s: s * (1 - s),
        lambda b, s, s_prime: s_prime * (1 - 2 * s),
    ),
    # The antiderivative of tanh. |a| + log1p(exp(-2|a|)) - ln 2 is stable but has no second derivative at 0 for autograd;
    # softplus says the same without the kink.
    "logcosh": Activation(
        torch.tanh,
        quick_tanh,
        lambda a, b: F.softplus(2 * a) - a - math.log(2.0),
        lambda a, b: a.abs().sub_(b.abs().log1p_()),
        lambda b: b,
        lambda b, s: one_minus_square(s),
        lambda b, s, s_prime: _minus_twice(s, s_prime),
    ),
}


def activation_named(name: str) -> Activation:
    """Looks up an activation; raises ValueError with the known names for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
