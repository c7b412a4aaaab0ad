"""The default potential: a stacked network with two hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.errors import renamed_arguments
from flowfactor.networks.activations import Activation, activation_named
from flowfactor.networks.batching import Layout, Stack
from flowfactor.networks.overrides import features_changed, overridden
from flowfactor.networks.stacked import check_sizes, enter_context, uniform
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.time import TimeFeatures
from flowfactor.networks.two_layer import time_terms, two_layer
from flowfactor.networks.two_layer_adjoint import TwoLayerAdjoint
from flowfactor.potentials._stacked import EVALUATION, StackedPotential
from flowfactor.potentials.base import Laplacian


class TwoLayerPotential(StackedPotential):
    """Base of the potentials whose stack `two_layer` evaluates."""

    _activation: Activation
    features: TimeFeatures

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        return two_layer(stack, self._activation, self.features, want, laplacian, probe)


@renamed_arguments(max_period="time_scale")
class MLPPotential(TwoLayerPotential):
    r"""K potentials, each a network with two smooth hidden layers plus a low-rank quadratic and a linear term.

    $$u_k(z, t) = w_3 \cdot \sigma(W_2\,\sigma(W_1 z + V_1\varphi(t) + b_1) + V_2\varphi(t) + b_2)
      + \tfrac12 \sum_r s_r (A_r \cdot z)^2 + b \cdot z$$

    with sinusoidal time features $\varphi$. The K networks are stacked tensors, and value, gradient, time derivative
    and Laplacian come in closed form from one pass. The quadratic term gives the linear part of a flow (scaling,
    squeezing) without the network having to build it; its signs are free.

    Args:
        dim: D, the size of a state.
        num_flows: K.
        hidden: The two hidden sizes.
        rank: Rank of the quadratic term; 0 leaves it and the linear term out.
        time_features: Number of sinusoidal time features, even; 0 for potentials that do not depend on time.
        time_scale: $\tau$, the longest time scale, in frames: the slowest feature is $\sin(t/\tau)$.
        activation: ``"logcosh"`` (the antiderivative of tanh, so that the velocity is a tanh network),
            ``"softplus"`` or ``"tanh"``.
        init_scale: Scale of the output layer at the start; small values start near the identity flow.
        context: C, the number of features of a context, which enters the first layer; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive or the activation is unknown.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.MLPPotential(dim=32, num_flows=3, hidden=(64, 64))
        >>> u(torch.zeros(10, 32), 0.0, torch.arange(10) % 3).shape
        torch.Size([10])
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
        activation: str = "logcosh",
        init_scale: float = 0.1,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        h1, h2 = check_sizes("hidden", hidden, 2)
        if rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        self.activation = activation
        self._activation = activation_named(activation)
        self.features = TimeFeatures(time_features, time_scale)
        self.time_features = time_features
        K, g = num_flows, generator
        self.w1 = uniform((K, h1, dim), dim, generator=g)
        if time_features:
            self.v1 = uniform((K, h1, time_features), time_features, generator=g)
        self.b1 = nn.Parameter(torch.zeros(K, 1, h1))
        self.w2 = uniform((K, h2, h1), h1, generator=g)
        if time_features:
            self.v2 = uniform((K, h2, time_features), time_features, generator=g)
        self.b2 = nn.Parameter(torch.zeros(K, 1, h2))
        self.w3 = uniform((K, 1, h2), h2, init_scale, generator=g)
        if rank:
            self.quad = uniform((K, rank, dim), dim, generator=g)
            self.scale = uniform((K, 1, rank), rank, init_scale, generator=g)
            self.linear = nn.Parameter(torch.zeros(K, 1, dim))
        enter_context(self, "b1", generator=g)

    def closed_form(
        self, layout: Layout, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Potential.closed_form`."""
        refusal = overridden(self, MLPPotential, EVALUATION) or features_changed(self)
        if refusal is not None:
            return refusal
        terms = partial(time_terms, features=self.features)

        def build(stack: Stack) -> TwoLayerAdjoint:
            return TwoLayerAdjoint(
                stack, lambda p: self._bind_stack(p, want | {"gradient"}, laplacian, probe), self._activation, terms,
                laplacian, probe, "time" in want, self.features,
            )  # fmt: skip

        kind = (MLPPotential, self.activation, self.features.time_scale)
        # Parts that are evaluated together would all pay for the Laplacian of one.
        return ClosedForm(layout.select(self._stack())[0], build, kind if laplacian is None else None, takes_skew=True)
