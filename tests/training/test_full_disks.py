"""File systems that are full or read-only, and interruptions: one line, the documented code, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import TINY, small_run, snapshot

from flowfactor.cli import benchmark, demo, main, runs
from flowfactor.cli.errors import describe
from flowfactor.comparison import worker
from flowfactor.models import build_vae
from flowfactor.training import DataConfig, FlowModule, run, train

SHORT = [
    *(*TINY, "--train.minutes", "null", "--train.steps", "3", "--train.evaluate_limit", "2"),
    *("--train.likelihood_limit", "0", "--train.progress", "false", "--train.tensorboard", "false"),
]
MEASURE = ["--limit", "1", "--samples", "0"]
BENCHMARK = [
    *("benchmark", "digits", "--methods", "vae", "--seeds", "0", "--steps", "1", "--workers", "0", "--threads", "1"),
    *(*TINY, "--evaluate.images", "3", "--evaluate.likelihood_images", "0", "--evaluate.vp_images", "0"),
    *("--evaluate.latent_images", "0", "--evaluate.search_images", "2"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """What was told on standard error: one line, with these parts."""
    told = capsys.readouterr()
    (line,) = told.err.strip().splitlines()
    assert all(part in line for part in parts), line
    return told.out


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train(small_run(tmp_path / "run", steps=1, likelihood_limit=0))
    return tmp_path / "run"


def test_a_disk_without_room_is_told_before_any_work(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 0.5 million weights, of which 7 times as many bytes are needed.
    arguments = ["train", "demo", *SHORT, "--model.hidden", "[900,900]", "--output", str(disk / "run")]
    assert main(arguments) == 74
    one_line(capsys, f"{disk / 'run'}: ", "MB are needed and 4 MB are free", "make room there, or choose another place")
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FlowModule.training_step

    def filling(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 1:
            fill(disk)
        return step(self, batch, batch_idx)

    folder = disk / "run"
    with monkeypatch.context() as patched:
        patched.setattr(FlowModule, "training_step", filling)
        assert main(["train", "demo", *SHORT, "--output", str(folder)]) == 74
    out = one_line(capsys, str(folder / "last.ckpt"), "No space left on device", "make room there")
    assert not out and torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
    assert not list(folder.glob(".*"))
    (disk / "filler").unlink()
    assert main(["train", str(folder / "config.yaml"), "--resume"]) == 0
    assert json.loads((folder / "result.json").read_text())["steps"] == 3
    capsys.readouterr()

    fill(disk)
    for command in (["evaluate", *MEASURE], ["traverse"], ["train", "--resume"]):
        given = [command[0], str(folder / "config.yaml") if command[0] == "train" else str(folder), *command[1:]]
        assert main(given) == 74
        one_line(capsys, str(folder), "No space left on device")
    other = folder.parent.parent / "measured.json"
    assert main(["evaluate", str(folder), *MEASURE, "--output", str(other)]) == 0 and other.is_file()


def test_a_disk_that_is_read_only_is_told_before_any_work(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk / "run"
    assert main(["train", "demo", *SHORT, "--output", str(folder)]) == 0
    capsys.readouterr()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

    def worked(*arguments: Any, **named: Any) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr(pl.Trainer, "fit", worked)
    monkeypatch.setattr(run, "evaluate", worked)
    for command in (
        ["train", "demo", *SHORT, "--output", str(disk / "other")],
        ["train", "demo", *SHORT, "--output", str(folder), "--overwrite"],
        ["train", str(folder / "config.yaml"), "--resume"],
        ["demo", "--output", str(disk / "demo")],
        [*BENCHMARK, "--output", str(disk / "benchmark")],
        ["evaluate", str(folder), *MEASURE],
        ["traverse", str(folder)],
        ["traverse", str(folder), "--output", str(disk / "a.png")],
    ):
        assert main(command) == 74
        one_line(capsys, str(disk), "Read-only file system", "choose a place that can be written")
    monkeypatch.undo()
    assert main(["evaluate", str(folder), *MEASURE, "--output", str(disk.parent / "measured.json")]) == 0


def full(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_measured_is_printed_before_it_is_written(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "write_text", full)
    assert main(["evaluate", str(trained), *MEASURE]) == 74
    assert "rotation" in one_line(capsys, "No space left on device")


@pytest.mark.parametrize("what", ["write_text", "own"])
def test_what_was_trained_is_printed_before_it_is_written(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, what, full)
    assert main(["train", "demo", *SHORT, "--output", str(tmp_path / "run")]) == 74
    assert "rotation" in one_line(capsys, str(tmp_path / "run"), "No space left on device")
    monkeypatch.undo()
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


def test_a_model_that_cannot_be_saved_is_an_error_of_its_file(disk: Path) -> None:
    fill(disk)
    (disk / "filler").write_bytes(bytes(3_900_000))
    model = build_vae((3, 28, 28), 3, latent_dim=4, hidden=(300, 300))
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*No space left"):
        model.save_pretrained(disk / "model")


def test_a_report_is_printed_before_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*BENCHMARK, "--output", str(tmp_path)]
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setattr("flowfactor.comparison.report.owned", full)
    assert main(["benchmark", "report", str(tmp_path)]) == 74
    assert "# Benchmark: digits" in one_line(capsys, "No space left on device")


def test_a_run_of_a_benchmark_that_cannot_write_is_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*BENCHMARK, "--output", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(worker, "write_text", full)
        assert main(command) == 1
    assert "vae, seed 0 FAILED" in capsys.readouterr().out
    assert main(command) == 0


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied: get the permission, or"),
        (OSError(errno.EROFS, "Read-only file system", b"a"), "a: Read-only file system: choose a place"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("two\nlines"), "two lines"),
        (OSError(), "OSError"),
    ],
)
def test_errors_of_files_are_told_in_one_line(error: OSError, told: str) -> None:
    assert describe(error).startswith(told)


def interrupted(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_while_a_training_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my run"
    with monkeypatch.context() as patched:
        patched.setattr(run, "evaluate", interrupted)
        assert main(["train", "demo", *SHORT, "--output", str(folder)]) == 130
    told = capsys.readouterr().err
    (line,) = told.strip().splitlines()
    assert line.startswith(
        "flowfactor train: interrupted. The model is trained and saved, but not measured. Measure it: "
    )
    assert json.loads((folder / "result.json").read_text())["finished"]
    assert main(shlex.split(line.partition("Measure it: ")[2])[1:] + MEASURE) == 0


@pytest.fixture
def heard() -> Iterator[None]:
    """Interruptions raise KeyboardInterrupt, also where the tests run in the background of a shell, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_before_the_first_step_and_a_second_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    folder = tmp_path / "run"
    arguments = ["train", "demo", *SHORT, "--output", str(folder)]
    with monkeypatch.context() as patched:
        patched.setattr(FlowModule, "configure_optimizers", interrupted)
        assert main(arguments) == 130
    one_line(capsys, "flowfactor train: interrupted. Nothing was saved")
    assert list(folder.iterdir()) == []
    step = FlowModule.training_step

    def twice(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(FlowModule, "training_step", twice)
        assert main(arguments) == 130
    one_line(capsys, "interrupted. Go on from the last checkpoint: flowfactor train", "--resume")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert main(["train", str(folder / "config.yaml"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        (["train", "demo", *SHORT, "--output", "new"], DataConfig, "dataset"),
        (["demo", "--output", "new"], DataConfig, "dataset"),
        (["evaluate", "run"], DataConfig, "dataset"),
        (["evaluate", "run"], torch, "manual_seed"),
        (["traverse", "run"], runs, "draw"),
        ([*BENCHMARK, "--output", "new"], DataConfig, "dataset"),
        ([*BENCHMARK, "--output", "new"], benchmark, "_report"),
    ],
)
def test_ctrl_c_elsewhere(
    command: list[str],
    module: Any,
    name: str,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(trained.parent)
    before = snapshot(trained)
    if module is torch:
        module, name = sys.modules["flowfactor.training.evaluation"], "equivariance_error"
    monkeypatch.setattr(module, name, interrupted)
    assert main(command) == 130
    one_line(capsys, f"flowfactor {command[0]}: interrupted")
    assert snapshot(trained) == before


def test_ctrl_c_while_a_benchmark_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(worker, "measure", interrupted)
        assert main([*BENCHMARK, "--output", str(tmp_path)]) == 130
    assert "interrupted. The same command goes on with it" in capsys.readouterr().out
    assert main([*BENCHMARK, "--output", str(tmp_path)]) == 0


def test_ctrl_c_while_the_demo_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(demo, "draw", interrupted)
        assert main(["demo", "--minutes", "0.002", "--output", str(tmp_path / "demo")]) == 130
    told = capsys.readouterr()
    line = told.err.strip().splitlines()[-1]
    assert "but not drawn. Draw it: flowfactor traverse" in line and "rotation" in told.out
    assert main(shlex.split(line.partition("Draw it: ")[2])[1:]) == 0


def test_a_reader_that_has_gone_takes_no_file_with_it(trained: Path, refused: Callable[[list[str]], str]) -> None:
    command = [sys.executable, "-m", "flowfactor", "evaluate", str(trained), *MEASURE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert "Traceback" not in told and "BrokenPipe" not in told and process.returncode == 0
    assert (trained / "evaluation.json").is_file()
