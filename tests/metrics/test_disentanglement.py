"""MIG, SAP and DCI on codes whose scores are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flowfactor as ff
from flowfactor.metrics._codes import discretise

CLASSES = (5, 4, 3)
METRICS: dict[str, Callable[..., Any]] = {"mig": ff.metrics.mig, "sap": ff.metrics.sap, "dci": ff.metrics.dci}


def _factors(count: int = 1500) -> torch.Tensor:
    return torch.stack([torch.randint(c, (count,)) for c in CLASSES], 1)


def _quarter_turn(factors: torch.Tensor) -> torch.Tensor:
    """The first two factors, centred and of one scale, turned by 45 degrees into one another."""
    centred = factors[:, :2].double()
    centred = (centred - centred.mean(0)) / centred.std(0)
    return centred @ torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_perfectly_disentangled_codes_score_the_most(noise: float) -> None:
    factors = _factors()
    order = torch.tensor([2, 0, 1])  # which dimension holds which factor must not matter, nor scale or sign
    codes = torch.cat([-3.0 * factors[:, order] + noise * torch.randn(1500, 3), torch.randn(1500, 2)], 1)
    assert ff.metrics.mig(codes, factors).score.value > 0.97
    # A dimension of noise still predicts one of C classes by chance, and thresholds can do no better.
    best = sum(1 - 1 / c for c in CLASSES) / 3
    assert ff.metrics.sap(codes, factors).score.value == pytest.approx(best, abs=0.06)
    assert ff.metrics.sap(codes, factors, method="regression").score.value > 0.98
    dci = ff.metrics.dci(codes, factors, method="fast", resamples=0)
    assert min(dci.disentanglement.value, dci.completeness.value, dci.informativeness.value) > 0.98
    torch.testing.assert_close(dci.importance.sum(0), torch.ones(3, dtype=torch.float64))
    assert dci.importance.argmax(0).tolist() == order.argsort().tolist()


def test_random_codes_score_nothing() -> None:
    factors, codes = _factors(), torch.randn(1500, 6)
    for score in (ff.metrics.mig(codes, factors), *(ff.metrics.sap(codes, factors, method=m) for m in _SAP)):
        assert score.score.value < 0.05
    dci = ff.metrics.dci(codes, factors, method="fast", resamples=0)
    assert dci.disentanglement.value < 0.05 and dci.completeness.value < 0.05
    assert dci.informativeness.value == pytest.approx(sum(1 / c for c in CLASSES) / 3, abs=0.05)


_SAP = ("threshold", "regression")


def test_codes_turned_by_45_degrees_hold_everything_and_disentangle_nothing() -> None:
    factors = torch.stack([torch.randint(5, (3000,)), torch.randint(5, (3000,))], 1)
    codes = _quarter_turn(factors)
    assert ff.metrics.mig(codes, factors).score.value < 0.05
    for method in _SAP:
        assert ff.metrics.sap(codes, factors, method=method).score.value < 0.05
    dci = ff.metrics.dci(codes, factors, resamples=0)
    assert dci.disentanglement.value < 0.1 and dci.completeness.value < 0.1
    assert dci.informativeness.value > 0.98


def test_mig_of_a_duplicated_dimension_is_zero_and_of_one_dimension_is_its_information() -> None:
    factors = _factors()
    twice = torch.cat([factors, factors], 1)
    assert ff.metrics.mig(twice, factors).score.value == 0
    alone = ff.metrics.mig(factors[:, :1], factors[:, :1])
    assert alone.score.value == pytest.approx(1.0)


def test_mig_is_the_information_of_a_noisy_channel() -> None:
    """A binary symmetric channel of error e has information ln 2 - H(e)."""
    factors = torch.randint(2, (20000, 1))
    for error in (0.05, 0.2):
        flipped = (factors.bool() ^ (torch.rand(20000, 1) < error)).double()
        known = 1 + (error * math.log(error) + (1 - error) * math.log(1 - error)) / math.log(2)
        score = ff.metrics.mig(torch.cat([flipped, torch.zeros(20000, 1)], 1), factors)
        assert score.score.value == pytest.approx(known, abs=0.02)
        spread = score.score.high - score.score.low
        assert 0 < spread < 0.05 and abs(score.score.value - known) < spread


def test_sap_of_regression_is_the_squared_correlation() -> None:
    factors = torch.randint(6, (500, 1)).double()
    codes = torch.cat([factors + torch.randn(500, 1, dtype=torch.float64), torch.zeros(500, 1)], 1)
    known = np.corrcoef(codes[:, 0], factors[:, 0])[0, 1] ** 2
    assert ff.metrics.sap(codes, factors, method="regression").score.value == pytest.approx(known, rel=1e-6)


def test_dci_of_two_dimensions_for_one_factor_is_disentangled_and_incomplete() -> None:
    a, b = torch.randint(4, (2000,)), torch.randint(2, (2000,))
    codes = torch.stack([a % 2, a // 2, b], 1).double()  # a in two bits
    dci = ff.metrics.dci(codes, torch.stack([a, b], 1), resamples=0)
    assert dci.disentanglement.value > 0.98 and dci.informativeness.value == 1
    share = torch.tensor([0.5, 0.5, 0.0])
    known = 1 + float(torch.xlogy(share, share).sum()) / math.log(3)
    assert dci.per_factor.tolist() == pytest.approx([known, 1.0], abs=0.03)


@pytest.mark.parametrize("method", ["fast", "forest", "boosting", "lasso"])
def test_every_predictor_of_dci_agrees_on_clear_cases(method: Any) -> None:
    factors = _factors(240)
    codes = torch.cat([factors + 0.01 * torch.randn(240, 3), torch.randn(240, 1)], 1)
    dci = ff.metrics.dci(codes, factors, method=method, resamples=0)
    assert dci.disentanglement.value > 0.95 and dci.completeness.value > 0.95 and dci.informativeness.value > 0.95
    assert math.isnan(dci.disentanglement.low) and dci.as_dict()["disentanglement"]["low"] is None


def test_sap_by_support_vectors_separates_two_classes() -> None:
    factors = torch.randint(2, (300, 2))
    codes = torch.cat([factors + 0.1 * torch.randn(300, 2), torch.randn(300, 1)], 1)
    score = ff.metrics.sap(codes, factors, method="svm", resamples=2)
    assert score.score.value == pytest.approx(0.5, abs=0.12) and score.method == "svm"
    assert score.scores.argmax(0).tolist() == [0, 1]


@pytest.mark.parametrize("name", METRICS)
def test_intervals_hold_the_value_shrink_with_samples_and_repeat(name: str, seeded) -> None:
    settings: dict[str, Any] = {"method": "fast", "resamples": 8} if name == "dci" else {"resamples": 20}

    def width(count: int) -> float:
        torch.manual_seed(count)
        factors = _factors(count)
        codes = factors + 0.6 * torch.randn(count, 3)
        one, two = (METRICS[name](codes, factors, generator=seeded(1), **settings) for _ in range(2))
        assert one.as_dict() == two.as_dict()
        json.dumps(one.as_dict(), allow_nan=False)
        score = one.disentanglement if name == "dci" else one.score
        assert 0 <= score.low <= score.value <= score.high <= 1 and score.count == count
        return score.high - score.low

    assert 0 < width(900) < 0.8 * width(120)


@pytest.mark.parametrize(("spread", "count"), [(0.3, 1000), (0.8, 300)])
def test_intervals_of_mig_cover_the_truth_as_often_as_they_say(spread: float, count: int) -> None:
    """The interval of repeated experiments holds the value of a very large sample in about 95% of them."""

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        factors = torch.randint(4, (count, 2))
        return factors + spread * torch.randn(count, 2).clamp(-1, 1), factors  # bounded: the bins are always the same

    truth = ff.metrics.mig(*draw(200_000), bins=8, resamples=0).score.value
    scores = [ff.metrics.mig(*draw(count), bins=8, resamples=40).score for _ in range(50)]
    assert sum(score.low <= truth <= score.high for score in scores) >= 44


def test_bins_are_of_equal_width_and_constants_fall_into_one() -> None:
    codes = torch.tensor([[0.0, 7.0], [0.24, 7.0], [0.26, 7.0], [1.0, 7.0]])
    assert discretise(codes, 4).T.tolist() == [[0, 0, 1, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_bad_input_is_refused(metric: Callable[..., Any]) -> None:
    codes, factors = torch.randn(20, 3), torch.randint(3, (20, 2))
    with pytest.raises(TypeError, match="tensor or an array"):
        metric(codes.tolist(), factors)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        metric(codes[0], factors)
    with pytest.raises(ValueError, match="20 codes but 19 labels"):
        metric(codes, factors[:19])
    with pytest.raises(ValueError, match="finite"):
        metric(torch.where(codes == codes[0, 0], torch.nan, codes), factors)
    with pytest.raises(ValueError, match="factor 1 has the same value"):
        metric(codes, torch.stack([factors[:, 0], torch.ones(20, dtype=torch.long)], 1))
    with pytest.raises(ValueError, match="discrete"):
        metric(codes, torch.rand(20, 2))
    with pytest.raises(ValueError, match="resamples"):
        metric(codes, factors, resamples=1)
    with pytest.raises(ValueError, match="confidence"):
        metric(codes, factors, resamples=0, confidence=95)
    with pytest.raises(TypeError, match="real numbers"):
        metric(codes + 0j, factors)


def test_bad_settings_are_refused() -> None:
    codes, factors = torch.randn(20, 3), torch.randint(3, (20, 2))
    with pytest.raises(ValueError, match="bins"):
        ff.metrics.mig(codes, factors, bins=1)
    with pytest.raises(ValueError, match="threshold"):
        ff.metrics.sap(codes, factors, method="tree")
    with pytest.raises(ValueError, match="boosting"):
        ff.metrics.dci(codes, factors, method="tree")
    with pytest.raises(ValueError, match="train_fraction"):
        ff.metrics.dci(codes, factors, train_fraction=1.0)
    with pytest.raises(ValueError, match="single factor"):
        ff.metrics.dci(codes, factors[:, :1])
    with pytest.raises(ValueError, match="single dimension"):
        ff.metrics.dci(codes[:, :1], factors)


def test_numpy_arrays_and_labels_of_any_numbers_will_do() -> None:
    factors = _factors(300)
    codes = factors.double() + 0.1 * torch.randn(300, 3)
    odd = 0.25 * factors.double() - 3
    assert ff.metrics.mig(codes.numpy(), odd.numpy(), resamples=0).scores.equal(
        ff.metrics.mig(codes, factors, resamples=0).scores
    )


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"flowfactor\[data\]"):
        ff.metrics.dci(torch.randn(20, 3), torch.randint(3, (20, 2)))
