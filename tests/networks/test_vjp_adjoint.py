"""A closed form that a user writes by two functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flowfactor as ff
from flowfactor import registry

FILE = Path(__file__).parents[1] / "extending" / "user_closed_form.py"


@pytest.fixture(scope="module")
def spring() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("user_closed_form", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where pickle looks for its classes
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    registry._KNOWN["potential"].pop("spring")


CONTROLS = {
    "one flow": 1,
    "a flow each": torch.arange(7) % 3,
    "weights": torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(7, 3),
}


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("control", CONTROLS)
def test_a_solve_by_it_is_that_of_the_general_engine(spring: Any, control: str, method: str, gradient: Any) -> None:
    potential = spring.Spring(4, 3).double()
    start = torch.randn(7, 4, dtype=torch.float64)
    costs = {"hj": ff.regularizers.HamiltonJacobi(), "action": ff.regularizers.TransportCost()}
    tight = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"step_size": 0.25}
    found = []
    for engine in ("closed form", "general"):
        flow = ff.LatentFlow(potential, ff.Solver(method, gradient=gradient, engine=engine, **tight))
        z0 = start.clone().requires_grad_()
        path = flow(z0, [0.0, 0.6, 1.0], CONTROLS[control], log_det=True, costs=costs)
        assert path.stats.engine == engine and path.log_det is not None
        rates = torch.stack([path.costs["hj"], path.costs["action"]])
        loss = path.z.sin().sum() + (path.log_det * path.log_det).sum() + rates.square().sum()
        found.append([path.z, path.log_det, rates, *torch.autograd.grad(loss, [z0, potential.centre])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_wrong_product_gives_wrong_gradients(spring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison above rests on: the products of the file are what gradients come from."""
    right = spring.vjp
    monkeypatch.setattr(spring, "vjp", lambda *args: (2 * right(*args)[0], right(*args)[1]))
    with pytest.raises(AssertionError):
        test_a_solve_by_it_is_that_of_the_general_engine(spring, "a flow each", "rk4", "direct")


def test_a_closed_form_of_the_gradient_alone_is_not_used_with_j(spring: Any) -> None:
    field = ff.fields.SkewGradientField(spring.Spring(4, 1))
    stats = ff.LatentFlow(field, ff.Solver("rk4"))(torch.randn(5, 4), [0.0, 1.0]).stats
    assert stats.engine == "general" and "Spring is of its gradient alone" in stats.reason


def test_a_result_that_is_missing_is_named(spring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spring.evaluate
    monkeypatch.setattr(spring, "evaluate", lambda *args: {"velocity": whole(*args)["velocity"]})
    flow = ff.LatentFlow(spring.Spring(4, 1), ff.Solver("dopri5"))
    with pytest.raises(ValueError, match="gives velocity, and the solve wants 'divergence'"):
        flow(torch.randn(5, 4), [0.0, 1.0], log_det=True)


def test_it_keeps_the_promises_of_a_potential(spring: Any) -> None:
    ff.testing.check_potential(spring.Spring(4, 3))
