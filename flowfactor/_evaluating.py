"""Models in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Puts a model into evaluation mode for a while, and every module of it back into the mode it was in.

    Args:
        model: The model. What is no module itself, but wraps one as its ``model``, has the modes of that one; anything
            else has none, and is left alone.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     [part.training for part in model]
        [False, False]
        >>> [part.training for part in model]
        [True, False]
    """
    while not isinstance(model, nn.Module) and hasattr(model, "model"):
        model = model.model  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(model, nn.Module):
        yield
        return
    # Not model.train(): it would switch on parts that are frozen in evaluation mode.
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
