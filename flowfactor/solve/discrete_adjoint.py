"""The discrete adjoint of the steps that a solve in closed form took.

A cotangent of z goes from stage to stage, from the last to the first; what the integrals along the path ask of a stage
enters it there; and the gradients of all weights are a few large products over all stages of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.fields.evaluation import Evaluation
from flowfactor.networks.batched import sum_into
from flowfactor.networks.probes import first_probe
from flowfactor.networks.stage_adjoint import Outputs, Pullback, Residuals, Stages
from flowfactor.solve.acceleration import StageAccelerations, stage_accelerations
from flowfactor.solve.forward import Block, Step
from flowfactor.solve.problem import Plan, checked_rate
from flowfactor.solve.runge_kutta import Steps


@dataclass
class Rates:
    """Rates of the integrals at S stages.

    Attributes:
        stages: The stages.
        leaves: The field's outputs, from which the graph of the costs begins.
        log_det: Rates of the log-determinant ``[K, S, n]``, where they were asked for.
        costs: Rates of every cost ``[K, S, n]``.
        accelerations: Where a cost asked for them.
    """

    stages: Stages
    leaves: dict[str, Tensor]
    log_det: list[Tensor]
    costs: list[Tensor]
    accelerations: StageAccelerations | None = None


def rates_of(plan: Plan, stages: Stages, ts: Sequence[float], *, log_det: bool, graph: bool) -> Rates:
    """Rates at some stages, which were at the times ``ts``; ``graph`` keeps how costs depend on the field."""
    if not log_det and not plan.costs:
        return Rates(stages, {}, [], [])
    want = frozenset({"velocity", "gradient"}) | plan.want if plan.costs else frozenset[str]()
    out = stages.outputs(want | {"divergence"} if log_det else want)
    found = [_per_unit(plan, ts, out["divergence"])] if log_det else []
    if not plan.costs:
        return Rates(stages, {}, found, [])
    # Each a leaf of its own: the velocity of a gradient field is the gradient, and its cotangent must not count twice.
    leaves = {name: value.detach().requires_grad_(graph) for name, value in out.items()}
    z = stages.z.detach().requires_grad_(graph)
    leaves["z"] = z
    t = plan.times_at(ts, z)
    bent = None
    if "acceleration" in plan.want:
        bent = stage_accelerations(plan, z, t, leaves["velocity"], graph=graph)
        leaves["acceleration"] = bent.value.detach().requires_grad_(graph)
    first = first_probe(plan.probe, z.shape[-1])
    probe = None if first is None else first.unsqueeze(1).expand(z.shape)
    evaluation = Evaluation(
        z, t, leaves["velocity"], leaves.get("divergence"), leaves.get("value"), leaves.get("gradient"), leaves.get("time"),
        probe, context=_of_stages(plan.context, z), acceleration=leaves.get("acceleration"),
    )  # fmt: skip
    rate = plan.rates_at(ts)
    scale = rate.abs() if isinstance(rate, Tensor) else rate
    with torch.set_grad_enabled(graph):
        costs = [checked_rate(name, cost(evaluation), z.shape[:-1], z.dtype) for name, cost in plan.costs.items()]
        return Rates(stages, leaves, found, [scale * cost for cost in costs], bent)


def _per_unit(plan: Plan, ts: Sequence[float], divergence: Tensor) -> Tensor:
    """Divergences per frame as rates of the log-determinant: times always run as they come."""
    rate = plan.rates_at(ts)
    return rate * divergence if isinstance(rate, Tensor) else divergence


def _of_stages(context: Context | None, z: Tensor) -> Context | None:
    """A context ``[G, n, C]`` at the stages ``z [G, S, n, D]``."""
    if isinstance(context, Tensor):
        return context.unsqueeze(1).expand(*z.shape[:-1], -1)
    return context and {name: x.unsqueeze(1).expand(*z.shape[:-1], -1) for name, x in context.items()}


def cotangents_of(
    plan: Plan, rates: Rates, ts: Sequence[float], bars: Tensor, others: Sequence[Tensor]
) -> tuple[Outputs, list[Tensor | None], Tensor | None, list[Tensor | None]]:
    """What cotangents ``bars [Q, K, S, n]`` of the rates ask of the field.

    Returns:
        Cotangents of the field's outputs at all stages, of ``others``, of z itself, and of the adjoint's inputs, as far as
        accelerations depend on these.
    """
    nothing: list[Tensor | None] = [None] * len(others)
    own: list[Tensor | None] = [None] * len(plan.adjoint.inputs)
    cotangents = {"divergence": _per_unit(plan, ts, bars[0])} if plan.log_det else {}
    pairs = [(r, g) for r, g in zip(rates.costs, bars[plan.log_det :], strict=True) if r.requires_grad]
    if not pairs:
        return cotangents, nothing, None, own
    live = [x for x in others if x.requires_grad]
    found = torch.autograd.grad(
        [r for r, _ in pairs], [*rates.leaves.values(), *live], [g for _, g in pairs],
        allow_unused=True, retain_graph=True,
    )  # fmt: skip
    z_bar = None
    for name, value in zip(rates.leaves, found, strict=False):
        if value is None:
            continue
        if name == "acceleration" and rates.accelerations is not None:
            more, velocity, own = rates.accelerations.pull(value)
            z_bar = more if z_bar is None else z_bar if more is None else z_bar + more
            if velocity is not None:
                sum_into(cotangents, "velocity", velocity)
        elif name == "z":
            z_bar = value if z_bar is None else z_bar + value
        else:
            sum_into(cotangents, name, value)
    rest = iter(found[len(rates.leaves) :])
    return cotangents, [next(rest) if x.requires_grad else None for x in others], z_bar, own


class Totals:
    """Gradients of a list of tensors, added up as they come."""

    def __init__(self, size: int) -> None:
        self.values: list[Tensor | None] = [None] * size

    def add(self, more: Sequence[Tensor | None]) -> None:
        """Adds what is there."""
        self.values = [b if a is None else a if b is None else a + b for a, b in zip(self.values, more, strict=True)]


def discrete_adjoint(
    plan: Plan, blocks: Sequence[Block], kept: Rates | None, bars: tuple[Tensor, Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """The discrete adjoint of all blocks.

    Args:
        plan: What was solved.
        blocks: Its blocks. Without ``kept``, the steps of each are repeated to have its stages.
        kept: The rates of the only block.
        bars: Cotangents of the states at the outputs and of the integrals there.
        others: What the costs depend on beside the field.

    Returns:
        Cotangents of the start, of ``others`` and of the adjoint's inputs.
    """
    ys_bar, integrals_bar = bars
    end_bar = torch.zeros_like(ys_bar[0])
    other_bars, own = Totals(len(others)), Totals(len(plan.adjoint.inputs))
    starts: list[Tensor] = []
    for last in range(len(blocks) - 1, -1, -1):
        block = blocks[last]
        if kept is None and not starts:
            starts = _starts(plan, blocks, last)
        rates = _repeated(plan, block, starts.pop()) if kept is None else kept
        cotangents, z_bar = Outputs(), None
        if plan.quadratures:
            names, weights = block.weights(plan, ys_bar)
            stage_bars = torch.einsum(f"{names},qtkn->qksn", weights, integrals_bar)
            cotangents, found, z_bar, bent = cotangents_of(plan, rates, block.stage_times, stage_bars, others)
            other_bars.add(found)
            own.add(bent)
        pullback = rates.stages.pullback(cotangents)
        direct = pullback.direct
        injected = direct if z_bar is None else z_bar if direct is None else direct + z_bar
        end_bar = _through_steps(plan, block.steps, pullback, ys_bar, injected, end_bar)
        own.add(pullback.gradients())
    # Outputs that no step reads are the start itself.
    first = ys_bar[0] if plan.readings is None else torch.where(plan.readings.begin, ys_bar, 0).sum(0)
    return end_bar + first, other_bars.values, own.values


def _starts(plan: Plan, blocks: Sequence[Block], last: int) -> list[Tensor]:
    """States at the starts of the blocks up to ``last``, from the latest block whose state was kept."""
    first = max(i for i in range(last + 1) if blocks[i].z is not None)
    z = blocks[first].z
    assert z is not None
    starts = [z]
    for block in blocks[first:last]:
        starts.append(_repeat(plan, block, starts[-1]))
    return starts


def _repeated(plan: Plan, block: Block, z: Tensor) -> Rates:
    """The rates of a block, by its steps repeated from ``z``."""
    residuals: list[Residuals] = []
    _repeat(plan, block, z, residuals)
    stages = plan.adjoint.stack(residuals, block.stage_times)
    return rates_of(plan, stages, block.stage_times, log_det=False, graph=True)


def _repeat(plan: Plan, block: Block, z: Tensor, residuals: list[Residuals] | None = None) -> Tensor:
    """Repeats the steps of a block from ``z``, noting ``residuals`` if given; returns the state at its end."""
    steps, terms = Steps(plan.table, z), plan.adjoint.time_terms(block.stage_times)
    evaluated = 0
    for step in block.steps:
        steps.start(step.dt)
        for i, stage in enumerate(step.stages):
            if stage < evaluated:  # the last stage of the step before
                steps.carry()
                continue
            _, found = plan.adjoint.velocity(steps.stage(i, z) if i else z, terms[stage], steps.each[i])
            if residuals is not None:
                residuals.append(found)
            plan.caller_stats.nfe_backward += 1
            evaluated = stage + 1
        z = steps.end(z)
    return z


def _through_steps(
    plan: Plan, taken: Sequence[Step], pullback: Pullback, ys_bar: Tensor, injected: Tensor | None, end_bar: Tensor
) -> Tensor:
    """The discrete adjoint of some steps.

    Args:
        plan: What was solved.
        taken: The steps.
        pullback: The adjoint of their stages; afterwards every stage is pulled.
        ys_bar: Cotangents of the outputs.
        injected: Cotangents of z at every stage that do not come from its velocity.
        end_bar: Cotangent of the state at the end.

    Returns:
        The cotangent of the state at the start ``[K, n, D]``.
    """
    table = plan.table
    q, shape = table.size, ys_bar.shape[1:]
    # A step of an adaptive method begins with the last stage of its predecessor, but for where rates jump.
    lasts = {step.stages[-1] for step in taken}
    carried, carried_to = None, -1

    def pulled(stage: int, k_bar: Tensor) -> Tensor:
        back = pullback.pull(stage, k_bar)
        return back if injected is None else back + injected[:, stage]

    if q == 1:  # what the general way does at some cost
        for step in reversed(taken):
            for output, _ in step.outputs:
                end_bar = end_bar + ys_bar[output]
            end_bar = end_bar + pulled(step.stages[0], step.dt * end_bar)
        return end_bar
    # A line for each cotangent that reaches something beyond the k of a stage: those of the later stages, which come from
    # the last one upwards, then that of the end and those of the outputs.
    lines = ys_bar.new_empty(q + max(len(step.outputs) for step in taken), end_bar.numel())
    for step in reversed(taken):
        size = q + len(step.outputs)
        read = read_bar = None
        if step.reads is not None:
            read, read_bar = step.reads.pull(table, step.dt, ys_bar[step.reads.outputs])
        lines[q - 1] = end_bar.reshape(-1)
        for line, (output, _) in enumerate(step.outputs, q):
            lines[line] = ys_bar[output].reshape(-1)
        weights = np.stack([*table.a[1:], table.b, *(inside for _, inside in step.outputs)]) * step.dt  # [lines, q]
        columns = torch.tensor(weights.T.copy(), dtype=lines.dtype, device=lines.device).unbind(0)
        for i in range(q - 1, -1, -1):
            k_bar = torch.mv(lines[i:size].mT, columns[i][i:]).view(shape)
            if read is not None:
                k_bar += read[i]
            if carried is not None and step.stages[i] == carried_to:
                k_bar += carried
                carried = None
            if i == 0 and plan.solver.adaptive and (step.stages[0] in lasts or step is taken[0]):
                carried, carried_to = k_bar, step.stages[0]
                end_bar = lines[:size].sum(0).view(shape)
                break
            back = pulled(step.stages[i], k_bar)
            if i:
                lines[i - 1] = back.reshape(-1)
            else:
                end_bar = lines[:size].sum(0).view(shape) + back
        if read_bar is not None:
            end_bar = end_bar + read_bar
    if carried is not None:
        end_bar = end_bar + pulled(carried_to, carried)
    return end_bar
