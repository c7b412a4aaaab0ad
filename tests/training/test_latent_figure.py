"""The latent error among the figures of a run."""

from __future__ import annotations

from typing import Any

import torch

import flowfactor as ff
from flowfactor.cli.train import table
from flowfactor.training.evaluation import evaluate

TURN = {"turn": (ff.data.Rotate(), 0, 60), "grow": (ff.data.Scale(), 1.0, 1.5)}


def measured(method: str, **more: Any) -> tuple[Any, ff.data.TransformedImages, dict[str, Any]]:
    torch.manual_seed(0)
    data = ff.data.TransformedImages(torch.rand(6, 1, 8, 8), TURN, steps=2)
    model = ff.models.build_model(method, (1, 8, 8), 2, 4, num_frames=3)
    return model, data, evaluate(model, data, likelihood_limit=0, **more)


def test_it_stands_beside_the_equivariance_error() -> None:
    model, data, result = measured("ours", limit=4)
    expected = ff.metrics.latent_equivariance_error(model, data, limit=4).mean.tolist()
    assert result["latent_equivariance"]["mean"] == expected
    head, *rows = table(result).splitlines()[:3]
    assert head.endswith("latent error")
    assert [row.split()[-1] for row in rows] == [f"{value:.3f}" for value in expected]


def test_methods_without_flows_say_why_they_have_none() -> None:
    _, _, result = measured("vae")
    assert "no latent flow" in result["latent_equivariance"]["missing"]
    assert "latent error" not in table(result)


def test_it_can_be_left_out() -> None:
    _, _, result = measured("ours", path_limit=0)
    assert result["latent_equivariance"] == {"missing": "not asked for"}
