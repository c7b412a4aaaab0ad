"""Density estimation against known densities, at equal time of one thread.

Trains each method on fresh samples of two moons, eight gaussians and an eight-dimensional banana, by the settings that did
best in a small search, and measures KL(p|q) on samples of its own against the exact log-density. Time is that of the
process, not of the clock; since a busy machine makes fewer steps even of that, the table counts them too.

- ``potential``, ``potential, transport``: an `MLPPotential`; with transport cost and Hamilton-Jacobi residual in the loss;
- ``resnet``: a `ResNetPotential`;
- ``free``: a `FreeField`, no potential behind it;
- ``nsf``, ``cnf``: a neural spline flow and a continuous flow of zuko, where that is installed.

``python -m experiments.density`` trains what is not yet in ``experiments/results`` and prints the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import flowfactor as ff
from experiments import RESULTS
from experiments.composition import write

DATA: dict[str, Callable[[torch.Generator], ff.data.KnownDensity]] = {
    "moons": lambda g: ff.data.TwoMoons(generator=g),
    "eight": lambda g: ff.data.EightGaussians(generator=g),
    "banana": lambda g: ff.data.Banana(8, generator=g),
}
OURS = ("potential", "potential, transport", "resnet", "free")
PEERS = ("nsf", "cnf")
BATCH, TEST_POINTS = 512, 10_000


@dataclass(frozen=True)
class Settings:
    """How a method is trained, and how ours are built: inner and outer scale are of the weights at the start."""

    rate: float = 5e-3
    hidden: tuple[int, int] = (32, 32)
    activation: str = "logcosh"
    inner_scale: float = 1.0
    outer_scale: float = 1.0
    step_size: float = 0.25


SETTINGS: dict[tuple[str, str], Settings] = {
    ("potential", "moons"): Settings(2e-2, (64, 64), "tanh", 2.0, 0.5, 0.2),
    ("potential", "banana"): Settings(2e-2, activation="tanh", outer_scale=0.2),
    ("free", "moons"): Settings(2e-2, (64, 64), outer_scale=0.1),
    ("free", "eight"): Settings(5e-3, (64, 64), outer_scale=0.1),
    ("free", "banana"): Settings(1e-2, (64, 64), outer_scale=0.1),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.density", description=__doc__)
    parser.add_argument("--seconds", type=float, default=25.0, help="time of one thread for each training")
    parser.add_argument("--methods", nargs="+", choices=OURS + PEERS, default=list(OURS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error("--seconds must be positive")
    torch.set_num_threads(1)
    print("| method | " + " | ".join(args.data) + " |\n|---" * (len(args.data) > 0) + "|---" * len(args.data) + "|")
    for method in args.methods:
        cells = []
        for data in args.data:
            made = [finished(method, data, seed, args.seconds) for seed in args.seeds]
            values = [one["kl"] for one in made]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            steps = statistics.mean(one["steps"] for one in made)
            cells.append(f"{statistics.mean(values):.3f}{spread}; {steps:,.0f}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


def finished(method: str, data: str, seed: int, seconds: float) -> dict[str, Any]:
    """A run's figures: those that are there, or those of a new one."""
    path = RESULTS / f"density-{data}-{method.replace(', ', '-')}-{seconds:g}-{seed}.json"
    if not path.exists():
        write(path, run(method, data, seed, seconds))
    return json.loads(path.read_text())


def settings_of(method: str, data: str) -> Settings:
    """The best of a small search, or the defaults."""
    return SETTINGS.get((method.split(",")[0], data), Settings())


def build(method: str, data: str, dim: int) -> nn.Module:
    """The untrained model."""
    if method in PEERS:
        flows = importlib.import_module("zuko.flows")
        if method == "nsf":
            return flows.NSF(dim, transforms=3, hidden_features=(64, 64))
        return flows.CNF(dim, hidden_features=(64, 64))
    made = settings_of(method, data)
    if method == "free":
        field: ff.potentials.Potential | ff.fields.Field = ff.fields.FreeField(
            dim, hidden=made.hidden, init_scale=made.outer_scale
        )
    elif method == "resnet":
        field = ff.potentials.ResNetPotential(dim, width=32, time_scale=1.0)
    else:
        field = ff.potentials.MLPPotential(
            dim, hidden=made.hidden, activation=made.activation, init_scale=made.outer_scale
        )
        field.w1.data *= made.inner_scale  # more: finer at the start
    return ff.LatentFlow(field, ff.Solver("rk4", step_size=made.step_size))


def loss_of(model: nn.Module, x: Tensor, base: Independent, transport: bool) -> Tensor:
    """Minus the mean log-density in nats; for transport with a hundredth of action and Hamilton-Jacobi residual."""
    if not isinstance(model, ff.LatentFlow):
        return -model().log_prob(x).mean()
    named = {"action": ff.regularizers.TransportCost(), "hj": ff.regularizers.HamiltonJacobi()}
    costs = named if transport else {}
    path = model(x, [0.0, 1.0], log_det=True, costs=costs)
    assert path.log_det is not None
    loss = -(base.log_prob(path.z[-1]) + path.log_det[-1]).mean()
    return loss + 0.01 * sum((cost[-1].mean() for cost in path.costs.values()), torch.zeros(()))


def run(method: str, data: str, seed: int, seconds: float) -> dict[str, Any]:
    """Trains for so long and measures one model."""
    torch.manual_seed(seed)
    known = DATA[data](torch.Generator().manual_seed(seed))
    base = Independent(Normal(torch.zeros(known.dim), torch.ones(known.dim)), 1)
    model = build(method, data, known.dim)
    rate = settings_of(method, data).rate
    optimiser = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    start, spent, steps = time.process_time(), 0.0, 0
    while spent < seconds:
        for group in optimiser.param_groups:  # half a cosine in time, after a short warm-up
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        optimiser.zero_grad()
        loss_of(model, known.sample((BATCH,)), base, "transport" in method).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        steps += 1
        spent = time.process_time() - start
    figures = measure(model, known, data, base, seed)
    return {"method": method, "data": data, "seed": seed, "seconds": spent, "steps": steps} | figures


@torch.no_grad()
def measure(model: nn.Module, known: ff.data.KnownDensity, data: str, base: Independent, seed: int) -> dict[str, Any]:
    """KL, mass in the plane, error of the inverse and evaluations, all by a tight adaptive solver."""
    x = DATA[data](torch.Generator().manual_seed(1000 + seed)).sample((TEST_POINTS,))
    if not isinstance(model, ff.LatentFlow):
        kl = ff.metrics.kl_divergence(known, model(), x)
        return {"kl": kl.value, "kl_interval": [kl.low, kl.high]}
    tight = ff.LatentFlow(model.field, ff.Solver("dopri5", rtol=1e-5, atol=1e-5))
    q = tight.density(base)
    kl, back = ff.metrics.kl_divergence(known, q, x), ff.metrics.inverse_error(tight, x[:1000], [0.0, 1.0])
    figures = {"kl": kl.value, "kl_interval": [kl.low, kl.high], "inverse_error": back.value}
    if known.dim == 2:
        figures["mass"] = ff.metrics.mass_on_grid(q, [-5, -5], [5, 5], points=81).as_dict()
    return figures


if __name__ == "__main__":
    main()
