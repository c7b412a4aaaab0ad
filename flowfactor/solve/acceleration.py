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
    inputs: Sequence[Tensor]

    def pull(self, bar: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """The cotangents of the states ``[G, S, n, D]`` and of the adjoint's inputs, of one of the accelerations."""
        if not self.value.requires_grad:
            return None, [None] * len(self.inputs)
        found = torch.autograd.grad(self.value, [self.z, *self.inputs], bar, allow_unused=True, retain_graph=True)
        return found[0], list(found[1:])


def stage_accelerations(plan: Plan, z: Tensor, t: Tensor, *, graph: bool) -> StageAccelerations:
    """The accelerations at stages of states ``z [G, S, n, D]`` and times ``t [G, S, n]``; ``graph`` as for rates."""
    inputs = [x.detach().requires_grad_(graph) for x in plan.adjoint.inputs]
    with torch.set_grad_enabled(graph):
        bound = plan.adjoint.by_autograd(inputs)

        def move(z: Tensor, t: Tensor) -> Tensor:
            return bound(z, t)["velocity"]

        def at(z: Tensor, t: Tensor) -> Tensor:
            return acceleration(move, z, t, move(z, t))

        if _as_samples(plan):
            value = at(z.flatten(1, 2), t.flatten(1, 2).contiguous()).unflatten(1, z.shape[1:3])
        else:
            own = plan.clock is not None
            value = torch.stack([at(z[:, s], t[:, s] if own else t[0, s, 0]) for s in range(z.shape[1])], 1)
    return StageAccelerations(value, z, inputs)


def _as_samples(plan: Plan) -> bool:
    """Whether stages can be so many more samples: where nothing has an entry for each sample of a stage."""
    part = plan.adjoint.single if isinstance(plan.adjoint, ClockAdjoint) else plan.adjoint
    weighted = isinstance(part, WeightedAdjoint)
    return part.own_times and not weighted and not plan.contextual and plan.probe is None
