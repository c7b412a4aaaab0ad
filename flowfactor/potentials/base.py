"""What every potential offers: values and derivatives under any control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control, ResolvedControl
from flowfactor.networks import autodiff
from flowfactor.networks.batching import Layout, layout_of, run
from flowfactor.networks.controlled import Controlled
from flowfactor.networks.probes import check_probes, given_probes, rademacher_like
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.unsteady import refuse_unsteady

Laplacian: TypeAlias = Literal["exact", "hutchinson"]

EVENT_NDIMS = {"value": 0, "gradient": 1, "time": 0, "laplacian": 0}


@dataclass(frozen=True)
class Derivatives:
    """What one evaluation of a potential gives; what was not asked for is None.

    Attributes:
        value: u, shape ``[*batch]``.
        gradient: grad u with respect to z, ``[*batch, D]``.
        time: du/dt, ``[*batch]``, per frame.
        laplacian: lap u = tr Hess u, or Hutchinson's estimate of it, ``[*batch]``.
    """

    value: Tensor | None = None
    gradient: Tensor | None = None
    time: Tensor | None = None
    laplacian: Tensor | None = None


BoundPotential: TypeAlias = Callable[[Tensor, Tensor], Derivatives]


class Potential(Controlled):
    """K scalar potentials u_k(z, t) and their derivatives: the base class.

    To write a potential of your own, derive from this class and give it `flow_potential`; value, gradient, time
    derivative and Laplacian then come from automatic differentiation. (The built-in potentials give them in closed
    form instead.) To use a module that you already have, see `from_module`.

    Args:
        dim: D, the size of a state.
        num_flows: K, the number of potentials.
        context: C, the number of features of each sample that `flow_potential` is given beside state, time and flow, or a
            number for each name; 0 for none.

    Example:
        >>> import torch, flowfactor as ff
        >>> class Well(ff.potentials.Potential):
        ...     def flow_potential(self, z, t, k):
        ...         return -0.5 * (k + 1) * z.square().sum(-1)
        >>> well = Well(dim=2, num_flows=3)
        >>> z = torch.tensor([[1.0, 2.0]])
        >>> well(z, 0.0, 1)
        tensor([-5.])
        >>> well.derivatives(z, 0.0, 1, laplacian="exact").laplacian
        tensor([-4.])
    """

    one_method = "flow_potential"
    kind_of_part = "potential"

    def flow_potential(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        """The potential of one flow: the one method that a subclass has to give.

        A subclass of a potential with closed forms may give it too, and call the original by ``super()``; derivatives then
        come from automatic differentiation.

        Args:
            z: States ``[*batch, D]``.
            t: Time of each state ``[*batch]``, in frames.
            k: The flow.
            context: The features ``[*batch, C]`` (or one tensor for each name), handed over where the potential was built
                with a context.

        Returns:
            u_k(z, t), shape ``[*batch]``.
        """
        bind = self._bind_in_closed_form()
        if bind is None:
            raise NotImplementedError(f"{type(self).__name__} must define flow_potential(z, t, k) -> [*batch]")
        return bind(self, ResolvedControl(k, context=context), z.shape[:-1], want=("value",))(z, t).value

    def forward(self, z: Tensor, t: float | Tensor, control: Control = 0, *, context: Context | None = None) -> Tensor:
        """Evaluates u_c(z, t) = sum_k c_k u_k(z, t).

        Args:
            z: States ``[*batch, D]``.
            t: Time in frames: a scalar, or one per sample ``[*batch]``.
            control: Which flow acts (see `flowfactor.control`).
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                potential that was built with ``context=C`` (see `flowfactor.context`).

        Returns:
            Values ``[*batch]``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or a flow does not exist.
        """
        t, resolved = self._checked(z, t, control, context)
        value = self.bind(resolved, z.shape[:-1], want=("value",))(z, t).value
        assert value is not None
        return value

    def derivatives(
        self,
        z: Tensor,
        t: float | Tensor,
        control: Control = 0,
        laplacian: Laplacian | None = None,
        *,
        context: Context | None = None,
        probe: Tensor | None = None,
        probes: int = 1,
        generator: torch.Generator | None = None,
    ) -> Derivatives:
        """Value, gradient, time derivative and Laplacian in one evaluation.

        Args:
            z: States ``[*batch, D]``.
            t: Time in frames: a scalar, or one per sample ``[*batch]``.
            control: Which flow acts.
            laplacian: ``"exact"`` for the trace of the Hessian, ``"hutchinson"`` for the unbiased estimate
                e' Hess(u) e with a Rademacher probe e (Hutchinson 1990), None for no Laplacian.
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                potential that was built with ``context=C`` (see `flowfactor.context`).
            probe: The probe ``[*batch, D]``, or several ``[P, *batch, D]``, over which the estimate is the mean; drawn where
                it is None.
            probes: How many are drawn for each sample: the variance of the estimate falls with their number.
            generator: Source of the drawn probes.

        Returns:
            The derivatives.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, a flow does not exist, ``laplacian`` is unknown, more than one
                probe is asked for where none are drawn, or a module of it is in training mode and draws at random or looks
                at the whole batch.

        Example:
            >>> import torch, flowfactor as ff
            >>> u = ff.potentials.MLPPotential(dim=4, num_flows=3)
            >>> d = u.derivatives(torch.zeros(5, 4), 0.5, 2, laplacian="exact")
            >>> d.value.shape, d.gradient.shape, d.time.shape, d.laplacian.shape
            (torch.Size([5]), torch.Size([5, 4]), torch.Size([5]), torch.Size([5]))
        """
        if laplacian not in ("exact", "hutchinson", None):
            raise ValueError(f'laplacian must be "exact", "hutchinson" or None, got {laplacian!r}')
        refuse_unsteady(self, asked="derivatives ask it")
        t, resolved = self._checked(z, t, control, context)
        check_probes(probes, laplacian)
        if probe is not None and probes > 1:
            raise ValueError(f"probes={probes} are to be drawn, and a probe is given: leave one of the two out")
        if laplacian == "hutchinson":
            probe = rademacher_like(z, generator, probes) if probe is None else given_probes(probe, z)
        want = ("value", "gradient", "time") + (("laplacian",) if laplacian else ())
        return self.bind(resolved, z.shape[:-1], want=want, laplacian=laplacian, probe=probe)(z, t)

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str],
        laplacian: Laplacian | None = None, probe: Tensor | None = None,
    ) -> BoundPotential:  # fmt: skip
        """Fixes everything that stays the same over a solve and returns the function that is left.

        A solver calls the result at every stage, so that what depends on the control, the weights or the probe alone
        is worked out once. Arguments are taken as checked.

        Args:
            control: The resolved control.
            batch_shape: Shape of the batch.
            want: Which of ``value``, ``gradient``, ``time``, ``laplacian`` to compute.
            laplacian: How to take the Laplacian, where it is wanted.
            probe: Hutchinson's probes, ``[*batch, P D]`` of P for each sample (`flowfactor.networks.probes`).

        Returns:
            A function ``(z [*batch, D], t scalar or [*batch]) -> Derivatives``.
        """
        wanted = frozenset(want)
        layout = layout_of(control, batch_shape, self.num_flows, stacked=False)
        probes = [None] * len(layout.flows) if probe is None else layout.scatter(probe)
        functions = [
            autodiff.derivatives_of(self._one(k, context), wanted, laplacian, probe_k)
            for k, probe_k, context in zip(layout.flows, probes, layout.contexts(), strict=True)
        ]
        if layout.batch_shape == tuple(batch_shape) and len(functions) == 1 and control.weights is None:
            # One flow for all: the user's code sees the batch in the shape and order it was given.
            one = self._one(layout.flows[0], control.context)
            function = autodiff.derivatives_of(one, wanted, laplacian, probe)
            return lambda z, t: Derivatives(**function(z, t))
        return lambda z, t: Derivatives(**run(layout, functions, z, t, EVENT_NDIMS))

    def closed_form(
        self, layout: Layout, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """What solves in closed form are made of (see `flowfactor.networks.stage_adjoint`).

        Args:
            layout: Which samples follow which flow.
            want: Which of ``value``, ``time`` and ``laplacian`` are wanted beside the gradient.
            laplacian: How to take the Laplacian.
            probe: Hutchinson's probes ``[G, n, P D]``, laid out as a block.

        Returns:
            The closed form, or why there is none.
        """
        return NoClosedForm(
            f"{type(self).__name__} has no closed-form adjoint; its solves are differentiated by autograd"
        )
