"""A latent flow between two times as a transform of torch.distributions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints
from torch.utils.weak import WeakTensorKeyDictionary

from flowfactor._functorch import is_wrapped
from flowfactor.context import Context, context_shape
from flowfactor.control import Control, Schedule, control_shape
from flowfactor.fields.base import Divergence, Field
from flowfactor.networks.probes import draw_probes
from flowfactor.path import FlowPath
from flowfactor.solver import Solver


class Flow(Protocol):
    """What a `FlowTransform` needs of a flow, such as a `LatentFlow`."""

    field: Field
    divergence: Divergence
    probes: int

    @property
    def acting_solver(self) -> Solver:
        """How it is solved now."""
        ...

    def __call__(
        self, z0: Tensor, t: Any, control: Control, *, context: Any, log_det: bool, generator: Any
    ) -> FlowPath:
        """Follows it from ``z0`` at ``t[0]``."""
        ...

    def inverse(self, z1: Tensor, t: Any, control: Control, *, context: Any, log_det: bool, generator: Any) -> FlowPath:
        """Follows it back from ``z1`` at ``t[-1]``."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Tensors on which a path depends."""
        ...

    def buffers(self) -> Iterable[Tensor]:
        """Others."""
        ...


class FlowTransform(Transform):
    """The map from states at ``t0`` to states at ``t1`` along a latent flow.

    One solve gives both the mapped states and their log-determinant. The last one is kept as long as the states that came
    out of it live, and until its log-determinant has been asked for, so that drawing a sample and its density costs one
    solve only. The density's gradient then goes to what the sample was drawn from and to the flow; for that in the sample
    itself take ``z.detach().requires_grad_()``. Once the states, the times, the flow's parameters or buffers (compared by
    value), the solver that acts or the gradient mode have changed, the last solve does not count any more; what a field
    holds besides, such as a tensor that a closure captures, goes unseen. Where the flow's divergence is ``"hutchinson"``,
    log-determinants are unbiased estimates, with new probes for every solve: densities are then random.

    Args:
        flow: The latent flow.
        t0: Start, in frames; a scalar tensor may ask for its gradient.
        t1: End, in frames, likewise. At the start itself the map is the identity.
        control: Which flow acts. States are repeated to its batch shape.
        cache_size: As for any torch transform, 0 or 1.
        generator: Source of Hutchinson's probes.
        context: What steers the flow (see `flowfactor.context`). States are repeated to its batch shape.

    Raises:
        ValueError: If a time is not one finite number.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
        >>> there = ff.FlowTransform(flow, 0.0, 1.0)                       # z_1 = e z_0
        >>> z0 = torch.zeros(3, 2)
        >>> there.log_abs_det_jacobian(z0, there(z0)).detach().round(decimals=3)
        tensor([2., 2., 2.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        flow: Flow,
        t0: float | Tensor,
        t1: float | Tensor,
        control: Control = 0,
        cache_size: int = 0,
        generator: torch.Generator | None = None,
        context: Context | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.flow = flow
        self.t0 = one_time("t0", t0)
        self.t1 = one_time("t1", t1)
        self.control = control
        self.generator = generator
        self.context = context
        self._solved: WeakTensorKeyDictionary | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_solved": None}  # torch copies no tensors inside a graph

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowTransform) or self.flow is not other.flow:
            return False
        same = self.control is other.control and self.context is other.context
        return same and self._ends == other._ends

    __hash__ = None  # as torch's own transforms: they compare by value

    @property
    def _ends(self) -> tuple[float, float]:
        return _number(self.t0), _number(self.t1)

    @property
    def is_identity(self) -> bool:
        """Whether both times are the same."""
        return self._ends[0] == self._ends[1]

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with torch's cache of the last pair switched on or off."""
        if self._cache_size == cache_size:
            return self
        return FlowTransform(self.flow, self.t0, self.t1, self.control, cache_size, self.generator, self.context)

    @property
    def has_time_gradients(self) -> bool:
        """Whether a time asks for its gradient."""
        return isinstance(self.t0, Tensor) or isinstance(self.t1, Tensor)

    def _times(self, z: Tensor) -> Tensor:
        dtype = torch.float64 if z.device.type != "mps" else torch.float32
        return torch.stack([torch.as_tensor(t, dtype=dtype, device=z.device).reshape(()) for t in (self.t0, self.t1)])

    def _follow(self, z: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
        """States at the other end, and the log-determinant of the map from ``t0`` to ``t1``."""
        self._solved = None  # so that its graph does not outlive the start of another
        spread = self._spread(z)
        if self.is_identity:
            return self._rest(spread, back)
        follow = self.flow.inverse if back else self.flow
        times = self._times(z) if self.has_time_gradients else self._ends
        path = follow(spread, times, self.control, context=self.context, log_det=True, generator=self.generator)
        assert path.log_det is not None
        end, log_det = path.z[-1], -path.log_det[-1] if back else path.log_det[-1]
        tensors = self._tensors(z, end)
        if not any(is_wrapped(tensor) for tensor in tensors):  # whose values torch.func does not show
            self._solved = WeakTensorKeyDictionary()
            self._solved[end] = z, log_det, back, [_Copy(tensor) for tensor in tensors], self._settings()
        return end, log_det

    def _spread(self, z: Tensor) -> Tensor:
        """States ``[*batch, D]``, repeated where control or context have more batch dimensions, or larger ones."""
        try:
            batch = torch.broadcast_shapes(z.shape[:-1], control_shape(self.control), context_shape(self.context))
        except (RuntimeError, ValueError):
            return z  # the flow says what does not fit
        return z if batch == z.shape[:-1] else z.expand(*batch, z.shape[-1])

    def _rest(self, z: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """The identity, which has gradients in time: those of one Euler step of length 0."""
        if not self.has_time_gradients:
            return z, (0 * z).sum(-1)
        t0, t1 = self._times(z)
        span = (t1 - t0).to(z.dtype)
        estimated = self.flow.divergence == "hutchinson"
        probe = draw_probes(z, self.flow.probes, self.generator) if estimated else None
        at = z, self._ends[0], self.control
        velocity = self.flow.field(*at, context=self.context)
        divergence = self.flow.field.divergence(*at, self.flow.divergence, probe, context=self.context)
        return z + (-span if back else span) * velocity, span * divergence

    def _tensors(self, start: Tensor, end: Tensor) -> list[Tensor]:
        """What a kept solve depends on."""
        times = [t for t in (self.t0, self.t1) if isinstance(t, Tensor)]
        context = self.context.values() if isinstance(self.context, Mapping) else [self.context]
        acting = self.control
        beside = [*acting.moments, *acting.controls] if isinstance(acting, Schedule) else [acting]
        times += [x for x in (*context, *beside) if isinstance(x, Tensor)]
        return [start, end, *times, *self.flow.parameters(), *self.flow.buffers()]

    def _settings(self) -> object:
        return self.flow.acting_solver, self.flow.divergence, self.flow.probes, torch.is_grad_enabled()

    def _kept(self, end: Tensor, *, back: bool) -> tuple[Tensor, Tensor] | None:
        """Start and log-determinant of the last solve, where it led to ``end`` and nothing has changed since."""
        solved = None if self._solved is None else self._solved.get(end)
        if solved is None:
            return None
        start, log_det, went_back, copies, settings = solved
        now = self._tensors(start, end)
        same = went_back == back and settings == self._settings() and len(now) == len(copies)
        # By value: optimizers that write by fused kernels, and writes into .data, leave a tensor's version as it was.
        if not same or not all(copy.is_of(tensor) for copy, tensor in zip(copies, now, strict=True)):
            return None
        return start, log_det

    def _call(self, x: Tensor) -> Tensor:
        return self._follow(x, back=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        kept = self._kept(y, back=False)
        return self._follow(y, back=True)[0] if kept is None else kept[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mapped states and ln |det dy/dx| in one solve.

        Args:
            x: States at ``t0``, ``[*batch, D]``.

        Returns:
            States at ``t1`` ``[*batch, D]``, and the log-determinants ``[*batch]``, both with their gradients.

        Raises:
            FlowSolveError: If the solve fails.

        Example:
            >>> import torch, flowfactor as ff
            >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
            >>> y, log_det = flow.transform(0.0, 1.0).call_and_ladj(torch.zeros(3, 2))
            >>> log_det.detach().round(decimals=3)
            tensor([2., 2., 2.])
        """
        return self._follow(x, back=False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Ln |det dy/dx|, shape ``[*batch]``, from the solve that made the pair where that is known."""
        for start, end, back in ((x, y, False), (y, x, True)):
            kept = self._kept(end, back=back)
            if kept is not None and kept[0] is start:
                self._solved = None  # its graph is walked once
                return kept[1]
        log_det = self._follow(x, back=False)[1]
        self._solved = None
        return log_det


class PushedDistribution(TransformedDistribution):
    r"""A distribution carried along a flow: $\ln q_{t_1}(z) = \ln q_{t_0}(z_{t_0}) - \int \nabla\cdot v\,dt$.

    What `LatentFlow.push` gives. Beside what torch's TransformedDistribution has, a sample and its density come from one
    solve, as zuko's distributions give them.

    Args:
        base: The distribution at the transform's start, of vectors.
        transform: The flow between its two times.
        validate_args: As for any torch distribution.

    Example:
        >>> import torch, flowfactor as ff
        >>> from torch.distributions import Normal
        >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
        >>> q1 = flow.push(Normal(torch.zeros(2), torch.ones(2)), 1.0)
        >>> z, log_q = q1.rsample_and_log_prob((5,))
        >>> z.shape, log_q.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> q1
        PushedDistribution(base=Independent(Normal(...), 1), flow from t=0 to t=1, control=0)
    """

    def __init__(self, base: Distribution, transform: FlowTransform, validate_args: bool | None = None) -> None:
        super().__init__(base, [transform], validate_args=validate_args)
        self.transform = transform

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution, repeated to a batch shape."""
        new: Any = super().expand(batch_shape, self._get_checked_instance(PushedDistribution, _instance))
        new.transform = self.transform
        return new

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draws reparametrized samples with their log-densities, by one solve.

        Gradients of both go to the parameters of the base and of the flow: along the sampled paths, as sampling first and
        taking the density then gives them.

        Args:
            sample_shape: Shape of the draws.

        Returns:
            Samples ``[*sample_shape, *batch, D]`` and log-densities ``[*sample_shape, *batch]``.

        Raises:
            NotImplementedError: If the base has no ``rsample``.
            FlowSolveError: If the solve fails.
        """
        if not self.base_dist.has_rsample:
            raise NotImplementedError(
                f"{type(self.base_dist).__name__} has no rsample, through which gradients would reach its parameters: take "
                "sample_and_log_prob, or a base that has it"
            )
        z0 = self.base_dist.rsample(torch.Size(sample_shape))
        z, log_det = self.transform.call_and_ladj(z0)
        return z, self.base_dist.log_prob(z0) - log_det

    def sample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draws samples with their log-densities, by one solve without gradients.

        Args:
            sample_shape: Shape of the draws.

        Returns:
            Samples ``[*sample_shape, *batch, D]`` and log-densities ``[*sample_shape, *batch]``.

        Raises:
            FlowSolveError: If the solve fails.
        """
        with torch.no_grad():
            z0 = self.base_dist.sample(torch.Size(sample_shape))
            z, log_det = self.transform.call_and_ladj(z0)
            return z, self.base_dist.log_prob(z0) - log_det

    def __repr__(self) -> str:
        (t0, t1), control = self.transform._ends, self.transform.control
        acting = f"{control.dtype} {list(control.shape)}" if isinstance(control, Tensor) else repr(control)
        return f"{type(self).__name__}(base={self.base_dist}, flow from t={t0:g} to t={t1:g}, control={acting})"


def one_time(name: str, t: float | Tensor) -> float | Tensor:
    """A finite time: a number, or the tensor itself where it asks for its gradient; raises ValueError for others."""
    if isinstance(t, Tensor) and t.numel() != 1:
        raise ValueError(
            f"{name} is one time, got a tensor of shape {list(t.shape)}: take one map for each time, or for states at times "
            "of each sample the flow itself, flow(z, t [T, *batch])"
        )
    if not math.isfinite(_number(t)):
        raise ValueError(f"{name} must be a finite time in frames, got {_number(t)}")
    return t if isinstance(t, Tensor) and t.requires_grad else _number(t)


class _Copy:
    """A tensor as it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.of, self.requires_grad, self.value = id(tensor), tensor.requires_grad, tensor.detach().clone()

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is a copy of this tensor, as the tensor is now."""
        same = self.of == id(tensor) and self.requires_grad == tensor.requires_grad
        return same and self.value.shape == tensor.shape and torch.equal(self.value, tensor)


def _number(t: float | Tensor) -> float:
    return float(t.detach() if isinstance(t, Tensor) else t)
