"""Single latent dimensions in place of transformations."""

from __future__ import annotations

import json

import pytest
import torch

import flowfactor as ff


class Mixed:
    """A decoder whose dimension 5 is the brightness of one row; the others are brightnesses of the other pixels."""

    num_flows = 1

    def __init__(self, gain: float = 2.0) -> None:
        basis = torch.eye(16)
        basis[5] = torch.zeros(4, 4).index_fill(0, torch.tensor([1]), 1.0).flatten()
        basis[5] *= gain
        self.basis = basis
        self.inverse = torch.linalg.inv(basis)

    def encode(self, x):
        scale = torch.ones(*x.shape[:-3], 16)
        return torch.distributions.Independent(torch.distributions.Normal(x.flatten(-3) @ self.inverse, scale), 1)

    def decode(self, z):
        return (z @ self.basis).unflatten(-1, (1, 4, 4))


def _sequences(amount: float, count: int = 6) -> torch.Tensor:
    """Frames in which row 1 grows brighter by an amount in all, at a constant pace."""
    row = torch.zeros(1, 4, 4)
    row[:, 1] = 1.0
    return 0.4 * torch.rand(count, 1, 1, 4, 4) + amount * torch.linspace(0, 1, 5)[:, None, None, None] * row


@pytest.mark.parametrize("amount", [0.5, -0.4])
def test_the_search_finds_the_dimension_and_the_range(amount: float) -> None:
    dimension, reach = ff.metrics.best_traversal(Mixed(), _sequences(amount), torch.arange(5))
    assert dimension == 5 and reach == pytest.approx(amount / 2, rel=0.03)


def test_a_transformation_that_does_nothing_gets_a_range_of_nothing() -> None:
    found = ff.metrics.best_traversal(Mixed(), _sequences(0.0), torch.arange(5), torch.zeros(6, dtype=torch.long))
    assert found.range == 0.0


def test_the_search_is_never_worse_than_standing_still() -> None:
    model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8)).eval()
    frames, t = torch.rand(5, 4, 1, 8, 8), torch.arange(4)
    found = ff.metrics.best_traversal(model, frames, t)
    errors = []
    for reach in (found.range, 0.0):
        made = ff.metrics.TraversalModel(model, [ff.metrics.Traversal(found.dimension, reach)], span=3)
        with torch.no_grad():
            errors.append(float((made.transform(frames[:, 0], t) - frames).abs().sum()))
    assert errors[0] <= errors[1]


def test_the_error_on_test_data_of_a_traversal_that_fits_is_small() -> None:
    k = torch.arange(12) % 2
    frames = torch.where((k == 0)[:, None, None, None, None], _sequences(0.5, 12), _sequences(0.0, 12))
    data = ff.data.Sequences(frames, k)
    error = ff.metrics.latent_traversal_error(Mixed(), data, data)
    assert error.traversals[0].dimension == 5 and error.traversals[1].range == 0.0
    assert error.count == 6 and float(error.mean[1]) < 1e-3
    assert float(error.doing_nothing[0]) == pytest.approx(0.5 * 4 * 2.5, rel=1e-3)
    assert float(error.mean[0]) < 0.03 * float(error.doing_nothing[0])
    assert json.loads(json.dumps(error.as_dict()))["traversals"][0][0] == 5


def test_traversals_take_every_control() -> None:
    model = ff.metrics.TraversalModel(Mixed(), [ff.metrics.Traversal(5, 2.0), ff.metrics.Traversal(0, -1.0)], span=4)
    t, z0 = torch.tensor([0.0, 2.0, 6.0]), torch.zeros(2, 16)
    assert model.num_flows == 2
    path = model.path(z0, t, torch.tensor([0, 1]))
    assert path[:, 0, 5].tolist() == [0, 1, 3] and path[:, 1, 0].tolist() == [0, -0.5, -1.5]
    both = model.path(z0, t, torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    assert both[2, 0, [0, 5]].tolist() == [-1.5, 3.0] and both[2, 1, [0, 5]].tolist() == [0.0, 1.5]
    switched = model.path(z0, t, ff.Schedule([(0.0, 0), (4.0, 1)]))
    assert switched[2, 0, [0, 5]].tolist() == [-0.5, 2.0]


def test_bad_input_is_refused() -> None:
    frames, t = _sequences(0.5), torch.arange(5)
    with pytest.raises(ValueError, match="one transformation"):
        ff.metrics.best_traversal(Mixed(), frames, t, torch.arange(6))
    with pytest.raises(ValueError, match="two frames"):
        ff.metrics.best_traversal(Mixed(), frames[:, :1], t[:1])
    with pytest.raises(ValueError, match="one time a frame"):
        ff.metrics.best_traversal(Mixed(), frames, t[:4])
    with pytest.raises(ValueError, match="ranges"):
        ff.metrics.best_traversal(Mixed(), frames, t, ranges=[])
    with pytest.raises(ValueError, match="at least one traversal"):
        ff.metrics.TraversalModel(Mixed(), [], 4)
    with pytest.raises(ValueError, match="span"):
        ff.metrics.TraversalModel(Mixed(), [ff.metrics.Traversal(0, 1.0)], 0)
    data, later = ff.data.Sequences(frames, [0] * 6), ff.data.Sequences(frames, [0] * 6, t=2 * torch.arange(5))
    with pytest.raises(ValueError, match="times"):
        ff.metrics.latent_traversal_error(Mixed(), data, later)
    with pytest.raises(ValueError, match="1 transformations and test 2"):
        ff.metrics.latent_traversal_error(Mixed(), data, ff.data.Sequences(frames, [0, 1] * 3))
