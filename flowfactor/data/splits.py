"""Dividing recorded sequences into training and test, and drawing some of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor._checks import check_count

_ATTEMPTS = 64


def split_groups(
    labels: Sequence[int],
    groups: Sequence[str],
    fraction: float = 0.1,
    seed: int = 0,
    *,
    names: Sequence[str] = (),
    of: str = "film",
) -> list[bool]:
    """Chooses test sequences: some of every class, and of every group all or none.

    Groups are drawn by a hash of their names and the seed, so that the choice does not depend on the order of sequences
    or on versions of anything. Of several draws the one with the most even shares is taken.

    Args:
        labels: The class of each sequence, -1 for none.
        groups: The group of each sequence.
        fraction: Share of each class's sequences that the test split should get: as near as whole groups allow, and at
            least one group.
        seed: Seed of the draw.
        names: Names of the classes, for messages.
        of: What a group is called in messages.

    Returns:
        For each sequence, whether it is for testing.

    Raises:
        TypeError: If `seed` is no integer.
        ValueError: If a class has one group only, or the groups' classes overlap so that no division was found, or
            `fraction` is not between 0 and 1.

    Example:
        >>> split_groups([0, 0, 0, 1, 1, 1], ["a", "a", "b", "c", "c", "d"])
        [False, False, True, False, False, True]
    """
    seed = check_count("seed", seed, 0)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"the share of the test split (data.test_fraction) must lie between 0 and 1, got {fraction!r}")
    held: dict[str, Counter[int]] = {}
    for label, group in zip(labels, groups, strict=True):
        held.setdefault(group, Counter())[label] += 1
    totals = Counter(labels)
    _check_enough(held, totals, names, of)
    wanted = {label: max(1, round(fraction * count)) for label, count in totals.items()}
    best: tuple[float, set[str]] | None = None
    for attempt in range(_ATTEMPTS):
        order = sorted(held, key=lambda name: hashlib.blake2b(f"{seed}|{attempt}|{name}".encode()).digest())
        chosen, have = _taken(order, held, totals, wanted)
        if any(not have[label] for label in totals):
            continue
        off = max(abs(have[label] - wanted[label]) / totals[label] for label in totals)
        if best is None or off < best[0]:
            best = off, chosen
        if off == 0:
            break
    if best is None:
        raise ValueError(
            f"the {len(held)} {of}s hold sequences of several classes each, and no division of them that leaves every "
            f"class on both sides was found in {_ATTEMPTS} draws: add {of}s, or give a folder for testing "
            "(data.test_root)"
        )
    return [group in best[1] for group in groups]


def _taken(
    order: Sequence[str], held: dict[str, Counter[int]], totals: Counter[int], wanted: dict[int, int]
) -> tuple[set[str], Counter[int]]:
    """Takes groups in order where they bring the classes' numbers nearer to what is wanted, and leave some to train on."""
    chosen: set[str] = set()
    have: Counter[int] = Counter()
    for group in order:
        own = held[group]
        if any(have[label] + count >= totals[label] for label, count in own.items()):
            continue
        nearer = sum(
            abs(have[label] + count - wanted[label]) - abs(have[label] - wanted[label]) for label, count in own.items()
        )
        if nearer < 0 or any(not have[label] for label in own):
            chosen.add(group)
            have.update(own)
    return chosen, have


def _check_enough(held: dict[str, Counter[int]], totals: Counter[int], names: Sequence[str], of: str) -> None:
    groups = Counter(label for own in held.values() for label in own)
    alone = [label for label in sorted(totals) if groups[label] < 2]
    if alone:
        told = "; ".join(
            f"{f'class {names[label]!r}' if label >= 0 and names else 'the data'}: {totals[label]} "
            f"sequence{'s' if totals[label] > 1 else ''} of {groups[label]} {of}"
            for label in alone
        )
        raise ValueError(
            f"no test split can be taken from {told}. Sequences of one {of} are not put on both sides, for then what is "
            f"measured is memory: add {of}s, or give a folder for testing (data.test_root)"
        )


def join_groups(groups: Sequence[str], frames: Sequence[Sequence[bytes]]) -> list[str]:
    """Joins the groups of sequences that have a frame in common.

    Args:
        groups: The group of each sequence.
        frames: What tells the frames of each sequence apart; equal where frames are.

    Returns:
        The group of each sequence; joined groups take the name of the first.

    Example:
        >>> join_groups(["a", "b", "c"], [[b"1", b"2"], [b"2", b"3"], [b"4"]])
        ['a', 'a', 'c']
    """
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[bytes, str] = {}
    place = {group: n for n, group in reversed(list(enumerate(groups)))}
    for group, own in zip(groups, frames, strict=True):
        for frame in own:
            one, other = root(first.setdefault(frame, group)), root(group)
            if one != other:
                one, other = sorted((one, other), key=place.__getitem__)
                parent[other] = one
    return [root(group) for group in groups]


def draw(count: int, limit: int, labels: Tensor | None = None, seed: int = 0) -> Tensor:
    """Draws some elements of a data set at random: of every label as equal numbers as there are.

    Args:
        count: Number of elements.
        limit: Number to draw; all, if there are not more.
        labels: The label of each [count]; None, or negative ones, for none.
        seed: Seed of the draw.

    Returns:
        Indices in ascending order.

    Raises:
        TypeError: If `limit` or `seed` is no integer.
        ValueError: If `limit` is below the number of labels.

    Example:
        >>> draw(6, 4, torch.tensor([0, 0, 0, 0, 0, 1]))
        tensor([0, 2, 3, 5])
    """
    limit, seed = check_count("limit", limit), check_count("seed", seed, 0)
    if limit >= count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None or bool((labels < 0).any()):
        return order[:limit].sort().values
    piles = [order[labels[order] == label] for label in labels.unique()]
    if limit < len(piles):
        raise ValueError(f"limit must be at least {len(piles)}, one of every transformation, got {limit}")
    shares, left = [0] * len(piles), limit
    by_size = sorted(range(len(piles)), key=lambda pile: len(piles[pile]))
    for rank, pile in enumerate(by_size):  # from the smallest on: what one cannot give, the larger ones share
        shares[pile] = min(len(piles[pile]), left // (len(piles) - rank))
        left -= shares[pile]
    return torch.cat([pile[:share] for pile, share in zip(piles, shares, strict=True)]).sort().values
