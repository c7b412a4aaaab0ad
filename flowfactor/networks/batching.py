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


_WASTE = 1.34  # rows of a block, over samples, up to which unequal groups are filled up


class Rows:
    """Which sample goes where: groups of one size, the smaller ones filled up by repeating a sample of their own.

    A repeated sample takes part in a solve like any other and changes nothing: its result is dropped, and it is as
    accurate as the one it repeats. Use `Rows.of`.

    Args:
        batch_shape: Shape of the batch.
        flows: The flow of each group.
        order: The sample in each place of the block, ``[groups, n]``; None where they stand in order already.
        place: The place of each sample in the flattened block, ``[N]``; None where they stand in order.
    """

    def __init__(
        self, batch_shape: Sequence[int], flows: list[int], order: Tensor | None = None, place: Tensor | None = None
    ) -> None:
        self.batch_shape = tuple(batch_shape)
        self.flows = flows
        self.order, self.place = order, place

    @classmethod
    def of(cls, control: ResolvedControl, batch_shape: Sequence[int], num_flows: int) -> Rows | None:
        """The rows of a control, or None where they cannot be laid out as one block without waste.

        Under weights every flow acts on every sample: all are one group, whose flow says nothing.
        """
        if control.weights is not None:
            return cls(batch_shape, [0])
        if not isinstance(control.index, Tensor):
            return cls(batch_shape, [control.index or 0])
        flat = control.index.reshape(-1)
        flows, sizes, order = sorted_by_flow(flat, num_flows)
        longest = max(sizes)
        if longest * len(sizes) > _WASTE * len(flat):
            return None
        if longest == min(sizes):
            if order is None:
                return cls(batch_shape, flows)
            block = order.reshape(len(flows), -1)
        else:
            groups = (torch.arange(len(flat), device=flat.device) if order is None else order).split(sizes)
            block = torch.stack([torch.cat([g, g[-1:].expand(longest - len(g))]) for g in groups])
        place = torch.empty_like(flat)
        place[block.reshape(-1).flip(0)] = torch.arange(block.numel(), device=flat.device).flip(0)
        return cls(batch_shape, flows, block, place)

    @property
    def filled(self) -> bool:
        """Whether some samples are repeated."""
        return self.place is not None and self.order is not None and self.order.numel() > self.place.numel()

    def shares(self) -> Tensor | None:
        """The weight of each place in a mean over the batch, ``[groups, n]``; None where all are the same."""
        if not self.filled:
            return None
        assert self.order is not None and self.place is not None
        shares = torch.zeros(self.order.numel(), device=self.order.device)
        shares[self.place] = 1 / len(self.place)
        return shares.reshape(self.order.shape)

    def select(self, stack: Stack, num_flows: int) -> Stack:
        """The parameters ``[groups, ...]`` of the flows that act."""
        if self.flows == list(range(num_flows)):
            return dict(stack)
        if len(self.flows) == 1:
            k = self.flows[0]
            return {name: value[k : k + 1] for name, value in stack.items()}
        return {name: value[self.flows] for name, value in stack.items()}

    def arrange(self, x: Tensor) -> Tensor:
        """``[*batch, D]`` as a block ``[groups, n, D]``."""
        flat = x.reshape(-1, x.shape[-1])
        if self.place is not None:
            assert self.order is not None
            return flat[self.order]
        return flat.reshape(len(self.flows), -1, x.shape[-1])

    def restore(self, y: Tensor, event_ndim: int) -> Tensor:
        """A block ``[lead, groups, n, *event]`` as ``[lead, *batch, *event]``."""
        event = y.shape[3:]
        assert len(event) == event_ndim
        flat = y.reshape(y.shape[0], -1, *event)
        if self.place is not None:
            flat = flat.index_select(1, self.place)
        return flat.reshape(y.shape[0], *self.batch_shape, *event)
