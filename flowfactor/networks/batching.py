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

from flowfactor.context import Context, joined
from flowfactor.control import ResolvedControl

Stack = dict[str, Tensor]
ENTERS = "_context"
"""How the weights by which a context enters a bias are called, after the bias: ``b1_context [K, H, C]`` beside ``b1``."""


class Layout:
    """Samples grouped by flow: each group meets its own network alone. Made by `layout_of` and `block_of`.

    Groups of one size can lie as one block ``[G, n, *event]``, which meets stacked parameters ``[G, ...]`` in batched
    products; else each group is a chunk ``[n, *event]`` of its own.

    Args:
        batch_shape: The shape of the batch, kept to restore it.
        flows: The flow of each group.
        sizes: The size of each group where they lie apart; None where they are one block.
        order: The samples in the order in which the groups hold them, ``[N]``; a sample may occur more than once. None
            where they stand in order already.
        place: Where each sample is then, ``[N]``; None likewise.
        context: The context of the samples, as the control has it.
    """

    def __init__(
        self, batch_shape: Sequence[int], flows: Sequence[int], sizes: Sequence[int] | None = None,
        order: Tensor | None = None, place: Tensor | None = None, context: Context | None = None,
    ) -> None:  # fmt: skip
        self.batch_shape = tuple(batch_shape)
        self.flows, self.sizes = list(flows), sizes
        self.order, self.place, self.context = order, place, context

    def select(self, stack: Stack) -> list[Stack]:
        """The parameters of each chunk of samples.

        What a context adds to a bias is the same at every stage: it is added here, once a solve. Such a bias then has a row
        for each sample, ``[n, H]`` or ``[G, n, H]``.
        """
        chosen = self._chosen(stack)
        if not any(name.endswith(ENTERS) for name in stack):
            return chosen
        return [_entered(own, context) for own, context in zip(chosen, self.contexts(), strict=True)]

    def contexts(self) -> list[Context | None]:
        """The context of each chunk of samples."""
        if isinstance(self.context, Tensor):
            return list(self.scatter(self.context))
        if self.context is None:
            return [None] * self.chunks
        parts = [self.scatter(x) for x in self.context.values()]
        return [dict(zip(self.context, chunk, strict=True)) for chunk in zip(*parts, strict=True)]

    @property
    def chunks(self) -> int:
        """Into how many pieces `scatter` cuts."""
        return 1 if self.sizes is None else len(self.flows)

    def _chosen(self, stack: Stack) -> list[Stack]:
        if self.sizes is not None:
            return [{name: value[k] for name, value in stack.items()} for k in self.flows]
        if self.flows == list(range(len(next(iter(stack.values()))))):
            return [dict(stack)]
        k = self.flows[0]
        which = slice(k, k + 1) if len(self.flows) == 1 else self.flows
        return [{name: value[which] for name, value in stack.items()}]

    def scatter(self, x: Tensor, event_ndim: int = 1) -> list[Tensor]:
        """Cuts ``x [*batch, *event]`` into the samples of each chunk."""
        event = _event(x, event_ndim)
        flat = x.reshape((-1, *event))
        if self.order is not None:
            flat = flat[self.order]
        if self.sizes is None:
            return [flat.reshape(len(self.flows), -1, *event)]
        return [flat] if len(self.flows) == 1 else list(flat.split(list(self.sizes)))

    def gather(self, chunks: Sequence[Tensor], event_ndim: int) -> Tensor:
        """Puts the results of all chunks back together as ``[*batch, *event]``.

        Those of a block may have leading dimensions, ``[*lead, G, n, *event]``, which the result then has too.
        """
        first, event = chunks[0], _event(chunks[0], event_ndim)
        lead = tuple(first.shape[: first.ndim - event_ndim - 2]) if self.sizes is None else ()
        flat = first.reshape((*lead, -1, *event)) if len(chunks) == 1 else torch.cat(list(chunks))
        if self.place is not None:
            flat = flat.index_select(len(lead), self.place)
        return flat.reshape((*lead, *self.batch_shape, *event))

    def shares(self) -> Tensor | None:
        """The weight of each place of a block in a mean over the batch, ``[G, n]``; None where all are the same."""
        if self.place is None or self.order is None or self.order.numel() == self.place.numel():
            return None
        shares = torch.zeros(self.order.numel(), device=self.order.device)
        shares[self.place] = 1 / len(self.place)
        return shares.reshape(len(self.flows), -1)


class WeightedLayout(Layout):
    """A weighted superposition: every sample meets all K networks."""

    def __init__(
        self, batch_shape: Sequence[int], weights: Tensor, *, stacked: bool = True, context: Context | None = None
    ) -> None:
        super().__init__(batch_shape, range(weights.shape[-1]), context=context)
        self.weights = weights.reshape(-1, weights.shape[-1]).mT  # [K, n]
        self.stacked = stacked

    @property
    def chunks(self) -> int:
        return 1 if self.stacked else len(self.flows)

    def scatter(self, x: Tensor, event_ndim: int = 1) -> list[Tensor]:
        flat = x.reshape((-1, *_event(x, event_ndim)))
        return [flat.expand(len(self.flows), *flat.shape)] if self.stacked else [flat] * len(self.flows)

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
        stacked: Whether the K networks are stacked tensors (True) or separate modules (False), for which groups lie apart
            even where they are equal.

    Returns:
        The layout.
    """
    context = control.context
    if control.weights is not None:
        return WeightedLayout(batch_shape, control.weights, stacked=stacked, context=context)
    if not isinstance(control.index, Tensor):
        return Layout(batch_shape, [control.index or 0], [-1], context=context)
    if control.index.numel() == 0:
        return Layout(batch_shape, [0], [0], context=context)
    flows, sizes, order = _sorted_by_flow(control.index.reshape(-1), num_flows)
    block = stacked and len(set(sizes)) == 1
    place = None if order is None else torch.argsort(order)
    return Layout(batch_shape, flows, None if block else sizes, order, place, context)


_WASTE = 1.34  # places of a block, over samples, up to which unequal groups are filled up


def block_of(control: ResolvedControl, batch_shape: Sequence[int], num_flows: int) -> Layout | None:
    """Lays out samples as one block, for solves by closed forms; None where that would be wasteful.

    Smaller groups are filled up by repeating a sample of their own. A repeated sample takes part in a solve like any other
    and changes nothing: its result is dropped, and it is as accurate as the one it repeats. Under weights every flow acts
    on every sample: all are one group, whose flow says nothing.
    """
    context = control.context
    if control.weights is not None:
        return Layout(batch_shape, [0], context=context)
    if not isinstance(control.index, Tensor):
        return Layout(batch_shape, [control.index or 0], context=context)
    flat = control.index.reshape(-1)
    flows, sizes, order = _sorted_by_flow(flat, num_flows)
    longest = max(sizes)
    if longest * len(sizes) > _WASTE * len(flat):
        return None
    if longest != min(sizes):
        groups = (torch.arange(len(flat), device=flat.device) if order is None else order).split(sizes)
        order = torch.cat([piece for g in groups for piece in (g, g[-1:].expand(longest - len(g)))])
    if order is None:
        return Layout(batch_shape, flows, context=context)
    place = torch.empty_like(flat)  # of a sample's repetitions, the first place
    place[order.flip(0)] = torch.arange(order.numel(), device=flat.device).flip(0)
    return Layout(batch_shape, flows, None, order, place, context)


def _sorted_by_flow(index: Tensor, num_flows: int) -> tuple[list[int], list[int], Tensor | None]:
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


def _entered(stack: Stack, context: Context | None) -> Stack:
    """Parameters whose biases have what the context adds to them."""
    if context is None:
        raise ValueError("this part was built with a context and is evaluated without one")
    own = {name: value for name, value in stack.items() if not name.endswith(ENTERS)}
    features = joined(context)
    for name, value in stack.items():
        if name.endswith(ENTERS):
            bias = name.removesuffix(ENTERS)
            own[bias] = own[bias] + features @ value.mT
    return own


def _event(x: Tensor, event_ndim: int) -> tuple[int, ...]:
    return tuple(x.shape[x.ndim - event_ndim :])
