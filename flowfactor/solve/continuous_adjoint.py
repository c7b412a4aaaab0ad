r"""The continuous adjoint of a solve by closed forms: backward in time with memory that does not grow with the steps.

For a loss of the outputs and of integrals with rates $\ell_q$ along the path,
$$\dot\lambda = -(\partial v/\partial z)^\top\lambda - \textstyle\sum_q \mu_q\,\partial \ell_q/\partial z, \qquad
  \bar\theta = \int (\partial v/\partial\theta)^\top\lambda + \textstyle\sum_q \mu_q\,\partial \ell_q/\partial\theta\;dt ,$$
solved together with z from each output back to the one before it (Chen et al., NeurIPS 2018). Only z and $\lambda$ steer the
steps (the seminorm of Kidger et al., ICML 2021). Integrals over parameters are quadratures over accepted steps, taken a few
steps at a time. $\lambda$ is carried relative to its largest entry: its equation is linear, and a tolerance must not depend
on the scale of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.fields._sum_adjoint import Found
from flowfactor.solve.discrete_adjoint import Totals, cotangents_of, rates_of
from flowfactor.solve.forward import GaveUpError, Plan
from flowfactor.solve.runge_kutta import StepControl, Steps

_STAGES_AT_ONCE = 16  # stages whose record is held until their share of the parameters' integrals is taken


def solve_adjoint(
    plan: Plan, ys: Tensor, bars: tuple[Tensor, Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Solves the adjoint equation from the last output back to the first.

    Args:
        plan: What was solved.
        ys: States at the outputs ``[T, K, n, D]``.
        bars: Cotangents of these states, and of the integrals there ``[Q, T, K, n]``.
        others: What the costs depend on beside the field.

    Returns:
        Cotangents of the start, of ``others`` and of the tape's inputs.
    """
    ys_bar, integrals_bar = bars
    way = _WayBack(plan, ys[0], others)
    lam = ys_bar[-1]
    mu = torch.zeros_like(integrals_bar[:, 0])
    for i in range(len(plan.times) - 1, 0, -1):
        mu = mu + integrals_bar[:, i]
        lam = way.interval(ys[i], lam, mu, plan.times[i], plan.times[i - 1]) + ys_bar[i - 1]
    way.flush()
    return lam, way.other_bars.values, way.own.values


class _WayBack:
    """The state of a solve of the adjoint equation."""

    def __init__(self, plan: Plan, like: Tensor, others: Sequence[Tensor]) -> None:
        self.plan, self.tape, self.table, self.others = plan, plan.tape, plan.table, others
        self.steps = Steps(plan.table, torch.stack([like, like]), solver=plan.solver)
        self.control = StepControl(plan.solver, plan.table.order)
        self.own, self.other_bars = Totals(len(plan.tape.inputs)), Totals(len(others))
        self.size: float | None = None
        self.looks: list[tuple[float, Found, Tensor]] = []  # of the step under way: time, record, lambda
        self.waiting: list[tuple[float, Found, Tensor, Tensor]] = []  # time, record, weighted lambda and mu

    def rate(self, t: float, y: Tensor, mu: Tensor) -> Tensor:
        """The right-hand side of ``[z, lambda]``, both ``[K, n, D]``; notes what it found."""
        z, lam = y[0], y[1]
        velocity, found = self.tape.velocity(z, self.tape.terms([t], z)[0], False)
        self.plan.told.nfe_backward += 1
        self.tape.put([found], [t])
        cotangents, _, z_bar = self._cotangents([t], mu.unsqueeze(2))
        direct = self.tape.begin(cotangents, weights=False)
        back = self.tape.pull((slice(None), 0), lam)
        for more in (direct, z_bar):
            if more is not None:
                back = back + more[:, 0]
        self.looks.append((t, found, lam))
        return torch.stack([velocity, back.neg_()])

    def _cotangents(
        self, ts: list[float], bars: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor | None]:
        if not self.plan.quadratures:
            return {}, [None] * len(self.others), None
        return cotangents_of(self.plan, rates_of(self.plan, ts, log_det=False, graph=True), bars, self.others)

    def interval(self, z: Tensor, lam: Tensor, mu: Tensor, t: float, end: float) -> Tensor:
        """Goes back from ``z`` and ``lam`` at ``t``; returns lambda at ``end``."""
        scale = float(torch.stack([lam.abs().amax(), *([mu.abs().amax()] if len(mu) else [])]).amax())
        if scale == 0:
            return lam
        if not math.isfinite(scale):
            raise GaveUpError
        self.scale, self.mu = scale, mu / scale
        y = torch.stack([z, lam / scale])
        return (self._adaptive if self.plan.solver.adaptive else self._fixed)(y, t, end)[1] * scale

    def _fixed(self, y: Tensor, t: float, end: float) -> Tensor:
        grid = self.plan.solver.grid(torch.tensor([t, end], dtype=torch.float64)).tolist()
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            self.steps.start(b - a)
            for i, c in enumerate(self.table.c.tolist()):
                self.steps.note(i, self.rate(a + c * (b - a), self.steps.stage(i, y) if i else y, self.mu))
            y = self.steps.end(y)
            self._took(b - a, 0)
        return y

    def _adaptive(self, y: Tensor, t: float, end: float) -> Tensor:
        steps, table, solver = self.steps, self.table, self.plan.solver
        sign = 1.0 if end > t else -1.0
        steps.note(0, self.rate(t, y, self.mu))
        if self.size is None:
            self.size = self._first_step(y, t, sign)
        attempts = 0
        while t != end:
            cut = (t + sign * self.size - end) * sign > 0
            dt = end - t if cut else sign * self.size
            e = end if cut else t + dt
            attempts += 1
            if attempts > solver.max_steps or t + dt == t:
                raise GaveUpError
            steps.start(dt)
            at = y
            for i, c in enumerate(table.c[1:].tolist(), 1):
                at = steps.stage(i, y)
                steps.note(i, self.rate(e if c == 1 else t + c * dt, at, self.mu))
            ratio = math.sqrt(float(self._norm(steps.error(y, at, None))))
            if not math.isfinite(ratio):
                raise GaveUpError
            natural = self.control.next(abs(dt), ratio)
            # A step cut short by the end of an interval says little about the natural size.
            self.size = natural if ratio > 1 or not cut else max(natural, self.size)
            if ratio > 1:
                del self.looks[1:]
                continue
            self._took(dt, 1)
            y, t = at, e
            steps.carry()
        self.looks = []  # the next interval begins with another lambda
        return y

    def _first_step(self, y: Tensor, t: float, sign: float) -> float:
        f0 = sign * self.steps.k[0].reshape(y.shape)
        noted = len(self.looks)
        size = self.control.first(
            lambda s, y: sign * self.rate(t + sign * s, y, self.mu), y, f0,
            lambda x: self._norm(x.square().mean(-1)).sqrt(),
        )  # fmt: skip
        del self.looks[noted:]
        return size

    def _norm(self, squares: Tensor) -> Tensor:
        """The larger of the norms of z and lambda, from mean squares ``[2, K, n]``."""
        if self.plan.solver.norm == "sample":
            return squares.amax()
        real = self.plan.real
        return (squares.mean((1, 2)) if real is None else (squares * real).sum((1, 2))).amax()

    def _took(self, dt: float, keep: int) -> None:
        """Enters an accepted step; ``keep`` looks at its end begin the next one."""
        for (t, found, lam), b in zip(self.looks, self.table.b.tolist(), strict=True):
            if b:
                weight = -dt * b * self.scale
                self.waiting.append((t, found, lam * weight, self.mu * weight))
        self.looks = self.looks[-1:] if keep else []
        if len(self.waiting) >= _STAGES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Adds the waiting stages' share to the gradients of all parameters."""
        if not self.waiting:
            return
        ts, found, lams, mus = zip(*self.waiting, strict=True)
        self.waiting = []
        self.tape.put(found, list(ts))
        cotangents, more, _ = self._cotangents(list(ts), torch.stack(mus, 2))
        self.other_bars.add(more)
        self.tape.begin(cotangents)
        lam = torch.stack(lams, 1)
        self.tape.pull((slice(None), slice(None)), lam)
        self.own.add(self.tape.gradients(lam))
