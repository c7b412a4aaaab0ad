"""The latent error, order and group among the figures of a run."""

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


def test_order_and_group_are_what_the_metrics_say() -> None:
    model, data, result = measured("ours", limit=4)
    order, group = (measure(model, data, limit=4) for measure in (ff.metrics.commutator_error, ff.metrics.group_error))
    assert (result["commutator"], result["group"]) == (order.as_dict(), group.as_dict())
    told = [line.split() for line in table(result).splitlines()]
    assert ["in", "either", "order", "apart"] in told and ["turn+grow", f"{float(order.mean):.3f}"] in told
    figures = (group.addition, group.inverse, group.reconstruction)
    assert ["grow", *(f"{float(made.mean[1]):.3f}" for made in figures if made is not None)] in told


def test_order_and_group_are_missing_by_name() -> None:
    model, data, result = measured("vae")
    for name in ("commutator", "group"):
        assert "a VAE has no latent flow" in result[name]["missing"]
        assert evaluate(model, data, likelihood_limit=0, path_limit=0)[name] == {"missing": "not asked for"}
    assert "as a group" not in table(result) and "in either order" not in table(result)
    assert "as a group" not in table(
        {"equivariance_error": {"turn": 1.0}, "doing_nothing": {"turn": 2.0}}
    )  # of earlier


def test_sequences_without_labels_have_order_and_group() -> None:
    model, data, _ = measured("ours-weak", path_limit=0)
    clips = ff.data.Sequences(data.batch(range(6))["frames"])
    result = evaluate(model, clips, likelihood_limit=0, path_limit=5)
    assert result["commutator"] == ff.metrics.commutator_error(model, clips, limit=5).as_dict()
    assert result["group"] == ff.metrics.group_error(model, clips, limit=5).as_dict()
    assert (
        "no labels" in result["arc_over_chord"]["missing"] and "no labels" in result["combining"]["together"]["missing"]
    )
    told = table(result)
    assert "\n0+1 " in told and "\nflow 1 " in told
