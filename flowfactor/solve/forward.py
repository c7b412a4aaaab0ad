"""The way forward of a solve by closed forms: torchdiffeq's steps without autograd, with a record of every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor.fields._sum_adjoint import FieldTape, Found
from flowfactor.fields._weighted_adjoint import WeightedTape
from flowfactor.fields.base import Evaluation
from flowfactor.path import SolveStats
from flowfactor.solve.dynamics import CHECK_EVERY
from flowfactor.solve.runge_kutta import StepControl, Steps, Tableau
from flowfactor.solver import Solver


class GaveUpError(Exception):
    """The solve met something that the general solver explains better."""


@dataclass
class Taken:
    """One accepted step: its size, the stages it used, and the outputs that lie in it."""

    dt: float
    stages: list[int]
    outputs: list[tuple[int, np.ndarray]]


@dataclass
class Block:
    """Some accepted steps one after the other; their stages are numbered from the block's start.

    Attributes:
        z: State at its start, ``[K, n, D]``; None where it has to be found by going on from an earlier block.
        t: Time of its start.
        reached: The number of outputs reached at its end.
    """

    z: Tensor | None
    t: float
    taken: list[Taken] = field(default_factory=list)
    stage_times: list[float] = field(default_factory=list)
    reached: int = 1

    def weights(self, table: Tableau, outputs: int) -> np.ndarray:
        """Weights ``[T, S]`` by which the rates of the stages add to the integrals at the outputs."""
        result, sofar = np.zeros((outputs, len(self.stage_times))), np.zeros(len(self.stage_times))
        for step in self.taken:
            for out, inside in step.outputs:
                result[out] = sofar
                np.add.at(result[out], step.stages, step.dt * inside)
            np.add.at(sofar, step.stages, step.dt * table.b)
        result[self.reached :] = sofar
        return result


@dataclass
class Plan:
    """What one solve needs to know."""

    tape: FieldTape | WeightedTape
    table: Tableau
    solver: Solver
    times: list[float]
    log_det: bool
    start: Tensor  # what the integrals hold already, [K, n, Q]: tolerances are relative to it
    costs: Mapping[str, Callable[[Evaluation], Tensor]]
    want: frozenset[str]
    probe: Tensor | None
    real: Tensor | None  # weight of every row in a mean over the batch, where some rows repeat others
    stats: SolveStats
    told: SolveStats  # what the caller sees, for evaluations on the way back
    attempted: int  # steps of the stretches before this one
    differentiable: bool  # whether gradients are on: inside a Function they never are
    again: Callable[..., Sequence[Tensor]]  # the same solve by autograd, for gradients of gradients

    @property
    def steered(self) -> bool:
        """Whether the log-determinant takes part in choosing the steps, and so is known with each of them."""
        return self.log_det and self.solver.adaptive

    @property
    def quadratures(self) -> int:
        """Number of integrals along the path."""
        return self.log_det + len(self.costs)


class March:
    """The way forward.

    Args:
        plan: What is solved.
        z0: State at the start, ``[K, n, D]``.
        record: Whether the tape keeps what every accepted stage found.
        limit: Steps of a block; None for one block whatever its length.
        done: Called with every block when it is complete and its record is still there.
    """

    def __init__(
        self, plan: Plan, z0: Tensor, record: bool, limit: int | None = None,
        done: Callable[[Block], None] = lambda block: None,
    ) -> None:  # fmt: skip
        self.plan, self.tape, self.solver = plan, plan.tape, plan.solver
        self.record, self.limit, self.done = record, limit, done
        self.steered = plan.steered
        self.steps = Steps(plan.table, z0, self.steered, plan.solver)
        self.blocks: list[Block] = []
        self.block = Block(z0, plan.times[0])
        self.kept = 1  # outputs reached when a state was kept last
        self.ys = z0.new_empty(len(plan.times), *z0.shape)
        self.ys[0] = z0
        self.log_det = z0.new_zeros(len(plan.times), *z0.shape[:-1]) if self.steered else None

    def look(self, i: int, t: float, z: Tensor, terms: Any) -> Found:
        """Evaluates the field at a stage."""
        _, found = self.tape.velocity(z, terms, self.record, self.steps.each[i])
        self.plan.stats.nfe += 1
        self.block.stage_times.append(t)
        return found

    def run(self, z: Tensor) -> None:
        """Takes all steps from ``z``."""
        (self._adaptive if self.solver.adaptive else self._fixed)(z)
        if self.block.taken:
            self._close()

    def _close(self) -> None:
        self.done(self.block)
        self.blocks.append(self.block)

    def _took(self, step: Taken, z: Tensor, t: float, reached: int) -> None:
        """Enters an accepted step that led to ``z`` at ``t``; begins a new block after the last step of one."""
        block = self.block
        block.taken.append(step)
        block.reached = reached
        self.plan.stats.accepted += 1
        if self.limit is None or len(block.taken) < self.limit or reached == len(self.plan.times):
            return
        self._close()
        # One state an output is kept: with many steps between two outputs the others are found again.
        self.block = Block(z if reached > self.kept else None, t, reached=reached)
        self.kept = reached
        if self.record:
            self.tape.begin_block(self.solver.adaptive)
        if self.solver.adaptive:  # the last stage of a step is the first of the next
            self.block.stage_times.append(t)

    def _fixed(self, z: Tensor) -> None:
        """Steps on the solver's grid."""
        times = torch.tensor(self.plan.times, dtype=torch.float64)
        grid, table = self.solver.grid(times).tolist(), self.plan.table
        asked = [t + c * (e - t) for t, e in zip(grid[:-1], grid[1:], strict=True) for c in table.c.tolist()]
        terms = iter(self.tape.terms(asked, z))
        out = 1
        for t, e in zip(grid[:-1], grid[1:], strict=True):
            dt = e - t
            self.steps.start(dt)
            begun = len(self.block.stage_times)
            for i, c in enumerate(table.c.tolist()):
                self.look(i, t + c * dt, self.steps.stage(i, z) if i else z, next(terms))
            z = self.steps.end(z)
            landed = e == self.plan.times[out]
            step = Taken(dt, list(range(begun, begun + table.size)), [(out, table.b)] if landed else [])
            if landed:
                self.ys[out] = z
                out += 1
            self._took(step, z, e, out)
        if not bool(torch.isfinite(self.ys).all()):
            raise GaveUpError

    def _adaptive(self, z: Tensor) -> None:
        """Steps of sizes chosen by the error."""
        plan, steps, table, times = self.plan, self.steps, self.plan.table, self.plan.times
        t, end = times[0], times[-1]
        sign = 1.0 if end > t else -1.0
        control = StepControl(self.solver, table.order)
        before = plan.start[..., 0] if self.steered else 0
        ell = plan.start[..., 0] if self.steered else None
        found = self.look(0, t, z, self.tape.terms([t], z)[0])
        if self.steered:
            steps.note_rates(0, self.tape.divergence([found]))
        size = self._first_step(control, z, t, sign)
        landings = [end] if self.solver.method == "dopri5" else times[1:]
        out, attempts = 1, plan.attempted
        while out < len(times):
            landing = next(x for x in landings if (x - t) * sign > 0)
            cut = (t + sign * size - landing) * sign > 0
            dt = landing - t if cut else sign * size
            e = landing if cut else t + dt
            attempts = self._limit(attempts, t, dt, end)
            begun = len(self.block.stage_times)
            steps.start(dt)
            at, looks = z, []
            moments = [e if c == 1 else t + c * dt for c in table.c[1:].tolist()]
            for i, (moment, terms) in enumerate(zip(moments, self.tape.terms(moments, z), strict=True), 1):
                at = steps.stage(i, z)
                looks.append(self.look(i, moment, at, terms))
            if self.steered:  # nothing depends on it before the step is judged
                steps.note_rates(1, self.tape.divergence(looks))
            ratio = self._ratio(z, at, ell)
            size = control.next(abs(dt), ratio)
            if ratio > 1:
                plan.stats.rejected += 1
                del self.block.stage_times[begun:]
                if self.record:
                    self.tape.forget(begun)
                continue
            step = Taken(dt, list(range(begun - 1, begun + table.size - 1)), [])
            while out < len(times) and (e - times[out]) * sign >= 0:
                step.outputs.append((out, table.inside((times[out] - t) / dt if times[out] != e else 1.0)))
                out += 1
            if step.outputs or self.steered:
                rows = steps.weights([*(weights for _, weights in step.outputs), table.b], dt)
                for (reached, _), row in zip(step.outputs, rows, strict=False):
                    self.ys[reached] = at if times[reached] == e else steps.at(z, row)
                if self.log_det is not None and ell is not None:
                    *inside, over = steps.totals(rows)
                    for (reached, _), total in zip(step.outputs, inside, strict=True):
                        torch.add(ell - before, total, out=self.log_det[reached])
                    ell = ell + over
            z, t = at, e
            steps.carry()
            self._took(step, z, t, out)

    def _first_step(self, control: StepControl, z: Tensor, t: float, sign: float) -> float:
        def pack(velocity: Tensor, rate: Tensor | None) -> Tensor:
            return velocity if rate is None else torch.cat([velocity, rate.unsqueeze(-1)], -1)

        def func(s: float, y: Tensor) -> Tensor:
            at = y[..., : z.shape[-1]].contiguous()
            velocity, found = self.tape.velocity(at, self.tape.terms([t + sign * s], at)[0], False)
            self.plan.stats.nfe += 1
            return sign * pack(velocity, self.tape.divergence([found])[0] if self.steered else None)

        rate = self.steps.rates[0].reshape(z.shape[:-1]) if self.steps.rates is not None else None
        f0 = sign * pack(self.steps.k[0].reshape(z.shape), rate)
        y0 = pack(z, None if rate is None else self.plan.start[..., 0])
        return control.first(func, y0, f0, lambda y: self._mean(y.square().mean(-1)).sqrt())

    def _mean(self, squares: Tensor) -> Tensor:
        if self.solver.norm == "sample":
            return squares.amax()
        return squares.mean() if self.plan.real is None else (squares * self.plan.real).sum()

    def _ratio(self, z: Tensor, end: Tensor, ell: Tensor | None) -> float:
        """The error of a step over the tolerance."""
        if self.solver.norm == "batch" and self.plan.real is None:
            square = self.steps.mean_error(z, end, ell)
        else:
            square = float(self._mean(self.steps.error(z, end, ell)))
        if not math.isfinite(square):
            raise GaveUpError
        return math.sqrt(square)

    def _limit(self, attempts: int, t: float, dt: float, end: float) -> int:
        limit = self.solver.max_steps
        hopeless = attempts % CHECK_EVERY == CHECK_EVERY - 1 and abs(end - t) > (limit - attempts) * abs(dt)
        if attempts >= limit or t + dt == t or hopeless:
            raise GaveUpError
        return attempts + 1
