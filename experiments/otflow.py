"""OT-Flow's recipe (Onken et al., AAAI 2021) on generated data of the sizes of its benchmarks.

The data are mixtures of correlated normals, whose density is known, so that KL(p|q) is measured; they are not the benchmarks
themselves, and no figure here compares with a likelihood of the paper. Width, steps of rk4 and weights are those that its
authors publish with their code; a step is four evaluations. The time input is used as it is (``time_scale=1``).

``python -m experiments.otflow --seconds 40`` trains a `ResNetPotential` for each and prints a table.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

import flowfactor as ff


@dataclass(frozen=True)
class Recipe:
    """A benchmark's size, and how OT-Flow is trained on it: weights of transport, likelihood and Hamilton-Jacobi."""

    dim: int
    width: int
    steps: int
    test_steps: int
    learning_rate: float
    weights: tuple[float, float, float]


RECIPES = {
    "POWER": Recipe(6, 128, 10, 24, 0.03, (1, 500, 5)),
    "GAS": Recipe(8, 350, 10, 30, 0.01, (1, 1200, 40)),
    "HEPMASS": Recipe(21, 256, 12, 24, 0.02, (1, 500, 40)),
    "MINIBOONE": Recipe(43, 256, 6, 18, 0.02, (1, 100, 15)),
    "BSDS300": Recipe(63, 512, 14, 40, 0.001, (1, 2000, 800)),
}
PARTS, TEST_POINTS = 5, 2000
RESIDUAL = ff.regularizers.HamiltonJacobi()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.otflow", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="time of one thread for each training")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=TEST_POINTS, help="to measure on")
    parser.add_argument("--sizes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    if args.seconds <= 0 or args.batch < 2 or args.points < 2:
        parser.error("--seconds must be positive, --batch and --points at least 2")
    torch.set_num_threads(1)
    print(
        "| size | D | evaluations, training | test | updates | KL before | KL after | inverse error |\n"
        + "|---" * 8
        + "|"
    )
    for name in args.sizes:
        print(row(name, run(RECIPES[name], args.seconds, args.batch, args.points)), flush=True)


def mixture(dim: int, parts: int = PARTS) -> MixtureSameFamily:
    """Standardized mixture of correlated normals, the same at each call."""
    generator = torch.Generator().manual_seed(dim)
    means = torch.randn(parts, dim, generator=generator)
    factors = 0.5 * torch.randn(parts, dim, dim, generator=generator) / dim**0.5
    covariances = factors @ factors.mT + 0.1 * torch.eye(dim)
    second = (covariances + means.unsqueeze(-1) * means.unsqueeze(-2)).mean(0)
    centre = means.mean(0)
    scale = (second.diagonal() - centre.square()).sqrt()
    covariances = covariances / scale / scale.unsqueeze(-1)
    return MixtureSameFamily(
        Categorical(torch.ones(parts)), MultivariateNormal((means - centre) / scale, covariances), validate_args=False
    )


def residual(evaluation: Any) -> Tensor:
    """The size of the Hamilton-Jacobi residual, which OT-Flow takes in place of its square."""
    return RESIDUAL.residual(evaluation).abs()


residual.needs = RESIDUAL.needs


def run(recipe: Recipe, seconds: float, batch: int, points: int = TEST_POINTS) -> dict[str, Any]:
    """Trains for so long and measures."""
    torch.manual_seed(0)
    known = mixture(recipe.dim)
    base = Independent(Normal(torch.zeros(recipe.dim), torch.ones(recipe.dim)), 1)
    potential = ff.potentials.ResNetPotential(recipe.dim, width=recipe.width, depth=1, rank=10, time_scale=1.0)
    flow = ff.LatentFlow(potential, ff.Solver("rk4", step_size=1 / recipe.steps))
    test = ff.LatentFlow(potential, ff.Solver("rk4", step_size=1 / recipe.test_steps))
    x = known.sample((points,))
    before = ff.metrics.kl_divergence(known, test.density(base), x)
    optimiser = torch.optim.Adam(flow.parameters(), recipe.learning_rate)
    costs = {"action": ff.regularizers.TransportCost(), "hj": residual}
    transport, likelihood, hj = recipe.weights
    start, updates, nfe = time.process_time(), 0, 0
    while time.process_time() - start < seconds:
        path = flow(known.sample((batch,)), [0.0, 1.0], log_det=True, costs=costs)
        assert path.log_det is not None
        loss = -(base.log_prob(path.z[-1]) + path.log_det[-1]).mean()
        loss = loss + (transport * path.costs["action"][-1] + hj * path.costs["hj"][-1]).mean() / likelihood
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimiser.step()
        updates, nfe = updates + 1, path.stats.nfe
    with torch.no_grad():
        test_nfe = test(x[:2], [0.0, 1.0]).stats.nfe
    kl, back = (
        ff.metrics.kl_divergence(known, test.density(base), x),
        ff.metrics.inverse_error(test, x, [0.0, 1.0]),
    )
    return {
        "dim": recipe.dim, "nfe": nfe, "test_nfe": test_nfe, "updates": updates,
        "before": before.value, "kl": kl.value, "inverse": back.value,
    }  # fmt: skip


def row(name: str, made: dict[str, Any]) -> str:
    """A line of the table."""
    figures = f"{made['before']:.2f} | {made['kl']:.2f} | {made['inverse']:.1e}"
    return f"| {name} | {made['dim']} | {made['nfe']} | {made['test_nfe']} | {made['updates']} | {figures} |"


if __name__ == "__main__":
    main()
