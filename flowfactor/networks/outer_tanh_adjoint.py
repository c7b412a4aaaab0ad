r"""The adjoint of a potential $\phi = \tanh(v + b_3)$ round a two-layer network v: the paper's.

With $f', f'', f^{(3)}$ the derivatives of tanh at $v + b_3$ and e Hutchinson's probe (of several, take the mean),
$$\nabla\phi = f'\,\nabla v, \qquad \dot\phi = f'\,\dot v, \qquad
  e^\top \mathrm{Hess}\,\phi\,e = f'\, e^\top \mathrm{Hess}\,v\,e + f''\,(e\cdot\nabla v)^2 ,$$
so that cotangents $\bar u, \lambda, \tau, \mu$ of value, gradient, time derivative and Laplacian become cotangents
$f'\lambda + 2\mu f''(e\cdot\nabla v)\,e$, $f'\tau$ and $f'\mu$ of those of v, and
$$\bar v = f'\bar u + f''(\lambda\cdot\nabla v + \tau\dot v + \mu\,e^\top\mathrm{Hess}\,v\,e)
  + \mu f^{(3)}(e\cdot\nabla v)^2 .$$
With the exact Laplacian $(e\cdot\nabla v)\,e$ is $\nabla v$ and $(e\cdot\nabla v)^2$ is $|\nabla v|^2$.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square
from flowfactor.networks.batched import Products, add, outer, sum_into
from flowfactor.networks.stage_adjoint import Outputs, Pullback, stacked
from flowfactor.networks.time import Times
from flowfactor.networks.two_layer_adjoint import Residuals, TwoLayerAdjoint, TwoLayerPullback, TwoLayerStages


class OuterTanhAdjoint(TwoLayerAdjoint):
    """See `TwoLayerAdjoint`; ``stack`` holds ``b3`` as well."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.keeps_velocity = False  # the inner one is kept anyway

    def velocity(self, z: Tensor, terms: Any, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        inner, (z, up, _, b1, b2, *rest) = super().velocity(z, terms)
        h2 = b2  # of tanh the base is the value, and nothing else asks for its argument
        phi = torch.tanh(torch.bmm(h2, self.w3.mT) + self.p["b3"].unsqueeze(-1))  # [G, n, 1]
        return torch.mul(one_minus_square(phi), inner, out=out), (z, up, h2, b1, b2, *rest, inner, phi)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        *inner, g, phi = stacked([r[3:6] + r[7:] for r in residuals])
        return self.outer_laplacians(self.laplacians(*inner), g, phi).transpose(0, 1)

    def outer_laplacians(self, inner: Tensor, g: Tensor, phi: Tensor) -> Tensor:
        """The Laplacians of phi ``[G, S, n]``, of those of v, its gradient and phi."""
        first = one_minus_square(phi)
        return (first * inner.unsqueeze(-1) - 2 * phi * first * self.along_squared(g)).squeeze(-1)

    def along_squared(self, g: Tensor) -> Tensor:
        """``(e . g)^2``, or ``|g|^2`` for the exact Laplacian, ``[G, S, n, 1]``."""
        if self.laplacian == "exact":
            return g.square().sum(-1, keepdim=True)
        return self.probes.mean(self.along(g).square())

    def along(self, g: Tensor) -> Tensor:
        """``e . g`` of each probe, ``[G, S, n, (P,) 1]``."""
        return (self.probes.spread(g) * self.probes.e.unsqueeze(1)).sum(-1, keepdim=True)

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> OuterTanhStages:
        *inner, g, phi = stacked(residuals)
        return OuterTanhStages(self, inner, ts, g, phi)


class OuterTanhStages(TwoLayerStages):
    """Stages of an `OuterTanhAdjoint`: those of v, with its (rotated) gradient ``g`` and ``phi``."""

    adjoint: OuterTanhAdjoint

    def __init__(self, adjoint: OuterTanhAdjoint, inner: Sequence[Tensor], ts: Times, g: Tensor, phi: Tensor) -> None:
        super().__init__(adjoint, inner, ts)
        self.g, self.phi = g, phi

    @cached_property
    def first(self) -> Tensor:
        """The slope of the outer tanh."""
        return one_minus_square(self.phi)

    @cached_property
    def second(self) -> Tensor:
        """The second derivative of the outer tanh."""
        return -2 * self.phi * self.first

    @cached_property
    def inner_time(self) -> Tensor:
        """The time derivative of v, ``[G, S, n]``."""
        return super().outputs(frozenset({"time"}))["time"]

    @cached_property
    def inner_laplacian(self) -> Tensor:
        """The Laplacian of v, ``[G, S, n]``."""
        return self.laplacians()

    def outputs(self, want: frozenset[str]) -> Outputs:
        out = Outputs()
        if "value" in want:
            out["value"] = self.phi.squeeze(-1)
        if "velocity" in want:
            out["velocity"] = self.first * self.g
        if "gradient" in want and self.adjoint.skew is None:
            out["gradient"] = out["velocity"] if "velocity" in out else self.first * self.g
        if "time" in want:
            out["time"] = self.first.squeeze(-1) * self.inner_time
        if "divergence" in want:
            out["divergence"] = self.adjoint.outer_laplacians(self.inner_laplacian, self.g, self.phi)
        return out

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return OuterTanhPullback(self, cotangents, parameters)


class OuterTanhPullback(TwoLayerPullback):
    """The adjoint of the stages of an `OuterTanhAdjoint`."""

    stages: OuterTanhStages

    def __init__(self, stages: OuterTanhStages, cotangents: Outputs, parameters: bool) -> None:
        first, second = stages.first.squeeze(-1), stages.second.squeeze(-1)
        value, inner = torch.zeros_like(first), Outputs()
        if "value" in cotangents:
            value += first * cotangents["value"]
        if "time" in cotangents:
            inner["time"] = first * cotangents["time"]
            value += second * cotangents["time"] * stages.inner_time
        if "divergence" in cotangents:
            mu, a = cotangents["divergence"], stages.adjoint
            inner["divergence"] = first * mu
            third = first * (4 * stages.phi.squeeze(-1).square() - 2 * first)
            value += mu * (second * stages.inner_laplacian + third * a.along_squared(stages.g).squeeze(-1))
            outer = (2 * mu * second).unsqueeze(-1)
            if a.laplacian == "exact":
                inner["gradient"] = outer * stages.g
            else:
                inner["gradient"] = outer * a.probes.mean(a.along(stages.g) * a.probes.e.unsqueeze(1))
        super().__init__(stages, inner, parameters)
        self.of_velocity = cotangents.get("velocity")
        if "gradient" in cotangents:
            self.of_velocity = add(self.of_velocity, cotangents["gradient"])
        self.of_value = value.unsqueeze(-1)  # what pulls do not add
        self.value_bar = torch.zeros_like(self.of_value)

    def _pull(self, at: int | slice, cotangent: Tensor, value: Tensor | None = None) -> Tensor:
        s = self.stages
        lam = cotangent if self.of_velocity is None else cotangent + self.of_velocity[:, at]
        value_bar = self.of_value[:, at] + s.second[:, at] * (lam * s.g[:, at]).sum(-1, keepdim=True)
        self.value_bar[:, at] = value_bar
        return super()._pull(at, s.first[:, at] * lam, value_bar)

    def _products(self) -> Products:
        out = super()._products()
        sum_into(out, "w3", outer(self.value_bar, self.stages.h2()))
        out["b3"] = self.value_bar.sum((1, 2))
        return out
