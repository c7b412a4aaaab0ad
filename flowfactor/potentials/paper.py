"""The network that the paper uses as its potential."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.errors import renamed_arguments
from flowfactor.networks.activations import activation_named
from flowfactor.networks.batching import Layout, Stack
from flowfactor.networks.outer_tanh_adjoint import OuterTanhAdjoint
from flowfactor.networks.overrides import features_changed, overridden
from flowfactor.networks.probes import Probes
from flowfactor.networks.stacked import enter_context, uniform
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.time import TimeFeatures
from flowfactor.networks.two_layer import two_layer_with_terms
from flowfactor.potentials._stacked import EVALUATION, StackedPotential
from flowfactor.potentials.base import Laplacian


@renamed_arguments(max_period="time_scale")
class PaperPotential(StackedPotential):
    r"""The potential of Song et al. (NeurIPS 2023), as it is; all widths equal D.

    $$u_k(z, t) = \tanh\bigl(w_3 \cdot \tanh(W_2 [\tanh(W_1 z + b_1) + \tau(t)] + b_2) + b_3\bigr), \qquad
      \tau(t) = Q\,\mathrm{GELU}(P\varphi(t) + p) + q$$

    with sinusoidal features $\varphi$. The outer tanh bounds u to [-1, 1], which limits how far a flow can carry a
    state; it is kept here to be compared with. For new work take `MLPPotential`.

    Args:
        dim: D, even where it is the number of time features.
        num_flows: K.
        time_features: Number of sinusoidal time features, even; D where None, as in the paper; 0 for potentials that do not
            depend on time, $\tau = 0$.
        time_scale: The longest time scale, in frames: the slowest feature is the sine of t over it.
        context: C, the number of features of a context, which enters the first layer; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If the number of time features is odd or negative.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.PaperPotential(dim=6, num_flows=3)
        >>> bool(u(torch.randn(100, 6), 2.0, 1).abs().max() <= 1)
        True
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        *,
        time_features: int | None = None,
        time_scale: float = 10_000.0,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        if time_features is None and dim % 2:
            raise ValueError(f"PaperPotential needs an even dim for its sinusoidal time embedding, got {dim}")
        self._activation = activation_named("tanh")
        self.time_features = dim if time_features is None else time_features
        self.features = TimeFeatures(self.time_features, time_scale)
        K, D, g = num_flows, dim, generator
        self.w1 = uniform((K, D, D), D, generator=g)
        self.b1 = nn.Parameter(torch.zeros(K, 1, D))
        if self.time_features:
            self.p = uniform((K, D, self.time_features), self.time_features, generator=g)
            self.p_bias = nn.Parameter(torch.zeros(K, 1, D))
            self.q = uniform((K, D, D), D, generator=g)
            self.q_bias = nn.Parameter(torch.zeros(K, 1, D))
        self.w2 = uniform((K, D, D), D, generator=g)
        self.b2 = nn.Parameter(torch.zeros(K, 1, D))
        self.w3 = uniform((K, 1, D), D, generator=g)
        self.b3 = nn.Parameter(torch.zeros(K, 1))
        enter_context(self, "b1", generator=g)

    def _time_terms(
        self, stack: Stack, *, t: Tensor, derivative: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        if "p" not in stack:
            return stack["b1"], None, stack["b2"], None
        f, df = self.features(t, derivative=derivative)
        a = f @ stack["p"].mT + stack["p_bias"]
        embedding = F.gelu(a) @ stack["q"].mT + stack["q_bias"]
        c2 = embedding @ stack["w2"].mT + stack["b2"]
        if df is None:
            return stack["b1"], None, c2, None
        a_dot = _gelu_prime(a) * (df @ stack["p"].mT)
        return stack["b1"], None, c2, a_dot @ stack["q"].mT @ stack["w2"].mT

    def closed_form(
        self, layout: Layout, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Potential.closed_form`."""
        refusal = overridden(self, PaperPotential, (*EVALUATION, "_time_terms")) or features_changed(self)
        if refusal is not None:
            return refusal

        linear = None if self.time_features else self.features  # without time there is nothing between it and its terms

        def build(stack: Stack) -> OuterTanhAdjoint:
            return OuterTanhAdjoint(
                stack, lambda p: self._bind_stack(p, want | {"gradient"}, laplacian, probe), self._activation,
                self._time_terms, laplacian, probe, "time" in want, linear,
            )  # fmt: skip

        return ClosedForm(layout.select(self._stack())[0], build, takes_skew=True)

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        def terms(t: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
            return self._time_terms(stack, t=t, derivative="time" in want)

        # The outer tanh needs the inner value, and for the Laplacian the inner gradient too.
        inner_want = want | {"value"} | ({"gradient"} if "laplacian" in want else frozenset())
        inner = two_layer_with_terms(stack, self._activation, terms, inner_want, laplacian, probe)
        probes = None if probe is None or laplacian == "exact" else Probes(probe, self.dim)

        def along_squared(g: Tensor) -> Tensor:
            if probes is None:
                return g.square().sum(-1)
            return probes.mean((probes.spread(g) * probes.e).sum(-1, keepdim=True).square()).squeeze(-1)

        def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
            v = inner(z, t)
            u, first, second = self._activation(v["value"] + stack["b3"])
            out = {"value": u()}
            if "gradient" in want:
                out["gradient"] = first.unsqueeze(-1) * v["gradient"]
            if "time" in want:
                out["time"] = first * v["time"]
            if "laplacian" in want:
                g = v["gradient"]
                out["laplacian"] = first * v["laplacian"] + second() * along_squared(g)
            return {name: result for name, result in out.items() if name in want}

        return evaluate


def _gelu_prime(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(a) + a * density
