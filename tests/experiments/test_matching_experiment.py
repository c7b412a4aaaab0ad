"""The experiment on matching: what its loss counts, what it moves, its phases and its table."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import flowfactor as ff

if not Path(__file__).parents[2].joinpath("experiments").is_dir():  # any other failure to import them is one
    pytest.skip("needs a checkout", allow_module_level=True)

from experiments import matching

MATCHED = [name for name in matching.VARIANTS if name != "simulated"]


@pytest.fixture
def batch() -> dict[str, Any]:
    frames = torch.rand(4, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"frames": frames, "t": torch.arange(5.0), "k": torch.tensor([0, 1, 0, 1])}


def small() -> Any:
    torch.manual_seed(0)
    return ff.models.build_vae((1, 8, 8), 2, 6, field="gradient", hidden=(8, 8))


def loss(model: Any, variant: str, batch: dict[str, Any], weight: float, seed: int = 0) -> torch.Tensor:
    return matching.Matched(model, variant, weight, torch.Generator().manual_seed(seed))(batch)


@pytest.mark.parametrize("variant", ["flow", "flow-ends"])
def test_a_flow_at_rest_misses_the_speed_of_the_codes(variant: str, batch: dict[str, Any]) -> None:
    """On average over draws, the sum over the lines of |way|^2 over their duration, the noise moving along."""
    model = small()
    with torch.no_grad():
        for p in model.flow.parameters():
            p.zero_()
        q = model.encode(batch["frames"] if variant == "flow" else batch["frames"][:, [0, 4]])
        ways = q.mean.diff(dim=1).square() + q.stddev.diff(dim=1).square()
        expected = ways.sum((1, 2)).mean() / (1 if variant == "flow" else 4)
        many = {"frames": batch["frames"].repeat(50, 1, 1, 1, 1), "t": batch["t"], "k": batch["k"].repeat(50)}
        draws = [loss(model, variant, many, 1.0, s) - loss(model, variant, many, 1e-9, s) for s in range(20)]
    error = torch.stack(draws).std() / len(draws) ** 0.5
    assert float(error) < 0.05 * float(expected)
    assert abs(float(torch.stack(draws).mean() - expected)) < 4 * float(error) + 1e-3 * float(expected)


@pytest.mark.parametrize("variant", MATCHED)
def test_codes_move_only_where_they_are_no_targets(variant: str, batch: dict[str, Any]) -> None:
    model = small()
    moved = {}
    for name in ("encoder", "flow"):
        gradients = []
        for weight in (1.0, 5.0):
            model.zero_grad()
            loss(model, variant, batch, weight).backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in getattr(model, name).parameters() if p.grad is not None])
            )
        moved[name] = not torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    assert moved == {"encoder": variant in ("flow", "flow-ends"), "flow": True}


def test_frames_are_neighbours_or_ends() -> None:
    def drawn(variant: str) -> Any:
        return matching.Matched(small(), variant, 1.0, torch.Generator().manual_seed(0)).chosen(500, 5)

    coded, seen = drawn("flow")
    assert torch.equal(coded, seen) and torch.equal(coded[1], coded[0] + 1)
    assert coded[0].unique().tolist() == [0, 1, 2, 3]
    coded, seen = drawn("flow-ends")
    assert coded.unique(dim=1).tolist() == [[0], [4]] and seen.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("variant", ["simulated", "flow", "flow-ends", "action"])
def test_each_phase_trains(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(matching.time, "process_time", lambda: float(next(ticks)))
    data = ff.data.Digits("train", steps=8).subset(list(range(96)))
    model, phases = matching.fit(data, variant, 0, seconds=6, share=0.5, weight=1.0)
    # The clock ticks a second each time it is asked: a phase of 3 seconds has two steps, one of 6 five.
    steps = [("simulated", 5)] if variant == "simulated" else [("matched", 2), ("simulated", 2)]
    assert [(phase["phase"], phase["steps"]) for phase in phases] == steps
    assert model.flow.solver.method == "bosh3" and isinstance(model.flow.field, ff.fields.GradientField)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_run_is_written_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = {name: ff.data.Digits(name, steps=8).subset(list(range(n))) for name, n in (("train", 96), ("test", 24))}
    monkeypatch.setattr(ff.data, "MNIST", lambda root, split, steps: digits[split])
    monkeypatch.setattr(matching, "RESULTS", tmp_path)
    monkeypatch.setattr(matching, "DIGITS", 12)
    command = ["matching", "--seconds", "0.2", "--variants", "flow-ends", "simulated"]
    for more in ([], ["--report"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        matching.main()
        lines = capsys.readouterr().out.splitlines()
        rows = [line for line in lines if line.startswith("| ")]
        assert [row.split(" | ")[0] for row in rows] == ["| training", "| simulated", "| flow-ends"]
        assert len({row.count("|") for row in rows}) == 1 and " + " in rows[2] and "0.7, 10" in rows[2]
        assert "nan" not in "".join(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "matching-flow-ends-0.2-0.7-10-0.json",
        "matching-simulated-0.2-0.json",
    ]


@pytest.mark.parametrize("arguments", [["--share", "1"], ["--weight", "0"], ["--seconds", "-1"]])
def test_settings_out_of_range_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["matching", *arguments])
    with pytest.raises(SystemExit, match="2"):
        matching.main()
