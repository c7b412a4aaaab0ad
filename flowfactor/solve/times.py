"""Checks of the times of a solve: those of all samples, or of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowfactor.control import times


def checked_times(z0: Tensor, t: Tensor | Sequence[float]) -> Tensor:
    """The times of a solve from ``z0 [*batch, D]``, ``[T]`` or ``[T, *batch]``, in float64 where the device has it.

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If they are of another shape, not finite, not monotone, or too coarse for the states' dtype.
    """
    wide = z0.new_zeros((), dtype=torch.float64) if z0.device.type != "mps" else z0
    t = times(t, wide)
    if t.ndim > 1:
        return _own_times(z0, t)
    if t.ndim != 1 or len(t) == 0:
        raise ValueError(
            "t must be a list of times, for example [0.0, 1.0], or times of each sample [T, *batch]; got shape "
            f"{list(t.shape)}"
        )
    now, values = t.detach(), t.tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"t holds NaN or infinity: {values}")
    # Compared as the solver will see them: two times that round to one are one.
    if not math.isfinite(values[-1] - values[0]) or not bool(torch.isfinite(now.to(z0.dtype)).all()):
        raise ValueError(
            f"times from {values[0]:g} to {values[-1]:g} are too large for {z0.dtype}: count in other units"
        )
    steps = now.to(z0.dtype).diff()
    if not bool((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"t must be strictly increasing or strictly decreasing, without repeats; got {values}")
    near = min((abs(b - a) for a, b in pairwise(values)), default=math.inf)
    _check_coarse(max(map(abs, values)), near, z0.dtype)
    return t


def _own_times(z0: Tensor, t: Tensor) -> Tensor:
    """Checks times ``[T, *batch]`` and spreads them over the batch."""
    batch = z0.shape[:-1]
    try:
        t = t.expand(len(t), *batch)
    except RuntimeError as error:
        raise ValueError(
            f"times of each sample must have shape [T, *batch], here [{', '.join(['T', *map(str, batch)])}]; got "
            f"{list(t.shape)}"
        ) from error
    now = t.detach()
    if len(t) == 0:
        raise ValueError("t holds no times: give at least the one that z0 is at")
    if not bool(torch.isfinite(now).all()):
        raise ValueError("t holds NaN or infinity")
    steps = now.diff(dim=0)
    turns = ~((steps >= 0).all(0) | (steps <= 0).all(0))
    if bool(turns.any()):
        first = turns.nonzero()[0].tolist()
        raise ValueError(
            f"the times of each sample must increase or decrease (or rest), and those of sample {first} do not: "
            f"{now[(slice(None), *first)].tolist()}"
        )
    sizes = steps.abs()
    near = sizes[sizes > 0]
    if near.numel():
        _check_coarse(float(now.abs().max()), float(near.min()), z0.dtype)
    return t


def _check_coarse(far: float, near: float, dtype: torch.dtype) -> None:
    """Raises ValueError where times ``near`` apart, and as far as ``far`` from 0, are too coarse for a dtype."""
    if near < _finest(far, dtype):
        raise ValueError(
            f"times as far from 0 as {far:g} and only {near:g} apart are too coarse in {dtype}: count them from the "
            "start of the solve, or take states in float64"
        )


def _finest(far: float, dtype: torch.dtype) -> float:
    """How near to each other times may be, as far as ``far`` from 0, that states of a dtype are to tell apart."""
    # Steps are shorter than intervals, and the field is asked at times of the state's precision.
    ulps = 100 if dtype in (torch.float32, torch.float64) else 8
    return ulps * torch.finfo(dtype).eps * far


def checked_start(start: object, t: Tensor, z0: Tensor) -> int | float | Tensor:
    """Where a solve over checked times ``t`` begins.

    Args:
        start: An index into the times, or a time between the first and the last; or an index for each sample ``[*batch]``.
        t: The times, ``[T]`` or ``[T, *batch]``.
        z0: States ``[*batch, D]``.

    Returns:
        An index from 0 on, where there is one for all; a time that is none of ``t``; or indices ``[*batch]``.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it lies outside of the times, or does not fit the batch.
    """
    if (
        isinstance(start, Tensor)
        and start.dtype != torch.bool
        and not start.is_floating_point()
        and not start.is_complex()
    ):
        return _checked_starts(start, t, z0)
    if isinstance(start, Tensor) and start.is_floating_point() and start.ndim == 0 and not start.requires_grad:
        start = float(start)
    if isinstance(start, float):
        return _checked_moment(start, t, z0)
    if isinstance(start, (bool, Tensor)) or not hasattr(start, "__index__"):
        got = f"a tensor of {start.dtype}, shape {list(start.shape)}" if isinstance(start, Tensor) else repr(start)
        learned = ", and its gradient is not to be had" if isinstance(start, Tensor) and start.requires_grad else ""
        raise TypeError(
            "start must be an index into t (an int, or one a sample as an integer tensor [*batch]) or one time in frames (a "
            f"float); got {got}{learned}"
        )
    index = int(start.__index__())  # type: ignore[attr-defined]
    if not -len(t) <= index < len(t):
        raise ValueError(
            f"start={index} is no index into {len(t)} times; to begin at a time give a float, start={index}.0"
        )
    return index % len(t)


def _checked_starts(start: Tensor, t: Tensor, z0: Tensor) -> int | Tensor:
    """The index of all samples, or of each."""
    batch = list(z0.shape[:-1])
    if start.device != z0.device and start.ndim:
        raise ValueError(f"start is on {start.device} and the state on {z0.device}; move one with .to(...)")
    try:
        index = start.long().expand(batch)
    except RuntimeError as error:
        raise ValueError(f"start must hold one index a sample, shape {batch}, got {list(start.shape)}") from error
    if not index.numel():
        return 0
    low, high = (int(x) for x in torch.aminmax(start))
    if low < -len(t) or high >= len(t):
        raise ValueError(f"start holds indices from {low} to {high}, and there are {len(t)} times")
    return low % len(t) if low == high else index % len(t)


def _checked_moment(start: float, t: Tensor, z0: Tensor) -> int | float:
    """A time to begin at, or the index of the output that it is."""
    if t.ndim > 1:
        raise ValueError(
            f"start={start!r} is a time, and each sample has times of its own: give an index into these, one for all or "
            "one a sample"
        )
    values = t.tolist()
    finest = _finest(max(map(abs, values)), z0.dtype)
    near = min(range(len(values)), key=lambda i: abs(values[i] - start))
    if abs(values[near] - start) <= finest:
        return near
    if not min(values) < start < max(values):  # so for NaN
        raise ValueError(
            f"start={start!r} lies outside of the times from {values[0]:g} to {values[-1]:g}; add it to t, or give an "
            "index into t as an int"
        )
    return start
