"""Variation predictability on pairs that can and cannot be told apart."""

from __future__ import annotations

import json

import pytest
import torch

import flowfactor as ff
from flowfactor.metrics.predictability import _stratified


def _pairs(count: int = 240) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pictures made brighter, darker, or brighter on the left and darker on the right."""
    before, k = 0.3 + 0.3 * torch.rand(count, 1, 8, 8), torch.arange(count) % 3
    halves = torch.ones(8, 8)
    halves[:, 4:] = -1
    change = 0.2 * torch.stack([torch.ones(8, 8), -torch.ones(8, 8), halves])
    return before, before + change[k].unsqueeze(1), k


@pytest.mark.parametrize(("fraction", "least"), [(0.1, 0.98), (0.0125, 0.9)])
def test_transformations_that_differ_are_told_apart_from_few_pairs(fraction: float, least: float) -> None:
    g = torch.Generator().manual_seed(0)
    score = ff.metrics.vp_score_from_pairs(*_pairs(), fraction=fraction, repeats=2, steps=60, generator=g)
    assert float(score) >= least
    assert score.train_count + score.accuracy.count == 240
    assert score.train_count == 3 * round(fraction * 80) and score.chance == pytest.approx(1 / 3)


def test_labels_that_say_nothing_score_chance() -> None:
    before, after, k = _pairs()
    score = ff.metrics.vp_score_from_pairs(before, after, k[torch.randperm(240)], repeats=3, steps=40)
    assert float(score) == pytest.approx(1 / 3, abs=0.1)
    assert score.accuracy.low < 1 / 3 < score.accuracy.high


def test_a_seed_decides_everything_and_the_global_source_is_left_alone() -> None:
    before, after, k = _pairs(60)
    state = torch.random.get_rng_state()
    one, two = (
        ff.metrics.vp_score_from_pairs(
            before, after, k, repeats=2, steps=5, generator=torch.Generator().manual_seed(5)
        ).as_dict()
        for _ in range(2)
    )
    assert one == two and torch.equal(state, torch.random.get_rng_state())
    assert json.loads(json.dumps(one, allow_nan=False))["count"] == one["count"]


def test_the_interval_is_wilsons_for_one_repeat_and_wider_for_repeats_that_differ() -> None:
    from flowfactor.metrics.predictability import _joined

    alone = _joined(80, 100, torch.tensor([0.8]), 0.95)
    assert alone == ff.metrics.wilson(80, 100)
    agreeing, differing = (_joined(80, 100, torch.tensor(a), 0.95) for a in ([0.8, 0.8, 0.8], [0.7, 0.8, 0.9]))
    assert (agreeing.low, agreeing.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert differing.low < agreeing.low and differing.high > agreeing.high


def test_training_pairs_are_shared_out_by_class() -> None:
    classes = torch.tensor([0] * 100 + [1] * 20 + [2] * 3)
    train = _stratified(classes, 0.1, None)
    assert [int(train[classes == c].sum()) for c in range(3)] == [10, 2, 1]


def test_flows_that_differ_score_one_and_flows_alike_score_chance(pixel_model, seeded) -> None:
    images = 0.4 * torch.rand(160, 1, 4, 4)
    settings = {"repeats": 2, "steps": 80, "fraction": 0.2}
    moving = ff.metrics.vp_score(pixel_model(), images, torch.arange(9), **settings, generator=seeded(1))
    assert float(moving) > 0.95 and moving.accuracy.count == 128
    still = ff.metrics.vp_score(pixel_model(speed=0.0), images, torch.arange(9), **settings, generator=seeded(1))
    assert float(still) == pytest.approx(0.5, abs=0.15)


def test_the_model_keeps_its_mode_and_gets_no_gradient(pixel_model) -> None:
    model = pixel_model().train()
    ff.metrics.vp_score(model, torch.rand(8, 1, 4, 4), [0, 1], repeats=1, steps=1)
    assert model.training


def test_bad_input_is_refused(pixel_model) -> None:
    before, after, k = _pairs(12)
    score = ff.metrics.vp_score_from_pairs
    with pytest.raises(ValueError, match="fraction"):
        score(before, after, k, fraction=10)
    with pytest.raises(ValueError, match="repeats"):
        score(before, after, k, repeats=0)
    with pytest.raises(ValueError, match="steps"):
        score(before, after, k, steps=0)
    with pytest.raises(ValueError, match="two pairs each"):
        score(before, after, torch.zeros(12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"k \[N\]"):
        score(before, after, k[:11])
    with pytest.raises(TypeError, match="integers"):
        score(before, after, k.float())
    with pytest.raises(TypeError, match="float tensor"):
        score((255 * before).byte(), after, k)
    with pytest.raises(ValueError, match="finite"):
        score(before / 0, after, k)
    with pytest.raises(ValueError, match="confidence"):
        score(before, after, k, confidence=95)
    model = pixel_model()
    with pytest.raises(ValueError, match="single flow"):
        ff.metrics.vp_score(pixel_model(1), torch.rand(8, 1, 4, 4), [0, 1])
    with pytest.raises(ValueError, match="two images a flow"):
        ff.metrics.vp_score(model, torch.rand(3, 1, 4, 4), [0, 1])
    with pytest.raises(ValueError, match="two times"):
        ff.metrics.vp_score(model, torch.rand(8, 1, 4, 4), [0])
    with pytest.raises(TypeError, match="images"):
        ff.metrics.vp_score(model, torch.rand(8, 4, 4), [0, 1])
