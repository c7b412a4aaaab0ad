"""Says why a solve failed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowfactor.errors import FlowSolveError

RHS = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def failure(
    rhs: RHS, t: Tensor, y: Tensor, dt: float, t_start: float, t_end: float, y_start: Tensor, step: int, *,
    limit: int | None, fixed: bool = False,
) -> FlowSolveError:  # fmt: skip
    """Builds the error of a solve that stopped.

    Args:
        rhs: The right-hand side.
        t: Time of the last good state.
        y: The last good state ``[*batch, S]``.
        dt: The step that was tried from there.
        t_start: Start of the solve.
        t_end: Its end.
        y_start: State at the start.
        step: Accepted steps so far.
        limit: The step limit, where that is what stopped it.
        fixed: Whether the steps were given, so that an instability may be the steps' and not the field's.

    Returns:
        The error to raise.
    """
    y = y.detach()
    now = float(t)
    f = rhs(t.to(y.dtype), y)
    where = f"at t={now:.6g} after {step} accepted steps"
    if fixed:
        rate, sample = _overstepped(rhs, t, y, f, dt, y_start, t_start)
        if rate > 0:
            return FlowSolveError(
                f"the flow is too stiff for its steps: with steps of {abs(dt):.3g} frames and a rate of about {rate:.3g} a "
                f"frame the solution of a fixed-step method swings off {where}, most in sample {_named(sample)}. Take "
                f"step_size below {1 / rate:.2g}, an adaptive method, or penalise the Jacobian norm",
                reason="stiff", time=now, step=step, sample=sample,
            )  # fmt: skip
    bad = first_bad(f)
    if bad is None and limit is None:
        bad = _bad_ahead(rhs, t, y, f, math.copysign(t_end - now, t_end - t_start))
        if bad is not None:
            where = f"just beyond t={now:.6g} after {step} accepted steps"
    if bad is not None and not _runs_off(y, f, y_start, t_end - t_start):
        return FlowSolveError(
            f"the field returned NaN or infinity {where}, first in sample {_named(bad)}. Look at the field's inputs and "
            "parameters there (an overflowing exponential, a log or root of a negative number, weights that diverged); "
            "to keep the state in bounds, penalise the transport cost or clip the learning rate",
            reason="nan", time=now, step=step, sample=bad,
        )  # fmt: skip
    if _runs_off(y, f, y_start, t_end - t_start):
        worst = _worst(f)
        return FlowSolveError(
            f"the state runs off to infinity {where}, fastest in sample {_named(worst)} (speed {float(f.abs().max()):.3g}"
            " a frame). The field grows faster than linearly there: bound it (smaller weights, a saturating potential), "
            "penalise the transport cost or the Jacobian norm, or end the solve earlier",
            reason="blowup", time=now, step=step, sample=worst,
        )  # fmt: skip
    rate, sample = stiffness(rhs, t, y)
    at_limit = (
        f"cannot end within max_steps={limit}" if limit is not None else "needs steps below the clock's resolution"
    )
    if rate * abs(dt) > 1.0:
        return FlowSolveError(
            f"the flow is too stiff: the solve {at_limit} {where}, with steps of {abs(dt):.3g} frames held down by a rate "
            f"of about {rate:.3g} a frame, most in sample {_named(sample)}. Penalise the Jacobian norm or the transport "
            "cost, use looser tolerances, or an implicit method: "
            'Solver("scipy_solver", options={"solver": "BDF"}, gradient="adjoint")',
            reason="stiff", time=now, step=step, sample=sample,
        )  # fmt: skip
    if limit is not None:
        steps = f" and steps of {abs(dt):.3g}" if dt else ""
        return FlowSolveError(
            f"the solve {at_limit} {where}, with {abs(t_end - now):.6g} frames to go{steps}; the field "
            f"changes fastest in sample {_named(sample)}. Raise max_steps, use looser tolerances, or a method of another "
            "order (dopri8 for tight tolerances)",
            reason="steps", time=now, step=step, sample=sample,
        )  # fmt: skip
    return FlowSolveError(
        f"the solve {at_limit} {where}: the field jumps or is not smooth there, most in sample {_named(sample)}. Put "
        "jumps in time into a Schedule, whose switching times a solve lands on, or use a fixed-step method",
        reason="underflow", time=now, step=step, sample=sample,
    )  # fmt: skip


def first_bad(x: Tensor) -> tuple[int, ...] | None:
    """Index of the first sample of ``x [*batch, S]`` with NaN or infinity; None if all are finite."""
    bad = ~torch.isfinite(x).all(-1)
    if not bool(bad.any()):
        return None
    return tuple(bad.nonzero()[0].tolist())


def _bad_ahead(rhs: RHS, t: Tensor, y: Tensor, f: Tensor, remaining: float) -> tuple[int, ...] | None:
    """The first sample with NaN or infinity at the nearest of a few points straight ahead; None if all are finite."""
    for part in (1e-12, 1e-9, 1e-6, 1e-3, 1e-1, 1.0):
        h = part * remaining
        ahead = y + h * f
        bad = first_bad(rhs((t + h).to(y.dtype), ahead)) if bool(torch.isfinite(ahead).all()) else None
        if bad is not None:
            return bad
    return None


def _runs_off(y: Tensor, f: Tensor, y_start: Tensor, span: float) -> bool:
    """Whether a state grew far beyond its start and multiplies within a sliver of the span."""
    size, speed, start = y.abs().amax(), f.abs().amax(), y_start.abs().amax()
    if not bool(torch.isfinite(speed)):
        return bool(size > 1e3 * (1 + start))
    return bool(size > 1e2 * (1 + start)) and bool(size < speed * abs(span) * 1e-2)


def _overstepped(
    rhs: RHS, t: Tensor, y: Tensor, f: Tensor, dt: float, y_start: Tensor, t_start: float
) -> tuple[float, tuple[int, ...]]:
    """The rate and sample of a run-away that is the fixed steps' doing; rate 0 where the field itself runs off.

    Steps that are too long for a decaying or turning field make the state swing ever further while the field pulls it
    back; where the field itself runs off, it points outwards.
    """
    sample = _worst(y)
    here, pull = y[sample], f[sample]
    if bool(pull.isnan().any()) or float(here.abs().amax()) <= 1e2 * (1 + float(y_start.abs().amax())):
        return 0.0, sample
    pull = torch.nan_to_num(pull)
    here, pull = here / here.abs().amax(), pull / pull.abs().amax().clamp_min(1e-30)
    outwards = float((here * pull).sum() / (here.norm() * pull.norm()).clamp_min(1e-30))
    if outwards * (1.0 if dt >= 0 else -1.0) > 0.1:
        return 0.0, sample
    for time, state in ((t.new_full((), t_start), y_start), (t, y)):
        rate, sample = stiffness(rhs, time, state)
        if rate * abs(dt) > 1.0:
            return rate, sample
    return 0.0, sample


@torch.no_grad()
def stiffness(rhs: RHS, t: Tensor, y: Tensor) -> tuple[float, tuple[int, ...]]:
    """Estimates the largest rate |J| of any sample by a few steps of power iteration, and names the sample."""
    t, y = t.to(y.dtype), y.detach()
    f = rhs(t, y)
    eps = torch.finfo(y.dtype).eps ** 0.5
    generator = torch.Generator(device=y.device).manual_seed(0)
    v = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
    rates = torch.zeros(y.shape[:-1], dtype=y.dtype, device=y.device)
    scale = eps * (1 + y.norm(dim=-1, keepdim=True))
    for _ in range(6):
        v = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        v = torch.nan_to_num((rhs(t, y + scale * v) - f) / scale)
        rates = v.norm(dim=-1)
    return float(rates.max()), _worst(rates.unsqueeze(-1))


def _worst(x: Tensor) -> tuple[int, ...]:
    size = torch.nan_to_num(x, nan=torch.inf).abs().amax(-1)
    index = torch.unravel_index(size.argmax(), size.shape)
    return tuple(int(i) for i in index)


def _named(sample: tuple[int, ...]) -> str:
    return str(list(sample)) if len(sample) != 1 else str(sample[0])
