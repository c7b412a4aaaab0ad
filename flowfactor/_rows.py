"""Samples sorted by flow into a block ``[K, n, ...]``, once for a whole solve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor._layout import Stack, sorted_by_flow
from flowfactor.control import ResolvedControl

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
