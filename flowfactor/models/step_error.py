"""What a solver would err by at the states of paths."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.regularizers import SolverError


def step_error(
    estimate: SolverError,
    flow: LatentFlow,
    z: Tensor,
    t: Tensor,
    control: Control,
    *,
    context: Context | None = None,
    weights: Tensor | None = None,
    draw: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The squared error estimates of steps along paths, in the mean over their time: nothing is solved.

    A step of the estimate's size is taken at each frame but the last, in the direction of the next, and counts by the time
    to it; where there is none, as after the last observed frame, it counts for nothing.

    Args:
        estimate: Takes the steps.
        flow: The flow, as it follows the control.
        z: Paths ``[T+1, N, D]``.
        t: Their times ``[T+1]``, or ``[T+1, N]``.
        control: Which flow acts.
        context: What steers it, for N paths.
        weights: The control over each interval ``[N, T, K]``, in place of ``control``.
        draw: Whether to take one step a path, at a frame drawn by the time that it counts: the same in expectation.
        generator: Source of the draw.

    Returns:
        Squared norms ``[N]``; 0 for paths that take no time.
    """
    t = t if t.ndim > 1 else t.unsqueeze(-1)
    when, ahead = (x.expand(len(z) - 1, z.shape[1]) for x in (t[:-1], t.diff(dim=0)))
    counts, size = ahead.detach().abs(), estimate.step * ahead.detach().sign()
    states, acting = z[:-1], control if weights is None else weights.movedim(-2, 0)
    if not draw:
        found = estimate(flow, states, when, acting, step=size, context=context)
        return (counts * found).sum(0) / counts.sum(0).clamp(min=torch.finfo(counts.dtype).tiny)
    rests = counts.sum(0) == 0  # where any frame will do, from which no step is taken
    frame = torch.multinomial((counts + rests).mT, 1, generator=generator).squeeze(-1)
    at = frame, torch.arange(z.shape[1], device=z.device)
    acting = acting if weights is None else weights[at[1], frame]
    return estimate(flow, states[at], when[at], acting, step=size[at], context=context)
