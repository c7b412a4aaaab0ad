"""Context: features of each sample, such as a class, a pose or a text embedding, that steer its flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from flowfactor._checks import check_count, choices
from flowfactor._tensors import check_dense

Context: TypeAlias = "Tensor | Mapping[str, Tensor]"
ContextSize: TypeAlias = "int | Mapping[str, int]"


def context_size(size: ContextSize) -> int | dict[str, int]:
    """Checks what a part says about the context that it takes.

    Args:
        size: C, the number of features; 0 for no context; or such a number for each name.

    Returns:
        The same as an int or a dict.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size is negative, or one of a mapping is not positive.

    Example:
        >>> context_size(3), context_size({"pose": 6, "class": 10})
        (3, {'pose': 6, 'class': 10})
    """
    if not isinstance(size, Mapping):
        return 0 if isinstance(size, int) and not isinstance(size, bool) and size == 0 else check_count("context", size)
    if not size:
        raise ValueError("context={} names no features; take context=0 for a part without context")
    return {str(name): check_count(f"context[{name!r}]", each) for name, each in size.items()}


def features_of(size: ContextSize) -> int:
    """C, the number of all features of a context together."""
    return sum(size.values()) if isinstance(size, Mapping) else size


def joined(context: Context) -> Tensor:
    """The features ``[*batch, C]``; those of a mapping one after the other."""
    return torch.cat(list(context.values()), -1) if isinstance(context, Mapping) else context


def resolve_context(
    context: Context | None, size: ContextSize, batch_shape: Sequence[int], *, like: Tensor, part: str
) -> Context | None:
    """Checks a context and spreads it over a batch.

    Args:
        context: The context, ``[*batch, C]`` or what broadcasts to it, or such a tensor for each name.
        size: What is expected.
        batch_shape: The batch.
        like: The states that it goes with.
        part: What takes it, for messages.

    Returns:
        The context ``[*batch, C]``, or one such tensor for each name in the order of ``size``; None where there is none.

    Raises:
        TypeError: If it holds no tensors of the dtype of the states.
        ValueError: If it is missing, unexpected, of the wrong width, batch, device, or not finite.

    Example:
        >>> import torch
        >>> resolve_context(torch.ones(2), 2, (5,), like=torch.zeros(5, 3), part="MLPPotential").shape
        torch.Size([5, 2])
    """
    if context is None:
        if features_of(size):
            raise ValueError(
                f"{part} was built with context={size!r} and got none: hand over context=, {_wanted(size)}"
            )
        return None
    if not features_of(size):
        raise ValueError(f"{part} takes no context and got one: build it with context=C, the number of features")
    if not isinstance(size, Mapping):
        if isinstance(context, Mapping):
            raise TypeError(
                f"{part} takes a tensor as its context, {_wanted(size)}; got a mapping of {sorted(context)}"
            )
        return _spread("context", context, size, batch_shape, like)
    if not isinstance(context, Mapping):
        raise TypeError(f"{part} takes a mapping as its context, {_wanted(size)}; got {type(context).__name__}")
    for name in context:
        if name not in size:
            raise ValueError(f"{part} knows no context {name!r}{choices(str(name), list(size))}")
    for name in size:
        if name not in context:
            raise ValueError(f"the context of {part} lacks {name!r}: it is {_wanted(size)}")
    return {name: _spread(f"context[{name!r}]", context[name], each, batch_shape, like) for name, each in size.items()}


def context_shape(context: Context | None) -> torch.Size:
    """The batch shape that a context asks for, whatever its features.

    Args:
        context: The context, not checked yet.

    Returns:
        [] for none, else the shape without the last dimension; of a mapping what its tensors broadcast to.

    Raises:
        TypeError: If it is no tensor and no mapping of tensors.
        ValueError: If the tensors of a mapping do not broadcast.

    Example:
        >>> import torch
        >>> context_shape(torch.ones(4, 3)), context_shape(None)
        (torch.Size([4]), torch.Size([]))
    """
    if context is None:
        return torch.Size()
    tensors = list(context.values()) if isinstance(context, Mapping) else [context]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a context is a tensor [*batch, C] or a mapping of such, got {type(tensor).__name__}")
    shapes = [tensor.shape[:-1] for tensor in tensors]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"the tensors of a context must broadcast to one batch shape, got {listed}") from error


def _wanted(size: ContextSize) -> str:
    if isinstance(size, Mapping):
        return "a mapping of " + ", ".join(f"{name} [*batch, {each}]" for name, each in size.items())
    return f"a tensor [*batch, {size}]"


def _spread(name: str, context: object, size: int, batch_shape: Sequence[int], like: Tensor) -> Tensor:
    if not isinstance(context, Tensor):
        raise TypeError(f"{name} must be a tensor [*batch, {size}], got {type(context).__name__}")
    check_dense(name, context)
    if context.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(f"{name} is {context.dtype} and the state is {like.dtype}; convert one with .to(...)")
    if context.device != like.device:
        raise ValueError(f"{name} is on {context.device} and the state on {like.device}; move one with .to(...)")
    if context.ndim == 0 or context.shape[-1] != size:
        raise ValueError(f"{name} must have {size} features, shape [*batch, {size}]; got {list(context.shape)}")
    try:
        return context.expand(*batch_shape, size)
    except RuntimeError as error:
        raise ValueError(
            f"{name} of shape {list(context.shape)} does not fit a batch that needs {[*batch_shape, size]}"
        ) from error
