"""A Helmholtz field whose two parts have weights of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from flowfactor.control import Control, ResolvedControl, Schedule, as_weights
from flowfactor.fields import HelmholtzField
from flowfactor.fields.base import BoundField, Divergence, Field
from flowfactor.latent_flow import LatentFlow


class SplitControlField(Field):
    r"""$v = \sum_k a_k \nabla u_k + b_k r_k$: a view on a `HelmholtzField` of K flows, with the 2K weights (a, b).

    It shares the field's parts. Flow k < K is the gradient part of flow k alone, and flow K + k its divergence-free
    part.

    Args:
        field: The field.

    Example:
        >>> import torch, flowfactor as ff
        >>> u, h = (ff.potentials.QuadraticPotential(2, S=torch.eye(2)) for _ in range(2))
        >>> split = SplitControlField(ff.fields.HelmholtzField(u, h, skew="canonical"))
        >>> split(torch.tensor([[1.0, 0.0]]), 0.0, torch.tensor([2.0, 3.0])).detach()     # 2 grad u + 3 J grad h
        tensor([[ 2., -3.]])
    """

    has_potential = True

    def __init__(self, field: HelmholtzField) -> None:
        super().__init__(field.dim, 2 * field.num_flows, field.context_size)
        self.field = field

    @property
    def potential(self) -> object:
        """The potential u, which has K flows, not 2K."""
        return self.field.potential

    def bind(
        self,
        control: ResolvedControl,
        batch_shape: Sequence[int],
        *,
        want: Iterable[str] = (),
        divergence: Divergence | None = None,
        probe: Tensor | None = None,
    ) -> BoundField:
        """Fixes everything that stays the same over a solve (see `Field.bind`)."""
        weights = as_weights(control, batch_shape, self.num_flows, next(self.field.parameters()))
        first, second = (ResolvedControl(None, half, control.context) for half in weights.chunk(2, -1))
        return self.field.bind_parts(first, second, batch_shape, want=want, divergence=divergence, probe=probe)


def split_flow(flow: LatentFlow) -> LatentFlow:
    """A view on a flow along a `HelmholtzField` of K flows that takes 2K weights, and is solved as that one is."""
    assert isinstance(flow.field, HelmholtzField)  # checked when the model was made
    probes = flow.probes if flow.divergence == "hutchinson" else 1  # measurements take the exact one
    more = {"probes": probes, "evaluation_solver": flow.evaluation_solver}
    view = LatentFlow(SplitControlField(flow.field), flow.solver, flow.divergence, **more)
    view.step_memory = flow.step_memory
    view.training = flow.training  # of the view alone: its field is the flow's own
    return view


def flow_for(flow: LatentFlow, control: Control, controls: int) -> LatentFlow:
    """The flow that follows a control: itself, or where flows have two weights each and a control holds them its view."""
    pieces = control.controls if isinstance(control, Schedule) else (control,)
    floats = [p for p in pieces if isinstance(p, Tensor) and p.is_floating_point() and p.ndim]
    if controls == 1 or not any(p.shape[-1] == 2 * flow.num_flows for p in floats):
        return flow
    return split_flow(flow)
