"""Parts of one's own in a run: named in its configuration, trained, measured and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import SIZES, small_run

import flowfactor as ff
from flowfactor import registry
from flowfactor.cli.train import table
from flowfactor.training import load_config, load_run, train
from flowfactor.training.building import make_model


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    registry._KNOWN.clear()


def test_a_run_of_ones_own_potential_objective_and_estimator(tmp_path: Path) -> None:
    @ff.register_potential("well")
    class Well(ff.potentials.Potential):
        def __init__(self, dim: int, num_flows: int = 1, *, depth: float = 1.0) -> None:
            super().__init__(dim, num_flows)
            self.depth = depth

        def flow_potential(self, z, t, k):
            return -0.1 * self.depth * (k + 1) * z.square().sum(-1)

    @ff.register_objective("free-bits")
    class FreeBits(ff.objectives.Objective):
        def __init__(self, nats: float = 1.0) -> None:
            self.nats = nats

        def divergence(self, start, prior, path, t, control):
            return (start - prior.at(0.0, control).log_prob(path.z[0])).clamp(min=self.nats)

    @ff.register_estimator("likeliest")
    class Likeliest(ff.models.FactorEstimator):
        def expectation(self, batch):
            return batch.under(batch.log_q.argmax(-1)).with_factor(batch.divergence(batch.log_q))

    own = {"potential": {"name": "well", "depth": 0.5}, "objective": {"name": "free-bits"}, "estimator": "likeliest"}
    result = train(small_run(tmp_path, {**SIZES, **own}, "ours-weak"))
    assert "objective free-bits has no importance weights" in result["log_likelihood"]["missing"]
    assert "no ln p(x): the objective free-bits" in table(result) and "factor accuracy" in table(result)
    model, config = load_run(tmp_path)
    assert config == load_config(tmp_path / "config.yaml") and config.model["potential"] == own["potential"]
    assert type(model.flow.field.potential) is Well and model.flow.field.potential.depth == 0.5
    assert type(model.objective) is FreeBits and int(model.estimator.step) == 8


def test_flows_that_turn_by_the_names_of_the_datas_transformations(tmp_path: Path) -> None:
    turning = {**SIZES, "field": "helmholtz", "turning": ["colouring", 1]}
    config = small_run(tmp_path, turning, "ours")
    train(config)
    assert load_run(tmp_path)[0].flow.field.turning == (1, 2) and load_config(tmp_path / "config.yaml") == config
    for method, names, said in (
        (
            "ours",
            ["shear", "rotation"],
            r"names shear, and the transformations of \w+ are scaling, rotation, colouring",
        ),
        ("ours-weak", ["rotation"], "'ours-weak' has to find out: give indices"),
        ("sta", ["rotation"], "'sta' has to find out: give indices"),
        ("ours", [1, 1], "each once"),
    ):
        asked = small_run(tmp_path / "other", {**turning, "turning": names}, method)
        with pytest.raises(ValueError, match=said):
            make_model(asked, asked.data.dataset("train"))
    for method in ("ours-weak", "sta"):
        asked = small_run(tmp_path / "other", {**turning, "turning": [1]}, method)
        assert make_model(asked, asked.data.dataset("train")).flow.field.turning == (1,)
