"""Derivatives of any function by automatic differentiation: the fall-back behind users' own modules.

Built on torch.func, which works under no_grad, inside other torch.func transforms and for inputs that need no
gradient, and lets gradients flow on to parameters and captured tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


def derivatives_of(
    function: Function, want: frozenset[str], laplacian: str | None, probe: Tensor | None
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Wraps ``function(z [*batch, D], t [*batch]) -> [*batch]`` into one that returns the wanted derivatives."""

    def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
        t = t.expand(z.shape[:-1])
        if not want - {"value"}:
            return {"value": _checked(function(z, t), z)}
        results: dict[str, Tensor] = {}
        if "laplacian" in want:
            results["laplacian"] = _laplacian(function, z, t, laplacian, probe)
        value, pull = torch.func.vjp(lambda z, t: _checked(function(z, t), z), z, t)  # type: ignore[misc]
        gradient, time = pull(torch.ones_like(value))
        results |= {"value": value, "gradient": gradient, "time": time}
        return {name: result for name, result in results.items() if name in want}

    return evaluate


def divergence_of(velocity: Function, z: Tensor, t: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence: exact where ``probe`` is None, else the mean of e' J e over its probes e."""
    v, pull = torch.func.vjp(lambda z: velocity(z, t), z)  # type: ignore[misc]
    if probe is not None:
        each = [(pull(e)[0] * e).sum(-1) for e in probe.split(z.shape[-1], -1)]
        return v, each[0] if len(each) == 1 else torch.stack(each).mean(0)
    return v, _trace(pull, z)


def _laplacian(function: Function, z: Tensor, t: Tensor, kind: str | None, probe: Tensor | None) -> Tensor:
    def gradient(z: Tensor, t: Tensor) -> Tensor:
        value, pull = torch.func.vjp(lambda z: _checked(function(z, t), z), z)  # type: ignore[misc]
        return pull(torch.ones_like(value))[0]

    return divergence_of(gradient, z, t, probe if kind == "hutchinson" else None)[1]


def _trace(pull: Callable[[Tensor], tuple[Tensor, ...]], z: Tensor) -> Tensor:
    """Sums e_i' J e_i over the D unit vectors, one reverse pass each (samples are independent of each other)."""
    total = torch.zeros_like(z[..., 0])
    for i in range(z.shape[-1]):
        unit = torch.zeros_like(z)
        unit[..., i] = 1.0
        total = total + pull(unit)[0][..., i]
    return total


def _checked(value: Tensor, z: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a potential must return a tensor [*batch], got {type(value).__name__}")
    if value.shape != z.shape[:-1]:
        hint = "; squeeze its last dimension" if value.shape == (*z.shape[:-1], 1) else ""
        raise ValueError(
            f"a potential must return one number per sample, shape {list(z.shape[:-1])} for states {list(z.shape)}; "
            f"got {list(value.shape)}{hint}"
        )
    return value
