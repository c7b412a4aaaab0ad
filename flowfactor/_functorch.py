"""What torch.func is doing: torch tells it by private functions alone, and all that is asked of them is asked here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def is_transforming() -> bool:
    """Whether a transform of torch.func is under way."""
    return _functorch.peek_interpreter_stack() is not None


def is_plain() -> bool:
    """Whether operations run as written: no compiler traces them, no transform or forward derivative follows them."""
    compiling = torch.compiler.is_compiling()
    return not compiling and not is_transforming() and torch.autograd.forward_ad._current_level < 0


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor is the wrapper of a transform, which has no storage of its own."""
    return _functorch.is_functorch_wrapped_tensor(x)


def unwrapped(x: Tensor) -> Tensor:
    """What the wrapper of a transform holds."""
    return _functorch.get_unwrapped(x)


def is_batched(x: Tensor) -> bool:
    """Whether torch.vmap hides a dimension of a tensor, maybe below the wrappers of other transforms."""
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False
