"""How near a path comes to optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.regularizers import SinkhornMatch, TransportCost


def transport_gap(
    flow: LatentFlow,
    z0: Tensor,
    t: Tensor | list[float],
    control: Control = 0,
    *,
    context: Context | None = None,
    blur: float = 0.01,
    scaling: float = 0.95,
) -> Tensor:
    r"""The path's action against the least that any flow between the same two clouds needs; 1 is optimal.

    $$\frac{E \int \tfrac12 |v|^2 dt}{W_2^2(z_{t_0}, z_{t_1}) \,/\, 2 |t_1 - t_0|}$$

    The denominator is the action of dynamic optimal transport between the end clouds (Benamou and Brenier 2000), with
    $W_2$ estimated by the debiased Sinkhorn divergence. A small blur is exact for well separated points; the estimate's
    error is of order blur squared.

    Args:
        flow: The flow.
        z0: A cloud of N start states ``[N, D]``.
        t: Times in frames, from start to end.
        control: Which flow acts; one for all, since the clouds are compared as wholes.
        context: What steers the flow, where it was built with a context; likewise.
        blur: Length scale of the Sinkhorn estimate relative to the clouds' extent.
        scaling: Accuracy of the Sinkhorn iterations, in (0, 1).

    Returns:
        The ratio, a scalar.

    Raises:
        ValueError: If ``z0`` is no cloud ``[N, D]`` of at least two points, or nothing moves.

    Example:
        >>> import torch, flowfactor as ff
        >>> shift = ff.LatentFlow(ff.fields.from_module(lambda z, t: torch.ones_like(z), dim=2))
        >>> round(ff.metrics.transport_gap(shift, torch.randn(64, 2), [0.0, 1.0]).item(), 2)
        1.0
    """
    if not isinstance(z0, Tensor) or z0.ndim != 2 or len(z0) < 2:
        got = list(z0.shape) if isinstance(z0, Tensor) else type(z0).__name__
        raise ValueError(f"z0 must be a cloud of at least two states, shape [N, D], got {got}")
    path = flow(z0, t, control, context=context, costs={"action": TransportCost()})
    action = path.costs["action"][-1].mean()
    start, end = path.z[0], path.z[-1]
    extent = torch.cat([start, end]).detach().std()
    match = SinkhornMatch(p=2, blur=float(blur * extent), scaling=scaling)
    # The divergence has cost |x-y|^2 / 2 already.
    least = match(start, end) / (path.t[-1] - path.t[0]).abs()
    if not float(least) > 0:
        raise ValueError("nothing moves along this flow: the ratio of two zero actions says nothing")
    return action / least
