"""How a solve is laid out: its stretches under one control each, its one packed state, and its plan in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowfactor._checks import choices
from flowfactor.context import Context
from flowfactor.control import Control, PieceControl, Schedule
from flowfactor.fields.base import Field
from flowfactor.fields.evaluation import BoundField, Evaluation
from flowfactor.networks.stage_adjoint import StageAdjoint
from flowfactor.path import FlowPath, SolveStats
from flowfactor.solve.clock import Clock, ClockAdjoint
from flowfactor.solve.reads import Readings
from flowfactor.solve.runge_kutta import Tableau
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solver import Solver

Cost = Callable[[Evaluation], Tensor]
NEEDS = (
    "potential",
    "value",
    "time",
    "divergence",
    "acceleration",
    "probe",
    "context",
)  # what a cost may ask for by its attribute `needs`


def needs_of(costs: Mapping[str, Cost], field: Field) -> frozenset[str]:
    """What the costs of a solve ask for by their attribute `needs`; what the field or no solve has is refused."""
    found: set[str] = set()
    for name, cost in costs.items():
        if not callable(cost):
            raise TypeError(f"cost {name!r} must be a callable of an Evaluation, got {type(cost).__name__}")
        needs = getattr(cost, "needs", ())
        if not isinstance(needs, (tuple, list, set, frozenset)) or not all(isinstance(need, str) for need in needs):
            raise TypeError(f"cost {name!r}: needs must be a tuple of names such as ('value', 'time'), got {needs!r}")
        for need in needs:
            if need not in NEEDS:
                raise ValueError(f"cost {name!r} needs {need!r}, which no solve provides{choices(need, NEEDS)}")
        if "potential" in needs and not field.has_potential:
            raise TypeError(f"cost {name!r} needs a potential, and {type(field).__name__} has none")
        found.update(needs)
    return frozenset(found)


@dataclass(frozen=True)
class Segment:
    """A stretch of a solve under one control; ``times[first:last]`` are wanted.

    Where it ends at a time that is wanted, and there a control switches whose time asks for its gradient, ``switch`` is that
    time: the same number, on which later states depend and the one that is wanted does not.
    Where samples are at times of their own, the times are those of a clock, and where that jumps, ``straight`` is one of a
    single rate for each sample, of the same length, with the reading ``[T, *batch]`` on it at each of the times.
    """

    control: PieceControl
    times: Tensor
    first: int
    last: int
    clock: Clock | None = None
    repeats: list[int] | None = None  # which of the times are wanted, where some are wanted more than once
    switch: Tensor | None = None
    straight: tuple[Clock, Tensor] | None = None


def segments_of(control: Control, t: Tensor) -> list[Segment]:
    """Cuts the times of a solve at the switching times of a schedule."""
    if not isinstance(control, Schedule):
        return [Segment(control, t, 0, len(t))]
    values = t.detach().tolist()
    pieces = control.segments(values[0], values[-1])
    if len(values) == 1:
        return [Segment(control.at(values[0]), t, 0, 1)]
    forward = values[-1] > values[0]
    learned = {float(m.detach()): m.to(t).reshape(1) for m in control.moments if isinstance(m, Tensor)}
    found, begin = [], 0
    for a, b, acting in pieces:
        inside = [j for j in range(begin, len(values)) if (values[j] <= b if forward else values[j] >= b)]
        own = t[begin : begin + len(inside)]
        begin += len(inside)
        leads = bool(inside) and values[inside[0]] == a
        ends = bool(inside) and values[inside[-1]] == b
        parts = [own] if leads else [learned.get(a, t.new_tensor([a])), own]
        if not ends:
            parts.append(learned.get(b, t.new_tensor([b])))
        first = 0 if leads else 1
        switch = learned.get(b) if ends and begin < len(values) else None
        found.append(Segment(acting, torch.cat(parts), first, first + len(inside), switch=switch))
    return found


class Packing:
    """One packed state: z, then the log-determinant, then the costs, in the last dimension."""

    def __init__(self, dim: int, log_det: bool, costs: dict[str, Cost], sign: float) -> None:
        self.dim = dim
        self.log_det = log_det
        self.costs = costs
        self.sign = sign
        self.steered = dim + log_det
        self.quadratures = log_det + len(costs)

    def start(self, z0: Tensor) -> Tensor:
        """The state at the start of a solve, with integrals of zero."""
        return torch.cat([z0, z0.new_zeros((*z0.shape[:-1], self.quadratures))], -1) if self.quadratures else z0

    def rhs(
        self, bound: BoundField, clock: Clock | None = None, context: Context | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The right-hand side of the packed state, for a ``clock`` of one piece where samples have times of their own."""
        if self.steered == self.dim and not self.costs and clock is None:
            return lambda t, y: bound(y, t.to(y.dtype)).velocity

        def packed(t: Tensor, y: Tensor) -> Tensor:
            evaluation = bound(y[..., : self.dim], (t if clock is None else clock.at(t, 0)).to(y.dtype))
            if context is not None and self.costs:
                evaluation = replace(evaluation, context=context)
            parts = [evaluation.velocity]
            if self.log_det:
                assert evaluation.divergence is not None
                parts.append(evaluation.divergence.unsqueeze(-1))
            for name, cost in self.costs.items():
                rate = checked_rate(name, cost(evaluation), y.shape[:-1], y.dtype)
                parts.append((rate if self.sign > 0 else -rate).unsqueeze(-1))
            if clock is None:
                return torch.cat(parts, -1)
            rates = clock.rates[0].to(y.dtype).unsqueeze(-1)
            ours, costs = torch.cat(parts[: 1 + self.log_det], -1), parts[1 + self.log_det :]
            return torch.cat([rates * ours, *(rates.abs() * cost for cost in costs)], -1)

        return packed

    def path(self, ys: Tensor, t: Tensor, stats: SolveStats) -> FlowPath:
        """The path of packed states ``[T, *batch, S]``."""
        # One split, whose gradient is one concatenation: that of every index is as large as the whole path.
        z, *rest = (
            torch.unsafe_split_with_sizes(ys, [self.dim, *[1] * self.quadratures], -1) if self.quadratures else [ys]
        )
        integrals = [x.squeeze(-1) for x in rest]
        log_det = integrals.pop(0) if self.log_det else None
        return FlowPath(t, z, log_det, dict(zip(self.costs, integrals, strict=True)), stats)


@dataclass
class Plan:
    """What a solve in closed form needs to know."""

    contextual: bool = field(kw_only=True)  # whether a context steers the field
    adjoint: StageAdjoint
    table: Tableau
    solver: Solver
    times: list[float]
    log_det: bool
    start: Tensor  # what the integrals hold already, [K, n, Q]: tolerances are relative to it
    costs: Mapping[str, Cost]
    want: frozenset[str]
    probe: Tensor | None
    shares: Tensor | None  # weight of every place in a mean over the batch, where some samples are repeated
    stats: SolveStats
    caller_stats: SolveStats  # what the caller sees, for evaluations of the backward pass
    attempted: int  # steps of the stretches before this one
    differentiable: bool  # whether gradients are on: inside a Function they never are
    by_autograd: Callable[..., Sequence[Tensor]]  # the same solve by autograd, for gradients of gradients
    clock: Clock | None = None  # laid out as the samples are, where they have times of their own
    context: Context | None = None  # laid out as the samples are, where a cost asks for it
    readings: Readings | None = None  # where outputs are read at times of each sample's own
    memory: StepMemory | None = None  # of first steps
    back: Plan | None = None  # how the continuous adjoint goes back, where not as the solve went forward

    @property
    def steered(self) -> bool:
        """Whether the log-determinant takes part in choosing the steps, and so is known with each of them."""
        return self.log_det and self.solver.adaptive

    @property
    def quadratures(self) -> int:
        """Number of integrals along the path."""
        return self.log_det + len(self.costs)

    @property
    def jumps(self) -> bool:
        """Whether the rates of samples at times of their own change at every output, where steps then land."""
        return self.clock is not None and len(self.clock.knots) > 1

    def before(self, end: float, begin: float) -> float:
        """The time of a stage at the ``end`` of a step: where rates jump there, it belongs to what lies before."""
        return just_inside(end, begin) if self.jumps else end

    def times_at(self, ts: Sequence[float], like: Tensor) -> Tensor:
        """The times of all samples at S stages, ``[G, S, n]``."""
        if isinstance(self.adjoint, ClockAdjoint):
            return self.adjoint.times(ts).to(like.dtype).transpose(0, 1)
        return torch.tensor(ts, dtype=like.dtype, device=like.device).reshape(1, -1, 1).expand(like.shape[:-1])

    def rates_at(self, ts: Sequence[float]) -> Tensor | float:
        """By what rates per frame become rates of the solve at S stages: a sign, or ``[G, S, n]``."""
        if isinstance(self.adjoint, ClockAdjoint):
            return self.adjoint.rates(ts).transpose(0, 1)
        return 1.0 if self.times[-1] > self.times[0] else -1.0


def resting(z0: Tensor, t: Tensor, log_det: bool, costs: Mapping[str, Cost], stats: SolveStats) -> FlowPath:
    """The path of an empty batch, or of one time only: nothing moves."""
    z = z0.expand(len(t), *z0.shape).clone()
    zero = (0 * z).sum(-1)  # with a graph, as along any path; a sum of large states would be infinite
    return FlowPath(t.to(z0.dtype), z, zero if log_det else None, {name: zero.clone() for name in costs}, stats)


def checked_rate(name: str, rate: object, batch: torch.Size, dtype: torch.dtype) -> Tensor:
    """What a cost returned, where it is one number per sample that fits the state's dtype; raises otherwise."""
    if not isinstance(rate, Tensor) or rate.shape != batch:
        got = list(rate.shape) if isinstance(rate, Tensor) else type(rate).__name__
        raise ValueError(f"cost {name!r} must return one number per sample, shape {list(batch)}; got {got}")
    if torch.promote_types(rate.dtype, dtype) != dtype:
        raise TypeError(f"cost {name!r} returns {rate.dtype} and the state is {dtype}; convert it with .to(...)")
    return rate


def just_inside(end: float, begin: float) -> float:
    """The time next to ``end`` on the way to ``begin``: never so near to 0 that a processor that flushes takes it for 0."""
    near = math.nextafter(end, begin)
    return near if abs(near) >= 2.0**-1000 else math.copysign(2.0**-1000, begin - end)
