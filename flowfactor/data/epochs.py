"""Epochs: which elements make which batch, and what acts on each, drawn before any frame is made."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]


def draw_epoch(
    count: int,
    num_flows: int,
    labels: Tensor | None,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    stratified: bool = True,
    shuffle: bool = True,
    drop_last: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """Draws one epoch; `SequenceDataset.batches` documents the arguments.

    Args:
        count: Number of elements.
        num_flows: K.
        labels: The k of every element [count], where the data decide it; None where k is drawn.
        batch_size: Sequences per batch.
        generator: Source of the draws.
        stratified: As many sequences of each k in every batch.
        shuffle: Draw the elements in random order.
        drop_last: Leave out a last, incomplete batch.

    Returns:
        A list of (indices [B], k [B]), each sorted by k.

    Raises:
        ValueError: If `batch_size` does not suit the data set.

    Example:
        >>> [(indices.tolist(), k.tolist()) for indices, k in draw_epoch(5, 2, None, 2, shuffle=False)]
        [([0, 1], [0, 1]), ([2, 3], [0, 1])]
    """
    if batch_size < 1 or (batch_size > count and drop_last):
        raise ValueError(
            f"batch_size must be between 1 and the {count} elements of the data set, got {batch_size}; "
            "drop_last=False allows an incomplete batch"
        )
    if stratified and batch_size < num_flows:
        raise ValueError(f"a stratified batch needs at least {num_flows} sequences, got {batch_size=}")
    if labels is None:
        chunks = list(_order(count, generator, shuffle).split(batch_size))
        ks = [_shares(len(c), num_flows, i, generator, stratified) for i, c in enumerate(chunks)]
    elif stratified and num_flows > 1:
        chunks = _stratified(labels, num_flows, batch_size, generator, shuffle)
        ks = [labels[c] for c in chunks]
    else:
        chunks = list(_order(count, generator, shuffle).split(batch_size))
        chunks = [c[labels[c].argsort(stable=True)] for c in chunks]
        ks = [labels[c] for c in chunks]
    epoch = list(zip(chunks, ks, strict=True))
    return epoch[:-1] if drop_last and len(chunks[-1]) < batch_size else epoch


def _order(count: int, generator: torch.Generator | None, shuffle: bool) -> Tensor:
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=generator, device=generator.device if generator else None).cpu()


def _shares(size: int, flows: int, batch: int, generator: torch.Generator | None, stratified: bool) -> Tensor:
    """Gives the sorted k of a batch: equal numbers, the remainder going round; or uniform draws."""
    if not stratified:
        device = generator.device if generator else None
        return torch.randint(flows, (size,), generator=generator, device=device).cpu().sort().values
    return ((torch.arange(size) + batch * size) % flows).sort().values


def _stratified(
    labels: Tensor, flows: int, batch_size: int, generator: torch.Generator | None, shuffle: bool
) -> list[Tensor]:
    """Deals labelled elements into batches with equal numbers of every label, until one label runs out."""
    order = _order(len(labels), generator, shuffle)
    piles = [order[labels[order] == flow] for flow in range(flows)]
    used, batches = [0] * flows, []
    while True:
        counts = _shares(batch_size, flows, len(batches), None, True).bincount(minlength=flows).tolist()
        if any(used[f] + counts[f] > len(piles[f]) for f in range(flows)):
            break
        batches.append(torch.cat([piles[f][used[f] : used[f] + counts[f]] for f in range(flows)]))
        used = [used[f] + counts[f] for f in range(flows)]
    if not batches:
        sizes = [len(pile) for pile in piles]
        raise ValueError(
            f"the labels' {sizes} sequences do not fill one stratified batch of {batch_size}: "
            "take a smaller batch, or stratified=False"
        )
    return batches
