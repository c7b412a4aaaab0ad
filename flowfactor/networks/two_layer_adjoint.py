r"""Two-layer potentials as a solve uses them: cheap stages forward, closed-form pulls backward.

`_two_layer` writes the derivatives of $u = w_3\cdot\sigma(W_2\,\sigma(W_1 z + c_1(t)) + c_2(t)) + \tfrac12 \sum_r s_r
(A_r z)^2 + b\cdot z$ as operations that autograd follows. A `TwoLayerTape` says the same without autograd. It records what
every stage of a solve found, and gives, for cotangents $\bar u, \lambda, \tau, \mu$ of value, gradient, time derivative and
Laplacian,
$$p_1 = W_1\lambda + \tau\dot c_1,\quad \bar g_1 = p_1 s_1 + r_1,\quad
  \bar a_2 = w_3 s_2' (W_2 \bar g_1 + \tau \dot c_2) + r_2,\quad
  \bar a_1 = g_1 s_1' p_1 + s_1 (W_2^\top \bar a_2) + r_3,\quad
  \bar z = W_1^\top \bar a_1 + A^\top s\,(A\lambda + \bar u A z) + \bar u b ,$$
where $r_1, r_2, r_3$ come from $\bar u$ and $\mu$. Only $\lambda$ has to travel back stage by stage; $r_i$ before that and
the gradients of all weights after it are large products over all stages at once.

Shapes: K networks, n samples each; a stage has ``[K, n, .]``, the record of S stages ``[K, S, n, .]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowfactor.networks.activations import Activation
from flowfactor.networks.batched import Products, add, dot, flat, outer, product, sum_into
from flowfactor.networks.batching import Stack
from flowfactor.networks.row_norms import weighted_row_norms
from flowfactor.networks.time import StageTerms, TimeFeatures

TimeTerms = Callable[..., tuple[Tensor, "Tensor | None", Tensor, "Tensor | None"]]
Turn = Callable[[Tensor], Tensor]
Stages = tuple["slice | int", ...]


class TwoLayerTape:
    """A stack of K two-layer networks, bound for one solve. All methods run without autograd.

    Args:
        stack: Parameters by name, each ``[K, ...]``; ``w1, w2, w3`` and optionally ``quad, scale, linear``. Others belong
            to the time terms.
        activation: The activation.
        time_terms: ``(stack, t=[S], derivative=bool) -> c1, dc1/dt, c2, dc2/dt``, each ``[K, S or 1, H]``; a derivative
            is None where it is zero.
        laplacian: ``"exact"``, ``"hutchinson"`` or None.
        probe: Hutchinson's probe ``[K, n, D]``.
        derivative: Whether the time derivative is wanted.
        turn: A linear map J of rows ``[K, ..., D]``, for a velocity J grad u; `gradient` and `pull` are then about J grad u.
        turn_back: The transposed map.
        features: The time features of which the time terms are linear maps ``v1, b1`` and ``v2, b2``, where they are.
    """

    def __init__(
        self,
        stack: Stack,
        activation: Activation,
        time_terms: TimeTerms,
        laplacian: str | None = None,
        probe: Tensor | None = None,
        derivative: bool = False,
        turn: Turn | None = None,
        turn_back: Turn | None = None,
        features: TimeFeatures | None = None,
    ) -> None:
        self.stack = {name: value.detach().requires_grad_(value.requires_grad) for name, value in stack.items()}
        p = {name: value.detach() for name, value in stack.items()}
        self.p, self.act, self.laplacian, self.probe = p, activation, laplacian, probe
        self.time_terms, self.derivative = time_terms, derivative
        self.w1, self.w2, self.w3 = p["w1"], p["w2"], p["w3"]
        self.h1 = self.w1.shape[-2]
        self.has_quad = "quad" in p
        # One product serves W1 z and A z, one W1' x and A' s y.
        self.up = torch.cat([self.w1, p["quad"]], -2) if self.has_quad else self.w1
        self.down = torch.cat([self.w1, p["scale"].mT * p["quad"]], -2) if self.has_quad else self.w1
        self.up_t = self.up.mT.contiguous()
        self.turn_back = turn_back
        self.lam_up, self.out, self.bias = self.up_t, self.down, p["linear"] if self.has_quad else None
        if turn is not None:  # J acts on the weights, once a solve
            self.lam_up, self.out = turn(self.up).mT.contiguous(), turn(self.down)
            self.bias = turn(p["linear"]) if self.has_quad else None
        self.w2_t = self.w2.mT.contiguous()
        self.w3_w2 = self.w3.mT * self.w2
        self.stage_terms = None
        if features is not None:
            layers = [(p["v1"], p["b1"], self.up.shape[-2]), (p["v2"], p["b2"], self.w2.shape[-2])]
            self.stage_terms = StageTerms(features, layers)
        if laplacian is not None:
            self._fix_laplacian()
        self.records: list[tuple[Tensor, ...]] = []

    def _fix_laplacian(self) -> None:
        """What weights and probe alone decide, once a solve."""
        p = self.p
        if self.laplacian == "hutchinson":
            assert self.probe is not None
            along = self.probe @ self.up_t
            self.along1 = along[..., : self.h1]
            self.squared1 = self.along1.square()
            self.along_quad = along[..., self.h1 :]
            self.constant = (p["scale"] * self.along_quad.square()).sum(-1) if self.has_quad else None
            return
        gram = self.w1 @ self.w1.mT
        self.squared1 = torch.diagonal(gram, dim1=-2, dim2=-1).unsqueeze(-2)  # [K, 1, H1]
        self.rows = weighted_row_norms(self.w2, gram)
        self.constant = (p["scale"] * p["quad"].square().sum(-1).unsqueeze(-2)).sum(-1) if self.has_quad else None

    def terms(self, ts: list[float], like: Tensor) -> list[tuple[Tensor, ...]]:
        """The time terms ``[c1, 0]`` and ``c2`` of some stages, ``[K, 1, .]`` each, by one evaluation."""
        if self.stage_terms is not None:
            return self.stage_terms(ts, like)
        times = torch.tensor(ts, dtype=like.dtype, device=like.device)
        c1, _, c2, _ = self.time_terms(self.p, t=times, derivative=False)
        if self.has_quad:
            c1 = F.pad(c1, (0, self.up.shape[-2] - self.h1))
        return list(zip(*(c.expand(-1, len(ts), -1).split(1, 1) for c in (c1, c2)), strict=True))

    def gradient(
        self, z: Tensor, terms: tuple[Tensor, ...], record: bool, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient of u (J grad u) at one stage ``[K, n, D]``, into ``out`` if given, and what was found on the way."""
        # A product and a sum in place cost half of `baddbmm` where a sum is broadcast.
        inner = torch.bmm(z, self.up_t).add_(terms[0])
        a1 = inner[..., : self.h1]
        b1 = self.act.quick_base(a1)
        h1 = self.act.quick(a1, b1)
        a2 = torch.bmm(h1, self.w2_t).add_(terms[1])
        b2 = self.act.quick_base(a2)
        g1 = torch.bmm(self.act.first(b2), self.w3_w2)
        torch.mul(g1, self.act.first(b1), out=a1)  # [a1 | A z] becomes [delta1 | A z]: nothing needs a1 any more
        gradient = torch.bmm(inner, self.out, out=out)
        if self.bias is not None:
            gradient += self.bias
        found = (z, inner, a2, b1, b2, g1, h1)
        if record:
            self.records.append(found)
        return gradient, found

    def laplacians(self, found: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """The Laplacians ``[K, S, n]`` of some stages, from what `gradient` found there."""
        return self.laplacian_of(tuple(torch.stack(x, 1) for x in zip(*(f[3:6] for f in found), strict=True)))

    def laplacian_of(self, found: tuple[Tensor, ...]) -> Tensor:
        """The Laplacians ``[K, S, n]`` of all stages, from their ``b1, b2, g1``."""
        b1, b2, g1 = found
        s1, s2 = self.act.first(b1), self.act.first(b2)
        of_first = self.act.second(b1, s1).mul_(g1)
        m2 = self.act.second(b2, s2)
        if self.laplacian == "hutchinson":
            along2 = product(s1 * self.along1.unsqueeze(1), self.w2_t)
            of_second = product(m2.mul_(along2).mul_(along2), self.w3.mT).squeeze(-1)
        else:
            m2 *= self.w3.unsqueeze(1)
            of_second = self.rows(flat(s1), flat(m2)).reshape(m2.shape[:-1])
        total = of_first.mul_(self.squared1.unsqueeze(1)).sum(-1).add_(of_second)
        return total if self.constant is None else total.add_(self.constant.unsqueeze(1))

    def take(self, ts: list[float]) -> None:
        """Stacks the records of all stages, which were at the times ``ts``; only the last one is kept beside."""
        self.z, self.inner, self.a2, self.b1, self.b2, self.g1, self.h1_value = (
            torch.stack(x, 1) for x in zip(*self.records, strict=True)
        )
        self.records = self.records[-1:]
        self.s1, self.s2 = self.act.first(self.b1), self.act.first(self.b2)
        self.s1_prime = self.act.second(self.b1, self.s1)
        self.w3_s2 = self.s2 * self.w3.unsqueeze(1)
        self.w3_s2_prime = self.act.second(self.b2, self.s2) * self.w3.unsqueeze(1)
        self.ts, self._c = ts, None

    @property
    def c(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The time terms of all stages, with their graph."""
        if self._c is None:
            times = torch.tensor(self.ts, dtype=self.z.dtype, device=self.z.device)
            with torch.enable_grad():
                self._c = self.time_terms(self.stack, t=times, derivative=self.derivative)
        return self._c

    def plain_gradient(self) -> Tensor:
        """The gradient of u at all stages, before J."""
        out = product(self.inner, self.down)
        return out + self.p["linear"].unsqueeze(1) if self.has_quad else out

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """Value, gradient (J grad u), time derivative and Laplacian at all stages, as far as wanted."""
        out: dict[str, Tensor] = {}
        w3 = self.w3.unsqueeze(1)
        delta1, q = self.inner[..., : self.h1], self.inner[..., self.h1 :]
        if "value" in want:
            value = (self._h2() * w3).sum(-1)
            if self.has_quad:
                value = value + 0.5 * (self.p["scale"].unsqueeze(1) * q * q).sum(-1)
                value = value + (self.z * self.p["linear"].unsqueeze(1)).sum(-1)
            out["value"] = value
        if "gradient" in want:
            out["gradient"] = product(self.inner, self.out)
            if self.bias is not None:
                out["gradient"] += self.bias.unsqueeze(1)
        if "time" in want:
            _, d1, _, d2 = self.c
            assert d2 is not None
            out["time"] = dot(self.w3_s2, d2.detach())
            if d1 is not None:
                out["time"] += dot(delta1, d1.detach())
        if "laplacian" in want:
            out["laplacian"] = self.laplacian_of((self.b1, self.b2, self.g1))
        return out

    def _h2(self) -> Tensor:
        return self.act.quick(self.a2, self.b2)

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        """Prepares the way back for cotangents ``value, gradient, time, laplacian`` of all stages.

        Args:
            cotangents: By name, ``[K, S, n]`` (gradient ``[K, S, n, D]``); what is missing is zero.
            weights: Whether `gradients` will be asked for.

        Returns:
            The part of the cotangent of z that `pull` does not give, ``[K, S, n, D]``, or None for zero.
        """
        shape = self.z.shape[:-1]
        self.extra: Products = {}
        self.g1_s1_prime = self.g1 * self.s1_prime
        self.r1 = self.r2 = self.r3 = self.rp1 = self.rp2 = self.rq = None
        self.lam0 = cotangents.get("gradient")
        self.tau = cotangents.get("time")
        if self.tau is not None:
            _, d1, _, d2 = self.c
            assert d2 is not None
            self.rp1 = None if d1 is None else self.tau.unsqueeze(-1) * d1.detach().unsqueeze(-2)
            self.rp2 = self.tau.unsqueeze(-1) * d2.detach().unsqueeze(-2)
        if "laplacian" in cotangents:
            mu = cotangents["laplacian"]
            (self._begin_hutchinson if self.laplacian == "hutchinson" else self._begin_exact)(mu, weights)
        direct = self._begin_value(cotangents["value"]) if "value" in cotangents else None
        h2, size = self.w2.shape[-2], self.z.shape[-1]
        new = self.z.new_empty
        self.lam, self.p1 = new((*shape, size)), new((*shape, self.up.shape[-2]))
        self.g1_bar, self.a1_bar = new((*shape, self.h1)), new((*shape, self.up.shape[-2]))
        self.x2, self.a2_bar = new((*shape, h2)), new((*shape, h2))
        return direct

    def _begin_value(self, value: Tensor) -> Tensor | None:
        u = value.unsqueeze(-1)
        self.r2 = add(self.r2, u * self.w3_s2)
        sum_into(self.extra, "w3", (u * self._h2()).sum((1, 2)).unsqueeze(-2))
        if not self.has_quad:
            return None
        q = self.inner[..., self.h1 :]
        self.rq = u * q
        sum_into(self.extra, "scale", 0.5 * (self.rq * q).sum((1, 2)).unsqueeze(-2))
        sum_into(self.extra, "linear", (u * self.z).sum((1, 2)).unsqueeze(-2))
        return u * self.p["linear"].unsqueeze(1)

    def _begin_hutchinson(self, laplacian: Tensor, weights: bool) -> None:
        # In place where it can be: the arrays of all stages outgrow the cache, and moving them is what this costs.
        mu, e1 = laplacian.unsqueeze(-1), self.along1.unsqueeze(1)
        s2_prime = self.act.second(self.b2, self.s2)
        along1 = self.s1 * e1
        along2 = product(along1, self.w2_t)
        squares = mu * along2
        along2_bar = self.w3_s2_prime * squares  # half of it
        back = product(along2_bar, 2 * self.w2)
        squares *= along2
        r2 = self.act.third(self.b2, self.s2, s2_prime).mul_(squares).mul_(self.w3.unsqueeze(1))
        self.r2 = r2 if self.r2 is None else self.r2 + r2
        mu_squared = mu * self.squared1.unsqueeze(1)
        self.r1 = mu_squared * self.s1_prime
        self.r3 = self.act.third(self.b1, self.s1, self.s1_prime).mul_(self.g1).mul_(mu_squared)
        self.r3.addcmul_(e1 * back, self.s1_prime)
        if not weights:
            return
        e1_bar = 2 * self.along1 * (mu * self.g1_s1_prime).sum(1) + back.mul_(self.s1).sum(1)
        assert self.probe is not None
        sum_into(self.extra, "w1", e1_bar.mT @ self.probe)
        sum_into(self.extra, "w2", 2 * outer(along2_bar, along1))
        sum_into(self.extra, "w3", s2_prime.mul_(squares).sum((1, 2)).unsqueeze(-2))
        if self.has_quad:
            weight, scale = laplacian.sum(1).unsqueeze(-1), self.p["scale"]
            sum_into(self.extra, "scale", (weight * self.along_quad.square()).sum(-2, keepdim=True))
            sum_into(self.extra, "quad", (2 * weight * scale * self.along_quad).mT @ self.probe)

    def _begin_exact(self, laplacian: Tensor, weights: bool) -> None:
        mu = laplacian.unsqueeze(-1)
        s1_second = self.act.third(self.b1, self.s1, self.s1_prime)
        s2_prime = self.act.second(self.b2, self.s2)
        with torch.enable_grad():
            s, m = flat(self.s1).requires_grad_(), flat(self.w3_s2_prime).requires_grad_()
            if weights:
                w1, w2 = self.w1.detach().requires_grad_(), self.w2.detach().requires_grad_()
                rows, wanted = weighted_row_norms(w2, w1 @ w1.mT)(s, m), (s, m, w1, w2)
            else:
                rows, wanted = self.rows(s, m), (s, m)
            found = torch.autograd.grad(rows, wanted, flat(mu).squeeze(-1))
        s1_bar, m2_bar = found[0].reshape(self.s1.shape), found[1].reshape(self.s2.shape)
        squared1 = self.squared1.unsqueeze(1)
        w3 = self.w3.unsqueeze(1)
        self.r1 = mu * squared1 * self.s1_prime
        self.r2 = add(self.r2, w3 * m2_bar * self.act.third(self.b2, self.s2, s2_prime))
        self.r3 = s1_bar * self.s1_prime + mu * self.g1 * squared1 * s1_second
        if not weights:
            return
        norms_bar = (mu * self.g1 * self.s1_prime).sum((1, 2)).unsqueeze(-1)
        sum_into(self.extra, "w1", found[2] + 2 * norms_bar * self.w1)
        sum_into(self.extra, "w2", found[3])
        sum_into(self.extra, "w3", (m2_bar * s2_prime).sum((1, 2)).unsqueeze(-2))
        if self.has_quad:
            weight = laplacian.sum((1, 2)).reshape(-1, 1, 1)
            quad = self.p["quad"]
            sum_into(self.extra, "scale", weight * quad.square().sum(-1).unsqueeze(-2))
            sum_into(self.extra, "quad", 2 * weight * self.p["scale"].mT * quad)

    def pull(self, at: Stages, lam: Tensor, value: Tensor | None = None) -> Tensor:
        """Pulls a cotangent ``lam`` of the gradient back to z, beside the cotangents given to `begin`.

        Args:
            at: Which stages: an index into ``[K, S, ...]``.
            lam: Cotangent of the gradient at these stages, ``[K, (S,) n, D]``.
            value: A cotangent of the value beside it, ``[K, (S,) n, 1]``; its part in the gradient of w3 is the caller's.

        Returns:
            The cotangent of z, of the shape of ``lam``.
        """
        if self.lam0 is not None:
            lam = lam + self.lam0[at]
        self.lam[at] = lam
        p = self.p1[at]
        product(lam, self.lam_up, p)
        p1 = p[..., : self.h1]
        if self.rp1 is not None:
            p1 += self.rp1[at]
        g1_bar = self.g1_bar[at]
        torch.mul(p1, self.s1[at], out=g1_bar)
        if self.r1 is not None:
            g1_bar += self.r1[at]
        x2 = self.x2[at]
        product(g1_bar, self.w2_t, x2)
        if self.rp2 is not None:
            x2 += self.rp2[at]
        a2_bar = self.a2_bar[at]
        torch.mul(x2, self.w3_s2_prime[at], out=a2_bar)
        if self.r2 is not None:
            a2_bar += self.r2[at]
        if value is not None:
            a2_bar.addcmul_(value, self.w3_s2[at])
        inner = self.a1_bar[at]
        a1_bar = inner[..., : self.h1]
        torch.mul(p1, self.g1_s1_prime[at], out=a1_bar)
        a1_bar.addcmul_(product(a2_bar, self.w2), self.s1[at])
        if self.r3 is not None:
            a1_bar += self.r3[at]
        if self.has_quad:
            inner[..., self.h1 :] = p[..., self.h1 :] if self.rq is None else p[..., self.h1 :] + self.rq[at]
        return product(inner, self.down)

    def gradients(self) -> Products:
        """The cotangents of all parameters, by name, after every stage has been pulled."""
        out = self.extra
        lam = self.lam if self.turn_back is None else self.turn_back(self.lam)
        delta1, delta2 = self.inner[..., : self.h1], self.w3_s2
        a1_bar = self.a1_bar[..., : self.h1]
        both = outer(self.a1_bar, self.z) + outer(self.inner, lam)
        sum_into(out, "w1", both[..., : self.h1, :])
        if self.has_quad:
            q, pq = self.inner[..., self.h1 :], self.p1[..., self.h1 :]
            sum_into(out, "scale", (q * pq).sum((1, 2)).unsqueeze(-2))
            sum_into(out, "linear", lam.sum((1, 2)).unsqueeze(-2))
            sum_into(out, "quad", self.p["scale"].mT * both[..., self.h1 :, :])
        sum_into(out, "w2", outer(self.a2_bar, self.h1_value) + outer(delta2, self.g1_bar))
        sum_into(out, "w3", (self.s2 * self.x2).sum((1, 2)).unsqueeze(-2))
        self._gradients_of_time(out, a1_bar, delta1, delta2)
        return out

    def _gradients_of_time(self, out: Products, a1_bar: Tensor, delta1: Tensor, delta2: Tensor) -> None:
        cotangents: list[Tensor | None] = [a1_bar.sum(2), None, self.a2_bar.sum(2), None]
        if self.tau is not None:
            tau = self.tau.unsqueeze(-1)
            cotangents[1], cotangents[3] = (tau * delta1).sum(2), (tau * delta2).sum(2)
        pairs = [
            (c, bar.sum(1, keepdim=True) if c.shape[1] == 1 else bar)
            for c, bar in zip(self.c, cotangents, strict=True)
            if c is not None and bar is not None and c.requires_grad
        ]
        names = [name for name, value in self.stack.items() if value.requires_grad]
        if not pairs:
            return
        found = torch.autograd.grad(
            [c for c, _ in pairs], [self.stack[n] for n in names], [bar for _, bar in pairs], allow_unused=True,
            retain_graph=True,
        )  # fmt: skip
        for name, value in zip(names, found, strict=True):
            if value is not None:
                sum_into(out, name, value)
