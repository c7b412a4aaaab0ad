r"""The tape of a superposition: $v = \sum_k w_k v_k$ with weights that hold for a solve, or change at given times.

All flows are evaluated at the same states, so the tape of the single flows works on K copies of them; potential, time
derivative and divergence of a superposition are the same weighted sums. States are ``[1, n, D]``, records ``[1, S, n, .]``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfactor.fields._sum_adjoint import FieldTape
from flowfactor.fields.base import Evaluation
from flowfactor.networks.two_layer_adjoint import Stages


class WeightedTape:
    """A `FieldTape` of K flows, superposed; it has the same methods.

    What `terms` gives and `velocity` finds at a stage carries the number of the piece beside what the single flows know.

    Args:
        tape: The tape of all flows, for states ``[K, n, D]``.
        weights: Weights of P pieces, ``[P, n, K]``.
        starts: The time from which each piece acts, in the order of the solve.
    """

    def __init__(self, tape: FieldTape, weights: Tensor, starts: Sequence[float]) -> None:
        self.tape, self.weights = tape, weights
        self.w = weights.detach().mT.contiguous()  # [P, K, n]
        self.sign = 1.0 if starts[-1] >= starts[0] else -1.0
        self.starts = [self.sign * start for start in starts]
        #: The tensors that gradients have to reach.
        self.inputs = [*tape.inputs, *([weights] if weights.requires_grad else [])]

    @property
    def z(self) -> Tensor:
        """The states of all stages that were taken, ``[1, S, n, D]``."""
        return self.tape.z[:1]

    def _piece(self, t: float, slack: float = 0.0) -> int:
        return max(bisect_right(self.starts, self.sign * t + slack * (1 + abs(t))) - 1, 0)

    def _spread(self, x: Tensor, at: Any = slice(None)) -> Tensor:
        """Something of the superposition at some stages ``[1, (S,) n(, D)]`` as the share of every flow, ``[K, ...]``."""
        w = self.stage_w[at]
        return x * (w if x.ndim == w.ndim else w.unsqueeze(-1))

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Evaluation]:
        """The same field by autograd, as a function of tensors in place of `inputs`."""
        own = len(self.tape.inputs)
        single = self.tape.rebind(inputs[:own])
        weights = (inputs[own] if len(inputs) > own else self.weights).mT

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            # Here times come in the precision of the state.
            slack = 0.0 if z.dtype == torch.float64 else 4 * torch.finfo(z.dtype).eps
            w = weights[self._piece(float(t), slack)]
            e = single(z.expand(len(w), *z.shape[1:]), t)

            def total(x: Tensor | None) -> Tensor | None:
                return None if x is None else ((w.unsqueeze(-1) if x.ndim == 3 else w) * x).sum(0, keepdim=True)

            velocity = total(e.velocity)
            assert velocity is not None
            return Evaluation(
                z, t, velocity, total(e.divergence), total(e.value), total(e.gradient), total(e.time),
                velocity_at=lambda z: evaluate(z, t).velocity,
            )  # fmt: skip

        return evaluate

    def terms(self, ts: Sequence[float], like: Tensor) -> list[Any]:
        """The time terms and the piece of some stages: what `velocity` takes, one entry a stage."""
        return [(terms, self._piece(t)) for terms, t in zip(self.tape.terms(ts, like), ts, strict=True)]

    def velocity(self, z: Tensor, terms: Any, record: bool, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """The velocity at one stage ``[1, n, D]``, written into ``out`` if given, and what was found on the way."""
        w = self.w[terms[1]].unsqueeze(-1)
        single, found = self.tape.velocity(z.expand(len(w), *z.shape[1:]), terms[0], record)
        return torch.sum(w * single, 0, keepdim=True, out=out), (found, terms[1])

    def divergence(self, found: Sequence[Any]) -> Tensor:
        """The divergences at some stages ``[S, 1, n]``, from what `velocity` found there."""
        single = self.tape.divergence([f for f, _ in found])
        return (self.w[[piece for _, piece in found]] * single).sum(1, keepdim=True)

    def begin_block(self, shared: bool) -> None:
        """See `FieldTape.begin_block`."""
        self.tape.begin_block(shared)

    def forget(self, keep: int) -> None:
        """See `FieldTape.forget`."""
        self.tape.forget(keep)

    def take(self, ts: list[float]) -> None:
        """See `FieldTape.take`."""
        self.tape.take(ts)
        self._at([self._piece(t) for t in ts])

    def put(self, found: Sequence[Any], ts: list[float]) -> None:
        """See `FieldTape.put`."""
        self.tape.put([f for f, _ in found], ts)
        self._at([piece for _, piece in found])

    def _at(self, pieces: list[int]) -> None:
        self.pieces = pieces
        self.stage_w = self.w[pieces].transpose(0, 1)  # [K, S, n]

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """``velocity`` and what of ``value, gradient, time, laplacian`` is wanted, at all stages."""
        return {name: self._spread(x).sum(0, keepdim=True) for name, x in self.tape.outputs(want).items()}

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        """Prepares the way back (see `FieldTape.begin`)."""
        self.cotangents = cotangents
        direct = self.tape.begin({name: self._spread(x) for name, x in cotangents.items()}, weights=weights)
        return None if direct is None else direct.sum(0, keepdim=True)

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity, beside those given to `begin`."""
        return self.tape.pull(at, self._spread(lam, at)).sum(0, keepdim=True)

    def gradients(self, lam: Tensor) -> list[Tensor | None]:
        """The gradients of `inputs`, after every stage has been pulled with ``lam [1, S, n, D]``."""
        out = self.tape.gradients(self._spread(lam))
        return [*out, self._gradient_of_weights(lam)] if self.weights.requires_grad else out

    def _gradient_of_weights(self, lam: Tensor) -> Tensor:
        """What every flow's own outputs are to the cotangents of their weighted sums, ``[P, n, K]``."""
        bars = dict(self.cotangents)
        bars["velocity"] = lam + bars["velocity"] if "velocity" in bars else lam
        outputs = self.tape.outputs(frozenset(bars))
        shares = [outputs[name] * bar for name, bar in bars.items() if name in outputs]
        stages = torch.stack([x.sum(-1) if x.ndim == 4 else x for x in shares]).sum(0).transpose(0, 1)  # [S, K, n]
        pieces = torch.tensor(self.pieces, device=stages.device)
        return torch.zeros_like(self.w).index_add_(0, pieces, stages).mT
