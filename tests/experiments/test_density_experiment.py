"""The experiments of density estimation run, learn something in a moment, and count what they say they count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiments import density, otflow


@pytest.mark.parametrize("method", density.OURS)
def test_every_method_of_ours_trains_and_is_measured(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "TEST_POINTS", 500)
    made = density.run(method, "moons", 0, 0.1)
    assert made["steps"] >= 1
    assert made["kl_interval"][0] < made["kl"] < made["kl_interval"][1]
    assert made["mass"]["value"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("data", "dim", "factor"), [("moons", 2, 2.0), ("banana", 8, 1.0)])
def test_a_potential_starts_finer_on_the_moons(data: str, dim: int, factor: float) -> None:
    torch.manual_seed(0)
    inner = density.build("potential", data, dim).get_parameter("field.potential.w1")
    largest = inner.abs().max() * (dim / 3) ** 0.5  # 1 at most of a uniform of variance 1 / dim
    assert 0.9 * factor < largest < 1.001 * factor


def test_transport_trains_by_the_settings_of_its_potential_and_peers_by_the_defaults() -> None:
    assert density.settings_of("potential, transport", "banana") == density.SETTINGS["potential", "banana"]
    assert density.settings_of("nsf", "moons") == density.Settings()


def test_a_row_has_mean_spread_and_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        density, "finished", lambda m, d, seed, s: {"kl": 0.01 * (seed + 1), "steps": 1000 * (seed + 1)}
    )
    monkeypatch.setattr("sys.argv", ["density", "--methods", "free", "--data", "moons", "--seeds", "0", "1", "2"])
    density.main()
    assert "| free | 0.020 (0.010 to 0.030); 2,000 |" in capsys.readouterr().out


def test_ot_flow_takes_four_evaluations_a_step() -> None:
    recipe = dataclasses.replace(otflow.RECIPES["POWER"], width=16)
    made = otflow.run(recipe, 1.0, 64)
    assert (made["nfe"], made["test_nfe"]) == (4 * recipe.steps, 4 * recipe.test_steps)
    assert made["kl"] < made["before"]
