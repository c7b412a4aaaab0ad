"""Velocity networks as a solve uses them: the tape of a `FreeField` (see `flowfactor.potentials._tape`)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor._layout import Stack
from flowfactor.potentials._activations import one_minus_square, quick_tanh
from flowfactor.potentials._batched import Products, outer, product
from flowfactor.potentials._tape import Stages
from flowfactor.potentials._time import StageTerms, TimeFeatures


class FreeTape:
    r"""$v = W_3 \tanh(W_2 \tanh(W_1 z + c_1(t)) + c_2(t)) + P Q z + b$, bound for one solve.

    All methods run without autograd. Of the divergence it knows nothing.

    Args:
        stack: Parameters by name, each ``[K, ...]``; ``w1, v1, b1, w2, v2, b2, w3, bias`` and optionally ``q, p``.
        features: Time features of c(t).
    """

    def __init__(self, stack: Stack, features: TimeFeatures) -> None:
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
        """The velocity at all stages, under the name that a potential's part of a velocity has."""
        rows = self._velocity(self.inner.flatten(1, 2), self.h2.flatten(1, 2)).add_(self.p["bias"])
        return {"gradient": rows.reshape(self.z.shape)}

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> None:
        """Prepares the way back."""
        self.lam, self.a1_bar, self.a2_bar = (torch.empty_like(x) for x in (self.z, self.inner, self.h2))

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity."""
        self.lam[at] = lam
        a2_bar = product(lam, self.p["w3"]).mul_(self.slope2[at])
        self.a2_bar[at] = a2_bar
        a1_bar = self.a1_bar[at]
        torch.mul(product(a2_bar, self.p["w2"]), self.slope1[at], out=a1_bar[..., : self.h1])
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
        return out | {"q": up_bar[:, n:], "p": outer(self.lam, self.inner[..., n:])} if self.linear else out
