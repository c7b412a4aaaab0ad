"""Closed forms of every potential against automatic differentiation by torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.potentials import Potential

D, K = 4, 3


class Wave(Potential):
    """A user's potential: derivatives by automatic differentiation."""

    def __init__(self) -> None:
        super().__init__(D, K)
        self.direction = nn.Parameter(torch.randn(K, D))

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return torch.sin(z @ self.direction[k] + 0.3 * t) + 0.1 * z.square().sum(-1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D + 1, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.cat([z, t.unsqueeze(-1)], -1)))).squeeze(-1)


P = ff.potentials
MAKERS: dict[str, Callable[[], Potential]] = {
    "mlp": lambda: P.MLPPotential(D, K, (7, 5), rank=2, time_features=4, init_scale=1.0),
    "mlp-softplus": lambda: P.MLPPotential(
        D, K, (7, 5), rank=0, time_features=2, activation="softplus", init_scale=1.0
    ),
    "mlp-tanh": lambda: P.MLPPotential(D, K, (7, 5), time_features=6, activation="tanh", init_scale=1.0),
    "mlp-even": lambda: P.MLPPotential(D, K, (8, 5), init_scale=1.0),
    "mlp-wide": lambda: P.MLPPotential(D, K, (96, 512), init_scale=1.0),
    "convex": lambda: P.ConvexPotential(D, K, (7, 5), rank=2, time_features=4, init_scale=1.0),
    "paper": lambda: P.PaperPotential(D, K),
    "resnet-1": lambda: P.ResNetPotential(D, K, width=6, depth=1, rank=2, init_scale=1.0),
    "resnet-3": lambda: P.ResNetPotential(D, K, width=6, depth=3, rank=2, init_scale=1.0),
    "mlp-timeless": lambda: P.MLPPotential(D, K, (7, 5), rank=2, time_features=0, init_scale=1.0),
    "convex-timeless": lambda: P.ConvexPotential(D, K, (7, 5), rank=2, time_features=0, init_scale=1.0),
    "paper-timeless": lambda: P.PaperPotential(D, K, time_features=0),
    "resnet-timeless": lambda: P.ResNetPotential(D, K, width=6, depth=2, rank=2, time_features=0, init_scale=1.0),
    "displacement-timeless": lambda: P.DisplacementPotential(D, K, rest=2, hidden=6, scale=0.5, time_features=0),
    "stationary": lambda: P.Stationary(P.MLPPotential(D, K, (7, 5), rank=2, time_features=0, init_scale=1.0)),
    "quadratic": lambda: P.QuadraticPotential(D, K, b=torch.randn(K, D)),
    "user": Wave,
    "module": lambda: P.from_module([Net() for _ in range(K)], D),
}


def build(name: str) -> Potential:
    """The potential in double precision with no parameter left at zero."""
    u = MAKERS[name]().double()
    with torch.no_grad():
        for p in u.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return u


def one(u: Potential, control: int | Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The potential of a single state by its value alone: what the oracle differentiates."""
    return lambda z, t: u(z.unsqueeze(0), t, control if isinstance(control, int) else control.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["int", "weights"])
def test_derivatives_agree_with_torch_func(name: str, kind: str) -> None:
    u = build(name)
    z, t = torch.randn(5, D, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    control = 1 if kind == "int" else torch.randn(5, K, dtype=torch.float64)
    got = u.derivatives(z, t, control, laplacian="exact")
    for i in range(5):
        value = one(u, 1 if kind == "int" else control[i])
        torch.testing.assert_close(got.value[i], value(z[i], t), rtol=0, atol=1e-10)
        torch.testing.assert_close(got.gradient[i], torch.func.grad(value)(z[i], t), rtol=0, atol=1e-10)
        torch.testing.assert_close(got.time[i], torch.func.grad(value, argnums=1)(z[i], t), rtol=0, atol=1e-10)
        hessian = torch.func.jacfwd(torch.func.grad(value))(z[i], t)
        torch.testing.assert_close(got.laplacian[i], hessian.trace(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_hutchinson_equals_the_trace_over_all_probes_and_each_quadratic_form(name: str) -> None:
    u = build(name)
    z = torch.randn(3, D, dtype=torch.float64)
    k = torch.tensor([2, 0, 1])
    exact = u.derivatives(z, 0.4, k, laplacian="exact").laplacian
    t = torch.tensor(0.4, dtype=torch.float64)
    hessians = torch.stack([torch.func.hessian(one(u, int(k[j])))(z[j], t) for j in range(3)])
    total = torch.zeros_like(exact)
    for signs in itertools.product((-1.0, 1.0), repeat=D):
        probe = torch.tensor(signs, dtype=torch.float64).expand(3, D)
        found = u.derivatives(z, 0.4, k, laplacian="hutchinson", probe=probe).laplacian
        expected = torch.einsum("bi,bij,bj->b", probe, hessians, probe)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        total = total + found
    torch.testing.assert_close(total / 2**D, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_hutchinson_with_weights_and_with_one_flow(name: str) -> None:
    u = build(name)
    z, probe = torch.randn(2, 3, D).double(), torch.randn(2, 3, D).sign().double()
    weights = torch.randn(2, 3, K).double()
    parts = [u.derivatives(z, 0.4, k, laplacian="hutchinson", probe=probe).laplacian for k in range(K)]
    got = u.derivatives(z, 0.4, weights, laplacian="hutchinson", probe=probe).laplacian
    torch.testing.assert_close(got, (torch.stack(parts, -1) * weights).sum(-1), rtol=0, atol=1e-10)


def test_drawn_probes_are_signs_and_follow_the_generator() -> None:
    u = build("mlp")
    z = torch.randn(6, D).double()
    draws = [
        u.derivatives(z, 0.0, laplacian="hutchinson", generator=torch.Generator().manual_seed(s)).laplacian
        for s in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", MAKERS)
def test_second_derivatives_flow_through_the_closed_forms(name: str) -> None:
    u = build(name)
    z = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    if name == "mlp-wide":
        z = z.detach()[:1].requires_grad_()

    def everything(z: Tensor) -> Tensor:
        d = u.derivatives(z, 0.3, 1, laplacian="exact")
        return d.value + d.gradient.square().sum(-1) + d.time + d.laplacian

    assert torch.autograd.gradcheck(everything, (z,), atol=1e-6)


def test_convex_is_convex_and_paper_is_bounded() -> None:
    z = 3 * torch.randn(50, D, dtype=torch.float64)
    convex = build("convex")
    hessian = torch.func.vmap(torch.func.hessian(lambda x: one(convex, 0)(x, torch.tensor(2.0).double())))(z)
    assert torch.linalg.eigvalsh(hessian).min() >= -1e-12
    assert build("paper")(z * 100, 0.0).abs().max() <= 1


def test_derivatives_stay_finite_far_out() -> None:
    for name in ("mlp", "mlp-softplus", "convex", "resnet-3", "paper"):
        u = MAKERS[name]()
        d = u.derivatives(torch.full((1, D), 1e4), 1e4, laplacian="exact")
        assert all(bool(torch.isfinite(x).all()) for x in (d.value, d.gradient, d.time, d.laplacian)), name
