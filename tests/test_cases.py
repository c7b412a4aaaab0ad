"""Thinned products keep every value, and every pair of values, of their axes."""

from __future__ import annotations

import itertools

import cases
import pytest


@pytest.mark.parametrize("sizes", [(2, 3), (3, 4, 4, 2), (2, 2, 2, 2, 2), (1, 5, 2)])
def test_every_pair_of_values_occurs_in_few_cases(sizes: tuple[int, ...]) -> None:
    chosen = cases.pairwise(*sizes)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(case[i], case[j]) for case in chosen} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(chosen) == len(set(chosen)) <= 2 * largest[0] * largest[1]


def test_a_product_has_all_cases_and_marks_those_that_can_wait() -> None:
    params = cases.product(a=["x", "y"], b=[1, 2, 3], c=[True, False]).args[1]
    assert [p.values for p in params] == list(itertools.product("xy", [1, 2, 3], [True, False]))
    assert sum(not p.marks for p in params) == len(cases.pairwise(2, 3, 2)) == 6
    assert {mark.name for p in params for mark in p.marks} == {"slow"}
