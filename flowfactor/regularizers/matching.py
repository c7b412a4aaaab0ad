"""Losses that fit a field to given states without solving: flow matching and action matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowfactor.context import Context
from flowfactor.control import Control, Schedule
from flowfactor.fields import Field, GradientField
from flowfactor.latent_flow import LatentFlow
from flowfactor.networks.controlled import check_state
from flowfactor.potentials.base import Potential
from flowfactor.registry import Recorded
from flowfactor.solve.times import checked_times


class FlowMatching(Recorded, nn.Module):
    r"""Regresses a velocity on states that are given frame by frame (Lipman et al., ICLR 2023; Tong et al., TMLR 2024).

    $$\int_{t_0}^{t_T} |v(z_s, s) - \dot z_s|^2 \, ds, \qquad
      z_s = \frac{(t_{i+1} - s)\, z_i + (s - t_i)\, z_{i+1}}{t_{i+1} - t_i} \ \text{ for } t_i \le s \le t_{i+1},$$

    per sample, estimated without bias from one time drawn in each interval: one evaluation of the field an interval and no
    solve, whatever the flow. Norms are summed over D. Its minimum over all fields is the mean velocity of the lines that
    meet at a state, $E[\dot z_s | z_s = z]$, whose flow has the lines' density at every time; where lines of one flow do not
    meet, it is their velocity, and the flow follows them. Gradients reach the states too; where these shall be targets
    only, hand over ``z.detach()``.

    Example:
        >>> import torch, flowfactor as ff
        >>> drift = ff.fields.from_module(lambda z, t: torch.full_like(z, 0.5), dim=2)
        >>> z = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])         # frames 0 and 1 of three samples
        >>> ff.regularizers.FlowMatching()(drift, z, [0.0, 1.0])           # |0.5 - 1|^2 in two dimensions
        tensor([0.5000, 0.5000, 0.5000])
    """

    def forward(
        self,
        flow: LatentFlow | Field | Potential,
        z: Tensor,
        t: Tensor | Sequence[float],
        control: Control = 0,
        *,
        context: Context | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Measures how far a field is from the lines between given states.

        Args:
            flow: A flow, field or potential (of which the gradient counts).
            z: States of each frame, ``[T+1, *batch, D]``, at least two.
            t: Their times, as for `LatentFlow`: ``[T+1]``, or those of each sample ``[T+1, *batch]``.
            control: Which flow acts.
            context: What steers the flow, where it was built with a context.
            generator: Source of the times within the intervals.

        Returns:
            Estimates ``[*batch]``, per sample.

        Raises:
            TypeError: If ``flow`` is none of these, or an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        field = flow.field if isinstance(flow, LatentFlow) else flow
        field = GradientField(field) if isinstance(field, Potential) else field
        if not isinstance(field, Field):
            raise TypeError(f"FlowMatching takes a LatentFlow, Field or Potential, got {type(flow).__name__}")
        lines = _Lines.drawn(field, z, t, generator)
        error = field(lines.z, lines.t, control, context=context) - lines.velocity
        return (lines.span.abs() * error.square().sum(-1)).sum(0)


class ActionMatching(Recorded, nn.Module):
    r"""Fits a potential to clouds that move, by their samples alone (Neklyudov et al., ICML 2023, eq. 5).

    $$E\,u(z_{t_0}, t_0) - E\,u(z_{t_T}, t_T)
      + \int_{t_0}^{t_T} E\Bigl[\tfrac12 |\nabla u|^2 + \partial_t u\Bigr](z_s, s)\, ds,$$

    with $z_s$ on the straight lines between given states, as for `FlowMatching`, and one time drawn in each interval; per
    sample, so that the expectation is the batch's mean. The integrand is the Hamilton-Jacobi residual of u. What is
    minimal is the distance of $\nabla u$ from the gradient $\nabla u^*$ that moves the clouds, of all fields that do the one
    of least action:

    $$\tfrac12 \int E\,|\nabla u - \nabla u^*|^2\, ds - \tfrac12 \int E\,|\nabla u^*|^2\, ds .$$

    It never asks for a velocity. Where there is one, $u(z_{t_T}, t_T) - u(z_{t_0}, t_0)$ is the integral of $\partial_t u +
    \nabla u \cdot \dot z_s$ on each line, so that its expectation is half that of `FlowMatching` of $\nabla u$, less the
    lines' action $\tfrac12 \int |\dot z_s|^2 ds$: the two losses have one minimum. They differ in the noise of their
    estimates. Of states that are themselves learned this one has no lower bound, for it falls as they move apart: hand
    them over detached.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.QuadraticPotential(2, S=torch.zeros(2, 2), b=torch.ones(2))     # moves all by (1, 1)
        >>> z = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])
        >>> ff.regularizers.ActionMatching()(u, z, [0.0, 1.0]).tolist()                       # 0 - 2 + 1/2 |(1, 1)|^2
        [-1.0, -1.0, -1.0]
    """

    def forward(
        self,
        flow: LatentFlow | GradientField | Potential,
        z: Tensor,
        t: Tensor | Sequence[float],
        control: Control = 0,
        *,
        context: Context | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Measures a potential against clouds of given states.

        Args:
            flow: A potential, or a flow or field along its gradient.
            z: States of each frame, ``[T+1, *batch, D]``, at least two.
            t: Their times, as for `LatentFlow`: ``[T+1]``, or those of each sample ``[T+1, *batch]``.
            control: Which flow acts; no `Schedule`, whose potential jumps where it switches.
            context: What steers the flow, where it was built with a context.
            generator: Source of the times within the intervals.

        Returns:
            Terms of the loss ``[*batch]``, of which the mean counts; they may be negative.

        Raises:
            TypeError: If ``flow`` is none of these, or an argument has the wrong type.
            ValueError: If the field is no gradient, the control is a schedule, or an argument does not fit.
        """
        u = _potential_of(flow)
        if isinstance(control, Schedule):
            raise ValueError(
                "ActionMatching takes no Schedule, whose potential jumps where it switches: hand over the stretch of each "
                "piece with its own control, and add the losses"
            )
        lines = _Lines.drawn(u, z, t, generator)
        d = u.derivatives(lines.z, lines.t, control, context=context)
        assert d.gradient is not None and d.time is not None
        inside = (lines.span.abs() * (0.5 * d.gradient.square().sum(-1) + d.time)).sum(0)
        first, last = (u(z[i], lines.ends[i], control, context=context) for i in (0, -1))
        return (last - first) * -lines.span.sum(0).sign() + inside


@dataclass(frozen=True)
class _Lines:
    """Straight lines between states, and a point drawn on each.

    Attributes:
        z: The points ``[T, *batch, D]``.
        t: Their times ``[T, *batch]``.
        velocity: The lines' velocities ``[T, *batch, D]``; 0 of those that take no time.
        span: How long they take ``[T, *batch]``, negative where time runs back.
        ends: The first and the last time ``[2, *batch]``.
    """

    z: Tensor
    t: Tensor
    velocity: Tensor
    span: Tensor
    ends: Tensor

    @classmethod
    def drawn(
        cls, part: Field | Potential, z: Tensor, t: Tensor | Sequence[float], generator: torch.Generator | None
    ) -> _Lines:
        """Checks states and times, and draws a time in each interval."""
        check_state(z, part.dim, part)
        if z.ndim < 2 or len(z) < 2:
            raise ValueError(
                f"matching needs the states of two frames or more, [T+1, *batch, {part.dim}]; got shape {list(z.shape)}"
            )
        if not bool(torch.isfinite(z.detach()).all()):
            raise ValueError(f"the states hold NaN or infinity, first in frame {_first_bad(z)}")
        when = checked_times(z[0], t)
        if len(when) != len(z):
            raise ValueError(f"z holds states of {len(z)} frames and t {len(when)} times")
        when = when.to(z).reshape(len(z), *when.shape[1:], *[1] * (z.ndim - 1 - when.ndim)).expand(z.shape[:-1])
        span, way = when.diff(dim=0), z.diff(dim=0)
        s = torch.rand(span.shape, generator=generator, dtype=z.dtype, device=z.device)
        pace = torch.where(span == 0, 0, 1 / torch.where(span == 0, 1, span))
        points, velocity = z[:-1] + s.unsqueeze(-1) * way, way * pace.unsqueeze(-1)
        return cls(points, when[:-1] + s * span, velocity, span, when[[0, -1]])


def _potential_of(flow: object) -> Potential:
    """The potential along whose gradient something moves."""
    part = flow.field if isinstance(flow, LatentFlow) else flow
    if isinstance(part, Potential):
        return part
    if isinstance(part, GradientField) and not part.binds_one_method():
        return part.potential
    if isinstance(part, Field):
        raise ValueError(
            f"ActionMatching fits a potential whose gradient alone moves the states, and a {type(part).__name__} does not "
            "move along one: take a GradientField, or FlowMatching"
        )
    raise TypeError(f"ActionMatching takes a LatentFlow, GradientField or Potential, got {type(flow).__name__}")


def _first_bad(z: Tensor) -> int:
    return int((~torch.isfinite(z.detach())).flatten(1).any(1).nonzero()[0])
