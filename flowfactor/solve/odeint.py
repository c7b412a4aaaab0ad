"""One solve by torchdiffeq in any of the three gradient modes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from flowfactor._functorch import is_transforming
from flowfactor.errors import FlowSolveError
from flowfactor.path import SolveStats
from flowfactor.solve.captured import captured_tensors
from flowfactor.solve.compiled import RHS, Program
from flowfactor.solve.diagnosis import failure, first_bad
from flowfactor.solve.dynamics import Dynamics, NotFiniteError, StepLimitError
from flowfactor.solver import MULTISTEP_METHODS, SCIPY_METHOD, Solver

_odeint: Any = torchdiffeq.odeint  # its annotations do not say that tensors come back as tensors
_STEPS_AT_ONCE = 8  # steps whose graph the checkpoint mode holds at a time


def integrate(
    solver: Solver, rhs: RHS, y0: Tensor, t: Tensor, *, steered: int, stats: SolveStats, program: Program | None = None
) -> Tensor:
    """Solves dy/dt = rhs(t, y) from ``y0`` over the times ``t``.

    Args:
        solver: The settings.
        rhs: The right-hand side.
        y0: State ``[*batch, S]``.
        t: Strictly monotone times ``[T]``, T at least 2.
        steered: Number of leading columns of the state that steer the step size.
        stats: Counted into.
        program: What compiles the right-hand side; None where it runs as written.

    Returns:
        States ``[T, *batch, S]``.

    Raises:
        FlowSolveError: If the solve fails.
        ValueError: If a gradient is asked for that the method cannot give, or a transform of torch.func cannot follow.
    """
    _check_transforms(solver)
    stats.method = solver.method
    check_fixed_steps(solver, t)
    dynamics = Dynamics(rhs, solver, stats, t, program)
    if not torch.is_grad_enabled():
        ys = _solve(dynamics, y0, t, steered)
    elif solver.gradient == "direct":
        if solver.method == SCIPY_METHOD and (y0.requires_grad or captured_tensors(rhs, t[0], y0)):
            raise ValueError(
                'scipy_solver gives no gradients by itself: use Solver("scipy_solver", gradient="adjoint"), '
                "or solve under torch.no_grad()"
            )
        ys = _solve(dynamics, y0, t, steered)
    elif solver.gradient == "adjoint":
        ys = _solve(dynamics, y0, t, steered, captured=captured_tensors(rhs, t[0], y0))
    else:
        if solver.method == SCIPY_METHOD:
            raise ValueError('scipy_solver cannot be replayed by gradient="checkpoint"; use gradient="adjoint"')
        if t.requires_grad:
            raise ValueError('gradient="checkpoint" gives times no gradient; use gradient="direct" or "adjoint"')
        captured = captured_tensors(rhs, t[0], y0)
        ys = _Checkpoint.apply(dynamics, steered, t.detach(), y0, *captured)
    dynamics.forward_done, dynamics.asked = True, 0
    dynamics.last = None  # holds a part of the graph
    return ys


def _check_transforms(solver: Solver) -> None:
    if solver.adaptive and is_transforming():
        raise ValueError(
            f"transforms of torch.func cannot follow the adaptive steps of {solver.method}: take fixed ones, "
            'for example Solver("rk4", step_size=0.1), or torch.autograd'
        )


def _solve(
    dynamics: Dynamics,
    y0: Tensor,
    t: Tensor,
    steered: int,
    *,
    captured: tuple[Tensor, ...] | None = None,
    first_step: float | None = None,
) -> Tensor:
    """Calls torchdiffeq once and turns its failures into FlowSolveError."""
    solver = dynamics.solver
    options = _options(solver, t, steered, first_step)
    arguments: dict[str, Any] = {
        "rtol": solver.rtol,
        "atol": solver.atol,
        "method": solver.method,
        "options": options,
    }
    solve: Any = torchdiffeq.odeint
    if captured is not None:
        solve = torchdiffeq.odeint_adjoint
        arguments |= {"adjoint_params": captured, "adjoint_options": _adjoint_options(solver, t, steered)}
    dynamics.inside, dynamics.asked = False, 0
    begun = dynamics.stats.accepted
    try:
        with warnings.catch_warnings():
            if solver.method == SCIPY_METHOD:
                # torchdiffeq hands every SciPy method LSODA's min_step, about which the others warn.
                warnings.filterwarnings("ignore", message=".*min_step.*")
            if dynamics.program is not None and dynamics.program.rolls(solver):
                ys = dynamics.roll(dynamics.program, y0, t)
            else:
                ys = solve(dynamics, y0, t, **arguments)
    except StepLimitError:
        raise _failure(dynamics, y0, t, begun, limit=solver.max_steps) from None
    except NotFiniteError:
        raise _failure(dynamics, y0, t, begun, limit=None) from None
    except AssertionError:
        if dynamics.inside:
            raise  # the user's field said so, not the solver
        raise _failure(dynamics, y0, t, begun, limit=None) from None
    if len(ys) != len(t) or not bool(torch.isfinite(ys.detach()).all()):
        raise _late_failure(dynamics, y0, t)
    return ys


def _options(solver: Solver, t: Tensor, steered: int, first_step: float | None = None) -> dict[str, Any]:
    options: dict[str, Any] = dict(solver.options)
    if solver.method == SCIPY_METHOD:
        return options
    if not solver.adaptive:
        return {"grid_constructor": lambda func, y0, t: solver.grid(t)} | options
    # Land on the end, so that the field is not asked beyond it, and on every output. Only dopri5 reads outputs off
    # between its steps: its interpolation is as accurate as its steps, that of the other methods is not.
    landings = (t[-1:] if solver.method == "dopri5" else t[1:]).detach()
    options = {"norm": solver.error_norm(steered), "step_t": landings} | options
    if first_step is not None:
        options["first_step"] = first_step
    return options


def _adjoint_options(solver: Solver, t: Tensor, steered: int) -> dict[str, Any]:
    if not solver.adaptive:
        return {"grid_constructor": lambda func, y0, t: solver.grid(t)} | solver.options
    if solver.method == SCIPY_METHOD:
        return dict(solver.options)
    norm = solver.error_norm(steered)

    def adjoint_norm(state: tuple[Tensor, ...]) -> Tensor:
        # The seminorm of Kidger et al. (2021): gradients of parameters are integrals, which steer nothing.
        return torch.maximum(norm(state[1]), norm(state[2]))

    return dict(solver.options) | {"norm": adjoint_norm}


def check_fixed_steps(solver: Solver, t: Tensor) -> None:
    """Raises FlowSolveError where a method of fixed steps would need more of them than it may take."""
    if solver.adaptive:
        return
    t = t.detach()
    steps = len(t) - 1
    if solver.step_size is not None:
        steps = max(steps, math.ceil(abs(float(t[-1] - t[0])) / solver.step_size * (1 - 1e-6)))
    if steps > solver.max_steps:
        raise FlowSolveError(
            f"steps of {solver.step_size} frames from t={float(t[0]):g} to {float(t[-1]):g} are about {steps}, more than "
            f"max_steps={solver.max_steps}. Raise max_steps or step_size",
            reason="steps", time=float(t[0]), step=0,
        )  # fmt: skip


def _failure(dynamics: Dynamics, y0: Tensor, t: Tensor, begun: int, *, limit: int | None) -> FlowSolveError:
    now, y, dt = dynamics.last if dynamics.last is not None else (t[0], y0, 0.0)
    t, step = t.detach(), dynamics.stats.accepted - begun
    ends = (float(t[0]), float(t[-1]))
    return failure(dynamics.rhs, now.reshape(()), y, dt, *ends, y0.detach(), step, limit=limit)


def _late_failure(dynamics: Dynamics, y0: Tensor, t: Tensor) -> FlowSolveError:
    """A fixed-step or SciPy solve says nothing when states go bad: walk it again and stop where they do."""
    solver, t = dynamics.solver, t.detach()
    if solver.method == SCIPY_METHOD:
        now, y, dt = dynamics.last or (t[0], y0, 0.0)  # SciPy gave up at its last evaluation
        return failure(dynamics.rhs, now.reshape(()), y, dt, float(t[0]), float(t[-1]), y0.detach(), 0, limit=None)
    good_t, good_y, steps = t[0], y0.detach(), 0
    grid = solver.grid(t)
    with torch.no_grad():
        for a, b in zip(grid[:-1], grid[1:], strict=True):
            once = torch.stack([a, b])
            y = _odeint(dynamics.rhs, good_y, once, method=solver.method, options=dict(solver.options))[1]
            if first_bad(y) is not None:
                break
            good_t, good_y, steps = b, y, steps + 1
    dt = float(grid[1] - grid[0])
    ends = (float(t[0]), float(t[-1]))
    return failure(dynamics.rhs, good_t, good_y, dt, *ends, y0.detach(), steps, limit=None, fixed=True)


class _Checkpoint(torch.autograd.Function):
    """Keeps one state an output time; on the way back solves each interval again, a few steps at a time."""

    @staticmethod
    def forward(ctx: Any, dynamics: Dynamics, steered: int, t: Tensor, y0: Tensor, *captured: Tensor) -> Tensor:
        ys, ends = [y0.detach()], []
        first_step = None
        for i in range(len(t) - 1):
            dynamics.ends = []
            ys.append(_solve(dynamics, ys[-1], t[i : i + 2], steered, first_step=first_step)[1])
            ends.append(_step_times(dynamics, t[i : i + 2]))
            if len(dynamics.ends) > 1:  # the last step may be cut short by landing; the one before is the natural size
                first_step = abs(ends[-1][-2] - ends[-1][-3])
            elif dynamics.ends:
                first_step = abs(ends[-1][1] - ends[-1][0])
        out = torch.stack(ys)
        ctx.save_for_backward(t, out, *captured)
        ctx.dynamics, ctx.steered, ctx.ends = dynamics, steered, ends
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        t, ys, *captured = ctx.saved_tensors
        totals: list[Tensor | None] = [None] * len(captured)
        pull = grad[-1]
        for i in range(len(t) - 2, -1, -1):
            times = torch.tensor(ctx.ends[i], dtype=torch.float64, device=t.device)
            pull = _pull_back(ctx.dynamics, ctx.steered, ys[i], times, captured, pull, totals)
            pull = pull + grad[i]
        return None, None, None, pull, *totals


def _step_times(dynamics: Dynamics, t: Tensor) -> list[float]:
    """Start and ends of the steps that an interval took, as far as they can be replayed one by one."""
    a, b = float(t[0]), float(t[1])
    if dynamics.solver.method in MULTISTEP_METHODS:
        return [a, b]
    if not dynamics.solver.adaptive:
        return dynamics.solver.grid(t).tolist()
    return [a, *dynamics.ends[:-1], b]


def _pull_back(
    dynamics: Dynamics,
    steered: int,
    y: Tensor,
    times: Tensor,
    captured: Sequence[Tensor],
    pull: Tensor,
    totals: list[Tensor | None],
) -> Tensor:
    """Pulls a gradient back over the steps that end at ``times[1:]``, holding the graph of a few steps at a time."""
    steps = len(times) - 1
    if steps > _STEPS_AT_ONCE:
        # Walk forward once keeping a fixed number of states, then go back through the pieces, last first.
        size = math.ceil(steps / _STEPS_AT_ONCE)
        cuts = [*range(0, steps, size), steps]
        states = [y]
        with torch.no_grad():
            for a, b in zip(cuts[:-2], cuts[1:-1], strict=True):
                states.append(_replay(dynamics, steered, states[-1], times[a : b + 1]))
        for a, b, state in reversed(list(zip(cuts[:-1], cuts[1:], states, strict=True))):
            pull = _pull_back(dynamics, steered, state, times[a : b + 1], captured, pull, totals)
        return pull
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        end = _replay(dynamics, steered, y, times)
        found = torch.autograd.grad(end, (y, *captured), pull, allow_unused=True, retain_graph=True)
    for i, g in enumerate(found[1:]):
        if g is not None:
            old = totals[i]
            totals[i] = g if old is None else old + g
    return found[0] if found[0] is not None else torch.zeros_like(y)


def _replay(dynamics: Dynamics, steered: int, y: Tensor, times: Tensor) -> Tensor:
    """Takes known steps once more, without searching for their sizes."""
    solver = dynamics.solver
    if solver.method in MULTISTEP_METHODS:
        return _solve(dynamics, y, times, steered)[-1]
    if not solver.adaptive:
        # Asked for the last state only: the states in between would stay alive with it.
        options = dict(solver.options) | {"grid_constructor": lambda func, y0, t: times}
        return _odeint(dynamics, y, times[[0, -1]], method=solver.method, options=options)[-1]
    step_options = dict(solver.options) | {"norm": _accept}
    for a, b in zip(times[:-1], times[1:], strict=True):
        step_options |= {"first_step": abs(float(b - a)) * 2, "step_t": b.reshape(1)}
        y = _odeint(
            dynamics,
            y,
            torch.stack([a, b]),
            rtol=solver.rtol,
            atol=solver.atol,
            method=solver.method,
            options=step_options,
        )[1]
    return y


def _accept(y: Tensor) -> Tensor:
    """An error norm of zero: accepts a step whose size is already known to be good."""
    return y.new_zeros(())
