"""What every field promises: shapes, controls, divergences, transforms and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from constructors import FIELDS, D, K, mlp
from constructors import build as make
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.fields import Field

F, P = ff.fields, ff.potentials
pytestmark = pytest.mark.contract

everyone = pytest.mark.parametrize("name", FIELDS)


def build(name: str) -> Field:
    return make(FIELDS, name)


def jacobian(field: Field, z: Tensor, t: float, control: int | Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda x: field(x.unsqueeze(0), t, control).squeeze(0), z)


@everyone
@pytest.mark.parametrize("kind", ["int", "weights"])
def test_exact_divergence_is_the_trace_of_the_jacobian(name: str, kind: str) -> None:
    field = build(name).double()
    z, w = torch.randn(4, D).double(), torch.randn(K).double()
    control = 1 if kind == "int" else w
    got = field.divergence(z, 0.6, control)
    for i in range(4):
        torch.testing.assert_close(got[i], jacobian(field, z[i], 0.6, control).trace(), rtol=0, atol=1e-10)


@everyone
def test_hutchinson_over_all_probes_is_the_exact_divergence(name: str) -> None:
    field = build(name).double()
    z, k = torch.randn(3, D).double(), torch.tensor([2, 0, 1])
    jacobians = torch.stack([jacobian(field, z[i], 0.6, int(k[i])) for i in range(3)])
    total = torch.zeros(3).double()
    for signs in itertools.product((-1.0, 1.0), repeat=D):
        probe = torch.tensor(signs).double().expand(3, D)
        found = field.divergence(z, 0.6, k, "hutchinson", probe)
        if not name.startswith(("skew", "solenoidal", "helmholtz")):  # whose turning parts give zero each time
            form = torch.einsum("bi,bij,bj->b", probe, jacobians, probe)
            torch.testing.assert_close(found, form, rtol=0, atol=1e-10)
        total = total + found
    torch.testing.assert_close(total / 2**D, field.divergence(z, 0.6, k), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in FIELDS if n.startswith(("skew", "solenoidal"))])
def test_skew_fields_are_divergence_free(name: str) -> None:
    field = build(name).double()
    z = 2 * torch.randn(10, D).double()
    for control in (0, 2, torch.randn(K).double()):
        traces = torch.stack([jacobian(field, x, 1.3, control).trace() for x in z])
        assert traces.abs().max() < 1e-10
        assert field(z, 1.3, control).norm(dim=-1).min() > 1e-3  # it does move
        assert torch.equal(field.divergence(z, 1.3, control), torch.zeros(10).double())


def test_gradient_fields_are_curl_free_and_helmholtz_adds_up() -> None:
    field = build("helmholtz").double()
    z = torch.randn(5, D).double()
    for x in z:
        J = jacobian(field.irrotational, x, 0.4, 1)
        torch.testing.assert_close(J, J.mT, rtol=0, atol=1e-10)
    parts = field.irrotational(z, 0.4, 1) + sum(part(z, 0.4, 1) for part in field.solenoidal)
    torch.testing.assert_close(field(z, 0.4, 1), parts, rtol=0, atol=1e-12)


def test_ridge_functions_carry_no_divergence_whatever_their_weights() -> None:
    field = F.SolenoidalField(D, K, 6, rank=3, time_features=4).double()
    z = torch.randn(5, D).double()
    for _ in range(3):
        with torch.no_grad():
            for p in field.parameters():
                p.copy_(3 * torch.randn_like(p))
        for x in z:
            J = jacobian(field, x, 0.7, 1)
            assert abs(float(J.trace())) < 1e-12 * float(J.abs().sum())


def test_ridge_functions_reach_a_solenoidal_field_that_one_stream_cannot() -> None:
    """J grad h with a constant J has the Jacobian J Hess h; that of an ABC flow is of no such kind."""
    torch.manual_seed(0)
    z = 2 * torch.rand(400, 3) - 1
    x, y, w = z.unbind(-1)
    target = torch.stack([w.sin() + y.cos(), x.sin() + w.cos(), y.sin() + x.cos()], -1)

    def fit(field: Field) -> float:
        optimiser = torch.optim.Adam(field.parameters(), 0.02)
        for _ in range(300):
            optimiser.zero_grad()
            loss = (field(z, 0.0) - target).square().mean()
            loss.backward()
            optimiser.step()
        return float(loss.detach())

    ridges = fit(F.SolenoidalField(3, 1, 32))
    assert ridges < 0.01 * float(target.var())
    assert ridges < 0.1 * fit(F.SkewGradientField(P.MLPPotential(3, hidden=(32, 32)), "learned"))


def test_canonical_pairing_of_an_odd_dimension_rests_the_last_coordinate() -> None:
    h = P.QuadraticPotential(3, S=torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    v = F.SkewGradientField(h, "canonical")(torch.tensor([[1.0, 1.0, 1.0]]), 0.0)
    torch.testing.assert_close(v, torch.tensor([[2.0, -1.0, 0.0]]))


def test_one_dimension_has_no_room_to_turn() -> None:
    field = F.SkewGradientField(P.QuadraticPotential(1, S=torch.eye(1)))
    assert torch.equal(field(torch.ones(2, 1), 0.0), torch.zeros(2, 1))


@everyone
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    field = build(name).to(dtype)
    z = torch.randn(*batch, D, dtype=dtype)
    for control in (2, torch.randint(0, K, batch), torch.rand(*batch, K, dtype=dtype)):
        for t in (0.5, torch.rand(batch, dtype=dtype)):
            v, div = field(z, t, control), field.divergence(z, t, control)
            assert v.shape == z.shape and v.dtype == dtype
            assert div.shape == batch and div.dtype == dtype


@everyone
@pytest.mark.parametrize("k", [[0, 0, 1, 1], [0, 1, 2], [2, 0, 2, 1, 0], [1, 1, 1]])
def test_control_kinds_agree(name: str, k: list[int]) -> None:
    field = build(name).double()
    index, n = torch.tensor(k), len(k)
    z, t = torch.randn(n, D).double(), torch.rand(n).double()
    v, div = field(z, t, index), field.divergence(z, t, index)
    one_hot = torch.nn.functional.one_hot(index, K).double()
    torch.testing.assert_close(v, field(z, t, one_hot), rtol=0, atol=1e-10)
    torch.testing.assert_close(div, field.divergence(z, t, one_hot), rtol=0, atol=1e-10)
    for i in range(n):
        torch.testing.assert_close(v[i], field(z[i], t[i], k[i]), rtol=0, atol=1e-10)
        torch.testing.assert_close(div[i], field.divergence(z[i], t[i], k[i]), rtol=0, atol=1e-10)


@everyone
def test_leading_batch_shapes_agree_with_a_flat_batch(name: str) -> None:
    field = build(name).double()
    z, k = torch.randn(2, 3, D).double(), torch.tensor([[2, 0, 1], [1, 2, 2]])
    torch.testing.assert_close(field(z, 0.3, k).reshape(6, D), field(z.reshape(6, D), 0.3, k.reshape(6)))


@everyone
def test_empty_batch_and_no_grad(name: str) -> None:
    field = build(name)
    for control in (0, torch.zeros(0, dtype=torch.long), torch.zeros(0, K)):
        assert field(torch.zeros(0, D), 0.0, control).shape == (0, D)
        assert field.divergence(torch.zeros(0, D), 0.0, control).shape == (0,)
    z = torch.randn(5, D)
    with torch.no_grad():
        quiet = field(z, 0.2, 1), field.divergence(z, 0.2, 1)
    assert not quiet[0].requires_grad and not quiet[1].requires_grad
    torch.testing.assert_close(quiet[0], field(z, 0.2, 1))
    torch.testing.assert_close(quiet[1], field.divergence(z, 0.2, 1))


@everyone
def test_vmap_and_jacobians_pass_through(name: str) -> None:
    field = build(name).double()
    z = torch.randn(5, D).double()
    torch.testing.assert_close(torch.func.vmap(lambda x: field(x, 0.5, 2))(z), field(z, 0.5, 2))
    J = torch.func.vmap(torch.func.jacrev(lambda x: field(x, 0.5, 2)))(z)
    torch.testing.assert_close(J.diagonal(dim1=-2, dim2=-1).sum(-1), field.divergence(z, 0.5, 2), rtol=0, atol=1e-10)


@everyone
@pytest.mark.parametrize("kind", ["index", "weights"])
def test_every_parameter_gets_a_gradient(name: str, kind: str) -> None:
    field = build(name)
    z = torch.randn(6, D)
    control = torch.arange(6) % K if kind == "index" else torch.rand(6, K)
    (field(z, 0.7, control).square().sum(-1) + field.divergence(z, 0.7, control)).sum().backward()
    for parameter, p in field.named_parameters():
        if parameter.rsplit(".", 1)[-1] in ("b3", "raw_energy"):  # what a potential adds in all of space moves nothing
            continue
        assert p.grad is not None and bool(p.grad.abs().sum() > 0), f"{parameter} got no gradient"


@everyone
def test_evaluations_carry_what_costs_need(name: str) -> None:
    field = build(name).double()
    seen = []
    flow = ff.LatentFlow(field, ff.Solver("euler"))

    def cost(e: ff.fields.Evaluation) -> Tensor:
        seen.append(e)
        return e.velocity.square().sum(-1)

    cost.needs = ("value", "time") if field.has_potential else ()
    z = torch.randn(5, D).double()
    flow(z, [0.0, 1.0], 1, costs={"c": cost})
    e = seen[0]
    torch.testing.assert_close(e.velocity, field(z, 0.0, 1))
    other = torch.randn(5, D).double()
    torch.testing.assert_close(e.velocity_at(other), field(other, 0.0, 1))
    if field.has_potential:
        d = field.potential.derivatives(z, 0.0, 1)
        for got, expected in ((e.value, d.value), (e.gradient, d.gradient), (e.time, d.time)):
            torch.testing.assert_close(got, expected)
    else:
        assert e.value is None and e.gradient is None


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dim must be at least 2"):
        F.SolenoidalField(1)
    with pytest.raises(ValueError, match="hidden must be positive"):
        F.SolenoidalField(2, hidden=0)
    with pytest.raises(ValueError, match="stream 0 has dim 9"):
        F.HelmholtzField(mlp(), F.SolenoidalField(9, K))
    with pytest.raises(TypeError, match="Potential"):
        F.GradientField(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="skew"):
        F.SkewGradientField(mlp(), "twisted")
    with pytest.raises(ValueError, match="skew"):
        F.SkewGradientField(mlp(), torch.eye(D + 1))
    with pytest.raises(ValueError, match="stream"):
        F.HelmholtzField(mlp())
    with pytest.raises(ValueError, match="flows"):
        F.HelmholtzField(mlp(), P.MLPPotential(D, K + 1))
    with pytest.raises(ValueError, match="probe"):
        build("free").divergence(torch.zeros(2, D), 0.0, kind="hutchinson")
    with pytest.raises(ValueError, match="kind"):
        build("free").divergence(torch.zeros(2, D), 0.0, kind="trace")
    with pytest.raises(ValueError, match="velocity"):
        F.from_module(lambda z, t: z[..., :2], D)(torch.zeros(2, D), 0.0)
    with pytest.raises(TypeError, match="tensor"):
        F.from_module(lambda z, t: None, D)(torch.zeros(2, D), 0.0)
    with pytest.raises(NotImplementedError, match="flow_velocity"):
        Field(D)(torch.zeros(2, D), 0.0)
