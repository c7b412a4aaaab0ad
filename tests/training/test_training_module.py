"""Training by Lightning: schedules, steps, checkpoints, resuming."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from flowfactor.data import Rotate, Scale, SequenceLoader, TransformedImages
from flowfactor.models import FlowFactorizedVAE, build_vae
from flowfactor.training import Config, FlowModule, Schedule, SequenceData, load_run, prepare, train
from flowfactor.training import module as module_of_training

MODEL = {
    "latent_dim": 4,
    "hidden": [8, 8],
    "frames_per_step": 2,
    "encoder": {"widths": [8]},
    "decoder": {"widths": [8]},
}


def settings(output: Path, **train_options) -> Config:
    options = {"batch_size": 6, "log_every": 2, "evaluate_limit": 4, "likelihood_limit": 6, "likelihood_samples": 2}
    return Config.from_dict(
        {
            "data": {"name": "digits", "steps": 2, "limit": 21},
            "model": MODEL,
            "train": {"steps": 8, "tensorboard": False, "progress": False, **options, **train_options},
            "output": str(output),
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder)[0].state_dict()


def test_the_cosine_has_its_closed_form() -> None:
    schedule = Schedule(steps=100, warmup=0.1)
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 1.0, 2.0)] == pytest.approx([0, 0.5, 1, 0, 0])
    for p in (0.3, 0.55, 0.9):
        assert schedule(p) == pytest.approx(math.cos(math.pi / 2 * (p - 0.1) / 0.9) ** 2)
    assert Schedule(steps=100, kind="constant")(0.99) == 1


def test_the_nearer_end_decides() -> None:
    schedule = Schedule(steps=100, minutes=2)
    assert schedule.progress(50, 30) == 0.5
    assert schedule.progress(10, 90) == 0.75
    assert Schedule(minutes=2).progress(10**6, 60) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no end"),
        ({"steps": 0}, "steps"),
        ({"steps": 1, "warmup": 1.0}, "warmup"),
        ({"steps": 1, "kind": "x"}, "x"),
    ],
)
def test_wrong_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    run = prepare(settings(tmp_path / "run"))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    result = run.fit()
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["finished"] and result["steps"] == 8 and result["seconds"] > 0
    assert set(result["equivariance_error"]) == set(result["doing_nothing"]) == {"scaling", "rotation", "colouring"}
    assert result["log_likelihood"]["count"] == 6
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    saved = weights(tmp_path / "run")
    assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]] == ["2", "4", "6", "8"]
    assert {"loss", "kl", "hj", "learning_rate"} <= set(rows[0].split(","))
    assert not list((tmp_path / "run").glob(".*")), "temporary files are left"


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", steps=5, clip=50.0, warmup=0.0)
    run = prepare(config)
    plain = build_vae((3, 28, 28), 3, **MODEL)
    plain.load_state_dict(run.model.state_dict())
    run.fit()

    optimizer = torch.optim.Adam(plain.parameters(), betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    loader = SequenceLoader(config.data.dataset(), 6, seed=0)
    batches = [batch for _ in range(2) for batch in loader][:5]  # 3 batches an epoch
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * (step + 0.5) / 5)) / 2
        optimizer.zero_grad()
        plain(batch["frames"], batch["t"], batch["k"], generator=generator).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 50.0)
        optimizer.step()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(tmp_path / "whole", likelihood_limit=0))
    original = FlowModule.training_step

    def interrupted(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = train(settings(tmp_path / "parts", likelihood_limit=0))
    assert not result["finished"] and result["steps"] == 5 and "equivariance_error" not in result
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert any(not torch.equal(v, weights(tmp_path / "parts")[n]) for n, v in weights(tmp_path / "whole").items())

    monkeypatch.setattr(FlowModule, "training_step", original)
    torch.manual_seed(99)
    resumed = train(settings(tmp_path / "parts", likelihood_limit=0), resume=True)
    assert resumed["finished"] and resumed["steps"] == 8 and resumed["seconds"] > result["seconds"]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name
    whole, parts = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts"))
    columns = [whole[0].split(",").index(name) for name in ("step", "loss", "kl", "learning_rate")]
    assert [[row.split(",")[c] for c in columns] for row in whole] == [
        [row.split(",")[c] for c in columns] for row in parts
    ]


def test_after_a_crash_the_last_checkpoint_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(tmp_path / "whole", likelihood_limit=0))
    original = FlowModule.training_step

    def failing(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            raise OSError("the power went")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", failing)
    with pytest.raises(OSError, match="power"):
        train(settings(tmp_path / "parts", checkpoint_steps=3))
    monkeypatch.setattr(FlowModule, "training_step", original)
    state = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    train(settings(tmp_path / "parts", likelihood_limit=0), resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name


def test_time_ends_the_training_with_the_rate_near_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    rates = []
    original = FlowModule.training_step

    def step(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        now[0] += 6.0  # a step takes a tenth of a minute
        return original(self, batch, batch_idx)

    monkeypatch.setattr(module_of_training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(FlowModule, "training_step", step)
    result = train(settings(tmp_path / "run", steps=None, minutes=1, warmup=0.0, likelihood_limit=0))
    assert result["steps"] == 10 and result["seconds"] == 60
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * p / 10)) / 2 for p in range(10)])


def test_a_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train(settings(tmp_path, steps=1, likelihood_limit=0))
    with pytest.raises(FileExistsError, match="holds a run"):
        train(settings(tmp_path))
    with pytest.raises(ValueError, match="choose one"):
        train(settings(tmp_path), resume=True, overwrite=True)
    assert train(settings(tmp_path, steps=2, likelihood_limit=0), overwrite=True)["steps"] == 2


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        prepare(settings(tmp_path), resume=True)
    train(settings(tmp_path, steps=1, likelihood_limit=0))
    other = settings(tmp_path)
    other.model = MODEL | {"field": "gradient"}
    with pytest.raises(ValueError, match="model"):
        prepare(other, resume=True)
    other = settings(tmp_path)
    other.seed = 3
    with pytest.raises(ValueError, match="seed"):
        prepare(other, resume=True)
    same = settings(tmp_path)
    same.model = MODEL | {"field": "helmholtz"}  # what is the default anyhow
    assert prepare(same, resume=True).resume


def test_nan_is_told(tmp_path: Path) -> None:
    with pytest.raises((FloatingPointError, ValueError), match=r"NaN|nan"):
        train(settings(tmp_path, learning_rate=1e30, steps=20, warmup=0.0))


def test_batches_go_on_without_an_end() -> None:
    images = (torch.arange(12) / 12)[:, None, None].expand(12, 8, 8)
    data = TransformedImages(images, {"turn": (Rotate(), 0, 10), "grow": (Scale(), 1, 1.2)}, steps=2)
    module = SequenceData(data, 4, seed=5)
    batches = iter(module.train_dataloader())
    taken = [next(batches)["frames"] for _ in range(8)]  # 3 an epoch
    loader = SequenceLoader(data, 4, seed=5)
    expected = [batch["frames"] for _ in range(3) for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=False))
    module.load_state_dict({"start": 5, "seed": 5})
    again = iter(module.train_dataloader())
    assert all(torch.equal(next(again)["frames"], frames) for frames in expected[5:9])
    with pytest.raises(ValueError, match="batch_size"):
        SequenceData(data, 13)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_the_module_works_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    images = torch.rand(8, 1, 8, 8)
    data = TransformedImages(images, {"turn": (Rotate(), 0, 10)}, steps=2)
    model = build_vae((1, 8, 8), 1, 4, hidden=(8, 8))
    module = FlowModule(model, Schedule(steps=3))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=SequenceData(data, 4))
    assert trainer.global_step == 3
    assert isinstance(module.model, FlowFactorizedVAE)
    assert {"loss", "bound", "steps_per_second"} <= set(trainer.callback_metrics)
