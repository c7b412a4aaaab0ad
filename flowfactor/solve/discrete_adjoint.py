"""The way back of a solve by closed forms: the discrete adjoint of the steps that were taken.

A cotangent of z travels back from stage to stage; what the integrals along the path ask of a stage enters it there; and the
gradients of all weights are a few large products over all stages of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowfactor.fields.base import Evaluation
from flowfactor.solve.forward import Block, Plan, Taken
from flowfactor.solve.runge_kutta import Steps


@dataclass
class Rates:
    """Rates of the integrals at S stages.

    Attributes:
        leaves: The field's outputs, from which the graph of the costs begins.
        log_det: Rates of the log-determinant ``[K, S, n]``, where they were asked for.
        costs: Rates of every cost ``[K, S, n]``.
    """

    leaves: dict[str, Tensor]
    log_det: list[Tensor]
    costs: list[Tensor]


def rates_of(plan: Plan, ts: list[float], *, log_det: bool, graph: bool) -> Rates:
    """Rates at the stages that the tape has taken, at the times ``ts``; ``graph`` keeps how costs depend on the field."""
    tape = plan.tape
    if not log_det and not plan.costs:
        return Rates({}, [], [])
    out = tape.outputs(plan.want | {"laplacian"} if log_det else plan.want - {"laplacian"})
    found = [out["laplacian"]] if log_det else []
    if not plan.costs:
        return Rates({}, found, [])
    # Each a leaf of its own: the velocity of a gradient field is the gradient, and its cotangent must not count twice.
    leaves = {name: value.detach().requires_grad_(graph) for name, value in out.items()}
    z = tape.z.detach().requires_grad_(graph)
    leaves["z"] = z
    t = torch.tensor(ts, dtype=z.dtype, device=z.device).reshape(1, -1, 1).expand(z.shape[:-1])
    probe = None if plan.probe is None else plan.probe.unsqueeze(1).expand(z.shape)
    evaluation = Evaluation(
        z, t, leaves["velocity"], leaves.get("laplacian"), leaves.get("value"), leaves.get("gradient"), leaves.get("time"),
        probe,
    )  # fmt: skip
    sign = 1.0 if plan.times[-1] > plan.times[0] else -1.0
    with torch.set_grad_enabled(graph):
        return Rates(leaves, found, [sign * cost(evaluation) for cost in plan.costs.values()])


def cotangents_of(
    plan: Plan, rates: Rates, bars: Tensor, others: Sequence[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor | None]:
    """What cotangents ``bars [Q, K, S, n]`` of the rates ask of the field.

    Returns:
        Cotangents of the field's outputs at all stages, of ``others``, and of z itself.
    """
    nothing: list[Tensor | None] = [None] * len(others)
    cotangents = {"laplacian": bars[0]} if plan.log_det else {}
    pairs = [(r, g) for r, g in zip(rates.costs, bars[plan.log_det :], strict=True) if r.requires_grad]
    if not pairs:
        return cotangents, nothing, None
    live = [x for x in others if x.requires_grad]
    found = torch.autograd.grad(
        [r for r, _ in pairs], [*rates.leaves.values(), *live], [g for _, g in pairs],
        allow_unused=True, retain_graph=True,
    )  # fmt: skip
    z_bar = None
    for name, value in zip(rates.leaves, found, strict=False):
        if value is None:
            continue
        if name == "z":
            z_bar = value
        else:
            cotangents[name] = cotangents[name] + value if name in cotangents else value
    rest = iter(found[len(rates.leaves) :])
    return cotangents, [next(rest) if x.requires_grad else None for x in others], z_bar


class Totals:
    """Gradients of a list of tensors, added up as they come."""

    def __init__(self, size: int) -> None:
        self.values: list[Tensor | None] = [None] * size

    def add(self, more: Sequence[Tensor | None]) -> None:
        """Adds what is there."""
        self.values = [b if a is None else a if b is None else a + b for a, b in zip(self.values, more, strict=True)]


def go_back(
    plan: Plan, blocks: Sequence[Block], kept: Rates | None, bars: tuple[Tensor, Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Goes back through all blocks.

    Args:
        plan: What was solved.
        blocks: Its blocks. Without ``kept``, each is walked forward again before it is walked back.
        kept: The rates of the only block, whose stages are still on the tape.
        bars: Cotangents of the states at the outputs and of the integrals there.
        others: What the costs depend on beside the field.

    Returns:
        Cotangents of the start, of ``others`` and of the tape's inputs.
    """
    ys_bar, integrals_bar = bars
    end_bar = torch.zeros_like(ys_bar[0])
    other_bars, own = Totals(len(others)), Totals(len(plan.tape.inputs))
    starts: list[Tensor] = []
    for last in range(len(blocks) - 1, -1, -1):
        block = blocks[last]
        if kept is None:
            if not starts:
                starts = _starts(plan, blocks, last)
            _again(plan, block, starts.pop(), record=True)
            plan.tape.take(block.stage_times)
        rates = kept or rates_of(plan, block.stage_times, log_det=False, graph=True)
        cotangents: dict[str, Tensor] = {}
        z_bar = None
        if plan.quadratures:
            weights = torch.tensor(block.weights(plan.table, len(plan.times)), dtype=ys_bar.dtype, device=ys_bar.device)
            stage_bars = torch.einsum("ts,qtkn->qksn", weights, integrals_bar)
            cotangents, found, z_bar = cotangents_of(plan, rates, stage_bars, others)
            other_bars.add(found)
        direct = plan.tape.begin(cotangents)
        injected = direct if z_bar is None else z_bar if direct is None else direct + z_bar
        end_bar, lam = _walk_back(plan, block.taken, ys_bar, injected, end_bar)
        own.add(plan.tape.gradients(lam))
    return end_bar + ys_bar[0], other_bars.values, own.values


def _starts(plan: Plan, blocks: Sequence[Block], last: int) -> list[Tensor]:
    """States at the starts of the blocks up to ``last``, from the latest block whose state was kept."""
    first = max(i for i in range(last + 1) if blocks[i].z is not None)
    z = blocks[first].z
    assert z is not None
    starts = [z]
    for block in blocks[first:last]:
        starts.append(_again(plan, block, starts[-1], record=False))
    return starts


def _again(plan: Plan, block: Block, z: Tensor, *, record: bool) -> Tensor:
    """Takes the steps of a block once more, from ``z``; returns the state at its end."""
    tape, steps = plan.tape, Steps(plan.table, z)
    tape.begin_block(False)
    terms = tape.terms(block.stage_times, z)
    looked = 0
    for step in block.taken:
        steps.start(step.dt)
        for i, stage in enumerate(step.stages):
            if stage < looked:  # the last stage of the step before
                steps.carry()
                continue
            at = steps.stage(i, z) if i else z
            tape.velocity(at, terms[stage], record, steps.each[i])
            plan.told.nfe_backward += 1
            looked = stage + 1
        z = steps.end(z)
    return z


def _walk_back(
    plan: Plan, taken: Sequence[Taken], ys_bar: Tensor, injected: Tensor | None, end_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """The discrete adjoint of some steps.

    Args:
        plan: What was solved.
        taken: The steps, whose stages the tape holds.
        ys_bar: Cotangents of the outputs.
        injected: Cotangents of z at every stage that do not come from its velocity.
        end_bar: Cotangent of the state at the end.

    Returns:
        The cotangent of the state at the start ``[K, n, D]``, and that of every stage's velocity.
    """
    tape, table = plan.tape, plan.table
    q, shape = table.size, ys_bar.shape[1:]
    lam = torch.zeros_like(tape.z)
    shared = plan.solver.adaptive  # a step begins with the last stage of its predecessor
    carried = None

    def pulled(stage: int, k_bar: Tensor) -> Tensor:
        lam[:, stage] = k_bar
        back = tape.pull((slice(None), stage), k_bar)
        return back if injected is None else back + injected[:, stage]

    if q == 1:  # what the general way does at some cost
        for step in reversed(taken):
            for output, _ in step.outputs:
                end_bar = end_bar + ys_bar[output]
            end_bar = end_bar + pulled(step.stages[0], step.dt * end_bar)
        return end_bar, lam
    # A row for each cotangent that reaches something beyond the k of a stage: those of the later stages, which come from
    # the last one upwards, then that of the end and those of the outputs.
    rows = lam.new_empty(q + max(len(step.outputs) for step in taken), end_bar.numel())
    for step in reversed(taken):
        size = q + len(step.outputs)
        rows[q - 1] = end_bar.reshape(-1)
        for row, (output, _) in enumerate(step.outputs, q):
            rows[row] = ys_bar[output].reshape(-1)
        weights = np.stack([*table.a[1:], table.b, *(inside for _, inside in step.outputs)]) * step.dt  # [rows, q]
        columns = torch.tensor(weights.T.copy(), dtype=rows.dtype, device=rows.device).unbind(0)
        for i in range(q - 1, -1, -1):
            k_bar = torch.mv(rows[i:size].mT, columns[i][i:]).view(shape)
            if carried is not None and i == q - 1:
                k_bar += carried
            if i == 0 and shared:
                carried = k_bar
                end_bar = rows[:size].sum(0).view(shape)
                break
            back = pulled(step.stages[i], k_bar)
            if i:
                rows[i - 1] = back.reshape(-1)
            else:
                end_bar = rows[:size].sum(0).view(shape) + back
    if carried is not None:
        end_bar = end_bar + pulled(0, carried)
    return end_bar, lam
