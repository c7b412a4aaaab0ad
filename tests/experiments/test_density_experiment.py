"""The experiments of density estimation run, learn something in a moment, and count what they say they count."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import density, otflow


@pytest.mark.parametrize("method", density.OURS)
def test_every_method_of_ours_trains_and_is_measured(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "TEST_POINTS", 500)
    made = density.run(method, "moons", 0, 0.1)
    assert made["steps"] >= 1
    assert made["kl_interval"][0] < made["kl"] < made["kl_interval"][1]
    assert made["mass"]["value"] == pytest.approx(1, abs=0.02)


def test_ot_flow_takes_four_evaluations_a_step() -> None:
    recipe = dataclasses.replace(otflow.RECIPES["POWER"], width=16)
    made = otflow.run(recipe, 1.0, 64)
    assert (made["nfe"], made["test_nfe"]) == (4 * recipe.steps, 4 * recipe.test_steps)
    assert made["kl"] < made["before"]
