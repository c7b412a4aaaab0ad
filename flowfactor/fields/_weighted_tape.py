r"""The tape of a superposition: $v = \sum_k w_k v_k$ with weights that stay the same for a solve.

All flows are evaluated at the same states, so the tape of the single flows works on K copies of them; potential, time
derivative and divergence of a superposition are the same weighted sums. States are ``[1, n, D]``, records ``[1, S, n, .]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfactor.fields._tape import FieldTape, Found
from flowfactor.fields.base import Evaluation
from flowfactor.potentials._tape import Stages


class WeightedTape:
    """A `FieldTape` of K flows, superposed; it has the same methods.

    Args:
        tape: The tape of all flows, for states ``[K, n, D]``.
        weights: Weights ``[n, K]``.
    """

    def __init__(self, tape: FieldTape, weights: Tensor) -> None:
        self.tape, self.weights = tape, weights
        self.w = weights.detach().mT.contiguous()  # [K, n]
        #: The tensors that gradients have to reach.
        self.inputs = [*tape.inputs, *([weights] if weights.requires_grad else [])]

    @property
    def z(self) -> Tensor:
        """The states of all stages that were taken, ``[1, S, n, D]``."""
        return self.tape.z[:1]

    def _spread(self, x: Tensor, vector: bool) -> Tensor:
        """Something of the superposition ``[1, (S,) n(, D)]`` as its share in every flow, ``[K, (S,) n(, D)]``."""
        w = self.w.unsqueeze(-1) if vector else self.w
        return x * (w if x.ndim == w.ndim else w.unsqueeze(1))

    def _sum(self, x: Tensor, vector: bool) -> Tensor:
        """The weighted sum over flows, ``[1, (S,) n(, D)]``."""
        return self._spread(x, vector).sum(0, keepdim=True)

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Evaluation]:
        """The same field by autograd, as a function of tensors in place of `inputs`."""
        own = len(self.tape.inputs)
        single = self.tape.rebind(inputs[:own])
        w = (inputs[own] if len(inputs) > own else self.weights).mT

        def total(x: Tensor | None) -> Tensor | None:
            return None if x is None else ((w.unsqueeze(-1) if x.ndim == 3 else w) * x).sum(0, keepdim=True)

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            e = single(z.expand(len(w), *z.shape[1:]), t)
            velocity = total(e.velocity)
            assert velocity is not None
            return Evaluation(
                z, t, velocity, total(e.divergence), total(e.value), total(e.gradient), total(e.time),
                velocity_at=lambda z: evaluate(z, t).velocity,
            )  # fmt: skip

        return evaluate

    def terms(self, ts: Sequence[float], like: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """The time terms of some stages: what `velocity` takes, one entry a stage."""
        return self.tape.terms(ts, like)

    def velocity(self, z: Tensor, terms: list[tuple[Tensor, Tensor]], record: bool) -> tuple[Tensor, Found]:
        """The velocity at one stage ``[1, n, D]``, and what was found on the way."""
        single, found = self.tape.velocity(z.expand(len(self.w), *z.shape[1:]), terms, record)
        return self._sum(single, True), found

    def divergence(self, found: Sequence[Found]) -> Tensor:
        """The divergences at some stages ``[S, 1, n]``, from what `velocity` found there."""
        return (self.w * self.tape.divergence(found)).sum(1, keepdim=True)

    def begin_block(self, shared: bool) -> None:
        """See `FieldTape.begin_block`."""
        self.tape.begin_block(shared)

    def forget(self, keep: int) -> None:
        """See `FieldTape.forget`."""
        self.tape.forget(keep)

    def take(self, ts: list[float]) -> None:
        """See `FieldTape.take`."""
        self.tape.take(ts)

    def put(self, found: Sequence[Found], ts: list[float]) -> None:
        """See `FieldTape.put`."""
        self.tape.put(found, ts)

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """``velocity`` and what of ``value, gradient, time, laplacian`` is wanted, at all stages."""
        return {name: self._sum(x, x.ndim == 4) for name, x in self.tape.outputs(want).items()}

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        """Prepares the way back (see `FieldTape.begin`)."""
        self.cotangents = cotangents
        shares = {name: self._spread(x, x.ndim == 4) for name, x in cotangents.items()}
        direct = self.tape.begin(shares, weights=weights)
        return None if direct is None else direct.sum(0, keepdim=True)

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity, beside those given to `begin`."""
        return self.tape.pull(at, self._spread(lam, True)).sum(0, keepdim=True)

    def gradients(self, lam: Tensor) -> list[Tensor | None]:
        """The gradients of `inputs`, after every stage has been pulled with ``lam [1, S, n, D]``."""
        out = self.tape.gradients(self._spread(lam, True))
        return [*out, self._gradient_of_weights(lam)] if self.weights.requires_grad else out

    def _gradient_of_weights(self, lam: Tensor) -> Tensor:
        """What every flow's own outputs are to the cotangents of their weighted sums, ``[n, K]``."""
        bars = dict(self.cotangents)
        bars["velocity"] = lam + bars["velocity"] if "velocity" in bars else lam
        outputs = self.tape.outputs(frozenset(bars))
        shares = [outputs[name] * bar for name, bar in bars.items() if name in outputs]
        return torch.stack([(x.sum(-1) if x.ndim == 4 else x).sum(1) for x in shares]).sum(0).mT
