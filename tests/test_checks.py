"""Whole numbers that users give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flowfactor as ff
from flowfactor._checks import check_count


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_any_kind_become_plain(value: object) -> None:
    assert type(check_count("steps", value)) is int and check_count("steps", value) == 3


@pytest.mark.parametrize("value", [3.0, "3", None, True, np.float32(3), torch.tensor(3.0), [3]])
def test_what_is_no_integer_is_named(value: object) -> None:
    with pytest.raises(TypeError, match=r"steps must be an integer, got .* \(frames less one\)"):
        check_count("steps", value, note="frames less one")


def test_what_is_too_small_is_named() -> None:
    with pytest.raises(ValueError, match=r"steps must be at least 2, got 1$"):
        check_count("steps", np.int32(1), 2)


def test_sizes_from_numpy_make_a_potential() -> None:
    u = ff.potentials.MLPPotential(np.int64(4), np.int32(2))
    assert u(torch.zeros(3, 4), 0.0, 1).shape == (3,) and type(u.dim) is int
