"""Potentials whose Hamilton-Jacobi equation is the eikonal equation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowfactor.control import ResolvedControl
from flowfactor.networks.batching import Layout, Stack
from flowfactor.networks.overrides import overridden
from flowfactor.networks.stacked import own_tensors
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.stationary_adjoint import StationaryAdjoint
from flowfactor.potentials.base import BoundPotential, Derivatives, Laplacian, Potential


class Stationary(Potential):
    r"""$u_k(z, t) = \varphi_k(z) - E_k t$ with learned energies $E_k > 0$: flows without time that Hamilton-Jacobi allows.

    The velocity is $\nabla\varphi_k$, the same at all times, and the Hamilton-Jacobi equation becomes the eikonal equation

    $$\partial_t u + \tfrac12 |\nabla u|^2 = 0 \iff \tfrac12 |\nabla\varphi_k|^2 = E_k$$

    (Evans, *Partial Differential Equations*, sections 3.2 on characteristics and the eikonal equation, and 3.3): where it
    holds, every state moves straight on at the speed $\sqrt{2 E_k}$. Of a potential without time and without an energy the
    equation asks $\nabla\varphi = 0$: rest. Under weights, energies add as potentials do.

    Args:
        potential: $\varphi$, which does not depend on time, such as ``MLPPotential(..., time_features=0)``.
        energy: $E_k$ at the start, positive: one number, or one for each flow, ``[K]``. Learned as the softplus of a free
            parameter.

    Raises:
        TypeError: If ``potential`` is none.
        ValueError: If it has time features, or an energy is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> phi = ff.potentials.from_module(lambda z, t: 3.0 * z.norm(dim=-1), dim=2)      # the distance to 0, three times
        >>> u = ff.potentials.Stationary(phi, energy=4.5)
        >>> d = u.derivatives(torch.tensor([[3.0, 4.0]]), 7.0)
        >>> bool((d.time + 0.5 * d.gradient.square().sum(-1)).abs() < 1e-5)
        True
    """

    def __init__(self, potential: Potential, energy: float | Sequence[float] | Tensor = 0.1) -> None:
        if not isinstance(potential, Potential):
            raise TypeError(f"potential must be a flowfactor Potential, got {type(potential).__name__}")
        if getattr(potential, "time_features", 0):
            raise ValueError(
                "a Stationary potential is made of one without time, and this one has time_features="
                f"{potential.time_features}: build it with time_features=0"
            )
        super().__init__(potential.dim, potential.num_flows, potential.context_size)
        start = torch.as_tensor(energy, dtype=torch.get_default_dtype()).detach()
        if start.shape not in ((), (self.num_flows,)) or not (start.is_meta or bool((start > 0).all())):
            raise ValueError(
                f"energy must be positive, one number or {self.num_flows} (one for each flow), got {energy}"
            )
        if isinstance(energy, Tensor):
            self._fill_in(energy=start.tolist())
        self.potential = potential
        # The inverse of the softplus.
        self.raw_energy = nn.Parameter((start + torch.log(-torch.expm1(-start))).expand(self.num_flows).clone())

    @property
    def energy(self) -> Tensor:
        """The energies $E_k$, ``[K]``, per frame."""
        return F.softplus(own_tensors(self)["raw_energy"])

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str],
        laplacian: Laplacian | None = None, probe: Tensor | None = None,
    ) -> BoundPotential:  # fmt: skip
        """Fixes control, weights and probe for a solve (see `Potential.bind`)."""
        bound = self.potential.bind(control, batch_shape, want=want, laplacian=laplacian, probe=probe)
        acting = self.energy
        if control.weights is not None:
            acting = control.weights @ acting
        else:
            acting = acting[0 if control.index is None else control.index]

        def evaluate(z: Tensor, t: Tensor) -> Derivatives:
            d = bound(z, t)
            value = None if d.value is None else d.value - acting * t
            return replace(d, value=value, time=None if d.time is None else d.time - acting)

        return evaluate

    def closed_form(
        self, layout: Layout, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Potential.closed_form`."""
        form = overridden(self, Stationary, ("flow_potential", "bind"))
        form = form or self.potential.closed_form(layout, want, laplacian, probe)
        if isinstance(form, NoClosedForm):
            return form
        make, stack = form.build, layout.select({"energy": self.energy.unsqueeze(-1)})[0]

        def build(stack: Stack) -> StationaryAdjoint:
            phi = {name: value for name, value in stack.items() if name != "energy"}
            return StationaryAdjoint(make(phi), stack["energy"])

        return ClosedForm(form.stack | stack, build, takes_skew=form.takes_skew)
