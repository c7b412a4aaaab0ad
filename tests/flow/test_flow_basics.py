"""The flow against the matrix exponential, in every gradient mode."""

from __future__ import annotations

import pytest
import torch

import flowfactor as ff

TIMES = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)


def _flow(method: str = "dopri5", gradient: str = "direct", **settings) -> ff.LatentFlow:
    generator = torch.Generator().manual_seed(1)
    S = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64) / 4
    b = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    settings = settings or {"rtol": 1e-11, "atol": 1e-11}
    return ff.LatentFlow(ff.potentials.QuadraticPotential(4, 3, S, b), ff.Solver(method, gradient=gradient, **settings))


def _exact(S: torch.Tensor, b: torch.Tensor, z0: torch.Tensor, time: float) -> torch.Tensor:
    generator = torch.zeros(5, 5, dtype=torch.float64)
    generator[:4, :4], generator[:4, 4] = S, b
    power = torch.linalg.matrix_exp(generator * time)
    return power[:4, :4] @ z0 + power[:4, 4]


@pytest.mark.parametrize("kind", ["index", "weights"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_flow_is_the_matrix_exponential(method: str, kind: str) -> None:
    flow = _flow(method)
    u = flow.field.potential
    z0 = torch.randn(5, 4, dtype=torch.float64)
    k = torch.tensor([2, 0, 1, 1, 0])
    w = torch.nn.functional.one_hot(k, 3).double() if kind == "index" else torch.randn(5, 3, dtype=torch.float64)
    S, b = torch.einsum("nk,kij->nij", w, u.S), w @ u.b
    path = flow(z0, TIMES, k if kind == "index" else w, log_det=True)
    exact = torch.stack([torch.stack([_exact(S[i], b[i], z0[i], float(t)) for i in range(5)]) for t in TIMES])
    torch.testing.assert_close(path.z, exact, atol=1e-8, rtol=1e-8)
    traces = torch.diagonal(S, dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(path.log_det, TIMES.unsqueeze(-1) * traces, atol=1e-8, rtol=1e-8)
    back = flow.inverse(path.z[-1], TIMES, k if kind == "index" else w, log_det=True)
    torch.testing.assert_close(back.z[-1], z0, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(back.log_det[-1], -path.log_det[-1], atol=1e-8, rtol=1e-8)


def test_schedule_lands_on_its_switches() -> None:
    flow = _flow()
    z0 = torch.randn(5, 4, dtype=torch.float64)
    path = flow(z0, TIMES, ff.Schedule([(0.0, 0), (0.7, 2)]))
    first = flow(z0, [0.0, 0.7], 0).z[-1]
    torch.testing.assert_close(path.z[-1], flow(first, [0.7, 2.0], 2).z[-1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_gradients_agree_with_direct(method: str, gradient: str) -> None:
    settings = {"step_size": 0.02} if method == "rk4" else {"rtol": 1e-10, "atol": 1e-10}
    found = {}
    start = torch.randn(5, 4, dtype=torch.float64)
    for mode in ("direct", gradient):
        flow = _flow(method, mode, **settings)
        context = torch.ones(4, dtype=torch.float64, requires_grad=True)
        z0 = start.clone().requires_grad_()
        scaled = context * 2  # captured, and not a leaf
        path = flow(
            z0, TIMES, 1, log_det=True, costs={"pull": lambda e, scaled=scaled: (e.z * scaled).square().sum(-1)}
        )
        (path.z[-1].sin().sum() + path.log_det[-1].sum() + path.costs["pull"][-1].sum()).backward()
        found[mode] = (z0.grad, context.grad, flow.field.potential.matrix.grad)
    for a, b in zip(found["direct"], found[gradient], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("t", "word"),
    [([0.0, 0.0], "repeats"), ([0.0, 2.0, 1.0], "strictly"), ([0.0, float("nan")], "NaN"), (1.0, "list of times")],
)
def test_bad_times(t: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        _flow()(torch.zeros(2, 4, dtype=torch.float64), t)


def test_bad_fields_are_diagnosed() -> None:
    z0 = torch.ones(3, 2)
    bad = ff.fields.from_module(lambda z, t: torch.where(t.unsqueeze(-1) > 0.5, z * float("nan"), z), 2)
    with pytest.raises(ff.FlowSolveError) as caught:
        ff.LatentFlow(bad)(z0, [0.0, 1.0])
    assert caught.value.reason == "nan" and caught.value.sample == (0,)
    square = ff.fields.from_module(lambda z, t: z.square(), 2)
    with pytest.raises(ff.FlowSolveError) as caught:
        ff.LatentFlow(square)(z0, [0.0, 2.0])
    assert caught.value.reason == "blowup"
    assert ff.LatentFlow(square)(z0[:0], [0.0, 2.0]).z.shape == (2, 0, 2)


def test_a_path_of_one_time_has_zeros_of_its_own_for_everything() -> None:
    z0 = torch.full((2, 4), 1e308, dtype=torch.float64)  # whose sum overflows
    cost = ff.regularizers.TransportCost()
    path = _flow()(z0, [0.5], log_det=True, costs={"a": cost, "b": cost})
    assert path.log_det is not None
    path.costs["a"].add_(1.0)
    assert torch.equal(path.log_det, torch.zeros(1, 2).double()) and torch.equal(path.costs["b"], path.log_det)
