"""Outputs of samples at times of their own, read off inside of steps that all samples share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowfactor.solve.runge_kutta import Tableau


@dataclass
class Reads:
    """The outputs of one step.

    Attributes:
        first: The first of them.
        inside: Which samples have them in the step, ``[O, G, n]``.
        x: At which fraction of it, ``[O, G, n]``; 0 for the others.
    """

    first: int
    inside: Tensor
    x: Tensor

    @property
    def outputs(self) -> slice:
        """Which outputs they are."""
        return slice(self.first, self.first + len(self.x))

    def weights(self, table: Tableau, dt: float) -> Tensor:
        """Weights of the k of a step of ``dt`` for what it adds to each output, ``[O, q, G, n]``."""
        first, square, cubic, fourth = self._quartic(table, dt).view(4, 1, -1, 1, 1)
        x = self.x.unsqueeze(1)
        return (fourth * x).add_(cubic).mul_(x).add_(square).mul_(x).add_(first).mul_(x)

    def states(self, table: Tableau, dt: float, z: Tensor, k: Tensor) -> Tensor:
        """The states ``[O, G, n, D]`` inside of a step from ``z [G, n, D]`` with its k ``[q, G n D]``."""
        first, square, cubic, fourth = (self._quartic(table, dt) @ k).view(4, *z.shape)
        x = self.x.unsqueeze(-1)
        state = torch.addcmul(cubic, x, fourth)
        for lower in (square, first, z):
            state = torch.addcmul(lower, x, state)
        return state

    def pull(self, table: Tableau, dt: float, bars: Tensor) -> tuple[Tensor, Tensor]:
        """What cotangents ``[O, G, n, D]`` of the states give the k ``[q, G, n, D]``, and the start of the step."""
        x, sums = self.x.unsqueeze(-1), []
        more = bars
        for _ in range(4):
            more = more * x
            sums.append(more.sum(0))
        k_bars = self._quartic(table, dt).mT @ torch.stack(sums).view(4, -1)
        return k_bars.view(-1, *bars.shape[1:]), (bars * self.inside.unsqueeze(-1).to(bars)).sum(0)

    def _quartic(self, table: Tableau, dt: float) -> Tensor:
        return torch.tensor(table.quartic * dt, dtype=self.x.dtype, device=self.x.device)


class Readings:
    """When each output of each sample is read.

    Args:
        at: On the clock of the solve, which runs forward from 0, ``[T, G, n]``; from output to output never less.
        dtype: Of the states.
    """

    def __init__(self, at: Tensor, dtype: torch.dtype) -> None:
        self.at, self.dtype = at, dtype
        least, most = torch.aminmax(at.flatten(1), dim=1)
        self.least, self.most = least.tolist(), most.tolist()

    def of_step(self, t: float, e: float) -> Reads | None:
        """What lies beyond ``t`` and not beyond ``e``; None where nothing does."""
        some = [i for i, (low, high) in enumerate(zip(self.least, self.most, strict=True)) if low <= e and high > t]
        if not some:
            return None
        at = self.at[some[0] : some[-1] + 1]
        inside = (at > t) & (at <= e)
        x = torch.where(inside, (at - t) / (e - t), 0).to(self.dtype)
        return Reads(some[0], inside, x)

    def reached(self, e: float) -> int:
        """The number of outputs that no sample has beyond ``e``."""
        return sum(high <= e for high in self.most)

    @property
    def begin(self) -> Tensor:
        """Which outputs are the start, ``[T, G, n, 1]``."""
        return (self.at <= 0).unsqueeze(-1)

    def later(self, e: float) -> Tensor:
        """Which outputs lie beyond ``e``, ``[T, G, n]``."""
        return self.at > e
