"""Training without being told k: what the model sees, matching, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import SIZES, small_run

import flowfactor as ff
from flowfactor.cli import main
from flowfactor.cli.train import table
from flowfactor.metrics.matched import MatchedModel, flow_names, match_flows
from flowfactor.training import Config, load_run, train
from flowfactor.training.run import evaluate


def settings(output: Path, **train_options) -> Config:
    weak = {"supervision": "weak", "anneal_steps": 6, "factor_encoder": {"widths": [8], "hidden": [8]}}
    return small_run(output, SIZES | weak, stratified=False, **train_options)


def test_a_weak_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handed, original = [], ff.models.FlowFactorizedVAE.forward

    def spied(self, frames, t, k=None, **options):
        handed.append(k)
        return original(self, frames, t, k, **options)

    monkeypatch.setattr(ff.models.FlowFactorizedVAE, "forward", spied)
    result = train(settings(tmp_path / "run"))
    assert handed == [None] * 8  # the labels are in the batch and must not reach the model
    factor = result["factor_accuracy"]
    assert sorted(factor["order"]) == [0, 1, 2] and factor["count"] == 12
    assert sum(map(sum, factor["confusion"])) == 12
    assert "factor accuracy" in table(result)
    model, config = load_run(tmp_path / "run")
    assert int(model.estimator.step) == 8 and model.factor_encoder.num_frames == 3
    again = evaluate(model, config.data.dataset("test"), limit=4, likelihood_limit=6, samples=2)
    assert again["factor_accuracy"] == factor and again["equivariance_error"] == result["equivariance_error"]
    assert main(["evaluate", str(tmp_path / "run"), "--limit", "4", "--samples", "0"]) == 0
    assert "factor accuracy" in capsys.readouterr().out
    assert "factor_accuracy" in json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_a_resumed_weak_run_goes_on_with_its_annealing(tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    train(settings(tmp_path / "whole", likelihood_limit=0))
    interrupt(2)
    train(settings(tmp_path / "parts", likelihood_limit=0))
    assert int(load_run(tmp_path / "parts")[0].estimator.step) == 3
    train(settings(tmp_path / "parts", likelihood_limit=0), resume=True)
    whole, parts = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert int(parts["estimator.step"]) == 8
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_matched_model_acts_in_the_true_order() -> None:
    model = ff.models.build_vae((1, 8, 8), 3, 4, hidden=(8, 8)).eval()
    matched = MatchedModel(model, torch.tensor([2, 0, 1]))
    x0, t = torch.rand(3, 1, 8, 8), [0.0, 1.0, 2.0]
    torch.testing.assert_close(matched.transform(x0, t, 0), model.transform(x0, t, 2))
    index = torch.tensor([1, 0, 2])
    wanted = model.transform(x0, t, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(matched.transform(x0, t, index), wanted)
    weights = torch.nn.functional.one_hot(index, 3).float()
    torch.testing.assert_close(matched.transform(x0, t, weights), wanted)
    switched = ff.Schedule([(0.0, 0), (1.0, weights)])
    own = ff.Schedule([(0.0, 2), (1.0, torch.tensor([0, 2, 1]))])
    torch.testing.assert_close(matched.transform(x0, t, switched), model.transform(x0, t, own))
    frames = torch.rand(2, 3, 1, 8, 8)
    one, other = (
        m.log_likelihood(frames, t, k, 4, generator=torch.Generator().manual_seed(0))
        for m, k in ((matched, 1), (model, 0))
    )
    torch.testing.assert_close(one, other)


def test_flows_are_named_by_what_they_do() -> None:
    data = ff.data.Digits("test", steps=2)

    class Knowing(torch.nn.Module):
        """Sees the data set's transformations one after another, and calls them 2, 0 and 1."""

        supervision, num_flows = "weak", 3

        def __init__(self) -> None:
            super().__init__()
            self.answers = iter([2, 0, 1])

        def infer_factor(self, frames: torch.Tensor) -> torch.distributions.Categorical:
            return torch.distributions.Categorical(torch.eye(3)[next(self.answers)].expand(len(frames), 3))

    model = Knowing()
    assert flow_names(model, data, limit=4) == tuple(data.flow_names[k] for k in (1, 2, 0))


def test_a_model_of_other_flows_is_refused() -> None:
    model = ff.models.build_vae((3, 28, 28), 2, 4, supervision="weak", num_frames=3, hidden=(8, 8))
    with pytest.raises(ValueError, match="2 flows and the data set 3"):
        match_flows(model, ff.data.Digits("test", steps=2))
