"""Clips of one's own without labels: trained, measured and looked at by the methods that need none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import TINY

from flowfactor.cli import main
from flowfactor.models import METHODS
from flowfactor.training import load_run

SHORT = [
    *("--train.steps", "3", "--train.minutes", "null", "--train.log_every", "1", "--train.tensorboard", "false"),
    *("--train.evaluate_limit", "2", "--train.likelihood_limit", "2", "--train.likelihood_samples", "2"),
    *("--train.progress", "false"),
]
WITHOUT_LABELS = [name for name, method in METHODS.items() if method.labels != "given"]
# All but the settings of a latent flow, which not every method has.
SMALL = [*TINY[:6], *TINY[8:]]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of sequences, without classes."""
    draw = np.random.default_rng(0)
    for clip in range(30):
        folder = tmp_path / "clips" / f"clip{clip}"
        folder.mkdir(parents=True)
        for frame in range(3):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{frame}.png")
    return tmp_path / "clips"


def of_the_clips(clips: Path) -> list[str]:
    return ["--data.name", "sequences", "--data.root", str(clips)]


@pytest.mark.parametrize("method", WITHOUT_LABELS)
def test_methods_that_need_no_labels_are_trained_measured_and_drawn_without(
    method: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ["--method", method, "--model.num_flows", "2", *of_the_clips(clips), "--output", str(run)]
    assert main(["train", "demo", *SMALL, *SHORT, *more]) == 0
    told = capsys.readouterr().out
    assert "no labels" in told and "ln p(x) per frame" in told and "reconstruction" in told
    result = json.loads((run / "result.json").read_text())
    assert result["equivariance_error"] == {} and "no labels" in result["equivariance"]["missing"]
    assert result["log_likelihood"]["count"] == 2 and result["log_likelihood"]["by_flow"] == []
    model, config = load_run(run)
    assert model.num_flows == 2 and config.model["num_flows"] == 2
    assert main(["evaluate", str(run), "--limit", "3", "--samples", "2"]) == 0
    assert "no labels" in capsys.readouterr().out
    measured = json.loads((run / "evaluation.json").read_text())
    assert measured["log_likelihood"]["count"] == measured["reconstruction"]["count"] == 3
    assert main(["traverse", str(run), "--images", "1"]) == 0
    assert (run / "traversal.png").is_file()


def test_a_reconstruction_is_the_distance_of_frames_from_what_is_decoded_of_their_codes(
    clips: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = [*of_the_clips(clips), "--method", "vae", "--output", str(run)]
    assert main(["train", "demo", *SMALL, *SHORT, *more]) == 0
    model, config = load_run(run)
    test = config.data.dataset("test")
    assert main(["evaluate", str(run), "--samples", "0"]) == 0
    frames = test.batch(list(range(len(test))))["frames"]
    made = model.decode(model.encode(frames.flatten(0, 1)).mean).view_as(frames)
    expected = float((frames - made).detach().abs().sum((2, 3, 4)).mean())
    measured = json.loads((run / "evaluation.json").read_text())
    assert measured["reconstruction"]["per_frame"] == pytest.approx(expected, rel=1e-5)
    assert measured["reconstruction"]["count"] == len(test) and "log_likelihood" not in measured


@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITHOUT_LABELS])
def test_methods_that_need_labels_are_refused_before_any_work(
    method: str, clips: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    output = tmp_path / "run"
    told = refused(["train", "demo", *of_the_clips(clips), *SMALL, *SHORT, "--method", method, "--output", str(output)])
    assert f"no labels of what acts in them, which the method '{method}' needs" in told
    assert "<class>/<sequence>" in told and "ours-weak, sta, vae" in told and not output.exists()


def test_a_benchmark_without_labels_reports_what_can_be_measured(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    folder = tmp_path / "benchmark"
    command = ["benchmark", "digits", *of_the_clips(clips), *TINY, "--steps", "2", "--seeds", "0", "--workers", "0"]
    command += ["--threads", "1", "--output", str(folder), "--evaluate.likelihood_samples", "2"]
    assert "'ours' needs" in refused([*command, "--methods", "vae", "ours"])
    assert main([*command, "--methods", "sta", "vae"]) == 0
    told = capsys.readouterr().out
    assert "E_k no labels" in told
    report = (folder / "report.md").read_text()
    assert "reconstruction, a frame" in report and "ln p(x) per frame" in report and "have no labels" in report
    assert "E_k:" not in report and "doing nothing" not in report
    assert not (folder / "report.png").exists()
