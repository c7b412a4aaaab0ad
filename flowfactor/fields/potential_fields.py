"""Fields that potentials drive: gradients, divergence-free skew gradients, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.control import ResolvedControl
from flowfactor.fields._skew import SkewForms, canonical
from flowfactor.fields.base import Divergence, DivergenceFreeField, Field
from flowfactor.fields.evaluation import BoundField, Evaluation
from flowfactor.fields.solenoidal import SolenoidalField
from flowfactor.networks.batching import Layout, layout_of
from flowfactor.networks.overrides import overridden
from flowfactor.networks.probes import first_probe
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.sum_adjoint import SumAdjoint, sum_of
from flowfactor.potentials.base import Potential


class GradientField(Field):
    r"""$v = \nabla u$: the curl-free field of a potential, with divergence $\Delta u$.

    Args:
        potential: The potential u.

    Example:
        >>> import torch, flowfactor as ff
        >>> field = ff.fields.GradientField(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
        >>> field(torch.ones(1, 2), 0.0)
        tensor([[1., 1.]], grad_fn=<...>)
    """

    has_potential = True

    def __init__(self, potential: Potential) -> None:
        _check_potential(potential, "potential")
        super().__init__(potential.dim, potential.num_flows, potential.context_size)
        self.potential = potential

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str] = (),
        divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Fixes everything that stays the same over a solve (see `Field.bind`)."""
        wanted = {*want, "gradient"} | ({"laplacian"} if divergence else set())
        estimate = probe if divergence == "hutchinson" else None
        bound = self.potential.bind(control, batch_shape, want=wanted, laplacian=divergence, probe=estimate)
        first = first_probe(probe, self.dim)

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            d = bound(z, t)
            assert d.gradient is not None
            return Evaluation(
                z, t, d.gradient, d.laplacian, d.value, d.gradient, d.time, first, lambda z: _gradient(bound, z, t)
            )

        return evaluate

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Field.closed_form`."""
        refusal = overridden(self, GradientField, ("flow_velocity", "bind"))
        wanted = want | {"laplacian"} if divergence else want
        estimate = probe if divergence == "hutchinson" else None
        return refusal or self.potential.closed_form(layout, wanted, divergence, estimate)


class SkewGradientField(DivergenceFreeField):
    r"""$v = J \nabla h$ with J antisymmetric: divergence-free by construction for every h.

    $\nabla \cdot (J \nabla h) = \mathrm{tr}(J\,\mathrm{Hess}\,h) = 0$, the trace of an antisymmetric times a symmetric
    matrix. Such a field moves probability without compressing it: it is what rotations need.

    Args:
        potential: The stream potential h.
        skew: ``"learned"`` for a learned $J_k = A_k - A_k^\top$ of each flow, ``"canonical"`` for the fixed symplectic
            pairing of coordinate i with i + D/2 (Hamiltonian dynamics; with odd D the last coordinate rests), or a
            tensor ``[D, D]`` or ``[K, D, D]`` whose antisymmetric part is used.
        generator: Source of the initial J.

    Raises:
        TypeError: If ``potential`` is none.
        ValueError: If ``skew`` is unknown or of the wrong shape.

    Example:
        >>> import torch, flowfactor as ff
        >>> h = ff.potentials.QuadraticPotential(2, S=torch.eye(2))
        >>> ff.fields.SkewGradientField(h, skew="canonical")(torch.tensor([[1.0, 0.0]]), 0.0)
        tensor([[ 0., -1.]], grad_fn=<...>)
    """

    def __init__(
        self, potential: Potential, skew: str | Tensor = "learned", *, generator: torch.Generator | None = None
    ) -> None:
        _check_potential(potential, "potential")
        super().__init__(potential.dim, potential.num_flows, potential.context_size)
        self.potential = potential
        self.forms = SkewForms(skew, self.dim, self.num_flows, generator)

    def bind_velocity(self, control: ResolvedControl, batch_shape: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """Binds the velocity J grad h alone: a function of ``z`` and ``t``."""
        stacked = self.forms()
        if control.weights is not None and stacked is not None:
            # J differs from flow to flow, so that flows are superposed after J has acted.
            flows = [
                self.bind_velocity(ResolvedControl(k, context=control.context), batch_shape)
                for k in range(self.num_flows)
            ]
            weights = control.weights
            return lambda z, t: sum_weighted([flow(z, t) for flow in flows], weights)
        bound = self.potential.bind(control, batch_shape, want=("gradient",))
        if stacked is None:
            return lambda z, t: canonical(_gradient(bound, z, t))
        layout = layout_of(control, batch_shape, self.num_flows)
        forms = [stack["J"] for stack in layout.select({"J": stacked})]

        def rotated(z: Tensor, t: Tensor) -> Tensor:
            gradients = layout.scatter(_gradient(bound, z, t))
            return layout.gather([g @ J.mT for g, J in zip(gradients, forms, strict=True)], 1)

        return rotated

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Field.closed_form`."""
        refusal = overridden(self, SkewGradientField, ("flow_velocity", "bind", "bind_velocity"))
        form = refusal or self.potential.closed_form(layout, frozenset(), None, None)
        if isinstance(form, NoClosedForm):
            return form
        if not form.takes_skew:
            return NoClosedForm(
                f"the closed form of {type(self.potential).__name__} is of its gradient alone, without J"
            )
        skew = self.forms.matrices(next(iter(form.stack.values())))
        stack, part = {**form.stack, "skew": layout.select({"skew": skew})[0]["skew"]}, form.build
        form = replace(form, stack=stack, outputs=("skew",))
        return replace(form, build=lambda stack: SumAdjoint([part(stack)], has_potential=False))


class HelmholtzField(Field):
    r"""$v = \nabla u + \sum_i J_i \nabla h_i$: a gradient plus divergence-free parts, as Helmholtz decomposes a field.

    The form of *Sparse Transformation Analysis* (Song et al. 2025, arXiv 2410.05564), with the second part
    divergence-free by construction instead of by penalty. Its divergence is $\Delta u$, exactly.

    With ``turning``, only the flows that it names have the second part: $v_k = \nabla u_k$ exactly for the others, on which
    no orbit closes where u is without time. Say so of transformations that are lines, and leave circles to the others.

    Args:
        potential: The potential u, on which Hamilton-Jacobi regularizers act.
        *streams: The divergence-free parts, at least one: stream potentials h_i, or any `SolenoidalField`. Parts that take a
            context take the same one.
        skew: The antisymmetric maps, as for `SkewGradientField`.
        turning: The flows that have divergence-free parts, by their index; None for all. The streams of the others stay
            among the parameters, with gradients of zero, and add a velocity of zero.
        generator: Source of the initial maps.

    Raises:
        TypeError: If an argument is no potential, or ``turning`` is no list of integers.
        ValueError: If sizes or numbers of flows differ, there is no stream, or ``turning`` is empty, names a flow twice or
            one that does not exist.

    Example:
        >>> import torch, flowfactor as ff
        >>> make = lambda: ff.potentials.MLPPotential(dim=4, num_flows=3)
        >>> field = ff.fields.HelmholtzField(make(), make())
        >>> field(torch.zeros(5, 4), 0.0, 1).shape
        torch.Size([5, 4])
        >>> field = ff.fields.HelmholtzField(make(), make(), turning=[1, 2])      # flow 0 is the gradient of u alone
        >>> z = torch.randn(5, 4)
        >>> bool((field(z, 0.0, 0) == field.irrotational(z, 0.0, 0)).all())
        True
    """

    has_potential = True
    turns: Tensor | None

    def __init__(
        self,
        potential: Potential,
        *streams: Potential | SolenoidalField,
        skew: str | Tensor = "learned",
        turning: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_potential(potential, "potential")
        super().__init__(potential.dim, potential.num_flows, _shared_context(potential, *streams))
        if not streams:
            raise ValueError(
                "a HelmholtzField needs at least one stream potential beside u; for none take GradientField"
            )
        for i, stream in enumerate(streams):
            if not isinstance(stream, SolenoidalField):
                _check_potential(stream, f"stream {i}")
            if (stream.dim, stream.num_flows) != (self.dim, self.num_flows):
                raise ValueError(
                    f"stream {i} has dim {stream.dim} and {stream.num_flows} flows; "
                    f"the potential has {self.dim} and {self.num_flows}"
                )
        self.irrotational = GradientField(potential)
        self.solenoidal = nn.ModuleList(
            [s if isinstance(s, SolenoidalField) else SkewGradientField(s, skew, generator=generator) for s in streams]
        )
        self.turning = None if turning is None else _checked_flows(turning, self.num_flows)
        turns = None if self.turning is None else torch.tensor([k in self.turning for k in range(self.num_flows)])
        self.register_buffer("turns", turns, persistent=False)  # the settings hold it
        if self.turning is not None:
            self._fill_in(turning=list(self.turning))

    @property
    def potential(self) -> Potential:
        """The potential u of the gradient part."""
        return self.irrotational.potential

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str] = (),
        divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Fixes everything that stays the same over a solve (see `Field.bind`)."""
        return self.bind_parts(control, control, batch_shape, want=want, divergence=divergence, probe=probe)

    def bind_parts(
        self, gradient_control: ResolvedControl, stream_control: ResolvedControl, batch_shape: Sequence[int],
        *, want: Iterable[str] = (), divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Binds the field with a control of its own for the gradient part and for the divergence-free one."""
        gradient = self.irrotational.bind(gradient_control, batch_shape, want=want, divergence=divergence, probe=probe)
        own, turns = self._turned(stream_control)
        acting = self._acting([own.index]) if isinstance(own.index, int) else list(self.solenoidal)
        streams = [part.bind_velocity(own, batch_shape) for part in acting]  # type: ignore[operator]

        def velocity(first: Tensor, z: Tensor, t: Tensor) -> Tensor:
            for stream in streams:
                first = first + (stream(z, t) if turns is None else turns * stream(z, t))
            return first

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            e = gradient(z, t)
            return replace(
                e,
                velocity=velocity(e.velocity, z, t),
                velocity_at=lambda z: velocity(gradient(z, t).velocity, z, t),
            )

        return evaluate

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Field.closed_form`."""
        refusal = overridden(self, HelmholtzField, ("flow_velocity", "bind", "bind_parts"))
        acting = self._acting(layout.flows)
        parts = [part.closed_form(layout, want, divergence, probe) for part in (self.irrotational, *acting)]  # type: ignore[operator]
        parts[1:] = [self._turned_form(part, layout) for part in parts[1:]]
        refusal = refusal or next((part for part in parts if isinstance(part, NoClosedForm)), None)
        return refusal or sum_of([part for part in parts if isinstance(part, ClosedForm)])

    def _turned(self, control: ResolvedControl) -> tuple[ResolvedControl, Tensor | None]:
        """The control of the divergence-free parts, and what says of each sample whether it has them; None for all."""
        if self.turns is None:
            return control, None
        if control.weights is not None:
            return replace(control, weights=control.weights * self.turns), None
        return control, self.turns[0 if control.index is None else control.index].unsqueeze(-1)

    def _acting(self, flows: Sequence[int]) -> list[nn.Module]:
        """The streams, but for flows that have none: with gradients on they stay, so that their parameters get zeros."""
        idle = self.turning is not None and not {*flows} & {*self.turning} and not torch.is_grad_enabled()
        return [] if idle else list(self.solenoidal)

    def _turned_form(self, form: ClosedForm | NoClosedForm, layout: Layout) -> ClosedForm | NoClosedForm:
        """The closed form of a divergence-free part, whose last weights are 0 for flows that have none."""
        if self.turns is None or isinstance(form, NoClosedForm):
            return form
        if not form.outputs:
            return NoClosedForm(
                "the closed form of a stream does not say which of its weights a flow without it takes as 0"
            )
        turns = self.turns[layout.flows]
        masked = {n: x * turns.reshape(-1, *[1] * (x.ndim - 1)) for n, x in form.stack.items() if n in form.outputs}
        return replace(form, stack={**form.stack, **masked})


def sum_weighted(velocities: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Superposes K velocities ``[*batch, D]`` with weights ``[*batch, K]``."""
    return (torch.stack(list(velocities), -1) @ weights.unsqueeze(-1)).squeeze(-1)


def _shared_context(*parts: object) -> ContextSize:
    """The context of a sum: each of its parts takes the same one, or none."""
    taken = [part.context_size for part in parts if isinstance(part, (Potential, Field)) and part.context_dim]
    if any(context != taken[0] for context in taken):
        raise ValueError(f"the parts of a field take one context or none, and these take different ones: {taken}")
    return taken[0] if taken else 0


def _gradient(bound: Callable, z: Tensor, t: Tensor) -> Tensor:
    gradient = bound(z, t).gradient
    assert gradient is not None
    return gradient


def _checked_flows(flows: Sequence[int], num_flows: int) -> tuple[int, ...]:
    """The flows of ``turning`` in order; raises TypeError or ValueError where they are none."""
    whole = isinstance(flows, list | tuple) and all(isinstance(k, Integral) and not isinstance(k, bool) for k in flows)
    if not whole:
        raise TypeError(
            f"turning must be a list of flows by their index, such as [1, 2], or None for all; got {flows!r}"
        )
    if not flows:
        raise ValueError("turning=[] leaves no flow a divergence-free part: take a GradientField instead")
    if len(set(flows)) < len(flows) or min(flows) < 0 or max(flows) >= num_flows:
        raise ValueError(
            f"turning must name flows from 0 to {num_flows - 1}, each once, for {num_flows} flows; got {list(flows)}"
        )
    return tuple(sorted(int(k) for k in flows))


def _check_potential(potential: object, name: str) -> None:
    if not isinstance(potential, Potential):
        raise TypeError(
            f"{name} must be a flowfactor Potential, got {type(potential).__name__}; "
            "wrap a module of your own with flowfactor.potentials.from_module(module, dim)"
        )
