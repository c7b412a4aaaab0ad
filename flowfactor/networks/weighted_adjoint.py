r"""The adjoint of a superposition: $v = \sum_k w_k v_k$ with weights that hold for a solve, or change at given times.

All flows are evaluated at the same states, so the adjoint of the single flows works on K copies of them; potential, time
derivative and divergence of a superposition are the same weighted sums. States are ``[1, n, D]``, stages ``[1, S, n, D]``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfactor.networks.stage_adjoint import Outputs, Pullback, Residuals, StageAdjoint, Stages, TimeTerms
from flowfactor.networks.time import Times


class WeightedAdjoint(StageAdjoint):
    """K flows, superposed. Time terms and residuals carry the number of the piece beside what the single flows know.

    Args:
        single: The adjoint of all flows, for states ``[K, n, D]``.
        weights: Weights of P pieces, ``[P, n, K]``.
        starts: The time from which each piece acts, in the order of the solve.
    """

    def __init__(self, single: StageAdjoint, weights: Tensor, starts: Sequence[float]) -> None:
        self.single, self.weights = single, weights
        self.w = weights.detach().mT.contiguous()  # [P, K, n]
        self.sign = 1.0 if starts[-1] >= starts[0] else -1.0
        self.starts = [self.sign * start for start in starts]
        self.inputs = [*single.inputs, *([weights] if weights.requires_grad else [])]
        self.own_times = single.own_times and len(self.starts) == 1

    def _piece(self, t: float, slack: float = 0.0) -> int:
        return max(bisect_right(self.starts, self.sign * t + slack * (1 + abs(t))) - 1, 0)

    def time_terms(self, ts: Times) -> list[TimeTerms]:
        if isinstance(ts, Tensor):
            return [(terms, 0) for terms in self.single.time_terms(self.times(ts))]
        return [(terms, self._piece(t)) for terms, t in zip(self.single.time_terms(ts), ts, strict=True)]

    def times(self, ts: Times) -> Times:
        """The times of all flows."""
        return ts.expand(-1, self.w.shape[1], -1) if isinstance(ts, Tensor) else ts

    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        w = self.w[terms[1]].unsqueeze(-1)
        single, residuals = self.single.velocity(z.expand(len(w), *z.shape[1:]), terms[0])
        return torch.sum(w * single, 0, keepdim=True, out=out), (residuals, terms[1])

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        single = self.single.divergence([r for r, _ in residuals])
        return (self.w[[piece for _, piece in residuals]] * single).sum(1, keepdim=True)

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        single = self.single.stack([r for r, _ in residuals], self.times(ts))
        return WeightedStages(self, single, [piece for _, piece in residuals])

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        own = len(self.single.inputs)
        single = self.single.by_autograd(inputs[:own])
        weights = (inputs[own] if len(inputs) > own else self.weights).mT

        def evaluate(z: Tensor, t: Tensor) -> Outputs:
            # Here times come in the precision of the state.
            slack = 0.0 if z.dtype == torch.float64 else 4 * torch.finfo(z.dtype).eps
            w = weights[0 if t.ndim else self._piece(float(t), slack)]
            out = single(z.expand(len(w), *z.shape[1:]), t.expand(len(w), -1) if t.ndim else t)
            return {n: ((w.unsqueeze(-1) if x.ndim == 3 else w) * x).sum(0, keepdim=True) for n, x in out.items()}

        return evaluate


class WeightedStages(Stages):
    """Stages of a `WeightedAdjoint`, each in a piece."""

    def __init__(self, adjoint: WeightedAdjoint, single: Stages, pieces: list[int]) -> None:
        self.adjoint, self.single, self.pieces = adjoint, single, pieces
        self.w = adjoint.w[pieces].transpose(0, 1)  # [K, S, n]
        self.z = single.z[:1]

    def spread(self, x: Tensor, at: int | slice = slice(None)) -> Tensor:
        """Something of the superposition at some stages ``[1, (S,) n(, D)]`` as the share of every flow, ``[K, ...]``."""
        w = self.w[:, at]
        return x * (w if x.ndim == w.ndim else w.unsqueeze(-1))

    def outputs(self, want: frozenset[str]) -> Outputs:
        return {name: self.spread(x).sum(0, keepdim=True) for name, x in self.single.outputs(want).items()}

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return WeightedPullback(self, cotangents, parameters)


class WeightedPullback(Pullback):
    """The adjoint of the stages of a `WeightedAdjoint`."""

    def __init__(self, stages: WeightedStages, cotangents: Outputs, parameters: bool) -> None:
        each = {name: stages.spread(x) for name, x in cotangents.items()}
        self.stages, self.cotangents = stages, cotangents
        self.single = stages.single.pullback(each, parameters=parameters)
        direct = self.single.direct
        super().__init__(len(stages.pieces), None if direct is None else direct.sum(0, keepdim=True), parameters)
        self.lam = torch.empty_like(stages.z) if stages.adjoint.weights.requires_grad else None

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        if self.lam is not None:
            self.lam[:, at] = cotangent
        return self.single.pull(at, self.stages.spread(cotangent, at)).sum(0, keepdim=True)

    def _gradients(self) -> list[Tensor | None]:
        found = self.single.gradients()
        return found if self.lam is None else [*found, self._of_weights(self.lam)]

    def _of_weights(self, lam: Tensor) -> Tensor:
        """What every flow's own outputs are to the cotangents of their weighted sums, ``[P, n, K]``."""
        bars = dict(self.cotangents)
        bars["velocity"] = lam + bars["velocity"] if "velocity" in bars else lam
        outputs = self.stages.single.outputs(frozenset(bars))
        shares = [outputs[name] * bar for name, bar in bars.items() if name in outputs]
        stages = torch.stack([x.sum(-1) if x.ndim == 4 else x for x in shares]).sum(0).transpose(0, 1)  # [S, K, n]
        pieces = torch.tensor(self.stages.pieces, device=stages.device)
        return torch.zeros_like(self.stages.adjoint.w).index_add_(0, pieces, stages).mT
