r"""Samples at times of their own, followed by one solve: a clock that all of them share.

When the clock shows s, sample b is at $t_b(s) = a_b + r_b s$, so that $dz_b/ds = r_b\,v(z_b, t_b(s))$; the rates of
log-determinants scale likewise, and costs, which add up in either direction, by $|r_b|$. Where the times of all samples are
the same grid, stretched and shifted, one rate holds for the whole solve, and outputs are at one time of the clock. Else one
rate does where outputs can be read inside of steps, each sample's at its own times (`flowfactor.solve.reads`); where they
cannot, rates change at every output, where steps have to land.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowfactor.networks.batching import Layout
from flowfactor.networks.stage_adjoint import Outputs, Pullback, Residuals, StageAdjoint, Stages, TimeTerms
from flowfactor.networks.time import Times


@dataclass(frozen=True)
class Clock:
    """The times of all samples as functions of one clock, linear from knot to knot.

    Attributes:
        knots: Where the pieces begin, on the clock.
        starts: The time of each sample where a piece begins, ``[P, *batch]``, in frames.
        rates: Frames per unit of the clock, ``[P, *batch]``; at most 1 in size.
    """

    knots: tuple[float, ...]
    starts: Tensor
    rates: Tensor

    @property
    def asks_gradient(self) -> bool:
        """Whether the times of some sample ask for their gradient."""
        return self.starts.requires_grad or self.rates.requires_grad

    def piece(self, s: float) -> int:
        """The piece that a step at ``s`` lies in; at a knot, the later one."""
        return max(bisect_right(self.knots, s) - 1, 0)

    def at(self, s: float | Tensor, piece: int) -> Tensor:
        """The time of each sample ``[*batch]`` when the clock shows ``s``."""
        return self.starts[piece] + self.rates[piece] * (s - self.knots[piece])

    def one(self, piece: int) -> Clock:
        """A clock of one piece alone."""
        which = slice(piece, piece + 1)
        return Clock(self.knots[which], self.starts[which], self.rates[which])

    def laid_out(self, layout: Layout, dtype: torch.dtype) -> Clock:
        """The clock of samples that lie as one block: ``[P, G, n]``, with rates in the precision of the states."""
        return Clock(self.knots, spread(self.starts, layout), spread(self.rates, layout).to(dtype))


def spread(x: Tensor, layout: Layout) -> Tensor:
    """Numbers of each sample ``[P, *batch]`` where samples lie as one block, ``[P, G, n]``."""
    return layout.scatter(x.detach().movedim(0, -1))[0].movedim(-1, 0).contiguous()


class ClockAdjoint(StageAdjoint):
    """A velocity whose samples are at times of their own, as a velocity on the clock.

    Stages of S clock times ``ts`` are in the pieces that `pieces` says. Outputs of `Stages` are the part's own, per frame;
    `velocity`, `divergence` and `Pullback.pull` are per unit of the clock.

    Args:
        single: The part's adjoint.
        clock: The clock, laid out as the samples are.
    """

    def __init__(self, single: StageAdjoint, clock: Clock) -> None:
        self.single, self.clock = single, clock
        self.inputs = single.inputs

    def times(self, ts: Sequence[float]) -> Tensor:
        """The times of all samples at S stages, ``[S, G, n]``."""
        clock, pieces = self.clock, [self.clock.piece(s) for s in ts]
        since = clock.starts.new_tensor([s - clock.knots[piece] for s, piece in zip(ts, pieces, strict=True)])
        return clock.starts[pieces] + clock.rates[pieces] * since.view(-1, 1, 1)

    def rates(self, ts: Sequence[float]) -> Tensor:
        """Their rates, ``[S, G, n]``."""
        return self.clock.rates[[self.clock.piece(s) for s in ts]]

    def time_terms(self, ts: Times) -> list[TimeTerms]:
        ts = _on_clock(ts)
        rates = self.rates(ts).unsqueeze(-1).unbind(0)
        return list(zip(self.single.time_terms(self.times(ts)), rates, strict=True))

    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        velocity, residuals = self.single.velocity(z, terms[0], out)
        return torch.mul(velocity, terms[1], out=out), (residuals, terms[1])

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        rates = torch.stack([rate for _, rate in residuals]).squeeze(-1)
        return self.single.divergence([r for r, _ in residuals]) * rates

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        ts = _on_clock(ts)
        single = self.single.stack([r for r, _ in residuals], self.times(ts))
        return ClockStages(single, torch.stack([rate for _, rate in residuals], 1))

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        return self.single.by_autograd(inputs)


class ClockStages(Stages):
    """Stages of a `ClockAdjoint`, with their rates ``[G, S, n, 1]``."""

    def __init__(self, single: Stages, rates: Tensor) -> None:
        self.single, self.rates, self.z = single, rates, single.z

    def outputs(self, want: frozenset[str]) -> Outputs:
        return self.single.outputs(want)

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return ClockPullback(self, self.single.pullback(cotangents, parameters=parameters), parameters)


class ClockPullback(Pullback):
    """The adjoint of the stages of a `ClockAdjoint`."""

    def __init__(self, stages: ClockStages, single: Pullback, parameters: bool) -> None:
        super().__init__(stages.z.shape[1], single.direct, parameters)
        self.single, self.rates = single, stages.rates

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        return self.single.pull(at, self.rates[:, at] * cotangent)

    def _gradients(self) -> list[Tensor | None]:
        return self.single.gradients()


def _on_clock(ts: Times) -> Sequence[float]:
    if isinstance(ts, Tensor):
        raise TypeError("a clock shows one time for all samples")
    return ts
