"""What every velocity field offers to a solver and to running costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control, ResolvedControl
from flowfactor.fields.evaluation import BoundField, Evaluation
from flowfactor.networks import autodiff
from flowfactor.networks.batching import Layout, layout_of, run
from flowfactor.networks.controlled import Controlled
from flowfactor.networks.probes import first_probe, given_probes
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm, StageAdjoint
from flowfactor.networks.unsteady import refuse_unsteady

Divergence: TypeAlias = Literal["exact", "hutchinson"]


class Field(Controlled):
    """K velocity fields v_k(z, t): the base class.

    To write a field of your own, derive from this class and give it `flow_velocity`; its divergence then comes from
    automatic differentiation.

    Args:
        dim: D, the size of a state.
        num_flows: K.
        context: C, the number of features of each sample that `flow_velocity` is given beside state, time and flow, or a
            number for each name; 0 for none.

    Example:
        >>> import torch, flowfactor as ff
        >>> class Spin(ff.fields.Field):
        ...     def flow_velocity(self, z, t, k):
        ...         return torch.stack([-z[..., 1], z[..., 0]], -1)
        >>> path = ff.LatentFlow(Spin(dim=2))(torch.tensor([[1.0, 0.0]]), [0.0, torch.pi / 2])
        >>> bool(torch.allclose(path.z[-1], torch.tensor([[0.0, 1.0]]), atol=1e-4))
        True
    """

    kind_of_part = "field"

    #: Whether `Evaluation.value`, ``gradient`` and ``time`` can be had.
    has_potential: bool = False

    one_method = "flow_velocity"

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        """The velocity of one flow: the one method that a subclass has to give.

        A subclass of a field with closed forms may give it too, and call the original by ``super()``; the divergence then
        comes from automatic differentiation.

        Args:
            z: States ``[*batch, D]``.
            t: Time of each state ``[*batch]``, in frames.
            k: The flow.
            context: The features ``[*batch, C]`` (or one tensor for each name), handed over where the field was built with a
                context.

        Returns:
            v_k(z, t), shape ``[*batch, D]``.
        """
        bind = self._bind_in_closed_form()
        if bind is None:
            raise NotImplementedError(f"{type(self).__name__} must define flow_velocity(z, t, k) -> [*batch, D]")
        return bind(self, ResolvedControl(k, context=context), z.shape[:-1])(z, t).velocity

    def forward(self, z: Tensor, t: float | Tensor, control: Control = 0, *, context: Context | None = None) -> Tensor:
        """Evaluates the velocity v_c(z, t) = sum_k c_k v_k(z, t).

        Args:
            z: States ``[*batch, D]``.
            t: Time in frames: a scalar, or one per sample ``[*batch]``.
            control: Which flow acts.
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                field that was built with ``context=C`` (see `flowfactor.context`).

        Returns:
            Velocities ``[*batch, D]``, per frame.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or a flow does not exist.
        """
        t, resolved = self._checked(z, t, control, context)
        return self.bind(resolved, z.shape[:-1])(z, t).velocity

    def divergence(
        self,
        z: Tensor,
        t: float | Tensor,
        control: Control = 0,
        kind: Divergence = "exact",
        probe: Tensor | None = None,
        *,
        context: Context | None = None,
    ) -> Tensor:
        """The divergence div v_c(z, t).

        Args:
            z: States ``[*batch, D]``.
            t: Time in frames.
            control: Which flow acts.
            kind: ``"exact"``, or ``"hutchinson"`` with the given ``probe``.
            probe: Hutchinson's probe ``[*batch, D]``, or several ``[P, *batch, D]``, over which the estimate is the mean.
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                field that was built with ``context=C`` (see `flowfactor.context`).

        Returns:
            Divergences ``[*batch]``.

        Raises:
            ValueError: If a probe is missing, ``kind`` is unknown, an argument does not fit, or a module of it is in
                training mode and draws at random or looks at the whole batch.
        """
        if kind not in ("exact", "hutchinson"):
            raise ValueError(f'kind must be "exact" or "hutchinson", got {kind!r}')
        if kind == "hutchinson" and probe is None:
            raise ValueError(f'kind="hutchinson" needs a probe of shape {list(z.shape)}')
        refuse_unsteady(self, asked="its divergence asks it")
        t, resolved = self._checked(z, t, control, context)
        probe = given_probes(probe, z) if kind == "hutchinson" and probe is not None else None
        result = self.bind(resolved, z.shape[:-1], divergence=kind, probe=probe)(z, t).divergence
        assert result is not None
        return result

    def closed_form(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """What solves in closed form are made of (see `flowfactor.networks.stage_adjoint`).

        Args:
            layout: Which samples follow which flow; they lie as one block.
            want: Which of ``value`` and ``time`` are wanted beside the velocity and the gradient.
            divergence: How to take the divergence; None for none.
            probe: Hutchinson's probes ``[G, n, P D]``, laid out as a block.

        Returns:
            The closed form, or why there is none.
        """
        return NoClosedForm(
            f"{type(self).__name__} has no closed-form adjoint; its solves are differentiated by autograd"
        )

    def stage_adjoint(
        self, layout: Layout, want: frozenset[str], divergence: Divergence | None, probe: Tensor | None
    ) -> StageAdjoint | NoClosedForm:
        """Binds the field for one solve in closed form; arguments are those of `closed_form`."""
        form = self.closed_form(layout, want, divergence, probe)
        return form if isinstance(form, NoClosedForm) else form.build(form.stack)

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str] = (),
        divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Fixes everything that stays the same over a solve and returns the function that is left.

        Args:
            control: The resolved control.
            batch_shape: Shape of the batch.
            want: Which of ``value``, ``gradient`` and ``time`` a field with a potential shall give beside its velocity.
            divergence: How to take the divergence; None for none.
            probe: Hutchinson's probes, ``[*batch, P D]`` of P for each sample (`flowfactor.networks.probes`).

        Returns:
            A function ``(z [*batch, D], t scalar or [*batch]) -> Evaluation``.
        """
        layout = layout_of(control, batch_shape, self.num_flows, stacked=False)
        single = control.weights is None and not isinstance(control.index, Tensor)
        estimate = probe if divergence == "hutchinson" else None
        probes = [None] * len(layout.flows) if estimate is None else layout.scatter(estimate)

        def function(k: int, probe: Tensor | None, context: Context | None) -> Callable[..., dict[str, Tensor]]:
            one = self._one(k, context)

            def velocity(z: Tensor, t: Tensor) -> Tensor:
                return _checked_velocity(one(z, t.expand(z.shape[:-1])), z)

            def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
                if divergence is None:
                    return {"velocity": velocity(z, t)}
                v, div = autodiff.divergence_of(velocity, z, t, probe)
                return {"velocity": v, "divergence": div}

            return evaluate

        if single:
            # One flow for all: the user's code sees the batch in the shape and order it was given.
            alone = function(layout.flows[0], estimate, control.context)
            return self._finish(lambda z, t: alone(z, t), probe)
        functions = [function(*one) for one in zip(layout.flows, probes, layout.contexts(), strict=True)]
        ndims = {"velocity": 1, "divergence": 0}
        return self._finish(lambda z, t: run(layout, functions, z, t, ndims), probe)

    @staticmethod
    def _finish(evaluate: Callable[[Tensor, Tensor], dict[str, Tensor]], probe: Tensor | None) -> BoundField:
        def bound(z: Tensor, t: Tensor) -> Evaluation:
            first = first_probe(probe, z.shape[-1])
            return Evaluation(z, t, **evaluate(z, t), probe=first, velocity_at=lambda z: evaluate(z, t)["velocity"])

        return bound


class DivergenceFreeField(Field):
    """A field without divergence by construction: what `SkewGradientField` and `SolenoidalField` have in common."""

    def bind_velocity(self, control: ResolvedControl, batch_shape: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """Binds the velocity alone: a function of ``z`` and ``t``."""
        raise NotImplementedError

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str] = (),
        divergence: Divergence | None = None, probe: Tensor | None = None,
    ) -> BoundField:  # fmt: skip
        """Fixes everything that stays the same over a solve (see `Field.bind`)."""
        velocity = self.bind_velocity(control, batch_shape)

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            zero = torch.zeros_like(z[..., 0]) if divergence else None
            first = first_probe(probe, self.dim)
            return Evaluation(z, t, velocity(z, t), zero, probe=first, velocity_at=lambda z: velocity(z, t))

        return evaluate


def _checked_velocity(v: object, z: Tensor) -> Tensor:
    if not isinstance(v, Tensor):
        raise TypeError(f"a field must return a tensor [*batch, {z.shape[-1]}], got {type(v).__name__}")
    if v.shape != z.shape:
        raise ValueError(f"a field must return a velocity of the state's shape {list(z.shape)}, got {list(v.shape)}")
    return v
