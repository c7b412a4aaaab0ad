"""A potential that is convex in the state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.errors import renamed_arguments
from flowfactor.networks.activations import activation_named
from flowfactor.networks.batching import Stack
from flowfactor.networks.stacked import check_sizes, enter_context, own_tensors, uniform
from flowfactor.networks.time import TimeFeatures
from flowfactor.potentials.mlp import TwoLayerPotential


@renamed_arguments(max_period="time_scale")
class ConvexPotential(TwoLayerPotential):
    r"""K input-convex potentials (Amos, Xu and Kolter 2017, eq. 2), convex in z at every t.

    $$u_k(z, t) = w_3 \cdot \sigma(W_2\,\sigma(W_1 z + c_1(t)) + U z + c_2(t))
      + \tfrac12 \sum_r s_r (A_r \cdot z)^2 + b \cdot z$$

    with the softplus $\sigma$ convex and increasing, and $W_2, w_3, s \ge 0$ (each a softplus of a free parameter).
    By Brenier's theorem gradients of convex functions are optimal maps for the quadratic cost.

    Args:
        dim: D.
        num_flows: K.
        hidden: The two hidden sizes.
        rank: Rank of the quadratic term, at least 1.
        time_features: Number of sinusoidal time features, even; 0 for potentials that do not depend on time.
        time_scale: $\tau$, the longest time scale, in frames: the slowest feature is $\sin(t/\tau)$.
        init_scale: Scale of the output weights at the start.
        context: C, the number of features of a context, which enters both layers; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.ConvexPotential(dim=3)
        >>> a, b = torch.randn(2, 100, 3)
        >>> bool((u((a + b) / 2, 0.0) <= (u(a, 0.0) + u(b, 0.0)) / 2 + 1e-6).all())
        True
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        hidden: Sequence[int] = (64, 64),
        *,
        rank: int = 8,
        time_features: int = 16,
        time_scale: float = 100.0,
        init_scale: float = 0.1,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        h1, h2 = check_sizes("hidden", hidden, 2)
        check_sizes("rank", (rank,), 1)
        self._activation = activation_named("softplus")
        self.features = TimeFeatures(time_features, time_scale)
        self.time_features = time_features
        K, g = num_flows, generator
        self.w1 = uniform((K, h1, dim), dim, generator=g)
        if time_features:
            self.v1 = uniform((K, h1, time_features), time_features, generator=g)
        self.b1 = nn.Parameter(torch.zeros(K, 1, h1))
        self.skip = uniform((K, h2, dim), dim, generator=g)
        if time_features:
            self.v2 = uniform((K, h2, time_features), time_features, generator=g)
        self.b2 = nn.Parameter(torch.zeros(K, 1, h2))
        self.raw_w2 = nn.Parameter(_inverse_softplus(torch.rand(K, h2, h1, generator=g) * (2.0 / h1) + 1e-3 / h1))
        self.raw_w3 = nn.Parameter(_inverse_softplus(torch.rand(K, 1, h2, generator=g) * (2 * init_scale / h2) + 1e-6))
        self.quad = uniform((K, rank, dim), dim, generator=g)
        self.raw_scale = nn.Parameter(_inverse_softplus(torch.full((K, 1, rank), init_scale / rank)))
        self.linear = nn.Parameter(torch.zeros(K, 1, dim))
        enter_context(self, "b1", "b2", generator=g)

    def _stack(self) -> Stack:
        raw = own_tensors(self)
        positive = {name[4:]: F.softplus(raw.pop(name)) for name in ("raw_w2", "raw_w3", "raw_scale")}
        return raw | positive


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
