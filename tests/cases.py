"""Products of independent axes, thinned: `make test` runs so many that each pair of values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*sizes: int) -> list[tuple[int, ...]]:
    """Few cases of a product of axes, in which every pair of values of two axes occurs together."""
    cases = list(itertools.product(*map(range, sizes)))
    axes = list(itertools.combinations(range(len(sizes)), 2))

    def pairs(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, case[i], j, case[j]) for i, j in axes}

    open_pairs = set().union(*map(pairs, cases))
    chosen = []
    while open_pairs:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & open_pairs)))
        open_pairs -= pairs(chosen[-1])
    return chosen


def product(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes by the product of axes; cases that no pair of values needs are marked slow."""
    needed = set(pairwise(*map(len, axes.values())))
    params = []
    for case in itertools.product(*(range(len(values)) for values in axes.values())):
        values = [axis[i] for axis, i in zip(axes.values(), case, strict=True)]
        params.append(pytest.param(*values, marks=() if case in needed else pytest.mark.slow))
    return pytest.mark.parametrize(tuple(axes), params)
