"""What every potential promises: shapes, controls, dtypes, transforms of torch.func and gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from constructors import DTYPE, POTENTIALS, D, K
from constructors import build as make
from torch import Tensor

import flowfactor as ff
from flowfactor.potentials import Derivatives, Potential

P = ff.potentials
pytestmark = pytest.mark.contract

FIELDS = ("value", "gradient", "time", "laplacian")
everyone = pytest.mark.parametrize("name", POTENTIALS)


def build(name: str) -> Potential:
    return make(POTENTIALS, name)


def close(a: Derivatives, b: Derivatives, pick: Callable[[Tensor], Tensor] = lambda x: x, atol: float = 1e-10) -> None:
    for field in FIELDS:
        torch.testing.assert_close(pick(getattr(a, field)), getattr(b, field), rtol=0, atol=atol)


@everyone
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtypes(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    u = build(name).to(dtype)
    z = torch.randn(*batch, D, dtype=dtype)
    index = torch.randint(0, K, batch)
    for control in (1, index, torch.rand(*batch, K, dtype=dtype)):
        for t in (0.5, torch.rand(batch, dtype=dtype)):
            d = u.derivatives(z, t, control, laplacian="exact")
            assert d.gradient.shape == z.shape and d.gradient.dtype == dtype
            for x in (d.value, d.time, d.laplacian, u(z, t, control)):
                assert x.shape == batch and x.dtype == dtype


@everyone
def test_leading_batch_shapes_agree_with_a_flat_batch(name: str) -> None:
    u = build(name).double()
    z, t, k = torch.randn(2, 3, D).double(), torch.rand(2, 3).double(), torch.tensor([[2, 0, 1], [1, 2, 2]])
    deep = u.derivatives(z, t, k, laplacian="exact")
    flat = u.derivatives(z.reshape(6, D), t.reshape(6), k.reshape(6), laplacian="exact")
    close(deep, flat, lambda x: x.reshape(6, *x.shape[2:]))


@everyone
@pytest.mark.parametrize("k", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 0, 1, 2], [2, 0, 2, 1, 0], [2, 1, 0], [1]])
def test_control_kinds_agree(name: str, k: list[int]) -> None:
    """Index against one-hot weights against one sample at a time: equal, unequal, unordered and missing groups."""
    u = build(name).double()
    n, index = len(k), torch.tensor(k)
    z, t = torch.randn(n, D).double(), torch.rand(n).double() * 3
    by_index = u.derivatives(z, t, index, laplacian="exact")
    one_hot = torch.nn.functional.one_hot(index, K).double()
    close(by_index, u.derivatives(z, t, one_hot, laplacian="exact"))
    for i in range(n):
        close(by_index, u.derivatives(z[i], t[i], k[i], laplacian="exact"), lambda x, i=i: x[i])


@everyone
def test_weights_superpose_and_broadcast(name: str) -> None:
    u = build(name).double()
    z, w = torch.randn(5, D).double(), torch.randn(K).double()
    got = u.derivatives(z, 1.0, w, laplacian="exact")
    parts = [u.derivatives(z, 1.0, k, laplacian="exact") for k in range(K)]
    for field in FIELDS:
        expected = sum(w[k] * getattr(parts[k], field) for k in range(K))
        torch.testing.assert_close(getattr(got, field), expected, rtol=0, atol=1e-10)
    close(got, u.derivatives(z, 1.0, w.expand(5, K), laplacian="exact"))


@everyone
def test_schedules_per_sample_time(name: str) -> None:
    u = build(name).double()
    z, t = torch.randn(4, D).double(), torch.tensor([-1.0, 0.5, 1.0, 7.0]).double()
    schedule = ff.Schedule([(-10.0, 2), (0.0, 0), (1.0, 1)])
    close(u.derivatives(z, t, schedule, laplacian="exact"),
          u.derivatives(z, t, torch.tensor([2, 0, 1, 1]), laplacian="exact"))  # fmt: skip
    mixed = ff.Schedule([(-10.0, 2), (0.0, torch.tensor([0.5, 0.5, 0.0]).double())])
    w = torch.tensor([[0, 0, 1.0], *[[0.5, 0.5, 0.0]] * 3]).double()
    close(u.derivatives(z, t, mixed, laplacian="exact"), u.derivatives(z, t, w, laplacian="exact"))


@everyone
def test_empty_batch(name: str) -> None:
    u = build(name)
    for control in (0, torch.zeros(0, dtype=torch.long), torch.zeros(0, K)):
        d = u.derivatives(torch.zeros(0, D), 0.0, control, laplacian="exact")
        assert d.gradient.shape == (0, D) and d.value.shape == d.time.shape == d.laplacian.shape == (0,)


@everyone
def test_no_grad_gives_the_same_numbers(name: str) -> None:
    u = build(name)
    z, k = torch.randn(5, D), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        quiet = u.derivatives(z, 0.5, k, laplacian="exact")
    assert not any(getattr(quiet, f).requires_grad for f in FIELDS)
    loud = u.derivatives(z, 0.5, k, laplacian="exact")
    close(quiet, loud, atol=1e-6)


@everyone
def test_vmap_and_grad_pass_through(name: str) -> None:
    u = build(name).double()
    z = torch.randn(5, D).double()
    expected = u.derivatives(z, 0.5, 2, laplacian="exact")
    value = torch.func.vmap(lambda x: u(x, 0.5, 2))(z)
    torch.testing.assert_close(value, expected.value, rtol=0, atol=1e-10)
    gradient = torch.func.vmap(torch.func.grad(lambda x: u(x, 0.5, 2)))(z)
    torch.testing.assert_close(gradient, expected.gradient, rtol=0, atol=1e-10)
    laplacian = torch.func.vmap(lambda x: u.derivatives(x, 0.5, 2, laplacian="exact").laplacian)(z)
    torch.testing.assert_close(laplacian, expected.laplacian, rtol=0, atol=1e-10)


@everyone
@pytest.mark.parametrize("kind", ["int", "index", "weights"])
def test_every_parameter_gets_a_gradient(name: str, kind: str) -> None:
    u = build(name)
    z = torch.randn(6, D)
    controls = {"index": torch.arange(6) % K, "weights": torch.rand(6, K)}
    losses = [u.derivatives(z, 0.7, k, laplacian="exact") for k in (range(K) if kind == "int" else [controls[kind]])]
    sum((d.value + d.gradient.square().sum(-1) + d.laplacian).sum() for d in losses).backward()
    for parameter, p in u.named_parameters():
        assert p.grad is not None, f"{parameter} got no gradient"
        rows = p.grad.reshape(K, -1) if p.grad.numel() % K == 0 and p.shape[:1] == (K,) else p.grad.reshape(1, -1)
        assert bool((rows.abs().sum(-1) > 0).all()), f"a flow of {parameter} got no gradient"


@everyone
def test_state_dict_round_trip(name: str) -> None:
    torch.manual_seed(1)
    a = build(name)
    torch.manual_seed(2)
    b = build(name)
    z = torch.randn(3, D)
    assert not torch.allclose(a(z, 0.5, 1), b(z, 0.5, 1))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(z, 0.5, 1), b(z, 0.5, 1))


def test_bad_arguments_are_named() -> None:
    u = build("mlp")
    z = torch.randn(5, D)
    with pytest.raises(TypeError, match="tensor"):
        u([[0.0] * D], 0.0)
    with pytest.raises(ValueError, match=r"\[\*batch, 4\]"):
        u(torch.randn(5, D + 1), 0.0)
    other = torch.float64 if torch.float32 == DTYPE else torch.float32
    with pytest.raises(TypeError, match=f"{other} and the parameters are {DTYPE}"):
        u(z.to(other), 0.0)
    with pytest.raises(TypeError, match="int64"):
        u(z.long(), 0.0)
    with pytest.raises(ValueError, match="one time per sample"):
        u(z, torch.zeros(4))
    with pytest.raises(ValueError, match="laplacian"):
        u.derivatives(z, 0.0, laplacian="trace")
    with pytest.raises(ValueError, match="probe"):
        u.derivatives(z, 0.0, laplacian="hutchinson", probe=torch.ones(5, D + 1))
    with pytest.raises(ValueError, match="0 to 2"):
        u(z, 0.0, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: P.MLPPotential(0), "dim"),
        (lambda: P.MLPPotential(4, 0), "num_flows"),
        (lambda: P.MLPPotential(4, hidden=(3,)), "hidden"),
        (lambda: P.MLPPotential(4, rank=-1), "rank"),
        (lambda: P.MLPPotential(4, time_features=3), "time_features"),
        (lambda: P.MLPPotential(4, time_features=-2), "or 0 for a part without time, got -2"),
        (lambda: P.ConvexPotential(4, time_features=5), "or 0 for a part without time, got 5"),
        (lambda: P.PaperPotential(4, time_features=1), "or 0 for a part without time, got 1"),
        (lambda: P.ResNetPotential(4, time_features=16), "must be 1, .*, or 0 for a part without time, got 16"),
        (lambda: P.DisplacementPotential(4, rest=1, time_features=2), "must be 1, .*, or 0 for a part without time"),
        (lambda: P.MLPPotential(4, activation="relu"), "logcosh"),
        (lambda: P.ConvexPotential(4, rank=0), "rank"),
        (lambda: P.PaperPotential(5), "even"),
        (lambda: P.ResNetPotential(4, depth=0), "depth"),
        (lambda: P.ResNetPotential(4, time_scale=0.0), "time_scale"),
        (lambda: P.QuadraticPotential(2, S=torch.eye(3)), r"\[1, 2, 2\]"),
        (lambda: P.QuadraticPotential(2, b=torch.zeros(3)), "b must"),
        (lambda: P.from_module([], 3), "at least one"),
    ],
)
def test_bad_constructions_are_named(make: Callable[[], Potential], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_user_potentials_that_misbehave_are_named() -> None:
    z = torch.randn(5, D)
    with pytest.raises(ValueError, match="squeeze"):
        P.from_module(lambda z, t: z[..., :1], D)(z, 0.0)
    with pytest.raises(TypeError, match="float"):
        P.from_module(lambda z, t: 1.0, D)(z, 0.0)
    with pytest.raises(TypeError, match="cannot be called"):
        P.from_module([3], D)
    with pytest.raises(TypeError, match="from_module"):
        P.from_module(3, D)
    with pytest.raises(NotImplementedError, match="flow_potential"):
        Potential(D)(z, 0.0)
