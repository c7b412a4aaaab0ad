"""A run is its folder: copied, moved, and gone on with from anywhere."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import TINY, small_run, snapshot, write_mnist

from flowfactor.cli import main
from flowfactor.training import load_config, load_run, prepare, train

MORE = ["--resume", "--train.steps", "2"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a run ``A``, which was made by a relative path."""
    monkeypatch.chdir(tmp_path)
    train(small_run(Path("runs/A"), steps=1, likelihood_limit=0))
    return tmp_path / "runs"


def steps(folder: Path) -> int:
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def test_a_copy_is_trained_on_and_not_what_it_is_a_copy_of(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "A", runs / "B")
    before = snapshot(runs / "A")
    assert main(["train", "runs/B/config.yaml", *MORE]) == 0
    assert snapshot(runs / "A") == before and steps(runs / "B") == 2
    assert load_config(runs / "B" / "config.yaml").output == str(runs / "B")
    assert load_run(runs / "B")[1].output == str(runs / "B")


def test_a_copy_is_begun_anew_and_not_what_it_is_a_copy_of(runs: Path) -> None:
    shutil.copytree(runs / "A", runs / "B")
    before = snapshot(runs / "A")
    assert main(["train", "runs/B/config.yaml", "--overwrite", "--seed", "3"]) == 0
    assert snapshot(runs / "A") == before and load_run(runs / "B")[1].seed == 3


def test_a_copy_is_gone_on_with_by_the_library_too(runs: Path) -> None:
    shutil.copytree(runs / "A", runs / "B")
    assert prepare(runs / "B" / "config.yaml", resume=True).folder == runs / "B"
    assert prepare(load_config("runs/B/config.yaml"), resume=True).folder == Path("runs/B")


def test_a_moved_run_is_gone_on_with(runs: Path) -> None:
    (runs / "A").rename(runs / "C")
    assert main(["train", "runs/C/config.yaml", *MORE]) == 0
    assert steps(runs / "C") == 2 and not (runs / "A").exists()


def test_another_working_directory_does_not_matter(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "../runs/A/config.yaml", *MORE]) == 0
    assert steps(runs / "A") == 2 and not list((tmp_path / "elsewhere").iterdir())


def test_another_output_contradicts_resuming(runs: Path, refused: Callable[[list[str]], str]) -> None:
    shutil.copytree(runs / "A", runs / "B")
    before = snapshot(runs)
    told = refused(["train", "runs/B/config.yaml", *MORE, "--output", "runs/A"])
    assert "runs/B/config.yaml belongs to the run in runs/B, and the output is runs/A" in told
    assert "or give runs/A/config.yaml" in told and snapshot(runs) == before
    # The same folder by another name is no contradiction, and a new run may take another one's settings.
    assert main(["train", "runs/B/config.yaml", *MORE, f"--output={runs / 'B'}"]) == 0
    before = snapshot(runs / "B")
    assert main(["train", "runs/B/config.yaml", "--output", "runs/new"]) == 0
    assert steps(runs / "new") == 2 and snapshot(runs / "B") == before


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_that_is_printed_goes_on(
    elsewhere: bool,
    tmp_path: Path,
    interrupt: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "my data")
    interrupt(1)
    given = ["train", "mnist-small", "--data.root", "my data", *TINY, "--train.minutes", "null", "--train.steps", "4"]
    given += ["--train.evaluate_limit", "2", "--train.likelihood_limit", "0", "--output", "my runs/it's one"]
    assert main(given) == 130
    told = capsys.readouterr().out
    assert "interrupted after 2 steps. Go on: " in told
    program, *arguments = shlex.split(told.partition("Go on: ")[2])
    assert program == "flowfactor"
    if elsewhere:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(arguments) == 0
    assert steps(tmp_path / "my runs" / "it's one") == 4
