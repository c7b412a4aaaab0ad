"""`torch.compile` of a bound field, and solves that compile: ``python -m benchmarks.compiled`` reports as JSON.

Compiling happens in processes of their own, each with the compiler's cache at a place of its choice, so that cold and warm
caches can be told apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.peer import ROOT
from benchmarks.problem import relative
from benchmarks.timing import Readings, Row, Target, interleaved
from flowfactor.control import resolve

Call: TypeAlias = Callable[[Tensor, Tensor], Tensor]
DIM, FLOWS, HIDDEN, BATCHES = 48, 3, (128, 128), (96, 64, 128)
DIVERGENCES: dict[str, Any] = {
    "Helmholtz field, velocity": None,
    "gradient field of frozen weights, velocity and exact divergence": "exact",
}
OWN = "potential of one's own, log-determinants with a probe"
SOLVES: dict[str, tuple[ff.Solver, Any]] = {
    f"{OWN}, 8 unit rk4 steps": (ff.Solver("rk4", step_size=1.0), "hutchinson"),
    f"{OWN}, dopri5 at 1e-5": (ff.Solver(norm="batch"), "hutchinson"),
    "ResNetPotential, exact log-determinants, 8 unit rk4 steps": (ff.Solver("rk4", step_size=1.0), "exact"),
    "FreeField (by closed forms), exact log-determinants, 8 unit rk4 steps": (ff.Solver("rk4", step_size=1.0), "exact"),
}


def compiled(repeats: int, threads: int) -> list[Row]:
    """Compile time with a cold and a warm cache, graph breaks, recompilations and the time of a call."""
    rows = []
    for name in DIVERGENCES:
        with tempfile.TemporaryDirectory() as cache:
            cold = _ask(name, cache, repeats, threads)
            warm = _ask(name, cache, 0, threads)
        failed = cold.get("error") or warm.get("error")
        if failed:
            print(f"  {name}: torch.compile does not work here: {failed}")
            reason = failed.splitlines()[0][:160]
            rows.append(Row("compile", f"{name}: {reason}", Readings([float("nan")], "failed")))
        else:
            rows += _rows(f"{name}, D={DIM}, K={FLOWS}", cold, warm)
    return rows


def compiled_solves(repeats: int, threads: int) -> list[Row]:
    """Training steps through solves with ``compile=True`` against the same solves without."""
    rows = []
    for name in SOLVES:
        with tempfile.TemporaryDirectory() as cache:
            answer = _ask(name, cache, repeats, threads)
            again = _ask(name, cache, 0, threads)
        failed = answer.get("error") or again.get("error")
        if failed:
            print(f"  {name}: {failed}")
            continue
        sides = {side: Readings(values) for side, values in answer["times"].items()}
        row = Row("compiled", name, sides["compiled"], sides["as written"], "without compile=True")
        row.notes = {
            "compiling, s": round(answer["seconds"], 1),
            "with its cache, s": round(again["seconds"], 1),
            "largest difference": answer["difference"],
        }
        rows.append(row)
    return rows


def _rows(name: str, cold: dict[str, Any], warm: dict[str, Any]) -> list[Row]:
    first, second = (Readings([answer["seconds"]], "s") for answer in (cold, warm))
    rows = [
        Row("compile", f"{name}: compiling, cold cache", first, target=Target(15, of="value")),
        Row("compile", f"{name}: compiling, warm cache", second, first, "cold cache"),
    ]
    sides = {side: Readings(values) for side, values in cold["times"].items()}
    call = Row("compile", f"{name}: a call, forward and backward", sides["compiled"], sides["eager"], "eager")
    call.notes = {"largest difference": cold["difference"]}
    breaks = Row("compile", f"{name}: graph breaks", Readings([cold["breaks"]], "breaks"), target=Target(0, of="value"))
    breaks.notes = {"of the public call": cold["public"]}
    counts = cold["compilations"]
    again = Row("compile", f"{name}: graphs for {len(BATCHES)} batch sizes", Readings([counts["one flow"]], "graphs"))
    again.target, again.notes = Target(2, of="value"), {"with an index a sample": counts["index"]}
    return [*rows, call, breaks, again]


def _ask(name: str, cache: str, repeats: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compiled", name, str(repeats), str(threads)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if run.returncode:
        return {"error": (run.stderr.strip() or "no message").splitlines()[-1]}
    return json.loads(run.stdout.splitlines()[-1])


def _field(name: str) -> ff.fields.Field:
    def make() -> ff.potentials.Potential:
        return ff.potentials.MLPPotential(DIM, FLOWS, HIDDEN, activation="softplus")

    if name.startswith("Helmholtz"):
        return ff.fields.HelmholtzField(make(), make(), skew="canonical")
    # What binding makes of trained weights for an exact divergence belongs to one solve, and goes back once.
    return ff.fields.GradientField(make()).requires_grad_(False)


def _bound(field: ff.fields.Field, batch: int, divergence: Any, each: bool = True) -> Call:
    """The field for a batch in which each sample follows a flow of its own, or all follow one; returns sums by sample."""
    control = torch.arange(batch) % FLOWS if each else 0
    acting = resolve(control, (batch,), FLOWS, dtype=torch.float32, device=torch.device("cpu"))
    bound = field.bind(acting, (batch,), divergence=divergence)

    def call(z: Tensor, t: Tensor) -> Tensor:
        evaluation = bound(z, t)
        squares = evaluation.velocity.square().sum(-1)
        return squares if evaluation.divergence is None else squares + evaluation.divergence

    return call


def _public_breaks(field: ff.fields.Field, z: Tensor, t: Tensor) -> dict[str, int | str]:
    """Graph breaks of ``field(z, t, control)``, whose checks look at the control's values."""
    weights = torch.rand(len(z), FLOWS)
    controls = {"one flow": 0, "an index a sample": torch.arange(len(z)) % FLOWS, "weights": weights}
    breaks: dict[str, int | str] = {}
    for name, control in controls.items():
        torch._dynamo.reset()
        try:
            breaks[name] = torch._dynamo.explain(lambda z, t, c=control: field(z, t, c))(z, t).graph_break_count
        except torch._dynamo.exc.TorchDynamoException as error:
            breaks[name] = type(error).__name__
    torch._dynamo.reset()
    return breaks


def main() -> None:
    """Measures in this process; with no repeats, the time of compiling alone."""
    name, repeats, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name in SOLVES:
        print(json.dumps(_solves(name, repeats)))
        return
    field, divergence = _field(name), DIVERGENCES[name]
    z, t = torch.randn(BATCHES[0], DIM), torch.tensor(0.5)
    eager = _bound(field, BATCHES[0], divergence)
    result: dict[str, Any] = {}
    if repeats:
        result["breaks"] = torch._dynamo.explain(eager)(z, t).graph_break_count
        result["public"] = _public_breaks(field, z, t)
        counts = {"index": True, "one flow": False}
        result["compilations"] = {name: _compilations(field, divergence, each) for name, each in counts.items()}
    begin = time.perf_counter()
    fast = torch.compile(eager, dynamic=True)
    _run(fast, z, t)
    result["seconds"] = time.perf_counter() - begin
    if not repeats:
        print(json.dumps(result))
        return
    with torch.no_grad():
        expected = eager(z, t)
    result["difference"] = relative(fast(z.clone().requires_grad_(), t).detach(), expected)
    sides = {"compiled": lambda: _run(fast, z, t), "eager": lambda: _run(eager, z, t)}
    result["times"] = {side: list(readings.values) for side, readings in interleaved(sides, repeats).items()}
    print(json.dumps(result))


class _Own(ff.potentials.Potential):
    """A potential as users write one: its derivatives are automatic."""

    def __init__(self) -> None:
        super().__init__(DIM, FLOWS)
        sizes = [DIM + 1, 64, 64, 1]
        layers = [[torch.nn.Linear(a, b) for a, b in pairwise(sizes)] for _ in range(FLOWS)]
        self.parts = torch.nn.ModuleList(
            torch.nn.Sequential(one, torch.nn.Tanh(), two, torch.nn.Tanh(), three) for one, two, three in layers
        )

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return self.parts[k](torch.cat([z, t.unsqueeze(-1)], -1)).squeeze(-1)


def _solves(name: str, repeats: int) -> dict[str, Any]:
    """A training step through a solve with ``compile=True`` and through the same solve without."""
    solver, divergence = SOLVES[name]
    made: Any
    if name.startswith("ResNet"):
        made = ff.potentials.ResNetPotential(DIM, FLOWS)
    else:
        made = ff.fields.FreeField(DIM, FLOWS) if name.startswith("Free") else _Own()
    batch = BATCHES[0]
    z0, times, control = torch.randn(batch, DIM), torch.arange(9.0), torch.arange(batch) % FLOWS

    def side(compile: bool) -> Callable[[], Tensor]:
        flow = ff.LatentFlow(made, replace(solver, compile=compile), divergence)

        def step() -> Tensor:
            z, generator = z0.clone().requires_grad_(), torch.Generator().manual_seed(1)
            path = flow(z, times, control, log_det=True, generator=generator)
            assert path.log_det is not None
            (path.z.square().mean() + path.log_det.mean()).backward()
            assert z.grad is not None
            return torch.cat([path.z[-1].detach(), z.grad], -1)

        return step

    sides = {"compiled": side(True), "as written": side(False)}
    begin = time.perf_counter()
    sides["compiled"]()
    result: dict[str, Any] = {"seconds": time.perf_counter() - begin}
    if repeats:
        result["difference"] = relative(sides["compiled"](), sides["as written"]())
        result["times"] = {side: list(found.values) for side, found in interleaved(sides, repeats).items()}
    return result


def _compilations(field: ff.fields.Field, divergence: Any, each: bool) -> int:
    """How many graphs several batch sizes need, each bound anew; they are only traced, which decides it."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for batch in BATCHES:
        traced = torch.compile(_bound(field, batch, divergence, each), dynamic=True, backend="eager")
        _run(traced, torch.randn(batch, DIM), torch.tensor(0.5))
    count = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return count


def _run(function: Call, z: Tensor, t: Tensor) -> None:
    function(z.clone().requires_grad_(), t).mean().backward()


if __name__ == "__main__":
    main()
