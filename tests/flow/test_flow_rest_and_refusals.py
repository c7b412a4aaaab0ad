"""Paths of one time, and clear refusals of costs that are no mapping and of torch.vmap."""

from __future__ import annotations

import pytest
import torch

import flowfactor as ff


def test_a_path_of_one_time_has_memory_and_graph_of_its_own() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(3))
    z = torch.randn(4, 3, requires_grad=True)
    path = flow(z, [0.5], log_det=True, costs={"hj": ff.regularizers.HamiltonJacobi()})
    assert path.z.data_ptr() != z.data_ptr() and torch.equal(path.z[0], z)
    assert path.log_det is not None
    for value in (path.log_det, path.costs["hj"]):
        assert torch.equal(value, torch.zeros(1, 4))
        (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        assert torch.equal(gradient, torch.zeros(4, 3))


@pytest.mark.parametrize("costs", [[ff.regularizers.TransportCost()], ff.regularizers.TransportCost()])
def test_costs_are_a_mapping(costs: object) -> None:
    with pytest.raises(TypeError, match="costs maps names to callables"):
        ff.LatentFlow(ff.potentials.MLPPotential(3))(torch.randn(4, 3), [0.0, 1.0], costs=costs)


def test_vmap_is_refused() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(3), ff.Solver("rk4"))
    with pytest.raises(ValueError, match="hand over states"):
        torch.vmap(lambda z: flow(z, [0.0, 1.0]).z[-1])(torch.randn(4, 3))
