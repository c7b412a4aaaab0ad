"""Work and precision: the error of a solve against its time, over tolerances and step sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer import DiffraxProcess, diffrax_version
from benchmarks.problem import Outcome, Problem
from benchmarks.timing import Row, Side, interleaved

DIM = 32
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
STEPS_A_FRAME = (1, 2, 4, 8, 16)
_REFERENCE = 1e-10


def precision(repeats: int, threads: int) -> list[Row]:
    """Forward solves with log-determinants in double precision: one row for each solver and tolerance."""
    exact = Problem(DIM, dtype=torch.float64, init_scale=1.0, tolerance=_REFERENCE)
    exact.ours(method="dopri8")(False)
    reference = exact.outcomes["direct/batch, forward"]
    sides: dict[tuple[str, float], Callable[[], object] | Side] = {}
    errors: dict[tuple[str, float], dict[str, float]] = {}
    for curve, setting, problem, side, name in _settings():
        side(False)
        errors[curve, setting] = errors_of(problem.outcomes[name], reference)
        sides[curve, setting] = partial(side, False)
    if diffrax_version() is None:
        return _rows(sides, errors, repeats)
    with DiffraxProcess(exact, threads) as process:
        for tolerance in TOLERANCES:
            outcome, _ = process.run("forward", tolerance)
            errors["diffrax dopri5", tolerance] = errors_of(outcome, reference)
            sides["diffrax dopri5", tolerance] = process.side("forward", tolerance)
        return _rows(sides, errors, repeats)


def _settings() -> list[tuple[str, float, Problem, Callable[[bool], None], str]]:
    """Curve, setting, problem, side and the name of its outcome."""
    made = []

    def problem(tolerance: float) -> Problem:
        return Problem(DIM, dtype=torch.float64, init_scale=1.0, tolerance=tolerance)

    for method in ("dopri5", "dopri8", "bosh3"):
        for tolerance in TOLERANCES if method != "bosh3" else TOLERANCES[:5]:
            p = problem(tolerance)
            made.append((f"{method}, batch norm", tolerance, p, p.ours(method=method), "direct/batch, forward"))
    for tolerance in TOLERANCES:
        p = problem(tolerance)
        made.append(("dopri5, sample norm", tolerance, p, p.ours(norm="sample"), "direct/sample, forward"))
        p = problem(tolerance)
        made.append(("plain torchdiffeq dopri5", tolerance, p, p.plain(), "plain odeint, forward"))
    for count in STEPS_A_FRAME:
        p = problem(_REFERENCE)
        made.append(("rk4", 1 / count, p, p.ours(method="rk4", step_size=1 / count), "direct/batch, forward"))
    return made


def errors_of(found: Outcome, reference: Outcome) -> dict[str, float]:
    """Relative root mean square over the batch, and the worst sample's root mean square over D, at the worst time."""
    difference = (found.z - reference.z).double()
    size = reference.z.double().square().mean((-2, -1)).sqrt()

    def worst(squares: Tensor) -> float:
        return float((squares.sqrt() / size).max())

    return {
        "error": worst(difference.square().mean((-2, -1))),
        "error of the worst sample": worst(difference.square().mean(-1).amax(-1)),
        "error of log-determinants": float((found.log_det - reference.log_det).norm() / reference.log_det.norm()),
    }


def _rows(sides: dict[tuple[str, float], Any], errors: dict[tuple[str, float], Any], repeats: int) -> list[Row]:
    named = {f"{curve} at {setting:g}": (curve, setting) for curve, setting in sides}
    times = interleaved({name: sides[key] for name, key in named.items()}, repeats, at_least=0.01)
    rows = []
    for name, (curve, setting) in named.items():
        notes = {"curve": curve, "setting": setting} | errors[curve, setting]
        rows.append(Row("precision", name, times[name], notes=notes))
    return rows
