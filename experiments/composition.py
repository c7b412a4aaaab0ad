"""How well flows compose and carry on: superposed, switched midway, past the training times, on what was held out.

Each run trains the model of ``experiments/euler/mnist.yaml`` for some minutes of one thread's processor time (which other
programs do not shorten), and measures it on test digits:

- ``single``: on sequences of one transformation each, as the preset does;
- ``combined``: on single, superposed and switching sequences in equal shares, with the true weights as the control;
- ``held-out``: as ``single``, without the digits 8 and 9.

``python -m experiments.composition --mnist DIR`` trains what is not yet in ``experiments/results``, prints the tables and
draws the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.run import machine
from experiments import EULER, RESULTS
from flowfactor import training
from flowfactor.metrics.composition import as_control
from flowfactor.metrics.draw import draw_elements

VARIANTS = ("single", "combined", "held-out")
FIGURE = Path(__file__).parents[1] / "docs/assets/extrapolation.png"
STEPS, PER_KIND, DIGITS = 8, 1000, 1000  # frames trained on; test sequences of each kind; test digits of each curve


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.composition", description=__doc__)
    parser.add_argument("--mnist", help="folder of MNIST's files (default: FLOWFACTOR_MNIST)")
    parser.add_argument("--minutes", type=float, default=3.0, help="length of each training, in processor time")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--report", action="store_true", help="only report what has been measured")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error("--minutes must be above 0")
    torch.set_num_threads(1)
    for seed in args.seeds if not args.report else ():
        for variant in args.variants:
            path = RESULTS / f"composition-{variant}-{seed}.json"
            if not path.exists():
                print(f"{variant}, seed {seed} ...", flush=True)
                write(path, run(variant, seed, args.mnist, args.minutes))
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("composition-*.json"))]
    if not found:
        parser.error("nothing has been measured yet")
    print("\n\n".join(tables(found)))
    draw(found)


def run(variant: str, seed: int, root: str | None, minutes: float) -> dict[str, Any]:
    """Trains one model and measures it."""
    train = ff.data.MNIST(root, "train", steps=STEPS)
    test = ff.data.MNIST(root, "test", steps=STEPS)
    if variant == "held-out":
        train = train.subset(train.labels < 8)
    if variant == "combined":
        train = ff.data.CombinedImages(
            train.images, ff.data.paper_transforms(STEPS), STEPS, colour="red", seed=seed + 1
        )
    model, steps = fit(train, seed, minutes)
    model.eval()
    return {
        "variant": variant,
        "seed": seed,
        "minutes": minutes,
        "steps": steps,
        "machine": machine(1),
        "flows": list(test.flow_names),
        "single": ff.metrics.equivariance_error(model, test, limit=PER_KIND).as_dict(),
        "composition": compositions(model, test),
        "curves": curves(model, root),
        "classes": {
            name: ff.metrics.equivariance_error(model, test.subset(rows), limit=PER_KIND).as_dict()
            for name, rows in (("0-7", test.labels < 8), ("8-9", test.labels >= 8))
        },
        "digits": ff.metrics.equivariance_error(model, ff.data.Digits("all", steps=STEPS)).as_dict(),
    }


def fit(data: Any, seed: int, minutes: float) -> tuple[Any, int]:
    """Trains the preset's model with the preset's optimiser and schedule."""
    config = training.load_config(EULER)
    settings = config.train
    torch.manual_seed(seed)
    model = ff.models.build_model("ours", data.image_shape, data.num_flows, num_frames=STEPS + 1, **config.model)
    optimiser = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    schedule = training.LearningRateSchedule(minutes=minutes, warmup=settings.warmup, kind=settings.schedule)
    generator = torch.Generator().manual_seed(seed)
    loader = data.loader(settings.batch_size, generator=generator)
    begun = time.process_time()
    for steps, batch in enumerate(endless(loader)):
        progress = schedule.progress(steps, time.process_time() - begun)
        if progress >= 1:
            return model, steps
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * schedule(progress)
        control = as_control(batch["weights"], batch["t"]) if "weights" in batch else batch["k"]
        loss = model(batch["frames"], batch["t"], control, generator=generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    raise AssertionError("the loader has no end")


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def compositions(model: Any, test: Any) -> dict[str, Any]:
    """Errors by kind, and of each pair of transformations superposed."""
    images = test.images[draw_elements(len(test), 3 * PER_KIND)]
    data = ff.data.CombinedImages(images, ff.data.paper_transforms(STEPS), STEPS, colour="red", seed=0)
    result = ff.metrics.composition_error(model, data).as_dict()
    active = data.weights.any(1)
    superposed = data.mode == data.modes.index("superpose")
    pairs = {}
    for first, second in combinations(range(data.num_flows), 2):
        rows = superposed & active[:, first] & active[:, second]
        error = ff.metrics.composition_error(model, data.subset(rows))
        alone = data.weights.new_zeros(int(rows.sum()), STEPS, data.num_flows)
        pairs[f"{data.flow_names[first]} + {data.flow_names[second]}"] = {
            **error.error.as_dict(),
            "doing_nothing": error.doing_nothing,
            "each": [one_flow(model, data, rows, alone, k) for k in (first, second)],
        }
    return {**result, "pairs": pairs}


def one_flow(model: Any, data: Any, rows: Tensor, weights: Tensor, k: int) -> float:
    """The error of flow k alone on the same digits."""
    weights = weights.clone()
    weights[..., k] = 1
    frames = data.transform(data.images[rows].float() / 255, weights)
    batch = {"frames": frames, "t": data.t, "weights": weights}
    return float(ff.metrics.composition_error(model, [batch]))


def curves(model: Any, root: str | None) -> dict[str, Any]:
    """Errors over twice the training times."""
    long = ff.data.MNIST(root, "test", transforms=ff.data.paper_transforms(2 * STEPS), steps=2 * STEPS)
    found = {}
    for k, name in enumerate(long.flow_names):
        batch = long.batch(draw_elements(len(long), DIGITS), k=k)
        curve = ff.metrics.extrapolation_error(model, batch["frames"], batch["t"], k, trained_until=STEPS)
        found[name] = curve.as_dict()
    return found


def tables(found: list[dict[str, Any]]) -> list[str]:
    """The results as Markdown: means over seeds, with the smallest and the largest."""
    by = {variant: [r for r in found if r["variant"] == variant] for variant in VARIANTS}
    by = {variant: runs for variant, runs in by.items() if runs}
    return [_composition(by), _pairs(by), _extrapolation(by), _held_out(by)]


def _composition(by: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| trained on | steps | single | superposed | switching | superposed / single | switching / single |"]
    lines.append("|---|---|---|---|---|---|---|")
    for variant, runs in by.items():
        kinds = {k: [r["composition"]["by_kind"][k]["value"] for r in runs] for k in ("single", "superpose", "switch")}
        ratios = [[b / a for a, b in zip(kinds["single"], kinds[k], strict=True)] for k in ("superpose", "switch")]
        cells = [_spread(values) for values in kinds.values()] + [_spread(ratio, 2) for ratio in ratios]
        lines.append(f"| {variant} | {_spread([r['steps'] for r in runs])} | " + " | ".join(cells) + " |")
    rest = next(iter(by.values()))[0]["composition"]["doing_nothing_by_kind"]
    nothing = " | ".join(f"{rest[k]:.0f}" for k in ("single", "superpose", "switch"))
    return "\n".join([*lines, f"| doing nothing | | {nothing} | | |"])


def _pairs(by: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| trained on | superposed | E | each alone | E / their mean | doing nothing |",
        "|---|---|---|---|---|---|",
    ]
    for variant, runs in by.items():
        for pair in runs[0]["composition"]["pairs"]:
            values = [r["composition"]["pairs"][pair] for r in runs]
            alone = " and ".join(_spread([v["each"][i] for v in values]) for i in (0, 1))
            ratio = _spread([v["value"] / (sum(v["each"]) / 2) for v in values], 2)
            both, rest = _spread([v["value"] for v in values]), f"{values[0]['doing_nothing']:.0f}"
            lines.append(f"| {variant} | {pair} | {both} | {alone} | {ratio} | {rest} |")
    return "\n".join(lines)


def _extrapolation(by: dict[str, list[dict[str, Any]]]) -> str:
    at = [4, 8, 10, 12, 14, 16]
    lines = ["| trained on | transformation | " + " | ".join(f"t = {t}" for t in at) + " |", "|---" * 8 + "|"]
    for variant, runs in by.items():
        for name in runs[0]["flows"]:
            cells = [_spread([r["curves"][name]["mean"][t - 1] for r in runs], 1) for t in at]
            lines.append(f"| {variant} | {name} | " + " | ".join(cells) + " |")
    some = next(iter(by.values()))[0]
    for name in some["flows"]:
        cells = [f"{some['curves'][name]['doing_nothing'][t - 1]:.0f}" for t in at]
        lines.append(f"| doing nothing | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _held_out(by: dict[str, list[dict[str, Any]]]) -> str:
    flows = next(iter(by.values()))[0]["flows"]
    lines = ["| trained on | measured on | n | " + " | ".join(flows) + " |", "|---" * (3 + len(flows)) + "|"]
    sets = {"test digits 0-7": ("classes", "0-7"), "test digits 8 and 9": ("classes", "8-9"), "scikit-learn's": None}
    for label, keys in sets.items():
        for variant, runs in by.items():
            results = [r["digits"] if keys is None else r[keys[0]][keys[1]] for r in runs]
            cells = [_spread([result["mean"][k] for result in results]) for k in range(len(flows))]
            lines.append(f"| {variant} | {label} | {results[0]['count']:,} | " + " | ".join(cells) + " |")
        lines.append(
            f"| doing nothing | {label} | | " + " | ".join(f"{v:.0f}" for v in results[0]["doing_nothing"]) + " |"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 0) -> str:
    """The mean, and after it the smallest and the largest of several."""
    mean = f"{sum(values) / len(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def draw(found: list[dict[str, Any]]) -> None:
    """Draws the curves of extrapolation, one thin line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    names = found[0]["flows"]
    axes = figure.subplots(1, len(names), sharey=True)
    colours = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    shown = [r for r in found if r["variant"] != "held-out"]
    for ax, name in zip(axes, names, strict=True):
        for index, result in enumerate(shown):
            curve, variant = result["curves"][name], result["variant"]
            first = all(r["variant"] != variant for r in shown[:index])
            ax.plot(
                curve["t"],
                curve["mean"],
                color=colours[variant],
                lw=1.4,
                label=f"trained on {variant}" if first else None,
            )
        ax.plot(curve["t"], curve["doing_nothing"], color="0.55", lw=1.2, ls="--", label="doing nothing")
        ax.axvspan(STEPS, 2 * STEPS, color="0.94", zorder=0, label="beyond training")
        ax.set(title=name, xlabel="t (frames)", xlim=(1, 2 * STEPS), xticks=[1, *range(4, 2 * STEPS + 1, 4)])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="error of a frame", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    ff.plot.save(figure, FIGURE, dpi=110)
    print(f"\ndrawn: {FIGURE}")


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
