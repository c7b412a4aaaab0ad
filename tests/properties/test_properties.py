"""Drawn cases against the plain reference of `benchmarks.properties`, and that it notices a broken engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from benchmarks import properties
from flowfactor.networks.batching import Layout
from flowfactor.solve.clock import Clock
from flowfactor.solve.problem import Packing

CASE = properties.Case(
    "mlp", torch.float64, 2, 3, (4,), [0.0, 0.3, 0.5], "list", "none", "index", "dopri5", "direct", "auto", "exact",
    ["own"], False, 1
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_drawn_cases(seed: int) -> None:
    assert sum(properties.run(15, seed).values()) == 8 * 15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 104))
def test_more_drawn_cases(seed: int) -> None:
    properties.run(50, seed)


@pytest.mark.parametrize(("engine", "control"), [("auto", "int"), ("general", "index")])
def test_a_sample_mistaken_for_another_is_noticed(engine: str, control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, gather = replace(CASE, engine=engine, control=control, costs=[]), Layout.gather
    assert properties.check(case) == ("general" if engine == "general" else "closed form")

    def rolled(self: Layout, chunks: Any, event_ndim: int) -> Tensor:
        return gather(self, chunks, event_ndim).roll(1, -1 - event_ndim)

    monkeypatch.setattr(Layout, "gather", rolled)
    with pytest.raises(AssertionError, match="is wrong by"):
        properties.check(case)


def test_a_dropped_sign_of_a_cost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = replace(CASE, inverse=True), Packing.__init__
    assert properties.check(case) == "general"

    def unsigned(self: Packing, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named | {"sign": 1.0})

    monkeypatch.setattr(Packing, "__init__", unsigned)
    with pytest.raises(AssertionError, match=r"result of shape .* is wrong by"):
        properties.check(case)


def test_an_unexpected_error_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "REFUSALS", ())
    with pytest.raises(AssertionError, match="needs a potential"):
        properties.check(replace(CASE, part="free", costs=["hj"]))


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("context", ["tensor", "mapping"])
def test_a_context_of_another_sample_is_noticed(context: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, resolve = replace(CASE, context=context, engine=engine, costs=[]), ff.LatentFlow._checked_context
    properties.check(case)

    def rolled(*arguments: Any, **named: Any) -> Any:
        found = resolve(*arguments, **named)
        return {n: c.roll(1, 0) for n, c in found.items()} if isinstance(found, dict) else found.roll(1, 0)

    monkeypatch.setattr(ff.LatentFlow, "_checked_context", rolled)
    with pytest.raises(AssertionError, match="is wrong by"):
        properties.check(case)


@pytest.mark.parametrize("engine", ["auto", "general"])
@pytest.mark.parametrize("times", ["affine", "general", "repeats", "mixed"])
def test_a_time_of_another_sample_is_noticed(times: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = replace(CASE, times=times, engine=engine, costs=[]), Clock.__init__
    properties.check(case)

    def rolled(self: Clock, knots: Any, starts: Tensor, rates: Tensor) -> None:
        made(self, knots, starts.roll(1, -1), rates)

    monkeypatch.setattr(Clock, "__init__", rolled)
    with pytest.raises(AssertionError, match="is wrong by"):
        properties.check(case)


def test_smaller_steps_of_eulers_method_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASE, method="euler", times="mixed")
    properties.check(case)
    monkeypatch.setitem(properties.METHODS, "euler", ({"step_size": 0.05}, 1e-8))
    with pytest.raises(AssertionError, match="is wrong by"):
        properties.check(case)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_adjoint_of_learned_switches_at_own_times_in_float32(inverse: bool) -> None:
    case = replace(CASE, dtype=torch.float32, times="general", control="learned", gradient="adjoint", engine="general")
    assert properties.check(replace(case, inverse=inverse)) == "general"
