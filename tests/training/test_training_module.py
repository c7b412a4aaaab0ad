"""Training by Lightning: schedules, steps, checkpoints, resuming."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy
import pytest
import torch
from PIL import Image
from small_runs import SIZES, TINY, small_run

from flowfactor.cli import main
from flowfactor.data import Rotate, Scale, SequenceLoader, TransformedImages
from flowfactor.models import FlowFactorizedVAE, build_vae
from flowfactor.training import DataConfig, FlowModule, LearningRateSchedule, SequenceData, load_run, prepare, train
from flowfactor.training import module as module_of_training
from flowfactor.training._diverged import Watch
from flowfactor.training.checkpoints import Checkpoints
from flowfactor.training.folder import own, write_text


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder)[0].state_dict()


def test_the_cosine_has_its_closed_form() -> None:
    schedule = LearningRateSchedule(steps=100, warmup=0.1)
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 1.0, 2.0)] == pytest.approx([0, 0.5, 1, 0, 0])
    for p in (0.3, 0.55, 0.9):
        assert schedule(p) == pytest.approx(math.cos(math.pi / 2 * (p - 0.1) / 0.9) ** 2)
    assert LearningRateSchedule(steps=100, kind="constant")(0.99) == 1


def test_the_nearer_end_decides() -> None:
    schedule = LearningRateSchedule(steps=100, minutes=2)
    assert schedule.progress(50, 30) == 0.5
    assert schedule.progress(10, 90) == 0.75
    assert LearningRateSchedule(minutes=2).progress(10**6, 60) == 0.5


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
        LearningRateSchedule(**options)


def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    run = prepare(small_run(tmp_path / "run"))
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
    assert {"loss", "kl", "hj", "solenoidal", "acceleration", "code", "learning_rate"} <= set(rows[0].split(","))
    assert not list((tmp_path / "run").glob(".*")), "temporary files are left"


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    config = small_run(tmp_path / "run", steps=5, clip=50.0, warmup=0.0)
    run = prepare(config)
    plain = build_vae((3, 28, 28), 3, **SIZES)
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


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    train(small_run(tmp_path / "whole", likelihood_limit=0))
    interrupt(4)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = train(small_run(tmp_path / "parts", likelihood_limit=0))
    assert not result["finished"] and result["steps"] == 5 and "equivariance_error" not in result
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert any(not torch.equal(v, weights(tmp_path / "parts")[n]) for n, v in weights(tmp_path / "whole").items())

    torch.manual_seed(99)
    resumed = train(small_run(tmp_path / "parts", likelihood_limit=0), resume=True)
    assert resumed["finished"] and resumed["steps"] == 8 and resumed["seconds"] > result["seconds"]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name
    whole, parts = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts"))
    columns = [whole[0].split(",").index(name) for name in ("step", "loss", "kl", "learning_rate")]
    assert [[row.split(",")[c] for c in columns] for row in whole] == [
        [row.split(",")[c] for c in columns] for row in parts
    ]


def test_after_a_crash_the_last_checkpoint_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small_run(tmp_path / "whole", likelihood_limit=0))
    original = FlowModule.training_step

    def failing(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            raise OSError("the power went")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", failing)
    with pytest.raises(OSError, match="power"):
        train(small_run(tmp_path / "parts", checkpoint_steps=3))
    monkeypatch.setattr(FlowModule, "training_step", original)
    state = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    train(small_run(tmp_path / "parts", likelihood_limit=0), resume=True)
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
    result = train(small_run(tmp_path / "run", steps=None, minutes=1, warmup=0.0, likelihood_limit=0))
    assert result["steps"] == 10 and result["seconds"] == 60
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * p / 10)) / 2 for p in range(10)])


def test_a_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    with pytest.raises(FileExistsError, match="holds a run"):
        train(small_run(tmp_path))
    with pytest.raises(ValueError, match="choose one"):
        train(small_run(tmp_path), resume=True, overwrite=True)
    assert train(small_run(tmp_path, steps=2, likelihood_limit=0), overwrite=True)["steps"] == 2


def test_only_the_same_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        prepare(small_run(tmp_path), resume=True)
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    other = small_run(tmp_path)
    other.model = SIZES | {"field": "helmholtz"}
    with pytest.raises(ValueError, match="model"):
        prepare(other, resume=True)
    other = small_run(tmp_path)
    other.seed = 3
    with pytest.raises(ValueError, match="seed"):
        prepare(other, resume=True)
    same = small_run(tmp_path)
    same.model = SIZES | {"field": "gradient"}  # what is the default anyhow
    assert prepare(same, resume=True).resume


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", (0.8, 0.99)),
        ("weight_decay", 0.1),
        ("batch_size", 9),
        ("stratified", False),
        ("precision", "bf16-true"),
        ("learning_rate", 1e-4),
        ("clip", 1.0),
        ("clock", "processor"),
    ],
)
def test_what_moves_the_weights_may_not_change(name: str, value: object, tmp_path: Path) -> None:
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    with pytest.raises(ValueError, match=rf"has train\.{name} .*, not .*: make them agree"):
        prepare(small_run(tmp_path, **{name: value}), resume=True)


def test_length_and_logging_may_change(tmp_path: Path) -> None:
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    free = {"steps": 3, "minutes": 5.0, "log_every": 1, "checkpoint_steps": 2, "evaluate_limit": 2, "threads": 1}
    assert train(small_run(tmp_path, **free), resume=True)["steps"] == 3


def test_moved_data_are_the_same_data(tmp_path: Path) -> None:
    """Recorded sequences, because they lie somewhere."""
    for index in range(20):
        folder = tmp_path / "old" / "turn" / f"{index:02}"
        folder.mkdir(parents=True)
        for frame in range(3):
            Image.new("L", (8, 8), 10 * index + frame).save(folder / f"{frame}.png")
    config = small_run(tmp_path / "run", steps=1, likelihood_limit=0, batch_size=4)
    config.data = DataConfig("sequences", root=str(tmp_path / "old"), limit=12)
    train(config)
    (tmp_path / "old").rename(tmp_path / "new")
    config.data.root, config.train.steps = str(tmp_path / "new"), 2
    assert train(config, resume=True)["steps"] == 2
    assert load_run(tmp_path / "run")[1].data.root == str(tmp_path / "new")
    config.data.limit = 13
    with pytest.raises(ValueError, match=r"has data .*'limit': 12.*, not .*'limit': 13"):
        prepare(config, resume=True)


def test_what_tells_of_an_earlier_model_goes_with_it(tmp_path: Path) -> None:
    told = ["evaluation.json", "traversal.png", "transformations.gif"]
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    for options in ({"overwrite": True}, {"resume": True}):
        own(tmp_path, *told, "benchmark.json")
        for name in (*told, "benchmark.json"):
            (tmp_path / name).write_text("of the model before")
        (tmp_path / "notes.txt").write_text("the user's own")
        train(small_run(tmp_path, steps=2, likelihood_limit=0), **options)
        assert [name for name in told if (tmp_path / name).exists()] == []
        # A resumed run does not take away what a benchmark measured at its budget, with its settings beside it.
        assert (tmp_path / "benchmark.json").exists() == ("resume" in options)
        assert (tmp_path / "notes.txt").exists() and (tmp_path / "result.json").exists()


def test_a_training_gives_the_threads_back(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    run = prepare(small_run(tmp_path, steps=1, likelihood_limit=0, threads=before + 1))
    run.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    run.fit()
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: pl.Trainer, path: Path) -> None:
        if self.global_step == 4:
            Path(path).write_bytes(b"half")
            raise OSError("the disk is full")
        save(self, path)

    save = pl.Trainer.save_checkpoint
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", fail)
    with pytest.raises(OSError, match="full"):
        train(small_run(tmp_path, checkpoint_steps=2))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "new \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


class _Breaking(torch.nn.Module):
    """Its loss, or its gradient alone, is not finite from a step on, and nothing else shows it."""

    def __init__(self, at: int, value: float, gradient: bool = False) -> None:
        super().__init__()
        self.at, self.value, self.gradient, self.calls = at, value, gradient, 0
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, frames: torch.Tensor, t: torch.Tensor, k: torch.Tensor, generator: object = None) -> _Breaking:
        self.calls += 1
        broken = self.calls >= self.at
        self.loss = self.weight * (self.value if broken and not self.gradient else 1.0)
        if broken and self.gradient:  # the root of nought: 0, of slope infinity times nought
            self.loss = self.weight.detach() + ((self.weight - self.weight.detach()) ** 2).sqrt()
        return self

    def as_dict(self) -> dict[str, torch.Tensor]:
        return {"loss": self.loss.detach()}


@pytest.mark.parametrize("log_every", [1, 50])
@pytest.mark.parametrize(("value", "told"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_a_training_that_diverges_names_term_step_and_cure_and_saves_the_batch(
    value: float, told: str, log_every: int, tmp_path: Path
) -> None:
    """The first step that is not finite is told, whenever anything is logged; the state before it is kept."""
    run = prepare(small_run(tmp_path, steps=6, log_every=log_every, checkpoint_steps=1))
    run.model = _Breaking(3, value)
    with pytest.raises(
        FloatingPointError, match=f"diverged at step 3: loss became {told}.*Lower the learning rate"
    ) as error:
        run.fit()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not (tmp_path / "model").exists()
    (saved,) = tmp_path.glob("diverged*")
    assert str(saved) in str(error.value)
    with numpy.load(saved) as batch:
        assert int(batch["step"]) == 3
        again = iter(prepare(small_run(tmp_path / "other")).data.train_dataloader())
        expected = [next(again) for _ in range(3)][2]
        assert all(numpy.array_equal(batch[name], expected[name].numpy()) for name in ("frames", "t", "k"))
        torch.Generator().set_state(torch.from_numpy(batch["generator_state"]))
    table = tmp_path / "metrics.csv"
    assert not table.exists() or ("nan" not in table.read_text() and "inf" not in table.read_text())


def test_a_gradient_that_diverges_is_told_before_the_weights_move(tmp_path: Path) -> None:
    run = prepare(small_run(tmp_path, steps=6, checkpoint_steps=1))
    run.model = _Breaking(3, math.nan, gradient=True)
    with pytest.raises(FloatingPointError, match=r"step 3: the gradient of weight became NaN .*the loss was 0\.\d+\)"):
        run.fit()
    assert bool(run.model.weight.isfinite()) and list(tmp_path.glob("diverged-step3.npz"))


def test_an_accelerators_answer_is_read_later_and_no_state_is_saved_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_training, "Watch", lambda: Watch(lag=2))
    for name, every in (("a", None), ("b", 1)):
        run = prepare(small_run(tmp_path / name, steps=8, log_every=50, checkpoint_steps=every))
        run.model = _Breaking(3, math.nan)
        with pytest.raises(FloatingPointError, match="diverged at step 3: loss became NaN"):
            run.fit()
        assert list((tmp_path / name).glob("diverged-step3.npz"))
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ended = prepare(small_run(tmp_path, steps=4, checkpoint_steps=1)), Checkpoints.on_train_batch_end
    run.model = _Breaking(99, math.nan)

    def end(self: Checkpoints, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == 2:
            run.model.weight.data.fill_(math.inf)
        ended(self, trainer, *arguments)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", end)
    with pytest.raises(FloatingPointError, match="step 2: the weights weight became NaN or infinite"):
        run.fit()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_the_command_tells_a_diverged_training_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = [
        "--train.minutes",
        "null",
        "--train.steps",
        "6",
        "--train.learning_rate",
        "1e30",
        "--train.progress",
        "false",
    ]
    assert main(["train", "demo", *TINY, *budget, "--output", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flowfactor train: error: the training diverged at step") and "train.learning_rate" in line


def test_weights_that_explode_are_told_as_diverged(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"Lower the learning rate.*diverged-step"):
        train(small_run(tmp_path, learning_rate=1e30, steps=20, warmup=0.0, log_every=50))


def test_batches_go_on_without_an_end() -> None:
    images = (torch.arange(12) / 12)[:, None, None].expand(12, 8, 8)
    data = TransformedImages(images, {"turn": (Rotate(), 0, 10), "grow": (Scale(), 1, 1.2)}, steps=2)
    module = SequenceData(data, 4, seed=5, endless=True)
    batches = iter(module.train_dataloader())
    taken = [next(batches)["frames"] for _ in range(8)]  # 3 an epoch
    loader = SequenceLoader(data, 4, seed=5)
    expected = [batch["frames"] for _ in range(3) for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(taken, expected, strict=False))
    assert module.state_dict() == {"start": 0, "seed": 5, "batch_size": 4}
    module.load_state_dict({"start": 5, "seed": 5, "batch_size": 4})
    again = iter(module.train_dataloader())
    assert all(torch.equal(next(again)["frames"], frames) for frames in expected[5:9])
    with pytest.raises(ValueError, match="batch_size"):
        SequenceData(data, 13)
    with pytest.raises(ValueError, match="had batch_size 4, these have 6"):
        SequenceData(data, 6).load_state_dict(module.state_dict())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_the_module_works_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    images = torch.rand(8, 1, 8, 8)
    data = TransformedImages(images, {"turn": (Rotate(), 0, 10)}, steps=2)
    model = build_vae((1, 8, 8), 1, 4, hidden=(8, 8))
    module = FlowModule(model, LearningRateSchedule(steps=3))
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
