"""How flows compose on codes that follow them: measures trained runs of `mnist-any` and the like.

    flowfactor train mnist-any --data.root ~/mnist --seed 0
    python -m experiments.anywhere runs/mnist-any ... --mnist ~/mnist

For each run, on test digits, in sequences that begin in any state of scale, angle and hue: each flow forwards and
backwards, pairs superposed and switched midway, all three at once, frames at twice and at three times the time of training,
how far codes are from their flow, by how much the order of two flows matters, and each flow from the untouched digit.
Figures are written to ``experiments/results`` and printed as rows of a table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import flowfactor as ff
from experiments import RESULTS
from experiments.composition import STEPS, write
from flowfactor import metrics, training


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.anywhere", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--mnist", help="folder of MNIST's files (default: FLOWFACTOR_MNIST)")
    parser.add_argument("--images", type=int, default=1000, help="test sequences of each figure")
    args = parser.parse_args()
    print(HEADER)
    for folder in args.runs:
        found = measure(training.load_run(folder)[0], args.mnist, args.images)
        write(RESULTS / f"anywhere-{folder.name}.json", found)
        print(row(folder.name, found), flush=True)


def measure(model: Any, root: str | None, limit: int) -> dict[str, Any]:
    """All figures of one model."""
    model.eval()
    test = ff.data.MNIST(root, "test", steps=STEPS, start="any")
    figures = metrics.combining_errors(model, test, limit=limit)
    figures["carried"] = {name: carried(model, test, k, limit) for k, name in enumerate(test.flow_names)}
    figures["paper"] = metrics.equivariance_error(
        model, ff.data.MNIST(root, "test", steps=STEPS), limit=limit
    ).as_dict()
    figures["code"] = metrics.latent_equivariance_error(model, test, limit=limit).as_dict()
    figures["order"] = metrics.commutator_error(model, test, limit=limit).as_dict()
    figures["group"] = metrics.group_error(model, test, limit=limit).as_dict()
    if not isinstance(model.flow.field, ff.fields.FreeField):
        figures["share"] = metrics.gradient_share(model, test, limit=min(limit, 200)).as_dict()
    figures["gap"] = metrics.solver_gap(model, test, limit=min(limit, 200)).as_dict()
    return figures


def carried(model: Any, test: Any, k: int, limit: int) -> dict[str, Any]:
    """Errors of frames up to three times the time of training."""
    return metrics.extrapolation_error(model, test.longer(3 * STEPS), k=k, limit=limit).as_dict()


HEADER = """| run | singles | backward | superposed (over singles) | three at once | switched, over singles \
| frame 8 / 16 / 24 | code error | order | untouched, paper's pace | gap |
|---|---|---|---|---|---|---|---|---|---|---|"""


def row(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    way = {kind: joined(found[kind]["error"].values()) for kind in ("single", "backward", "superpose")}
    over = {kind: joined(found[kind]["over_singles"].values(), 2) for kind in ("superpose", "switch", "together")}
    frames = "; ".join(
        joined([curve["mean"][n * STEPS - 1] for n in (1, 2, 3)], 1) for curve in found["carried"].values()
    )
    cells = [
        way["single"], way["backward"], f"{way['superpose']} ({over['superpose']})",
        f"{joined(found['together']['error'].values())} ({over['together']})", over["switch"], frames,
        joined(found["code"]["mean"], 2), joined(found["order"]["mean"], 2), joined(found["paper"]["mean"]),
        joined([100 * value for value in found["gap"]["mean"]], 1) + " %",
    ]  # fmt: skip
    return f"| `{name}` | " + " | ".join(cells) + " |"


def joined(values: Any, digits: int = 0) -> str:
    """Figures with slashes between them."""
    return "/".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    main()
