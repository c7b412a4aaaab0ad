"""Stationary potentials: the eikonal equation, its constant speeds, and energies that learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor._config import describe, rebuild

D, K = 3, 2
P = ff.potentials
SPEEDS = (1.5, 0.4)


class Distance(P.Potential):
    """Distances to a point, times a speed for each flow: what solves the eikonal equation."""

    def __init__(self) -> None:
        super().__init__(D, K)
        self.register_buffer("point", torch.tensor([-3.0, 1.0, 2.0]))

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return SPEEDS[k] * (z - self.point).norm(dim=-1)  # type: ignore[operator]


def network(**settings: Any) -> P.MLPPotential:
    return P.MLPPotential(D, K, (6, 5), rank=2, init_scale=1.0, time_features=0, **settings)


@pytest.mark.parametrize("control", ["one", "index"])
def test_distances_have_no_residual_and_constant_speeds(control: str) -> None:
    u = P.Stationary(Distance(), [0.5 * c**2 for c in SPEEDS]).double()
    z = torch.randn(4, D).double()
    acting = 1 if control == "one" else torch.tensor([0, 1, 1, 0])
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-9, atol=1e-9))
    path = flow(z, [0.0, 1.0, 2.0, 3.0], acting, costs={"hj": ff.regularizers.HamiltonJacobi()})
    assert float(path.costs["hj"].detach().abs().max()) < 1e-12
    speed = torch.tensor(SPEEDS).double()[acting]
    torch.testing.assert_close(path.z.diff(dim=0).norm(dim=-1).detach(), speed.expand(3, 4), rtol=1e-5, atol=1e-6)
    other = ff.LatentFlow(P.Stationary(Distance(), 0.5).double())
    off = other(z, [0.0, 1.0], acting, costs={"hj": ff.regularizers.HamiltonJacobi()})
    assert bool((off.costs["hj"][-1] > 1e-3).all())


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("control", ["index", "weights"])
@pytest.mark.parametrize("times", ["common", "own"])
def test_gradients_of_both_engines_agree(gradient: Any, control: str, times: str) -> None:
    made = P.Stationary(network(context=2), [0.3, 1.2]).double()
    solver = ff.Solver("dopri5", rtol=1e-8, atol=1e-8, gradient=gradient)
    flow = ff.LatentFlow(made, solver)
    z, c = torch.randn(4, D).double().requires_grad_(), torch.randn(4, 2).double()
    t = torch.tensor([0.0, 0.5, 1.0]).double()
    t = t.unsqueeze(-1) * torch.linspace(0.5, 1.0, 4).double() if times == "own" else t
    acting = torch.tensor([0, 1, 1, 0]) if control == "index" else torch.randn(4, K).double()
    found = []
    for engine in ("closed form", "general"):
        flow.solver = replace(solver, engine=engine)
        path = flow(z, t, acting, context=c, log_det=True, costs={"hj": ff.regularizers.HamiltonJacobi()})
        assert path.stats.engine == engine, path.stats.reason
        loss = path.z.sin().sum() + path.log_det.square().sum() + path.costs["hj"].sum()  # type: ignore[union-attr]
        gradients = torch.autograd.grad(loss, [z, *flow.parameters()])
        assert all(bool(g.any()) for g in gradients)  # the energies' among them
        found.append([path.costs["hj"], *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_energies_learn_what_the_speeds_are() -> None:
    u = P.Stationary(Distance(), 0.2)
    flow, z = ff.LatentFlow(u, ff.Solver("euler")), torch.randn(8, D)
    optimizer = torch.optim.Adam(u.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        path = flow(z, [0.0, 1.0], torch.arange(8) % K, costs={"hj": ff.regularizers.HamiltonJacobi()})
        path.costs["hj"][-1].sum().backward()
        optimizer.step()
    torch.testing.assert_close(u.energy.detach(), torch.tensor([0.5 * c**2 for c in SPEEDS]), rtol=0.02, atol=0.01)


def test_it_is_rebuilt_and_built_by_name(tmp_path: Any) -> None:
    made = P.Stationary(network(), [0.3, 1.2])
    again = rebuild(describe(made))  # type: ignore[arg-type]
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(torch.ones(2, D), 3.0, 1), made(torch.ones(2, D), 3.0, 1))
    of_tensor = rebuild(describe(P.Stationary(network(), torch.tensor([0.3, 1.2]))))  # type: ignore[arg-type]
    torch.testing.assert_close(of_tensor.energy, made.energy)
    for time_features in (None, 0):
        how: dict[str, Any] = {"hidden": (5, 4), "time_features": time_features}
        named = {"name": "stationary", "energy": 0.7}
        model = ff.models.build_vae((1, 8, 8), K, D, potential=named, field="gradient", augment_dim=0, **how)
        potential: Any = model.flow.field.potential
        assert isinstance(potential, P.Stationary) and potential.potential.w1.shape == (K, 5, D)
        torch.testing.assert_close(potential.energy.detach(), torch.full((K,), 0.7))
    model.save_pretrained(tmp_path)
    loaded: Any = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path).flow.field
    assert torch.equal(loaded.potential.energy, potential.energy)
    inner = {"name": "stationary", "potential": {"name": "resnet", "depth": 2}}
    resnet = ff.models.build_vae((1, 8, 8), K, D, potential=inner).flow.field.potential.potential  # type: ignore[union-attr]
    assert (resnet.depth, resnet.time_features) == (2, 0)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(TypeError, match="must be a flowfactor Potential, got Linear"):
        P.Stationary(torch.nn.Linear(2, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"time_features=16: build it with time_features=0"):
        P.Stationary(P.MLPPotential(D))
    for energy in (0.0, [1.0, -1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="energy must be positive, one number or 2"):
            P.Stationary(network(), energy)
    with pytest.raises(ValueError, match="'stationary' has no time features"):
        ff.models.build_vae((1, 8, 8), potential="stationary", time_features=4)
