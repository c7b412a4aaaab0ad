"""Solves in closed form: no autograd graph in any of the gradient modes.

Forward, torchdiffeq's steps run without autograd (`flowfactor.solve.forward`), and the residuals of the accepted stages are
kept. Running costs and log-determinants are quadratures: no step depends on them, so they are evaluated for many stages at
once.

Backward, ``direct`` and ``checkpoint`` take the discrete adjoint of the very steps that were taken
(`flowfactor.solve.discrete_adjoint`): the gradient of the computed solution, as backpropagation through the solver gives
it. ``direct`` still has every stage; ``checkpoint`` has a state here and there and repeats the steps between them.
``adjoint`` solves the continuous adjoint equation (`flowfactor.solve.continuous_adjoint`).

What a field offers to all of this, and the order in which it is used: `flowfactor.networks.stage_adjoint`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowfactor._functorch import is_plain
from flowfactor.context import Context, joined
from flowfactor.control import ResolvedControl
from flowfactor.fields.base import Divergence, Field
from flowfactor.fields.evaluation import BoundField, Evaluation
from flowfactor.networks.batching import Layout, WeightedLayout, block_of
from flowfactor.networks.probes import first_probe
from flowfactor.networks.stage_adjoint import NoClosedForm, Residuals, StageAdjoint
from flowfactor.networks.weighted_adjoint import WeightedAdjoint
from flowfactor.path import SolveStats
from flowfactor.solve.acceleration import accelerated
from flowfactor.solve.clock import ClockAdjoint, spread
from flowfactor.solve.continuous_adjoint import continuous_adjoint
from flowfactor.solve.discrete_adjoint import Rates, discrete_adjoint, rates_of
from flowfactor.solve.forward import Block, Forward, GaveUpError
from flowfactor.solve.general import follow
from flowfactor.solve.odeint import check_fixed_steps
from flowfactor.solve.problem import Packing, Plan, Segment
from flowfactor.solve.reads import Readings
from flowfactor.solve.runge_kutta import Tableau, tableau
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solver import Solver


def solve_segments(
    field: Field, solver: Solver, divergence: Divergence, segments: Sequence[Segment], acting: Sequence[ResolvedControl],
    y: Tensor, packing: Packing, want: frozenset[str], probe: Tensor | None, stats: SolveStats,
) -> Tensor | NoClosedForm:  # fmt: skip
    """Solves all stretches of a schedule of weights at once in closed form.

    The solver has to be one of fixed steps whose stages all lie before the step's end, where the next weights may begin.

    Args:
        field: The field.
        solver: How to solve.
        divergence: How to take the divergence, where the log-determinant is wanted.
        segments: The stretches.
        acting: Their controls.
        y: Packed state at the start, ``[*batch, S]``.
        packing: How it is packed.
        want: What the costs need of ``value`` and ``time``.
        probe: Hutchinson's probes ``[*batch, P D]``.
        stats: Counted into.

    Returns:
        Packed states ``[T, *batch, S]`` at the times that are wanted, or why the stretches have to be solved one by one.
    """
    weights = [one.weights for one in acting if one.weights is not None]
    if len(weights) < max(2, len(segments)) or solver.adaptive or solver.gradient == "adjoint":
        return _ONE_BY_ONE
    table = tableau(solver.method)
    if table is None or table.c.max() >= 1:
        return _ONE_BY_ONE
    times = torch.cat([segments[0].times, *(segment.times[1:] for segment in segments[1:])])
    wanted, begin = [], 0
    for segment in segments:
        wanted += range(begin + segment.first, begin + segment.last)
        begin += len(segment.times) - 1
    # A time at which one stretch ends and the next begins is wanted by one of them.
    whole = Segment(segments[0].control, times, 0, len(times))
    starts = [float(segment.times[0].detach()) for segment in segments]
    pieces = starts, torch.stack(weights)
    ys = solve_segment(field, solver, divergence, whole, acting[0], y, packing, want, probe, stats, pieces)
    return ys if isinstance(ys, NoClosedForm) else ys[wanted]


def solve_segment(
    field: Field, solver: Solver, divergence: Divergence, segment: Segment, acting: ResolvedControl, y: Tensor,
    packing: Packing, want: frozenset[str], probe: Tensor | None, stats: SolveStats,
    pieces: tuple[list[float], Tensor] | None = None, memory: StepMemory | None = None,
) -> Tensor | NoClosedForm:  # fmt: skip
    """Solves a stretch in closed form.

    Args:
        field: The field.
        solver: How to solve.
        divergence: How to take the divergence, where the log-determinant is wanted.
        segment: The stretch.
        acting: Its control.
        y: Packed state at its start, ``[*batch, S]``.
        packing: How it is packed.
        want: What the costs need of ``value`` and ``time``.
        probe: Hutchinson's probes ``[*batch, P D]``.
        stats: Counted into.
        pieces: Times from which weights act, and the weights ``[P, *batch, K]``, in place of ``acting``.
        memory: What the solve before found of first steps.

    Returns:
        Packed states ``[T, *batch, S]``; or why the general engine has to do it (or explain why it cannot be done).
    """
    refusal = _unsuited(solver, y, segment, packing, acting.context if "context" in want else None)
    if refusal is not None:
        return refusal
    table = tableau(solver.method)  # not before: inside transforms of torch.func it cannot be read
    if table is None:
        return NoClosedForm(f"the method {solver.method} has no closed-form adjoint")
    if pieces is None and acting.weights is not None:
        pieces = [float(segment.times[0].detach())], acting.weights.unsqueeze(0)
    few = pieces is not None and _evaluations(solver, segment.times, table) < _FEWEST_UNDER_WEIGHTS
    if few and solver.engine != "closed form":
        return NoClosedForm("a superposition over so few steps is solved faster by autograd")
    layout = block_of(acting, y.shape[:-1], field.num_flows)
    if layout is None:
        return NoClosedForm("the flows have too different numbers of samples to be solved as one block")
    along = None if probe is None else layout.scatter(probe)[0]
    kind = divergence if packing.log_det or "divergence" in want else None
    adjoint = _adjoint_of(field, layout, pieces, want - {"divergence", "acceleration"}, kind, along)
    if isinstance(adjoint, NoClosedForm):
        return adjoint
    context = layout.contexts()[0] if "context" in want else None
    if segment.clock is not None and not adjoint.own_times:
        return NoClosedForm(f"the closed form of {type(field).__name__} takes one time for all samples")
    single, laid = adjoint, _laid_out(segment, layout, y.dtype, solver.adaptive and table.dense)
    adjoint = single if laid.clock is None else ClockAdjoint(single, laid.clock)
    check_fixed_steps(solver, segment.times)
    modules = [cost for cost in packing.costs.values() if isinstance(cost, nn.Module)]
    # Costs may share a force, whose gradient must count once.
    others = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    block = layout.scatter(y)[0]
    dim = (
        field.dim
    )  # all that the backward pass asks of the field: held by it, a path kept on the field would be a circle
    z0, start = block[..., :dim], block[..., dim:].detach()

    def by_autograd(gradient: Any, z: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        bound, how = _as_field(adjoint, tensors[len(others) :], along), replace(solver, gradient=gradient)
        bound = accelerated(bound, bound) if "acceleration" in want else bound
        both = torch.cat([z, start], -1)
        ys = follow(how, lambda piece: packing.rhs(bound, piece, context), both, laid, packing.steered, SolveStats())
        return ys[..., :dim], (ys[..., dim:] - start).movedim(-1, 0)

    plan = Plan(
        adjoint, table, solver, segment.times.tolist(), packing.log_det, start, packing.costs, want, along,
        layout.shares(), SolveStats(method=stats.method), stats, stats.accepted + stats.rejected, torch.is_grad_enabled(),
        by_autograd, laid.clock, context, contextual=acting.context is not None, memory=memory,
    )  # fmt: skip
    if laid.straight is not None:
        clock, reads = laid.straight
        more: dict[str, Any] = {"clock": clock, "readings": Readings(reads, y.dtype), "back": plan}
        plan = replace(plan, adjoint=ClockAdjoint(single, clock), **more)
    try:
        zs, integrals = _Solve.apply(plan, len(others), z0, *others, *adjoint.inputs)
    except GaveUpError:
        if memory is None or not memory.misled(plan.times):
            return FAILED
        how = field, solver, divergence, segment, acting, y, packing, want, probe, stats, pieces
        return solve_segment(*how, memory)
    stats.add(plan.stats)
    zs = layout.gather([zs], 1)
    if not plan.quadratures:
        return zs
    return torch.cat([zs, layout.gather([integrals.movedim(0, -1)], 1) + y[..., dim:]], -1)


def _laid_out(segment: Segment, layout: Layout, dtype: torch.dtype, dense: bool) -> Segment:
    """A stretch whose clocks are laid out as its samples; the straight one only where outputs can be read."""
    if segment.clock is None:
        return segment
    straight = None
    if dense and segment.straight is not None:
        clock, reads = segment.straight
        straight = clock.laid_out(layout, dtype), spread(reads, layout)
    return replace(segment, clock=segment.clock.laid_out(layout, dtype), straight=straight)


def _adjoint_of(
    field: Field, layout: Layout, pieces: tuple[list[float], Tensor] | None, want: frozenset[str],
    divergence: Divergence | None, probe: Tensor | None,
) -> StageAdjoint | NoClosedForm:  # fmt: skip
    """The field's adjoint for the samples of a layout, or under weights."""
    if pieces is None:
        return field.stage_adjoint(layout, want, divergence, probe)
    starts, weights = pieces
    flows = field.num_flows
    spread = None if probe is None else probe.expand(flows, *probe.shape[1:])
    every = WeightedLayout(layout.batch_shape, weights[0], context=layout.context)
    single = field.stage_adjoint(every, want, divergence, spread)
    if isinstance(single, NoClosedForm):
        return single
    return WeightedAdjoint(single, weights.reshape(len(starts), -1, flows), starts)


def _as_field(adjoint: StageAdjoint, inputs: Sequence[Tensor], probe: Tensor | None) -> BoundField:
    """A bound field that autograd can follow, as a function of the adjoint's inputs."""
    bound = adjoint.by_autograd(inputs)
    known = ("velocity", "divergence", "value", "gradient", "time")

    def evaluate(z: Tensor, t: Tensor) -> Evaluation:
        out = {name: x for name, x in bound(z, t).items() if name in known}
        return Evaluation(
            z, t, **out, probe=first_probe(probe, z.shape[-1]), velocity_at=lambda z: bound(z, t)["velocity"]
        )

    return evaluate


def _unsuited(
    solver: Solver, y: Tensor, segment: Segment, packing: Packing, context: Context | None
) -> NoClosedForm | None:
    """Why a solve is not of the kind whose adjoint is written out: plain tensors, plain settings, known costs."""
    for name, cost in packing.costs.items():
        if not getattr(cost, "many_stages", False):
            reason = getattr(cost, "one_stage_reason", None) or "it does not promise many_stages = True"
            return NoClosedForm(f"cost {name!r} takes one stage at a time: {reason}")
    clock = segment.clock
    reasons = {
        "the solver has options of torchdiffeq's": bool(solver.options),
        "the solver compiles": solver.compile,
        "the times ask for their gradient": segment.times.requires_grad or (clock is not None and clock.asks_gradient),
        "a cost reads a context that asks for its gradient": context is not None and joined(context).requires_grad,
        f"states are {y.dtype}, neither float32 nor float64": y.dtype not in (torch.float32, torch.float64),
        "autocast is on": torch.is_autocast_enabled(y.device.type),
        # Neither torch.func's transforms nor forward derivatives reach through the closed-form adjoint.
        "it runs inside a transform of torch.func or forward-mode differentiation": not is_plain(),
    }
    return next((NoClosedForm(reason) for reason, holds in reasons.items() if holds), None)


FAILED = NoClosedForm("its steps failed in closed form")
_ONE_BY_ONE = NoClosedForm("the stretches are solved one by one")
_FEWEST_UNDER_WEIGHTS = 3  # below, what a solve by closed forms costs beside its stages is not made good


def _evaluations(solver: Solver, t: Tensor, table: Tableau) -> float:
    """How often a solve of fixed steps evaluates the field."""
    return math.inf if solver.adaptive else (len(solver.grid(t)) - 1) * table.size


_STEPS_AT_ONCE = 8  # steps whose residuals are held at a time where memory must not grow with their number


class _Solve(torch.autograd.Function):
    """A solve with its adjoint."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, others: int, z0: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needed = plan.differentiable and any(ctx.needs_input_grad)
        keep = needed and plan.solver.gradient == "direct"
        z = z0.detach().contiguous()
        integrals = z.new_zeros(plan.quadratures, len(plan.times), *z.shape[:-1])
        later = integrals[plan.steered :]  # those that no step waits for
        kept: list[Rates] = []

        def done(block: Block, residuals: list[Residuals]) -> None:
            stages = plan.adjoint.stack(residuals, block.stage_times)
            residuals.clear()  # before more is worked out from what is stacked now
            rates = rates_of(plan, stages, block.stage_times, log_det=plan.log_det and not plan.steered, graph=keep)
            if keep:
                kept.append(rates)
            if len(later):
                weights = block.weights(plan, z)
                for total, rate in zip(later, [*rates.log_det, *rates.costs], strict=True):
                    total += torch.einsum(f"{weights[0]},ksn->tkn", weights[1], rate.detach())

        forward = Forward(plan, z, None if keep else _STEPS_AT_ONCE, done if keep or len(later) else None)
        forward.run(z)
        if forward.log_det is not None:
            integrals[0] = forward.log_det
        ctx.plan, ctx.others, ctx.kept = plan, others, kept[0] if kept else None
        ctx.blocks = forward.blocks if plan.solver.gradient != "adjoint" else []
        # The states of an adjoint solve are its outputs; saved as such, they make no cycle.
        ctx.save_for_backward(z0, *tensors, *([forward.ys] if plan.solver.gradient == "adjoint" else []))
        return forward.ys, integrals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = list(ctx.saved_tensors)
        ys = saved.pop() if plan.solver.gradient == "adjoint" else None
        z0, *tensors = saved
        if torch.is_grad_enabled():
            plan.caller_stats.reason_backward = "gradients of gradients were asked for"
            return None, None, *_by_autograd(plan, "direct", [z0, *tensors], grads)
        others, bars = tensors[: ctx.others], (grads[0], grads[1])
        if ys is None:
            start_bar, other_bars, own = discrete_adjoint(plan, ctx.blocks, ctx.kept, bars, others)
            return None, None, start_bar, *other_bars, *own
        try:
            start_bar, other_bars, own = continuous_adjoint(plan.back or plan, ys, bars, others)
        except GaveUpError:  # the general engine tries too, and explains why it cannot be done
            plan.caller_stats.reason_backward = "the adjoint equation failed in closed form"
            return None, None, *_by_autograd(plan, "adjoint", [z0, *tensors], grads)
        return None, None, start_bar, *other_bars, *own


def _by_autograd(plan: Plan, gradient: str, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `inputs` by the general solver, which can be differentiated themselves."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # Inputs may depend on one another. As views of their own, none has a share in another's gradient.
        inputs = [x.view_as(x) for x in inputs]
        wanted = [x for x in inputs if x.requires_grad]
        outputs = plan.by_autograd(gradient, *inputs)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
