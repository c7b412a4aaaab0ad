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


@pytest.mark.parametrize(
    ("solve", "over"),
    [
        (lambda flow, z: flow(z, [0.0, 1.0]), torch.randn(4, 3)),
        (lambda flow, t: flow(torch.ones(3), t), torch.tensor([[0.0, 1.0], [0.0, 2.0]])),
        (lambda flow, t: flow.inverse(torch.ones(3), t), torch.tensor([[0.0, 1.0], [0.0, 2.0]])),
        (lambda flow, k: flow(torch.ones(5, 3), [0.0, 1.0], k), torch.ones(4, 5, dtype=torch.long)),
        (lambda flow, w: flow(torch.ones(5, 3), [0.0, 1.0], w), torch.rand(4, 5, 2)),
        (lambda flow, w: flow(torch.ones(5, 3), [0.0, 1.0], ff.Schedule([(0.0, 0), (0.5, w)])), torch.rand(4, 5, 2)),
    ],
    ids=["z0", "t", "t of an inverse", "index", "weights", "schedule"],
)
def test_vmap_is_refused(solve, over: torch.Tensor) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(3, 2), ff.Solver("rk4"))
    with pytest.raises(ValueError, match="hand over states"):
        torch.vmap(lambda x: solve(flow, x).z[-1])(over)


@pytest.mark.parametrize("what", ["push", "density", "transform"])
def test_maps_and_distributions_refuse_times_of_each_sample_by_name(what: str) -> None:
    flow, t = ff.LatentFlow(ff.potentials.MLPPotential(2)), torch.tensor([0.1, 0.2])
    base = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"t[01] is one time.*\[2\].*flow\(z, t \[T, \*batch\]\)"):
        flow.transform(0.0, t) if what == "transform" else getattr(flow, what)(base, t)
