"""What a solve remembers of the one before it: how long its steps may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.8
"""Share of the step found best that the next solve begins with: other samples may ask for shorter ones, and a step that is
tried in vain costs more than a step that is a little short."""
_AIM = 0.9
"""Error over tolerance that a planned step aims at: as near to 1 as other samples allow."""
_FLATTEST = 1e-3  # error over tolerance below which an estimate says nothing of how much longer a step might be
_MOST = 64  # steps of a solve that are remembered; solves of more begin as the one before did, and find the rest


class StepMemory(nn.Module):
    """Sizes of first steps and of whole sequences, for solves forward and back in time, in frames; 0 where nothing is known.

    They are buffers, so that a training that goes on from a checkpoint takes the steps that it would have taken.

    Attributes:
        sizes: First steps, ``[2]``.
        ends: When the steps of the last solve ended, after its start, ``[2, 65]``.
        costs: How many steps that aim at `_AIM` each of them is worth, ``[2, 64]``.
    """

    sizes: Tensor
    ends: Tensor
    costs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.zeros(2))
        self.register_buffer("ends", torch.zeros(2, _MOST + 1))
        self.register_buffer("costs", torch.zeros(2, _MOST))

    def recall(self, sign: float) -> float | None:
        """The first step of a solve forward (``sign`` 1) or back (-1); None where it has to be found."""
        return float(self.sizes[int(sign < 0)]) or None

    def note(self, sign: float, size: float) -> None:
        """Keeps that steps of ``size`` would have been good at the start of a solve."""
        self.sizes[int(sign < 0)] = SHARE * size

    def planned(self, begin: float, end: float) -> list[float]:
        """The steps of a solve from ``begin`` to ``end``: as few as promise the tolerance, with equal shares of the error.

        The last one is infinite: it is whatever is left. Empty where the solve before, in the same direction, did not pass
        over all of that time.
        """
        which, sign = int(end < begin), -1.0 if end < begin else 1.0
        costs = [cost for cost in self.costs[which].tolist() if cost]
        knots = [sign * x for x in self.ends[which, : len(costs) + 1].tolist()]
        begin, end = sign * begin, sign * end
        slack = 1e-5 * (end - begin)
        if not costs or knots[0] > begin + slack or knots[-1] < end - slack:
            return []
        sums = [0.0]
        for cost in costs:
            sums.append(sums[-1] + cost)
        first, last = (_between(x, knots, sums) for x in (begin, end))
        count = max(1, math.ceil(last - first - 1e-3))
        if count > _MOST:
            return []
        stops = [begin, *(_between(first + i * (last - first) / count, sums, knots) for i in range(1, count))]
        return [*(b - a for a, b in zip(stops, stops[1:], strict=False)), math.inf]

    def note_steps(self, begin: float, steps: Sequence[tuple[float, float]], order: int) -> None:
        """Keeps the steps of a solve from ``begin``: their signed lengths, and the error of each over the tolerance."""
        if not steps:
            return
        which = int(steps[0][0] < 0)
        self.costs[which] = 0.0
        if len(steps) > _MOST:
            return
        ends = [begin]
        for length, _ in steps:
            ends.append(ends[-1] + length)
        costs = [(max(ratio, _FLATTEST) / _AIM) ** (1 / order) for _, ratio in steps]
        self.ends[which, : len(ends)] = self.ends.new_tensor(ends)
        self.costs[which, : len(costs)] = self.costs.new_tensor(costs)

    def misled(self, times: Sequence[float]) -> bool:
        """Forgets what a solve over some times began with and failed; says whether that was anything."""
        which = int(times[-1] < times[0])
        was = bool(self.sizes[which]) or bool(self.costs[which].any())
        self.sizes[which] = 0.0
        self.costs[which] = 0.0
        return was

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Weights that were trained without a memory have none.
        for name, known in self.named_buffers():
            state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(known))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The line through points of rising ``xs`` and ``ys``, at ``x``; at its ends beyond them."""
    for a, b, c, d in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= b:
            return c + (d - c) * max(x - a, 0.0) / (b - a)
    return ys[-1]
