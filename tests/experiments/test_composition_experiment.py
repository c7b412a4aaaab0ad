"""The experiment on composition: its measurements of a model that is known, its trainings and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flowfactor as ff

if not Path(__file__).parents[2].joinpath("experiments").is_dir():  # any other failure to import them is one
    pytest.skip("needs a checkout", allow_module_level=True)

from experiments import composition


@pytest.fixture
def digits() -> Any:
    return ff.data.Digits("test", steps=8).subset(list(range(24)))


def still() -> Any:
    """A model that leaves every picture as it is."""
    return SimpleNamespace(num_flows=3, transform=lambda x, t, k: x[:, None].expand(-1, len(t), -1, -1, -1))


def test_a_model_that_does_nothing_scores_as_doing_nothing(digits: Any) -> None:
    found = composition.compositions(still(), digits)
    assert found["value"] == pytest.approx(found["doing_nothing"])
    assert set(found["pairs"]) == {"scaling + rotation", "scaling + colouring", "rotation + colouring"}
    for pair, error in found["pairs"].items():
        assert error["value"] == pytest.approx(error["doing_nothing"])
        alone = ff.metrics.equivariance_error(still(), digits.subset(pair_rows(digits, pair))).mean
        each = [float(alone[digits.flow_names.index(name)]) for name in pair.split(" + ")]
        assert error["each"] == pytest.approx(each, rel=1e-4)


def pair_rows(digits: Any, pair: str) -> torch.Tensor:
    """The digits on which the benchmark superposes a pair of transformations."""
    data = ff.data.CombinedImages(digits.images, ff.data.paper_transforms(8), 8, colour="red", seed=0)
    active = data.weights.any(1)[:, [digits.flow_names.index(name) for name in pair.split(" + ")]].all(1)
    return active & (data.mode == data.modes.index("superpose"))


@pytest.mark.parametrize("combined", [False, True])
def test_both_kinds_of_sequences_train_the_preset(digits: Any, combined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(composition.time, "process_time", lambda: float(next(ticks)))
    data: Any = ff.data.Digits("train", steps=8).subset(list(range(96)))
    if combined:
        data = ff.data.CombinedImages(data.images, ff.data.paper_transforms(8), 8, colour="red")
    model, steps = composition.fit(data, seed=0, minutes=3 / 60)
    assert steps == 2  # the clock ticks a second each time it is asked
    assert model.num_flows == 3
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def result(variant: str, seed: int, superposed: float) -> dict[str, Any]:
    """A result of plain numbers."""
    kinds = {"single": 100.0, "superpose": superposed, "switch": 130.0}
    flows = ["scaling", "rotation"]
    held = {"mean": [10.0, 20.0], "doing_nothing": [30.0, 40.0], "count": 7}
    curve = {"t": list(range(1, 17)), "mean": [float(t) for t in range(1, 17)], "doing_nothing": [50.0] * 16}
    pair = {"value": superposed, "each": [90.0, 110.0], "doing_nothing": 900.0}
    by_kind = {kind: {"value": value} for kind, value in kinds.items()}
    measured = {"by_kind": by_kind, "doing_nothing_by_kind": dict.fromkeys(kinds, 800.0), "pairs": {"both": pair}}
    return {
        "variant": variant, "seed": seed, "steps": 1000, "flows": flows, "composition": measured, "digits": held,
        "curves": dict.fromkeys(flows, curve), "classes": {"0-7": held, "8-9": held},
    }  # fmt: skip


def test_tables_give_means_and_ratios_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [result("single", 0, 400.0), result("single", 1, 600.0), result("combined", 0, 150.0)]
    whole, pairs, beyond, held = composition.tables(found)
    assert "| 500 (400 to 600) | 130 (130 to 130) | 5.00 (4.00 to 6.00) | 1.30 (1.30 to 1.30) |" in whole
    assert "| combined | 1,000 | 100 | 150 | 130 | 1.50 | 1.30 |" in whole
    assert "| combined | both | 150 | 90 and 110 | 1.50 | 900 |" in pairs
    assert "| combined | scaling | 4.0 | 8.0 | 10.0 | 12.0 | 14.0 | 16.0 |" in beyond
    assert held.count("| 7 | 10") == 6

    monkeypatch.setattr(composition, "FIGURE", tmp_path / "curves.png")
    composition.draw(found)
    assert composition.FIGURE.read_bytes().startswith(b"\x89PNG")


def test_results_are_written_whole(tmp_path: Path) -> None:
    composition.write(tmp_path / "new" / "a.json", {"x": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
