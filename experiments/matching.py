"""Whether flows can be trained without simulating them: matched to encoded frames first, solved in a short phase at the end.

Each run trains a gradient flow of 96 dimensions on coloured MNIST for some seconds of one thread's processor time (which
other programs do not shorten), otherwise as ``experiments/euler/mnist.yaml``, and measures it on test digits:

- ``simulated``: by the path bound throughout, solved by bosh3;
- ``flow`` and ``action``: in a first share of the time two neighbouring frames of each sequence are encoded and decoded, and
  the field is fitted to the line between their codes, by `FlowMatching` or `ActionMatching`; then as ``simulated``;
- ``flow-stopped``: as ``flow``, with the codes as targets that the matching does not move. So are those of ``action``, whose
  loss has no lower bound in the codes: it falls as they move apart;
- ``flow-ends``: as ``flow``, with the first and the last frame encoded, and two frames decoded from the line between them.

``python -m experiments.matching --mnist DIR`` trains what is not yet in ``experiments/results``, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.run import machine
from experiments import EULER, RESULTS
from experiments.composition import endless, write
from flowfactor import objectives, training

STEPS, DIGITS = 8, 1000  # frames trained on; test digits that figures are measured on
MATCHINGS = {"flow": ff.regularizers.FlowMatching, "action": ff.regularizers.ActionMatching}
VARIANTS = ("simulated", "flow", "flow-stopped", "flow-ends", "action")
SOLVER = {"method": "bosh3", "rtol": 1e-2, "atol": 1e-2, "norm": "batch", "remember_steps": True}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.matching", description=__doc__)
    parser.add_argument("--mnist", help="folder of MNIST's files (default: FLOWFACTOR_MNIST)")
    parser.add_argument("--seconds", type=float, default=100.0, help="length of each training, in processor time")
    parser.add_argument("--share", type=float, default=0.7, help="share of it that is matched, in (0, 1)")
    parser.add_argument("--weight", type=float, default=10.0, help="weight of the matching in the loss")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--report", action="store_true", help="only report what has been measured")
    args = parser.parse_args()
    if not (args.seconds > 0 and 0 < args.share < 1 and args.weight > 0):
        parser.error("--seconds and --weight must be above 0, and --share between 0 and 1")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for seed in args.seeds if not args.report else ():
        for variant in args.variants:
            path = result_path(variant, args.seconds, args.share, args.weight, seed)
            if not path.exists():
                print(f"{path.stem} ...", flush=True)
                write(path, run(variant, seed, args.mnist, args.seconds, args.share, args.weight))
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("matching-*.json"))]
    if not found:
        parser.error("nothing has been measured yet")
    print(table(found))


def result_path(variant: str, seconds: float, share: float, weight: float, seed: int) -> Path:
    """Where a result is written: by all that it depends on."""
    settings = "" if variant == "simulated" else f"-{share:g}-{weight:g}"
    return RESULTS / f"matching-{variant}-{seconds:g}{settings}-{seed}.json"


def run(variant: str, seed: int, root: str | None, seconds: float, share: float, weight: float) -> dict[str, Any]:
    """Trains one model and measures it."""
    train = ff.data.MNIST(root, "train", steps=STEPS)
    test = ff.data.MNIST(root, "test", steps=STEPS)
    model, phases = fit(train, variant, seed, seconds, share, weight, test)
    settings = {} if variant == "simulated" else {"share": share, "weight": weight}
    return {
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        **settings,
        "machine": machine(1),
        "flows": list(test.flow_names),
        "phases": phases,
        **measured(model, test),
    }


def fit(
    data: Any, variant: str, seed: int, seconds: float, share: float, weight: float, test: Any = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains a model; returns it, and what each phase came to: its steps, and E_k on test sequences where they are given."""
    torch.manual_seed(seed)
    config = training.load_config(EULER)
    model = build(data, config.model)
    optimiser = torch.optim.AdamW(
        model.parameters(), config.train.learning_rate, config.train.betas, weight_decay=config.train.weight_decay,
        fused=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    batches = endless(data.loader(config.train.batch_size, generator=generator))
    loss = Matched(model, variant, weight, generator) if variant != "simulated" else None
    phases = []
    for phase, part in (("matched", share), ("simulated", 1 - share)) if loss else (("simulated", 1.0),):
        how = loss if loss and phase == "matched" else lambda batch: model.loss(batch, generator=generator)
        # The rate falls at the end alone.
        kind = "constant" if phase == "matched" else "cosine"
        schedule = training.LearningRateSchedule(minutes=part * seconds / 60, warmup=config.train.warmup, kind=kind)
        steps = descend(how, batches, optimiser, schedule, config.train.learning_rate)
        error = None if test is None else ff.metrics.equivariance_error(model.eval(), test, limit=DIGITS).mean.tolist()
        model.train()
        phases.append({"phase": phase, "steps": steps, "E_k": error})
    return model, phases


def build(data: Any, settings: dict[str, Any]) -> Any:
    """The model of the preset, with a gradient field of 96 dimensions that is solved adaptively."""
    chosen = {"field": "gradient", "latent_dim": 96, "hidden": [128, 128], "solver": SOLVER}
    return ff.models.build_model("ours", data.image_shape, data.num_flows, num_frames=STEPS + 1, **(settings | chosen))


def descend(loss: Any, batches: Any, optimiser: Any, schedule: Any, rate: float) -> int:
    """Trains until the schedule's end; returns the steps."""
    begun, steps = time.process_time(), 0
    while (progress := schedule.progress(steps, time.process_time() - begun)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(progress)
        value = loss(next(batches))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        steps += 1
    return steps


class Matched:
    """The loss of the phase without solves, from lines between the codes of two frames of each sequence.

    Two neighbouring frames, or the first and the last, are encoded, with the noise of the posterior shared, so that it moves
    along with the codes; two frames are decoded, from the line between the codes (neighbours: from the codes themselves);
    the field is fitted to the line. What is drawn is weighted up to the whole sequence: its reconstruction, one divergence
    from the prior (the mean of both frames'), and the matching integrated over time.

    Args:
        model: The model.
        variant: One of `VARIANTS` but ``simulated``.
        weight: Weight of the matching.
        generator: Source of all draws.
    """

    def __init__(self, model: Any, variant: str, weight: float, generator: torch.Generator) -> None:
        name, _, how = variant.partition("-")
        self.model, self.matching, self.how = model, MATCHINGS[name](), how
        self.stopped = how == "stopped" or name == "action"
        self.weight, self.generator = weight, generator

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch of sequences, a scalar."""
        model, frames, k = self.model, batch["frames"], batch["k"]
        count, total = frames.shape[:2]
        coded, seen = self.chosen(count, total)
        row, t = torch.arange(count), batch["t"]
        q = model.encode(frames[row, coded])
        z = q.mean + q.stddev * torch.randn(q.mean.shape[1:], generator=self.generator)
        share = ((t[seen] - t[coded[0]]) / (t[coded[1]] - t[coded[0]])).unsqueeze(-1)
        fit = total * model.decoder(torch.lerp(z[:1], z[1:], share)).log_prob(frames[row, seen]).mean(0)
        divergence = objectives.start_divergence(q, model.prior, z, 0).mean(0)
        states = z.detach() if self.stopped else z
        intervals = (total - 1) / (coded[1] - coded[0])
        apart = intervals * self.matching(model.flow, states, t[coded], k, generator=self.generator)
        return (divergence - fit + self.weight * apart).mean()

    def chosen(self, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Which frames of each sequence are encoded and which decoded, ``[2, count]`` each."""
        if self.how == "ends":
            ends = torch.tensor([[0], [total - 1]]).expand(2, count)
            return ends, objectives.choose_frames(total, 2, count, ends.device, self.generator)[0]
        first = torch.randint(total - 1, (count,), generator=self.generator)
        return torch.stack([first, first + 1]), torch.stack([first, first + 1])


def measured(model: Any, test: Any) -> dict[str, Any]:
    """E_k by the model's solver and by an accurate one; the bound, straightness, and how codes follow flows."""
    model.eval()
    gap = ff.metrics.solver_gap(model, test, limit=DIGITS)
    with torch.no_grad():
        batch = test.batch(range(min(DIGITS, len(test))))
        terms = model(batch["frames"], batch["t"], batch["k"], generator=torch.Generator().manual_seed(0))
    return {
        "E_k": gap.own.tolist(),
        "E_k accurate": gap.accurate.tolist(),
        "bound": (terms.reconstruction - terms.kl).item() / (STEPS + 1),
        "arc over chord": ff.metrics.arc_over_chord(model, test, limit=DIGITS).mean.tolist(),
        "latent error": ff.metrics.latent_equivariance_error(model, test, limit=DIGITS).mean.tolist(),
        "doing nothing": ff.metrics.equivariance_error(model, test, limit=DIGITS).doing_nothing.tolist(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown, a run a line; errors of the flows one after another."""
    lines = [
        "| training | s | share, weight | seed | steps | E_k, matched | E_k | solved accurately | bound | arc over chord | "
        "latent error |",
        "|---" * 11 + "|",
    ]
    for r in sorted(found, key=lambda r: (r["seconds"], VARIANTS.index(r["variant"]), r["seed"])):
        first = r["phases"][0]
        cells = [
            r["variant"],
            f"{r['seconds']:g}",
            f"{r['share']:g}, {r['weight']:g}" if "share" in r else "",
            str(r["seed"]),
            " + ".join(f"{phase['steps']:,}" for phase in r["phases"]),
            _of_flows(first["E_k"], 0) if first["phase"] == "matched" else "",
            _of_flows(r["E_k"], 0),
            _of_flows(r["E_k accurate"], 0),
            f"{r['bound']:.1f}",
            _of_flows(r["arc over chord"], 2),
            _of_flows(r["latent error"], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, f"\nDoing nothing: {_of_flows(found[0]['doing nothing'], 0)}."])


def _of_flows(values: list[float], digits: int) -> str:
    return "/".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    main()
