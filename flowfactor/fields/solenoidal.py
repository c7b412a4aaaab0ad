"""Divergence-free velocity fields made of transverse ridge functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.control import ResolvedControl
from flowfactor.errors import renamed_arguments
from flowfactor.fields.base import Divergence, DivergenceFreeField
from flowfactor.networks.activations import activation_named
from flowfactor.networks.batching import Layout, Stack, layout_of, run
from flowfactor.networks.overrides import features_changed, overridden
from flowfactor.networks.ridge_adjoint import RidgeAdjoint
from flowfactor.networks.stacked import enter_context, own_tensors, uniform
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.time import TimeFeatures


@renamed_arguments(max_period="time_scale")
class SolenoidalField(DivergenceFreeField):
    r"""$v_k = \sum_j r_j\,\tanh(w_j \cdot z + c_j(t)) + \sum_i p_i\,(q_i \cdot z)$ with $r_j \perp w_j$, $p_i \perp q_i$.

    Every unit is a ridge function whose velocity is transverse to its own direction, so that each of them, and the sum,
    is free of divergence for any weights: $\nabla\cdot v = \sum_j r_j \cdot w_j\,\tanh'(\cdot) + \sum_i p_i \cdot q_i = 0$.
    In the other direction, the Fourier modes of a divergence-free field are transverse to their wave vectors
    ($k \cdot \hat v(k) = 0$), so that with enough units such a sum comes near every divergence-free field; one
    $J\nabla h$ of a `SkewGradientField` does not. With it, a `HelmholtzField` has both halves of the Helmholtz
    decomposition. K networks are stacked.

    Args:
        dim: D, at least 2.
        num_flows: K.
        hidden: Number of ridge functions.
        rank: Number of linear units; 0 leaves them out.
        time_features: Number of sinusoidal time features, even; 0 for fields that do not depend on time.
        time_scale: $\tau$, the longest time scale, in frames: the slowest feature is $\sin(t/\tau)$.
        init_scale: Scale of the output weights at the start; small values start near the identity flow.
        context: C, the number of features of a context, which enters the first layer; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive, or D is 1, where a field without divergence is constant.

    Example:
        >>> import torch, flowfactor as ff
        >>> field = ff.fields.SolenoidalField(dim=4, num_flows=3)
        >>> jacobian = torch.func.jacrev(lambda z: field(z, 0.5, 2))(torch.ones(4))
        >>> bool(jacobian.trace().abs() < 1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        hidden: int = 256,
        *,
        rank: int = 8,
        time_features: int = 16,
        time_scale: float = 100.0,
        init_scale: float = 0.1,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        if dim < 2:
            raise ValueError(f"dim must be at least 2 for a field without divergence that is not constant, got {dim}")
        if hidden < 1 or rank < 0:
            raise ValueError(f"hidden must be positive and rank must not be negative, got {hidden} and {rank}")
        self._activation = activation_named("tanh")
        self.features = TimeFeatures(time_features, time_scale)
        self.time_features = time_features
        K, g = num_flows, generator
        self.w = uniform((K, hidden, dim), dim, generator=g)
        if time_features:
            self.v = uniform((K, hidden, time_features), time_features, generator=g)
        self.b = nn.Parameter(torch.zeros(K, 1, hidden))
        self.r = uniform((K, hidden, dim), hidden, init_scale, generator=g)
        if rank:
            self.q = uniform((K, rank, dim), dim, generator=g)
            self.p = uniform((K, rank, dim), rank, init_scale, generator=g)
        enter_context(self, "b", generator=g)

    def bind_velocity(self, control: ResolvedControl, batch_shape: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """Binds the velocity alone: a function of ``z`` and ``t``."""
        layout = layout_of(control, batch_shape, self.num_flows)
        functions = [self._bind_stack(stack) for stack in layout.select(self._stack())]
        return lambda z, t: run(layout, functions, z, t, {"velocity": 1})["velocity"]

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Field.closed_form`."""
        methods = ("flow_velocity", "bind", "bind_velocity", "_bind_stack", "_stack")
        refusal = overridden(self, SolenoidalField, methods) or features_changed(self)
        if refusal is not None:
            return refusal

        def bind(p: Stack) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
            bound = self._bind_stack(p)
            return lambda z, t: {**bound(z, t), "divergence": torch.zeros_like(z[..., 0])}

        stack, outputs = layout.select(self._stack())[0], ("r", "p")
        return ClosedForm(stack, lambda stack: RidgeAdjoint(stack, bind, self.features), outputs=outputs)

    def _stack(self) -> Stack:
        """The parameters by name, output weights made transverse."""
        stack = own_tensors(self)
        stack["r"] = transverse(stack["r"], stack["w"])
        if "p" in stack:
            stack["p"] = transverse(stack["p"], stack["q"])
        return stack

    def _bind_stack(self, s: Stack) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
            shift = s["b"]
            if "v" in s:
                f, _ = self.features(t, derivative=False)
                shift = f @ s["v"].mT + shift
            velocity = torch.tanh(z @ s["w"].mT + shift) @ s["r"]
            return {"velocity": velocity + (z @ s["q"].mT) @ s["p"] if "p" in s else velocity}

        return evaluate


def transverse(out: Tensor, along: Tensor) -> Tensor:
    """Takes from every row of ``out [..., D]`` its part along the same row of ``along [..., D]``."""
    share = (out * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return out - share * along
