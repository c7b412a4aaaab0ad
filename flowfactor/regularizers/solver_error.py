"""What a solver would err by in one step: the error estimate by which it chooses its steps, as a penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from flowfactor.context import Context
from flowfactor.control import Control, Schedule, resolve_at, times
from flowfactor.fields import Field
from flowfactor.latent_flow import LatentFlow
from flowfactor.networks.controlled import check_state
from flowfactor.networks.unsteady import refuse_unsteady
from flowfactor.potentials.base import Potential
from flowfactor.registry import Recorded
from flowfactor.regularizers.commutator import field_of
from flowfactor.solve.runge_kutta import tableau

METHODS = ("bosh3", "dopri5", "dopri8")
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class SolverError(Recorded, nn.Module):
    r"""$|e|^2$, the squared error estimate of one step of an adaptive solver, per sample: asks for flows in few steps.

    From a state z at time t, a step of size h of an embedded Runge-Kutta method has the stages

    $$k_i = v_c\Big(z + h \sum_{j < i} a_{ij} k_j,\; t + c_i h\Big), \qquad e = h \sum_i (b_i - \hat b_i)\, k_i ,$$

    and e, by which its two solutions differ, is what a solver chooses its steps by: of order $h^3$ for bosh3, so that steps
    may be twice as long where $|e|^2$ is a sixty-fourth. Pal et al. (ICML 2021) add up the estimates of the steps of a
    solve, and Pal et al. (ICML 2023) take those around one time that is drawn. Here it is taken from given states, such as
    those of a path at its frames, in units of states squared, as a norm that is summed over D, with neither tolerances nor
    an engine in it. Gradients reach parameters, states, times, context, and the weights of a control.

    It is zero on straight paths at constant speed, and for bosh3 where a velocity grows linearly with time: it asks for less
    than `Acceleration`, and without a derivative of the field. What a whole solve errs by is another thing, which
    ``flow.solver_error`` measures.

    Args:
        method: Whose estimate: ``"bosh3"`` (four evaluations), ``"dopri5"`` (seven) or ``"dopri8"`` (fourteen).
        step: h, in frames; below 0 for steps back in time.

    Raises:
        TypeError: If ``step`` is no number.
        ValueError: If the method has no such estimate, or ``step`` is 0 or not finite.

    Example:
        >>> import torch, flowfactor as ff
        >>> grow = ff.fields.from_module(lambda z, t: z, dim=1)           # e = -z h^3 (1 + h) / 48 = -z / 24 at h = 1
        >>> found = ff.regularizers.SolverError()(grow, torch.tensor([[24.0], [48.0]]))
        >>> [round(x, 4) for x in found.tolist()]
        [1.0, 4.0]
    """

    def __init__(self, method: str = "bosh3", step: float = 1.0) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(
                f"SolverError takes the error estimate of one of {METHODS}, got {method!r}: methods of fixed steps have "
                "none, and a step of the other adaptive ones depends on the one before"
            )
        if isinstance(step, bool) or not isinstance(step, (int, float)):
            raise TypeError(f"step must be a number of frames, got {step!r}")
        if step == 0 or not math.isfinite(step):
            raise ValueError(f"step must be a finite number of frames other than 0, got {step!r}")
        self.method, self.step = method, float(step)

    def forward(
        self,
        flow: LatentFlow | Field | Potential,
        z: Tensor,
        t: float | Tensor = 0.0,
        control: Control = 0,
        *,
        step: Tensor | float | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Measures what a step from each state would err by.

        Args:
            flow: A flow, field or potential (of which the gradient counts).
            z: States ``[*batch, D]``.
            t: Time in frames, a scalar or ``[*batch]``.
            control: Which flow acts. Of a `Schedule` the piece that acts from ``t`` on, in the direction of the step, for
                the whole of it: solvers land where it switches.
            step: The size of the step in place of the one of the constructor, a scalar or ``[*batch]``; 0 gives 0.
            context: What steers the flow, where it was built with a context.

        Returns:
            Squared norms ``[*batch]``, summed over D.

        Raises:
            TypeError: If ``flow`` is none of these, or an argument has the wrong type.
            ValueError: If an argument does not fit, or a module of the field is in training mode and draws at random or
                looks at the whole batch.
        """
        field = field_of(flow, type(self).__name__)
        refuse_unsteady(field, asked="a step of a solver asks it")
        check_state(z, field.dim, field)
        t, h = _of_each("t", t, z), _of_each("step", self.step if step is None else step, z)
        # A switching time itself belongs to the piece after it, and to the one before on the way back.
        since = _just_after(t.detach(), h.detach()) if isinstance(control, Schedule) else t
        acting = resolve_at(control, since, z.shape[:-1], field.num_flows, dtype=z.dtype, device=z.device)
        bound = field.bind(replace(acting, context=field.resolve_context(context, z)), z.shape[:-1])
        return self._estimate(lambda z, t: bound(z, t).velocity, z, t, h).square().sum(-1)

    def _estimate(self, velocity: Velocity, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """The error estimate e of a step of size ``h``, ``[*batch, D]``."""
        table = tableau(self.method)
        assert table is not None and table.error is not None  # as all of METHODS have it
        a, error = (torch.as_tensor(x, dtype=z.dtype, device=z.device) for x in (table.a, table.error))
        long, rates = h.unsqueeze(-1), [velocity(z, t)]
        for i in range(1, table.size):
            place = z + long * (torch.stack(rates, -1) @ a[i, :i])
            rates.append(velocity(place, t + float(table.c[i]) * h))
        return long * (torch.stack(rates, -1) @ error)


def _just_after(t: Tensor, h: Tensor) -> Tensor:
    """The next times in the direction of ``h``, none of which is so near to 0 that a processor may take it for 0."""
    least = (t.abs() * 2 * torch.finfo(t.dtype).eps).clamp(min=2.0**-60)
    return t + torch.sign(h) * least


def _of_each(name: str, value: Tensor | float, z: Tensor) -> Tensor:
    """Times or steps as a tensor, a scalar or one of each sample."""
    found = times(value, z)
    if found.ndim and found.shape != z.shape[:-1]:
        raise ValueError(
            f"{name} must be a scalar or one for each sample {list(z.shape[:-1])}, got {list(found.shape)}"
        )
    return found
