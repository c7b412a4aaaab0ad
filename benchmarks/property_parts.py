"""Small parts of every kind, for `benchmarks.properties`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.context import Context, ContextSize, features_of, joined

P, F = ff.potentials, ff.fields
CONTEXTS: dict[str, ContextSize] = {"none": 0, "tensor": 3, "broadcast": 3, "mapping": {"pose": 2, "kind": 1}}


def mlp(dim: int, flows: int, context: ContextSize = 0) -> ff.potentials.Potential:
    return P.MLPPotential(dim, flows, (5, 4), rank=2, time_features=4, init_scale=0.5, context=context)


def _shift(context: Context | None) -> Tensor | float:
    return 0.0 if context is None else joined(context).sin().sum(-1)


class _OwnPotential(P.Potential):
    def __init__(self, dim: int, flows: int, context: ContextSize = 0) -> None:
        super().__init__(dim, flows, context=context)
        self.direction = torch.nn.Parameter(0.7 * torch.randn(flows, dim))

    def flow_potential(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        return torch.sin(z @ self.direction[k] + t + _shift(context))


class _OwnField(F.Field):
    def __init__(self, dim: int, flows: int, context: ContextSize = 0) -> None:
        super().__init__(dim, flows, context=context)
        self.matrix = torch.nn.Parameter(0.7 * torch.randn(flows, dim, dim))

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        return torch.tanh(z @ self.matrix[k]) * torch.cos(t + _shift(context)).unsqueeze(-1)


class _Module(torch.nn.Module):
    """What `from_module` takes: a net of the state, the time and the context, with one output or ``[D]``."""

    def __init__(self, dim: int, context: ContextSize, outputs: int | None) -> None:
        super().__init__()
        features = dim + 1 + features_of(context)
        self.net = torch.nn.Sequential(torch.nn.Linear(features, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs or 1))
        self.scalar = outputs is None

    def forward(self, z: Tensor, t: Tensor, context: Context | None = None) -> Tensor:
        out = self.net(torch.cat([z, t.unsqueeze(-1), *([] if context is None else [joined(context)])], -1))
        return out.squeeze(-1) if self.scalar else out


PARTS: dict[str, Callable[[int, int, ContextSize], Any]] = {
    "mlp": mlp,
    "convex": lambda d, k, c: P.ConvexPotential(d, k, (5, 4), context=c),
    "paper": lambda d, k, c: P.PaperPotential(d, k, context=c),
    "resnet": lambda d, k, c: P.ResNetPotential(d, k, width=5, depth=2, context=c),
    "quadratic": lambda d, k, c: P.QuadraticPotential(d, k, context=c),
    "own potential": _OwnPotential,
    "module potential": lambda d, k, c: P.from_module([_Module(d, c, None) for _ in range(k)], d, context=c),
    "skew": lambda d, k, c: F.SkewGradientField(mlp(d, k, c)),
    "helmholtz": lambda d, k, c: F.HelmholtzField(mlp(d, k, c), mlp(d, k, c)),
    "solenoidal": lambda d, k, c: F.SolenoidalField(d, k, 5, rank=2, time_features=4, init_scale=0.5, context=c),
    "free": lambda d, k, c: F.FreeField(d, k, (5, 4), rank=2, time_features=4, init_scale=0.5, context=c),
    "own field": _OwnField,
    "module field": lambda d, k, c: F.from_module([_Module(d, c, d) for _ in range(k)], d, context=c),
}
