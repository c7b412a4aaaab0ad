"""Peak memory of the three gradient modes against the tolerance: ``python -m benchmarks.memory`` measures in forks.

Each reading is how far the largest resident set of a forked process grows beyond what it was before the training step.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import torch

from benchmarks.peer import ROOT
from benchmarks.problem import Problem
from benchmarks.timing import Readings, Row, Target

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
MODES = ("direct", "checkpoint", "adjoint")


def memory(repeats: int) -> list[Row]:
    """Growth of the peak over the tolerances, in MiB; the ratio is that of the tightest to the loosest."""
    if sys.platform != "linux":
        print("  needs Linux's resource usage: left out")
        return []
    command = [sys.executable, "-m", "benchmarks.memory", str(min(repeats, 3))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(run.stdout)
    rows = []
    for mode in MODES:
        peaks = {tolerance: found[f"{mode}/{tolerance:g}"] for tolerance in TOLERANCES}
        loose, tight = (Readings(peaks[tolerance]["mib"], "MiB") for tolerance in (TOLERANCES[0], TOLERANCES[-1]))
        row = Row("memory", f"{mode}, tolerance {TOLERANCES[-1]:g}", tight, loose, f"at {TOLERANCES[0]:g}")
        row.target = Target(1.2) if mode == "adjoint" else None
        row.notes = {
            f"evaluations/MiB at {t:g}": [p["nfe"], sorted(p["mib"])[len(p["mib"]) // 2]] for t, p in peaks.items()
        }
        rows.append(row)
    return rows


def _measure(mode: str, tolerance: float) -> tuple[float, int]:
    """MiB by which a training step raises the peak, in a process of its own, and its evaluations forward."""
    problem = Problem(128, init_scale=1.0, batch=256, tolerance=tolerance)
    step = problem.ours(mode, "batch")
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            step(True)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(into, json.dumps([(after - before) / 1024, problem.nfe[f"{mode}/batch"]]).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError(f"the step with {mode} at {tolerance:g} failed")
    mib, nfe = json.loads(text)
    return mib, nfe


def main() -> None:
    """Prints the readings as JSON. No tensor is computed on in this process, so that its forks start afresh."""
    torch.set_num_threads(1)
    found = {}
    for mode in MODES:
        for tolerance in TOLERANCES:
            turns = [_measure(mode, tolerance) for _ in range(int(sys.argv[1]))]
            found[f"{mode}/{tolerance:g}"] = {"mib": [mib for mib, _ in turns], "nfe": turns[0][1]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
