"""The latent flow: a potential or field, and the solver that follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from flowfactor._functorch import is_batched
from flowfactor.context import Context, context_shape, joined
from flowfactor.control import Control, Schedule, control_shape, times
from flowfactor.fields.base import Divergence, Field
from flowfactor.fields.potential_fields import GradientField
from flowfactor.networks.controlled import check_state
from flowfactor.networks.overrides import prepare_for_solve
from flowfactor.networks.probes import check_probes
from flowfactor.path import FlowPath
from flowfactor.potentials.base import Potential
from flowfactor.solve.accuracy import Accuracy
from flowfactor.solve.events import Events
from flowfactor.solve.problem import Cost, needs_of
from flowfactor.solve.step_memory import StepMemory
from flowfactor.solve.times import checked_start, checked_times
from flowfactor.solve.two_ways import solve_from
from flowfactor.solver import Solver
from flowfactor.transforms import FlowTransform, PushedDistribution


class LatentFlow(Accuracy, Events, nn.Module):
    r"""Carries latent states along a field, with log-determinants and running costs.

    Solves $\dot z = v_c(z, t)$, and in the same solve $\tfrac{d}{dt}\ln|\det \partial z_t/\partial z_{t_0}| =
    \nabla\cdot v_c$ (Chen et al., NeurIPS 2018, theorem 1) and any running costs. For a potential, $v_c = \nabla u_c$
    and the divergence is $\Delta u_c$.

    Args:
        field: A `Potential`, followed along its gradient, or any `Field`.
        solver: How to solve; dopri5 at 1e-5 where None.
        divergence: ``"exact"``, or ``"hutchinson"`` for an unbiased estimate with Rademacher probes that are fixed over a
            solve (Grathwohl et al., ICLR 2019, eq. 8).
        probes: The number of probes P for each sample, over which the estimate is the mean: its variance is 1 / P of that
            with one. Costs are shown the first.
        evaluation_solver: How to solve in ``eval()`` mode; as in training where None. A training that takes a looser solver
            than its evaluation is cheaper, and still trains the flow as long as both agree
            (`flowfactor.metrics.solver_gap` measures it). Gradients are found as this solver says, in either mode.

    Raises:
        TypeError: If ``field``, ``solver`` or ``evaluation_solver`` is none.
        ValueError: If ``divergence`` is unknown, or ``probes`` is below 1, or above 1 with an exact divergence.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(dim=8, num_flows=3))
        >>> z0 = torch.randn(16, 8)
        >>> k = torch.arange(16) % 3                    # each sample follows a flow of its own
        >>> path = flow(z0, torch.arange(5), k, log_det=True)
        >>> path.z.shape, path.log_det.shape
        (torch.Size([5, 16, 8]), torch.Size([5, 16]))
        >>> back = flow.inverse(path.z[-1], torch.arange(5), k)
        >>> bool(torch.allclose(back.z[-1], z0, atol=1e-3))
        True
        >>> both = flow(path.z[3], torch.arange(5), k, start=3)     # from frame 3, ahead and back
        >>> bool(torch.allclose(both.z, path.z, atol=1e-3))
        True
    """

    def __init__(
        self,
        field: Potential | Field,
        solver: Solver | None = None,
        divergence: Divergence = "exact",
        *,
        probes: int = 1,
        evaluation_solver: Solver | None = None,
    ) -> None:
        super().__init__()
        if isinstance(field, Potential):
            field = GradientField(field)
        if not isinstance(field, Field):
            raise TypeError(
                f"a LatentFlow follows a Potential or a Field, got {type(field).__name__}; wrap a module of your own with "
                "flowfactor.potentials.from_module (scalar) or flowfactor.fields.from_module (velocity)"
            )
        for name, one in (("solver", solver), ("evaluation_solver", evaluation_solver)):
            if one is not None and not isinstance(one, Solver):
                raise TypeError(f'{name} must be a flowfactor.Solver, got {one!r}; for example Solver("dopri5")')
        if divergence not in ("exact", "hutchinson"):
            raise ValueError(f'divergence must be "exact" or "hutchinson", got {divergence!r}')
        self.field = field
        self.solver = Solver() if solver is None else solver
        self.evaluation_solver = evaluation_solver
        self.divergence: Divergence = divergence
        self.probes = check_probes(probes, divergence)
        self.step_memory = StepMemory() if self.solver.remember_steps else None

    @property
    def acting_solver(self) -> Solver:
        """How a solve is done now: by ``evaluation_solver`` in ``eval()`` mode, where there is one, else by ``solver``."""
        return self.solver if self.training or self.evaluation_solver is None else self.evaluation_solver

    @property
    def dim(self) -> int:
        """D, the size of a state."""
        return self.field.dim

    @property
    def num_flows(self) -> int:
        """K, the number of flows."""
        return self.field.num_flows

    def velocity(self, z: Tensor, t: float | Tensor, control: Control = 0, *, context: Context | None = None) -> Tensor:
        """The velocity dz/dt at a state and time.

        Args:
            z: States ``[*batch, D]``.
            t: Time in frames, a scalar or ``[*batch]``.
            control: Which flow acts.
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                flow whose field was built with ``context=C`` (see `flowfactor.context`).

        Returns:
            Velocities ``[*batch, D]``, per frame.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape or a flow does not exist.
        """
        return self.field(z, t, control, context=context)

    def forward(
        self,
        z0: Tensor,
        t: Tensor | Sequence[float],
        control: Control = 0,
        *,
        start: int | float | Tensor = 0,
        context: Context | None = None,
        log_det: bool = False,
        costs: Mapping[str, Cost] | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowPath:
        """Follows the flow from ``z0`` at ``t[start]``, the first time if nothing else is said, through all times.

        Args:
            z0: States at ``t[start]``, ``[*batch, D]``.
            t: Times in frames, strictly increasing or decreasing, ``[T]``. Or ``[T, *batch]``: each sample has times of its
                own, increasing, decreasing or resting (a sample whose time repeats stays where it is), and all of them are
                followed by one solve.
            control: Which flow acts: an int, an index per sample ``[*batch]``, weights ``[*batch, K]`` or a `Schedule`.
                Weights are speeds: where only one flow has a weight w, it acts w times as fast, along the same orbit if
                its field does not depend on time.
            start: Which of the times ``z0`` is at: an index (-1 for the last), or one for each sample ``[*batch]``; or, as a
                float, a time between the first and the last. The flow is followed from there both ways, in one call: the
                path is in the order of ``t``, log-determinants are those of the flow from the start to each time, and costs
                are integrals from ``t[0]`` on, ``costs[name][-1]`` over the whole interval.
            context: Features of each sample, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name; for a
                flow whose field was built with ``context=C`` (see `flowfactor.context`).
            log_det: Whether to carry the log-determinant.
            costs: Running costs by name: callables that map an `Evaluation` to a number per sample ``[*batch]``. They
                are integrated along the path and do not steer the step size. A cost with the attribute
                ``many_stages = True`` promises two things, for which closed-form solves reward it with speed: it takes
                evaluations of several stages at once (``[K, S, n, D]`` in place of ``[*batch, D]``), and what it
                captures are parameters of its own (it is a module) or nothing. By its attribute ``needs``, a tuple, a cost
                asks for what is not computed otherwise: ``"value"`` and ``"time"`` of the potential, a ``"potential"`` at
                all, the ``"divergence"``, the ``"acceleration"`` along the path, the ``"probe"`` of the solve, its
                ``"context"``.
            generator: Source of Hutchinson's probes.

        Returns:
            The path, time first.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, is NaN, or names a flow that does not exist, or a cost needs
                what no solve provides.
            FlowSolveError: If the solve fails.
        """
        if not isinstance(log_det, bool):
            raise TypeError(f"log_det must be True or False, got {log_det!r}")
        t = self._checked(z0, t, control)
        context = self._checked_context(context, z0)
        if costs is not None and not isinstance(costs, Mapping):
            raise TypeError(
                f"costs maps names to callables, such as {{'hj': HamiltonJacobi()}}; got {type(costs).__name__}"
            )
        named = dict(costs or {})
        begin = checked_start(start, t, z0)
        needs = needs_of(named, self.field)
        prepare_for_solve(self.field, named)
        solver = self.acting_solver
        if solver.remember_steps and self.training and self.step_memory is None:  # a solver that came later
            self.step_memory = StepMemory().to(z0.device)
        memory = self.step_memory if solver.remember_steps and self.training else None
        more = {"needs": needs, "generator": generator, "probes": self.probes, "memory": memory}
        how = self.field, solver, self.divergence
        return solve_from(begin, *how, z0, t, control, context=context, log_det=log_det, costs=named, **more)

    def inverse(
        self,
        z1: Tensor,
        t: Tensor | Sequence[float],
        control: Control = 0,
        *,
        context: Context | None = None,
        log_det: bool = False,
        costs: Mapping[str, Cost] | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowPath:
        """Follows the flow back from ``z1`` at ``t[-1]`` to ``t[0]``.

        Args:
            z1: States at ``t[-1]``, ``[*batch, D]``.
            t: Times in frames, as for `forward`.
            control: Which flow acts.
            context: What steers it, as for `forward`.
            log_det: Whether to carry the log-determinant, here of z_t with respect to z1.
            costs: Running costs, as for `forward`.
            generator: Source of Hutchinson's probes.

        Returns:
            The path over ``t`` reversed: ``path.z[-1]`` is the state at ``t[0]``.

        Raises:
            TypeError: As `forward`.
            ValueError: As `forward`.
            FlowSolveError: If the solve fails.
        """
        reverse = times(t, z1) if isinstance(z1, Tensor) else torch.as_tensor(t)
        back = reverse.flip(0) if reverse.ndim else reverse
        return self(z1, back, control, context=context, log_det=log_det, costs=costs, generator=generator)

    def transform(
        self, t0: float | Tensor, t1: float | Tensor, control: Control = 0, *, context: Context | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowTransform:  # fmt: skip
        """The map from states at ``t0`` to states at ``t1`` as a transform of torch.distributions.

        With ``divergence="hutchinson"`` its log-determinants, and the densities made with them, are random estimates.

        Args:
            t0: Start, in frames.
            t1: End, in frames; it may lie before ``t0``, and at ``t0`` the map is the identity.
            control: Which flow acts. Its batch shape must broadcast with that of the states.
            context: What steers it, as for `forward`; its batch shape likewise.
            generator: Source of Hutchinson's probes, which the transform keeps.

        Returns:
            A bijective transform of vectors, with an inverse and a log-determinant.

        Raises:
            ValueError: If a time is not one finite number.

        Example:
            >>> import torch, flowfactor as ff
            >>> from torch.distributions import Independent, Normal, TransformedDistribution
            >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(dim=2))
            >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
            >>> q = TransformedDistribution(base, [flow.transform(0.0, 1.0), flow.transform(1.0, 2.0)])
            >>> q.log_prob(q.sample((5,))).shape
            torch.Size([5])
        """
        return FlowTransform(self, t0, t1, control, context=context, generator=generator)

    def push(
        self,
        q0: Distribution,
        t: float | Tensor,
        control: Control = 0,
        *,
        context: Context | None = None,
        t0: float | Tensor = 0.0,
        generator: torch.Generator | None = None,
    ) -> Distribution:
        r"""The distribution of z_t, given that of z_0: $\ln q_t(z_t) = \ln q_0(z_0) - \int_0^t \nabla\cdot v_c\,ds$.

        With ``divergence="hutchinson"`` its ``log_prob`` is an unbiased estimate of $\ln q_t$, random at every call, whose
        exponential is biased upwards; samples are not affected.

        Args:
            q0: Distribution of states at ``t0``: of vectors (event shape ``[D]``), or of independent coordinates (batch
                shape ``[*batch, D]``).
            t: Time in frames; a scalar tensor may ask for its gradient.
            control: Which flow acts. The distribution's batch shape is what its batch shape and that of ``q0`` broadcast
                to.
            context: What steers it, as for `forward`; its batch shape takes part likewise.
            t0: Time of ``q0``, in frames, likewise.
            generator: Source of Hutchinson's probes, which the distribution keeps.

        Returns:
            A `PushedDistribution` with ``rsample`` (where ``q0`` has it), ``sample`` and ``log_prob``, and by one solve
            ``rsample_and_log_prob``; ``q0`` itself where both times are the same.

        Raises:
            TypeError: If ``q0`` is no distribution.
            ValueError: If it is not one of D-vectors, ``t`` is not one finite number, or the control does not fit.

        Example:
            >>> import torch, flowfactor as ff
            >>> from torch.distributions import Normal
            >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
            >>> q1 = flow.push(Normal(torch.zeros(2), torch.ones(2)), 1.0)     # z_1 = e z_0
            >>> round(q1.log_prob(torch.zeros(2)).item(), 3)                   # -ln 2 pi - 2
            -3.838
        """
        if not isinstance(q0, Distribution):
            raise TypeError(f"q0 must be a torch Distribution, got {type(q0).__name__}")
        if not q0.event_shape:
            q0 = Independent(q0, 1) if q0.batch_shape else q0
        if tuple(q0.event_shape) != (self.dim,):
            raise ValueError(
                f"q0 must be a distribution of vectors of size {self.dim} (event shape [{self.dim}]), got event shape "
                f"{list(q0.event_shape)} and batch shape {list(q0.batch_shape)}"
            )
        shapes = control_shape(control), context_shape(context)
        try:
            batch = torch.broadcast_shapes(q0.batch_shape, *shapes)
        except RuntimeError as error:
            raise ValueError(
                f"a control of batch shape {list(shapes[0])}"
                + (f" and a context of batch shape {list(shapes[1])} do" if context is not None else " does")
                + f" not fit q0 of batch shape {list(q0.batch_shape)}"
            ) from error
        if batch != q0.batch_shape:
            q0 = q0.expand(batch)
        transform = self.transform(t0, t, control, context=context, generator=generator)
        if transform.is_identity and not transform.has_time_gradients:
            return q0
        return PushedDistribution(q0, transform)

    def density(
        self, base: Distribution, t: float | Tensor = 1.0, control: Control = 0, *, context: Context | None = None,
        t0: float | Tensor = 0.0, generator: torch.Generator | None = None,
    ) -> Distribution:  # fmt: skip
        r"""The density of data that the flow carries to a base: $\ln p(x) = \ln q(z_t) + \int_{t_0}^t \nabla\cdot v_c\,ds$.

        Data x are states at ``t0``, and ``base`` is the distribution of states at ``t``: the normalizing direction of FFJORD
        (Grathwohl et al. 2019). `push` reads the flow the other way, with ``q0`` at its start and the density at its end;
        this is ``push(base, t0, control, t0=t)``. ``log_prob`` follows the flow forward, samples come by its inverse.

        Args:
            base: Distribution of states at ``t``, as for `push`.
            t: Time of the base, in frames.
            control: Which flow acts.
            context: What steers it, as for `push`.
            t0: Time of the data, in frames.
            generator: Source of Hutchinson's probes.

        Returns:
            A distribution as of `push`.

        Raises:
            TypeError: As `push`.
            ValueError: As `push`.

        Example:
            >>> import torch, flowfactor as ff
            >>> from torch.distributions import Normal
            >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
            >>> p = flow.density(Normal(torch.zeros(2), torch.ones(2)))              # z_1 = e x
            >>> round(p.log_prob(torch.zeros(2)).item(), 3)                          # -ln 2 pi + 2
            0.162
        """
        if not isinstance(base, Distribution):
            raise TypeError(f"base must be a torch Distribution, got {type(base).__name__}")
        return self.push(base, t0, control, context=context, t0=t, generator=generator)

    def _checked(self, z0: Tensor, t: Tensor | Sequence[float], control: Control) -> Tensor:
        check_state(z0, self.dim, self)
        controls = control.controls if isinstance(control, Schedule) else (control,)
        if any(isinstance(x, Tensor) and is_batched(x) for x in (z0, t, *controls)):
            raise ValueError(
                "torch.vmap cannot follow a solve, whose course depends on data: hand over states [*batch, D], and "
                "controls of the same batch shape"
            )
        if not bool(torch.isfinite(z0.detach()).all()):
            bad = ~torch.isfinite(z0.detach()).all(-1)
            raise ValueError(f"z0 holds NaN or infinity, first in sample {bad.nonzero()[0].tolist()}")
        return checked_times(z0, t)

    def _checked_context(self, context: Context | None, z0: Tensor) -> Context | None:
        """The context, spread over the batch of ``z0``."""
        context = self.field.resolve_context(context, z0)
        if context is not None and not bool(torch.isfinite(joined(context).detach()).all()):
            raise ValueError("the context holds NaN or infinity")
        return context
