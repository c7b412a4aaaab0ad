"""Solves of closed-form fields whose way back is a closed form too: the ``direct`` gradient without autograd's graph.

Forward, torchdiffeq's steps run without autograd and the field's tape records every accepted stage. Running costs and
log-determinants are quadratures: nothing depends on them, so they are evaluated for all stages at once. Backward, the
discrete adjoint of the very steps that were taken carries one cotangent of z from stage to stage, and the gradients of all
weights are a few large products at the end. The result is the gradient of the computed solution, as backpropagation
through the solver gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowfactor._integrate import check_fixed_steps, integrate
from flowfactor._march import GaveUpError, March, Plan, Taken, quadrature_weights
from flowfactor._packing import Packing, Segment
from flowfactor._rows import Rows
from flowfactor._runge_kutta import tableau
from flowfactor.control import ResolvedControl
from flowfactor.fields.base import Evaluation
from flowfactor.path import SolveStats
from flowfactor.solver import Solver

if TYPE_CHECKING:
    from flowfactor.latent_flow import LatentFlow


def solve_segment(
    flow: LatentFlow, segment: Segment, acting: ResolvedControl, y: Tensor, packing: Packing, want: frozenset[str],
    probe: Tensor | None, stats: SolveStats,
) -> Tensor | None:  # fmt: skip
    """Solves a stretch by closed forms both ways.

    Args:
        flow: The flow.
        segment: The stretch.
        acting: Its control.
        y: Packed state at its start, ``[*batch, S]``.
        packing: How it is packed.
        want: What the costs need of ``value`` and ``time``.
        probe: Hutchinson's probe ``[*batch, D]``.
        stats: Counted into.

    Returns:
        Packed states ``[T, *batch, S]``; None where the general solver has to do it, or explain why it cannot be done.
    """
    table = tableau(flow.solver.method)
    if table is None or not _suits(flow.solver, y, segment.times, packing):
        return None
    rows = Rows.of(acting, y.shape[:-1], flow.num_flows)
    if rows is None:
        return None
    along = None if probe is None else rows.arrange(probe)
    tape = flow.field.tape(rows, want, flow.divergence if packing.log_det else None, along)
    if tape is None:
        return None
    check_fixed_steps(flow.solver, segment.times)
    modules = [cost for cost in packing.costs.values() if isinstance(cost, nn.Module)]
    # Costs may share a force, whose gradient must count once.
    others = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    block = rows.arrange(y)
    z0, start = block[..., : flow.dim], block[..., flow.dim :].detach()

    def again(z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        rhs = packing.rhs(tape.rebind(tensors[len(others) :]))
        both = torch.cat([z, start], -1)
        ys = integrate(flow.solver, rhs, both, segment.times, steered=packing.steered, stats=SolveStats())
        return ys[..., : flow.dim], (ys[..., flow.dim :] - start).movedim(-1, 0)

    plan = Plan(
        tape, table, flow.solver, segment.times.tolist(), packing.log_det, start, packing.costs,
        want | ({"laplacian"} if packing.log_det else frozenset()), along, rows.shares(),
        SolveStats(method=stats.method), stats.accepted + stats.rejected, torch.is_grad_enabled(), again,
    )  # fmt: skip
    try:
        zs, integrals = _Solve.apply(plan, len(others), z0, *others, *tape.inputs)
    except GaveUpError:
        return None
    stats.add(plan.stats)
    zs = rows.restore(zs, 1)
    if not plan.quadratures:
        return zs
    return torch.cat([zs, rows.restore(integrals.movedim(0, -1), 1) + y[..., flow.dim :]], -1)


def _suits(solver: Solver, y: Tensor, t: Tensor, packing: Packing) -> bool:
    """Whether a solve is of the kind whose way back is written out: plain tensors, plain settings, known costs."""
    later = packing.quadratures - (packing.log_det and solver.adaptive)
    return (
        solver.gradient == "direct"
        and not solver.options
        and not t.requires_grad
        and y.dtype in (torch.float32, torch.float64)
        and all(getattr(cost, "many_stages", False) for cost in packing.costs.values())
        # Integrals that wait for the end keep every stage: without gradients, memory must not grow with the steps.
        and (not later or torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(y.device.type)
        # Neither torch.func's transforms nor forward derivatives reach through the way back.
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch.autograd.forward_ad._current_level < 0
    )


class _Solve(torch.autograd.Function):
    """`solve` with its way back."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, others: int, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needed = plan.differentiable and any(ctx.needs_input_grad)
        z = z0.detach().contiguous()
        later = plan.quadratures - plan.steered  # integrals that no step waits for
        march = March(plan, z, needed or later > 0)
        (march.adaptive if plan.solver.adaptive else march.fixed)(z)
        ctx.plan, ctx.taken, ctx.rates = plan, march.taken, []
        ctx.save_for_backward(z0, *tensors)
        integrals = z.new_zeros(plan.quadratures, len(plan.times), *z.shape[:-1])
        if march.record:
            plan.tape.take(march.stage_times)
        if plan.quadratures and march.record:
            weights = quadrature_weights(march.taken, plan.table, len(plan.times), len(march.stage_times))
            ctx.weights = torch.tensor(weights, dtype=z.dtype, device=z.device)
        if later:
            ctx.leaves, rates, ctx.rates = _rates(plan, march.stage_times, needed)
            for total, rate in zip(integrals[plan.steered :], [*rates, *ctx.rates], strict=True):
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


def _rates(plan: Plan, ts: list[float], needed: bool) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Rates ``[K, S, n]`` at all stages.

    Returns:
        The field's outputs, from which the graph of the costs begins; the rate of the log-determinant, where it is still
        to be found; the rates of the costs.
    """
    tape = plan.tape
    out = tape.outputs(plan.want - {"laplacian"} if plan.steered else plan.want)
    log_det = [out["laplacian"]] if plan.log_det and not plan.steered else []
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
