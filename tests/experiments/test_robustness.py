"""A few runs that are killed, and a few whose newest checkpoint is damaged; experiments/robustness.py has many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(not (ROOT / "experiments" / "robustness.py").is_file(), reason="needs a checkout")
def test_killed_runs_and_damaged_checkpoints_end_as_if_nothing_had_happened(count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.robustness", "--kills", str(count), "--damaged", str(count), "--seed", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    for name in ("killed", "damaged"):
        assert result[name] == {"runs": count, "same weights": count, "same table": count}
