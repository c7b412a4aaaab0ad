"""Every method is trained, resumed, measured and loaded by the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import SIZES, small_run

from flowfactor.cli import main
from flowfactor.cli.train import parse_train
from flowfactor.metrics import equivariance_error
from flowfactor.models import METHODS
from flowfactor.training import Config, load_config, load_run, prepare, train


def settings(method: str, output: Path, **train_options) -> Config:
    model = {**SIZES, "latent_dim": 12, "hidden": [16]}
    if method != "factor-vae":
        del model["hidden"]
    few = {"steps": 3, "log_every": 1, "evaluate_limit": 2, "likelihood_limit": 3}
    return small_run(output, model, method, **few | train_options)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method(method: str, tmp_path: Path) -> None:
    result = train(settings(method, tmp_path))
    assert result["finished"] and result["config"]["method"] == method
    assert all(value > 0 for value in result["equivariance_error"].values()) and "per_frame" in result["log_likelihood"]
    # Models without transformations have the best latent dimensions searched.
    assert ("traversals" in result["equivariance"]) == (not METHODS[method].transforms)
    model, config = load_run(tmp_path)
    assert config.method == method and type(model) is type(prepare(settings(method, tmp_path / "new")).model)


def test_a_run_without_transformations_is_measured_again_as_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(settings("vae", tmp_path, evaluate_limit=4))
    assert main(["evaluate", str(tmp_path), "--limit", "4", "--samples", "0"]) == 0
    capsys.readouterr()
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["equivariance"] == result["equivariance"]
    model, config = load_run(tmp_path)
    still = equivariance_error(model, config.data.dataset("test"), limit=4).mean
    assert still.tolist() != result["equivariance"]["mean"]


def test_factor_vae_is_resumed_with_both_its_players(tmp_path: Path) -> None:
    train(settings("factor-vae", tmp_path / "whole", schedule="constant"))
    train(settings("factor-vae", tmp_path / "parts", schedule="constant", steps=2))
    train(settings("factor-vae", tmp_path / "parts", schedule="constant"), resume=True)
    whole, parts = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert any("discriminator" in name for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name])
    with pytest.raises(ValueError, match="method"):
        prepare(settings("vae", tmp_path / "parts"), resume=True)


def test_a_preset_is_trained_by_another_method() -> None:
    config, _, _ = parse_train(
        ["demo", "--method", "beta-vae", "--model.beta", "8", "--model.decoder.initial_mean", "0.2"]
    )
    assert config.method == "beta-vae" and config.train == load_config("demo").train
    expected = {"latent_dim": 32, "frames_per_step": 2, "decoder": {"initial_mean": 0.2}, "beta": 8}
    assert config.model == expected
    config, _, _ = parse_train(["demo", "--method=sta", "--model.control", "double"])
    assert config.method == "sta" and config.model["control"] == "double" and "hj_weight" not in config.model
    assert parse_train(["demo"])[0].method == "ours"


def test_unknown_methods_and_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(["demo", "--method", "vea"])
    error = capsys.readouterr().err
    assert "unknown method 'vea'" in error and "po-flow" in error
    config = settings("beta-vae", tmp_path)
    config.model["gamma"] = 3.0
    with pytest.raises(ValueError, match=r"model.gamma is no setting: did you mean model.beta"):
        prepare(config)
