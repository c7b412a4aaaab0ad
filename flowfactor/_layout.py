"""How samples are laid out so that each pays for its own flow only.

Parts with K stacked networks keep parameters ``[K, ...]``. A layout picks the networks that a control needs and shapes
the samples to match: one network for all samples, a batched product over equal groups, one product per unequal group,
or all K networks for weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfactor.control import ResolvedControl

Stack = dict[str, Tensor]


class Layout:
    """One network for all samples: the base case, and the interface of the others.

    Args:
        batch_shape: The shape of the batch, kept to restore it.
    """

    def __init__(self, batch_shape: Sequence[int], index: int = 0) -> None:
        self.batch_shape = tuple(batch_shape)
        self.index = index

    def select(self, stack: Stack) -> list[Stack]:
        """The parameters of each chunk of samples."""
        return [{name: value[self.index] for name, value in stack.items()}]

    def modules(self) -> list[int]:
        """The flow of each chunk, for parts that hold K separate modules."""
        return [self.index]

    def scatter(self, x: Tensor, event_ndim: int = 1) -> list[Tensor]:
        """Cuts ``x [*batch, *event]`` into the samples of each chunk ``[n, *event]``."""
        return [x.reshape((-1, *_event(x, event_ndim)))]

    def gather(self, chunks: Sequence[Tensor], event_ndim: int) -> Tensor:
        """Puts chunk results ``[n, *event]`` back together as ``[*batch, *event]``."""
        return chunks[0].reshape((*self.batch_shape, *_event(chunks[0], event_ndim)))


def sorted_by_flow(index: Tensor, num_flows: int) -> tuple[list[int], list[int], Tensor | None]:
    """Sorts samples by the flow of each.

    Args:
        index: Flows ``[N]``.
        num_flows: K.

    Returns:
        The flows that occur, how many samples each has, and the samples in order of their flows ``[N]``, None where they
        stand so already.
    """
    counts = torch.bincount(index, minlength=num_flows).tolist()
    flows = [k for k, count in enumerate(counts) if count]
    in_order = bool((index[1:] >= index[:-1]).all())
    return flows, [counts[k] for k in flows], None if in_order else torch.argsort(index, stable=True)


class GroupedLayout(Layout):
    """One flow per sample: samples are grouped by flow, and each group meets its own network alone."""

    def __init__(self, batch_shape: Sequence[int], index: Tensor, num_flows: int) -> None:
        super().__init__(batch_shape)
        self.flows, self.sizes, self.order = sorted_by_flow(index.reshape(-1), num_flows)
        self.inverse = None if self.order is None else torch.argsort(self.order)
        self.equal = len(set(self.sizes)) == 1
        self.all_flows = self.flows == list(range(num_flows))

    def select(self, stack: Stack) -> list[Stack]:
        if not self.equal:
            return [{name: value[k] for name, value in stack.items()} for k in self.flows]
        if self.all_flows:
            return [dict(stack)]
        return [{name: value[self.flows] for name, value in stack.items()}]

    def modules(self) -> list[int]:
        return self.flows

    def scatter(self, x: Tensor, event_ndim: int = 1) -> list[Tensor]:
        event = _event(x, event_ndim)
        flat = x.reshape((-1, *event))
        if self.order is not None:
            flat = flat[self.order]
        if self.equal:
            return [flat.reshape(len(self.flows), -1, *event)]
        return list(flat.split(self.sizes))

    def gather(self, chunks: Sequence[Tensor], event_ndim: int) -> Tensor:
        event = _event(chunks[0], event_ndim)
        flat = chunks[0].reshape((-1, *event)) if len(chunks) == 1 else torch.cat(list(chunks))
        if self.inverse is not None:
            flat = flat[self.inverse]
        return flat.reshape((*self.batch_shape, *event))


class SplitLayout(GroupedLayout):
    """Groups kept apart even when they are equal: for K separate modules, which no batched product can serve."""

    def __init__(self, batch_shape: Sequence[int], index: Tensor, num_flows: int) -> None:
        super().__init__(batch_shape, index, num_flows)
        self.equal = False


class WeightedLayout(Layout):
    """A weighted superposition: every sample meets all K networks."""

    def __init__(self, batch_shape: Sequence[int], weights: Tensor, *, stacked: bool = True) -> None:
        super().__init__(batch_shape)
        self.num_flows = weights.shape[-1]
        self.weights = weights.reshape(-1, self.num_flows).mT  # [K, n]
        self.stacked = stacked

    def select(self, stack: Stack) -> list[Stack]:
        return [dict(stack)]

    def modules(self) -> list[int]:
        return list(range(self.num_flows))

    def scatter(self, x: Tensor, event_ndim: int = 1) -> list[Tensor]:
        flat = x.reshape((-1, *_event(x, event_ndim)))
        if self.stacked:
            return [flat.expand(self.num_flows, *flat.shape)]
        return [flat] * self.num_flows

    def gather(self, chunks: Sequence[Tensor], event_ndim: int) -> Tensor:
        every = chunks[0] if self.stacked else torch.stack(list(chunks))  # [K, n, *event]
        event = _event(every, event_ndim)
        weights = self.weights.reshape(*self.weights.shape, *[1] * event_ndim)
        return (weights * every).sum(0).reshape((*self.batch_shape, *event))


def layout_of(control: ResolvedControl, batch_shape: Sequence[int], num_flows: int, *, stacked: bool = True) -> Layout:
    """Chooses the layout of a control.

    Args:
        control: The resolved control.
        batch_shape: Shape of the batch.
        num_flows: K.
        stacked: Whether the K networks are stacked tensors (True) or separate modules (False).

    Returns:
        The layout.
    """
    if control.weights is not None:
        return WeightedLayout(batch_shape, control.weights, stacked=stacked)
    if isinstance(control.index, Tensor):
        if control.index.numel() == 0:
            return Layout(batch_shape)
        kind = GroupedLayout if stacked else SplitLayout
        return kind(batch_shape, control.index, num_flows)
    return Layout(batch_shape, control.index or 0)


def run(
    layout: Layout,
    functions: Sequence[Callable[..., dict[str, Tensor]]],
    z: Tensor,
    t: Tensor,
    event_ndims: dict[str, int],
) -> dict[str, Any]:
    """Evaluates one function per chunk and gathers the named results.

    Args:
        layout: The layout of the batch.
        functions: One function ``(z, t) -> {name: result}`` per chunk.
        z: States ``[*batch, D]``.
        t: Scalar or ``[*batch]``.
        event_ndims: Number of trailing event dimensions of each result.

    Returns:
        The results, each ``[*batch, *event]``.
    """
    zs = layout.scatter(z)
    ts = [t] * len(zs) if t.ndim == 0 else layout.scatter(t, 0)
    chunks = [function(zc, tc) for function, zc, tc in zip(functions, zs, ts, strict=True)]
    return {name: layout.gather([c[name] for c in chunks], event_ndims[name]) for name in chunks[0]}


def _event(x: Tensor, event_ndim: int) -> tuple[int, ...]:
    return tuple(x.shape[x.ndim - event_ndim :])
