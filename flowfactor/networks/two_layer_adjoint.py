r"""The adjoint of two-layer potentials (`flowfactor.networks.stage_adjoint` has the protocol).

`flowfactor.networks.two_layer` writes the derivatives of $u = w_3\cdot\sigma(W_2\,\sigma(W_1 z + c_1(t)) + c_2(t)) +
\tfrac12 \sum_r s_r (A_r z)^2 + b\cdot z$ as operations that autograd follows. Here the same is said without autograd: for
cotangents $\bar u, \lambda, \tau, \mu$ of value, gradient, time derivative and Laplacian,
$$p_1 = W_1\lambda + \tau\dot c_1,\quad \bar g_1 = p_1 s_1 + r_1,\quad
  \bar a_2 = w_3 s_2' (W_2 \bar g_1 + \tau \dot c_2) + r_2,\quad
  \bar a_1 = g_1 s_1' p_1 + s_1 (W_2^\top \bar a_2) + r_3,\quad
  \bar z = W_1^\top \bar a_1 + A^\top s\,(A\lambda + \bar u A z) + \bar u b ,$$
where $r_1, r_2, r_3$ come from $\bar u$ and $\mu$. Only $\lambda$ has to go from stage to stage; $r_i$ before that and the
gradients of all weights after it are large products over all stages at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowfactor.networks.activations import Activation
from flowfactor.networks.batched import Products, add, flat, matmul, outer, outer_into, product, sum_into, transposed
from flowfactor.networks.batching import Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.row_norms import weighted_row_norms
from flowfactor.networks.stage_adjoint import (
    Bound,
    NetworkAdjoint,
    Outputs,
    Pullback,
    Stages,
    stacked,
    with_velocity,
)
from flowfactor.networks.time import StageTerms, TimeFeatures, Times

Residuals = tuple[Tensor, ...]
TimeMaps = Callable[..., tuple[Tensor, "Tensor | None", Tensor, "Tensor | None"]]


class TwoLayerAdjoint(NetworkAdjoint):
    """The velocity grad u, or J grad u, of stacked two-layer networks.

    Args:
        stack: Parameters by name, each ``[G, ...]``; ``w1, w2, w3`` and optionally ``quad, scale, linear``, and ``skew``
            for J. Others belong to the time terms.
        bind: The same potentials by autograd (`flowfactor.networks.two_layer`).
        activation: The activation.
        time_maps: ``(stack, t=[S], derivative=bool) -> c1, dc1/dt, c2, dc2/dt``, each ``[G, S or 1, H]``; a derivative
            is None where it is zero.
        laplacian: ``"exact"``, ``"hutchinson"`` or None.
        probe: Hutchinson's probes ``[G, n, P D]``.
        derivative: Whether the time derivative is wanted.
        features: The time features of which the time terms are linear maps ``v1, b1`` and ``v2, b2``, where they are; of
            size 0 for terms ``b1`` and ``b2`` whatever the time.
    """

    def __init__(
        self, stack: Stack, bind: Bound, activation: Activation, time_maps: TimeMaps, laplacian: str | None = None,
        probe: Tensor | None = None, derivative: bool = False, features: TimeFeatures | None = None,
    ) -> None:  # fmt: skip
        super().__init__(stack, lambda p: with_velocity(bind(p), p.get("skew")))
        p = self.p
        b1 = p["b1"]
        self.rows = b1 if b1.shape[-2] != 1 else None  # a context gives every sample a bias of its own: see `_of_time`
        timely = stack if self.rows is None else {**stack, "b1": torch.zeros_like(b1[:, :1])}
        self.leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in timely.items()}
        self.act, self.time_maps, self.derivative = activation, time_maps, derivative
        # A cost that reads the time derivative reads the velocity too: a copy of it is cheaper than one more product.
        self.keeps_velocity = derivative
        self.laplacian = laplacian
        self.w1, self.w2, self.w3, self.skew = p["w1"], p["w2"], p["w3"], p.get("skew")
        self.h1, self.has_quad = self.w1.shape[-2], "quad" in p
        # One product serves W1 z and A z, one W1' x and A' s y.
        self.up = torch.cat([self.w1, p["quad"]], -2) if self.has_quad else self.w1
        self.down = torch.cat([self.w1, p["scale"].mT * p["quad"]], -2) if self.has_quad else self.w1
        self.up_t = transposed(self.up)
        self.lam_up, self.out, self.bias = self.up_t, self.down, p["linear"] if self.has_quad else None
        if self.skew is not None:  # J acts on the weights, once a solve
            self.lam_up, self.out = (self.up @ self.skew.mT).mT.contiguous(), self.down @ self.skew.mT
            self.bias = self.bias @ self.skew.mT if self.bias is not None else None
        self.w2_t, self.w3_w2 = transposed(self.w2), self.w3.mT * self.w2
        self.stage_terms, self.own_times = None, features is not None
        if features is not None:
            layers = [(p.get("v1"), p["b1"], self.up.shape[-2]), (p.get("v2"), p["b2"], self.w2.shape[-2])]
            self.stage_terms = StageTerms(features, layers)
        self.timeless = self.stage_terms is not None and self.stage_terms.timeless
        if laplacian is not None:
            self._fix_laplacian(probe)

    def _fix_laplacian(self, probe: Tensor | None) -> None:
        """What weights and probes alone decide, once a solve."""
        p = self.p
        if self.laplacian == "hutchinson":
            assert probe is not None
            self.probes = Probes(probe, self.w1.shape[-1])
            along = product(self.probes.e, self.up_t)
            self.along1 = along[..., : self.h1]
            self.squared1 = self.probes.mean(self.along1.square())
            self.along_quad = along[..., self.h1 :]
            squared = self.probes.mean(self.along_quad.square())
            self.constant = (p["scale"] * squared).sum(-1) if self.has_quad else None
            return
        self.squared1 = self.w1.square().sum(-1).unsqueeze(-2)  # [G, 1, H1]
        self.row_norms = weighted_row_norms(self.w2, self.w1)
        self.constant = (p["scale"] * p["quad"].square().sum(-1).unsqueeze(-2)).sum(-1) if self.has_quad else None

    def time_terms(self, ts: Times) -> list[Any]:
        """``[c1, 0]`` and ``c2``, ``[G, 1, .]`` each; or as `StageTerms` has them."""
        if self.stage_terms is not None:
            return self.stage_terms(ts)
        c1, _, c2, _ = self.time_maps(self.leaves, t=self.w1.new_tensor(ts), derivative=False)
        if self.has_quad:
            c1 = F.pad(c1, (0, self.up.shape[-2] - self.h1))
        return list(zip(*(c.detach().expand(-1, len(ts), -1).split(1, 1) for c in (c1, c2)), strict=True))

    def product(self, layer: int, x: Tensor, weight: Tensor, terms: Any) -> Tensor:
        """A layer's product and what it adds to it at a stage."""
        if self.stage_terms is not None:
            return self.stage_terms.product(layer, x, weight, terms)
        out = matmul(x, weight).add_(terms[layer])
        return out if layer or self.rows is None else out.add_(self.rows)

    def velocity(self, z: Tensor, terms: Any, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        inner = self.product(0, z, self.up_t, terms)
        a1 = inner[..., : self.h1]
        b1 = self.act.quick_base(a1)
        h1 = self.act.quick(a1, b1)
        a2 = self.product(1, h1, self.w2_t, terms)
        b2 = self.act.quick_base(a2)
        g1 = matmul(self.act.first(b2), self.w3_w2)
        torch.mul(g1, self.act.first(b1), out=a1)  # [a1 | A z] becomes [delta1 | A z]: nothing needs a1 any more
        gradient = matmul(inner, self.out, out)
        if self.bias is not None:
            gradient += self.bias
        kept = () if not self.keeps_velocity else (gradient,) if out is None else (gradient.clone(),)
        return gradient, (z, inner, a2, b1, b2, g1, h1, *kept)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        """The Laplacians of u."""
        return self.laplacians(*stacked([r[3:6] for r in residuals])).transpose(0, 1)

    def laplacians(self, b1: Tensor, b2: Tensor, g1: Tensor) -> Tensor:
        """The Laplacians ``[G, S, n]`` at S stages."""
        s1, s2 = self.act.first(b1), self.act.first(b2)
        along2 = self.along2(s1) if self.laplacian == "hutchinson" else None
        return self.laplacians_of(s1, self.act.second(b1, s1).mul_(g1), self.act.second(b2, s2), along2)

    def along2(self, s1: Tensor) -> Tensor:
        """How each probe moves the second layer, ``[G, S, n, (P,) H2]``."""
        return product(self.probes.spread(s1) * self.along1.unsqueeze(1), self.w2_t)

    def laplacians_of(self, s1: Tensor, g1_s1_prime: Tensor, s2_prime: Tensor, along2: Tensor | None) -> Tensor:
        """The same of slopes, second derivatives and `along2`, which stages have worked out."""
        if self.laplacian is None:
            raise RuntimeError("this adjoint was bound without a Laplacian")
        if self.laplacian == "hutchinson":
            assert along2 is not None
            of_second = product(self.probes.mean(along2.square()).mul_(s2_prime), self.w3.mT).squeeze(-1)
        else:
            m2 = s2_prime * self.w3.unsqueeze(1)
            of_second = self.row_norms(flat(s1), flat(m2)).reshape(m2.shape[:-1])
        total = (g1_s1_prime * self.squared1.unsqueeze(1)).sum(-1).add_(of_second)
        return total if self.constant is None else total.add_(self.constant.unsqueeze(1))

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> TwoLayerStages:
        return TwoLayerStages(self, stacked(residuals), ts)


class TwoLayerStages(Stages):
    """Stages of a `TwoLayerAdjoint`."""

    def __init__(self, adjoint: TwoLayerAdjoint, residuals: Sequence[Tensor], ts: Times) -> None:
        self.adjoint, self.ts = adjoint, ts
        self.z, self.inner, self.a2, self.b1, self.b2, self.g1, self.h1_value, *kept = residuals
        self.velocities = kept[0] if kept else None

    # Worked out when an output or a pullback needs it: until then the solve holds the residuals alone.

    @cached_property
    def s1(self) -> Tensor:
        return self.adjoint.act.first(self.b1)

    @cached_property
    def s2(self) -> Tensor:
        return self.adjoint.act.first(self.b2)

    @cached_property
    def s1_prime(self) -> Tensor:
        return self.adjoint.act.second(self.b1, self.s1)

    @cached_property
    def g1_s1_prime(self) -> Tensor:
        return self.g1 * self.s1_prime

    @cached_property
    def s2_prime(self) -> Tensor:
        return self.adjoint.act.second(self.b2, self.s2)

    @cached_property
    def w3_s2(self) -> Tensor:
        return self.s2 * self.adjoint.w3.unsqueeze(1)

    @cached_property
    def w3_s2_prime(self) -> Tensor:
        return self.s2_prime * self.adjoint.w3.unsqueeze(1)

    @cached_property
    def along2(self) -> Tensor:
        """See `TwoLayerAdjoint.along2`: the Laplacian needs it, and so does its pullback."""
        return self.adjoint.along2(self.s1)

    def laplacians(self) -> Tensor:
        """The Laplacians of the two-layer network, ``[G, S, n]``."""
        along2 = self.along2 if self.adjoint.laplacian == "hutchinson" else None
        return self.adjoint.laplacians_of(self.s1, self.g1_s1_prime, self.s2_prime, along2)

    @cached_property
    def c(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The time terms of all stages, with their graph: ``[G, S or 1, H]``, of own times ``[G, S n, H]``."""
        a = self.adjoint
        ts = self.ts
        t = ts.to(self.z.dtype).transpose(0, 1).flatten(1) if isinstance(ts, Tensor) else self.z.new_tensor(ts)
        with torch.enable_grad():
            return a.time_maps(a.leaves, t=t, derivative=a.derivative)

    @property
    def own_times(self) -> bool:
        """Whether samples are at times of their own."""
        return isinstance(self.ts, Tensor)

    def of_samples(self, c: Tensor) -> Tensor:
        """Time terms as they meet samples, ``[G, S, 1 or n, H]``."""
        return c.detach().reshape(*self.z.shape[:3], -1) if self.own_times else c.detach().unsqueeze(2)

    def h2(self) -> Tensor:
        """The second hidden layer."""
        return self.adjoint.act.quick(self.a2, self.b2)

    def gradient(self) -> Tensor:
        """The gradient of the two-layer network, before J."""
        out = product(self.inner, self.adjoint.down)
        return out.add_(self.adjoint.p["linear"].unsqueeze(1)) if self.adjoint.has_quad else out

    def outputs(self, want: frozenset[str]) -> Outputs:
        a, out = self.adjoint, Outputs()
        if "value" in want:
            value = (self.h2() * a.w3.unsqueeze(1)).sum(-1)
            if a.has_quad:
                q = self.inner[..., a.h1 :]
                value = value + 0.5 * (a.p["scale"].unsqueeze(1) * q * q).sum(-1)
                value = value + (self.z * a.p["linear"].unsqueeze(1)).sum(-1)
            out["value"] = value
        if "velocity" in want and self.velocities is not None:
            out["velocity"] = self.velocities
        elif "velocity" in want:
            out["velocity"] = product(self.inner, a.out)
            if a.bias is not None:
                out["velocity"] += a.bias.unsqueeze(1)
        if "gradient" in want and a.skew is None:
            out["gradient"] = out["velocity"] if "velocity" in out else self.gradient()
        if "time" in want and a.timeless:
            out["time"] = torch.zeros_like(self.z[..., 0])
        elif "time" in want:
            _, d1, _, d2 = self.c
            assert d2 is not None
            first = 0 if d1 is None else (self.inner[..., : a.h1] * self.of_samples(d1)).sum(-1)
            out["time"] = (self.w3_s2 * self.of_samples(d2)).sum(-1) + first
        if "divergence" in want:
            out["divergence"] = self.laplacians()
        return out

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return TwoLayerPullback(self, cotangents, parameters)


class TwoLayerPullback(Pullback):
    """The adjoint of the stages of a `TwoLayerAdjoint`."""

    def __init__(self, stages: TwoLayerStages, cotangents: Outputs, parameters: bool) -> None:
        super().__init__(stages.z.shape[1], parameters=parameters)
        self.stages, self.adjoint = stages, stages.adjoint
        self.extra: Products = {}
        self.g1_s1_prime = stages.g1_s1_prime
        self.r1 = self.r2 = self.r3 = self.rp1 = self.rp2 = self.rq = None
        assert self.adjoint.skew is None or "gradient" not in cotangents
        self.lam0 = cotangents.get("gradient")
        if "velocity" in cotangents:
            self.lam0 = add(self.lam0, cotangents["velocity"])
        self.tau = None if self.adjoint.timeless else cotangents.get("time")
        if self.tau is not None:
            _, d1, _, d2 = stages.c
            assert d2 is not None
            self.rp1 = None if d1 is None else self.tau.unsqueeze(-1) * stages.of_samples(d1)
            self.rp2 = self.tau.unsqueeze(-1) * stages.of_samples(d2)
        if "divergence" in cotangents:
            hutchinson = self.adjoint.laplacian == "hutchinson"
            (self._begin_hutchinson if hutchinson else self._begin_exact)(cotangents["divergence"], parameters)
        if "value" in cotangents:
            self._begin_value(cotangents["value"])
        wide = (*stages.z.shape[:-1], self.adjoint.up.shape[-2])
        self.lam, self.p1, self.a1_bar = torch.empty_like(stages.z), stages.z.new_empty(wide), stages.z.new_empty(wide)
        self.g1_bar, self.x2, self.a2_bar = (torch.empty_like(x) for x in (stages.g1, stages.a2, stages.a2))

    def _begin_value(self, value: Tensor) -> None:
        s, a, u = self.stages, self.adjoint, value.unsqueeze(-1)
        self.r2 = add(self.r2, u * s.w3_s2)
        sum_into(self.extra, "w3", outer(u, s.h2()))
        if not a.has_quad:
            return
        self.rq = u * s.inner[..., a.h1 :]
        sum_into(self.extra, "scale", 0.5 * (self.rq * s.inner[..., a.h1 :]).sum((1, 2)).unsqueeze(-2))
        sum_into(self.extra, "linear", (u * s.z).sum((1, 2)).unsqueeze(-2))
        self.direct = u * a.p["linear"].unsqueeze(1)

    def _begin_hutchinson(self, laplacian: Tensor, parameters: bool) -> None:
        # In place where it can be: the arrays of all stages outgrow the cache, and moving them is what this costs.
        s, a = self.stages, self.adjoint
        mu, e1, probes = laplacian.unsqueeze(-1), a.along1.unsqueeze(1), a.probes
        share = mu if probes.count == 1 else mu / probes.count
        along1, along2 = probes.spread(s.s1) * e1, s.along2
        squares = probes.spread(2 * share) * along2
        along2_bar = probes.spread(s.w3_s2_prime) * squares
        back = product(along2_bar, a.w2)
        squares = probes.total(squares.mul_(along2))  # twice those of the Laplacian
        self.r2 = a.act.third(s.b2, s.s2, s.s2_prime).mul_(squares).mul_(0.5 * a.w3.unsqueeze(1))
        mu_squared = mu * a.squared1.unsqueeze(1)
        self.r1 = mu_squared * s.s1_prime
        self.r3 = a.act.third(s.b1, s.s1, s.s1_prime).mul_(s.g1).mul_(mu_squared)
        self.r3.addcmul_(probes.total(e1 * back), s.s1_prime)
        if not parameters:
            return
        e1_bar = 2 * a.along1 * probes.spread((share * self.g1_s1_prime).sum(1))
        e1_bar += back.mul_(probes.spread(s.s1)).sum(1)
        w3_bar = squares.mul_(s.s2_prime).sum((1, 2)).mul_(0.5).unsqueeze(-2)
        self.extra = {"w1": outer(e1_bar, probes.e), "w2": outer(along2_bar, along1), "w3": w3_bar}
        if a.has_quad:
            weight = share.sum(1)
            squared = probes.total(a.along_quad.square())
            self.extra["scale"] = (weight * squared).sum(-2, keepdim=True)
            self.extra["quad"] = outer(probes.spread(2 * weight * a.p["scale"]) * a.along_quad, probes.e)

    def _begin_exact(self, laplacian: Tensor, parameters: bool) -> None:
        s, a, mu = self.stages, self.adjoint, laplacian.unsqueeze(-1)
        s1_second = a.act.third(s.b1, s.s1, s.s1_prime)
        found = a.row_norms.pull(flat(s.s1), flat(s.w3_s2_prime), laplacian.flatten(1), parameters=parameters)
        s1_bar, m2_bar = found[0].reshape(s.s1.shape), found[1].reshape(s.s2.shape)
        squared1 = a.squared1.unsqueeze(1)
        self.r1 = mu * squared1 * s.s1_prime
        self.r2 = a.w3.unsqueeze(1) * m2_bar * a.act.third(s.b2, s.s2, s.s2_prime)
        self.r3 = s1_bar * s.s1_prime + mu * s.g1 * squared1 * s1_second
        if not parameters:
            return
        norms_bar = (mu * self.g1_s1_prime).sum((1, 2)).unsqueeze(-1)
        w3_bar = (m2_bar * s.s2_prime).sum((1, 2)).unsqueeze(-2)
        assert found[2] is not None and found[3] is not None
        self.extra = {"w1": found[2] + 2 * norms_bar * a.w1, "w2": found[3], "w3": w3_bar}
        if a.has_quad:
            weight, quad = laplacian.sum((1, 2)).reshape(-1, 1, 1), a.p["quad"]
            self.extra["scale"] = weight * quad.square().sum(-1).unsqueeze(-2)
            self.extra["quad"] = 2 * weight * a.p["scale"].mT * quad

    def _pull(self, at: int | slice, cotangent: Tensor, value: Tensor | None = None) -> Tensor:
        """See `Pullback.pull`; ``value [G, (S,) n, 1]`` is a cotangent of the value beside it, but for its part in w3."""
        s, a, lam = self.stages, self.adjoint, self.lam[:, at]
        if self.lam0 is None:
            lam.copy_(cotangent)
        else:
            torch.add(cotangent, self.lam0[:, at], out=lam)
        p = self.p1[:, at]
        product(lam, a.lam_up, p)
        p1 = p[..., : a.h1]
        if self.rp1 is not None:
            p1 += self.rp1[:, at]
        g1_bar = self.g1_bar[:, at]
        torch.mul(p1, s.s1[:, at], out=g1_bar)
        if self.r1 is not None:
            g1_bar += self.r1[:, at]
        x2 = self.x2[:, at]
        product(g1_bar, a.w2_t, x2)
        if self.rp2 is not None:
            x2 += self.rp2[:, at]
        a2_bar = self.a2_bar[:, at]
        torch.mul(x2, s.w3_s2_prime[:, at], out=a2_bar)
        if self.r2 is not None:
            a2_bar += self.r2[:, at]
        if value is not None:
            a2_bar.addcmul_(value, s.w3_s2[:, at])
        inner = self.a1_bar[:, at]
        a1_bar = inner[..., : a.h1]
        torch.mul(p1, self.g1_s1_prime[:, at], out=a1_bar)
        a1_bar.addcmul_(product(a2_bar, a.w2), s.s1[:, at])
        if self.r3 is not None:
            a1_bar += self.r3[:, at]
        if a.has_quad:
            q = p[..., a.h1 :]
            inner[..., a.h1 :] = q if self.rq is None else q + self.rq[:, at]
        return product(inner, a.down)

    def _gradients(self) -> list[Tensor | None]:
        found = self._products()
        return [found.get(name) for name in self.adjoint.names]

    def _products(self) -> Products:
        """The cotangents of all parameters, by name."""
        s, a, out = self.stages, self.adjoint, dict(self.extra)
        lam = self.lam if a.skew is None else product(self.lam, a.skew)
        both = outer(self.a1_bar, s.z).add_(outer(s.inner, lam))
        sum_into(out, "w1", both[..., : a.h1, :])
        if a.has_quad:
            q, pq = s.inner[..., a.h1 :], self.p1[..., a.h1 :]
            sum_into(out, "scale", (q * pq).sum((1, 2)).unsqueeze(-2))
            sum_into(out, "linear", lam.sum((1, 2)).unsqueeze(-2))
            sum_into(out, "quad", a.p["scale"].mT * both[..., a.h1 :, :])
        outer_into(out, "w2", self.a2_bar, s.h1_value)
        outer_into(out, "w2", s.w3_s2, self.g1_bar)
        sum_into(out, "w3", (s.s2 * self.x2).sum((1, 2)).unsqueeze(-2))
        self._of_time(out)
        if "skew" in a.names:
            out["skew"] = outer(self.lam, s.gradient())
        return out

    def _of_time(self, out: Products) -> None:
        """Adds what reaches parameters through the time terms."""
        s, a = self.stages, self.adjoint
        first = self.a1_bar[..., : a.h1]
        if a.stage_terms is not None and self.tau is None:
            for layer, bar in enumerate((first, self.a2_bar)):
                for name, value in a.stage_terms.gradients(layer, bar, s.ts).items():
                    sum_into(out, f"{name}{layer + 1}", value)
            return
        if a.rows is not None:
            sum_into(out, "b1", first.sum(1))
        found: list[Tensor | None] = [first, None, self.a2_bar, None]
        if self.tau is not None:
            tau = self.tau.unsqueeze(-1)
            found[1], found[3] = tau * s.inner[..., : a.h1], tau * s.w3_s2
        cotangents = [None if bar is None else flat(bar) if s.own_times else bar.sum(2) for bar in found]
        pairs = [
            (c, bar.sum(1, keepdim=True) if c.shape[1] == 1 else bar)
            for c, bar in zip(s.c, cotangents, strict=True)
            if c is not None and bar is not None and c.requires_grad
        ]
        if not pairs:
            return
        cs, bars = [c for c, _ in pairs], [bar for _, bar in pairs]
        leaves = {name: a.leaves[name] for name in a.names if a.leaves[name].requires_grad}
        reached = torch.autograd.grad(cs, list(leaves.values()), bars, allow_unused=True, retain_graph=True)
        for name, value in zip(leaves, reached, strict=True):
            if value is not None:
                sum_into(out, name, value)
