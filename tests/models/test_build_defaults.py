"""What `build_vae` makes of a model that is told little."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowfactor as ff

SIZES: dict[str, Any] = {"image_shape": (1, 8, 8), "num_flows": 2, "latent_dim": 4, "hidden": (5, 5)}


def test_a_gradient_field_with_room_at_rest_solved_adaptively() -> None:
    model = ff.models.build_vae(**SIZES)
    assert isinstance(model.flow.field, ff.fields.GradientField) and model.flow.dim == 12
    assert (model.hj_weight, model.bending_weight, model.start_weight, model.force) == (0.13 * 64, 0.04 * 64, 0.0, None)
    loose, close = model.flow.solver, model.eval().flow.acting_solver
    assert (loose.method, loose.rtol, loose.norm) == ("bosh3", 3e-3, "batch")
    assert (close.method, close.rtol, close.norm) == ("dopri5", 1e-5, "sample")


@pytest.mark.parametrize(
    ("settings", "dim", "weight"),
    [
        ({"hj_weight": 2.0}, 12, 2.0),
        ({"field": "helmholtz"}, 4, 1.0),
        ({"objective": "marginal"}, 4, 1.0),
        ({"time_features": 0}, 12, 1.0),
        ({"time_features": 0, "potential": "stationary"}, 12, 0.13 * 64),
    ],
)
def test_what_is_said_or_does_not_apply_is_left(settings: dict[str, Any], dim: int, weight: float) -> None:
    model = ff.models.build_vae(**SIZES, **settings)
    assert (model.flow.dim, model.hj_weight) == (dim, weight)


def test_a_solver_that_is_given_is_that_of_evaluation_too() -> None:
    flow = ff.models.build_vae(**SIZES, solver={"method": "euler", "step_size": 1.0}).eval().flow
    assert flow.acting_solver is flow.solver


@pytest.mark.parametrize("field", ["gradient", "free"])
def test_a_skew_takes_a_helmholtz_field(field: str) -> None:
    with pytest.raises(ValueError, match="skew='canonical' makes the divergence-free part"):
        ff.models.build_vae(**SIZES, field=field, skew="canonical")


@pytest.mark.parametrize("builder", [ff.models.build_vae, ff.models.build_sparse_vae])
def test_which_flows_turn_is_told_a_helmholtz_field_by_index(builder: Any) -> None:
    for skew in (None, "canonical"):
        assert builder(**SIZES, field="helmholtz", turning=[1], skew=skew).flow.field.turning == (1,)
    assert builder(**SIZES, field="helmholtz").flow.field.turning is None
    for field in ("gradient", "free"):
        with pytest.raises(ValueError, match=rf"turning=\[1\] says .* and the field is '{field}'"):
            builder(**SIZES, field=field, turning=[1])
    with pytest.raises(ValueError, match="names flows, which a model knows by their index alone"):
        builder(**SIZES, field="helmholtz", turning=["rotation"])
    with pytest.raises(ValueError, match="must name flows from 0 to 1"):
        builder(**SIZES, field="helmholtz", turning=[2])
    with pytest.raises(TypeError, match="must be a list of flows"):
        builder(**SIZES, field="helmholtz", turning=1)


class Dimmed:
    def _frames(self, indices: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        made = super()._frames(indices, k)  # type: ignore[misc]
        return made | {"frames": made["frames"] / 2}


class DimmedImages(Dimmed, ff.data.TransformedImages): ...


class DimmedCombined(Dimmed, ff.data.CombinedImages): ...


@pytest.mark.parametrize("kind", [DimmedImages, DimmedCombined])
def test_frames_of_a_subclass_are_made_from_the_starts_that_are_drawn(kind: Any) -> None:
    images, flows = torch.rand(6, 1, 8, 8), {"turn": (ff.data.Rotate(), 0.0, 40.0), "grow": (ff.data.Scale(), 1.0, 1.5)}
    how: dict[str, Any] = {"steps": 4, "start": "any", "direction": "both"}
    plain, dimmed = kind.__bases__[1](images, flows, **how), kind(images, flows, **how)
    epochs = [list(data.batches(2, generator=torch.Generator().manual_seed(1))) for data in (plain, dimmed)]
    for one, other in zip(*epochs, strict=True):
        torch.testing.assert_close(other["frames"], one["frames"] / 2)
        assert torch.equal(other["t"], one["t"])
