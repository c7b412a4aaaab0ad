"""Regularizers against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

import flowfactor as ff

R = ff.regularizers


def _expanding() -> ff.potentials.Potential:
    """u = |z|^2 / 2(1 + t) solves the plain Hamilton-Jacobi equation with a minus sign; -u runs it backwards."""
    return ff.potentials.from_module(lambda z, t: 0.5 * z.square().sum(-1) / (1 + t), 3)


def test_a_solution_of_the_equation_has_no_residual() -> None:
    flow = ff.LatentFlow(_expanding(), ff.Solver(rtol=1e-9, atol=1e-9))
    z0 = torch.randn(5, 3, dtype=torch.float64)
    path = flow(z0, [0.0, 1.0, 3.0], costs={"hj": R.HamiltonJacobi(), "action": R.TransportCost()})
    assert float(path.costs["hj"].abs().max()) < 1e-12
    # Its paths are straight and of constant speed: z = z0 (1 + t), action |z0|^2 t / 2.
    torch.testing.assert_close(path.z[-1], 4 * z0, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(path.costs["action"][-1], 1.5 * z0.square().sum(-1), atol=1e-7, rtol=1e-7)


def test_the_residual_is_summed_over_dimensions_per_sample() -> None:
    S = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(3, S=S), ff.Solver("euler"))
    z0 = torch.tensor([[1.0, 1.0, 5.0], [0.0, 0.0, 7.0]])

    def force(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(z[..., 0])

    plain = flow(z0, [0.0, 1.0], costs={"hj": R.HamiltonJacobi()}).costs["hj"][-1]
    forced = flow(z0, [0.0, 1.0], costs={"hj": R.HamiltonJacobi(force)}).costs["hj"][-1]
    torch.testing.assert_close(plain, torch.tensor([2.5**2, 0.0]))
    torch.testing.assert_close(forced, torch.tensor([3.5**2, 1.0]))


@pytest.mark.parametrize("gradient", ["direct", "adjoint", "checkpoint"])
@pytest.mark.parametrize("engine", ["general", "closed form"])
def test_what_the_potential_does_not_carry(engine: str, gradient: str) -> None:
    """v = a z + b J z: along a path, |b J z|^2 = b^2 |z_0|^2 exp(2 a t), with its gradients."""
    S = torch.eye(2, dtype=torch.float64)
    u, h = (ff.potentials.QuadraticPotential(2, S=scale * S).double() for scale in (0.5, 3.0))
    solver = ff.Solver(rtol=1e-9, atol=1e-9, engine=engine, gradient=gradient)
    if engine == "closed form":
        u, h = (ff.potentials.MLPPotential(2, hidden=(2, 2), rank=2).double() for _ in range(2))
        with torch.no_grad():
            for part, scale in ((u, 0.5), (h, 3.0)):
                part.w3.zero_()
                part.quad.copy_(S)
                part.scale.fill_(scale)
                part.linear.zero_()
    flow = ff.LatentFlow(ff.fields.HelmholtzField(u, h, skew="canonical"), solver)
    z0 = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    path = flow(z0, [0.0, 1.0], costs={"rest": R.Solenoidal(), "action": R.TransportCost()})
    assert path.stats.engine == engine
    known = 9 * z0.square().sum(-1) * (torch.e - 1)
    torch.testing.assert_close(path.costs["rest"][-1], known, rtol=1e-7, atol=1e-7)
    (slope,) = torch.autograd.grad(path.costs["rest"][-1].sum(), z0)
    torch.testing.assert_close(slope, 18 * (torch.e - 1) * z0.detach(), rtol=1e-6, atol=1e-6)
    alone = ff.LatentFlow(u, solver)(z0, [0.0, 1.0], costs={"rest": R.Solenoidal()})
    assert float(alone.costs["rest"].detach().abs().max()) == 0


def test_fields_without_potential_have_nothing_to_carry_them() -> None:
    u = ff.potentials.MLPPotential(2)
    for field in (ff.fields.FreeField(2), ff.fields.SkewGradientField(u), ff.fields.SolenoidalField(2)):
        with pytest.raises(TypeError, match=f"cost 'rest' needs a potential, and {type(field).__name__} has none"):
            ff.LatentFlow(field)(torch.zeros(1, 2), [0.0, 1.0], costs={"rest": R.Solenoidal()})
    with pytest.raises(TypeError, match="field with a potential"):
        R.Solenoidal()(ff.fields.Evaluation(torch.zeros(1, 2), torch.zeros(()), torch.zeros(1, 2)))


def test_a_solenoidal_cost_of_ones_own_takes_a_stage_at_a_time() -> None:
    class Halved(R.Solenoidal):
        def forward(self, evaluation: ff.fields.Evaluation) -> torch.Tensor:
            return 0.5 * super().forward(evaluation)

    u, h = ff.potentials.MLPPotential(2, init_scale=2.0), ff.potentials.MLPPotential(2, init_scale=2.0)
    flow = ff.LatentFlow(ff.fields.HelmholtzField(u, h), ff.Solver("rk4"))
    path = flow(torch.randn(3, 2), [0.0, 1.0], costs={"half": Halved(), "whole": R.Solenoidal()})
    torch.testing.assert_close(2 * path.costs["half"], path.costs["whole"])
    assert R.Solenoidal().many_stages and path.stats.engine == "general" and "Halved" in path.stats.reason


def test_jacobian_norm_is_unbiased() -> None:
    S = torch.randn(3, 3, dtype=torch.float64)
    field = ff.fields.GradientField(ff.potentials.QuadraticPotential(3, S=S))
    control = ff.control.resolve(0, (1,), 1, dtype=torch.float64, device=torch.device("cpu"))
    z, t, total = torch.randn(1, 3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        probe = torch.tensor([signs], dtype=torch.float64)
        total += float(R.JacobianNorm()(field.bind(control, (1,), probe=probe)(z, t)).detach()) / 8
    symmetric = 0.5 * (S + S.T)
    assert total == pytest.approx(float(symmetric.square().sum()), rel=1e-10)


@pytest.mark.parametrize("wrap", [lambda u: u, ff.fields.GradientField, ff.LatentFlow])
def test_start_at_rest_is_the_squared_gradient(wrap) -> None:
    u = ff.potentials.MLPPotential(4, 3)
    z, k = torch.randn(6, 4), torch.arange(6) % 3
    expected = u.derivatives(z, 0.0, k).gradient.square().sum(-1)
    torch.testing.assert_close(R.StartAtRest()(wrap(u), z, k), expected)


def test_start_at_rest_of_a_free_field_is_its_speed() -> None:
    field = ff.fields.FreeField(4, 2)
    z = torch.randn(6, 4)
    torch.testing.assert_close(R.StartAtRest()(field, z, 1), field(z, 0.0, 1).square().sum(-1))


def test_sinkhorn_orders_clouds_and_has_gradients(generator: torch.Generator) -> None:
    x = torch.randn(2, 50, 3, generator=generator)
    match = R.SinkhornMatch(blur=0.05)
    near, far = match(x, x + 0.1), match(x, x + 1.0)
    assert near.shape == (2,) and bool((near < far).all())
    torch.testing.assert_close(far, torch.full((2,), 1.5), rtol=0.02, atol=0)  # a shift by (1, 1, 1) costs 3 / 2
    moved = (x + 1.0).requires_grad_()
    match(x, moved).sum().backward()
    assert float((moved.grad * torch.ones_like(x)).sum()) > 0


def test_sinkhorn_of_clouds_in_one_point_is_nothing() -> None:
    x, y = torch.full((2, 5, 3), 7.0), torch.full((2, 4, 3), 7.0, requires_grad=True)
    found = R.SinkhornMatch()(x, y)
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    assert bool((y.grad == 0).all())
    assert R.SinkhornMatch()(torch.zeros(0, 5, 3), torch.zeros(0, 4, 3)).shape == (0,)


@pytest.mark.parametrize("far", [1e3, 1e4])
def test_sinkhorn_does_not_depend_on_where_the_clouds_lie(far: float, generator: torch.Generator) -> None:
    x = torch.randint(-8, 9, (50, 2), generator=generator) / 8  # exact at any of these places
    y = x + torch.tensor([1.0, 1.0])
    match = R.SinkhornMatch(blur=0.05)
    torch.testing.assert_close(match(x + far, y + far), match(x, y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "error", "word"),
    [
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), ValueError, "the second cloud holds NaN"),
        (torch.full((3, 2), torch.inf), torch.zeros(3, 2), ValueError, "the first cloud holds NaN or infinity"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), TypeError, "one floating-point dtype"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), TypeError, "one floating-point dtype"),
    ],
)
def test_sinkhorn_refuses_what_is_no_cloud(x: torch.Tensor, y: torch.Tensor, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        R.SinkhornMatch()(x, y)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: R.SinkhornMatch(p=3), "p must be"),
        (lambda: R.SinkhornMatch(blur=0.0), "blur"),
        (lambda: R.SinkhornMatch()(torch.zeros(3, 2), torch.zeros(3, 4)), "clouds"),
        (lambda: R.SinkhornMatch()(torch.zeros(0, 2), torch.zeros(3, 2)), "no points"),
        (lambda: R.NegativeSquare(0), "positive"),
    ],
)
def test_bad_values_are_named(make, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="callable"):
        R.HamiltonJacobi(3.0)
    with pytest.raises(TypeError, match="potential"):
        ff.LatentFlow(ff.fields.FreeField(2))(torch.zeros(1, 2), [0.0, 1.0], costs={"hj": R.HamiltonJacobi()})
    with pytest.raises(TypeError, match="LatentFlow"):
        R.StartAtRest()(torch.nn.Linear(2, 2), torch.zeros(1, 2))
