"""Backpropagation with small memory: a state an output is kept, and the steps between them are replayed.

The gradient is that of the steps that were taken, as ``direct`` gives it. Replaying cuts an interval into a few pieces, and
these again, so that the graph of a few steps is held at a time, and a few states for every level of cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from flowfactor.solve.dynamics import Dynamics
from flowfactor.solve.odeint import call_torchdiffeq

_odeint: Any = torchdiffeq.odeint  # its annotations do not say that tensors come back as tensors
_STEPS_AT_ONCE = 8  # steps whose graph is held at a time


class Checkpoint(torch.autograd.Function):
    """A solve that keeps one state an output; its backward pass replays each interval, a few steps at a time."""

    @staticmethod
    def forward(ctx: Any, dynamics: Dynamics, steered: int, t: Tensor, y0: Tensor, *captured: Tensor) -> Tensor:
        ys, ends = [y0.detach()], []
        first_step = None
        for i in range(len(t) - 1):
            dynamics.ends = []
            ys.append(call_torchdiffeq(dynamics, ys[-1], t[i : i + 2], steered, first_step=first_step)[1])
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
        cotangent = grad[-1]
        for i in range(len(t) - 2, -1, -1):
            times = torch.tensor(ctx.ends[i], dtype=torch.float64, device=t.device)
            cotangent = _pull_back(ctx.dynamics, ctx.steered, ys[i], times, captured, cotangent, totals) + grad[i]
        return None, None, None, cotangent, *totals


def _step_times(dynamics: Dynamics, t: Tensor) -> list[float]:
    """Start and ends of the steps that an interval took, as far as they can be replayed one by one."""
    a, b = float(t[0]), float(t[1])
    if not dynamics.solver.adaptive:
        return dynamics.solver.grid(t).tolist()
    return [a, *dynamics.ends[:-1], b]


def _pull_back(
    dynamics: Dynamics, steered: int, y: Tensor, times: Tensor, captured: Sequence[Tensor], cotangent: Tensor,
    totals: list[Tensor | None],
) -> Tensor:  # fmt: skip
    """Pulls a cotangent back over the steps that end at ``times[1:]``, holding the graph of a few steps at a time."""
    steps = len(times) - 1
    if steps > _STEPS_AT_ONCE:
        # Replay once, keeping a fixed number of states; then pull back over the pieces, last first.
        size = math.ceil(steps / _STEPS_AT_ONCE)
        cuts = [*range(0, steps, size), steps]
        states = [y]
        with torch.no_grad():
            for a, b in zip(cuts[:-2], cuts[1:-1], strict=True):
                states.append(_replay(dynamics, steered, states[-1], times[a : b + 1]))
        for a, b, state in reversed(list(zip(cuts[:-1], cuts[1:], states, strict=True))):
            cotangent = _pull_back(dynamics, steered, state, times[a : b + 1], captured, cotangent, totals)
        return cotangent
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        end = _replay(dynamics, steered, y, times)
        found = torch.autograd.grad(end, (y, *captured), cotangent, allow_unused=True, retain_graph=True)
    for i, g in enumerate(found[1:]):
        if g is not None:
            old = totals[i]
            totals[i] = g if old is None else old + g
    return found[0] if found[0] is not None else torch.zeros_like(y)


def _replay(dynamics: Dynamics, steered: int, y: Tensor, times: Tensor) -> Tensor:
    """The state after known steps, whose sizes are not searched for."""
    solver = dynamics.solver
    if not solver.adaptive:
        # Asked for the last state only: the states in between would stay alive with it.
        options = dict(solver.options) | {"grid_constructor": lambda func, y0, t: times}
        return _odeint(dynamics, y, times[[0, -1]], method=solver.method, options=options)[-1]
    step_options = dict(solver.options) | {"norm": _accept}
    for a, b in zip(times[:-1], times[1:], strict=True):
        step_options |= {"first_step": abs(float(b - a)) * 2, "step_t": b.reshape(1)}
        tolerances = {"rtol": solver.rtol, "atol": solver.atol}
        y = _odeint(dynamics, y, torch.stack([a, b]), method=solver.method, options=step_options, **tolerances)[1]
    return y


def _accept(y: Tensor) -> Tensor:
    """An error norm of zero: accepts a step whose size is already known to be good."""
    return y.new_zeros(())
