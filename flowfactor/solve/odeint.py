"""One call of torchdiffeq: its options, and what its failures mean."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from flowfactor.errors import FlowSolveError
from flowfactor.solve.diagnosis import failure, first_bad
from flowfactor.solve.dynamics import Dynamics, NotFiniteError, StepLimitError
from flowfactor.solve.interpolating import DENSE, DENSE_OF_EACH
from flowfactor.solver import SCIPY_METHOD, Solver

_odeint: Any = torchdiffeq.odeint  # its annotations do not say that tensors come back as tensors


def call_torchdiffeq(
    dynamics: Dynamics, y0: Tensor, t: Tensor, steered: int, *,
    captured: tuple[Tensor, ...] | None = None, first_step: float | None = None, reads: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls torchdiffeq once and turns its failures into FlowSolveError.

    ``reads [T, *batch]`` says when to read each sample, where that is not at ``t`` but in between.
    """
    solver = dynamics.solver
    arguments: dict[str, Any] = {"rtol": solver.rtol, "atol": solver.atol}
    arguments["method"] = (DENSE if reads is None else DENSE_OF_EACH).get(solver.method, solver.method)
    arguments["options"] = _options(solver, t, steered, first_step or dynamics.first_step) | (
        {} if reads is None else {"reads": reads}
    )
    solve: Any = _odeint
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
    if len(ys) != len(t if reads is None else reads) or not bool(torch.isfinite(ys.detach()).all()):
        raise _late_failure(dynamics, y0, t)
    return ys


def _options(solver: Solver, t: Tensor, steered: int, first_step: float | None = None) -> dict[str, Any]:
    options: dict[str, Any] = dict(solver.options)
    if solver.method == SCIPY_METHOD:
        return options
    if not solver.adaptive:
        return _fixed_options(solver)
    # Land on the end, so that the field is not evaluated beyond it, and on every output that is not read inside of a step.
    landings = t[-1:] if solver.method in DENSE else t[1:]
    options = {"norm": solver.error_norm(steered)} | _landing(options, landings)
    if first_step is not None:
        options["first_step"] = first_step
    return options


def _landing(options: dict[str, Any], landings: Tensor) -> dict[str, Any]:
    """Options by which steps end at some times as well."""
    landings = landings.detach()
    if "step_t" in options:
        landings = torch.cat([landings, torch.as_tensor(options["step_t"]).to(landings)]).unique()
    if "jump_t" in options:  # lands as well, and torchdiffeq takes no time for both
        landings = landings[~torch.isin(landings, torch.as_tensor(options["jump_t"]).to(landings))]
    return options | {"step_t": landings}


def _fixed_options(solver: Solver) -> dict[str, Any]:
    # Adams-Bashforth of high order, which torchdiffeq takes by itself, is unstable unless steps are tiny.
    order = {"max_order": 5} if solver.method == "explicit_adams" else {}
    return {"grid_constructor": lambda func, y0, t: solver.grid(t)} | order | solver.options


def _adjoint_options(solver: Solver, t: Tensor, steered: int) -> dict[str, Any]:
    if not solver.adaptive:
        return _fixed_options(solver)
    if solver.method == SCIPY_METHOD:
        return dict(solver.options)
    norm = solver.error_norm(steered)

    def adjoint_norm(state: tuple[Tensor, ...]) -> Tensor:
        # The seminorm of Kidger et al. (2021): gradients of parameters are integrals, which steer nothing.
        return torch.maximum(norm(state[1]), norm(state[2]))

    # Land on every output on the way back, beyond which the field may not be asked.
    return {"norm": adjoint_norm, **_landing(dict(solver.options), t[:-1])}


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
    """Fixed steps and SciPy go on when states become NaN: their solve is repeated up to where they do."""
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
