"""A latent flow between two times as a transform of torch.distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from flowfactor.control import Control

if TYPE_CHECKING:
    from flowfactor.latent_flow import LatentFlow


class FlowTransform(Transform):
    """The map from states at ``t0`` to states at ``t1`` along a latent flow.

    One solve gives both the mapped states and their log-determinant; the last one is kept, so that asking for both costs
    one solve only. Where the flow's divergence is ``"hutchinson"``, log-determinants are unbiased estimates, with a new
    probe for every solve: densities are then random.

    Args:
        flow: The latent flow.
        t0: Start, in frames.
        t1: End, in frames.
        control: Which flow acts.
        cache_size: As for any torch transform, 0 or 1.
        generator: Source of Hutchinson's probes.

    Raises:
        ValueError: If a time is not finite or both are equal.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        flow: LatentFlow,
        t0: float,
        t1: float,
        control: Control = 0,
        cache_size: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size)
        t0, t1 = float(t0), float(t1)
        if not (math.isfinite(t0) and math.isfinite(t1)) or t0 == t1:
            raise ValueError(f"a transform needs two different finite times, got t0={t0} and t1={t1}")
        self.flow = flow
        self.t0 = t0
        self.t1 = t1
        self.control = control
        self.generator = generator
        self._solved: tuple[Tensor, Tensor, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowTransform) or self.flow is not other.flow:
            return False
        return (self.t0, self.t1) == (other.t0, other.t1) and self.control is other.control

    __hash__ = None  # as torch's own transforms: they compare by value

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with torch's cache of the last pair switched on or off."""
        if self._cache_size == cache_size:
            return self
        return FlowTransform(self.flow, self.t0, self.t1, self.control, cache_size, self.generator)

    def _call(self, x: Tensor) -> Tensor:
        path = self.flow(x, [self.t0, self.t1], self.control, log_det=True, generator=self.generator)
        y = path.z[-1]
        assert path.log_det is not None
        self._solved = (x, y, path.log_det[-1])
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        path = self.flow.inverse(y, [self.t0, self.t1], self.control, log_det=True, generator=self.generator)
        x = path.z[-1]
        assert path.log_det is not None
        self._solved = (x, y, -path.log_det[-1])
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Ln |det dy/dx|, shape ``[*batch]``, from the solve that made the pair where that is known."""
        if self._solved is None or self._solved[0] is not x or self._solved[1] is not y:
            self._call(x)
        assert self._solved is not None
        return self._solved[2]
