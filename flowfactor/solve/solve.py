"""A solve from its checked arguments to its path: stretches, the closed form or the general engine for each, the path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control, ResolvedControl, Schedule, resolve
from flowfactor.fields.base import Divergence, Field
from flowfactor.fields.evaluation import BoundField
from flowfactor.networks.probes import rademacher_like
from flowfactor.networks.stage_adjoint import NoClosedForm
from flowfactor.path import FlowPath, SolveStats
from flowfactor.solve.acceleration import accelerated
from flowfactor.solve.closed_form import FAILED, solve_segment, solve_segments
from flowfactor.solve.compiled import program_of
from flowfactor.solve.general import follow
from flowfactor.solve.own_times import own_segments
from flowfactor.solve.problem import Cost, Packing, Segment, resting, segments_of
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solver import Solver


def solve(
    field: Field, solver: Solver, divergence: Divergence, z0: Tensor, t: Tensor, control: Control, *,
    context: Context | None = None, log_det: bool, costs: Mapping[str, Cost], needs: frozenset[str],
    probe: Tensor | None = None, stats: SolveStats | None = None, memory: StepMemory | None = None,
) -> FlowPath:  # fmt: skip
    """Follows a field from ``z0`` at ``t[0]`` through all times; its arguments are those of `LatentFlow`, checked.

    Args:
        field: The field.
        solver: How to solve.
        divergence: How to take the divergence.
        z0: States at ``t[0]``, ``[*batch, D]``.
        t: Times in frames, ``[T]``, strictly monotone, or ``[T, *batch]``, where each sample has times of its own.
        control: Which flow acts.
        context: What steers it, spread over the batch.
        log_det: Whether to carry the log-determinant.
        costs: Running costs by name.
        needs: What they ask for, from `flowfactor.solve.problem.needs_of`.
        probe: Hutchinson's probes, from `probe_of`.
        stats: Where to count, beside what another solve took; None to begin at 0.
        memory: What the solve before found of first steps, where that is to be used.

    Returns:
        The path, time first.

    Raises:
        ValueError: If the control does not fit, the closed form is demanded of a solve that has none, or accelerations of a
            compiled one.
        FlowSolveError: If the solve fails.
    """
    _check_compiled(solver, costs)
    batch, how = z0.shape[:-1], {"dtype": z0.dtype, "device": z0.device}
    stretches = segments_of(control, t) if t.ndim == 1 else own_segments(control, t, batch, field.num_flows, z0)
    if isinstance(control, Schedule):
        z0 = _with_switches(z0, control, solver)
    acting = [resolve(s.control, batch, field.num_flows, **how) for s in stretches]
    acting = [replace(one, context=context) for one in acting]
    stats = SolveStats(method=solver.method) if stats is None else stats
    if z0.numel() == 0 or not stretches or len(t) == 1:
        return resting(z0, t, log_det, costs, stats)
    ascending = t.ndim > 1 or bool(t[-1] > t[0])  # a clock always runs forward
    packing = Packing(field.dim, log_det, dict(costs), sign=1.0 if ascending else -1.0)
    want = needs & {"value", "time", "divergence", "acceleration", "context"}
    task = _Task(field, solver, divergence, packing, want, probe, stats, memory)
    return packing.path(task.states(stretches, acting, packing.start(z0)), t.to(z0.dtype), stats)


def probe_of(
    z0: Tensor,
    divergence: Divergence,
    log_det: bool,
    needs: frozenset[str],
    generator: torch.Generator | None,
    probes: int,
) -> Tensor | None:
    """The probes of a whole solve, for the divergence or a cost that asks for one; None where nothing does."""
    estimated = divergence == "hutchinson" and (log_det or "divergence" in needs)
    return rademacher_like(z0, generator, probes if estimated else 1) if estimated or "probe" in needs else None


def _check_compiled(solver: Solver, costs: Mapping[str, Cost]) -> None:
    """Raises ValueError where a compiled solve is to give accelerations."""
    asking = [name for name, cost in costs.items() if "acceleration" in getattr(cost, "needs", ())]
    if solver.compile and asking:
        raise ValueError(
            f"cost {asking[0]!r} needs the acceleration, by a forward derivative that torch.compile cannot follow for "
            "batches of any size: take a Solver without compile=True"
        )


_ASKED_FOR = NoClosedForm('Solver(engine="general") asks for it')


@dataclass
class _Task:
    """What stays the same over the stretches of a solve."""

    field: Field
    solver: Solver
    divergence: Divergence
    packing: Packing
    want: frozenset[str]
    probe: Tensor | None
    stats: SolveStats
    memory: StepMemory | None

    def states(self, segments: Sequence[Segment], acting: Sequence[ResolvedControl], y: Tensor) -> Tensor:
        """The packed states ``[T, *batch, S]``, from ``y [*batch, S]`` on."""
        how: tuple[Field, Solver, Divergence] = self.field, self.solver, self.divergence
        rest = self.packing, self.want, self.probe, self.stats
        general = self.solver.engine == "general"
        whole = _ASKED_FOR if general else solve_segments(*how, segments, acting, y, *rest)
        if not isinstance(whole, NoClosedForm):
            self.stats.ran("closed form")
            return whole
        outputs = []
        for segment, control in zip(segments, acting, strict=True):
            ys = _ASKED_FOR if general else solve_segment(*how, segment, control, y, *rest, None, self.memory)
            if isinstance(ys, NoClosedForm):
                ys = self._general(segment, control, y, ys)
            else:
                self.stats.ran("closed form")
            outputs.append(ys[segment.first : segment.last] if segment.repeats is None else ys[segment.repeats])
            y = ys[-1]
            if segment.switch is not None:
                y = self._moved_on(segment, control, y)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _moved_on(self, segment: Segment, control: ResolvedControl, y: Tensor) -> Tensor:
        """A state that was wanted where the control switches, as one that moves with the switching time.

        A midpoint step whose length is 0 has the derivatives of the flow in its length, up to the second.
        """
        assert segment.switch is not None
        t = segment.times[-1]
        step = (segment.switch.reshape(()) - t.detach()).to(y.dtype)
        rhs = self.packing.rhs(self._bound(control, y.shape[:-1]), None, control.context)
        return y + step * rhs(t + step / 2, y + step / 2 * rhs(t, y))

    def _bound(self, control: ResolvedControl, batch: torch.Size) -> BoundField:
        kind = self.divergence if self.packing.log_det or "divergence" in self.want else None
        want = self.want - {"divergence", "acceleration", "context"}
        bound = self.field.bind(control, batch, want=want, divergence=kind, probe=self.probe)
        return accelerated(bound, self.field.bind(control, batch)) if "acceleration" in self.want else bound

    def _general(self, segment: Segment, control: ResolvedControl, y: Tensor, why: NoClosedForm) -> Tensor:
        """A stretch by the general engine."""
        demanded = self.solver.engine == "closed form"
        if demanded and why is not FAILED:
            raise _not_closed(why)
        packing, bound = self.packing, self._bound(control, y.shape[:-1])
        program = program_of(self.field) if self.solver.compile else None
        self.stats.ran("general", why.reason)
        parts = (self.field, *packing.costs.values())
        ys = follow(
            self.solver, lambda clock: packing.rhs(bound, clock, control.context), y, segment, packing.steered, self.stats,
            program, parts, self.memory,
        )  # fmt: skip
        if demanded:  # it was to say why the closed form failed, and has not failed itself
            raise _not_closed(why)
        return ys


def _with_switches(z0: Tensor, schedule: Schedule, solver: Solver) -> Tensor:
    """The start, on which hang the switching times that ask for their gradient: it is 0 where none is passed."""
    learned = [m for m in schedule.moments if isinstance(m, Tensor)]
    if not (learned and torch.is_grad_enabled()):
        return z0
    if solver.gradient == "checkpoint":
        raise ValueError(
            'gradient="checkpoint" gives the switching times of a Schedule no gradient; use gradient="direct" or "adjoint"'
        )
    return z0 + 0 * torch.stack([m.to(z0).reshape(()) for m in learned]).sum()


def _not_closed(why: NoClosedForm) -> ValueError:
    return ValueError(
        f'Solver(engine="closed form") cannot do this solve: {why.reason}. With engine="auto" the general engine takes it'
    )
