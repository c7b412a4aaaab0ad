"""Checks of the tensors that a user gives."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dense(name: str, x: Tensor) -> None:
    """Raises TypeError for sparse and nested tensors, which solves do not know."""
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it with .to_dense() or pad it")
