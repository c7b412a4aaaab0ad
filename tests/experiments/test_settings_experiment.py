"""The experiment that changes one setting of a preset at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import flowfactor as ff
from experiments import settings
from flowfactor import training

ROWS = [(table, row) for table, (_, rows) in settings.TABLES.items() for row in rows]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table}-{row.name}" for table, row in ROWS])
def test_every_row_is_a_training_that_can_be_made(table: str, row: settings.Row, tmp_path: Path) -> None:
    preset = settings.TABLES[table][0]
    config = settings.configured(preset, row, None, 3, 40, None, tmp_path)
    assert (config.seed, config.train.steps, config.train.minutes, config.output) == (3, 40, None, str(tmp_path))
    model = ff.models.build_model("ours", (3, 28, 28), 3, num_frames=9, **config.model)
    for name, value in row.model.items():
        if name.endswith("_weight"):
            assert getattr(model, name) == value
    assert not row.beside or model.bending_weight > 0  # the weight of `BesidePath`
    for name, value in row.data.items():
        assert config.data.options[name] == value


def test_names_of_rows_and_their_files_are_their_own() -> None:
    for table, (_, rows) in settings.TABLES.items():
        assert len({settings._place(table, row, "40", 0) for row in rows}) == len(rows)


def test_a_rising_weight_rises_with_the_training_steps_alone() -> None:
    model = cast(Any, torch.nn.Linear(1, 1))
    model.hj_weight = 8.0
    settings.rise(model, 4)
    seen = []
    for trains in (True, True, False, True, True, True):
        model.train(trains)(torch.ones(1))
        seen.append(model.hj_weight)
    assert seen == [2.0, 4.0, 4.0, 6.0, 8.0, 8.0]


@pytest.mark.parametrize(("held", "rises"), [(True, False), (False, False), (True, True)])
def test_an_interrupted_row_goes_on(
    held: bool, rises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[int], None]
) -> None:
    model = {"latent_dim": 4, "augment_dim": 0, "hidden": [4, 4]}
    config = settings.configured("demo", settings.Row("small", model), None, 0, 3, None, tmp_path / "run")
    config = replace(config, train=replace(config.train, batch_size=4, evaluate_limit=3, likelihood_limit=3))
    row = settings.Row("small", rises=rises)
    if held:
        interrupt(2)
        with pytest.raises(SystemExit, match="interrupted"):
            settings.run(config, row, False)
    else:
        (tmp_path / "run").mkdir()
    begun: list[tuple[bool, bool]] = []

    def prepare(config: Any, *, resume: bool, overwrite: bool) -> Any:
        begun.append((resume, overwrite))
        return training.prepare(config, resume=resume, overwrite=overwrite)

    monkeypatch.setattr(settings, "training", SimpleNamespace(prepare=prepare))
    result = settings.run(config, row, False)
    assert begun == [(held and not rises, not held or rises)]
    assert result["steps"] == 3
    assert len(result["evaluations"]) == 3


def test_a_row_beside_the_path_trains_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"latent_dim": 4, "augment_dim": 0, "hidden": [4, 4]}
    config = settings.configured("demo", settings.Row("small", model), None, 0, 1, None, tmp_path / "run")
    config = replace(config, train=replace(config.train, batch_size=4, evaluate_limit=3, likelihood_limit=3))
    trained: list[float] = []

    class Spied(settings.BesidePath):
        def forward(self, z: torch.Tensor, t: torch.Tensor, control: Any) -> torch.Tensor:
            trained.append(self.scale)
            return super().forward(z, t, control)

    monkeypatch.setattr(settings, "BesidePath", Spied)
    settings.run(config, settings.Row("small", beside=0.25), False)
    assert trained and set(trained) == {0.25}


def test_beside_the_path_is_the_equation_there() -> None:
    # u = |z|^2 / 2: the residual is |z|^2 / 2 too
    u = ff.potentials.QuadraticPotential(2, S=torch.eye(2))
    z = torch.ones(3, 4, 2)
    t = torch.tensor([0.0, 1.0, 2.0])
    for scale in (0.0, 1e-3):
        torch.testing.assert_close(settings.BesidePath(u, scale)(z, t, 0), torch.full((4,), 2.0), rtol=0.05, atol=0)
    # (|z + e|^2 / 2)^2 over 2 frames, e normal with deviation 1: 2 (|z|^4 + 8 |z|^2 + 8) / 4 = 14
    found = settings.BesidePath(u, 1.0)(torch.ones(3, 200_000, 2), t, 0)
    torch.testing.assert_close(found.mean(), torch.tensor(14.0), rtol=0.03, atol=0)
    assert not list(settings.BesidePath(u, 1.0).parameters())


def test_figures_of_seeds_are_averaged_where_they_are_numbers() -> None:
    found = [{"a": {"mean": [1.0, 2.0]}, "names": ["x"], "n": 3}, {"a": {"mean": [3.0, 6.0]}, "names": ["x"], "n": 3}]
    assert settings.averaged(found) == {"a": {"mean": [2.0, 4.0]}, "names": ["x"], "n": 3}


def test_evaluations_are_those_of_the_training_solver() -> None:
    solver = {"method": "rk4", "step_size": 1.0}
    model = ff.models.build_vae(
        (1, 8, 8), 2, 4, hidden=(8, 8), solver=solver, evaluation_solver={"method": "euler", "step_size": 1.0}
    )
    sequence = {"frames": torch.rand(5, 1, 8, 8), "t": torch.arange(5)}
    data = type("Data", (), {"num_flows": 2, "__getitem__": lambda self, i: sequence})()
    assert settings.evaluations(model, data, 3) == [16, 16]
    assert not model.training
