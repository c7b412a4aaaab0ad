"""What settings buy: rows of one preset's training, each with a setting changed, over seeds.

    python -m experiments.settings straight --mnist ~/mnist --seeds 0 1 2

trains what is not yet in ``experiments/results``, and prints the table: figures are means over the seeds, with the smallest
and the largest of a seed in brackets where they are of one number. Tables:

- ``straight``: what straightens the paths of `mnist-small`, by weight: Hamilton-Jacobi, bending, acceleration, solver error;
- ``room``: what its sizes, learning rate and parts buy;
- ``anywhere``: what each part of `mnist-any` buys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff
from experiments import RESULTS, anywhere
from flowfactor import training
from flowfactor.training import Config, load_config
from flowfactor.training.folder import holds_checkpoint


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: Its name, which its files have too.
        model: Settings of the model that differ from the preset's.
        data: Options of the data that differ.
        train: Settings of the training that differ.
        rises: Whether the weight of the Hamilton-Jacobi equation rises from 0, in proportion to the steps made.
        beside: How far from the path (standard deviation of each dimension) the equation holds too, at the weight that
            ``bending_weight`` has; 0 for a model whose bending is what it says.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    rises: bool = False
    beside: float = 0.0


def _bosh3(tolerance: float) -> dict[str, Any]:
    return {"method": "bosh3", "rtol": tolerance, "atol": tolerance, "norm": "batch", "remember_steps": True}


def _weighing(hj: float = 0.0, bending: float = 0.0, acceleration: float = 0.0, error: float = 0.0) -> dict[str, Any]:
    weights = {"hj": hj, "bending": bending, "acceleration": acceleration, "error": error}
    return {f"{name}_weight": float(weight) for name, weight in weights.items()}


_EULER = {"method": "euler", "step_size": 1.0}
_FREE = {"field": "free", **_weighing()}
_STATIONARY = {"name": "stationary", "potential": "mlp"}
_LESS_TIED = {"code_weight": 10.0}
# What mnist-any was when its parts were left out one at a time: no hidden layer in encoder and decoder, and a smaller tie.
_SHALLOW = {**_LESS_TIED, "encoder": {"local": True}, "decoder": {"local": True, "initial_mean": 0.1}}


def _local(activation: str = "silu", **options: Any) -> dict[str, Any]:
    return {"local": True, "activation": activation, **options}


_SKIPPED = {
    "encoder": _local(hidden=[256], skip=True),
    "decoder": _local(hidden=[256], skip=True, initial_mean=0.1),
}
_DECODER = _local(hidden=[256], initial_mean=0.1)
_NETWORKS = (
    ("no hidden layer in the encoder, ReLU", _local("relu"), _DECODER),
    ("no hidden layer in the encoder", _local(), _DECODER),
    ("no hidden layer in the encoder, 128 channels", _local(widths=[128]), _DECODER),
    ("no hidden layer in the encoder, 128 channels, GELU", _local("gelu", widths=[128]), _DECODER),
    ("512 units", _local(hidden=[512], skip=True), _DECODER),
    ("512 units, not skipped", _local(hidden=[512]), _DECODER),
    ("the decoder's skipped too", _SKIPPED["encoder"], _SKIPPED["decoder"]),
)

TABLES: Mapping[str, tuple[str, tuple[Row, ...]]] = {
    "straight": (
        "mnist-small",
        (
            Row("mnist-small: Hamilton-Jacobi 300, bending 100"),
            Row("no penalty", {"hj_weight": 0.0, "bending_weight": 0.0}),
            *(Row(f"Hamilton-Jacobi {w}", _weighing(hj=w)) for w in (100, 1000, 3000, 10000)),
            Row("Hamilton-Jacobi 10000, rising", _weighing(hj=10000), rises=True),
            Row("Hamilton-Jacobi 1000, and beside the path", _weighing(hj=1000, bending=1000), beside=0.3),
            Row("Hamilton-Jacobi 1000, learned force", {**_weighing(hj=1000), "force": "negative_square"}),
            *(Row(f"bending {w}", _weighing(bending=w)) for w in (30, 100, 300, 1000)),
            *(
                Row(f"Hamilton-Jacobi {w}, bending {b}", _weighing(hj=w, bending=b))
                for w, b in ((300, 300), (1000, 30), (1000, 100))
            ),
            *(Row(f"acceleration {w}", _weighing(acceleration=w)) for w in (30, 300, 1000)),
            Row("Hamilton-Jacobi 1000, acceleration 300", _weighing(hj=1000, acceleration=300)),
            *(Row(f"solver error {w}", _weighing(error=w)) for w in (100000, 1000000)),
        ),
    ),
    "room": (
        "mnist-small",
        (
            Row("mnist-small"),
            *(Row(f"{a} at rest", {"augment_dim": a}) for a in (0, 96, 288)),
            Row("D = 48, 96 at rest", {"latent_dim": 48, "augment_dim": 96}),
            Row("hidden (256, 256)", {"hidden": [256, 256]}),
            Row("hidden (64, 64)", {"hidden": [64, 64]}),
            Row("no time features", {"time_features": 0}),
            *(Row(f"learning rate {r}", train={"learning_rate": r}) for r in (4e-3, 16e-3)),
            Row("free field, the same room", _FREE),
            Row("Helmholtz, the same room", {"field": "helmholtz"}),
            Row("256 units, skipped, in encoder and decoder", _SKIPPED),
        ),
    ),
    "anywhere": (
        "mnist-any",
        (
            Row("mnist-any"),
            *(Row(name, {**_LESS_TIED, "encoder": e, "decoder": d}) for name, e, d in _NETWORKS),
            *(Row(f"code weight {w}", {"code_weight": float(w)}) for w in (0, 10, 100)),
            Row("commutator 1500", {"commutator_weight": 1500.0}),
            Row("free field", _FREE),
            Row("stationary potential", {"potential": _STATIONARY}),
            Row("stationary potential, Hamilton-Jacobi 100", {"potential": _STATIONARY, "hj_weight": 100.0}),
            # What follows lacks the hidden layers, as the preset did.
            Row("shallow", _SHALLOW),
            *(Row(f"shallow, commutator {w}", {**_SHALLOW, "commutator_weight": float(w)}) for w in (100, 3000)),
            Row("shallow, from the untouched digit", _SHALLOW, data={"start": "first"}),
            Row("shallow, forwards only", _SHALLOW, data={"direction": "forward"}),
            Row("shallow, with time", {**_SHALLOW, "time_features": 8}),
            Row("shallow, unit Euler steps", {**_SHALLOW, "solver": _EULER, "evaluation_solver": _EULER}),
            Row("shallow, codes not tied", {**_SHALLOW, "code_weight": 0.0}),
            Row("shallow, free field", {**_SHALLOW, **_FREE}),
        ),
    ),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.settings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--mnist", help="folder of MNIST's files (default: FLOWFACTOR_MNIST)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="length of each training")
    parser.add_argument("--minutes", type=float, help="the same in one thread's processor time, in place of steps")
    parser.add_argument(
        "--learning-rate", type=float, help="of all rows that say nothing of it (default: the preset's)"
    )
    parser.add_argument("--rows", nargs="+", help="names of rows to train (default: all)")
    parser.add_argument("--report", action="store_true", help="only report what has been measured")
    args = parser.parse_args()
    preset, rows = TABLES[args.table]
    unknown = sorted({*(args.rows or ())} - {row.name for row in rows})
    if unknown:
        parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(row.name for row in rows)}")
    torch.set_num_threads(1)
    length = f"{args.steps}" if args.minutes is None else f"{args.minutes:g}min"
    if args.learning_rate is not None:
        length += f"-{args.learning_rate:g}"
        rows = tuple(replace(row, train={"learning_rate": args.learning_rate, **row.train}) for row in rows)
    places = {row.name: [_place(args.table, row, length, seed) for seed in args.seeds] for row in rows}
    for i, seed in enumerate(args.seeds if not args.report else ()):
        for row in rows:
            if (args.rows is None or row.name in args.rows) and not places[row.name][i].with_suffix(".json").exists():
                print(f"{row.name}, seed {seed} ...", flush=True)
                config = configured(preset, row, args.mnist, seed, args.steps, args.minutes, places[row.name][i])
                found = run(config, row, args.table == "anywhere")
                places[row.name][i].with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    found = {row.name: _read(places[row.name]) for row in rows}
    if args.table == "anywhere":
        print(
            "\n".join([anywhere.HEADER, *(anywhere_line(name, results) for name, results in found.items() if results)])
        )
    else:
        print("\n".join([HEADER, *(line(name, results) for name, results in found.items() if results)]))


def configured(
    preset: str, row: Row, root: str | None, seed: int, steps: int, minutes: float | None, folder: Path
) -> Config:
    """The settings of one run."""
    config = load_config(preset)
    data = replace(config.data, root=root, options={**config.data.options, **row.data})
    length = {"steps": steps, "minutes": None} if minutes is None else {"steps": None, "minutes": minutes}
    train = replace(
        config.train, clock="processor", threads=1, evaluate_limit=1000, likelihood_limit=300, **{**length, **row.train}
    )
    return replace(config, data=data, model={**config.model, **row.model}, train=train, seed=seed, output=str(folder))


def run(config: Config, row: Row, is_anywhere: bool) -> dict[str, Any]:
    """Trains and measures one row with one seed; goes on where it was interrupted, but for a weight that rises."""
    folder = Path(config.output)
    resume = holds_checkpoint(folder) and not row.rises  # `rise` counts the steps of one process
    made = training.prepare(config, resume=resume, overwrite=not resume)
    if row.beside:
        made.model._bending = BesidePath(made.model.flow.field.potential, row.beside)
    if row.rises:
        assert config.train.steps is not None
        rise(made.model, config.train.steps)
    result = made.fit()
    if not result["finished"]:
        raise SystemExit(f"interrupted: the same command goes on from {folder}")
    made.model.eval()
    result["evaluations"] = evaluations(made.model, made.test)
    if is_anywhere:
        result["anywhere"] = anywhere.measure(made.model, config.data.root, 300)
    return result


def rise(model: Any, steps: int) -> None:
    """Lets the weight of the Hamilton-Jacobi equation rise in proportion to the steps made."""
    weight, made = model.hj_weight, 0

    def before(model: Any, given: Any) -> None:
        nonlocal made
        if model.training:
            made += 1
            model.hj_weight = weight * min(made / steps, 1.0)

    model.register_forward_pre_hook(before)


class BesidePath(torch.nn.Module):
    """The squared Hamilton-Jacobi residual around one random frame of the path, in place of `Bending`."""

    def __init__(self, potential: ff.potentials.Potential, scale: float) -> None:
        super().__init__()
        self.potential, self.scale = (potential,), scale  # a tuple: the model holds the potential, and saves it

    def forward(self, z: Tensor, t: Tensor, control: Any) -> Tensor:
        """Of frames ``z [T+1, B, D]``: the residual's square times the time, ``[B]``."""
        i = int(torch.randint(len(z), ()))
        found = self.potential[0].derivatives(z[i] + self.scale * torch.randn_like(z[i]), t[i], control)
        return (t[-1] - t[0]).abs() * (found.time + 0.5 * found.gradient.square().sum(-1)).square()


@torch.no_grad()
def evaluations(model: Any, data: Any, count: int = 96) -> list[int]:
    """Evaluations of the field by the training's solver, on a batch by each flow, once steps are remembered."""
    frames, t = torch.stack([data[i]["frames"] for i in range(count)]), data[0]["t"].float()
    model.train()
    try:
        found = []
        for k in range(data.num_flows):
            z = ff.objectives.draw(model.encode(frames[:, 0]), generator=torch.Generator().manual_seed(0))
            for _ in range(5):
                stats = model.flow(z, t, k).stats
            found.append(stats.nfe)
        return found
    finally:
        model.eval()


HEADER = """| settings | E_k | of the mean | arc over chord | evaluations | steps a second | ln p(x) a frame | same for all \
| code error | accurately |
|---|---|---|---|---|---|---|---|---|---|"""


def line(name: str, found: Sequence[dict[str, Any]]) -> str:
    """A row of the table: means over the seeds."""

    def mean(key: str, digits: int, scale: float = 1.0) -> str:
        rows = [result[key]["mean"] for result in found if result.get(key)]
        return anywhere.joined([scale * fmean(column) for column in zip(*rows, strict=True)], digits) if rows else ""

    def spread(values: Sequence[float], digits: int) -> str:
        return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    cells = [
        name if len(found) > 1 else f"{name} (one seed)",
        mean("equivariance", 0),
        spread([fmean(result["equivariance"]["mean"]) for result in found], 0),
        mean("arc_over_chord", 2),
        anywhere.joined(
            [fmean(column) for column in zip(*(result["evaluations"] for result in found), strict=True)], 0
        ),
        spread([result["steps_per_second"] for result in found], 1),
        spread([result["log_likelihood"]["per_frame"] for result in found], 1),
        mean("translation_share", 2),
        mean("latent_equivariance", 2),
        mean("solver_gap", 1, 100) + " %",
    ]
    return "| " + " | ".join(cells) + " |"


def anywhere_line(name: str, found: Sequence[dict[str, Any]]) -> str:
    """A row of what `experiments.anywhere` measures: means over the seeds."""
    return anywhere.row(
        name if len(found) > 1 else f"{name} (one seed)", averaged([each["anywhere"] for each in found])
    )


def averaged(found: Sequence[Any]) -> Any:
    """The mean of figures that lie alike in mappings and lists; what is no number is that of the first."""
    first = found[0]
    if isinstance(first, Mapping):
        return {name: averaged([each[name] for each in found]) for name in first}
    if isinstance(first, list):
        return [averaged(list(column)) for column in zip(*found, strict=True)]
    return fmean(found) if isinstance(first, float) else first


def _place(table: str, row: Row, length: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in row.name)
    return RESULTS / f"settings-{table}-{name}-{length}-{seed}"


def _read(places: Sequence[Path]) -> list[dict[str, Any]]:
    files = [place.with_suffix(".json") for place in places]
    return [json.loads(file.read_text()) for file in files if file.exists()]


if __name__ == "__main__":
    main()
