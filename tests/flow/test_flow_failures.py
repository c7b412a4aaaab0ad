"""Solves that cannot succeed say why, when and for which sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flowfactor as ff

Velocity = Callable[[Tensor, Tensor], Tensor]
ANY = [
    ff.Solver(),
    ff.Solver("dopri8"),
    ff.Solver("rk4", step_size=0.05),
    ff.Solver("implicit_adams", step_size=0.05),
    ff.Solver(gradient="checkpoint"),
    ff.Solver(gradient="adjoint"),
    ff.Solver("scipy_solver", gradient="adjoint"),
    ff.Solver("scipy_solver", options={"solver": "RK45"}, gradient="adjoint"),
    ff.Solver("scipy_solver", options={"solver": "BDF"}, gradient="adjoint"),
]
every_solver = pytest.mark.parametrize(
    "solver", ANY, ids=lambda s: f"{s.method}-{s.gradient}-{s.options.get('solver')}"
)
quiet = pytest.mark.filterwarnings("ignore:Functional iteration did not converge")


def fail(v: Velocity, solver: ff.Solver, t: list[float], z0: Tensor | None = None) -> ff.FlowSolveError:
    flow = ff.LatentFlow(ff.fields.from_module(v, 2), solver)
    with pytest.raises(ff.FlowSolveError) as caught:
        flow(torch.ones(3, 2, dtype=torch.float64) if z0 is None else z0, t)
    return caught.value


def mark(z: Tensor, value: float) -> Tensor:
    """``value`` in the second sample, zero elsewhere."""
    out = torch.zeros_like(z)
    out[1] = value
    return out


@quiet
@every_solver
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_from_the_start(solver: ff.Solver, value: float) -> None:
    error = fail(lambda z, t: mark(z, value) - z, solver, [0.0, 1.0])
    assert (error.reason, error.time, error.step, error.sample) == ("nan", 0.0, 0, (1,))
    assert "sample 1" in str(error) and "NaN or infinity" in str(error)


@quiet
@every_solver
@pytest.mark.parametrize("backward", [False, True])
def test_bad_values_later(solver: ff.Solver, backward: bool) -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        late = (t < 0.5 if backward else t > 0.5).unsqueeze(-1)
        return torch.where(late & (torch.arange(len(z)) == 1).unsqueeze(-1), torch.nan, -0.5 * z)

    error = fail(v, solver, [1.0, 0.0] if backward else [0.0, 1.0])
    assert error.reason == "nan" and error.sample == (1,)
    assert 0.0 < error.time < 1.0 and (solver.method == "scipy_solver" or error.step > 0)  # the last good time


@quiet
@every_solver
def test_blow_up(solver: ff.Solver) -> None:
    z0 = torch.tensor([[0.1, 0.1], [0.2, 0.1], [2.0, 0.1]], dtype=torch.float64)
    error = fail(lambda z, t: z**2, solver, [0.0, 2.0], z0)
    assert error.reason == "blowup" and error.sample == (2,)
    assert error.time == pytest.approx(0.5, abs=0.25 if not solver.adaptive else 0.01)
    assert "infinity" in str(error)


@quiet
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4", "implicit_adams"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["decay", "turn", "cubic"])
def test_fixed_steps_too_long_for_a_stiff_field(method: str, backward: bool, kind: str) -> None:
    sign = -1.0 if backward else 1.0
    fields: dict[str, Velocity] = {
        "decay": lambda z, t: -1000 * sign * z,
        "turn": lambda z, t: 1000 * torch.stack([-z[..., 1], z[..., 0]], -1),
        "cubic": lambda z, t: -sign * 100 * z**3,
    }
    error = fail(fields[kind], ff.Solver(method, step_size=0.1), [20.0, 0.0] if backward else [0.0, 20.0])
    assert error.reason == "stiff" and error.sample is not None
    assert "step_size below" in str(error)


def test_fixed_steps_along_a_field_that_does_run_off() -> None:
    error = fail(lambda z, t: 100 * z, ff.Solver("rk4", step_size=0.1), [0.0, 50.0])
    assert error.reason == "blowup"


def test_stiff() -> None:
    rate = torch.tensor([1.0, 1.0, 1e6], dtype=torch.float64).unsqueeze(-1)
    error = fail(lambda z, t: -rate * (z - torch.cos(t).unsqueeze(-1)), ff.Solver(max_steps=2000), [0.0, 5.0])
    assert error.reason == "stiff" and error.sample == (2,) and error.step > 0
    assert 0 < error.time < 5 and "BDF" in str(error)


@pytest.mark.parametrize("solver", [ff.Solver(max_steps=50), ff.Solver("scipy_solver", gradient="adjoint", max_steps=50),
                                    ff.Solver(max_steps=50, gradient="checkpoint")])  # fmt: skip
def test_step_limit(solver: ff.Solver) -> None:
    error = fail(lambda z, t: 0.1 * z + torch.sin(1e3 * t).unsqueeze(-1), solver, [0.0, 10.0])
    assert error.reason == "steps" and "max_steps=50" in str(error) and error.time < 10


def test_step_limit_of_fixed_steps_is_seen_before_the_first() -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("asked")

    error = fail(v, ff.Solver("rk4", step_size=1e-3, max_steps=100), [0.0, 10.0])
    assert error.reason == "steps" and error.step == 0 and "10000" in str(error)


def test_the_limit_holds_over_output_times() -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        return torch.sin(30 * t).unsqueeze(-1) + 0 * z

    times = [0.1 * i for i in range(100)]
    assert fail(v, ff.Solver("dopri8", max_steps=60), times).reason == "steps"


def test_the_way_back_has_a_limit_too() -> None:
    """Forward decays, backward of the adjoint explodes in steps."""
    flow = ff.LatentFlow(
        ff.fields.from_module(lambda z, t: -200.0 * z, 2), ff.Solver(gradient="adjoint", max_steps=150)
    )
    z0 = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    path = flow(z0, [0.0, 1.0])
    with pytest.raises(ff.FlowSolveError, match="backwards in time beyond") as caught:
        path.z[-1].sum().backward()
    assert caught.value.reason in ("steps", "underflow")


@every_solver
def test_a_users_own_assertion_passes_through(solver: ff.Solver) -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        assert float(t) < 0.25, "my own complaint"
        return -z

    with pytest.raises(AssertionError, match="my own complaint"):
        ff.LatentFlow(ff.fields.from_module(lambda z, t: v(z, t[0]), 2), solver)(torch.ones(3, 2).double(), [0.0, 1.0])


@every_solver
def test_a_wrong_shape_is_named(solver: ff.Solver) -> None:
    flow = ff.LatentFlow(ff.fields.from_module(lambda z, t: z[..., :1], 2), solver)
    with pytest.raises(ValueError, match=r"velocity of the state's shape \[3, 2\], got \[3, 1\]"):
        flow(torch.ones(3, 2), [0.0, 1.0])


def test_samples_of_deep_batches_are_named_by_their_whole_index() -> None:
    def v(z: Tensor, t: Tensor) -> Tensor:
        out = -z.clone()
        out[1, 2] = torch.nan
        return out

    error = fail(v, ff.Solver(), [0.0, 1.0], torch.ones(2, 3, 2))
    assert error.sample == (1, 2) and "[1, 2]" in str(error)


def test_a_failed_flow_can_be_used_again() -> None:
    limit = [0.0]

    def v(z: Tensor, t: Tensor) -> Tensor:
        return torch.where((t > limit[0]).unsqueeze(-1), torch.nan, -z)

    flow = ff.LatentFlow(ff.fields.from_module(v, 2))
    with pytest.raises(ff.FlowSolveError):
        flow(torch.ones(1, 2), [0.0, 1.0])
    limit[0] = 10.0
    torch.testing.assert_close(
        flow(torch.ones(1, 2), [0.0, 1.0]).z[-1], torch.full((1, 2), 0.367879), rtol=0, atol=1e-4
    )
