"""Folders of runs: one process at a time works in one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import TINY, small_run

from flowfactor.cli import main
from flowfactor.training import prepare, train
from flowfactor.training.folder import BusyError, claimed

pytest.importorskip("fcntl", reason="only Unix keeps processes apart")

HOLD = """
import sys
from pathlib import Path
from flowfactor.training.folder import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path, killed: bool = False) -> Iterator[None]:
    """Another process, which works in a folder meanwhile."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        yield
        if killed:
            process.kill()


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_is_free_again_when_its_process_ends(tmp_path: Path, killed: bool) -> None:
    folder = tmp_path / "run"
    with holder(folder, killed), pytest.raises(BusyError, match="another process works in"), claimed(folder):
        pass
    with claimed(folder), claimed(folder):  # a part of the same work may ask again
        pass
    assert list(folder.iterdir()) == []


def test_two_benchmarks_do_not_train_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--steps", "1", "--workers", "0", "--threads", "1", "--evaluate.images", "3", "--evaluate.vp_images", "0"]
    command = ["benchmark", "digits", "--methods", "vae", "--seeds", "0", *budget, *TINY, "--output", str(tmp_path)]
    with holder(tmp_path / "vae-seed0"):
        assert main(command) == 1
        assert "vae, seed 0 FAILED: another process is at this run" in capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "vae-seed0").iterdir()) == [
            "flowfactor.json",
            "settings.json",
        ]
    assert main(command) == 0


def test_a_training_does_not_begin_where_another_one_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path / "run"), pytest.raises(SystemExit):
        main(["train", "demo", "--train.steps", "1", *TINY, "--output", str(tmp_path / "run")])
    assert "another process works in" in capsys.readouterr().err


def test_who_asks_for_the_folder_of_a_run_at_work_hears_of_the_work(tmp_path: Path) -> None:
    """Not to overwrite it: the run there is being made."""
    config = small_run(tmp_path / "run", steps=2)
    train(config)
    with holder(tmp_path / "run"), pytest.raises(BusyError, match="another process works in"):
        prepare(config)
    with pytest.raises(FileExistsError, match="holds a run"):
        prepare(config)
