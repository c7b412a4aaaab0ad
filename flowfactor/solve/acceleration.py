r"""The acceleration along a path, $Dv/Dt = \partial_t v + (\partial v / \partial z)\, v$, by a forward derivative: exact.

One derivative of $v(z, t)$ along the path's own direction $(v, 1)$ gives it, whatever the field is made of. No step depends
on it, so that solves in closed form take it where they take running costs: of many stages at once, beside what is written
out, and with gradients by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowfactor.fields.evaluation import BoundField, Evaluation
from flowfactor.networks.weighted_adjoint import WeightedAdjoint
from flowfactor.solve.clock import ClockAdjoint
from flowfactor.solve.problem import Plan


def acceleration(move: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Dv/Dt of the velocities that ``move`` gives.

    Args:
        move: Velocities ``[*batch, D]`` of states and times.
        z: States ``[*batch, D]``.
        t: Time, a scalar or ``[*batch]``.
        velocity: The velocities there.

    Returns:
        Accelerations ``[*batch, D]``, per frame squared.
    """
    return torch.func.jvp(move, (z, t), (velocity, torch.ones_like(t)))[1]


def accelerated(bound: BoundField, move: BoundField) -> BoundField:
    """A bound field whose evaluations have the acceleration, by ``move``, which has its velocity and little else."""

    def evaluate(z: Tensor, t: Tensor) -> Evaluation:
        found = bound(z, t)
        return replace(found, acceleration=acceleration(lambda z, t: move(z, t).velocity, z, t, found.velocity))

    return evaluate


@dataclass
class StageAccelerations:
    """The accelerations at S stages of a solve in closed form, ``[G, S, n, D]``, and what they depend on."""

    value: Tensor
    z: Tensor
    velocity: Tensor
    inputs: Sequence[Tensor]

    def pull(self, bar: Tensor) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """The cotangents of states, of velocities (``[G, S, n, D]``) and of the adjoint's inputs, of one of the value."""
        if not self.value.requires_grad:
            return None, None, [None] * len(self.inputs)
        leaves = [self.z, self.velocity, *self.inputs]
        found = torch.autograd.grad(self.value, leaves, bar, allow_unused=True, retain_graph=True)
        return found[0], found[1], list(found[2:])


def stage_accelerations(plan: Plan, z: Tensor, t: Tensor, velocity: Tensor, *, graph: bool) -> StageAccelerations:
    """The accelerations at stages.

    Args:
        plan: The solve.
        z: States ``[G, S, n, D]``.
        t: Times ``[G, S, n]``.
        velocity: The velocities there, ``[G, S, n, D]``.
        graph: Whether to keep how they depend on these and on the adjoint's inputs.
    """
    inputs = [x.detach().requires_grad_(graph) for x in plan.adjoint.inputs]
    with torch.set_grad_enabled(graph):
        bound = plan.adjoint.by_autograd(inputs)

        def move(z: Tensor, t: Tensor) -> Tensor:
            return bound(z, t)["velocity"]

        if _as_samples(plan):
            flat = acceleration(move, z.flatten(1, 2), t.flatten(1, 2).contiguous(), velocity.flatten(1, 2))
            value = flat.unflatten(1, z.shape[1:3])
        else:
            times = t.unbind(1) if plan.clock is not None else t[0, :, 0].unbind(0)
            stages = zip(z.unbind(1), times, velocity.unbind(1), strict=True)
            value = torch.stack([acceleration(move, *stage) for stage in stages], 1)
    return StageAccelerations(value, z, velocity, inputs)


def _as_samples(plan: Plan) -> bool:
    """Whether stages can be so many more samples: where nothing has an entry for each sample of a stage."""
    part = plan.adjoint.single if isinstance(plan.adjoint, ClockAdjoint) else plan.adjoint
    weighted = isinstance(part, WeightedAdjoint)
    return part.own_times and not weighted and not plan.contextual and plan.probe is None
