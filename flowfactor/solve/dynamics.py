"""The right-hand side of a solve as torchdiffeq calls it, with what is counted and limited during the solve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.errors import FlowSolveError, Reason
from flowfactor.path import SolveStats
from flowfactor.solve.compiled import RHS, Program
from flowfactor.solve.diagnosis import stiffness
from flowfactor.solve.runge_kutta import tableau
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solver import SCIPY_METHOD, Solver

CHECK_EVERY = 1_000  # attempted steps between two checks that a solve can still end within its limit


class StepLimitError(Exception):
    """Raised inside a solve when it attempts more steps than it may."""


class NotFiniteError(Exception):
    """Raised inside a SciPy solve at the first bad evaluation, from which SciPy would go on shrinking its steps."""


class Dynamics:
    """The right-hand side as torchdiffeq calls it: counts evaluations and notes steps."""

    def __init__(self, rhs: RHS, solver: Solver, stats: SolveStats, t: Tensor, program: Program | None) -> None:
        self.rhs = rhs
        self.program = program
        self.solver = solver
        self.stats = stats
        t = t.detach()
        self.end = float(t[-1])
        self.span = min(float(t[0]), self.end), max(float(t[0]), self.end)
        self.sign = 1.0 if self.end > float(t[0]) else -1.0
        self.forward_done = False
        self.inside = False
        self.last: tuple[Tensor, Tensor, float] | None = None
        self.ends: list[float] = []
        self.asked = 0
        self.first_step: float | None = None  # the one to begin with, where it is known
        self.taken: float | None = None  # the first one accepted
        self.then: float | None = None  # what it found best
        if solver.method != SCIPY_METHOD:
            self.callback_step = self._on_step
        if solver.adaptive and solver.method != SCIPY_METHOD:
            self.callback_accept_step = self._on_accept
            self.callback_reject_step = self._on_reject
            self.callback_step_adjoint = self._on_adjoint_step

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self.forward_done:
            self.stats.nfe_backward += 1
        else:
            self.stats.nfe += 1
        if self.solver.adaptive:  # the trial by which a first step is chosen may lie beyond the end
            t = t.clamp(*self.span)
        self.inside = True
        out = self.rhs(t, y) if self.program is None else self.program.evaluate(self.rhs, t, y)
        self.inside = False
        if self.solver.method == SCIPY_METHOD:
            self._watch_scipy(t, y, out)
        return out

    def remember(self, memory: StepMemory) -> None:
        """Notes what the first step found best; if it was the only one, that it could be taken."""
        best = self.then or self.taken
        if best is not None and (self.then or best > (self.first_step or 0)):
            memory.note(self.sign, best)

    def roll(self, program: Program, y: Tensor, t: Tensor) -> Tensor:
        """Takes the solver's fixed steps by a compiled program."""
        grid, table = self.solver.grid(t), tableau(self.solver.method)
        assert table is not None
        self.stats.nfe += (len(grid) - 1) * table.size
        self.stats.accepted += len(grid) - 1
        self.inside = True  # whatever is raised in there, the field has raised
        return program.roll(self.solver.method, self.rhs, y, grid, t)

    def _watch_scipy(self, t: Tensor, y: Tensor, out: Tensor) -> None:
        """SciPy calls back at evaluations only, so they are what the limit counts."""
        self.last = (t.detach(), y.detach(), 0.0)
        self.asked += 1
        finite = bool(torch.isfinite(out.detach()).all())
        if finite and self.asked <= self.solver.max_steps:
            return
        if self.forward_done:
            raise self._backward_failure(float(t), "nan" if not finite else "steps")
        raise StepLimitError if finite else NotFiniteError

    def _on_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        if self.forward_done:
            return
        self.last = (t.detach(), y, self.sign * abs(float(dt.detach())))
        if not self.solver.adaptive:
            self.stats.accepted += 1
            return
        if self.taken is not None and self.then is None:
            self.then = abs(self.last[2])
        attempts, limit = self.stats.accepted + self.stats.rejected, self.solver.max_steps
        if attempts >= limit:
            raise StepLimitError
        if attempts % CHECK_EVERY == CHECK_EVERY - 1:
            hopeless = abs(self.end - float(t.detach())) > (limit - attempts) * abs(self.last[2])
            if hopeless and stiffness(self.rhs, t, y)[0] * abs(self.last[2]) > 1:
                raise StepLimitError

    def _on_accept(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.ends.append(float(t.detach()) + self.sign * abs(float(dt.detach())))
        if not self.forward_done:
            self.stats.accepted += 1
            if self.taken is None:
                self.taken = abs(float(dt.detach()))

    def _on_reject(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        if not self.forward_done:
            self.stats.rejected += 1

    def _on_adjoint_step(self, t: Tensor, y: Sequence[Tensor], dt: Tensor) -> None:
        now = float(t)
        self.asked = 1 if now == self.end else self.asked + 1
        if not math.isfinite(float(dt)) or now + float(dt) == now:
            raise self._backward_failure(now, "underflow")
        if self.asked > self.solver.max_steps:
            raise self._backward_failure(now, "steps")

    def _backward_failure(self, now: float, reason: Reason) -> FlowSolveError:
        within = f" within max_steps={self.solver.max_steps}" if reason == "steps" else ""
        return FlowSolveError(
            f"the adjoint equation could not be solved backwards in time beyond t={now:.6g}{within}. Backpropagate with "
            'gradient="checkpoint" (its memory is small too), or use looser tolerances',
            reason=reason, time=now, step=self.stats.accepted,
        )  # fmt: skip
