"""A residual network with a low-rank quadratic and a linear term."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.networks.activations import activation_named
from flowfactor.networks.batching import Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.row_norms import weighted_row_norms
from flowfactor.networks.stacked import check_sizes, enter_context, one_or_no_time, uniform
from flowfactor.potentials._stacked import StackedPotential
from flowfactor.potentials.base import Laplacian


class ResNetPotential(StackedPotential):
    r"""K potentials of the form of OT-Flow (Onken et al., AAAI 2021, eq. 10).

    With $s = (z, t / \tau)$,

    $$u_k(z, t) = w \cdot N(s) + \tfrac12 |A s|^2 + b \cdot s, \qquad
      u_0 = \sigma(K_0 s + b_0),\quad u_i = u_{i-1} + h\,\sigma(K_i u_{i-1} + b_i),\quad N = u_L$$

    with $\sigma$ the antiderivative of tanh and $h = 1/L$. Derivatives are closed forms: the Laplacian follows the
    Jacobians of the residual layers (ibid., eq. 14), by their columns where D is small.

    Args:
        dim: D.
        num_flows: K.
        width: Size of the hidden layers.
        depth: L, the number of residual layers, at least 1.
        rank: Rank of the quadratic term, at least 1.
        time_features: 1, the time $t / \tau$ itself; 0 for potentials that do not depend on time, $s = z$.
        time_scale: $\tau$, the number of frames that count as one unit of the time input.
        init_scale: Scale of the output weights at the start.
        context: C, the number of features of a context, which enters the first layer; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive, or there are other time features.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.ResNetPotential(dim=5, num_flows=2, width=16, depth=2)
        >>> u.derivatives(torch.zeros(3, 5), 1.0, 1, laplacian="exact").laplacian.shape
        torch.Size([3])
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        *,
        width: int = 64,
        depth: int = 1,
        rank: int = 10,
        time_features: int = 1,
        time_scale: float = 8.0,
        init_scale: float = 0.1,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        check_sizes("width, depth, rank", (width, depth, rank), 3)
        self.time_features = one_or_no_time(time_features, "t / time_scale")
        if not time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {time_scale}")
        self.depth = depth
        self.time_scale = time_scale
        self._activation = activation_named("logcosh")
        K, S, g = num_flows, dim + time_features, generator
        self.opening = uniform((K, width, S), S, generator=g)
        self.opening_bias = nn.Parameter(torch.zeros(K, 1, width))
        self.layers = uniform((K, depth, width, width), width, generator=g)
        self.layer_bias = nn.Parameter(torch.zeros(K, depth, 1, width))
        self.w = uniform((K, 1, width), width, init_scale, generator=g)
        self.quad = uniform((K, rank, S), S, init_scale, generator=g)
        self.linear = nn.Parameter(torch.zeros(K, 1, S))
        enter_context(self, "opening_bias", generator=g)

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        D, h = self.dim, 1.0 / self.depth
        opening, quad, linear, w = stack["opening"], stack["quad"], stack["linear"], stack["w"]
        layers, biases = stack["layers"].unbind(-3), stack["layer_bias"].unbind(-3)
        curvature = _curvature(opening[..., :D], layers, quad[..., :D], h, laplacian, probe)

        def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
            s = z
            if self.time_features:
                s = torch.cat([z, (t / self.time_scale).expand(z.shape[:-1]).unsqueeze(-1)], -1)
            value, first, second = self._activation(s @ opening.mT + stack["opening_bias"])
            firsts, seconds, u = [first], [second], value()
            for layer, bias in zip(layers, biases, strict=True):
                value, first, second = self._activation(u @ layer.mT + bias)
                firsts.append(first)
                seconds.append(second)
                u = u + h * value()
            # Backwards through the layers: g_i is the gradient of w . u_L with respect to u_i.
            g = w.expand(*z.shape[:-1], w.shape[-1])
            gs = [g]
            for layer, first in zip(reversed(layers), reversed(firsts[1:]), strict=True):
                g = g + h * (first * g) @ layer
                gs.append(g)
            gs.reverse()
            projected = s @ quad.mT
            out: dict[str, Tensor] = {}
            if "value" in want:
                out["value"] = (w * u).sum(-1) + 0.5 * projected.square().sum(-1) + (linear * s).sum(-1)
            if "gradient" in want or "time" in want:
                full = (firsts[0] * gs[0]) @ opening + projected @ quad + linear
                out["gradient"] = full[..., :D]
                out["time"] = full[..., D:].sum(-1) / self.time_scale  # without time, the sum of nothing
            if "laplacian" in want:
                out["laplacian"] = curvature(firsts, [g * second() for g, second in zip(gs, seconds, strict=True)])
            return {name: result for name, result in out.items() if name in want}

        return evaluate


def _curvature(
    opening: Tensor, layers: tuple[Tensor, ...], quad: Tensor, h: float, laplacian: str | None, probe: Tensor | None
) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """The Laplacian from each layer's ``s'(a)`` and ``g s''(a)``; ``opening`` and ``quad`` act on z alone."""
    if laplacian == "hutchinson":
        assert probe is not None
        probes = Probes(probe, opening.shape[-1])
        start = probes.product(probes.e, opening.mT)
        start_squared = probes.mean(start.square())
        fixed = probes.mean(probes.product(probes.e, quad.mT).square()).sum(-1)

        def estimate(firsts: list[Tensor], moments: list[Tensor]) -> Tensor:
            total = fixed + (moments[0] * start_squared).sum(-1)
            along = probes.spread(firsts[0]) * start
            for layer, first, moment in zip(layers, firsts[1:], moments[1:], strict=True):
                step = probes.product(along, layer.mT)
                total = total + h * (moment * probes.mean(step.square())).sum(-1)
                along = along + h * probes.spread(first) * step
            return total

        return estimate
    if laplacian is None:
        return lambda firsts, moments: moments[0].sum(-1) * 0

    norms = opening.square().sum(-1).unsqueeze(-2)
    constant = quad.square().sum((-2, -1)).unsqueeze(-1)
    rows_of_one = weighted_row_norms(layers[0], opening) if len(layers) == 1 else None
    width, dim = opening.shape[-2:]
    follow = _by_columns if 3 * dim <= 4 * width else _by_matrices  # where measured times cross

    def exact(firsts: list[Tensor], moments: list[Tensor]) -> Tensor:
        total = constant + (moments[0] * norms).sum(-1)
        if rows_of_one is not None:
            return total + h * rows_of_one(firsts[0], moments[1])
        # Not strict: asking for one more would take a step that nobody needs.
        for moment, squares in zip(moments[1:], follow(opening, layers, firsts, h), strict=False):
            total = total + h * (moment * squares).sum(-1)
        return total

    return exact


def _by_columns(opening: Tensor, layers: tuple[Tensor, ...], firsts: list[Tensor], h: float) -> Iterator[Tensor]:
    r"""The squared norms of the rows of $K_i\,du_{i-1}/dz$, ``[*stack, n, width]`` of each layer, by the D columns of it."""
    columns = opening.mT.unsqueeze(-3) * firsts[0].unsqueeze(-2)  # [*stack, n, D, width]
    for layer, first in zip(layers, firsts[1:], strict=True):
        step = (columns.flatten(-3, -2) @ layer.mT).unflatten(-2, columns.shape[-3:-1])
        yield step.square().sum(-2)
        columns = columns + h * first.unsqueeze(-2) * step


def _by_matrices(opening: Tensor, layers: tuple[Tensor, ...], firsts: list[Tensor], h: float) -> Iterator[Tensor]:
    """See `_by_columns`; $du_i/dz = M_i K_0$ is followed through M alone, which meets the Gram matrix of K_0."""
    gram = (opening @ opening.mT).unsqueeze(-3)
    matrices = firsts[0].unsqueeze(-1) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for layer, first in zip(layers, firsts[1:], strict=True):
        step = layer.unsqueeze(-3) @ matrices  # [*stack, n, width, width]
        yield ((step @ gram) * step).sum(-1)
        matrices = matrices + h * first.unsqueeze(-1) * step
