"""Solves that begin inside of their times, and follow the flow from there both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control, Schedule, resolve
from flowfactor.fields.base import Divergence, Field
from flowfactor.path import FlowPath, SolveStats
from flowfactor.solve.problem import Cost
from flowfactor.solve.solve import probe_of, solve
from flowfactor.solver import Solver

OneWay: TypeAlias = Callable[[Tensor], FlowPath]
"""Follows a flow from one state through times ``[T]`` or ``[T, *batch]``."""


def solve_from(
    start: int | float | Tensor, field: Field, solver: Solver, divergence: Divergence, z0: Tensor, t: Tensor,
    control: Control, *, context: Context | None, log_det: bool, costs: Mapping[str, Cost], needs: frozenset[str],
    generator: torch.Generator | None, probes: int, **more: Any,
) -> FlowPath:  # fmt: skip
    """Follows a field from ``z0`` at a start inside of the times; the other arguments are those of `solve`.

    Both ways count as one solve: they have the same probe, and their steps are added up.

    Args:
        start: Where ``z0`` is: an index, an index for each sample, or a time between two of ``t``, from `checked_start`.
        field: The field.
        solver: How to solve.
        divergence: How to take the divergence.
        z0: States at the start, ``[*batch, D]``.
        t: Times in frames, ``[T]`` or ``[T, *batch]``.
        control: Which flow acts.
        context: What steers it, spread over the batch.
        log_det: Whether to carry the log-determinant, of the flow from the start on.
        costs: Running costs by name.
        needs: What they ask for.
        generator: Source of Hutchinson's probes.
        probes: How many of them an estimate takes.
        **more: The rest.

    Returns:
        The path, in the order of ``t``.
    """
    probe = probe_of(z0, divergence, log_det, needs, generator, probes)
    asked = {"log_det": log_det, "costs": costs, "needs": needs, **more}
    stats = SolveStats(method=solver.method)
    if isinstance(start, Tensor):
        # A sample goes both ways as two that wait at the start until it is their turn.
        _check_fits(control, z0, field)
        z0 = z0.expand(2, *z0.shape)
        context = field.resolve_context(context, z0)
        probe = None if probe is None else probe.expand(2, *probe.shape)

    def one_way(times: Tensor) -> FlowPath:
        how = field, solver, divergence, z0, times, control
        return solve(*how, context=context, probe=probe, stats=stats, **asked)

    if isinstance(start, Tensor):
        return _from_each(one_way, t, start)
    return one_way(t) if start == 0 and isinstance(start, int) else _from_one(one_way, t, start)


def _check_fits(control: Control, z0: Tensor, field: Field) -> None:
    """Raises where a control does not fit the samples; twice as many might hide it."""
    for piece in control.controls if isinstance(control, Schedule) else (control,):
        resolve(piece, z0.shape[:-1], field.num_flows, dtype=z0.dtype, device=z0.device)


def _from_one(one_way: OneWay, t: Tensor, start: int | float) -> FlowPath:
    """All samples begin at the same output, or at a time between two outputs."""
    if isinstance(start, int):
        first, ahead, behind = 0, t[start:], t[: start + 1]
    else:
        passed = int((t < start).sum()) if bool(t[-1] > t[0]) else int((t > start).sum())
        now = t.new_tensor([start])
        first, ahead, behind = 1, torch.cat([now, t[passed:]]), torch.cat([t[:passed], now])
    after, before = one_way(ahead), one_way(behind.flip(0))

    def joined(back: Tensor, on: Tensor) -> Tensor:
        return torch.cat([back[1:].flip(0), on[first:]])

    log_det = None
    if before.log_det is not None and after.log_det is not None:
        log_det = joined(before.log_det, after.log_det)
    # What the way back costs comes first: costs add up from t[0] on.
    costs = {name: joined(back[-1] - back, back[-1] + after.costs[name]) for name, back in before.costs.items()}
    begun = start if isinstance(start, int) else None
    return FlowPath(t.to(after.z.dtype), joined(before.z, after.z), log_det, costs, after.stats, begun)


def _from_each(one_way: OneWay, t: Tensor, start: Tensor) -> FlowPath:
    """Each sample begins at an output of its own."""
    last = len(t) - 1
    step = torch.arange(last + 1, device=t.device).reshape(-1, *[1] * start.ndim)
    own = (t.reshape(-1, *[1] * start.ndim) if t.ndim == 1 else t).expand(last + 1, *start.shape)
    ahead = own.gather(0, torch.maximum(step, start))
    behind = own.gather(0, torch.minimum(last - step, start))
    path, reached = one_way(torch.stack([ahead, behind], 1)), step >= start

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """What is found on the way ahead, and on the way back in the order of ``t``."""
        return x[:, 0], x[:, 1].flip(0)

    def chosen(x: Tensor) -> Tensor:
        on, back = parts(x)
        return torch.where(reached, on, back)

    costs = {}
    for name, cost in path.costs.items():
        on, back = parts(cost)
        costs[name] = back[0] + torch.where(reached, on, -back)
    on, back = parts(path.z)
    z = torch.where(reached.unsqueeze(-1), on, back)
    log_det = None if path.log_det is None else chosen(path.log_det)
    return FlowPath(t.to(z.dtype), z, log_det, costs, path.stats, start)
