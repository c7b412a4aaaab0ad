r"""Velocity networks as a solve uses them: the tape of a `FreeField` (see `flowfactor.networks.two_layer_adjoint`).

With the slopes $s_i = 1 - h_i^2$ of its two layers, the divergence is
$$\nabla\cdot v = s_2^\top \big(W_2 \circ (W_1 W_3)^\top\big) s_1 + \mathrm{tr}\,P Q^\top ,$$
and Hutchinson's estimate along a probe e is $(s_2 \circ W_3^\top e)\cdot W_2\,(s_1 \circ W_1 e) + e^\top P Q^\top e$;
both are bilinear in the slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square, quick_tanh
from flowfactor.networks.batched import Products, outer, product, sum_into
from flowfactor.networks.batching import Stack
from flowfactor.networks.time import StageTerms, TimeFeatures
from flowfactor.networks.two_layer_adjoint import Stages


class FreeTape:
    r"""$v = W_3 \tanh(W_2 \tanh(W_1 z + c_1(t)) + c_2(t)) + P Q^\top z + b$, bound for one solve.

    All methods run without autograd.

    Args:
        stack: Parameters by name, each ``[K, ...]``; ``w1, v1, b1, w2, v2, b2, w3, bias`` and optionally ``q, p``.
        features: Time features of c(t).
        divergence: ``"exact"``, ``"hutchinson"`` or None.
        probe: Hutchinson's probe ``[K, n, D]``.
    """

    def __init__(
        self, stack: Stack, features: TimeFeatures, divergence: str | None = None, probe: Tensor | None = None
    ) -> None:
        p = {name: value.detach() for name, value in stack.items()}
        self.p, self.features = p, features
        self.h1, self.linear = p["w1"].shape[-2], "p" in p
        # One product serves W1 z and Q z, and one their transposes.
        self.up = torch.cat([p["w1"], p["q"]], -2) if self.linear else p["w1"]
        self.up_t, self.w2_t, self.w3_t = (x.mT.contiguous() for x in (self.up, p["w2"], p["w3"]))
        self.p_t = p["p"].mT.contiguous() if self.linear else None
        layers = [(p["v1"], p["b1"], self.up.shape[-2]), (p["v2"], p["b2"], p["w2"].shape[-2])]
        self.terms = StageTerms(features, layers)  # [c1, 0] and c2
        self.records: list[tuple[Tensor, ...]] = []
        self.kind, self.probe = divergence, probe
        if divergence is not None:
            self._fix_divergence()

    def _fix_divergence(self) -> None:
        """What weights and probe alone decide, once a solve."""
        p = self.p
        self.constant = None
        if self.kind == "exact":
            self.through = (p["w1"] @ p["w3"]).mT  # [K, H2, H1]
            self.form = p["w2"] * self.through
            if self.linear:
                self.constant = (p["p"] * p["q"].mT).sum((1, 2)).reshape(-1, 1, 1)
            return
        assert self.probe is not None
        self.along1, self.back3 = torch.bmm(self.probe, p["w1"].mT), torch.bmm(self.probe, p["w3"])
        if self.linear:
            self.along_q, self.along_p = torch.bmm(self.probe, p["q"].mT), torch.bmm(self.probe, p["p"])
            self.constant = (self.along_q * self.along_p).sum(-1).unsqueeze(1)

    def laplacians(self, found: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """The divergences ``[K, S, n]`` of some stages (of a gradient they are Laplacians), from what `gradient` found."""
        first = torch.stack([inner[..., : self.h1] for _, inner, _ in found], 1)
        return self._divergence(one_minus_square(first), one_minus_square(torch.stack([h2 for *_, h2 in found], 1)))

    def _divergence(self, s1: Tensor, s2: Tensor) -> Tensor:
        if self.kind == "exact":
            div = product(s2, self.form).mul_(s1).sum(-1)
        else:
            div = product(s1 * self.along1.unsqueeze(1), self.w2_t).mul_(s2).mul_(self.back3.unsqueeze(1)).sum(-1)
        return div if self.constant is None else div.add_(self.constant)

    def _features(self, ts: list[float], like: Tensor) -> Tensor:
        return self.features(torch.tensor(ts, dtype=like.dtype, device=like.device), derivative=False)[0]

    def gradient(
        self, z: Tensor, terms: tuple[Tensor, ...], record: bool, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The velocity at one stage ``[K, n, D]``, written into ``out`` if given, and what was found on the way."""
        inner = torch.bmm(z, self.up_t).add_(terms[0])
        first = inner[..., : self.h1]
        quick_tanh(first, out=first)
        h2 = torch.bmm(first, self.w2_t).add_(terms[1])
        quick_tanh(h2, out=h2)
        found = (z, inner, h2)
        if record:
            self.records.append(found)
        return self._velocity(inner, h2, out).add_(self.p["bias"]), found

    def _velocity(self, inner: Tensor, h2: Tensor, out: Tensor | None = None) -> Tensor:
        """The velocity but for its constant, of ``[K, m, .]``."""
        v = torch.bmm(h2, self.w3_t, out=out)
        return v if self.p_t is None else v.baddbmm_(inner[..., self.h1 :], self.p_t)

    def take(self, ts: list[float]) -> None:
        """Stacks the records of all stages, which were at the times ``ts``; only the last one is kept beside."""
        self.z, self.inner, self.h2 = (torch.stack(x, 1) for x in zip(*self.records, strict=True))
        self.records = self.records[-1:]
        self.ts = ts
        self.slope1, self.slope2 = one_minus_square(self.inner[..., : self.h1]), one_minus_square(self.h2)

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """Velocity and divergence at all stages, under the names that a potential's parts of them have."""
        rows = self._velocity(self.inner.flatten(1, 2), self.h2.flatten(1, 2)).add_(self.p["bias"])
        out = {"gradient": rows.reshape(self.z.shape)}
        if "laplacian" in want:
            out["laplacian"] = self._divergence(self.slope1, self.slope2)
        return out

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> None:
        """Prepares the way back, for cotangents ``laplacian [K, S, n]`` of the divergences at all stages, where given."""
        self.lam, self.a1_bar, self.a2_bar = (torch.empty_like(x) for x in (self.z, self.inner, self.h2))
        self.extra: Products = {}
        self.r1 = self.r2 = None
        if "laplacian" not in cotangents:
            return
        mu = cotangents["laplacian"]
        s1_bar, s2_bar = (self._begin_exact if self.kind == "exact" else self._begin_hutchinson)(mu, weights)
        self.r1 = s1_bar.mul_(self.inner[..., : self.h1]).mul_(self.slope1).mul_(-2)
        self.r2 = s2_bar.mul_(self.h2).mul_(self.slope2).mul_(-2)

    def _begin_exact(self, mu: Tensor, weights: bool) -> tuple[Tensor, Tensor]:
        """The cotangents of both slopes; adds those of the weights that the form is made of."""
        p, each = self.p, mu.unsqueeze(-1)
        weighted = each * self.slope2
        if weights:
            form_bar = outer(weighted, self.slope1)
            through_bar = form_bar * p["w2"]
            self.extra = {
                "w2": form_bar * self.through, "w1": through_bar.mT @ p["w3"].mT, "w3": p["w1"].mT @ through_bar.mT
            }  # fmt: skip
            if self.linear:
                total = mu.sum((1, 2)).reshape(-1, 1, 1)
                self.extra |= {"p": total * p["q"].mT, "q": total * p["p"].mT}
        return product(weighted, self.form), product(self.slope1, self.form.mT).mul_(each)

    def _begin_hutchinson(self, mu: Tensor, weights: bool) -> tuple[Tensor, Tensor]:
        """See `_begin_exact`."""
        assert self.probe is not None
        along1, weighted = self.slope1 * self.along1.unsqueeze(1), mu.unsqueeze(-1) * self.back3.unsqueeze(1)
        along2, along2_bar = product(along1, self.w2_t), weighted * self.slope2
        along1_bar = product(along2_bar, self.p["w2"])
        if weights:
            e1_bar = (along1_bar * self.slope1).sum(1)
            e3_bar = (mu.unsqueeze(-1) * self.slope2 * along2).sum(1)
            self.extra = {
                "w2": outer(along2_bar, along1), "w1": e1_bar.mT @ self.probe, "w3": self.probe.mT @ e3_bar
            }  # fmt: skip
            if self.linear:
                total = mu.sum(1).unsqueeze(-1)
                self.extra |= {
                    "p": self.probe.mT @ (total * self.along_q), "q": (total * self.along_p).mT @ self.probe
                }  # fmt: skip
        return along1_bar.mul_(self.along1.unsqueeze(1)), weighted.mul_(along2)

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity."""
        self.lam[at] = lam
        a2_bar = product(lam, self.p["w3"]).mul_(self.slope2[at])
        if self.r2 is not None:
            a2_bar += self.r2[at]
        self.a2_bar[at] = a2_bar
        a1_bar = self.a1_bar[at]
        torch.mul(product(a2_bar, self.p["w2"]), self.slope1[at], out=a1_bar[..., : self.h1])
        if self.r1 is not None:
            a1_bar[..., : self.h1] += self.r1[at]
        if self.linear:
            a1_bar[..., self.h1 :] = product(lam, self.p["p"])
        return product(a1_bar, self.up)

    def gradients(self) -> Products:
        """The cotangents of all parameters, by name, after every stage has been pulled."""
        n, first = self.h1, self.inner[..., : self.h1]
        up_bar, f = outer(self.a1_bar, self.z), self._features(self.ts, self.z)
        out = {
            "w1": up_bar[:, :n], "w2": outer(self.a2_bar, first), "w3": outer(self.lam, self.h2),
            "bias": self.lam.sum((1, 2)).unsqueeze(1),
        }  # fmt: skip
        for layer, bar in (("1", self.a1_bar[..., :n]), ("2", self.a2_bar)):
            per_stage = bar.sum(2)  # [K, S, H]
            out |= {f"v{layer}": per_stage.mT @ f, f"b{layer}": per_stage.sum(1, keepdim=True)}
        if self.linear:
            out |= {"q": up_bar[:, n:], "p": outer(self.lam, self.inner[..., n:])}
        for name, more in self.extra.items():
            sum_into(out, name, more)
        return out
