"""The stretches of a solve whose samples are at times of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowfactor.control import Control, PieceControl, ResolvedControl, Schedule, as_weights, resolve
from flowfactor.solve.clock import Clock
from flowfactor.solve.problem import Segment


def own_segments(control: Control, t: Tensor, batch: Sequence[int], num_flows: int, like: Tensor) -> list[Segment]:
    """Cuts a solve of times ``t [T, *batch]`` into stretches on a clock.

    Args:
        control: Which flow acts.
        t: The times of each sample, monotone.
        batch: The batch.
        num_flows: K.
        like: The states.

    Returns:
        One stretch, or under a schedule one or more from output to output; none where nothing moves.
    """
    if not t.numel():
        return []
    if not isinstance(control, Schedule):
        segment = _stretched(control, t, torch.finfo(like.dtype).eps) or _from_knot_to_knot(control, t)
        return [] if segment is None else [segment]
    return _under_schedule(control, t, batch, num_flows, like)


def _stretched(control: PieceControl, t: Tensor, eps: float) -> Segment | None:
    """One rate for the whole solve, where the times of all samples are one grid, stretched and shifted."""
    if t.requires_grad:
        return None
    spans = t[-1] - t[0]
    longest = int(spans.abs().argmax())
    grid = (t.flatten(1)[:, longest] - t[0].flatten()[longest]).abs()
    whole = float(grid[-1])
    if whole == 0 or not bool((grid.diff() > 0).all()):
        return None
    clock = Clock((0.0,), t[:1], (spans / whole).unsqueeze(0))
    fitted = t[0] + clock.rates * grid.reshape(-1, *[1] * (t.ndim - 1))
    if bool(((fitted - t).abs() > 4 * eps * t.abs().amax()).any()):
        return None
    return Segment(control, grid, 0, len(grid), clock)


def _from_knot_to_knot(control: PieceControl, t: Tensor) -> Segment | None:
    """Rates that change at every output."""
    steps = t.diff(dim=0)
    lengths = steps.detach().abs().flatten(1).amax(1)
    if (
        t.requires_grad
    ):  # where all rest, times have gradients still: those of a stretch that is followed at a rate of 0
        lengths = torch.where(lengths > 0, lengths, 1)
    moving = [i for i, length in enumerate(lengths.tolist()) if length > 0]
    if not moving:
        return None
    times = torch.cat([lengths.new_zeros(1), lengths[moving].cumsum(0)])
    rates = steps[moving] / lengths[moving].reshape(-1, *[1] * (t.ndim - 1))
    reached = np.cumsum([0, *(lengths > 0).tolist()]).tolist()  # of the clock's times, by each output
    clock = Clock(tuple(times[:-1].tolist()), t[moving], rates)
    straight = None if t.requires_grad else _straight(t[[0, *(i + 1 for i in moving)]], float(times[-1]))
    repeats = None if len(moving) == len(steps) else reached
    return Segment(control, times, 0, len(t), clock, repeats, straight=straight)


def _straight(t: Tensor, length: float) -> tuple[Clock, Tensor]:
    """A clock of one rate for each sample, and what it shows at each of the times."""
    rates = (t[-1] - t[0]) / length
    shown = torch.where(t == t[0], 0, ((t - t[0]) / rates).clamp(0, length))
    shown = torch.where((t == t[-1]) & (rates != 0), length, shown)
    return Clock((0.0,), t[:1], rates.unsqueeze(0)), shown


def _under_schedule(schedule: Schedule, t: Tensor, batch: Sequence[int], num_flows: int, like: Tensor) -> list[Segment]:
    """From output to output, each piece of the schedule for those samples that it reaches there."""
    schedule.at(float(t.detach().min()))
    bounds = [torch.as_tensor(x).to(t) for x in (-torch.inf, *schedule.moments[1:], torch.inf)]
    pieces = [resolve(c, batch, num_flows, dtype=like.dtype, device=like.device) for c in schedule.controls]
    ascending = t[-1] >= t[0]
    segments: list[Segment] = []
    now, wanted = t[0], []
    for i, (begin, end) in enumerate(pairwise(t)):
        # Written so that a sample that rests, and one whose way ends on a switch, has the gradient of its end alone.
        low, high = torch.where(ascending, begin, end), torch.where(ascending, end, begin)
        rests, arrived = begin == end, torch.zeros_like(ascending)
        for up, down in zip(range(len(pieces)), reversed(range(len(pieces))), strict=True):
            # A sample of ascending times is in its piece up to that piece's end, others down to its start.
            until = torch.where(ascending, bounds[up + 1], bounds[down])
            # One that begins on a switch that is learned goes on from there, which its last output did not.
            leaves = (until == begin) & ~rests & (until.requires_grad and i > 0)
            within = torch.where(until <= low, low, torch.where(until >= high, high, until))
            until = torch.where(leaves, until, within)
            arrives = (until == end) & torch.where(ascending, bounds[up + 1] > end, bounds[down] <= end) & ~arrived
            arrived |= arrives
            length = float((until - now).detach().abs().max())
            if length == 0 and bool((leaves | (rests & arrives & t.requires_grad)).any()):
                length = 1.0  # a stretch of rate 0, which has gradients
            if length > 0:
                clock = Clock((0.0,), now.unsqueeze(0), ((until - now) / length).unsqueeze(0))
                both = _merged(ascending, pieces[up], pieces[down], batch, num_flows, like)
                segments.append(Segment(both, t.new_tensor([0.0, length]), 0, 2, clock))
                now = until
        wanted.append(len(segments))
    if not segments:
        return []
    # Each stretch's end is an output as often as it is wanted; the start of the first one is one too.
    ends = [[1] * wanted.count(i) for i in range(1, len(segments) + 1)]
    ends[0] = [0] * (1 + wanted.count(0)) + ends[0]
    return [replace(segment, repeats=repeats) for segment, repeats in zip(segments, ends, strict=True)]


def _merged(
    ascending: Tensor, up: ResolvedControl, down: ResolvedControl, batch: Sequence[int], num_flows: int, like: Tensor
) -> PieceControl:
    """The control of samples of which some go forward, some back."""
    if up is down or bool(ascending.all()):
        return _written(up)
    if not bool(ascending.any()):
        return _written(down)
    first, second = (as_weights(one, batch, num_flows, like) for one in (up, down))
    weights = torch.where(ascending.unsqueeze(-1), first, second)
    return weights if up.weights is not None or down.weights is not None else weights.argmax(-1)


def _written(control: ResolvedControl) -> PieceControl:
    if control.weights is not None:
        return control.weights
    assert control.index is not None
    return control.index
