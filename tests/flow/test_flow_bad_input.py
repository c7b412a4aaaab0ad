"""Bad input is refused before any work, by an error that says what was expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowfactor as ff

NAN, INF = math.nan, math.inf


def flow() -> ff.LatentFlow:
    def v(z: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("the field was asked before its input was checked")

    return ff.LatentFlow(ff.fields.from_module([v, v, v], 2))


def z(n: int = 4) -> Tensor:
    return torch.ones(n, 2)


@pytest.mark.parametrize(
    ("state", "error", "match"),
    [
        (torch.ones(4, 3), ValueError, r"\[\*batch, 2\], got \[4, 3\]"),
        (torch.tensor(1.0), ValueError, r"\[\*batch, 2\]"),
        (torch.ones(4, 2, dtype=torch.long), TypeError, r"floating-point.*float\(\)"),
        (torch.ones(4, 2, dtype=torch.complex64), TypeError, "floating-point"),
        ([[1.0, 2.0]], TypeError, "got list"),
        (torch.tensor([[1.0, 1.0], [NAN, 1.0]]), ValueError, r"NaN or infinity, first in sample \[1\]"),
        (torch.tensor([[1.0, INF]]), ValueError, "NaN or infinity"),
    ],
)
def test_states(state: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        flow()(state, [0.0, 1.0])
    with pytest.raises(error, match=match):
        flow().inverse(state, [0.0, 1.0])


def test_state_of_another_dtype_than_the_parameters() -> None:
    with pytest.raises(TypeError, match=r"float64.*float32"):
        ff.LatentFlow(ff.potentials.MLPPotential(2))(z().double(), [0.0, 1.0])


@pytest.mark.parametrize(
    ("t", "error", "match"),
    [
        (1.0, ValueError, "list of times"),
        (torch.tensor(1.0), ValueError, "list of times"),
        ([], ValueError, "list of times"),
        ([[0.0, 1.0]], ValueError, r"here \[T, 4\]; got \[1, 2\]"),
        (torch.tensor([[0.0], [1.0], [0.5]]), ValueError, r"those of sample \[0\] do not"),
        (torch.full((2, 4), NAN), ValueError, "NaN or infinity"),
        ([0.0, 0.0], ValueError, "repeats"),
        ([0.0, 1.0, 1.0], ValueError, "repeats"),
        ([0.0, 2.0, 1.0], ValueError, "strictly"),
        ([0.0, 1.0, 1.0 + 1e-12], ValueError, "strictly"),  # one time, as the solver sees it in float32
        ([0.0, NAN], ValueError, "NaN"),
        ([0.0, INF], ValueError, "NaN or infinity"),
        ("soon", TypeError, "real numbers"),
        ([0.0, None], TypeError, "real numbers"),
        (torch.tensor([True, False]), TypeError, "bool"),
        (torch.tensor([0j, 1j]), TypeError, "complex"),
    ],
)
def test_times(t: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        flow()(z(), t)
    with pytest.raises(error, match=match):
        flow().inverse(z(), t)


@pytest.mark.parametrize(
    ("control", "error", "match"),
    [
        (3, ValueError, "flow 3 does not exist: with 3 flows an index runs from 0 to 2"),
        (-1, ValueError, "flow -1"),
        (1.0, TypeError, "float"),
        (np.float64(1.0), TypeError, "float64"),
        (True, TypeError, "bool"),
        (None, TypeError, "NoneType"),
        ([0, 1, 2, 0], TypeError, "list"),
        ("first", TypeError, "str"),
        (torch.tensor([0, 1, 2, 3]), ValueError, "holds 0 to 3"),
        (torch.tensor([0, -1, 2, 1]), ValueError, "holds -1 to 2"),
        (torch.tensor([0, 1, 2]), ValueError, r"\[3\] does not fit a batch that needs \[4\]"),
        (torch.tensor([True, False, True, True]), TypeError, "bool"),
        (torch.tensor([0j] * 4), TypeError, "complex"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), ValueError, r"\[\*batch, 3\]; got shape \[4\]"),
        (torch.ones(4, 2), ValueError, r"\[\*batch, 3\]"),
        (torch.tensor(1.0), ValueError, r"\[\*batch, 3\]"),
        (torch.ones(5, 3), ValueError, "does not fit"),
        (torch.ones(4, 3, dtype=torch.float64), TypeError, "float64.*float32"),
        (torch.full((4, 3), NAN), ValueError, "finite"),
        (torch.full((4, 3), INF), ValueError, "finite"),
        (ff.Schedule([(0.5, 1)]), ValueError, r"starts at t=0.5 and says nothing about t=0.*-math.inf"),
        (ff.Schedule([(0.0, 1), (0.5, 7)]), ValueError, "flow 7"),
        (ff.Schedule([(0.0, 1), (0.5, torch.ones(4, 2))]), ValueError, r"\[\*batch, 3\]"),
    ],
)
def test_controls(control: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        flow()(z(), [0.0, 1.0], control)
    with pytest.raises(error, match=match):
        flow().velocity(z(), 0.0, control) if not isinstance(control, ff.Schedule) else flow()(z(), [1.0, 0.0], control)


@pytest.mark.parametrize(
    ("pieces", "error", "match"),
    [
        ([], ValueError, "at least one piece"),
        ([(0.0, 0), (0.0, 1)], ValueError, "increase strictly"),
        ([(1.0, 0), (0.0, 1)], ValueError, "increase strictly"),
        ([(NAN, 0)], ValueError, "increase strictly"),
        ([0, 1], TypeError, "pair"),
        ([(0.0, 0, 1)], TypeError, "pair"),
        ([(0.0, ff.Schedule([(0.0, 0)]))], TypeError, "itself a Schedule"),
    ],
)
def test_schedules(pieces: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ff.Schedule(pieces)


def test_schedules_cut_both_ways() -> None:
    s = ff.Schedule([(-INF, 0), (1.0, 1), (2.0, 2)])
    assert s.segments(0.5, 2.5) == [(0.5, 1.0, 0), (1.0, 2.0, 1), (2.0, 2.5, 2)]
    assert s.segments(2.5, 0.5) == [(2.5, 2.0, 2), (2.0, 1.0, 1), (1.0, 0.5, 0)]
    assert s.segments(1.0, 2.0) == [(1.0, 2.0, 1)] and s.segments(2.0, 1.0) == [(2.0, 1.0, 1)]
    assert s.at(1.0) == 1 and s.at(-1e9) == 0 and "Schedule([" in repr(s)


def test_integers_of_every_kind_are_indices() -> None:
    f = ff.LatentFlow(ff.potentials.QuadraticPotential(2, 3))
    expected = f(z(), [0.0, 1.0], 2).z
    for k in (
        np.int64(2),
        torch.tensor(2),
        torch.tensor(2, dtype=torch.int32),
        torch.tensor([2] * 4, dtype=torch.uint8),
    ):
        torch.testing.assert_close(f(z(), [0.0, 1.0], k).z, expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "dopri6"}, "dopri5"),
        ({"gradient": "reverse"}, "checkpoint"),
        ({"norm": "max"}, "sample"),
        ({"rtol": -1.0}, "rtol"),
        ({"atol": NAN}, "atol"),
        ({"rtol": INF}, "rtol"),
        ({"rtol": "1e-3"}, "rtol"),
        ({"rtol": 0.0, "atol": 0.0}, "both be 0"),
        ({"step_size": 0.1}, "dopri5 chooses its steps"),
        ({"method": "fixed_adams", "gradient": "checkpoint"}, "replays single steps"),
        ({"method": "rk4", "options": {"step_size": 0.1}}, r"give Solver\(step_size="),
        ({"method": "rk4", "options": {"grid_constructor": None}}, r"give Solver\(step_size="),
        ({"method": "scipy_solver", "step_size": 0.1}, "scipy_solver chooses its steps"),
        ({"method": "rk4", "step_size": 0.0}, "step_size"),
        ({"method": "rk4", "step_size": -1.0}, "step_size"),
        ({"method": "rk4", "step_size": NAN}, "step_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"max_steps": True}, "max_steps"),
    ],
)
def test_solver_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ff.Solver(**settings)


def test_constructions() -> None:
    with pytest.raises(TypeError, match=r"from_module"):
        ff.LatentFlow(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r'Solver\("dopri5"\)'):
        ff.LatentFlow(ff.potentials.QuadraticPotential(2), "dopri5")
    with pytest.raises(ValueError, match="hutchinson"):
        ff.LatentFlow(ff.potentials.QuadraticPotential(2), divergence="trace")


@pytest.mark.parametrize("method", ["dopri5", "rk4", "scipy_solver"])
@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 3)])
def test_empty_batches_are_no_error(method: str, batch: tuple[int, ...]) -> None:
    f = ff.LatentFlow(ff.potentials.MLPPotential(2, 3), ff.Solver(method))
    for control in (1, torch.zeros(batch, dtype=torch.long), torch.zeros(*batch, 3)):
        path = f(torch.zeros(*batch, 2), [0.0, 1.0], control, log_det=True, costs={"c": lambda e: e.z.sum(-1)})
        assert path.z.shape == (2, *batch, 2) and path.log_det.shape == path.costs["c"].shape == (2, *batch)
    with pytest.raises(ValueError, match="flow 9"):
        f(torch.zeros(*batch, 2), [0.0, 1.0], 9)


def test_vmap_below_other_transforms_is_refused() -> None:
    f = ff.LatentFlow(ff.potentials.MLPPotential(2), ff.Solver("rk4"))

    def total(z: Tensor) -> Tensor:
        return f(z, [0.0, 1.0]).z[-1].sum()

    with pytest.raises(ValueError, match="hand over states"):
        torch.vmap(torch.func.grad(total))(z())
    assert torch.func.grad(total)(z()).shape == (4, 2)
    assert torch.func.jacfwd(total)(z(1)).shape == (1, 2)  # batches the tangents alone


@pytest.mark.parametrize("times", [[1e6, 1e6 + 0.5, 1e6 + 1], [1e6, 1e6 + 1], [-2e5, -2e5 + 1]])
def test_times_too_far_from_0_for_the_states_precision_are_refused(times: list[float]) -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(2).double())
    with pytest.raises(ValueError, match="count them from the start"):
        ff.LatentFlow(ff.potentials.MLPPotential(2))(torch.zeros(3, 2), times)
    assert flow(torch.zeros(3, 2).double(), times).z.shape[0] == len(times)
