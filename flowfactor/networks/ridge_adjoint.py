"""Sums of ridge functions as a solve uses them (see `flowfactor.networks.two_layer_adjoint`)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square, quick_tanh
from flowfactor.networks.batched import Products, outer, product
from flowfactor.networks.batching import Stack
from flowfactor.networks.time import StageTerms, TimeFeatures
from flowfactor.networks.two_layer_adjoint import Stages


class RidgeTape:
    r"""$v = R^\top \tanh(W z + c(t)) + P^\top Q z$, bound for one solve. All methods run without autograd.

    Args:
        stack: Parameters by name, each ``[K, ...]``; ``w, v, b, r`` and optionally ``q, p``.
        features: Time features of c(t).
    """

    def __init__(self, stack: Stack, features: TimeFeatures) -> None:
        p = {name: value.detach() for name, value in stack.items()}
        self.features = features
        self.hidden, self.linear = p["w"].shape[-2], "p" in p
        # One product serves W z and Q z, and one R'h and P'x.
        self.w = torch.cat([p["w"], p["q"]], -2) if self.linear else p["w"]
        self.r = torch.cat([p["r"], p["p"]], -2) if self.linear else p["r"]
        self.w_t, self.r_t = self.w.mT.contiguous(), self.r.mT.contiguous()
        self.terms = StageTerms(features, [(p["v"], p["b"], self.w.shape[-2])])  # [c, 0]
        self.records: list[tuple[Tensor, ...]] = []

    def _features(self, ts: list[float], like: Tensor) -> Tensor:
        return self.features(torch.tensor(ts, dtype=like.dtype, device=like.device), derivative=False)[0]

    def gradient(
        self, z: Tensor, terms: tuple[Tensor, ...], record: bool, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The velocity at one stage ``[K, n, D]``, written into ``out`` if given, and what was found on the way."""
        h = torch.bmm(z, self.w_t).add_(terms[0])
        turns = h[..., : self.hidden]
        quick_tanh(turns, out=turns)
        found = (z, h)
        if record:
            self.records.append(found)
        return torch.bmm(h, self.r, out=out), found

    def take(self, ts: list[float]) -> None:
        """Stacks the records of all stages, which were at the times ``ts``; only the last one is kept beside."""
        self.z, self.h = (torch.stack(x, 1) for x in zip(*self.records, strict=True))
        self.records = self.records[-1:]
        self.ts = ts
        h = self.h[..., : self.hidden]
        self.slope = one_minus_square(h)

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """The velocity at all stages, under the name that a potential's part of a velocity has."""
        return {"gradient": product(self.h, self.r)}

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> None:
        """Prepares the way back."""
        self.lam, self.a_bar = torch.empty_like(self.z), torch.empty_like(self.h)

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity."""
        self.lam[at] = lam
        a_bar = product(lam, self.r_t)
        a_bar[..., : self.hidden] *= self.slope[at]
        self.a_bar[at] = a_bar
        return product(a_bar, self.w)

    def gradients(self) -> Products:
        """The cotangents of all parameters, by name, after every stage has been pulled."""
        w_bar, r_bar = outer(self.a_bar, self.z), outer(self.h, self.lam)
        per_stage = self.a_bar[..., : self.hidden].sum(2)  # [K, S, H]
        n = self.hidden
        out = {
            "w": w_bar[:, :n], "r": r_bar[:, :n],
            "v": per_stage.mT @ self._features(self.ts, self.z), "b": per_stage.sum(1, keepdim=True),
        }  # fmt: skip
        return out | {"q": w_bar[:, n:], "p": r_bar[:, n:]} if self.linear else out
