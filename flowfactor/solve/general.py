"""The general engine: torchdiffeq, in any of the three gradient modes, for fields of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowfactor._functorch import is_transforming
from flowfactor.errors import FlowSolveError
from flowfactor.path import SolveStats
from flowfactor.solve.captured import Watch, captured_tensors
from flowfactor.solve.checkpoint import Checkpoint
from flowfactor.solve.clock import Clock
from flowfactor.solve.compiled import RHS, Program
from flowfactor.solve.dynamics import Dynamics
from flowfactor.solve.interpolating import DENSE
from flowfactor.solve.odeint import call_torchdiffeq, check_fixed_steps
from flowfactor.solve.problem import Segment
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solver import SCIPY_METHOD, Solver


def integrate(
    solver: Solver, rhs: RHS, y0: Tensor, t: Tensor, *, steered: int, stats: SolveStats, program: Program | None = None,
    parts: Iterable[Any] = (), reads: Tensor | None = None, memory: StepMemory | None = None,
) -> Tensor:  # fmt: skip
    """Solves dy/dt = rhs(t, y) from ``y0`` over the times ``t``.

    Args:
        solver: The settings.
        rhs: The right-hand side.
        y0: State ``[*batch, S]``.
        t: Strictly monotone times ``[T]``, T at least 2.
        steered: Number of leading columns of the state that steer the step size.
        stats: Counted into.
        program: What compiles the right-hand side; None where it runs as written.
        parts: What the right-hand side is made of, for the modes that evaluate it again: the field, and costs.
        reads: When to read each sample between ``t[0]`` and ``t[-1]``, ``[R, *batch]``; without gradients, or direct ones.
        memory: What the solve before found of first steps.

    Returns:
        States ``[T, *batch, S]``, or ``[R, *batch, S]``.

    Raises:
        FlowSolveError: If the solve fails.
        ValueError: If a gradient is asked for that the method cannot give, or a transform of torch.func cannot follow.
    """
    _check_transforms(solver)
    stats.method = solver.method
    check_fixed_steps(solver, t)
    dynamics = Dynamics(rhs, solver, stats, t, program)
    if memory is not None:
        dynamics.first_step = memory.recall(dynamics.sign)
    try:
        ys = _solved(dynamics, rhs, y0, t, steered, parts, reads)
    except FlowSolveError:
        if memory is None or not memory.misled([float(t[0]), float(t[-1])]):
            raise
        how: dict[str, Any] = {"steered": steered, "stats": stats, "program": program, "parts": parts, "reads": reads}
        return integrate(solver, rhs, y0, t, **how, memory=memory)
    if memory is not None:
        dynamics.remember(memory)
    dynamics.forward_done, dynamics.asked = True, 0
    dynamics.last = None  # holds a part of the graph
    return ys


def _solved(
    dynamics: Dynamics, rhs: RHS, y0: Tensor, t: Tensor, steered: int, parts: Iterable[Any], reads: Tensor | None
) -> Tensor:
    """The solve in the solver's gradient mode."""
    solver = dynamics.solver
    if not torch.is_grad_enabled():
        return call_torchdiffeq(dynamics, y0, t, steered, reads=reads)
    if solver.gradient == "direct":
        if solver.method == SCIPY_METHOD and (y0.requires_grad or captured_tensors(rhs, t[0], y0)):
            raise ValueError(
                'scipy_solver gives no gradients by itself: use Solver("scipy_solver", gradient="adjoint"), '
                "or solve under torch.no_grad()"
            )
        return call_torchdiffeq(dynamics, y0, t, steered, reads=reads)
    if solver.gradient == "adjoint":
        watch = Watch(rhs, t[0], y0, parts, solver.gradient)
        return watch.guard(call_torchdiffeq(dynamics, y0, t, steered, captured=watch.captured))
    if solver.method == SCIPY_METHOD:
        raise ValueError('scipy_solver cannot be replayed by gradient="checkpoint"; use gradient="adjoint"')
    if t.requires_grad:
        raise ValueError('gradient="checkpoint" gives times no gradient; use gradient="direct" or "adjoint"')
    watch = Watch(rhs, t[0], y0, parts, solver.gradient)
    return watch.guard(Checkpoint.apply(dynamics, steered, t.detach(), y0, *watch.captured))


def follow(
    solver: Solver, rhs_of: Callable[[Clock | None], RHS], y: Tensor, segment: Segment, steered: int, stats: SolveStats,
    program: Program | None = None, parts: Iterable[Any] = (), memory: StepMemory | None = None,
) -> Tensor:  # fmt: skip
    """Solves a stretch from ``y`` on, `integrate` by `integrate` where the rates of samples jump and outputs cannot be read.

    Args:
        solver: How to solve.
        rhs_of: Gives the right-hand side by a clock of one piece; by None where all samples are at the same time.
        y: The packed state at its start.
        segment: The stretch.
        steered: As for `integrate`, as what follows.
        stats: Counted into.
        program: What is compiled.
        parts: The modules in the right-hand side.
        memory: What the solve before found of first steps.

    Returns:
        The packed states at its times, ``[T, *batch, S]``.
    """
    clock, how = (
        segment.clock,
        {"steered": steered, "stats": stats, "program": program, "parts": parts, "memory": memory},
    )
    if clock is not None and clock.asks_gradient:
        # The continuous adjoint packs the gradients of states and clock in one tensor, of one precision.
        clock = replace(clock, starts=clock.starts.to(y.dtype), rates=clock.rates.to(y.dtype))
    if clock is None or len(clock.knots) == 1:
        return integrate(solver, rhs_of(clock), y, segment.times, **how)
    if segment.straight is not None and solver.method in DENSE and _once(solver):
        straight, reads = segment.straight
        return integrate(solver, rhs_of(straight), y, segment.times[[0, -1]], **how, reads=reads)
    path = [y]
    for piece in range(len(clock.knots)):
        one = clock.one(piece)
        path.append(integrate(solver, rhs_of(one), path[-1], segment.times[piece : piece + 2], **how)[-1])
    return torch.stack(path)


def _once(solver: Solver) -> bool:
    """Whether no gradient evaluates the solve again, from output to output."""
    return solver.gradient == "direct" or not torch.is_grad_enabled()


def _check_transforms(solver: Solver) -> None:
    if solver.gradient != "direct" and torch.is_grad_enabled() and is_transforming():
        raise ValueError(
            f'gradient="{solver.gradient}" evaluates a solve again, which transforms of torch.func cannot follow: take '
            'gradient="direct"'
        )
    if solver.adaptive and is_transforming():
        raise ValueError(
            f"transforms of torch.func cannot follow the adaptive steps of {solver.method}: take fixed ones, "
            'for example Solver("rk4", step_size=0.1), or torch.autograd'
        )
