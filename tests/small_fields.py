"""Small fields of each kind, at random, with or without a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff

P, F = ff.potentials, ff.fields


class Wave(torch.nn.Module):
    """v = W sin(z + r t), times the sum of the context."""

    def __init__(self, dim: int, rate: float) -> None:
        super().__init__()
        self.rate, self.weight = rate, torch.nn.Parameter(torch.randn(dim, dim))

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        v = (z + self.rate * t.unsqueeze(-1)).sin() @ self.weight
        return v if context is None else v * context.sum(-1, keepdim=True)


class Bump(Wave):
    """u = sum W sin(z + r t)."""

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(z, t, context).sum(-1)


def small_fields(dim: int, rates: Sequence[float], scale: float) -> dict[str, Callable[[int], Any]]:
    """Fields by name, of D = dim and a flow for each rate, made for so many features of context."""
    size, initial = (dim, len(rates)), {"init_scale": scale}

    def mlp(context: int) -> P.Potential:
        return P.MLPPotential(*size, (6, 5), **initial, context=context)

    def solenoidal(context: int) -> F.SolenoidalField:
        return F.SolenoidalField(*size, 7, **initial, context=context)

    return {
        "mlp": mlp,
        "resnet": lambda c: P.ResNetPotential(*size, width=6, **initial, context=c),
        "convex": lambda c: P.ConvexPotential(*size, (6, 5), **initial, context=c),
        "skew": lambda c: F.SkewGradientField(mlp(c)),
        "solenoidal": solenoidal,
        "helmholtz": lambda c: F.HelmholtzField(mlp(c), solenoidal(c), mlp(0)),
        "free": lambda c: F.FreeField(*size, (6, 5), **initial, context=c),
        "module": lambda c: F.from_module([Wave(dim, rate) for rate in rates], dim, context=c),
        "potential module": lambda c: P.from_module([Bump(dim, rate) for rate in rates], dim, context=c),
    }
