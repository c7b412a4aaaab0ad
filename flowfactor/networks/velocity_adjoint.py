r"""The adjoint of free velocity networks (`flowfactor.networks.stage_adjoint` has the protocol).

With the slopes $s_i = 1 - h_i^2$ of its two layers, the divergence is
$$\nabla\cdot v = s_2^\top \big(W_2 \circ (W_1 W_3)^\top\big) s_1 + \mathrm{tr}\,P Q^\top ,$$
and Hutchinson's estimate along a probe e is $(s_2 \circ W_3^\top e)\cdot W_2\,(s_1 \circ W_1 e) + e^\top P Q^\top e$;
both are bilinear in the slopes. Of several probes the estimate is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square, quick_tanh
from flowfactor.networks.batched import Products, outer, product, sum_into
from flowfactor.networks.batching import Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.stage_adjoint import Bound, NetworkAdjoint, Outputs, Pullback, Stages, stacked
from flowfactor.networks.time import StageTerms, TimeFeatures, Times

Residuals = tuple[Tensor, ...]


class VelocityAdjoint(NetworkAdjoint):
    r"""$v = W_3 \tanh(W_2 \tanh(W_1 z + c_1(t)) + c_2(t)) + P Q^\top z + b$ for stacked networks.

    Args:
        stack: Parameters by name, each ``[G, ...]``; ``w1, v1, b1, w2, v2, b2, w3, bias`` and optionally ``q, p``;
            ``v1`` and ``v2`` where there are time features.
        bind: The same velocities by autograd.
        features: Time features of c(t).
        divergence: ``"exact"``, ``"hutchinson"`` or None.
        probe: Hutchinson's probes ``[G, n, P D]``.
    """

    own_times = True

    def __init__(
        self, stack: Stack, bind: Bound, features: TimeFeatures, divergence: str | None = None,
        probe: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(stack, bind)
        p, self.features = self.p, features
        self.h1, self.linear = p["w1"].shape[-2], "p" in p
        # One product serves W1 z and Q z, and one their transposes.
        self.up = torch.cat([p["w1"], p["q"]], -2) if self.linear else p["w1"]
        self.up_t, self.w2_t, self.w3_t = (x.mT.contiguous() for x in (self.up, p["w2"], p["w3"]))
        self.p_t = p["p"].mT.contiguous() if self.linear else None
        layers = [(p.get("v1"), p["b1"], self.up.shape[-2]), (p.get("v2"), p["b2"], p["w2"].shape[-2])]
        self.stage_terms = StageTerms(features, layers)  # [c1, 0] and c2
        self.kind = divergence
        if divergence is not None:
            self._fix_divergence(probe)

    def _fix_divergence(self, probe: Tensor | None) -> None:
        """What weights and probes alone decide, once a solve."""
        p = self.p
        self.constant = None
        if self.kind == "exact":
            self.through = (p["w1"] @ p["w3"]).mT  # [K, H2, H1]
            self.form = p["w2"] * self.through
            if self.linear:
                self.constant = (p["p"] * p["q"].mT).sum((1, 2)).reshape(-1, 1, 1)
            return
        assert probe is not None
        self.probes = Probes(probe, p["w1"].shape[-1])
        e = self.probes.e
        self.along1, self.back3 = product(e, p["w1"].mT), product(e, p["w3"])
        if self.linear:
            self.along_q, self.along_p = product(e, p["q"].mT), product(e, p["p"])
            self.constant = self.probes.mean(self.along_q * self.along_p).sum(-1).unsqueeze(1)

    def time_terms(self, ts: Times) -> list[Any]:
        """See `StageTerms`: ``[c1, 0]`` and ``c2``."""
        return self.stage_terms(ts)

    def velocity(self, z: Tensor, terms: Any, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        inner = self.stage_terms.product(0, z, self.up_t, terms)
        first = inner[..., : self.h1]
        quick_tanh(first, out=first)
        h2 = self.stage_terms.product(1, first, self.w2_t, terms)
        quick_tanh(h2, out=h2)
        return self.velocity_of(inner, h2, out), (z, inner, h2)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        inner, h2 = stacked([r[1:] for r in residuals])
        return self.divergence_of(one_minus_square(inner[..., : self.h1]), one_minus_square(h2)).transpose(0, 1)

    def divergence_of(self, s1: Tensor, s2: Tensor) -> Tensor:
        """The divergences ``[G, S, n]`` at S stages, of the slopes of both layers."""
        if self.kind is None:
            raise RuntimeError("this adjoint was bound without a divergence")
        if self.kind == "exact":
            div = product(s2, self.form).mul_(s1).sum(-1)
        else:
            along2 = product(self.probes.spread(s1) * self.along1.unsqueeze(1), self.w2_t)
            div = self.probes.mean(along2.mul_(self.back3.unsqueeze(1))).mul_(s2).sum(-1)
        return div if self.constant is None else div.add_(self.constant)

    def velocity_of(self, inner: Tensor, h2: Tensor, out: Tensor | None = None) -> Tensor:
        """The velocity, of ``[tanh a1 | Q z]`` and the second layer, ``[G, m, .]``."""
        v = torch.bmm(h2, self.w3_t, out=out)
        if self.p_t is not None:
            v.baddbmm_(inner[..., self.h1 :], self.p_t)
        return v.add_(self.p["bias"])

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> VelocityStages:
        return VelocityStages(self, stacked(residuals), ts)


class VelocityStages(Stages):
    """Stages of a `VelocityAdjoint`."""

    def __init__(self, adjoint: VelocityAdjoint, residuals: Sequence[Tensor], ts: Times) -> None:
        self.adjoint, self.ts = adjoint, ts
        self.z, self.inner, self.h2 = residuals

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """The slopes of both layers."""
        return one_minus_square(self.inner[..., : self.adjoint.h1]), one_minus_square(self.h2)

    def outputs(self, want: frozenset[str]) -> Outputs:
        out = Outputs()
        if "velocity" in want:
            flat = self.adjoint.velocity_of(self.inner.flatten(1, 2), self.h2.flatten(1, 2))
            out["velocity"] = flat.reshape(self.z.shape)
        if "divergence" in want:
            out["divergence"] = self.adjoint.divergence_of(*self.slopes)
        return out

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return VelocityPullback(self, cotangents, parameters)


class VelocityPullback(Pullback):
    """The adjoint of the stages of a `VelocityAdjoint`."""

    def __init__(self, stages: VelocityStages, cotangents: Outputs, parameters: bool) -> None:
        super().__init__(stages.z.shape[1], parameters=parameters)
        self.stages, self.adjoint = stages, stages.adjoint
        self.lam, self.a1_bar, self.a2_bar = (torch.empty_like(x) for x in (stages.z, stages.inner, stages.h2))
        self.lam0, self.extra = cotangents.get("velocity"), Products()
        self.r1 = self.r2 = None
        if "divergence" not in cotangents:
            return
        begin = self._begin_exact if self.adjoint.kind == "exact" else self._begin_hutchinson
        s1_bar, s2_bar = begin(cotangents["divergence"], parameters)
        slope1, slope2 = stages.slopes
        self.r1 = s1_bar.mul_(stages.inner[..., : self.adjoint.h1]).mul_(slope1).mul_(-2)
        self.r2 = s2_bar.mul_(stages.h2).mul_(slope2).mul_(-2)

    def _begin_exact(self, mu: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
        """The cotangents of both slopes; adds those of the weights that the form is made of."""
        a, p, each, (slope1, slope2) = self.adjoint, self.adjoint.p, mu.unsqueeze(-1), self.stages.slopes
        weighted = each * slope2
        if parameters:
            form_bar = outer(weighted, slope1)
            through_bar = form_bar * p["w2"]
            self.extra = {
                "w2": form_bar * a.through, "w1": through_bar.mT @ p["w3"].mT, "w3": p["w1"].mT @ through_bar.mT
            }  # fmt: skip
            if a.linear:
                total = mu.sum((1, 2)).reshape(-1, 1, 1)
                self.extra |= {"p": total * p["q"].mT, "q": total * p["p"].mT}
        return product(weighted, a.form), product(slope1, a.form.mT).mul_(each)

    def _begin_hutchinson(self, mu: Tensor, parameters: bool) -> tuple[Tensor, Tensor]:
        """See `_begin_exact`."""
        a, (slope1, slope2), probes = self.adjoint, self.stages.slopes, self.adjoint.probes
        share = mu.unsqueeze(-1) if probes.count == 1 else mu.unsqueeze(-1) / probes.count
        along1 = probes.spread(slope1) * a.along1.unsqueeze(1)
        weighted = probes.spread(share) * a.back3.unsqueeze(1)
        along2, along2_bar = product(along1, a.w2_t), weighted * probes.spread(slope2)
        along1_bar = product(along2_bar, a.p["w2"])
        if parameters:
            e1_bar = (along1_bar * probes.spread(slope1)).sum(1)
            e3_bar = (probes.spread(share * slope2) * along2).sum(1)
            self.extra = {
                "w2": outer(along2_bar, along1), "w1": outer(e1_bar, probes.e), "w3": outer(probes.e, e3_bar)
            }  # fmt: skip
            if a.linear:
                total = probes.spread(share.sum(1))
                self.extra |= {"p": outer(probes.e, total * a.along_q), "q": outer(total * a.along_p, probes.e)}
        return probes.total(along1_bar.mul_(a.along1.unsqueeze(1))), probes.total(weighted.mul_(along2))

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        a, p, lam, (slope1, slope2) = self.adjoint, self.adjoint.p, cotangent, self.stages.slopes
        if self.lam0 is not None:
            lam = lam + self.lam0[:, at]
        self.lam[:, at] = lam
        a2_bar = product(lam, p["w3"]).mul_(slope2[:, at])
        if self.r2 is not None:
            a2_bar += self.r2[:, at]
        self.a2_bar[:, at] = a2_bar
        a1_bar = self.a1_bar[:, at]
        torch.mul(product(a2_bar, p["w2"]), slope1[:, at], out=a1_bar[..., : a.h1])
        if self.r1 is not None:
            a1_bar[..., : a.h1] += self.r1[:, at]
        if a.linear:
            a1_bar[..., a.h1 :] = product(lam, p["p"])
        return product(a1_bar, a.up)

    def _gradients(self) -> list[Tensor | None]:
        s, a, n = self.stages, self.adjoint, self.adjoint.h1
        first = s.inner[..., :n]
        up_bar = outer(self.a1_bar, s.z)
        out = {
            "w1": up_bar[:, :n], "w2": outer(self.a2_bar, first), "w3": outer(self.lam, s.h2),
            "bias": self.lam.sum((1, 2)).unsqueeze(1),
        }  # fmt: skip
        for layer, bar in enumerate((self.a1_bar[..., :n], self.a2_bar)):
            out |= {f"{name}{layer + 1}": x for name, x in a.stage_terms.gradients(layer, bar, s.ts).items()}
        if a.linear:
            out |= {"q": up_bar[:, n:], "p": outer(self.lam, s.inner[..., n:])}
        for name, more in self.extra.items():
            sum_into(out, name, more)
        return [out.get(name) for name in a.names]
