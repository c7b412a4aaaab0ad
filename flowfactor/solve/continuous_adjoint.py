r"""The continuous adjoint of a solve in closed form: backward in time with memory that does not grow with the steps.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from flowfactor.networks.stage_adjoint import Outputs, Pullback, Residuals
from flowfactor.solve.discrete_adjoint import Totals, cotangents_of, rates_of
from flowfactor.solve.forward import GaveUpError
from flowfactor.solve.problem import Plan, just_inside
from flowfactor.solve.runge_kutta import StepControl, Steps

_STAGES_AT_ONCE = 16  # stages whose residuals are held until their share of the parameters' integrals is taken


@dataclass
class _Stage:
    """A stage of the adjoint's solve: its time, its residuals, lambda and mu there."""

    t: float
    residuals: Residuals
    lam: Tensor
    mu: Tensor


def continuous_adjoint(
    plan: Plan, ys: Tensor, bars: tuple[Tensor, Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Solves the adjoint equation from the last output back to the first.

    Args:
        plan: What was solved.
        ys: States at the outputs ``[T, K, n, D]``.
        bars: Cotangents of these states, and of the integrals there ``[Q, T, K, n]``.
        others: What the costs depend on beside the field.

    Returns:
        Cotangents of the start, of ``others`` and of the adjoint's inputs.
    """
    ys_bar, integrals_bar = bars
    solve = _AdjointSolve(plan, ys[0], others)
    lam = ys_bar[-1]
    mu = torch.zeros_like(integrals_bar[:, 0])
    for i in range(len(plan.times) - 1, 0, -1):
        mu = mu + integrals_bar[:, i]
        lam = solve.interval(ys[i], lam, mu, plan.times[i], plan.times[i - 1]) + ys_bar[i - 1]
    solve.flush()
    return lam, solve.other_bars.values, solve.own.values


class _AdjointSolve:
    """The state of a solve of the adjoint equation."""

    def __init__(self, plan: Plan, like: Tensor, others: Sequence[Tensor]) -> None:
        self.plan, self.adjoint, self.table, self.others = plan, plan.adjoint, plan.table, others
        self.steps = Steps(plan.table, torch.stack([like, like]), solver=plan.solver)
        self.control = StepControl(plan.solver, plan.table.order)
        self.own, self.other_bars = Totals(len(plan.adjoint.inputs)), Totals(len(others))
        self.size: float | None = None
        self.stages: list[_Stage] = []  # of the step under way
        self.accepted: list[_Stage] = []  # whose share of the parameters' integrals is not taken yet, with its weight

    def rate(self, t: float, y: Tensor, mu: Tensor) -> Tensor:
        """The right-hand side of ``[z, lambda]``, both ``[K, n, D]``; notes the stage."""
        z, lam = y[0], y[1]
        if self.plan.jumps:  # at both ends of an interval the rates of this interval hold
            t = min(max(t, self.low), just_inside(self.high, self.low))
        velocity, residuals = self.adjoint.velocity(z, self.adjoint.time_terms([t])[0])
        self.plan.caller_stats.nfe_backward += 1
        stage = _Stage(t, residuals, lam, mu)
        pullback, _, z_bar, _ = self._pullback([stage], parameters=False)
        back = pullback.pull(0, lam)
        for more in (pullback.direct, z_bar):
            if more is not None:
                back = back + more[:, 0]
        self.stages.append(stage)
        return torch.stack([velocity, back.neg_()])

    def _pullback(
        self, stages: Sequence[_Stage], *, parameters: bool
    ) -> tuple[Pullback, list[Tensor | None], Tensor | None, list[Tensor | None]]:
        """The adjoint of some stages, and the cotangents of ``others`` and, beside it, of z and of the adjoint's inputs."""
        ts = [stage.t for stage in stages]
        joined = self.adjoint.stack([stage.residuals for stage in stages], ts)
        if not self.plan.quadratures:
            nothing: list[Tensor | None] = [None] * len(self.adjoint.inputs)
            return joined.pullback(Outputs(), parameters=parameters), [None] * len(self.others), None, nothing
        rates = rates_of(self.plan, joined, ts, log_det=False, graph=True)
        mu = torch.stack([stage.mu for stage in stages], 2)
        cotangents, others, z_bar, own = cotangents_of(self.plan, rates, ts, mu, self.others)
        return joined.pullback(cotangents, parameters=parameters), others, z_bar, own

    def interval(self, z: Tensor, lam: Tensor, mu: Tensor, t: float, end: float) -> Tensor:
        """Goes back from ``z`` and ``lam`` at ``t``; returns lambda at ``end``."""
        scale = float(torch.stack([lam.abs().amax(), *([mu.abs().amax()] if len(mu) else [])]).amax())
        if scale == 0:
            return lam
        if not math.isfinite(scale):
            raise GaveUpError
        self.scale, self.mu = scale, mu / scale
        self.low, self.high = end, t
        y = torch.stack([z, lam / scale])
        return (self._adaptive if self.plan.solver.adaptive else self._fixed)(y, t, end)[1] * scale

    def _fixed(self, y: Tensor, t: float, end: float) -> Tensor:
        grid = self.plan.solver.grid(torch.tensor([t, end], dtype=torch.float64)).tolist()
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            self.steps.start(b - a)
            for i, c in enumerate(self.table.c.tolist()):
                self.steps.note(i, self.rate(a + c * (b - a), self.steps.stage(i, y) if i else y, self.mu))
            y = self.steps.end(y)
            self._accept(b - a, 0)
        return y

    def _adaptive(self, y: Tensor, t: float, end: float) -> Tensor:
        steps, table, solver = self.steps, self.table, self.plan.solver
        sign = 1.0 if end > t else -1.0
        steps.note(0, self.rate(t, y, self.mu))
        if self.size is None:
            self.size = self._first_step(y, t, sign, end)
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
                del self.stages[1:]
                continue
            self._accept(dt, 1)
            y, t = at, e
            steps.carry()
        self.stages = []  # the next interval begins with another lambda
        return y

    def _first_step(self, y: Tensor, t: float, sign: float, end: float) -> float:
        f0 = sign * self.steps.k[0].reshape(y.shape)
        noted = len(self.stages)
        size = self.control.first(
            lambda s, y: sign * self.rate(sign * min(sign * (t + sign * s), sign * end), y, self.mu), y, f0,
            lambda x: self._norm(x.square().mean(-1)).sqrt(),
        )  # fmt: skip
        del self.stages[noted:]
        return size

    def _norm(self, squares: Tensor) -> Tensor:
        """The larger of the norms of z and lambda, from mean squares ``[2, K, n]``."""
        if self.plan.solver.norm == "sample":
            return squares.amax()
        shares = self.plan.shares
        return (squares.mean((1, 2)) if shares is None else (squares * shares).sum((1, 2))).amax()

    def _accept(self, dt: float, keep: int) -> None:
        """Enters an accepted step; its last ``keep`` stages begin the next one."""
        for stage, b in zip(self.stages, self.table.b.tolist(), strict=True):
            if b:
                weight = -dt * b * self.scale
                self.accepted.append(_Stage(stage.t, stage.residuals, stage.lam * weight, stage.mu * weight))
        self.stages = self.stages[-1:] if keep else []
        if len(self.accepted) >= _STAGES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Adds the accepted stages' share to the gradients of all parameters."""
        if not self.accepted:
            return
        stages, self.accepted = self.accepted, []
        pullback, more, _, own = self._pullback(stages, parameters=True)
        self.other_bars.add(more)
        self.own.add(own)
        pullback.pull(slice(None), torch.stack([stage.lam for stage in stages], 1))
        self.own.add(pullback.gradients())
