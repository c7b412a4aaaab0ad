"""Solvers of torchdiffeq whose outputs are read off inside of steps; torchdiffeq takes them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.bosh3 import Bosh3Solver
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.odeint import SOLVERS


class Bosh3(Bosh3Solver):
    """torchdiffeq's bosh3, with the cubic through values and slopes at both ends of a step (Hermite's) inside of it.

    Its own quartic has a middle of lower order.
    """

    mid = torch.tensor([1 / 9 + 1 / 8, 1 / 6, 2 / 9, -1 / 8], dtype=torch.float64)


class _OfEach:
    """Reads each sample at times of its own, from one solve from the first to the last time that it is given.

    Args:
        reads: When, ``[T, *batch]``.
        **options: As its base takes them.
    """

    def __init__(self: Any, reads: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.reads = reads.unsqueeze(-1)

    def integrate(self: Any, t: Tensor) -> Tensor:
        """States ``[T, *batch, S]``."""
        t = t.to(self.dtype)
        self._before_integrate(t)
        states = [self.y0] * len(self.reads)
        while self.rk_state.t1 < t[-1]:
            begin = self.rk_state.t1
            self.rk_state = self._adaptive_step(self.rk_state)
            end, parts = self.rk_state.t1, self.rk_state.interp_coeff
            inside = (self.reads > begin) & (self.reads <= end)
            for i in inside.flatten(1).any(1).nonzero().flatten().tolist():
                x = ((self.reads[i] - begin) / (end - begin)).to(self.y0.dtype)
                state = (
                    parts[0] + x * parts[1] + x**2 * parts[2] + x**3 * parts[3] + x**4 * parts[4]
                )  # as torchdiffeq adds
                states[i] = torch.where(inside[i], state, states[i])
        return torch.stack(states)


class _Dopri5OfEach(_OfEach, Dopri5Solver):
    pass


class _Bosh3OfEach(_OfEach, Bosh3):
    pass


DENSE = {"dopri5": "dopri5", "bosh3": "flowfactor bosh3"}
"""Methods whose interpolation is as accurate as their steps, so that outputs are read off inside of these."""
DENSE_OF_EACH = {"dopri5": "flowfactor dopri5 of each", "bosh3": "flowfactor bosh3 of each"}
"""The same where each sample is read at times of its own."""
SOLVERS |= {
    DENSE["bosh3"]: Bosh3,
    DENSE_OF_EACH["dopri5"]: _Dopri5OfEach,
    DENSE_OF_EACH["bosh3"]: _Bosh3OfEach,
}
