"""The adjoint of sums of ridge functions (`flowfactor.networks.stage_adjoint` has the protocol)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square, quick_tanh
from flowfactor.networks.batched import outer, product
from flowfactor.networks.batching import Stack
from flowfactor.networks.stage_adjoint import Bound, NetworkAdjoint, Outputs, Pullback, Stages, stacked
from flowfactor.networks.time import StageTerms, TimeFeatures, Times

Residuals = tuple[Tensor, Tensor]


class RidgeAdjoint(NetworkAdjoint):
    r"""$v = R^\top \tanh(W z + c(t)) + P^\top Q z$ for stacked networks, without divergence.

    Args:
        stack: Parameters by name, each ``[G, ...]``; ``w, b, r`` and optionally ``q, p``, and ``v`` where there are
            time features.
        bind: The same velocities by autograd.
        features: Time features of c(t).
    """

    own_times = True

    def __init__(self, stack: Stack, bind: Bound, features: TimeFeatures) -> None:
        super().__init__(stack, bind)
        p, self.features = self.p, features
        self.hidden, self.linear = p["w"].shape[-2], "p" in p
        # One product serves W z and Q z, and one R'h and P'x.
        self.w = torch.cat([p["w"], p["q"]], -2) if self.linear else p["w"]
        self.r = torch.cat([p["r"], p["p"]], -2) if self.linear else p["r"]
        self.w_t, self.r_t = self.w.mT.contiguous(), self.r.mT.contiguous()
        self.stage_terms = StageTerms(features, [(p.get("v"), p["b"], self.w.shape[-2])])

    def time_terms(self, ts: Times) -> list[Any]:
        """See `StageTerms`: ``[c, 0]``."""
        return self.stage_terms(ts)

    def velocity(self, z: Tensor, terms: Any, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        h = self.stage_terms.product(0, z, self.w_t, terms)
        ridges = h[..., : self.hidden]
        quick_tanh(ridges, out=ridges)
        return torch.bmm(h, self.r, out=out), (z, h)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        z = residuals[0][0]
        return z.new_zeros(len(residuals), *z.shape[:-1])

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> RidgeStages:
        return RidgeStages(self, stacked(residuals), ts)


class RidgeStages(Stages):
    """Stages of a `RidgeAdjoint`."""

    def __init__(self, adjoint: RidgeAdjoint, residuals: Sequence[Tensor], ts: Times) -> None:
        self.adjoint, self.ts = adjoint, ts
        self.z, self.h = residuals

    @cached_property
    def slope(self) -> Tensor:
        """The slopes of the ridge functions."""
        return one_minus_square(self.h[..., : self.adjoint.hidden])

    def outputs(self, want: frozenset[str]) -> Outputs:
        out = {"velocity": product(self.h, self.adjoint.r)} if "velocity" in want else {}
        return out | ({"divergence": torch.zeros_like(self.z[..., 0])} if "divergence" in want else {})

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return RidgePullback(self, cotangents, parameters)


class RidgePullback(Pullback):
    """The adjoint of the stages of a `RidgeAdjoint`."""

    def __init__(self, stages: RidgeStages, cotangents: Outputs, parameters: bool) -> None:
        super().__init__(stages.z.shape[1], parameters=parameters)
        self.stages, self.adjoint = stages, stages.adjoint
        self.lam, self.a_bar = torch.empty_like(stages.z), torch.empty_like(stages.h)
        self.lam0 = cotangents.get("velocity")

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        s, a = self.stages, self.adjoint
        lam = cotangent if self.lam0 is None else cotangent + self.lam0[:, at]
        self.lam[:, at] = lam
        a_bar = product(lam, a.r_t)
        a_bar[..., : a.hidden] *= s.slope[:, at]
        self.a_bar[:, at] = a_bar
        return product(a_bar, a.w)

    def _gradients(self) -> list[Tensor | None]:
        s, a, n = self.stages, self.adjoint, self.adjoint.hidden
        w_bar, r_bar = outer(self.a_bar, s.z), outer(s.h, self.lam)
        out = {"w": w_bar[:, :n], "r": r_bar[:, :n], "q": w_bar[:, n:], "p": r_bar[:, n:]}
        out |= a.stage_terms.gradients(0, self.a_bar[..., :n], s.ts)
        return [out[name] for name in a.names]
