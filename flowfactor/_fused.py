"""Solves of closed-form fields whose way back is a closed form too: the ``direct`` gradient without autograd's graph.

Forward, torchdiffeq's steps run without autograd and the field's tape records every accepted stage. Running costs and
log-determinants are quadratures: nothing depends on them, so they are evaluated for all stages at once. Backward, the
discrete adjoint of the very steps that were taken carries one cotangent of z from stage to stage, and the gradients of all
weights are a few large products at the end. The result is the gradient of the computed solution, as backpropagation
through the solver gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor._runge_kutta import StepControl, Steps, Tableau
from flowfactor.fields._tape import FieldTape, Found
from flowfactor.fields.base import Evaluation
from flowfactor.path import SolveStats
from flowfactor.solver import Solver

_LOOK_EVERY = 1_000


class GaveUpError(Exception):
    """The solve met something that the general solver explains better."""


@dataclass
class Taken:
    """One accepted step: its size, the stages it used, and the outputs that lie in it."""

    dt: float
    stages: list[int]
    outputs: list[tuple[int, np.ndarray]]


@dataclass
class Plan:
    """What one solve needs to know; see `solve`."""

    tape: FieldTape
    table: Tableau
    solver: Solver
    times: list[float]
    log_det: bool
    costs: Mapping[str, Callable[[Evaluation], Tensor]]
    want: frozenset[str]
    probe: Tensor | None
    real: Tensor | None  # weight of every row in a mean over the batch, where some rows repeat others
    stats: SolveStats
    differentiable: bool  # whether gradients are on: inside a Function they never are
    again: Callable[..., Sequence[Tensor]]  # the same solve by autograd, for gradients of gradients

    @property
    def quadratures(self) -> int:
        """Number of integrals along the path."""
        return self.log_det + len(self.costs)


def solve(plan: Plan, z0: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Solves from ``z0 [K, n, D]``.

    Args:
        plan: The solve.
        z0: States.
        others: Tensors beside the field's that the costs depend on.

    Returns:
        States ``[T, K, n, D]`` and integrals ``[Q, T, K, n]``, the log-determinant first.

    Raises:
        GaveUpError: If the solve fails.
    """
    return _Solve.apply(plan, len(others), z0, *others, *plan.tape.inputs)


class _March:
    """The way forward."""

    def __init__(self, plan: Plan, z0: Tensor, record: bool) -> None:
        self.plan, self.tape, self.solver = plan, plan.tape, plan.solver
        self.record = record
        self.steered = plan.log_det and self.solver.adaptive
        self.steps = Steps(plan.table, z0, self.steered)
        self.stage_times: list[float] = []
        self.taken: list[Taken] = []
        self.ys = z0.new_empty(len(plan.times), *z0.shape)
        self.ys[0] = z0
        self.log_det = z0.new_zeros(len(plan.times), *z0.shape[:-1]) if self.steered else None

    def look(self, i: int, t: float, z: Tensor, terms: Any) -> Found:
        """Evaluates the field at a stage."""
        velocity, found = self.tape.velocity(z, terms, self.record)
        self.steps.note(i, velocity)
        self.plan.stats.nfe += 1
        self.stage_times.append(t)
        return found

    def fixed(self, z: Tensor) -> None:
        """Steps on the solver's grid."""
        times = torch.tensor(self.plan.times, dtype=torch.float64)
        grid, table = self.solver.grid(times).tolist(), self.plan.table
        asked = [t + c * (e - t) for t, e in zip(grid[:-1], grid[1:], strict=True) for c in table.c.tolist()]
        terms = iter(self.tape.terms(asked, z))
        out = 1
        for t, e in zip(grid[:-1], grid[1:], strict=True):
            dt = e - t
            self.steps.start(dt)
            begun = len(self.stage_times)
            for i, c in enumerate(table.c.tolist()):
                self.look(i, t + c * dt, self.steps.stage(i, z) if i else z, next(terms))
            z = self.steps.end(z)
            landed = e == self.plan.times[out]
            self.taken.append(Taken(dt, list(range(begun, begun + table.size)), [(out, table.b)] if landed else []))
            self.plan.stats.accepted += 1
            if landed:
                self.ys[out] = z
                out += 1
        if not bool(torch.isfinite(self.ys).all()):
            raise GaveUpError

    def adaptive(self, z: Tensor) -> None:
        """Steps of sizes chosen by the error."""
        plan, steps, table, times = self.plan, self.steps, self.plan.table, self.plan.times
        t, end = times[0], times[-1]
        sign = 1.0 if end > t else -1.0
        control = StepControl(self.solver, table.order)
        ell = z.new_zeros(z.shape[:-1]) if self.steered else None
        found = self.look(0, t, z, self.tape.terms([t], z)[0])
        if self.steered:
            steps.note_rates(0, self.tape.divergence([found]))
        size = self._first_step(control, z, t, sign)
        landings = [end] if self.solver.method == "dopri5" else times[1:]
        first, out, attempts = 0, 1, 0
        while out < len(times):
            landing = next(x for x in landings if (x - t) * sign > 0)
            cut = (t + sign * size - landing) * sign > 0
            dt = landing - t if cut else sign * size
            e = landing if cut else t + dt
            attempts = self._limit(attempts, t, dt, end)
            begun = len(self.stage_times)
            steps.start(dt)
            at, looks = z, []
            moments = [e if c == 1 else t + c * dt for c in table.c[1:].tolist()]
            for i, (moment, terms) in enumerate(zip(moments, self.tape.terms(moments, z), strict=True), 1):
                at = steps.stage(i, z)
                looks.append(self.look(i, moment, at, terms))
            if self.steered:  # nothing depends on it before the step is judged
                steps.note_rates(1, self.tape.divergence(looks))
            ratio = self._ratio(steps.error(z, at, ell, self.solver))
            size = control.next(abs(dt), ratio)
            if ratio > 1:
                plan.stats.rejected += 1
                del self.stage_times[begun:]
                if self.record:
                    self.tape.forget(begun)
                continue
            plan.stats.accepted += 1
            step = Taken(dt, [first, *range(begun, begun + table.size - 1)], [])
            while out < len(times) and (e - times[out]) * sign >= 0:
                weights = table.inside((times[out] - t) / dt if times[out] != e else 1.0)
                step.outputs.append((out, weights))
                self.ys[out] = steps.at(z, weights, dt)
                if self.log_det is not None and ell is not None:
                    self.log_det[out] = ell + steps.total(weights, dt)
                out += 1
            self.taken.append(step)
            if ell is not None:
                ell = ell + steps.total(table.b, dt)
            z, t, first = at, e, begun + table.size - 2
            steps.carry()

    def _first_step(self, control: StepControl, z: Tensor, t: float, sign: float) -> float:
        def pack(velocity: Tensor, rate: Tensor | None) -> Tensor:
            return velocity if rate is None else torch.cat([velocity, rate.unsqueeze(-1)], -1)

        def func(s: Tensor, y: Tensor) -> Tensor:
            at = y[..., : z.shape[-1]].contiguous()
            velocity, found = self.tape.velocity(at, self.tape.terms([t + sign * float(s)], at)[0], False)
            self.plan.stats.nfe += 1
            return sign * pack(velocity, self.tape.divergence([found])[0] if self.steered else None)

        rate = self.steps.rates[0].reshape(z.shape[:-1]) if self.steps.rates is not None else None
        f0 = sign * pack(self.steps.k[0].reshape(z.shape), rate)
        y0 = pack(z, None if rate is None else torch.zeros_like(rate))
        return control.first(func, y0, f0, lambda y: self._mean(y.square().mean(-1)).sqrt())

    def _mean(self, squares: Tensor) -> Tensor:
        if self.solver.norm == "sample":
            return squares.amax()
        return squares.mean() if self.plan.real is None else (squares * self.plan.real).sum()

    def _ratio(self, squares: Tensor) -> float:
        ratio = math.sqrt(float(self._mean(squares)))
        if not math.isfinite(ratio):
            raise GaveUpError
        return ratio

    def _limit(self, attempts: int, t: float, dt: float, end: float) -> int:
        limit = self.solver.max_steps
        hopeless = attempts % _LOOK_EVERY == _LOOK_EVERY - 1 and abs(end - t) > (limit - attempts) * abs(dt)
        if attempts >= limit or t + dt == t or hopeless:
            raise GaveUpError
        return attempts + 1


def _weights(taken: Sequence[Taken], table: Tableau, outputs: int, stages: int) -> np.ndarray:
    """Weights ``[T, S]`` by which the rates of the stages add up to the integrals at the outputs."""
    whole = np.zeros((len(taken), stages))
    result = np.zeros((outputs, stages))
    sofar = np.zeros(stages)
    for row, step in zip(whole, taken, strict=True):
        for out, inside in step.outputs:
            result[out] = sofar
            np.add.at(result[out], step.stages, step.dt * inside)
        np.add.at(row, step.stages, step.dt * table.b)
        sofar = sofar + row
    return result


class _Solve(torch.autograd.Function):
    """`solve` with its way back."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, others: int, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needed = plan.differentiable and any(ctx.needs_input_grad)
        z = z0.detach().contiguous()
        steered = plan.log_det and plan.solver.adaptive
        later = plan.quadratures - steered  # integrals that no step waits for
        march = _March(plan, z, needed or later > 0)
        (march.adaptive if plan.solver.adaptive else march.fixed)(z)
        ctx.plan, ctx.taken, ctx.rates = plan, march.taken, []
        ctx.save_for_backward(z0, *tensors)
        integrals = z.new_zeros(plan.quadratures, len(plan.times), *z.shape[:-1])
        if march.record:
            plan.tape.take(march.stage_times)
        if plan.quadratures and march.record:
            weights = _weights(march.taken, plan.table, len(plan.times), len(march.stage_times))
            ctx.weights = torch.tensor(weights, dtype=z.dtype, device=z.device)
        if later:
            ctx.leaves, rates, ctx.rates = _rates(plan, march.stage_times, needed, steered)
            for total, rate in zip(integrals[steered:], [*rates, *ctx.rates], strict=True):
                total.copy_(torch.einsum("ts,ksn->tkn", ctx.weights, rate.detach()))
        if march.log_det is not None:
            integrals[0] = march.log_det
        return march.ys, integrals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z0, *tensors = ctx.saved_tensors
        plan: Plan = ctx.plan
        if torch.is_grad_enabled():
            outputs = plan.again(z0, *tensors)
            wanted = [x for x in (z0, *tensors) if x.requires_grad]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
            return (None, None, *(next(found) if x.requires_grad else None for x in (z0, *tensors)))
        ys_bar, integrals_bar = grads
        cotangents, other_bars, z_bar = _cotangents_of_costs(ctx, integrals_bar, tensors)
        direct = plan.tape.begin(cotangents)
        injected = direct if z_bar is None else z_bar if direct is None else direct + z_bar
        start_bar, lam = _walk_back(plan, ctx.taken, ys_bar, injected)
        own = plan.tape.gradients(lam)
        return (None, None, start_bar, *other_bars, *own)


def _rates(
    plan: Plan, ts: list[float], needed: bool, steered: bool
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Rates ``[K, S, n]`` at all stages.

    Returns:
        The field's outputs, from which the graph of the costs begins; the rate of the log-determinant, where it is still
        to be found; the rates of the costs.
    """
    tape = plan.tape
    out = tape.outputs(plan.want - {"laplacian"} if steered else plan.want)
    log_det = [out["laplacian"]] if plan.log_det and not steered else []
    # Each a leaf of its own: the velocity of a gradient field is the gradient, and its cotangent must not count twice.
    leaves = {name: value.detach().requires_grad_(needed) for name, value in out.items()}
    z = tape.tapes[0].z.detach().requires_grad_(needed)
    leaves["z"] = z
    t = torch.tensor(ts, dtype=z.dtype, device=z.device).reshape(1, -1, 1).expand(z.shape[:-1])
    probe = None if plan.probe is None else plan.probe.unsqueeze(1).expand(z.shape)
    evaluation = Evaluation(
        z, t, leaves["velocity"], leaves.get("laplacian"), leaves.get("value"), leaves.get("gradient"), leaves.get("time"),
        probe,
    )  # fmt: skip
    sign = 1.0 if plan.times[-1] > plan.times[0] else -1.0
    with torch.set_grad_enabled(needed):
        return leaves, log_det, [sign * cost(evaluation) for cost in plan.costs.values()]


def _cotangents_of_costs(
    ctx: Any, bars: Tensor, tensors: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor | None]:
    """Cotangents of the field's outputs at all stages, of what else the costs depend on, and of z itself."""
    plan: Plan = ctx.plan
    others = list(tensors[: len(tensors) - len(plan.tape.inputs)])
    if not plan.quadratures:
        return {}, [None] * len(others), None
    stage_bars = torch.einsum("ts,qtkn->qksn", ctx.weights, bars)
    cotangents: dict[str, Tensor] = {}
    if plan.log_det:
        cotangents["laplacian"] = stage_bars[0]
    pairs = [(r, g) for r, g in zip(ctx.rates, stage_bars[plan.log_det :], strict=True)]
    pairs = [(r, g) for r, g in pairs if r.requires_grad]
    if not pairs:
        return cotangents, [None] * len(others), None
    names, live = list(ctx.leaves), [x for x in others if x.requires_grad]
    found = torch.autograd.grad(
        [r for r, _ in pairs],
        [*ctx.leaves.values(), *live],
        [g for _, g in pairs],
        allow_unused=True,
        retain_graph=True,
    )
    z_bar = None
    for name, value in zip(names, found, strict=False):
        if value is None:
            continue
        if name == "z":
            z_bar = value
        else:
            cotangents[name] = cotangents[name] + value if name in cotangents else value
    rest = iter(found[len(names) :])
    return cotangents, [next(rest) if x.requires_grad else None for x in others], z_bar


def _walk_back(plan: Plan, taken: Sequence[Taken], ys_bar: Tensor, injected: Tensor | None) -> tuple[Tensor, Tensor]:
    """The discrete adjoint: the cotangent of the start ``[K, n, D]``, and that of every stage's velocity."""
    tape, table = plan.tape, plan.table
    q, shape = table.size, ys_bar.shape[1:]
    first_stage = tape.tapes[0].z
    lam = torch.zeros_like(first_stage)
    shared = plan.solver.adaptive  # a step begins with the last stage of its predecessor
    end_bar, carried = torch.zeros_like(ys_bar[0]), None

    def pulled(stage: int, k_bar: Tensor) -> Tensor:
        lam[:, stage] = k_bar
        back = tape.pull((slice(None), stage), k_bar)
        return back if injected is None else back + injected[:, stage]

    for n in range(len(taken) - 1, -1, -1):
        step = taken[n]
        heads = [table.b, *(weights for _, weights in step.outputs)]
        # A row for each cotangent that reached something beyond the k: the end, the outputs, then the stages, last first.
        rows = torch.cat([end_bar.reshape(1, -1), *(ys_bar[o].reshape(1, -1) for o, _ in step.outputs)])
        rows = torch.cat([rows, rows.new_empty(q - 1, rows.shape[1])])
        weights = np.concatenate([np.stack(heads), table.a[:0:-1]]) * step.dt  # [rows, q]
        columns = torch.tensor(weights.T.copy(), dtype=rows.dtype, device=rows.device)
        filled = len(heads)
        for i in range(q - 1, -1, -1):
            k_bar = torch.mm(columns[i : i + 1, :filled], rows[:filled]).reshape(shape)
            if carried is not None and i == q - 1:
                k_bar = k_bar + carried
            if i == 0 and shared:
                carried = k_bar
                break
            back = pulled(step.stages[i], k_bar)
            if i == 0:
                rows = torch.cat([rows, back.reshape(1, -1)])
            else:
                rows[filled] = back.reshape(-1)
            filled += 1
        end_bar = rows.sum(0).reshape(shape)
    if carried is not None:
        end_bar = end_bar + pulled(0, carried)
    return end_bar + ys_bar[0], lam
