"""Trainings on files with contexts and on irregular films: from the command line to measures and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowfactor as ff
from flowfactor.cli import main
from flowfactor.training import Config, FlowModule, LearningRateSchedule, load_run
from flowfactor.training._diverged import Watch
from flowfactor.training.evaluation import EvaluationConfig, evaluate, measure

SIZES = [
    *("--model.latent_dim", "6", "--model.hidden", "[16,16]", "--model.encoder", "{widths: [8]}"),
    *("--model.decoder", "{widths: [8]}", "--train.batch_size", "32"),
]
QUIET = [
    "--train.minutes",
    "null",
    "--train.tensorboard",
    "false",
    "--train.progress",
    "false",
    "--train.evaluate_limit",
    "4",
]


def turning(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bars that turn by so many radians a frame ``[N, T+1, H, W]``, and that speed ``[N, 1]``."""
    draw = np.random.default_rng(seed)
    speed = draw.uniform(-1, 1, (count, 1))
    angle = draw.uniform(0, np.pi, (count, 1)) + 0.5 * speed * np.arange(4)
    axis = np.linspace(-1, 1, 12)
    off = axis * np.sin(angle)[..., None, None] - axis[:, None] * np.cos(angle)[..., None, None]
    return np.exp(-8 * off**2).astype(np.float32), speed.astype(np.float32)


def of(path: Path, *more: str) -> list[str]:
    return ["train", "demo", *SIZES, *QUIET, "--data.name", "sequences", "--data.root", str(path), *more]


def test_a_context_in_a_file_is_trained_on_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    frames, speed = turning(160)
    np.savez(tmp_path / "bars.npz", frames=frames, k=np.zeros(160, dtype=int), context=speed)
    run = tmp_path / "run"
    lazy = ["--train.steps", "300", "--train.learning_rate", "5e-3", "--model.frames_per_step", "null"]
    lazy += ["--model.hj_weight", "0", "--model.start_weight", "0", "--train.likelihood_limit", "4"]
    assert main(of(tmp_path / "bars.npz", *lazy, "--output", str(run))) == 0
    model, config = load_run(run)
    assert model.context == 1 and "context" not in config.model
    held, told = (torch.from_numpy(part) for part in turning(64, seed=1))
    with torch.no_grad():
        right, wrong = (
            model(held.unsqueeze(2), torch.arange(4.0), 0, context=c, generator=torch.Generator().manual_seed(0)).loss
            for c in (told, told.roll(1, 0))
        )
    assert float(wrong - right) > 10
    assert main(["evaluate", str(run), "--limit", "4", "--samples", "2"]) == 0
    assert main(["traverse", str(run), "--images", "2", "--gif", str(run / "traversal.gif")]) == 0
    capsys.readouterr()
    asked = [
        "train",
        "demo",
        "--method",
        "vae",
        *QUIET,
        "--train.steps",
        "1",
        "--data.name",
        "sequences",
        "--data.root",
        str(tmp_path / "bars.npz"),
    ]
    said = refused([*asked, "--output", str(tmp_path / "other")])
    assert "have a context of 1 features, which the method 'vae' cannot take" in said and "ours" in said
    said = refused(
        of(tmp_path / "bars.npz", "--model.context", "3", "--train.steps", "1", "--output", str(tmp_path / "other"))
    )
    assert "model.context is 3, but the sequences of sequences have a context of 1 features" in said


def irregular(context: Any = None) -> ff.data.Sequences:
    """Six films of two classes, of different lengths and times; with a context of two names."""
    films = [torch.rand(3 + n % 2, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    t = [[s * (1 + n / 4) for s in range(len(film))] for n, film in enumerate(films)]
    named = {"pose": torch.randn(6, 2), "speed": torch.rand(6, 1)} if context is None else context
    return ff.data.Sequences(films, [n % 2 for n in range(6)], t, pad=True, context=named)


def test_irregular_films_from_the_command_line(tmp_path: Path) -> None:
    for n in range(12):
        film = np.random.default_rng(n).random((3 + n % 3, 8, 8), dtype=np.float32)
        (tmp_path / "films" / f"kind{n % 2}").mkdir(parents=True, exist_ok=True)
        t = np.cumsum(np.random.default_rng(n).uniform(0.5, 2, len(film)))
        np.savez(tmp_path / "films" / f"kind{n % 2}" / f"film{n}.npz", frames=film, t=t - t[0], context=np.ones(2))
    run = tmp_path / "run"
    more = ["--data.options.pad", "true", "--data.test_fraction", "0.3", "--train.batch_size", "4"]
    more += ["--train.steps", "3", "--train.log_every", "1"]
    assert main(of(tmp_path / "films", *more, "--train.likelihood_limit", "2", "--output", str(run))) == 0
    result = json.loads((run / "result.json").read_text())
    assert np.isfinite(result["terms"]["loss"]) and set(result["equivariance_error"]) == {"kind0", "kind1"}


@pytest.mark.parametrize("supervision", ["full", "weak"])
def test_all_figures_of_irregular_films(supervision: str) -> None:
    data = irregular()
    sizes: dict[str, Any] = {"hidden": (8, 8), "encoder": {"widths": (4,)}, "decoder": {"widths": (4,)}}
    model = ff.models.build_vae(
        (1, 8, 8),
        2,
        4,
        context=data.context_size,
        supervision=supervision,
        num_frames=4,
        solver={"method": "rk4"},
        **sizes,
    )
    found = evaluate(model, data, samples=2)
    assert all(np.isfinite(error) for error in found["equivariance_error"].values())
    assert np.isfinite(found["log_likelihood"]["per_frame"])
    few = EvaluationConfig(
        images=3, likelihood_images=3, likelihood_samples=2, latent_images=3, search_images=2, vp_images=6
    )
    figures = measure(model, data, data, few)
    assert "missing" not in figures["likelihood"] and "missing" not in figures["latent_equivariance"], figures
    assert "missing" not in figures["vp"], figures["vp"]
    for name in ("gradient_share", "arc_over_chord", "translation_share", "solver_gap"):
        assert len(figures[name]["mean"]) == len(found[name]["mean"]) == 2, figures[name]
        assert figures[name]["count"] == found[name]["count"] == 3
    bare = ff.data.Sequences([film[:n] for film, n in zip(data.frames, (3, 4) * 3, strict=True)], pad=True)
    plain = ff.models.build_vae((1, 8, 8), 2, 4, supervision="weak", num_frames=4, **sizes)
    unlabelled = evaluate(plain, bare, samples=2)
    assert "no labels" in unlabelled["gradient_share"]["missing"] and "no labels" in unlabelled["solver_gap"]["missing"]
    observed = bare.batch(range(6))
    made = plain.eval().decode(plain.encode(observed["frames"].flatten(0, 1)).mean).view_as(observed["frames"])
    each = (observed["frames"] - made).abs().flatten(2).sum(2)
    expected = [each[n, : 3 + n % 2].mean() for n in range(6)]
    assert unlabelled["reconstruction"]["per_frame"] == pytest.approx(
        float(torch.stack(expected).mean().detach()), rel=1e-5
    )


def test_a_module_hands_on_what_a_batch_has() -> None:
    data = irregular()
    model = ff.models.build_vae((1, 8, 8), 2, 4, context=data.context_size, hidden=(8, 8), solver={"method": "rk4"})
    batch = data.batch(range(6))
    heard: list[dict[str, Any]] = []
    forward = model.forward
    model.forward = lambda *arguments, **named: (heard.append(named), forward(*arguments, **named))[1]
    module = FlowModule(model, LearningRateSchedule(steps=1))
    module._trainer = type("T", (), {"log_every_n_steps": 9, "global_step": 0, "callbacks": [], "loggers": []})()
    module.training_step(batch, 0).backward()
    assert heard[0]["context"] is batch["context"] and heard[0]["mask"] is batch["mask"]


def test_a_batch_that_diverged_is_kept_with_its_context(tmp_path: Path) -> None:
    batch = irregular().batch([0, 1])
    watch = Watch()
    watch.begin(1, batch, None)
    watch.error("it diverged", tmp_path, "")
    with np.load(tmp_path / "diverged-step1.npz") as held:
        assert {"frames", "k", "t", "mask", "context/pose", "context/speed", "global_state"} <= set(held.files)
        assert held["context/pose"].shape == (2, 2)


def test_settings_name_a_context() -> None:
    config = {"data": {"name": "digits"}, "model": {"context": {"pose": 2}}, "method": "ours"}
    assert Config.from_dict(config | {"output": "x"}).model["context"] == {"pose": 2}
