"""Validation in runs of the command: data cut out for it, an early end, the best checkpoint, and resuming."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SIZES, small_run

import flowfactor as ff
from flowfactor.cli import main
from flowfactor.models import METHODS
from flowfactor.training import FlowModule, load_run, prepare, train
from flowfactor.training._validation import hold_out

CHECKED: dict[str, Any] = {"validate_every": 2, "validation_fraction": 0.3, "checkpoint_steps": 3}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder)[0].state_dict()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def _losses(folder: Path) -> list[tuple[int, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["val_loss"])) for row in csv.DictReader(file) if row.get("val_loss")]


def _state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the loss of validations rise from a step on."""

    def rise(after: int) -> None:
        measured = FlowModule._measured_step

        def rising(self: FlowModule, batch: dict, batch_idx: int, name: str) -> None:
            measured(self, batch, batch_idx, name)
            if self.global_step > after:
                self.log("val_loss", torch.tensor(1e6 + self.global_step), batch_size=6, logger=False)

        monkeypatch.setattr(FlowModule, "_measured_step", rising)

    return rise


def test_without_validation_nothing_is_cut_out(tmp_path: Path) -> None:
    run = prepare(small_run(tmp_path))
    assert run.data.val is None and len(run.data.dataset) == len(run.train) == 21


def test_validation_is_of_training_data_that_are_not_trained_on(tmp_path: Path) -> None:
    run = prepare(small_run(tmp_path, **CHECKED))
    val: Any = run.data.val
    assert len(run.data.dataset) + len(val) == len(run.train) and 4 <= len(val) <= 9
    parts: list[Any] = [run.data.dataset, val]
    kept, held = (set(part.images.flatten(1).sum(1).tolist()) for part in parts)
    assert not kept & held
    again: Any = prepare(small_run(tmp_path, **CHECKED)).data.val
    assert torch.equal(val.images, again.images)


def test_whole_groups_of_ones_own_sequences_are_held_out() -> None:
    frames = torch.rand(12, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, group = [0] * 6 + [1] * 6, [f"group {index // 2}" for index in range(12)]
    kept, held = hold_out(ff.data.Sequences(frames, labels, group=group), 0.3, 0)
    assert not set(kept.groups) & set(held.groups)  # type: ignore[attr-defined]
    assert set(held.fixed_k.tolist()) == set(kept.fixed_k.tolist()) == {0, 1}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="validation_fraction"):
        hold_out(ff.data.Sequences(frames, labels, group=["a"] * 6 + ["b"] * 6), 0.3, 0)


@pytest.mark.parametrize("method", METHODS)
def test_validating_does_not_move_the_training_of_any_method(method: str, tmp_path: Path) -> None:
    sizes = SIZES | {"latent_dim": 12, "hidden": [16]}
    if method != "factor-vae":
        del sizes["hidden"]
    few: dict[str, Any] = {"steps": 4, "evaluate_limit": 2, "likelihood_limit": 0, "validation_fraction": 0.3}
    for name, every in (("often", 1), ("late", 4)):
        train(small_run(tmp_path / name, sizes, method, validate_every=every, **few))
    _same(_weights(tmp_path / "often"), _weights(tmp_path / "late"))
    assert [step for step, _ in _losses(tmp_path / "often")] == [1, 2, 3, 4]


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(
    tmp_path: Path, worse: Callable[[int], None]
) -> None:
    worse(4)
    result = train(small_run(tmp_path, **CHECKED))
    assert result["ended"] == "all steps made"
    measured = dict(_losses(tmp_path))
    assert list(measured) == [2, 4, 6, 8] and measured[6] > 1e5 > measured[4]
    best = min(measured, key=lambda step: measured[step])
    told = result["best_checkpoint"]
    assert (told["monitored"], told["step"]) == ("val_loss", best) and told["value"] == pytest.approx(measured[best])
    assert FlowModule.load_from_checkpoint(tmp_path / "best.ckpt").schedule.steps == 8
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == best


def test_a_training_that_gains_nothing_ends_and_says_so(
    tmp_path: Path, worse: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    worse(4)
    config = small_run(tmp_path / "run", **CHECKED, patience=2, steps=40)
    (tmp_path / "early.yaml").write_text(config.as_yaml())
    assert main(["train", str(tmp_path / "early.yaml")]) == 0
    told = capsys.readouterr()
    assert "ended early, after 8 steps: no lower val_loss in 2 validations" in told.out + told.err
    assert '"ended": "no lower val_loss in 2 validations' in (tmp_path / "run" / "result.json").read_text()
    before = _weights(tmp_path / "run")
    result = train(config, resume=True)  # there is nothing to go on with
    assert result["steps"] == 8 and result["ended"].startswith("no lower val_loss")
    _same(before, _weights(tmp_path / "run"))


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("crash", [False, True])
def test_a_resumed_run_equals_an_undisturbed_one(
    at: int, crash: bool, tmp_path: Path, worse: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worse(2)
    options: dict[str, Any] = CHECKED | {"patience": 4, "steps": 40}
    whole = train(small_run(tmp_path / "whole", **options))
    assert whole["steps"] == 10
    step = FlowModule.training_step

    def disturbed(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == at - 1:
            if crash:
                raise RuntimeError("the power is gone")
            import signal

            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    config = small_run(tmp_path / "parts", **options)
    with monkeypatch.context() as patched:
        patched.setattr(FlowModule, "training_step", disturbed)
        if crash:
            with pytest.raises(RuntimeError, match="power"):
                train(config)
        else:
            assert train(config)["ended"] == "interrupted"
    result = train(config, resume=True)
    assert (result["steps"], result["ended"]) == (10, whole["ended"])
    assert result["best_checkpoint"] == whole["best_checkpoint"]
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    _same(_weights(tmp_path / "whole"), _weights(tmp_path / "parts"))
    for key in ("callbacks", "optimizer_states"):
        one, other = (repr(_state(tmp_path / name)[key]) for name in ("whole", "parts"))
        assert one == other, key
    best = [torch.load(tmp_path / name / "best.ckpt", weights_only=True) for name in ("whole", "parts")]
    assert best[0]["global_step"] == best[1]["global_step"] == 2
    _same(best[0]["state_dict"], best[1]["state_dict"])


@pytest.mark.parametrize(
    "options",
    [{"patience": 2}, {"validate_every": 0}, {"validate_every": 2, "validation_fraction": 1.0}, {"patience": 0}],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.(patience|validate_every|validation_fraction)"):
        small_run(tmp_path, **options)


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_a_rare_label_is_on_both_sides(fraction: float) -> None:
    data = ff.data.Digits()
    rows = [(data.labels == label).nonzero().flatten()[:count] for label, count in ((0, 100), (1, 4))]
    for part in hold_out(data.subset(torch.cat(rows)), fraction, 0):
        labels: Any = part
        assert set(labels.labels.tolist()) == {0, 1}


def test_few_data_of_many_labels_are_divided_by_the_default_share(tmp_path: Path) -> None:
    run = prepare(small_run(tmp_path, validate_every=2))
    val: Any = run.data.val
    assert len(run.data.dataset) + len(val) == 21 and len(run.data.dataset) >= 6
