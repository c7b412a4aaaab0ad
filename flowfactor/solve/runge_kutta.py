"""Runge-Kutta steps over states of any layout, with torchdiffeq's tableaus, first step and step-size control.

torchdiffeq keeps the k of a step in the last dimension and its times in tensors. For the small states of latent flows that
costs more than the field. Here a matrix holds the k, so that each combination of them is one product, and times are
numbers; which steps are tried and taken is decided by torchdiffeq's rules from the same error estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from flowfactor.solve.interpolating import DENSE
from flowfactor.solver import Solver

_SAFETY, _MOST, _LEAST = 0.9, 10.0, 0.2  # torchdiffeq's defaults: share of the next step aimed at, and its bounds


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method with q stages.

    Attributes:
        a: ``[q, q]``, strictly lower triangular.
        b: ``[q]``.
        c: ``[q]``.
        order: Its order, for the step-size control.
        error: ``[q]``, weights of the error estimate; None for methods of fixed steps.
        middle: ``[q]``, weights of the state in the middle of a step, for interpolation as accurate as the steps; None where
            there is none.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    order: int = 0
    error: np.ndarray | None = None
    middle: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Q."""
        return len(self.b)

    def inside(self, x: float) -> np.ndarray:
        """Weights of the k for the state at the fraction ``x`` of a step: torchdiffeq's quartic through both ends."""
        return self.b if x == 1.0 else np.array([x, x**2, x**3, x**4]) @ self.quartic

    @property
    def dense(self) -> bool:
        """Whether outputs may be read off inside of a step."""
        return self.middle is not None

    @cached_property
    def quartic(self) -> np.ndarray:
        """Weights by powers of the fraction, ``[4, q]``: values and slopes match at both ends, the value in the middle."""
        assert self.middle is not None
        first, last = np.eye(self.size)[0], np.eye(self.size)[-1]
        square = last - 4 * first - 5 * self.b + 16 * self.middle
        cubic = 5 * first - 3 * last + 14 * self.b - 32 * self.middle
        return np.stack([first, square, cubic, 2 * (last - first) - 8 * self.b + 16 * self.middle])


_FIXED = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [0.5]], [0.0, 1.0]),
    "heun2": ([[], [1.0]], [0.5, 0.5]),
    "heun3": ([[], [1 / 3], [0.0, 2 / 3]], [0.25, 0.0, 0.75]),
    "rk4": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


@cache
def tableau(method: str) -> Tableau | None:
    """The tableau of a method, or None where it is not a Runge-Kutta method whose steps are independent of one another.

    torchdiffeq begins a step of an adaptive method with the last stage of the step before. Where that stage does not lie
    at the new state (adaptive_heun, fehlberg2), a step depends on its predecessor, and there is none.
    """
    if method in _FIXED:
        below, b = _FIXED[method]
        a = np.zeros((len(b), len(b)))
        for i, weights in enumerate(below):
            a[i, : len(weights)] = weights
        return Tableau(a, np.array(b), a.sum(1))
    kind = SOLVERS.get(DENSE.get(method, method))
    if kind is None or not issubclass(kind, RKAdaptiveStepsizeODESolver):
        return None
    own = kind.tableau
    q = len(own.alpha) + 1
    a = np.zeros((q, q))
    for i, weights in enumerate(own.beta):
        a[i + 1, : i + 1] = weights.double().numpy()
    b = own.c_sol.double().numpy()
    if b[-1] != 0 or not np.array_equal(b[:-1], a[-1, :-1]):
        return None
    c = np.concatenate([[0.0], own.alpha.double().numpy()])
    middle = kind.mid.double().numpy() if method in DENSE else None
    return Tableau(a, b, c, kind.order, own.c_error.double().numpy(), middle)


class StepControl:
    """torchdiffeq's choice of the first and the next step.

    Args:
        solver: Tolerances.
        order: Order of the method.
    """

    def __init__(self, solver: Solver, order: int) -> None:
        self.rtol, self.atol, self.order = solver.rtol, solver.atol, order

    def first(
        self, func: Callable[[float, Tensor], Tensor], y0: Tensor, f0: Tensor, norm: Callable[[Tensor], Tensor]
    ) -> float:
        """The first step for dy/ds = func(s, y) from s = 0 (Hairer et al., II.4)."""
        scale = y0.abs().mul_(self.rtol).add_(self.atol)
        d0, d1 = float(norm(y0 / scale)), float(norm(f0 / scale))
        trial = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        if not trial > 0:  # the field is infinite, which the step will show
            return trial
        d2 = float(norm((func(trial, y0 + trial * f0) - f0) / scale)) / trial
        steepest = max(d1, d2)
        step = max(1e-6, trial * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / self.order)
        return min(100 * trial, step)

    def next(self, step: float, ratio: float) -> float:
        """The next step after one of the size ``step`` whose error is ``ratio`` times the tolerance."""
        if ratio == 0:
            return step * _MOST
        least = 1.0 if ratio < 1 else _LEAST
        return step * min(_MOST, max(_SAFETY / ratio ** (1 / self.order), least))


class Steps:
    """The arithmetic of steps for one solve over states ``[K, n, D]``.

    Args:
        table: The method.
        like: A state.
        quadrature: Whether each stage gives a second rate ``[K, n]`` that takes part in the error.
        solver: Tolerances, where errors are asked for.
    """

    def __init__(self, table: Tableau, like: Tensor, quadrature: bool = False, solver: Solver | None = None) -> None:
        self.table, self.shape = table, like.shape
        self.rtol, atol = (0.0, 0.0) if solver is None else (solver.rtol, solver.atol)
        self.atol = like.new_tensor(atol)  # a number would become a tensor at every step
        q = table.size
        self.k = like.new_empty(q, like.numel())
        self.rates = like.new_empty(q, like.shape[:-1].numel()) if quadrature else None
        self.a = torch.tensor(table.a, dtype=like.dtype, device=like.device)
        ends = [table.b] if table.error is None else [table.b, table.error]
        self.ends = torch.tensor(np.stack(ends), dtype=like.dtype, device=like.device)
        # Weights for the step under way. For small states an index costs as much as a product: all are taken once.
        self.scaled, self.scaled_ends = torch.empty_like(self.a), torch.empty_like(self.ends)
        self.each = [k.view(self.shape) for k in self.k.unbind(0)]
        self.before = [(self.k[:i].mT, self.scaled[i, :i]) for i in range(q)]
        self.whole = self.k.mT, self.scaled_ends[0]

    def note(self, i: int, velocity: Tensor) -> None:
        """Keeps what stage ``i`` found."""
        self.each[i].copy_(velocity)

    def note_rates(self, i: int, rates: Tensor) -> None:
        """Keeps the second rates ``[S, K, n]`` of the stages from ``i``."""
        if self.rates is not None:
            self.rates[i : i + len(rates)] = rates.reshape(len(rates), -1)

    def carry(self) -> None:
        """Makes the last stage of a step the first of the next."""
        self.k[0] = self.k[-1]
        if self.rates is not None:
            self.rates[0] = self.rates[-1]

    def start(self, dt: float) -> None:
        """Scales the weights for steps of ``dt``."""
        torch.mul(self.a, dt, out=self.scaled)
        torch.mul(self.ends, dt, out=self.scaled_ends)

    def stage(self, i: int, z: Tensor) -> Tensor:
        """The state of stage ``i`` of a step from ``z``."""
        return torch.addmv(z.reshape(-1), *self.before[i]).view(self.shape)

    def end(self, z: Tensor) -> Tensor:
        """The state at the end of a step from ``z``."""
        return torch.addmv(z.reshape(-1), *self.whole).view(self.shape)

    def weights(self, parts: list[np.ndarray], dt: float) -> Tensor:
        """Weights of `Tableau.inside` for a step of ``dt``, ``[len(parts), q]``."""
        return torch.tensor(np.array(parts) * dt, dtype=self.k.dtype, device=self.k.device)

    def at(self, z: Tensor, weights: Tensor) -> Tensor:
        """The state inside a step from ``z``, by its weights ``[q]``."""
        return torch.addmv(z.reshape(-1), self.whole[0], weights).view(self.shape)

    def totals(self, weights: Tensor) -> Tensor:
        """The integrals of the second rate over parts of a step, by their weights ``[parts, q]``: ``[parts, K, n]``."""
        assert self.rates is not None
        return (weights @ self.rates).view(-1, *self.shape[:-1])

    def totals_each(self, weights: Tensor) -> Tensor:
        """The integrals of the second rate up to where each sample is read, by weights ``[O, q, K, n]``: ``[O, K, n]``."""
        assert self.rates is not None
        return (weights * self.rates.view(-1, *self.shape[:-1])).sum(1)

    def error(self, z: Tensor, end: Tensor, ell: Tensor | None) -> Tensor:
        """Mean square of the error over the tolerance, of every sample ``[K, n]``.

        Args:
            z: State at the start of the step.
            end: State at its end.
            ell: The integral of the second rate up to its start ``[K, n]``, where there is one.
        """
        state, rest = self._error(z, end, ell)
        squares = state.square_().sum(-1)
        return squares / self.shape[-1] if rest is None else (squares + rest.square_()) / (self.shape[-1] + 1)

    def mean_error(self, z: Tensor, end: Tensor, ell: Tensor | None) -> float:
        """The mean of `error` over all samples: two products, where it takes a sum for every sample."""
        state, rest = (None if x is None else x.view(-1) for x in self._error(z, end, ell))
        assert state is not None
        if rest is None:
            return float(torch.dot(state, state)) / len(state)
        return float(torch.dot(state, state) + torch.dot(rest, rest)) / (len(state) + len(rest))

    def _error(self, z: Tensor, end: Tensor, ell: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Error over tolerance of the state ``[K, n, D]`` and of the second integral ``[K, n]``."""
        state = torch.mv(self.whole[0], self.scaled_ends[1]).view(self.shape).div_(self._allowed(z, end))
        if ell is None or self.rates is None:
            return state, None
        over, wrong = (self.scaled_ends @ self.rates).view(2, *self.shape[:-1]).unbind(0)
        return state, wrong.div_(self._allowed(ell, ell + over))

    def _allowed(self, x: Tensor, y: Tensor) -> Tensor:
        larger = torch.maximum(x.abs(), y.abs())
        return torch.add(self.atol, larger, alpha=self.rtol, out=larger)
