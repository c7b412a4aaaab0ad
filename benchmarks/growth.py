"""How the cost of a training step grows with its sizes, and by which exponent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import flowfactor as ff
from benchmarks.timing import Row, interleaved


@dataclass(frozen=True)
class Sizes:
    """One training step: what grows is varied, the rest stays."""

    dim: int = 64
    flows: int = 1
    steps: int = 8
    batch: int = 128
    tolerance: float = 1e-5
    method: str = "dopri5"


@dataclass(frozen=True)
class Sweep:
    """One curve.

    Attributes:
        name: What is varied, a field of `Sizes`.
        label: Its name on an axis.
        values: Where it is measured.
        base: Everything else.
        fitted: Values from this one on (in the direction of growth) take part in the fit of the exponent: below, the fixed
            costs of a call hide it.
    """

    name: str
    label: str
    values: Sequence[float]
    base: Sizes = Sizes()
    fitted: float = 0.0


SWEEPS = (
    Sweep("dim", "D", (8, 16, 32, 64, 128, 256, 512, 1024), fitted=128),
    Sweep("flows", "K", (1, 2, 4, 8, 16, 32, 64), fitted=8),
    # Unit steps: an adaptive solver takes as many steps as the flow needs, however many outputs there are.
    Sweep("steps", "T (unit rk4 steps)", (2, 4, 8, 16, 32, 64), Sizes(method="rk4"), fitted=4),
    Sweep("batch", "batch", (8, 16, 32, 64, 128, 256, 512, 1024), fitted=128),
    Sweep("tolerance", "1 / tolerance", (1e-2, 1e-3, 1e-4, 1e-5, 1e-6), fitted=1e-3),
)


def step_of(sizes: Sizes) -> Callable[[], int]:
    """A training step, forward and backward with log-determinants by Hutchinson's estimate; it returns the evaluations."""
    generator = torch.Generator().manual_seed(0)
    potential = ff.potentials.MLPPotential(sizes.dim, sizes.flows, hidden=(64, 64), init_scale=0.5, generator=generator)
    options: dict[str, Any] = {}
    if sizes.method == "dopri5":
        options = {"rtol": sizes.tolerance, "atol": sizes.tolerance, "norm": "batch"}
    flow = ff.LatentFlow(potential, ff.Solver(sizes.method, **options), divergence="hutchinson")
    z0 = torch.randn(sizes.batch, sizes.dim, generator=generator)
    t = torch.arange(sizes.steps + 1.0)
    index = torch.arange(sizes.batch) % sizes.flows

    def step() -> int:
        flow.zero_grad()
        path = flow(z0, t, index, log_det=True, generator=torch.Generator().manual_seed(1))
        assert path.log_det is not None
        (path.z.square().mean() - path.log_det.mean()).backward()
        return path.stats.nfe

    return step


def growth(repeats: int, sweeps: Sequence[Sweep] = SWEEPS) -> list[Row]:
    """One row a point; the exponent of each curve, with the range it was fitted on, stands in its last row's notes."""
    rows = []
    for sweep in sweeps:
        points = {value: step_of(Sizes(**{**sweep.base.__dict__, sweep.name: value})) for value in sweep.values}
        nfe = {value: step() for value, step in points.items()}
        times = interleaved({str(value): step for value, step in points.items()}, repeats, at_least=0.02)
        curve = []
        for value in sweep.values:
            row = Row("growth", f"{sweep.label} at {value:g}", times[str(value)])
            row.notes = {"curve": sweep.name, "label": sweep.label, "at": value, "evaluations": nfe[value]}
            curve.append(row)
        chosen = [r for r in curve if _order(r.notes["at"], sweep) >= _order(sweep.fitted, sweep)]
        xs = [_order(r.notes["at"], sweep) for r in chosen]
        low, high = chosen[0].notes["at"], chosen[-1].notes["at"]
        curve[-1].notes |= {
            "exponent": exponent(xs, [r.ours.median for r in chosen]),
            "per evaluation": exponent(xs, [r.ours.median / r.notes["evaluations"] for r in chosen]),
            "fitted from": low,
            "fitted to": high,
        }
        rows += curve
    return rows


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of ln y over ln x by least squares."""
    return float(np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], 1)[0])


def _order(value: float, sweep: Sweep) -> float:
    """What a curve is drawn over: tolerances are inverted, so that cost grows to the right."""
    return 1 / value if sweep.name == "tolerance" else float(value)
