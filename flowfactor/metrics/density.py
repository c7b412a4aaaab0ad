"""How good a density is: its distance from a known one, whether it is one at all, and whether its map inverts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowfactor._checks import check_count
from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.metrics.estimates import CONFIDENCE, Estimate, mean_bounds, standard_error

_CHUNK = 8192


@torch.no_grad()
def kl_divergence(p: Distribution, q: Distribution, x: Tensor) -> Estimate:
    r"""The divergence $KL(p|q) = E_p[\ln p(x) - \ln q(x)]$ of a density q from a known one, in nats.

    Args:
        p: The known distribution.
        q: The estimate, such as `LatentFlow.density`.
        x: Points drawn from p, ``[N, D]``, which q has not been trained on.

    Returns:
        The mean over the points, with the normal 95% interval. It may fall below 0 by chance, and far below it where q is
        no density (see `mass_on_grid`) or x does not come from p.

    Raises:
        ValueError: If ``x`` are not at least two points ``[N, D]``, or a density is NaN somewhere.

    Example:
        >>> import torch, flowfactor as ff
        >>> from torch.distributions import Independent, Normal
        >>> p, q = (Independent(Normal(m * torch.ones(2), torch.ones(2)), 1) for m in (0.0, 0.5))
        >>> kl = ff.metrics.kl_divergence(p, q, p.sample((4000,)))
        >>> kl.low < 0.25 < kl.high                                              # |0.5 (1, 1)|^2 / 2
        True
    """
    _check_points("x", x)
    gaps = torch.cat([p.log_prob(part) - q.log_prob(part) for part in x.split(_CHUNK)])
    if bool(gaps.isnan().any()):
        raise ValueError(f"the difference of log-densities is NaN, first at point {int(gaps.isnan().nonzero()[0])}")
    return _mean(gaps)


@dataclass(frozen=True)
class GridMass:
    """The integral of a density over a box.

    Attributes:
        value: The integral by the trapezoidal rule; 1 for a density whose mass lies in the box.
        spread: How far it is from that on a grid of half as many steps: where this is not small the grid is too coarse.
        points: Points along each axis.

    Example:
        >>> import flowfactor as ff
        >>> print(ff.metrics.GridMass(1.0, 0.001, 101))
        1.0000 (spread 0.0010, 101 points an axis)
    """

    value: float
    spread: float
    points: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4f} (spread {self.spread:.4f}, {self.points} points an axis)"

    def as_dict(self) -> dict[str, float]:
        """The figures as JSON values."""
        return {"value": self.value, "spread": self.spread, "points": self.points}


@torch.no_grad()
def mass_on_grid(
    q: Distribution, low: Sequence[float] | Tensor, high: Sequence[float] | Tensor, points: int = 201
) -> GridMass:
    """Integrates a density of the plane over a box: less than 1 lacks mass, more than 1 is no density.

    A wrong log-determinant shows here, whatever likelihood it claims.

    Args:
        q: A distribution of points ``[2]``.
        low: The box's lower corner, two numbers.
        high: Its upper corner.
        points: Points along each axis, odd.

    Returns:
        The mass and its spread.

    Raises:
        ValueError: If q is not of the plane, the box is empty, or ``points`` is even or below 5.

    Example:
        >>> import torch, flowfactor as ff
        >>> print(ff.metrics.mass_on_grid(ff.data.TwoMoons(), [-3, -3], [3, 3]))
        1.0000 (spread 0.0000, 201 points an axis)
    """
    if tuple(q.event_shape) != (2,) or q.batch_shape:
        shapes = f"event shape {list(q.event_shape)} and batch shape {list(q.batch_shape)}"
        raise ValueError(f"mass_on_grid takes one distribution of the plane (event shape [2]), got {shapes}")
    if check_count("points", points, 5) % 2 == 0:
        raise ValueError(f"points must be odd, so that every second one makes the coarser grid, got {points}")
    corners = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
    if any(corner.shape != (2,) for corner in corners) or not bool((corners[0] < corners[1]).all()):
        raise ValueError(f"low and high must be two numbers each, low below high, got {low} and {high}")
    x, y = (torch.linspace(float(a), float(b), points, dtype=torch.float64) for a, b in zip(*corners, strict=True))
    grid = torch.cartesian_prod(x, y).to(torch.get_default_dtype())
    density = torch.cat([q.log_prob(part).double().exp() for part in grid.split(_CHUNK)]).reshape(points, points)
    fine, coarse = (float(torch.trapezoid(torch.trapezoid(density[::n, ::n], y[::n]), x[::n])) for n in (1, 2))
    return GridMass(fine, abs(fine - coarse), points)


@torch.no_grad()
def inverse_error(
    flow: LatentFlow,
    z: Tensor,
    t: Tensor | Sequence[float],
    control: Control = 0,
    *,
    context: Context | None = None,
) -> Estimate:
    r"""How far points come back from where they were: $E |f^{-1}(f(z)) - z|$, in units of z (Onken et al. 2021).

    Args:
        flow: The flow.
        z: Points ``[N, D]`` at ``t[0]``.
        t: Times, there; the way back takes them in reverse.
        control: Which flow acts.
        context: What steers it.

    Returns:
        The mean over the points, with the normal 95% interval.

    Raises:
        ValueError: If ``z`` are not at least two points ``[N, D]``.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(2))
        >>> ff.metrics.inverse_error(flow, torch.randn(20, 2), [0.0, 1.0]).value < 1e-4
        True
    """
    _check_points("z", z)
    there = flow(z, t, control, context=context).z[-1]
    back = flow.inverse(there, t, control, context=context).z[-1]
    return _mean((back - z).norm(dim=-1))


def _mean(samples: Tensor) -> Estimate:
    samples = samples.double()
    mean = samples.mean()
    low, high = mean_bounds(mean, standard_error(samples))
    return Estimate(float(mean), float(low), float(high), len(samples), CONFIDENCE)


def _check_points(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) < 2:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be at least two points, shape [N, D], got {got}")
