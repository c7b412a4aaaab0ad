"""Displacement potentials: what their flows are known to do, and closed forms against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import product
from torch import Tensor

import flowfactor as ff

D, K, A = 7, 3, 3
CONTROLS = {
    "one": 1,
    "mixed": torch.tensor([0, 1, 2, 1, 0]),
    "weights": torch.tensor([[1.0, 0, 0], [0, 1, 0.5], [0.3, 0, 0], [0, 0, 0], [-0.2, 0.1, 0.2]]).double(),
}


def potential(context: int = 0) -> ff.potentials.DisplacementPotential:
    generator = torch.Generator().manual_seed(1)
    u = ff.potentials.DisplacementPotential(
        D, K, rest=A, hidden=5, scale=0.6, context=context, generator=generator
    ).double()
    with torch.no_grad():
        u.b1.normal_(generator=generator)
        u.b2.normal_(generator=generator)
    return u


def states(*batch: int, rest: float = 0.0) -> Tensor:
    z = torch.randn(*batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z[..., D - A :] *= rest
    return z


def shift(u: ff.potentials.DisplacementPotential, z: Tensor, k: int) -> Tensor:
    """f_k(x), written out."""
    hidden = torch.tanh(z[..., : D - A] @ u.w1[k].T + u.b1[k])
    return u.scale * (hidden @ u.w2[k].T + u.b2[k])


@pytest.mark.parametrize("k", range(K))
def test_states_at_rest_move_along_f_at_constant_speed(k: int) -> None:
    u, z = potential(), states(6)
    path = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-9, atol=1e-9))(z, [0.0, 1.0, 4.0, 8.0], k)
    f = shift(u, z, k).detach()
    for t, found in zip([0.0, 1.0, 4.0, 8.0], path.z, strict=True):
        torch.testing.assert_close(found, torch.cat([z[..., : D - A], t * f], -1), atol=1e-7, rtol=0)
    assert float(f.norm(dim=-1).min()) > 0.1  # it does move


def test_the_equation_holds_where_the_flow_is_and_nowhere_else() -> None:
    u, z = potential(), states(6)
    costs: dict[str, Any] = {"hj": ff.regularizers.HamiltonJacobi()}
    flow = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-9, atol=1e-9))
    with torch.no_grad():
        assert float(flow(z, [0.0, 4.0], 0, costs=costs).costs["hj"][-1].max()) < 1e-12
        assert float(flow(states(6, rest=1.0), [0.0, 4.0], 0, costs=costs).costs["hj"][-1].min()) > 1e-6


def test_states_beside_the_paths_are_drawn_towards_them() -> None:
    u, k = potential(), 1
    path = ff.LatentFlow(u, ff.Solver("dopri5", rtol=1e-8, atol=1e-8))(states(50, rest=0.3), [0.0, 2.0, 8.0], k)
    off = [(z[..., D - A :] - t * shift(u, z, k)).norm(dim=-1) for t, z in zip([0.0, 2.0, 8.0], path.z, strict=True)]
    assert (
        bool((off[1] <= off[0]).all())
        and bool((off[2] <= off[1]).all())
        and float((off[2] / off[0]).detach().min()) < 0.9
    )


@product(
    control=list(CONTROLS),
    gradient=["direct", "checkpoint", "adjoint"],
    divergence=["exact", "hutchinson"],
    own=[False, True],
    context=[0, 2],
)
def test_closed_forms_are_those_of_autograd(
    control: str, gradient: Any, divergence: str, own: bool, context: int
) -> None:
    u = potential(context)
    found = [solved(u, control, *way, divergence, own, context) for way in ((gradient, "auto"), ("direct", "general"))]
    tolerance = 1e-5 if gradient == "adjoint" else 1e-9
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def solved(
    u: ff.potentials.DisplacementPotential, control: str, gradient: Any, engine: Any, divergence: Any, own: bool, C: int
) -> list[Tensor]:
    """States, integrals and gradients."""
    solver = ff.Solver("rk4", step_size=0.05, gradient=gradient, engine=engine)
    if gradient == "adjoint":
        solver = ff.Solver("dopri5", rtol=1e-8, atol=1e-8, gradient=gradient, engine=engine)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    if own:
        t = t.unsqueeze(-1) * torch.linspace(0.8, 1.2, 5, dtype=torch.float64)
    z = states(5, rest=0.3).requires_grad_()
    context = torch.linspace(-1, 1, 5 * C, dtype=torch.float64).reshape(5, C).requires_grad_() if C else None
    costs: dict[str, Any] = {"hj": ff.regularizers.HamiltonJacobi(), "action": ff.regularizers.TransportCost()}
    flow = ff.LatentFlow(u, solver, divergence)
    path = flow(
        z, t, CONTROLS[control], context=context, log_det=True, costs=costs, generator=torch.Generator().manual_seed(3)
    )
    if engine == "auto":
        assert path.stats.engine == "closed form", path.stats.reason
    assert path.log_det is not None
    results = [path.z, path.log_det, *path.costs.values()]
    inputs = [z, *u.parameters(), *([] if context is None else [context])]
    gradients = torch.autograd.grad(sum((x.sin().sum() for x in results), z.new_zeros(())), inputs)
    return [x.detach() for x in results] + list(gradients)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_gradients_of_gradients_are_those_of_the_general_engine(divergence: Any) -> None:
    u, costs = potential(), {"hj": ff.regularizers.HamiltonJacobi()}
    found = []
    for engine in ("closed form", "general"):
        solver = ff.Solver("rk4", step_size=0.25, engine=engine)
        z = states(4, rest=0.3).requires_grad_()
        path = ff.LatentFlow(u, solver, divergence)(
            z, [0.0, 1.0], 1, log_det=True, costs=costs, generator=torch.Generator().manual_seed(1)
        )
        assert path.log_det is not None
        whole = path.z[-1].sin().sum() + path.log_det[-1].sum() + path.costs["hj"][-1].sum()
        (first,) = torch.autograd.grad(whole, z, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [z, u.w1, u.w2]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rest must leave a dimension"):
        ff.potentials.DisplacementPotential(4, rest=4)
    with pytest.raises(ValueError, match="rest must be at least 1"):
        ff.potentials.DisplacementPotential(4, rest=0)
    with pytest.raises(ValueError, match="scale must be positive"):
        ff.potentials.DisplacementPotential(4, rest=2, scale=0.0)


def test_a_model_of_displacements_into_its_room_at_rest() -> None:
    how: dict[str, Any] = {"field": "gradient", "potential": "displacement", "hidden": (6, 6)}
    model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, augment_dim=3, **how)
    u = model.flow.field.potential
    assert isinstance(u, ff.potentials.DisplacementPotential) and (u.rest, u.dim) == (3, 7)
    model(torch.rand(6, 4, 1, 8, 8), torch.arange(4), torch.arange(6) % 2).loss.backward()
    assert u.w1.grad is not None and float(u.w1.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="give augment_dim"):
        ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, augment_dim=0, **how)
