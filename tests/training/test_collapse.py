"""Trainings whose code or flows tell nothing are warned of, and healthy ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import SIZES, small_run

from flowfactor.training import load_config, prepare, train
from flowfactor.training._collapse import signs_of_collapse

QUICK = {"likelihood_limit": 0, "evaluate_limit": 2, "steps": 200, "log_every": 100}


def test_a_posterior_that_carries_nothing_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the posterior has collapsed: .*kl_weight"):
        result = train(small_run(tmp_path, SIZES | {"kl_weight": 1e4}, **QUICK))
    (line,) = result["warnings"]
    assert "collapsed" in line


def test_a_healthy_training_is_not_warned_of(tmp_path: Path) -> None:
    assert train(small_run(tmp_path, learning_rate=3e-3, **QUICK))["warnings"] == []


@pytest.mark.parametrize("method", ["sta", "ours"])
def test_a_flow_that_is_always_on_is_warned_of(method: str, tmp_path: Path) -> None:
    settings = {"warmup_steps": 0} if method == "sta" else {"supervision": "weak", "num_frames": 3}
    config = small_run(tmp_path, SIZES | settings, method)
    run = prepare(config)
    with torch.no_grad():
        run.model.encoder.load_state_dict(
            {name: 40 * value for name, value in run.model.encoder.state_dict().items()}  # codes that differ
        )
        before = signs_of_collapse(run.model, run.data.dataset)
        head = _head(run.model)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[1] = 5.0
    (line,) = signs_of_collapse(run.model, run.data.dataset)
    assert not before and line.startswith("flow 1 is always on: it is inferred to act in 100%")


def _head(model: torch.nn.Module) -> torch.nn.Linear:
    if hasattr(model, "pair_encoder"):
        return model.pair_encoder.spike_head
    return [module for module in model.factor_encoder.modules() if isinstance(module, torch.nn.Linear)][-1]


def test_what_is_hardly_trained_is_not_warned_of(tmp_path: Path) -> None:
    assert train(small_run(tmp_path, likelihood_limit=0))["warnings"] == []


def test_the_demo_is_not_warned_of(tmp_path: Path) -> None:
    config = load_config("demo")
    config.output, config.train.steps, config.train.minutes, config.train.progress = str(tmp_path), 200, None, False
    config.train.evaluate_limit, config.train.likelihood_limit, config.train.batch_size = 4, 0, 24
    assert train(config)["warnings"] == []
