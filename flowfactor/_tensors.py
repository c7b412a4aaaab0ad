"""Checks of the tensors that a user gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(name: str, x: Tensor) -> None:
    """Raises TypeError for sparse and nested tensors, which solves do not know."""
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it with .to_dense() or pad it")


def times(t: object, like: Tensor) -> Tensor:
    """Turns a user's time into a tensor of the dtype of ``like``, on its device.

    Args:
        t: A number, a sequence of numbers, an array, or a real tensor.
        like: The state that the time belongs to.

    Returns:
        The time; a tensor that already fits is returned as it is.

    Raises:
        TypeError: If it holds no real numbers.
        ValueError: If it is a tensor on another device.
    """
    if isinstance(t, Tensor):
        check_dense("times", t)
        if t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"times must be real numbers, got a tensor of {t.dtype}")
        if t.device != like.device and t.ndim > 0:
            raise ValueError(f"the times are on {t.device} and the state on {like.device}; move one with .to(...)")
        return t.to(dtype=like.dtype, device=like.device)
    if isinstance(t, (list, tuple)) and any(isinstance(x, Tensor) and x.requires_grad for x in t):
        return torch.stack([times(x, like) for x in t])  # as_tensor would cut them off from their graph
    try:
        return torch.as_tensor(t, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"times must be real numbers, got {t!r}") from error


def check_range(index: Tensor, num_flows: int) -> None:
    """Raises ValueError where indices name flows that do not exist."""
    if index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= num_flows:
        raise ValueError(
            f"flow indices run from 0 to {num_flows - 1} with {num_flows} flows; the control holds {low} to {high}"
        )


def spread(control: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """A control, repeated to a shape; raises ValueError where it does not fit."""
    try:
        return control.expand(tuple(shape))
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {list(control.shape)} does not fit a batch that needs {list(shape)}"
        ) from error
