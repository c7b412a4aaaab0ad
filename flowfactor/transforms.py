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

    One solve gives both the mapped states and their log-determinant. The last one is kept until its log-determinant has
    been asked for, so that drawing a sample and its density costs one solve only; once the states, the flow's parameters
    or the gradient mode have changed, it does not count any more. Where the flow's divergence is ``"hutchinson"``,
    log-determinants are unbiased estimates, with a new probe for every solve: densities are then random.

    Args:
        flow: The latent flow.
        t0: Start, in frames; a scalar tensor may ask for its gradient.
        t1: End, in frames, likewise. At the start itself the map is the identity.
        control: Which flow acts.
        cache_size: As for any torch transform, 0 or 1.
        generator: Source of Hutchinson's probes.

    Raises:
        ValueError: If a time is not one finite number.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        flow: LatentFlow,
        t0: float | Tensor,
        t1: float | Tensor,
        control: Control = 0,
        cache_size: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.flow = flow
        self.t0 = one_time("t0", t0)
        self.t1 = one_time("t1", t1)
        self._ends = _number(self.t0), _number(self.t1)
        self.control = control
        self.generator = generator
        self._solved: tuple[Tensor, Tensor, Tensor, object] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowTransform) or self.flow is not other.flow:
            return False
        return self._ends == other._ends and self.control is other.control

    __hash__ = None  # as torch's own transforms: they compare by value

    @property
    def is_identity(self) -> bool:
        """Whether both times are the same."""
        return self._ends[0] == self._ends[1]

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with torch's cache of the last pair switched on or off."""
        if self._cache_size == cache_size:
            return self
        return FlowTransform(self.flow, self.t0, self.t1, self.control, cache_size, self.generator)

    def _times(self) -> Tensor | list[float]:
        if not isinstance(self.t0, Tensor) and not isinstance(self.t1, Tensor):
            return [self.t0, self.t1]
        return torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in (self.t0, self.t1)])

    def _state(self, x: Tensor, y: Tensor) -> object:
        """What a kept solve depends on beside the identity of its ends."""
        tensors = [*self.flow.parameters(), *self.flow.buffers()]
        return x._version, y._version, [tensor._version for tensor in tensors], torch.is_grad_enabled()

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor | None) -> None:
        assert log_det is not None
        self._solved = x, y, log_det, self._state(x, y)

    def _kept(self, *, x: Tensor | None = None, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """The last solve, where it is that of these ends and nothing has changed since."""
        if self._solved is None:
            return None
        own_x, own_y, log_det, state = self._solved
        if (
            (x is not None and own_x is not x)
            or (y is not None and own_y is not y)
            or state != self._state(own_x, own_y)
        ):
            return None
        return own_x, own_y, log_det

    def _call(self, x: Tensor) -> Tensor:
        if self.is_identity:
            return x
        path = self.flow(x, self._times(), self.control, log_det=True, generator=self.generator)
        y = path.z[-1]
        self._keep(x, y, None if path.log_det is None else path.log_det[-1])
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        if self.is_identity:
            return y
        kept = self._kept(y=y)
        if kept is not None:
            return kept[0]
        path = self.flow.inverse(y, self._times(), self.control, log_det=True, generator=self.generator)
        x = path.z[-1]
        self._keep(x, y, None if path.log_det is None else -path.log_det[-1])
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Ln |det dy/dx|, shape ``[*batch]``, from the solve that made the pair where that is known."""
        if self.is_identity:
            return 0 * x.sum(-1)
        kept = self._kept(x=x, y=y)
        if kept is None:
            self._call(x)
            assert self._solved is not None
            kept = self._solved[:3]
        self._solved = None  # its graph is walked once
        return kept[2]


def one_time(name: str, t: float | Tensor) -> float | Tensor:
    """A finite time as a number, or as a scalar tensor where its gradient is asked for; raises ValueError for others."""
    if isinstance(t, Tensor):
        if t.numel() != 1:
            raise ValueError(f"{name} is one time, got a tensor of shape {list(t.shape)}: take one map for each time")
        if t.requires_grad:
            t = t.reshape(())
    if not math.isfinite(_number(t)):
        raise ValueError(f"{name} must be a finite time in frames, got {_number(t)}")
    return t if isinstance(t, Tensor) and t.requires_grad else _number(t)


def _number(t: float | Tensor) -> float:
    return float(t.detach() if isinstance(t, Tensor) else t)
