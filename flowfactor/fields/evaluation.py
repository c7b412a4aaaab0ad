"""What one evaluation of a field gives, to solvers and to running costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from flowfactor.context import Context


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a field at a stage of a solve; what running costs are computed from.

    Attributes:
        z: States ``[*batch, D]``.
        t: Time, a scalar tensor or ``[*batch]``, in frames.
        velocity: dz/dt, ``[*batch, D]``, per frame.
        divergence: div v ``[*batch]``, exact or estimated; None where neither a log-determinant nor a
            cost asked for it (``needs = ("divergence",)``).
        value: u ``[*batch]`` of a field with a potential, where asked for.
        gradient: grad u ``[*batch, D]`` of a field with a potential.
        time: du/dt ``[*batch]`` of a field with a potential, where asked for.
        acceleration: Dv/Dt = dv/dt + (v . grad) v along the path, ``[*batch, D]``, per frame squared, where a cost asked
            for it (``needs = ("acceleration",)``).
        probe: The Rademacher probe ``[*batch, D]`` that is fixed for the solve, where one was drawn; the first of several.
        context: The context of the samples ``[*batch, C]``, or such a tensor for each name, where the solve has one. A cost
            with ``many_stages = True`` is given it where it asks for it by ``needs = ("context",)``.
        velocity_at: The bound field ``z -> velocity`` at this time, for costs that differentiate it.
    """

    z: Tensor
    t: Tensor
    velocity: Tensor
    divergence: Tensor | None = None
    value: Tensor | None = None
    gradient: Tensor | None = None
    time: Tensor | None = None
    probe: Tensor | None = None
    velocity_at: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    context: Context | None = None
    acceleration: Tensor | None = None


BoundField: TypeAlias = Callable[[Tensor, Tensor], Evaluation]
