"""Weak supervision where transformations are unequally frequent: what the balanced estimator's assumption costs.

Trains the model of the preset ``mnist-weak`` on sequences whose transformations (scaling, rotation, colouring) are drawn
with given frequencies, and measures on test digits, every transformation alike, how well q(k|x) tells them apart:

- ``balanced``: the preset's estimator, which imposes equal marginals;
- ``balanced, prior known``: the same, told the frequencies as ``factor_prior``;
- ``balanced, soft``: marginals held at ``balance=0.5`` only, so that they give way as the temperature falls;
- ``enumerate`` and ``gumbel``: no marginals are imposed.

``python -m experiments.frequencies --mnist DIR`` trains what is not yet in ``experiments/results`` and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

import flowfactor as ff
from experiments import RESULTS
from experiments.composition import write
from flowfactor import training
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.matched import match_flows

VARIANTS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "balanced, prior known": {"factor_prior": True},
    "balanced, soft": {"estimator": {"name": "balanced", "balance": 0.5}},
    "enumerate": {"estimator": "enumerate"},
    "gumbel": {"estimator": "gumbel"},
}
TEST_DIGITS = 1000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.frequencies", description=__doc__)
    parser.add_argument("--mnist", help="folder of MNIST's files (default: FLOWFACTOR_MNIST)")
    parser.add_argument("--frequencies", nargs="+", type=float, default=[0.1, 0.3, 0.6])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.steps < 1 or args.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    if len(args.frequencies) != 3 or min(args.frequencies) <= 0 or abs(sum(args.frequencies) - 1) > 1e-6:
        parser.error("--frequencies are three positive shares that sum to 1")
    torch.set_num_threads(args.threads)
    rows = []
    for variant in args.variants:
        made = []
        for seed in args.seeds:
            shares = "-".join(f"{100 * share:g}" for share in args.frequencies)
            path = (
                RESULTS
                / f"frequencies-{shares}-{variant.replace(', ', '-').replace(' ', '-')}-{args.steps}-{seed}.json"
            )
            if not path.exists():
                print(f"{variant}, seed {seed} ...", flush=True)
                write(path, run(variant, seed, args.mnist, args.frequencies, args.steps))
            made.append(json.loads(path.read_text()))
        rows.append(row(variant, made))
    print(f"\n{args.steps} steps, {len(args.seeds)} seeds, {TEST_DIGITS} test digits under every transformation\n")
    print("| estimator | factor accuracy | of each transformation | share of q(k), training |\n|---|---|---|---|")
    print("\n".join(rows))


def run(variant: str, seed: int, root: str | None, frequencies: list[float], steps: int) -> dict[str, Any]:
    """Trains and measures one model."""
    torch.manual_seed(seed)
    config = training.load_config("mnist-weak")
    settings = config.model | VARIANTS[variant] | {"anneal_steps": steps // 2}
    if settings.get("factor_prior"):
        settings["factor_prior"] = frequencies
    data, test = (ff.data.MNIST(root, split) for split in ("train", "test"))
    sizes = (data.images.shape[-2], data.images.shape[-1])
    model = ff.models.build_model("ours-weak", (3, *sizes), num_frames=len(data.t), **_of_method(settings))
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), config.train.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.train.learning_rate, total_steps=steps, pct_start=0.05
    )
    generator, shares = torch.Generator().manual_seed(seed), torch.tensor(frequencies)
    batch_size, inferred = config.train.batch_size, []
    for step in range(steps):
        index = torch.randint(len(data), (batch_size,), generator=generator)
        k = torch.multinomial(shares, batch_size, replacement=True, generator=generator)
        batch = data.batch(index, k)
        optimiser.zero_grad()
        model(batch["frames"], batch["t"]).loss.backward()
        optimiser.step()
        schedule.step()
        if step >= steps - 20:
            with torch.no_grad():
                inferred.append(model.infer_factor(batch["frames"]).probs.mean(0))
    found = match_flows(model.eval(), test, limit=TEST_DIGITS)
    usage = torch.stack(inferred).mean(0)[found.order]
    return {
        "variant": variant, "seed": seed, "frequencies": frequencies, "steps": steps,
        "accuracy": found.accuracy.value, "per_factor": per_factor(model, test, found.order), "usage": usage.tolist(),
    }  # fmt: skip


def _of_method(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what the method fixes, and without a temperature where the estimator has none."""
    names = {"supervision"} if settings["estimator"] in ("balanced",) else {"supervision", "tau"}
    return {name: value for name, value in settings.items() if name not in names}


@torch.no_grad()
def per_factor(model: Any, data: ff.data.SequenceDataset, order: torch.Tensor) -> list[float]:
    """Accuracy on the sequences of each transformation."""
    found = []
    for k in range(data.num_flows):
        frames = data.batch(draw_elements(len(data), TEST_DIGITS), k)["frames"]
        guess = torch.cat([model.infer_factor(x).probs.argmax(-1) for x in frames.split(250)])
        found.append(float((guess == order[k]).double().mean()))
    return found


def row(variant: str, made: list[dict[str, Any]]) -> str:
    """A line of the table: means over seeds, and the smallest and largest accuracy."""
    values = [one["accuracy"] for one in made]
    spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
    each, usage = (
        " / ".join(f"{statistics.mean(one[name][k] for one in made):.1%}" for k in range(3))
        for name in ("per_factor", "usage")
    )
    return f"| {variant} | {statistics.mean(values):.1%}{spread} | {each} | {usage} |"


if __name__ == "__main__":
    main()
