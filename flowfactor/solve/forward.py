"""The forward pass of a solve in closed form: torchdiffeq's steps without autograd, keeping the residuals of every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowfactor.networks.stage_adjoint import Residuals, TimeTerms
from flowfactor.solve.dynamics import CHECK_EVERY
from flowfactor.solve.problem import Plan
from flowfactor.solve.reads import Readings, Reads
from flowfactor.solve.runge_kutta import StepControl, Steps


class GaveUpError(Exception):
    """The solve met something that the general solver explains better."""


@dataclass
class Step:
    """One accepted step: its size, the stages it used, and the outputs that lie in it.

    Outputs are of all samples at once, or ``reads`` of each at times of its own.
    """

    dt: float
    stages: list[int]
    outputs: list[tuple[int, np.ndarray]]
    reads: Reads | None = None


@dataclass
class Block:
    """Some accepted steps one after the other; their stages are numbered from the block's start.

    Attributes:
        z: State at its start, ``[K, n, D]``; None where it has to be found by going on from an earlier block.
        t: Time of its start.
        reached: The number of outputs reached at its end.
        end: The time of its end.
    """

    z: Tensor | None
    t: float
    steps: list[Step] = field(default_factory=list)
    stage_times: list[float] = field(default_factory=list)
    reached: int = 1
    end: float = 0.0

    def weights(self, plan: Plan, like: Tensor) -> tuple[str, Tensor]:
        """Weights by which the rates of the stages add to the integrals at the outputs: ``ts``, or ``tskn`` of each sample.

        Returns:
            The names of the dimensions, and the weights, of the kind of ``like``.
        """
        if plan.readings is not None:
            return "tskn", self._weights_of_each(plan, plan.readings, like)
        b = plan.table.b
        result, sofar = np.zeros((len(plan.times), len(self.stage_times))), np.zeros(len(self.stage_times))
        for step in self.steps:
            for out, inside in step.outputs:
                result[out] = sofar
                np.add.at(result[out], step.stages, step.dt * inside)
            np.add.at(sofar, step.stages, step.dt * b)
        result[self.reached :] = sofar
        return "ts", torch.tensor(result, dtype=like.dtype, device=like.device)

    def _weights_of_each(self, plan: Plan, readings: Readings, like: Tensor) -> Tensor:
        at, b = readings.at, like.new_tensor(plan.table.b)
        result, sofar = (
            like.new_zeros(len(at), len(self.stage_times), *at.shape[1:]),
            like.new_zeros(len(self.stage_times)),
        )
        for step in self.steps:
            if step.reads is not None:
                reads = step.reads
                more = torch.where(reads.inside.unsqueeze(1), sofar.view(-1, 1, 1), 0)
                more[:, step.stages] += reads.weights(plan.table, step.dt)
                result[reads.outputs] += more
            sofar[step.stages] += step.dt * b
        later = readings.later(self.end).unsqueeze(1)
        return torch.where(later, sofar.view(-1, 1, 1), result)


class Forward:
    """The forward pass.

    Args:
        plan: What is solved.
        z0: State at the start, ``[K, n, D]``.
        limit: Steps of a block; None for one block whatever its length.
        done: Called with every complete block and the residuals of its stages, which are dropped then; None where nobody
            needs residuals.
    """

    def __init__(
        self, plan: Plan, z0: Tensor, limit: int | None = None,
        done: Callable[[Block, list[Residuals]], None] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.adjoint, self.solver = plan, plan.adjoint, plan.solver
        self.limit, self.done = limit, done
        self.residuals: list[Residuals] = []  # of the accepted stages of the block under way
        self.steered = plan.steered
        self.steps = Steps(plan.table, z0, self.steered, plan.solver)
        self.blocks: list[Block] = []
        self.block = Block(z0, plan.times[0])
        self.reached = 1  # outputs reached
        self.kept = 1  # outputs reached when a state was kept last
        self.ys = z0.new_empty(len(plan.times), *z0.shape)
        self.ys[: 1 if plan.readings is None else None] = z0
        self.log_det = z0.new_zeros(len(plan.times), *z0.shape[:-1]) if self.steered else None

    def evaluate(self, i: int, z: Tensor, terms: TimeTerms) -> Residuals:
        """Evaluates the velocity at stage ``i`` of a step."""
        _, residuals = self.adjoint.velocity(z, terms, self.steps.each[i])
        self.plan.stats.nfe += 1
        return residuals

    def _accept(self, ts: Sequence[float], residuals: Sequence[Residuals]) -> None:
        """Enters accepted stages at the times ``ts``."""
        self.block.stage_times += ts
        if self.done is not None:
            self.residuals += residuals

    def run(self, z: Tensor) -> None:
        """Takes all steps from ``z``."""
        (self._adaptive if self.solver.adaptive else self._fixed)(z)
        if self.block.steps:
            self._close(carries=False)

    def _close(self, carries: bool) -> None:
        last, residuals = self.residuals[-1:], self.residuals
        self.residuals = last if carries else []  # the last stage of a step is the first of the next
        if self.done is not None:
            self.done(self.block, residuals)
        self.blocks.append(self.block)

    def _end_step(self, step: Step, z: Tensor, t: float, reached: int) -> None:
        """Enters an accepted step that led to ``z`` at ``t``; begins a new block after the last step of one."""
        block = self.block
        block.steps.append(step)
        block.reached, block.end = reached, t
        self.plan.stats.accepted += 1
        if self.limit is None or len(block.steps) < self.limit or reached == len(self.plan.times):
            return
        carries = self.solver.adaptive and not (self.plan.jumps and step.outputs)
        self._close(carries)
        # One state an output is kept: with many steps between two outputs the others are recomputed.
        self.block = Block(z if reached > self.kept else None, t, reached=reached)
        self.kept = reached
        if carries:
            self.block.stage_times.append(t)

    def _fixed(self, z: Tensor) -> None:
        """Steps on the solver's grid."""
        times = torch.tensor(self.plan.times, dtype=torch.float64)
        grid, table = self.solver.grid(times).tolist(), self.plan.table
        pairs = zip(grid[:-1], grid[1:], strict=True)
        asked = [self.plan.before(e, t) if c == 1 else t + c * (e - t) for t, e in pairs for c in table.c.tolist()]
        terms, moments = iter(self.adjoint.time_terms(asked)), iter(asked)
        out = 1
        for t, e in zip(grid[:-1], grid[1:], strict=True):
            dt = e - t
            self.steps.start(dt)
            begun = len(self.block.stage_times)
            for i in range(table.size):
                residuals = self.evaluate(i, self.steps.stage(i, z) if i else z, next(terms))
                self._accept([next(moments)], [residuals])
            z = self.steps.end(z)
            landed = e == self.plan.times[out]
            step = Step(dt, list(range(begun, begun + table.size)), [(out, table.b)] if landed else [])
            if landed:
                self.ys[out] = z
                out += 1
            self._end_step(step, z, e, out)
        if self.ys.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(self.ys)).tolist())):
            raise GaveUpError  # of a number that is none, the least and the largest are none

    def _adaptive(self, z: Tensor) -> None:
        """Steps of sizes chosen by the error."""
        plan, steps, table, times = self.plan, self.steps, self.plan.table, self.plan.times
        t, end = times[0], times[-1]
        sign = 1.0 if end > t else -1.0
        control = StepControl(self.solver, table.order)
        ell = plan.start[..., 0] if self.steered else None
        self._begin(z, t)
        memory = plan.memory
        landings = times[1:] if plan.jumps or not table.dense else [end]
        planned = memory.planned(t, end) if memory is not None and len(landings) == 1 else []
        size = planned.pop(0) if planned else (memory and memory.recall(sign)) or self._first_step(control, z, t, sign)
        taken: list[tuple[float, float]] = []
        attempts = plan.attempted
        while t != end:
            landing = next(x for x in landings if (x - t) * sign > 0)
            cut = (t + sign * size - landing) * sign > 0
            dt = landing - t if cut else sign * size
            e = landing if cut else t + dt
            attempts = self._limit(attempts, t, dt, end)
            begun = len(self.block.stage_times)
            steps.start(dt)
            at, residuals = z, []
            moments = [plan.before(e, t) if c == 1 else t + c * dt for c in table.c[1:].tolist()]
            for i, terms in enumerate(self.adjoint.time_terms(moments), 1):
                at = steps.stage(i, z)
                residuals.append(self.evaluate(i, at, terms))
            if self.steered:  # nothing depends on it before the step is judged
                steps.note_rates(1, self.adjoint.divergence(residuals))
            ratio = self._ratio(z, at, ell)
            size = control.next(abs(dt), ratio)
            if ratio > 1:
                plan.stats.rejected += 1
                planned = []
                continue
            if memory is not None and t == times[0]:
                memory.note(sign, size)
            taken.append((dt, ratio))
            size = planned.pop(0) if planned else size
            self._accept(moments, residuals)
            step = Step(dt, list(range(begun - 1, begun + table.size - 1)), [])
            ell = self._read(step, z, at, t, e, ell)
            z, t = at, e
            steps.carry()
            self._end_step(step, z, t, self.reached)
            if plan.jumps and step.outputs and t != end:
                self._begin(z, t)
        if memory is not None:
            memory.note_steps(times[0], taken, table.order)

    def _read(self, step: Step, z: Tensor, at: Tensor, t: float, e: float, ell: Tensor | None) -> Tensor | None:
        """Enters the outputs of an accepted step from ``z`` at ``t`` to ``at`` at ``e``; returns the integral at its end."""
        plan, steps, times = self.plan, self.steps, self.plan.times
        if plan.readings is not None:
            return self._read_each(plan.readings, step, z, at, t, e, ell)
        while self.reached < len(times) and (e - times[self.reached]) * step.dt >= 0:
            x = (times[self.reached] - t) / step.dt if times[self.reached] != e else 1.0
            step.outputs.append((self.reached, plan.table.inside(x)))
            self.reached += 1
        if not (step.outputs or self.steered):
            return ell
        rows = steps.weights([*(weights for _, weights in step.outputs), plan.table.b], step.dt)
        for (out, _), row in zip(step.outputs, rows, strict=False):
            self.ys[out] = at if times[out] == e else steps.at(z, row)
        if self.log_det is None or ell is None:
            return ell
        *inside, over = steps.totals(rows)
        for (out, _), total in zip(step.outputs, inside, strict=True):
            torch.add(ell - plan.start[..., 0], total, out=self.log_det[out])
        return ell + over

    def _read_each(
        self, readings: Readings, step: Step, z: Tensor, at: Tensor, t: float, e: float, ell: Tensor | None
    ) -> Tensor | None:
        """The same where each sample is read at times of its own."""
        plan, steps = self.plan, self.steps
        step.reads, self.reached = readings.of_step(t, e), readings.reached(e)
        if step.reads is not None:
            inside, here = step.reads.inside, step.reads.outputs
            states, ys = step.reads.states(plan.table, step.dt, z, steps.k), self.ys[here]
            if e == plan.times[-1]:
                states = torch.where((step.reads.x == 1).unsqueeze(-1), at, states)
            torch.where(inside.unsqueeze(-1), states, ys, out=ys)
            if self.log_det is not None and ell is not None:
                sums = ell - plan.start[..., 0] + steps.totals_each(step.reads.weights(plan.table, step.dt))
                self.log_det[here] = torch.where(inside, sums, self.log_det[here])
        if ell is None:
            return None
        return ell + steps.totals(steps.weights([plan.table.b], step.dt))[0]

    def _begin(self, z: Tensor, t: float) -> None:
        """Evaluates the stage with which adaptive steps begin; every later step begins with the last stage before it."""
        first = self.evaluate(0, z, self.adjoint.time_terms([t])[0])
        self._accept([t], [first])
        if self.steered:
            self.steps.note_rates(0, self.adjoint.divergence([first]))

    def _first_step(self, control: StepControl, z: Tensor, t: float, sign: float) -> float:
        def pack(velocity: Tensor, rate: Tensor | None) -> Tensor:
            return velocity if rate is None else torch.cat([velocity, rate.unsqueeze(-1)], -1)

        def func(s: float, y: Tensor) -> Tensor:
            at = y[..., : z.shape[-1]].contiguous()
            trial = sign * min(sign * (t + sign * s), sign * self.plan.times[-1])  # never beyond the end
            velocity, residuals = self.adjoint.velocity(at, self.adjoint.time_terms([trial])[0])
            self.plan.stats.nfe += 1
            return sign * pack(velocity, self.adjoint.divergence([residuals])[0] if self.steered else None)

        rate = self.steps.rates[0].reshape(z.shape[:-1]) if self.steps.rates is not None else None
        f0 = sign * pack(self.steps.k[0].reshape(z.shape), rate)
        y0 = pack(z, None if rate is None else self.plan.start[..., 0])
        return control.first(func, y0, f0, lambda y: self._mean(y.square().mean(-1)).sqrt())

    def _mean(self, squares: Tensor) -> Tensor:
        if self.solver.norm == "sample":
            return squares.amax()
        return squares.mean() if self.plan.shares is None else (squares * self.plan.shares).sum()

    def _ratio(self, z: Tensor, end: Tensor, ell: Tensor | None) -> float:
        """The error of a step over the tolerance."""
        if self.solver.norm == "batch" and self.plan.shares is None:
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
