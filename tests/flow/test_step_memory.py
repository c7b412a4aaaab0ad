"""Solves that begin with the step that the one before them found best."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff

D = 4
SOLVER = ff.Solver("bosh3", rtol=1e-4, atol=1e-4, remember_steps=True)


def flow(engine: Any = "auto", **how: Any) -> ff.LatentFlow:
    u = ff.potentials.MLPPotential(D, 1, (9, 7), init_scale=0.3, generator=torch.Generator().manual_seed(1)).double()
    return ff.LatentFlow(u, replace(SOLVER, engine=engine, **how))


def states(seed: int) -> Tensor:
    return torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("engine", ["closed form", "general"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_later_solves_take_fewer_evaluations(method: str, engine: Any, gradient: Any) -> None:
    one = flow(engine, method=method, gradient=gradient)
    first = one(states(0), [0.0, 2.0], log_det=True)
    again = one(states(0), [0.0, 2.0], log_det=True)
    assert again.stats.nfe < first.stats.nfe
    torch.testing.assert_close(again.z, first.z, rtol=0, atol=1e-3)
    torch.testing.assert_close(again.log_det, first.log_det, rtol=0, atol=1e-3)
    assert not again.z.equal(first.z)


@pytest.mark.parametrize("engine", ["closed form", "general"])
def test_each_direction_has_a_memory_of_its_own(engine: Any) -> None:
    one = flow(engine)
    fresh = one.inverse(states(0), [0.0, 2.0]).stats.nfe
    assert one.step_memory is not None
    forward, back = one.step_memory.sizes.tolist()
    assert forward == 0 < back
    one(states(0), [0.0, 2.0])
    assert one.step_memory.sizes[0] > 0
    assert one.step_memory.sizes[1] == back
    assert one.inverse(states(0), [0.0, 2.0]).stats.nfe < fresh


def test_nothing_is_remembered_or_used_while_evaluating() -> None:
    one = flow().eval()
    fresh = one(states(0), [0.0, 2.0])
    assert one.step_memory is not None
    assert not one.step_memory.sizes.any()
    one.train()(states(0), [0.0, 2.0])
    kept = one.step_memory.sizes.clone()
    again = one.eval()(states(0), [0.0, 2.0])
    assert torch.equal(again.z, fresh.z)
    assert again.stats == fresh.stats
    assert torch.equal(one.step_memory.sizes, kept)


def test_the_state_goes_on_where_it_was() -> None:
    one = flow()
    one(states(0), [0.0, 2.0])
    other = flow()
    other.load_state_dict(deepcopy(one.state_dict()))
    assert torch.equal(other(states(1), [0.0, 2.0]).z, one(states(1), [0.0, 2.0]).z)


def test_only_the_option_has_a_state_and_weights_without_one_fit() -> None:
    plain = flow(remember_steps=False)
    assert not any("memory" in name for name in plain.state_dict())
    one = flow()
    one(states(0), [0.0, 2.0])
    one.load_state_dict(plain.state_dict())
    assert one.step_memory is not None
    assert not one.step_memory.sizes.any()
    plain.solver = SOLVER  # a solver that comes later
    first, again = (plain(states(0), [0.0, 2.0]).stats.nfe for _ in range(2))
    assert again < first


@pytest.mark.parametrize("engine", ["closed form", "general"])
def test_a_memory_that_misleads_is_forgotten(engine: Any) -> None:
    one = flow(engine)
    fresh = one(states(0), [0.5, 2.0])
    assert one.step_memory is not None
    one.step_memory.sizes[0] = 1e-30  # a step below the clock's resolution
    one.step_memory.costs[0] = 0.0
    again = one(states(0), [0.5, 2.0])
    assert torch.equal(again.z, fresh.z)
    assert again.stats.engine == engine


def test_times_of_each_sample_and_schedules_remember_too() -> None:
    t = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cumsum(0)
    for times, control in ((t, 0), ([0.0, 1.0, 2.0], ff.Schedule([(0.0, 0), (0.9, 0)]))):
        one = flow()
        first, again = one(states(0), times, control), one(states(0), times, control)
        assert again.stats.nfe < first.stats.nfe
        torch.testing.assert_close(again.z, first.z, rtol=0, atol=1e-3)


def lengths(one: ff.LatentFlow, times: list[float], seed: int = 0) -> tuple[ff.FlowPath, list[float]]:
    """A path, and the lengths of the steps that its solve took."""
    path, memory = one(states(seed), times), one.step_memory
    assert memory is not None
    which = int(times[-1] < times[0])
    return path, memory.ends[which, : path.stats.accepted + 1].diff().tolist()


@pytest.mark.parametrize("times", [[0.0, 1.0, 3.0], [3.0, 0.5]])
@pytest.mark.parametrize(("method", "stages"), [("bosh3", 3), ("dopri5", 6)])
def test_a_whole_sequence_is_remembered(method: str, stages: int, times: list[float]) -> None:
    """The next solve takes as few steps as can all be accurate, of one share of the error each, and none in vain."""
    one = flow(method=method, rtol=1e-6, atol=1e-6)
    first, _ = lengths(one, times)
    again, steps = lengths(one, times)
    assert again.stats.rejected == 0 and again.stats.nfe == 1 + stages * again.stats.accepted
    assert again.stats.nfe < first.stats.nfe
    assert sum(steps) == pytest.approx(times[-1] - times[0], abs=1e-5)
    costs = one.step_memory.costs[int(times[-1] < times[0]), : len(steps)]  # type: ignore[union-attr]
    assert bool((costs <= (1 / 0.9) ** (1 / 3)).all())  # no error above the tolerance
    assert float(costs.min()) > 0.7 * float(costs.max())
    assert all(lengths(one, times)[0].stats.nfe < first.stats.nfe for _ in range(4))
    accurate = flow(method="dopri5", rtol=1e-10, atol=1e-10, remember_steps=False)(states(0), times)
    torch.testing.assert_close(again.z, accurate.z, rtol=0, atol=1e-5)


def test_a_part_of_a_remembered_time_has_its_part_of_the_steps() -> None:
    one = flow()
    for _ in range(2):
        lengths(one, [0.0, 4.0])
    memory = deepcopy(one.step_memory)
    assert memory is not None
    assert sum(memory.planned(1.0, 3.0)[:-1]) < 2.0
    assert 0 < len(memory.planned(1.0, 3.0)) < len(memory.planned(0.0, 4.0))
    assert memory.planned(0.0, 4.5) == memory.planned(-0.5, 3.0) == memory.planned(4.0, 0.0) == []
    assert lengths(one, [1.0, 3.0])[0].stats.nfe == 1 + 3 * len(memory.planned(1.0, 3.0))


def test_a_planned_step_that_fails_hands_over_to_the_control() -> None:
    one, fresh = flow(), flow(remember_steps=False)
    lengths(one, [0.0, 2.0])
    memory = one.step_memory
    assert memory is not None
    memory.costs[0] = 0.0
    memory.costs[0, 0], memory.ends[0, :2] = 0.5, torch.tensor([0.0, 2.0])  # says that one step is enough
    path, steps = lengths(one, [0.0, 2.0])
    assert path.stats.rejected > 0 and len(steps) > 1
    torch.testing.assert_close(path.z, fresh(states(0), [0.0, 2.0]).z, rtol=0, atol=1e-3)


def test_planned_steps_that_cannot_end_within_the_limit_are_forgotten() -> None:
    one = flow(max_steps=20)
    fresh = one(states(0), [0.0, 2.0])
    memory = one.step_memory
    assert memory is not None
    memory.sizes[0] = 0.0
    memory.costs[0] = 0.0
    memory.costs[0, 0], memory.ends[0, :2] = 60.0, torch.tensor([0.0, 2.0])
    again = one(states(0), [0.0, 2.0])
    assert torch.equal(again.z, fresh.z) and again.stats.engine == "closed form"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"method": "rk4"}, "remember_steps=True goes with dopri5.*got method='rk4'"),
        ({"method": "scipy_solver", "engine": "general"}, "got method='scipy_solver'"),
        ({"options": {"first_step": 0.1}, "engine": "general"}, "leave first_step out"),
        ({"remember_steps": 1}, "True or False"),
    ],
)
def test_what_cannot_remember_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SOLVER, **how)
