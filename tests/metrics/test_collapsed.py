"""Codes whose scale matters, and dimensions that have collapsed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowfactor.metrics import dci, mig, sap


def _collapsed() -> tuple[Tensor, Tensor]:
    """The first dimension tells the first factor, though at a standard deviation of 1e-9; the others are noise."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(3, (600, 2), generator=generator)
    noise = torch.randn(600, 2, generator=generator)
    return torch.cat([factors[:, :1].double() * 1e-9, noise.double()], 1), factors


@pytest.mark.parametrize("method", ["threshold", "regression", "svm"])
def test_a_collapsed_dimension_says_nothing_by_sap(method) -> None:
    codes, factors = _collapsed()
    score = sap(codes, factors, method=method, standardize=True, resamples=0)
    chance = 0.0 if method == "regression" else 0.45
    assert float(score.scores[0, 0]) <= chance
    assert float(score) < 0.1
    assert float(sap(codes * torch.tensor([1e9, 1, 1]), factors, method=method, standardize=True, resamples=0)) > 0.15


@pytest.mark.parametrize("method", ["fast", "forest", "lasso"])
def test_a_collapsed_dimension_has_no_importance_by_dci(method) -> None:
    codes, factors = _collapsed()
    assert float(dci(codes, factors, method=method, resamples=0).importance[0].sum()) == 0


def test_a_collapsed_dimension_has_no_information() -> None:
    codes, factors = _collapsed()
    assert float(mig(codes, factors, resamples=0).scores[0].sum()) == 0


def test_the_svm_takes_codes_as_they_are_or_standardised_and_says_which() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randint(4, (800, 2), generator=generator)
    codes = factors + 0.5 * torch.randn(800, 2, generator=generator)
    seeds = [torch.Generator().manual_seed(2) for _ in range(4)]
    unscaled = [sap(codes * scale, factors, method="svm", resamples=0, generator=seeds.pop()) for scale in (1, 0.01)]
    scaled = [
        sap(codes * scale, factors, method="svm", standardize=True, resamples=0, generator=seeds.pop())
        for scale in (1, 0.01)
    ]
    assert abs(float(unscaled[0]) - float(unscaled[1])) > 0.02
    assert float(scaled[0]) == pytest.approx(float(scaled[1]), abs=0.005)
    assert unscaled[0].as_dict()["standardized"] is False
    assert scaled[0].as_dict()["standardized"] is True
