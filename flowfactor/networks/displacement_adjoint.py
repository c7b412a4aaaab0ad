r"""The adjoint of displacement potentials $u = f(x) \cdot y - \tfrac{t}{2} |f(x)|^2$.

With $h = \tanh(W_1 x + b_1)$, $f = W_2 h + b_2$, slopes $s = 1 - h^2$, $r = y - t f$ and $q = W_2^\top r$,
$$\nabla_x u = W_1^\top (q \odot s), \qquad \nabla_y u = f, \qquad \partial_t u = -\tfrac12 |f|^2, \qquad
  \Delta u = -2 \sum_i q_i h_i s_i |W_{1i}|^2 - t\,|W_2\,\mathrm{diag}(s)\,W_1|_F^2 .$$
What reaches a stage by its velocity is written out; cotangents of values, time derivatives and Laplacians, which come once
for all stages, are left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square, quick_tanh
from flowfactor.networks.batched import outer, product
from flowfactor.networks.batching import Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.stage_adjoint import Bound, NetworkAdjoint, Outputs, Pullback, Stages, stacked, with_velocity
from flowfactor.networks.time import Times

Residuals = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None"]
BYPASSING = ("value", "time", "divergence")
"""What depends on the state without passing a velocity."""


def displacement(
    p: Stack, want: frozenset[str], laplacian: str | None, probe: Tensor | None, timed: bool = True
) -> Callable[[Tensor, Tensor], Outputs]:
    """Binds one stack of networks; times are numbers or ``[*batch]``, and 0 unless ``timed``."""
    A, n = p["w2"].shape[-2], p["w1"].shape[-1]
    curvature = _curvature(p) if "laplacian" in want and laplacian == "exact" else None

    def evaluate(z: Tensor, t: Tensor) -> Outputs:
        x, y = z[..., :n], z[..., n:]
        h = torch.tanh(x @ p["w1"].mT + p["b1"])
        f = h @ p["w2"].mT + p["b2"]
        square, out = f.square().sum(-1), Outputs()
        if "value" in want:
            out["value"] = (f * y).sum(-1) - 0.5 * t * square if timed else (f * y).sum(-1)
        if "time" in want:
            out["time"] = -0.5 * square if timed else torch.zeros_like(square)
        if "gradient" not in want and "laplacian" not in want:
            return out
        s, q = one_minus_square(h), (y - t[..., None] * f if timed else y) @ p["w2"]
        if "gradient" in want:
            out["gradient"] = torch.cat([(q * s) @ p["w1"], f], -1)
        if "laplacian" in want:
            out["laplacian"] = _laplacian(p, t if timed else None, h, s, q, curvature, probe, n + A)
        return out

    return evaluate


Curvature = tuple[Tensor, Tensor]


def _curvature(p: Stack) -> Curvature:
    """What of the exact Laplacian depends on the weights alone: ``[G, H, H]`` for |W2 diag(s) W1|^2, and |W1_i|^2."""
    return (p["w1"] @ p["w1"].mT) * (p["w2"].mT @ p["w2"]), p["w1"].square().sum(-1)[..., None, :]


def _laplacian(
    p: Stack, t: Tensor | None, h: Tensor, s: Tensor, q: Tensor, exact: Curvature | None, probe: Tensor | None, dim: int
) -> Tensor:
    """The exact Laplacian, or its estimate by probes ``[*batch, P D]``; a time of None is 0."""
    if exact is not None:
        both, rows = exact
        bent = -2 * (q * h * s * rows).sum(-1)
        return bent if t is None else bent - t * ((s @ both) * s).sum(-1)
    assert probe is not None
    probes, n = Probes(probe, dim), p["w1"].shape[-1]
    e_x, e_y = probes.e[..., :n], probes.e[..., n:]
    a = probes.product(e_x, p["w1"].mT)
    moved = probes.product(probes.spread(s) * a, p["w2"].mT)  # the Jacobian of f along the probe
    bent = -2 * (probes.spread(q * h * s) * a.square()).sum(-1, keepdim=True)
    back = 2 * e_y if t is None else 2 * e_y - _for_probes(t, probes) * moved
    each = bent + (back * moved).sum(-1, keepdim=True)
    return probes.mean(each).squeeze(-1)


def _for_probes(t: Tensor, probes: Probes) -> Tensor:
    """Times so that they broadcast to what each probe has."""
    return t if t.ndim == 0 else probes.spread(t[..., None])


class DisplacementAdjoint(NetworkAdjoint):
    """See the module.

    Args:
        stack: ``w1 [G, H, n], b1 [G, 1 or samples, H], w2 [G, A, H], b2 [G, 1 or samples, A]``.
        bind: The same potentials by autograd, of parameters.
        laplacian: How to take the Laplacian.
        probe: Hutchinson's probes ``[G, n, P D]``.
        timed: Whether the potentials depend on time; else t is 0, and None here.
    """

    own_times = True

    def __init__(
        self, stack: Stack, bind: Bound, laplacian: str | None, probe: Tensor | None, timed: bool = True
    ) -> None:
        super().__init__(stack, lambda p: with_velocity(bind(p), None))
        self.laplacian, self.probe, self.timed = laplacian, probe, timed
        self.size = self.p["w1"].shape[-1]  # coded dimensions
        self.w1, self.b1, self.w2, self.b2 = (self.p[name] for name in ("w1", "b1", "w2", "b2"))
        self.w1_t, self.w2_t = self.w1.mT.contiguous(), self.w2.mT.contiguous()

    def time_terms(self, ts: Times) -> Sequence[Tensor | None]:
        """The times, numbers as scalars, those of each sample as ``[G, n, 1]``."""
        if not self.timed:
            return [None] * len(ts)
        if isinstance(ts, Tensor):
            return list(ts.unsqueeze(-1).unbind(0))
        return list(self.w1.new_tensor(ts).unbind(0))

    def velocity(self, z: Tensor, terms: Tensor | None, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        n = self.size
        out = torch.empty_like(z) if out is None else out
        h = torch.bmm(z[..., :n], self.w1_t).add_(self.b1)
        quick_tanh(h, out=h)
        f = torch.bmm(h, self.w2_t).add_(self.b2)
        r = z[..., n:] if terms is None else torch.addcmul(z[..., n:], terms, f, value=-1)
        q = torch.bmm(r, self.w2)
        out[..., :n] = torch.bmm(q * one_minus_square(h), self.w1)
        out[..., n:] = f
        return out, (z, h, r, q, terms)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        return torch.stack([self._divergence(*residual) for residual in residuals])

    def _divergence(self, z: Tensor, h: Tensor, r: Tensor, q: Tensor, t: Tensor | None) -> Tensor:
        t = t if t is None or t.ndim == 0 else t.squeeze(-1)
        return _laplacian(self.p, t, h, one_minus_square(h), q, self.curvature, self.probe, z.shape[-1])

    @cached_property
    def curvature(self) -> Curvature | None:
        """See `_curvature`; the same at all stages."""
        return _curvature(self.p) if self.laplacian == "exact" else None

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> DisplacementStages:
        t = ts.transpose(0, 1) if isinstance(ts, Tensor) else self.w1.new_tensor(ts).reshape(1, -1, 1)
        return DisplacementStages(self, stacked([residual[:4] for residual in residuals]), t)


class DisplacementStages(Stages):
    """Stages of a `DisplacementAdjoint`, at times ``t`` that broadcast to ``[G, S, n]``."""

    def __init__(self, adjoint: DisplacementAdjoint, residuals: Sequence[Tensor], t: Tensor) -> None:
        self.adjoint, self.t = adjoint, t
        self.z, self.h, self.r, self.q = residuals

    @cached_property
    def slope(self) -> Tensor:
        """The slopes s."""
        return one_minus_square(self.h)

    def outputs(self, want: frozenset[str]) -> Outputs:
        out = self.bypassing(self.adjoint.p, self.z, want)
        if want & {"velocity", "gradient"}:
            a = self.adjoint
            f = product(self.h, a.w2_t) + a.b2.unsqueeze(1)
            gradient = torch.cat([product(self.q * self.slope, a.w1), f], -1)
            out |= {name: gradient for name in ("velocity", "gradient") if name in want}
        return out

    def bypassing(self, p: Stack, z: Tensor, want: frozenset[str]) -> Outputs:
        """What of `BYPASSING` is wanted, of parameters and states that autograd may follow."""
        a, names = self.adjoint, want & set(BYPASSING)
        if not names:
            return Outputs()
        probe = None if a.probe is None else a.probe.unsqueeze(1).expand(*z.shape[:-1], -1)
        wide = {name: x.unsqueeze(1) for name, x in p.items()}
        found = displacement(wide, _of_potential(names), a.laplacian, probe, a.timed)(z, self.t.expand(z.shape[:-1]))
        return {name: found["laplacian" if name == "divergence" else name] for name in names}

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return DisplacementPullback(self, cotangents, parameters)


class DisplacementPullback(Pullback):
    """The adjoint of the stages of a `DisplacementAdjoint`."""

    def __init__(self, stages: DisplacementStages, cotangents: Outputs, parameters: bool) -> None:
        a, z = stages.adjoint, stages.z
        direct, self.found = self._bypassed(stages, {n: x for n, x in cotangents.items() if n in BYPASSING}, parameters)
        super().__init__(z.shape[1], direct, parameters)
        self.stages, self.adjoint = stages, a
        given = [cotangents[name] for name in ("velocity", "gradient") if name in cotangents]
        self.lam0 = sum(given[1:], given[0]) if given else None
        # Cotangents of the velocity, of f, and along the hidden units: of q, and of what tanh is taken of.
        self.lam, self.f_bar = torch.empty_like(z), torch.empty_like(stages.r)
        self.q_bar, self.a_bar = torch.empty_like(stages.h), torch.empty_like(stages.h)

    @staticmethod
    def _bypassed(
        stages: DisplacementStages, cotangents: Outputs, parameters: bool
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """The cotangents of z and of the parameters that do not come by a velocity."""
        a = stages.adjoint
        if not a.timed:
            cotangents = {name: x for name, x in cotangents.items() if name != "time"}
        if not cotangents:
            return None, {}
        with torch.enable_grad():
            z = stages.z.detach().requires_grad_()
            own = {name: x.detach().requires_grad_(parameters and name in a.names) for name, x in a.p.items()}
            out = stages.bypassing(own, z, frozenset(cotangents))
        names = [name for name, x in own.items() if x.requires_grad]
        found = torch.autograd.grad(
            list(out.values()), [z, *(own[name] for name in names)], [cotangents[name] for name in out],
            allow_unused=True,
        )  # fmt: skip
        return found[0], dict(zip(names, found[1:], strict=True))

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        s, a, n = self.stages, self.adjoint, self.adjoint.size
        lam = cotangent if self.lam0 is None else cotangent + self.lam0[:, at]
        slope, h = s.slope[:, at], s.h[:, at]
        along = product(lam[..., :n], a.w1_t)
        q_bar = along * slope
        y_bar = product(q_bar, a.w2_t)
        f_bar = lam[..., n:]
        if a.timed:
            f_bar = torch.addcmul(f_bar, s.t.expand(s.z.shape[:-1])[:, at].unsqueeze(-1), y_bar, value=-1)
        a_bar = (product(f_bar, a.w2) - 2 * h * along * s.q[:, at]) * slope
        self.lam[:, at], self.f_bar[:, at], self.q_bar[:, at], self.a_bar[:, at] = lam, f_bar, q_bar, a_bar
        return torch.cat([product(a_bar, a.w1), y_bar], -1)

    def _gradients(self) -> list[Tensor | None]:
        s, a, n = self.stages, self.adjoint, self.adjoint.size
        out = {
            "w1": outer(self.a_bar, s.z[..., :n]) + outer(s.q * s.slope, self.lam[..., :n]),
            "b1": _as_bias(self.a_bar, a.b1),
            "w2": outer(s.r, self.q_bar) + outer(self.f_bar, s.h),
            "b2": _as_bias(self.f_bar, a.b2),
        }
        extra = ((name, self.found.get(name)) for name in a.names)
        return [out[name] if more is None else out[name] + more for name, more in extra]


def _as_bias(bar: Tensor, bias: Tensor) -> Tensor:
    """What reaches a bias ``[G, 1, H]``, or one of each sample ``[G, n, H]``, of cotangents ``[G, S, n, H]``."""
    over_stages = bar.sum(1)
    return over_stages.sum(1, keepdim=True) if bias.shape[-2] == 1 else over_stages


def _of_potential(names: frozenset[str]) -> frozenset[str]:
    """The names of results, as a potential calls them."""
    return frozenset("laplacian" if name == "divergence" else name for name in names)
