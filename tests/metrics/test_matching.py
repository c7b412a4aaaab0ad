"""Factor accuracy, spikes and the intervals of shares."""

from __future__ import annotations

import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

import flowfactor as ff
from flowfactor.metrics.estimates import student_quantile


def test_wilson_interval_of_a_textbook_case_and_of_the_ends() -> None:
    share = ff.metrics.wilson(8, 10)  # Wilson 1927: 0.490 to 0.943
    assert (share.low, share.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert ff.metrics.wilson(0, 10).low == 0 and ff.metrics.wilson(0, 10).high == pytest.approx(0.2775, abs=1e-3)
    assert ff.metrics.wilson(10, 10).high == 1 and ff.metrics.wilson(10, 10).low < 1
    assert math.isnan(ff.metrics.wilson(0, 0).value) and ff.metrics.wilson(0, 0).as_dict()["value"] is None
    for bad in ((11, 10), (-1, 10)):
        with pytest.raises(ValueError, match="hits"):
            ff.metrics.wilson(*bad)
    with pytest.raises(ValueError, match="confidence"):
        ff.metrics.wilson(1, 2, confidence=1.0)


def test_wilson_covers_as_often_as_it_says() -> None:
    for share in (0.5, 0.95):
        hits = torch.distributions.Binomial(60, torch.tensor(share)).sample((400,))
        covered = [(e := ff.metrics.wilson(float(h), 60)).low <= share <= e.high for h in hits]
        assert sum(covered) / 400 > 0.91


def test_student_quantile_is_scipys() -> None:
    for freedom in (4, 9, 30):
        assert student_quantile(0.95, freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), rel=0.01)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_numbering_of_right_factors_scores_one(order: tuple[int, ...]) -> None:
    true = torch.randint(3, (200,))
    result = ff.metrics.factor_accuracy(torch.tensor(order)[true], true, 3)
    assert result.accuracy.value == 1 and result.accuracy.count == 200 and result.accuracy.low > 0.97
    assert result.order.tolist() == list(order) and result.per_factor.tolist() == [1, 1, 1]


def test_the_matching_is_the_best_of_all() -> None:
    for _ in range(10):
        true, predicted = torch.randint(4, (50,)), torch.randint(4, (50,))
        result = ff.metrics.factor_accuracy(predicted, true, 4)
        best = max(float((torch.tensor(p)[true] == predicted).float().mean()) for p in itertools.permutations(range(4)))
        assert float(result) == pytest.approx(best)
        assert float((result.order[true] == predicted).double().mean()) == pytest.approx(best)


def test_matching_undoes_any_numbering() -> None:
    true = torch.randint(5, (500,), generator=torch.Generator().manual_seed(0))
    renamed = torch.tensor([3, 0, 4, 2, 1])
    predicted = renamed[true]
    predicted[:50] = (predicted[:50] + 1) % 5
    match = ff.metrics.factor_accuracy(predicted, true, 5)
    assert float(match) == pytest.approx(0.9) and match.order.tolist() == renamed.tolist()


def test_random_and_collapsed_factors_score_chance() -> None:
    true = torch.arange(3000) % 3
    assert float(ff.metrics.factor_accuracy(torch.randint(3, (3000,)), true, 3)) == pytest.approx(1 / 3, abs=0.04)
    collapsed = ff.metrics.factor_accuracy(torch.ones(3000, dtype=torch.long), true, 3)
    assert float(collapsed) == pytest.approx(1 / 3) and sorted(collapsed.order.tolist()) == [0, 1, 2]
    assert collapsed.accuracy.low < 1 / 3 < collapsed.accuracy.high


def test_a_known_matching_is_kept() -> None:
    true = torch.tensor([0, 0, 1, 1])
    assert float(ff.metrics.factor_accuracy(1 - true, true, 2, order=torch.tensor([0, 1]))) == 0
    json.dumps(ff.metrics.factor_accuracy(true, true, 2).as_dict(), allow_nan=False)


def test_bad_factors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        ff.metrics.factor_accuracy(true, true[:2], 3)
    with pytest.raises(ValueError, match=r"predicted factors must lie in \[0, 2\)"):
        ff.metrics.factor_accuracy(true, true, 2)
    with pytest.raises(TypeError, match="integers"):
        ff.metrics.factor_accuracy(true.float(), true, 3)
    with pytest.raises(ValueError, match="N > 0"):
        ff.metrics.factor_accuracy(true[:0], true[:0], 3)
    with pytest.raises(ValueError, match="num_factors"):
        ff.metrics.factor_accuracy(true, true, 0)
    with pytest.raises(ValueError, match="once"):
        ff.metrics.factor_accuracy(true, true, 3, order=torch.tensor([0, 0, 1]))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"flowfactor\[data\]"):
        ff.metrics.factor_accuracy(true, true, 3)


def _spikes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) < torch.tensor([0.5, 0.3, 0.2])


def test_spikes_found_exactly_score_one_in_any_order() -> None:
    true = _spikes(40, 8, 3)
    result = ff.metrics.spike_metrics(true[..., [2, 0, 1]], true)
    assert (result.precision.value, result.recall.value, result.f1) == (1, 1, 1)
    assert result.order.tolist() == [1, 2, 0]
    assert result.precision.count == result.recall.count == int(true.sum())


def test_missed_and_invented_spikes_count_as_they_should() -> None:
    true = _spikes(200, 8, 3)
    missed = true & (torch.rand(true.shape) < 0.75)
    result = ff.metrics.spike_metrics(missed, true)
    assert result.precision.value == 1 and result.recall.value == pytest.approx(0.75, abs=0.03)
    assert result.recall.value == pytest.approx(float(missed.sum() / true.sum()))
    everything = ff.metrics.spike_metrics(torch.ones_like(true), true)
    assert everything.recall.value == 1 and everything.precision.value == pytest.approx(1 / 3, abs=0.03)
    nothing = ff.metrics.spike_metrics(torch.zeros_like(true), true)
    assert nothing.recall.value == 0 and math.isnan(nothing.precision.value) and nothing.f1 == 0
    json.dumps(nothing.as_dict(), allow_nan=False)


def test_more_and_fewer_learned_factors_than_true_ones() -> None:
    true = _spikes(60, 8, 3)
    more = ff.metrics.spike_metrics(torch.cat([torch.rand(60, 8, 1) < 0.5, true], -1), true)
    assert more.order.tolist() == [1, 2, 3] and more.recall.value == 1 and more.precision.value < 0.8
    fewer = ff.metrics.spike_metrics(true[..., :2], true)
    assert fewer.order.tolist() == [0, 1, -1] and fewer.precision.value == 1
    assert fewer.recall.value == pytest.approx(float(true[..., :2].sum() / true.sum()))
    assert fewer.recall_per_factor.tolist() == [1, 1, 0]


def test_spikes_of_one_sequence_count_as_less_than_independent_ones() -> None:
    true = torch.ones(50, 20, 1, dtype=torch.bool)
    alone = torch.rand(50, 20, 1) < 0.6
    together = (torch.rand(50, 1, 1) < 0.6).expand(50, 20, 1)

    def width(found: torch.Tensor) -> float:
        recall = ff.metrics.spike_metrics(found, true).recall
        return recall.high - recall.low

    wilson = ff.metrics.wilson(600, 1000)
    assert width(alone) == pytest.approx(wilson.high - wilson.low, rel=0.35)
    sequences = ff.metrics.wilson(30, 50)
    assert width(together) == pytest.approx(sequences.high - sequences.low, rel=0.1)


def test_bad_spikes_are_refused() -> None:
    true = _spikes(4, 8, 3)
    with pytest.raises(ValueError, match="alike but in K"):
        ff.metrics.spike_metrics(true[:, :7], true)
    with pytest.raises(ValueError, match="threshold"):
        ff.metrics.spike_metrics(0.5 * true, true)
    with pytest.raises(ValueError, match=r"\[N, ..., K\]"):
        ff.metrics.spike_metrics(true[0, 0], true[0, 0])
    with pytest.raises(ValueError, match="order"):
        ff.metrics.spike_metrics(true, true, order=torch.tensor([0, 1, 3]))


def test_spikes_of_single_sequences_are_those_of_their_transformation() -> None:
    turns = {"left": (ff.data.Rotate(), 0, 80), "right": (ff.data.Rotate(), 0, -80)}
    data = ff.data.TransformedImages(torch.rand(6, 1, 8, 8), turns, steps=4)

    class First:
        num_flows = 2

        def infer_weights(self, frames: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(spike_probs=torch.tensor([0.9, 0.2]).expand(len(frames), 4, 2))

    result = ff.metrics.match_spikes(First(), data, order=torch.tensor([0, 1]))
    assert (result.precision.value, result.recall.value) == (0.5, 0.5)  # half of the sequences turn to the left
    assert result.recall_per_factor.tolist() == [1.0, 0.0]
    assert ff.metrics.match_spikes(First(), data, threshold=0.1).recall.value == 1.0
    with pytest.raises(ValueError, match="the model has 3 flows and the data set 2 transformations"):
        ff.metrics.match_spikes(SimpleNamespace(num_flows=3), data)


def test_spikes_of_combined_sequences_are_those_of_their_weights() -> None:
    turns = {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1.0, 2.0)}
    data = ff.data.CombinedImages(torch.rand(9, 1, 8, 8), turns, steps=4)
    weights = iter(data.weights[..., [1, 0]].split(4))

    class Oracle:
        num_flows = 2

        def infer_weights(self, frames: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(spike_probs=next(weights))

    result = ff.metrics.match_spikes(Oracle(), data, batch_size=4)
    assert (result.precision.value, result.recall.value, result.order.tolist()) == (1.0, 1.0, [1, 0])
    assert result.recall.count == int((data.weights > 0).sum())
