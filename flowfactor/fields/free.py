"""A free velocity network: the control without potential and without PDE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flowfactor.context import Context, ContextSize
from flowfactor.control import ResolvedControl
from flowfactor.errors import renamed_arguments
from flowfactor.fields.base import BoundField, Divergence, Field
from flowfactor.networks.activations import activation_named
from flowfactor.networks.batching import Layout, Stack, layout_of, run
from flowfactor.networks.overrides import features_changed, overridden
from flowfactor.networks.probes import Probes
from flowfactor.networks.stacked import check_sizes, enter_context, own_tensors, uniform
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.time import TimeFeatures
from flowfactor.networks.two_layer import time_terms
from flowfactor.networks.velocity_adjoint import VelocityAdjoint
from flowfactor.potentials.module import list_of_modules


@renamed_arguments(max_period="time_scale")
class FreeField(Field):
    r"""$v_k(z, t) = W_3\,\sigma(W_2\,\sigma(W_1 z + c_1(t)) + c_2(t)) + B z + b$: any velocity, no potential behind it.

    The control of every comparison: what the gradient structure and the Hamilton-Jacobi equation buy shows beside it.
    K networks are stacked; the divergence is a closed form.

    Args:
        dim: D.
        num_flows: K.
        hidden: The two hidden sizes.
        rank: Rank of the linear term $B = P Q^\top$; 0 leaves it out.
        time_features: Number of sinusoidal time features, even; 0 for fields that do not depend on time.
        time_scale: $\tau$, the longest time scale, in frames: the slowest feature is $\sin(t/\tau)$.
        init_scale: Scale of the output layer at the start.
        context: C, the number of features of a context, which enters the first layer; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> ff.fields.FreeField(dim=4, num_flows=3)(torch.zeros(5, 4), 0.0, 2).shape
        torch.Size([5, 4])
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
        if rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        self._activation = activation_named("tanh")
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
        self.w3 = uniform((K, dim, h2), h2, init_scale, generator=g)
        self.bias = nn.Parameter(torch.zeros(K, 1, dim))
        if rank:
            self.q = uniform((K, rank, dim), dim, generator=g)
            self.p = uniform((K, dim, rank), rank, init_scale, generator=g)
        enter_context(self, "b1", generator=g)

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str] = (),
        divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Fixes everything that stays the same over a solve (see `Field.bind`)."""
        layout = layout_of(control, batch_shape, self.num_flows)
        stacks = layout.select(own_tensors(self))
        probes = layout.scatter(probe) if divergence == "hutchinson" and probe is not None else [None] * len(stacks)
        functions = [self._bind_stack(s, divergence, e) for s, e in zip(stacks, probes, strict=True)]
        return self._finish(lambda z, t: run(layout, functions, z, t, {"velocity": 1, "divergence": 0}), probe)

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Field.closed_form`."""
        refusal = overridden(self, FreeField, ("flow_velocity", "bind", "_bind_stack", "_finish"))
        refusal = refusal or features_changed(self)
        if refusal is not None:
            return refusal
        estimate = probe if divergence == "hutchinson" else None

        def build(stack: Stack) -> VelocityAdjoint:
            bind = partial(self._bind_stack, divergence=divergence, probe=estimate)
            return VelocityAdjoint(stack, bind, self.features, divergence, estimate)

        return ClosedForm(layout.select(own_tensors(self))[0], build)

    def _bind_stack(
        self, p: Stack, divergence: Divergence | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        w1, w2, w3 = p["w1"], p["w2"], p["w3"]
        if divergence == "exact":
            # div v = sum_ki s'(a2)_k W2_ki s'(a1)_i (W1 W3)_ik: one bilinear form of the two slopes.
            form = w2 * (w1 @ w3).mT
            linear = (p["p"] * p["q"].mT).sum((-2, -1)).unsqueeze(-1) if "p" in p else None
        elif divergence == "hutchinson":
            assert probe is not None
            probes = Probes(probe, self.dim)
            along1, back3 = probes.product(probes.e, w1.mT), probes.product(probes.e, w3)
            linear = None
            if "p" in p:
                along_q, along_p = probes.product(probes.e, p["q"].mT), probes.product(probes.e, p["p"])
                linear = probes.mean(along_q * along_p).sum(-1)

        def trace(s1: Tensor, s2: Tensor) -> Tensor:
            if divergence == "exact":
                return ((s2 @ form) * s1).sum(-1)
            along2 = probes.product(probes.spread(s1) * along1, w2.mT)
            return (s2 * probes.mean(along2 * back3)).sum(-1)

        def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
            c1, _, c2, _ = time_terms(p, self.features, t, derivative=False)
            h1, s1, _ = self._activation(z @ w1.mT + c1)
            h2, s2, _ = self._activation(h1() @ w2.mT + c2)
            v = h2() @ w3.mT + p["bias"]
            if "p" in p:
                v = v + (z @ p["q"].mT) @ p["p"].mT
            out = {"velocity": v}
            if divergence is None:
                return out
            div = trace(s1, s2)
            out["divergence"] = div if linear is None else div + linear
            return out

        return evaluate


class ModuleField(Field):
    """K velocity fields, each a module or function of the user's; made by `from_module`."""

    def __init__(self, modules: Sequence[Callable[..., Tensor]], dim: int, context: ContextSize = 0) -> None:
        parts = list_of_modules(modules)
        super().__init__(dim, len(parts), context)
        self.parts = parts

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        """Calls the k-th module."""
        return self.parts[k](z, t) if context is None else self.parts[k](z, t, context)


def from_module(
    module: Callable[..., Tensor] | Sequence[Callable[..., Tensor]], dim: int, *, context: ContextSize = 0
) -> Field:
    """Makes a field of any velocity module, or K fields of a list of K modules.

    Args:
        module: A module or function called as ``m(z [*batch, D], t [*batch]) -> [*batch, D]``, or a list of K of them.
        dim: D.
        context: C, the number of features of a context, which modules then take as their third argument,
            ``m(z, t, context [*batch, C])``; or a number for each name, for a mapping of tensors. 0 for none.

    Returns:
        The field. Its divergence comes from automatic differentiation. A solve refuses modules in training mode that draw
        at random or look at the whole batch (BatchNorm, Dropout, ...); random numbers that a ``forward`` draws by itself it
        cannot see.

    Raises:
        TypeError: If something in it cannot be called.
        ValueError: If the list is empty.

    Example:
        >>> import torch, flowfactor as ff
        >>> decay = ff.fields.from_module(lambda z, t: -z, dim=3)
        >>> decay.divergence(torch.zeros(2, 3), 0.0)
        tensor([-3., -3.])
    """
    if isinstance(module, (nn.ModuleList, list, tuple)):
        return ModuleField(list(module), dim, context)
    if not callable(module):
        raise TypeError(f"from_module takes a module or a list of modules, got {type(module).__name__}")
    return ModuleField([module], dim, context)
