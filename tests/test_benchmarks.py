"""The benchmarks' own parts: arithmetic of readings, equal sides, reports and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

if not Path(__file__).parents[1].joinpath("benchmarks").is_dir():  # any other failure to import them is one
    pytest.skip("needs a checkout", allow_module_level=True)

import flowfactor as ff
from benchmarks import curves, growth, laplacians, peer, precision, report, run, solves, training_step
from benchmarks.problem import Outcome, Problem, largest_difference, same
from benchmarks.timing import Readings, Row, Target, interleaved, short
from experiments import EULER


class Counted:
    """A side whose readings are known, and which notes when it was read."""

    def __init__(self, name: str, values: list[float], log: list[str]) -> None:
        self.name, self.values, self.log = name, values, log

    def prepare(self, at_least: float) -> None:
        self.log.append(f"prepare {self.name}")

    def reading(self) -> float:
        self.log.append(self.name)
        return self.values.pop(0)


def row(group: str = "step", **notes: object) -> Row:
    return Row(
        group, "ours|fast", Readings([2.0, 3.0, 9.0]), Readings([4.0, 5.0, 6.0]), "peer", Target(0.7), dict(notes)
    )


def test_sides_take_turns_and_ratios_are_taken_turn_by_turn() -> None:
    log: list[str] = []
    times = interleaved({"a": Counted("a", [1.0, 2.0, 3.0], log), "b": Counted("b", [4.0, 4.0, 4.0], log)}, 3)
    assert log == ["prepare a", "prepare b", "a", "b", "b", "a", "a", "b"]
    assert list(times["a"].over(times["b"]).values) == [0.25, 0.5, 0.75]
    assert list(times["a"].rate(2, "frames/s").values) == [2000.0, 1000.0, pytest.approx(2000 / 3)]


def test_short_sides_are_called_often_enough() -> None:
    calls: list[int] = []
    interleaved({"a": lambda: calls.append(1)}, 1, at_least=1e-3)
    assert len(calls) > 10


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target(0.7), True),
        (Target(0.5), False),
        (Target(2.5, "at least", "value"), True),
        (Target(2, of="value"), False),
    ],
)
def test_targets_are_judged_by_the_median(target: Target, met: bool) -> None:
    one = row()
    one.target = target
    assert one.ratio is not None and one.ratio.median == pytest.approx(0.6)
    assert one.met is met


def test_numbers_are_short() -> None:
    assert [short(x) for x in (12345.6, 123.4, 0.5, 0.0, 2.5e-7)] == ["12,346", "123", "0.500", "0.00", "2.5e-07"]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_all_sides_solve_the_same_problem(divergence: str) -> None:
    problem = Problem(5, divergence, batch=12, dtype=torch.float64)
    for mode in solves.MODES:
        problem.ours(*mode.split("/"))(True)
    problem.plain()(True)
    problem.plain(adjoint=True)(True)
    for mode in (*solves.MODES, "plain odeint_adjoint"):
        solves.check(problem, mode, "plain odeint")
    assert len(problem.outcomes["plain odeint"].gradients) == 11
    # Landing on the end, as flowfactor does, can cost or save the last step.
    assert abs(problem.nfe["direct/batch"] - problem.nfe["plain odeint"]) <= 6


def test_unequal_sides_stop_the_benchmark() -> None:
    outcome = Outcome(torch.ones(3), torch.ones(3), {"w1": torch.ones(3)})
    other = Outcome(torch.ones(3), torch.ones(3), {"w1": torch.ones(3) * 1.1})
    difference, where = largest_difference(outcome, other)
    assert where == "d/dw1" and difference == pytest.approx(0.1 / 1.1)
    problem = Problem(2, batch=2)
    problem.outcomes = {"direct/batch": outcome, "plain odeint": other}
    with pytest.raises(RuntimeError, match=r"differ by 0\.091 in d/dw1"):
        solves.check(problem, "direct/batch", "plain odeint")
    with pytest.raises(RuntimeError, match="Laplacian"):
        same(torch.tensor([math.nan]), torch.ones(1), 1.0, "Laplacian")


@pytest.mark.skipif(peer.diffrax_version() is None, reason="needs the extra bench")
def test_diffrax_solves_the_same_problem() -> None:
    problem = Problem(4, batch=8)
    problem.ours()(False)
    with peer.DiffraxProcess(problem, 1) as process:
        outcome, about = process.run("forward")
        assert about["steps"] > 1
        assert process.side("forward").reading() > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            process.run("sideways")
    assert largest_difference(outcome, problem.outcomes["direct/batch, forward"])[0] < 1e-2


@pytest.mark.parametrize(("preset", "solver"), [(EULER, {"method": "euler"}), ("mnist-small", None)])
def test_the_step_in_parts_is_the_whole_step(preset: str, solver: dict[str, str] | None) -> None:
    trainer = training_step.Trainer(solver, ff.data.Digits(), preset=preset)
    trainer.step()
    trainer.check_cut()
    spent = trainer.parts()
    assert tuple(spent) == training_step.PARTS and min(spent.values()) > 0


def test_exponents_and_their_curves(tmp_path: Path) -> None:
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    sweeps = [growth.Sweep("dim", "D", (2, 4, 8), growth.Sizes(steps=2, batch=4), fitted=4)]
    sweeps.append(growth.Sweep("tolerance", "1 / tolerance", (1e-2, 1e-3), growth.Sizes(dim=2, steps=2, batch=4), 1e-2))
    rows = growth.growth(1, sweeps)
    assert [r.notes["at"] for r in rows] == [2, 4, 8, 1e-2, 1e-3]
    assert (rows[2].notes["fitted from"], rows[2].notes["fitted to"]) == (4, 8)
    (path,) = curves.draw([r.as_dict() for r in rows], tmp_path)
    assert path.name == "growth.png" and 5_000 < path.stat().st_size < 150_000
    assert "| D | 4 to 8 |" in report.exponents([r.as_dict() for r in rows])


def test_errors_of_paths() -> None:
    exact = Outcome(torch.ones(2, 4, 3), torch.ones(2, 4), {})
    moved = Outcome(torch.ones(2, 4, 3), torch.ones(2, 4), {})
    moved.z[1, 2] = 1.5  # one of four samples, at one of two times
    errors = precision.errors_of(moved, exact)
    assert errors["error"] == pytest.approx(0.25) and errors["error of the worst sample"] == pytest.approx(0.5)
    assert errors["error of log-determinants"] == 0


def test_results_come_back_as_tables(tmp_path: Path) -> None:
    path = report.write({"threads": 2}, 3, [row(), row("paper", flops=1234.5, parts={"a": 1})], tmp_path)
    found = report.load([path])
    made = report.tables(found)
    assert made["step"].splitlines()[-1].split(" | ")[1:5] == [
        "3.00 (2.00..9.00)", "peer", "5.00 (4.00..6.00)", "**0.600 (0.500..1.50)**",
    ]  # fmt: skip
    assert (
        "at most 0.7: met" in made["step"]
        and "flops: 1,234; parts: a 1" in made["paper"]
        and "threads 2" in made["machine"]
    )
    page = "a\n<!-- table: step -->\nold\n<!-- end -->\nb\n<!-- table: memory -->\nkept\n<!-- end -->\n"
    once = report.insert(page, made)
    assert "old" not in once and "kept" in once and once.startswith("a\n") and report.insert(once, made) == once


def test_later_runs_replace_groups_of_earlier_ones(tmp_path: Path) -> None:
    first = report.write({}, 3, [row(), row("paper")], tmp_path)
    first = first.rename(tmp_path / "first.json")
    second = report.write({}, 3, [row("paper", again=1)], tmp_path)
    found = report.load([first, second])
    assert [(r["group"], r["notes"]) for r in found["results"]] == [("step", {}), ("paper", {"again": 1})]


def test_the_page_has_a_place_for_every_table() -> None:
    assert report.marks(report.PAGE.read_text(encoding="utf-8")) == list(report.TABLES)


def test_one_failure_leaves_the_other_readings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(repeats: int, threads: int) -> list[Row]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(run, "CASES", {"broken": broken, "good": lambda repeats, threads: [row()]})
    monkeypatch.setattr(report.write, "__defaults__", (tmp_path,))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--repeats", "3", "--threads", "1"])
    with pytest.raises(SystemExit, match="failed: broken"):
        run.main()
    (path,) = tmp_path.glob("speed-*.json")
    assert [r["name"] for r in json.loads(path.read_text())["results"]] == ["ours|fast"]
    assert "out of order" in capsys.readouterr().err


@pytest.mark.parametrize("dim", [2, 40])
def test_all_sides_have_the_same_laplacian(dim: int) -> None:
    threads = torch.get_num_threads()
    rows = laplacians.over_sizes(1, (dim,), (16,))  # which stops where they differ
    assert [row.other_name for row in rows] == ["plain columns", "torch.func Hessian"]
    assert torch.get_num_threads() == threads
