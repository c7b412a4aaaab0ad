"""Trainings in the jobs of clusters: who a process is comes from its settings, not from what a job left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import TINY

from flowfactor.training import load_run

FILES = {"config.yaml", "metrics.csv", "result.json", "model", "last.ckpt"}
LEFT_BEHIND = {
    "a task of a job": {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
    "a job without srun": {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"},
    "a launcher's rank": {"RANK": "1", "WORLD_SIZE": "2"},
    "a local rank": {"LOCAL_RANK": "1", "NODE_RANK": "3"},
    "torchrun": {
        **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
    },
}


def start(output: Path, variables: dict[str, str], *more: str) -> subprocess.Popen[str]:
    train = ["--train.minutes", "null", "--train.steps", "3", "--train.likelihood_limit", "0", "--train.log_every", "1"]
    command = [sys.executable, "-m", "flowfactor", "train", "demo", *TINY, *train, "--train.evaluate_limit", "2"]
    return subprocess.Popen(
        [*command, "--train.tensorboard", "false", "--output", str(output), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SOON = ("torchrun", "a task of a job")
"""One launcher, and one scheduler; `make test-all` tries the others."""


@pytest.mark.parametrize(
    "left", [pytest.param(left, marks=() if left in SOON else pytest.mark.slow) for left in LEFT_BEHIND]
)
def test_a_process_with_one_device_trains_and_writes_whatever_a_job_left_in_its_environment(
    left: str, tmp_path: Path
) -> None:
    with start(tmp_path / "run", LEFT_BEHIND[left]) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES
    assert "colouring" in out  # it reports, too
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3
    assert load_run(tmp_path / "run")[1].train.devices == 1


def test_of_several_tasks_with_one_output_the_first_trains_and_the_others_are_refused(tmp_path: Path) -> None:
    endless = ("--train.steps", "1000000", "--train.minutes", "1")
    tasks = [
        start(tmp_path / "run", {"SLURM_PROCID": str(n), "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": str(n)}, *endless)
        for n in range(2)
    ]
    try:
        while all(task.poll() is None for task in tasks):
            time.sleep(0.1)
        (refused,) = [task for task in tasks if task.poll() is not None]
        (training,) = [task for task in tasks if task is not refused]
        assert refused.returncode == 2
        assert "works in" in refused.communicate()[1]
        training.terminate()
        assert training.wait(timeout=240) == 130
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.yaml", "metrics.csv", "last.ckpt"}
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
