"""How accurate a flow's solves are: measured by solving again, since steps that are given know no error."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from flowfactor.control import Control
from flowfactor.fields.evaluation import Evaluation
from flowfactor.solver import Solver


class Accuracy:
    """What `LatentFlow` measures of the solver that acts in its mode. It calls itself and its ``inverse``."""

    @torch.no_grad()
    def round_trip_error(
        self: Any, z0: Tensor, t: Tensor | Sequence[float], control: Control = 0, **how: Any
    ) -> Tensor:
        r"""How far there and back misses the start, relative to the way: $\|\hat z_0 - z_0\| \,/ \int \|v\|\,dt$.

        A solver that follows the flow comes back; one that does not, fixed steps that are too long above all, has
        log-determinants and densities that belong to no map.

        Args:
            z0: States at ``t[0]``, ``[*batch, D]``.
            t: Times in frames, as for a solve.
            control: Which flow acts.
            **how: Further arguments of the solves, such as a context.

        Returns:
            One ratio a sample, ``[*batch]``, without gradients; 0 for a sample that rests and comes back.

        Raises:
            TypeError: As a solve.
            ValueError: As a solve.
            FlowSolveError: If a solve fails.

        Example:
            >>> import torch, flowfactor as ff
            >>> field = ff.fields.from_module(lambda z, t: -z, dim=2)
            >>> coarse = ff.LatentFlow(field, ff.Solver("euler"))        # one step: z goes to 0, and stays there
            >>> coarse.round_trip_error(torch.ones(3, 2), [0.0, 1.0])
            tensor([1., 1., 1.])
        """
        there = self(z0, t, control, costs={"length": _Speed()}, **how)
        back = self.inverse(there.z[-1], t, control, **how)
        missed, length = (back.z[-1] - z0).norm(dim=-1), there.costs["length"][-1]
        return torch.where(missed == 0, missed, missed / length)

    @torch.no_grad()
    def solver_error(self: Any, z0: Tensor, t: Tensor | Sequence[float], control: Control = 0, **how: Any) -> Tensor:
        """How far the states at the last time lie from those of an accurate solve.

        The accurate solve is dopri5's at a tolerance of 1e-8, or of 10 roundings of the state's dtype where that is more
        (1.2e-6 in float32).

        Args:
            z0: States at ``t[0]``, ``[*batch, D]``.
            t: Times in frames, as for a solve.
            control: Which flow acts.
            **how: Further arguments of the solves, such as a context.

        Returns:
            One distance a sample, ``[*batch]``, in units of the states, without gradients.

        Raises:
            TypeError: As a solve.
            ValueError: As a solve.
            FlowSolveError: If a solve fails.

        Example:
            >>> import torch, flowfactor as ff
            >>> field = ff.fields.from_module(lambda z, t: -z, dim=1)
            >>> coarse = ff.LatentFlow(field, ff.Solver("euler"))        # 0 where the flow goes to 1/e
            >>> coarse.solver_error(torch.ones(1, 1), [0.0, 1.0]).round(decimals=3)
            tensor([0.3680])
        """
        exact = copy(self)
        finest = (
            max(1e-8, 10 * torch.finfo(z0.dtype).eps) if isinstance(z0, Tensor) and z0.is_floating_point() else 1e-8
        )
        exact.solver, exact.evaluation_solver = Solver(rtol=finest, atol=finest), None
        return (self(z0, t, control, **how).z[-1] - exact(z0, t, control, **how).z[-1]).norm(dim=-1)


class _Speed:
    many_stages = True

    def __call__(self, evaluation: Evaluation) -> Tensor:
        return evaluation.velocity.norm(dim=-1)
