"""Distributions whose density and entropy are known, to measure density estimators against."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from flowfactor._checks import check_count

_CHUNK = 4096


class KnownDensity(Distribution):
    """Base of the distributions of points whose density and entropy are known.

    Args:
        dim: D.
        generator: Source of the draws; PyTorch's own where None.
    """

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        """No parameter is torch's to check."""
        return {}

    @property
    def support(self) -> constraints.Constraint:
        """All vectors."""
        return constraints.real_vector

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        self.dim, self.generator = dim, generator
        super().__init__(event_shape=torch.Size([dim]), validate_args=False)

    def _points(self, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.shape[-1:] != (self.dim,):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{type(self).__name__} is of points [*batch, {self.dim}], got {got}")
        return value


class PlanarMixture(KnownDensity):
    r"""Equal parts of round normals in the plane, $p(x) = \tfrac1M \sum_m N(x; c_m, \sigma^2 I)$.

    Args:
        centres: $c_m$, ``[M, 2]``.
        sigma: The standard deviation of each part, in units of x.
        generator: Source of the draws.

    Raises:
        ValueError: If ``centres`` are no points of the plane, or ``sigma`` is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> one = ff.data.PlanarMixture(torch.zeros(1, 2), sigma=1.0)
        >>> round(one.entropy().item(), 3)                                       # 1 + ln 2 pi
        2.838
    """

    def __init__(self, centres: Tensor, sigma: float, generator: torch.Generator | None = None) -> None:
        if centres.ndim != 2 or centres.shape[-1] != 2 or not len(centres):
            raise ValueError(f"centres must be points of the plane, shape [M, 2], got {list(centres.shape)}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        super().__init__(2, generator)
        self.centres, self.sigma = centres, float(sigma)

    def sample(self, sample_shape: tuple[int, ...] | torch.Size = ()) -> Tensor:
        """Draws points ``[*sample_shape, 2]``."""
        part = torch.randint(len(self.centres), tuple(sample_shape), generator=self.generator)
        noise = torch.randn(*sample_shape, 2, generator=self.generator, dtype=self.centres.dtype)
        return self.centres[part] + self.sigma * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density in nats, ``[*batch]``."""
        points = self._points(value).unsqueeze(-2)
        squares = (points - self.centres.to(value)).square().sum(-1) / self.sigma**2
        constant = math.log(2 * math.pi * self.sigma**2 * len(self.centres))
        return torch.logsumexp(-0.5 * squares, -1) - constant

    def entropy(self) -> Tensor:
        """The entropy in nats, a scalar: by the midpoint rule, whose error is far below 1e-6 on a step of sigma / 4."""
        wide, step = self.centres.double(), self.sigma / 4
        low, high = wide.amin(0) - 9 * self.sigma, wide.amax(0) + 9 * self.sigma
        x, y = (torch.arange(float(a), float(b), step, dtype=torch.float64) for a, b in zip(low, high, strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for points in torch.cartesian_prod(x, y).split(_CHUNK):
            log_p = self.log_prob(points)
            total -= (log_p.exp() * log_p).sum() * step**2
        return total.to(self.centres.dtype)


class TwoMoons(PlanarMixture):
    """Two half circles of radius 1 that reach into each other, blurred by a round normal.

    Each arc is a chain of as many normals as lie closer together than half their width, so that samples and density are
    those of one finite mixture, exactly, and look smooth.

    Args:
        sigma: Width of the blur; the arcs have radius 1.
        generator: Source of the draws.

    Raises:
        ValueError: If ``sigma`` is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> moons = ff.data.TwoMoons(generator=torch.Generator().manual_seed(0))
        >>> moons.log_prob(moons.sample((5,))).shape
        torch.Size([5])
    """

    def __init__(self, sigma: float = 0.1, generator: torch.Generator | None = None) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        count = max(8, math.ceil(2 * math.pi / sigma))
        angle = (torch.arange(count) + 0.5) * math.pi / count
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
        super().__init__(torch.cat([upper, -upper]), sigma, generator)


class EightGaussians(PlanarMixture):
    """Eight round normals on a circle.

    Args:
        radius: Radius of the circle.
        sigma: Standard deviation of each.
        generator: Source of the draws.

    Raises:
        ValueError: If ``sigma`` is not positive.

    Example:
        >>> import flowfactor as ff
        >>> far = ff.data.EightGaussians(radius=9.0, sigma=0.1)                  # apart: ln 8 more than one of them
        >>> round(far.entropy().item() - ff.data.PlanarMixture(far.centres[:1], 0.1).entropy().item(), 3)
        2.079
    """

    def __init__(self, radius: float = 2.0, sigma: float = 0.3, generator: torch.Generator | None = None) -> None:
        angle = torch.arange(8) * math.pi / 4
        super().__init__(radius * torch.stack([angle.cos(), angle.sin()], -1), sigma, generator)


class Banana(KnownDensity):
    r"""Normals that are bent into parabolas, in pairs of coordinates.

    $x_{2i} = y_{2i}$ and $x_{2i+1} = s\,y_{2i+1} + c\,(y_{2i}^2 - 1)$ with y standard normal (Haario, Saksman and Tamminen
    1999 bend one pair so). The map has determinant $s^{D/2}$, so that density and entropy are exact.

    Args:
        dim: D, even.
        curvature: c.
        scale: s, the width across the parabola.
        generator: Source of the draws.

    Raises:
        ValueError: If ``dim`` is odd or ``scale`` not positive.

    Example:
        >>> import flowfactor as ff
        >>> banana = ff.data.Banana(8)
        >>> banana.sample((3,)).shape, round(banana.entropy().item(), 3)
        (torch.Size([3, 8]), 8.579)
    """

    has_rsample = True

    def __init__(
        self, dim: int = 8, curvature: float = 0.5, scale: float = 0.5, generator: torch.Generator | None = None
    ) -> None:
        if check_count("dim", dim, 2) % 2:
            raise ValueError(f"a Banana bends pairs of coordinates: dim must be even, got {dim}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        super().__init__(dim, generator)
        self.curvature, self.scale = float(curvature), float(scale)

    def rsample(self, sample_shape: tuple[int, ...] | torch.Size = ()) -> Tensor:
        """Draws points ``[*sample_shape, D]``."""
        y = torch.randn(*sample_shape, self.dim // 2, 2, generator=self.generator)
        across = self.scale * y[..., 1] + self.curvature * (y[..., 0].square() - 1)
        return torch.stack([y[..., 0], across], -1).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density in nats, ``[*batch]``."""
        along, across = self._points(value).unflatten(-1, (-1, 2)).unbind(-1)
        straight = (across - self.curvature * (along.square() - 1)) / self.scale
        squares = (along.square() + straight.square()).sum(-1)
        return -0.5 * squares - 0.5 * self.dim * math.log(2 * math.pi * self.scale)

    def entropy(self) -> Tensor:
        """The entropy in nats, a scalar."""
        return torch.tensor(0.5 * self.dim * (1 + math.log(2 * math.pi) + math.log(self.scale)))
