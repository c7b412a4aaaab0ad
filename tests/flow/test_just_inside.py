"""Times next to the end of a step, where processors take the smallest numbers for 0, as trainings have them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from flowfactor.solve.problem import just_inside


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def denormals(request: pytest.FixtureRequest) -> Iterator[None]:
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor cannot flush")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("end", "begin"), [(0.0, 4.0), (0.0, -4.0), (3.0, 4.0), (-3.0, 0.0), (1e9, -1e9), (5.0, 4.0)])
def test_it_lies_between(end: float, begin: float, denormals: None) -> None:
    inside = just_inside(end, begin)
    assert min(end, begin) < inside < max(end, begin)
    assert abs(inside - end) <= max(2 * math.ulp(end), 1e-300)
