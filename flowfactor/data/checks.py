"""Checks that several data sets share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data.arrays import as_tensor


def check_range(values: Tensor, what: str, *, at_once: int = 2**22) -> None:
    """Checks that pictures are uint8, or floating point in [0, 1] throughout.

    Args:
        values: Pictures, any shape.
        what: What they are called in the message.
        at_once: Number of leading rows' values that are looked at together, which bounds the memory it takes.

    Raises:
        ValueError: If the dtype is another, or a value is NaN or outside [0, 1].

    Example:
        >>> check_range(torch.tensor([0.0, 2.0]), "images")
        Traceback (most recent call last):
        ...
        ValueError: images must lie in [0, 1], but range from 0 to 2; divide them by 255 if they are bytes
    """
    if values.dtype == torch.uint8:
        return
    if not values.is_floating_point():
        raise ValueError(f"{what} must be uint8, or floating point in [0, 1], got {values.dtype}")
    rows = max(1, at_once * len(values) // max(values.numel(), 1))
    for part in values.split(rows):
        low, high = part.aminmax()
        if bool(low.isnan()) or bool(high.isnan()):
            raise ValueError(f"{what} hold NaN; every value must lie in [0, 1]")
        if float(low) < 0 or float(high) > 1:
            raise ValueError(
                f"{what} must lie in [0, 1], but range from {float(low):g} to {float(high):g}; "
                "divide them by 255 if they are bytes"
            )


def check_times(
    t: Tensor | np.ndarray | Sequence[float] | None, steps: int, device: torch.device | None = None
) -> Tensor:
    """Checks the times of sequences of T steps, or makes 0, 1, ..., T.

    Args:
        t: Times [T+1], strictly increasing, or None.
        steps: Number T of steps.
        device: Where the times belong.

    Returns:
        The times [T+1], float32.

    Raises:
        TypeError: If `steps` is no integer.
        ValueError: If it is below 1, or `t` are not such times.

    Example:
        >>> check_times(None, 3)
        tensor([0., 1., 2., 3.])
    """
    steps = check_count("steps", steps, note="a sequence has steps + 1 frames")
    if t is None:
        return torch.arange(steps + 1, dtype=torch.float32, device=device)
    times = as_tensor(t).to(device, torch.float32)
    if times.shape != (steps + 1,) or not bool((times.diff() > 0).all()) or not bool(times.isfinite().all()):
        raise ValueError(f"t must be {steps + 1} strictly increasing times, one a frame, got {times.tolist()}")
    return times


def sha256_of(marks: Sequence[Tensor], pictures: Sequence[Tensor]) -> str:
    """Hashes tensors, wherever they lie.

    Args:
        marks: Tensors that are hashed as they are.
        pictures: Tensors in which floating-point numbers are pictures in [0, 1]: those that were bytes once are these bytes
            again, whatever a device made of them.

    Returns:
        The SHA-256 in hexadecimal digits.

    Example:
        >>> sha256_of([], [torch.tensor([0.5])]) == sha256_of([], [torch.tensor([128], dtype=torch.uint8)])
        True
    """
    digest = hashlib.sha256()
    for mark in marks:
        digest.update(mark.cpu().contiguous().numpy().tobytes())
    for part in pictures:
        whole = part if not part.is_floating_point() else (part * 255).round().clamp(0, 255).to(torch.uint8)
        digest.update(whole.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_unit(pictures: Tensor) -> Tensor:
    """Gives pictures as float32 in [0, 1].

    Args:
        pictures: uint8 (0 to 255), or floating point in [0, 1].

    Returns:
        The same as float32.

    Example:
        >>> to_unit(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([0., 1.])
    """
    return pictures.to(torch.float32) / 255 if pictures.dtype == torch.uint8 else pictures.to(torch.float32)
