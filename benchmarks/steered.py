"""What a context and times of each sample cost a training step, against the same step without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.timing import Row, Target, interleaved

_BATCH, _DIM, _FLOWS, _FEATURES = 512, 32, 3, 16
_SOLVERS = {
    "dopri5 at 1e-5, 4 frames": (ff.Solver("dopri5"), 4),
    "Euler, 8 frames": (ff.Solver("euler"), 8),
    "rk4, 4 frames": (ff.Solver("rk4"), 4),
}


def steered(repeats: int) -> list[Row]:
    """Steps of each solver, by turns."""
    return [row for name, (solver, frames) in _SOLVERS.items() for row in _rows(repeats, name, solver, frames)]


def _rows(repeats: int, name: str, solver: ff.Solver, frames: int) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    common = torch.arange(frames + 1.0)
    steps = 0.4 + 0.6 * torch.rand(frames, _BATCH, generator=g)
    cases: dict[str, tuple[int, Tensor, Target | None]] = {
        "plain": (0, common, None),
        f"a context of {_FEATURES}": (_FEATURES, common, Target(1.15)),
        "times of each sample, one grid stretched": (0, common[:, None] * torch.linspace(0.5, 1, _BATCH), Target(1.15)),
        "times of each sample, irregular": (0, torch.cat([torch.zeros(1, _BATCH), steps.cumsum(0)]), Target(1.15)),
    }
    calls = {what: _step(solver, t, context) for what, (context, t, _) in cases.items()}
    evaluations = {what: call() for what, call in calls.items()}
    times = interleaved(calls, repeats)
    return [
        Row(
            "steered", f"{what}: {name}", times[what], times["plain"], "the same step without", target,
            {"evaluations": evaluations[what], "without": evaluations["plain"]},
        )
        for what, (_, _, target) in cases.items() if what != "plain"
    ]  # fmt: skip


def _step(solver: ff.Solver, t: Tensor, context: int) -> Callable[[], int]:
    g = torch.Generator().manual_seed(0)
    flow = ff.LatentFlow(ff.potentials.MLPPotential(_DIM, _FLOWS, (64, 64), context=context, generator=g), solver)
    z, k = torch.randn(_BATCH, _DIM, generator=g), torch.arange(_BATCH) % _FLOWS
    c = torch.randn(_BATCH, context, generator=g) if context else None
    optimiser = torch.optim.Adam(flow.parameters())

    def step() -> int:
        optimiser.zero_grad()
        path = flow(z, t, k, context=c)
        path.z.square().mean().backward()
        optimiser.step()
        return path.stats.nfe

    return step
