"""Speaks with the process that runs diffrax."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from benchmarks.problem import Outcome, Problem

ROOT = Path(__file__).parents[1]


def diffrax_version() -> str | None:
    """The version of diffrax, or None where it, or jax, is not installed."""
    try:
        return f"{version('diffrax')} on jax {version('jax')}"
    except PackageNotFoundError:
        return None


class DiffraxProcess:
    """A process in which diffrax solves a problem; use it in a ``with``.

    Args:
        problem: What to solve.
        threads: Threads that it may use.
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        bits = 64 if problem.z0.dtype == torch.float64 else 32
        self.problem = problem
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "benchmarks.diffrax_peer", str(threads), str(bits)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._log = (Path(self._folder.name) / "log").open("w+")
        self._process = subprocess.Popen(command, text=True, cwd=ROOT, stderr=self._log, **pipes)

    def __enter__(self) -> DiffraxProcess:
        path = Path(self._folder.name) / "problem.npz"
        np.savez(path, **self.problem.arrays())
        try:
            self.ask(do="load", path=str(path))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(60)
        self._log.close()
        self._folder.cleanup()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the process that runs diffrax has ended:\n{self._log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"diffrax: {answer['error']}")
        return answer

    def run(self, what: str, tolerance: float | None = None) -> tuple[Outcome, dict[str, Any]]:
        """Compiles and runs a side: what it computed, with compile time (first run included) and number of steps."""
        path = Path(self._folder.name) / f"{what}.npz"
        answer = self.ask(do="run", what=what, tolerance=tolerance or self.problem.tolerance, path=str(path))
        with np.load(path) as made:
            found = {name: torch.from_numpy(made[name]) for name in made.files}
        gradients = {name[2:]: value.reshape(-1) for name, value in found.items() if name.startswith("g/")}
        return Outcome(found["z"], found["log_det"], gradients), answer

    def side(self, what: str, tolerance: float | None = None) -> There:
        """A side that can be timed by turns with others."""
        return There(self, what, tolerance or self.problem.tolerance)


class There:
    """Times a side of the other process, by its own clock."""

    def __init__(self, process: DiffraxProcess, what: str, tolerance: float) -> None:
        self.process, self.what, self.tolerance = process, what, tolerance
        self.calls = 1

    def prepare(self, at_least: float) -> None:
        self.reading()  # may compile
        self.calls = max(1, round(at_least * 1e3 / self.reading()))

    def reading(self) -> float:
        request = {"what": self.what, "tolerance": self.tolerance, "calls": self.calls}
        return self.process.ask(do="time", **request)["ms"]
