"""Training in two processes: what they compute and write, and that they go on from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flowfactor.training import load_run

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)

# Lightning starts the second process by this script; the trainings then follow one another in both.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from small_runs import SIZES, small_run
from flowfactor.training import FlowModule, train

def run(name, steps, of={}, **how):
    options = {"log_every": 2, "evaluate_limit": 2, "likelihood_limit": 0, "schedule": "constant", "threads": 1}
    return train(
        small_run(Path(sys.argv[1]) / name, steps=steps, devices=2, accelerator="cpu", **of, **options), **how
    )

run("whole", 4)
step = FlowModule.training_step

def interrupted(self, batch, index):  # one of the two alone
    if self.global_rank == 0 and self.global_step == 0:
        signal.raise_signal(signal.SIGINT)
    return step(self, batch, index)

FlowModule.training_step = interrupted
assert run("parts", 4)["steps"] == 2
FlowModule.training_step = step
run("parts", 4, resume=True)
# In its warm-up this model trains parts of itself, and regularizers come and go by draws of each process.
run("sparse", 3, {"method": "sta", "model": SIZES | {"regularize_every": 2}})
"""


def test_two_processes_train_together_and_go_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    places = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    whole, parts = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    for name in ("whole", "parts"):
        rows = [row.split(",") for row in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        assert [row[rows[0].index("step")] for row in rows[1:]] == ["2", "4"]
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["finished"] and result["steps"] == 4 and "equivariance_error" in result
        made = {
            "config.yaml",
            "last.ckpt",
            "best.ckpt",
            "metrics.csv",
            "model",
            "result.json",
            "flowfactor.json",
            "data.json",
        }
        made |= {"previous.ckpt"}
        assert {path.name for path in (tmp_path / name).iterdir()} == made
    first, second = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["flowfactor"]["draws"]
    assert not torch.equal(first, second)  # each process has its own
