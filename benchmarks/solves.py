"""An adaptive solve with its gradient: flowfactor, the same written plainly, and diffrax, by turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.peer import DiffraxProcess, diffrax_version
from benchmarks.problem import Problem, largest_difference
from benchmarks.timing import Readings, Row, Side, Target, interleaved
from flowfactor.fields.base import Divergence

MODES = ("direct/batch", "direct/sample", "checkpoint/batch", "adjoint/batch")
# The same steps give the same numbers. Whoever chooses steps of his own (checkpoint lands on every output, an adjoint
# solves an equation of its own, norm="sample" holds the worst sample to the tolerance, diffrax has another controller)
# agrees to what the tolerance buys: about 2e-3 of the log-determinant, which is one column in D + 1 of the error norm.
SAME_STEPS, OWN_STEPS = 1e-3, 5e-3
_PLAIN = {"adjoint/batch": "plain odeint_adjoint"}
_TO_DIFFRAX = {(32, "step"): 1.0, (324, "step"): 0.7, (32, "forward"): 1.5, (324, "forward"): 1.0}


def solves(dim: int, divergence: Divergence, repeats: int, threads: int) -> list[Row]:
    """Training step, adjoint step and forward solve of one problem.

    Like against like: ``norm="batch"`` steers by the error that torchdiffeq and diffrax measure.
    """
    problem = Problem(dim, divergence)
    sides: dict[str, Callable[[bool], None]] = {mode: problem.ours(*mode.split("/")) for mode in MODES}
    sides |= {"plain odeint": problem.plain(), "plain odeint_adjoint": problem.plain(adjoint=True)}
    for side in sides.values():
        side(True)
    for mode in ("direct/batch", "direct/sample", "plain odeint"):
        sides[mode](False)
    for name in sides:
        check(problem, name, "plain odeint")
    timed: dict[str, Callable[[], object] | Side] = {name: partial(side, True) for name, side in sides.items()}
    timed |= {f"forward, {n}": partial(sides[n], False) for n in ("direct/batch", "direct/sample", "plain odeint")}
    if diffrax_version() is None:
        print("  diffrax is not installed (extra bench): its rows are left out")
        return _rows(problem, interleaved(timed, repeats), {})
    with DiffraxProcess(problem, threads) as process:
        steps: dict[str, Any] = {}
        for what in ("step", "adjoint", "forward"):
            outcome, about = process.run(what)
            problem.outcomes[f"diffrax {what}"] = outcome
            steps[what] = about
            if what != "forward":
                check(problem, f"diffrax {what}", "plain odeint")
        timed |= {f"diffrax {what}": process.side(what) for what in steps}
        return _rows(problem, interleaved(timed, repeats), steps)


def check(problem: Problem, name: str, other: str) -> None:
    """Stops the benchmark where two sides differ by more than the tolerance explains."""
    difference, where = largest_difference(problem.outcomes[name], problem.outcomes[other])
    bound = SAME_STEPS if name == "direct/batch" else OWN_STEPS
    if not difference <= bound:
        raise RuntimeError(f"{name} and {other} differ by {difference:.2g} in {where}, more than {bound:g}")


def _rows(problem: Problem, times: dict[str, Readings], diffrax: dict[str, Any]) -> list[Row]:
    dim, rows = problem.dim, []
    what = f"D={dim}, {'exact' if problem.probe is None else 'Hutchinson'}"

    def add(group: str, name: str, ours: str, other: str, target: Target | None, **notes: Any) -> None:
        if other in times:
            rows.append(Row(group, f"{what}, {name}", times[ours], times[other], other, target, notes))

    for mode in MODES:
        other = _PLAIN.get(mode, "plain odeint")
        target = Target(1 / 3) if mode == "adjoint/batch" else Target(1 / 1.5) if mode == "direct/batch" else None
        notes = {"evaluations": problem.nfe[mode], "its evaluations": problem.nfe[other]}
        add("step", f"step, {mode}", mode, other, target, **notes, **_errors(problem, mode, other))
    for mode in ("direct/batch", "direct/sample", "adjoint/batch"):
        peer = "adjoint" if mode == "adjoint/batch" else "step"
        about = diffrax.get(peer, {})
        notes = {"its steps": about.get("steps"), "its compilation, s": about.get("seconds")}
        if diffrax:
            notes |= _errors(problem, mode, f"diffrax {peer}")
        add("step", f"step, {mode}", mode, f"diffrax {peer}", _asked(problem, mode, "step"), **notes)
    for mode in ("direct/batch", "direct/sample"):
        for other in ("forward, plain odeint", "diffrax forward"):
            target = _asked(problem, mode, "forward") if other.startswith("diffrax") else None
            add("forward", f"forward, {mode}", f"forward, {mode}", other, target)
    return rows


def _asked(problem: Problem, mode: str, what: str) -> Target | None:
    """What is asked against diffrax: of the mode that steers as it does, with Hutchinson's estimate."""
    if mode != "direct/batch" or problem.probe is None or (problem.dim, what) not in _TO_DIFFRAX:
        return None
    return Target(_TO_DIFFRAX[problem.dim, what])


def _errors(problem: Problem, ours: str, other: str) -> dict[str, Any]:
    """How far both are from a solve in double precision at 1e-10, and from each other: the largest relative differences."""
    name, found = "exact", problem.outcomes
    if name not in found:
        exact = Problem(problem.dim, problem.divergence, dtype=torch.float64, tolerance=1e-10)
        exact.ours()(True)
        found[name] = exact.outcomes["direct/batch"]
    difference, where = largest_difference(found[ours], found[other])
    errors = {"error": largest_difference(found[ours], found[name])[0]}
    errors["its error"] = largest_difference(found[other], found[name])[0]
    return errors | {"difference": difference, "in": where}
