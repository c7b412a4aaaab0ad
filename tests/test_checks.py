"""Whole numbers that users give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flowfactor as ff
from flowfactor._checks import check_count
from flowfactor._config import describe


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


@pytest.mark.parametrize("four", [np.int64(4), torch.tensor(4)])
def test_a_part_writes_plain_numbers(four) -> None:
    written = describe(ff.potentials.MLPPotential(four, hidden=(4, 4)))
    assert written == {"type": "potentials.MLPPotential", "arguments": {"dim": 4, "hidden": [4, 4]}}


def test_a_model_of_numpy_sizes_comes_back(tmp_path: Path) -> None:
    one, four, eight = np.int64(1), np.int32(4), np.int64(8)
    model = ff.models.build_vae(
        (one, eight, eight), np.int8(2), four, hidden=(eight, eight), frames_per_step=np.int64(2), supervision="weak",
        num_frames=np.int64(5), encoder={"widths": (eight,), "patch_size": four},
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    again = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)
    assert again.config() == model.config()
    flat = (
        ff.encoders.MLPEncoder(eight, four),
        ff.encoders.MLPDecoder(four, eight),
        ff.encoders.ConvEncoder(4, 1, eight),
    )
    assert [part.event_shape for part in flat] == [(8,), (8,), (1, 8, 8)]
