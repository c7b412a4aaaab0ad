"""A whole training step of a preset: steps per second of several solvers, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data import Stream, digits
from benchmarks.problem import same
from benchmarks.timing import Readings, Row, Target, interleaved
from experiments import EULER
from flowfactor import objectives
from flowfactor.data.base import Batch
from flowfactor.models import build_model
from flowfactor.training import load_config, prepare_process

PARTS: tuple[str, ...] = ("data", "encoder", "flow", "decoder", "optimizer")
SOLVERS: dict[str, dict[str, Any]] = {
    "euler": {"method": "euler"},
    "rk4": {"method": "rk4"},
    "dopri5 at 1e-3": {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3},
}
FORMATS = ("bfloat16 autocast", "channels-last")
"""What a user may try on top of unit Euler steps."""
WARM_UP = 15.0  # seconds of training before anything is timed: a flow that does nothing yet is solved in no time
_STEPS = 6  # steps of a reading


class Trainer:
    """A model of the preset in training, step by step, whole or cut into its parts.

    Args:
        solver: Keyword arguments of the solver; None for the preset's own.
        dataset: The sequences.
        form: One of `FORMATS`, or None.
        preset: The preset.
    """

    def __init__(
        self, solver: dict[str, Any] | None, dataset: Any, form: str | None = None, preset: str | Path = EULER
    ) -> None:
        config = load_config(preset)
        settings = config.model if solver is None else config.model | {"solver": solver}
        shape: dict[str, Any] = {
            "image_shape": dataset.image_shape,
            "num_flows": dataset.num_flows,
            "num_frames": len(dataset.t),
        }
        torch.manual_seed(0)
        self.model: Any = build_model(config.method, **shape, **settings).train()
        if form == "channels-last":
            self.model.to(memory_format=torch.channels_last)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=form == "bfloat16 autocast")
        rate, betas = config.train.learning_rate, config.train.betas
        groups = getattr(self.model, "parameter_groups", lambda: [{"params": list(self.model.parameters())}])()
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=0.0, fused=True)
        self.stream = Stream(dataset, config.train.batch_size)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """A training step as a user makes it."""
        batch = self.stream()
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(batch["frames"], batch["t"], batch["k"], generator=self.generator).loss
        loss.backward()
        self.optimizer.step()

    def parts(self) -> dict[str, float]:
        """The same step cut at the latents: milliseconds of each part, its backward pass included."""
        clock = _Clock()
        batch = self.stream()
        clock.count("data")
        self.optimizer.zero_grad()
        self.cut(batch, clock.count)
        clock.begin()
        self.optimizer.step()
        clock.count("optimizer")
        return clock.spent

    def cut(self, batch: Batch, count: Callable[[str], None] = lambda part: None) -> Tensor:
        """Loss and gradients of a batch, part by part; ``count`` is told at the end of each what it was."""
        model, generator, t, k = self.model, self.generator, batch["t"], batch["k"]
        begin = model._begin(model._checked(batch["frames"], t), k, generator)
        start, density = begin.z, begin.start
        count("encoder")
        z0 = start.detach().requires_grad_()
        times = model._lazy(generator, z0.device)
        path = model.flow(z0, t, k, costs=model._costs(times), generator=generator)
        of_flow = model._penalties(model._regularizers(path, z0, k, t, times)).mean()
        count("flow")
        z = path.z.detach().requires_grad_()
        frames, wanted = batch["frames"], model.frames_per_step
        reconstruction = objectives.sequence_log_likelihood(model.decoder, frames, z, wanted, generator).mean()
        (-reconstruction).backward()
        count("decoder")
        ends = [(path.z, z.grad), (of_flow, torch.ones_like(of_flow))][: 2 if times else 1]
        torch.autograd.backward(*zip(*ends, strict=True))
        count("flow")
        kl = model.kl_weight * density.mean()
        torch.autograd.backward([start, kl], [z0.grad, torch.ones_like(kl)])
        count("encoder")
        return (kl - reconstruction + of_flow).detach()

    def nfe(self) -> int:
        """Evaluations that a solve takes now."""
        batch = self.stream()
        with torch.no_grad():
            given = self.model._checked(batch["frames"], batch["t"])
            z0 = self.model._begin(given, batch["k"], self.generator).z
            return self.model.flow(z0, batch["t"], batch["k"]).stats.nfe

    def check_cut(self) -> None:
        """Stops the benchmark unless the step in parts has the loss and the gradients of the whole one."""
        batch, state = self.stream(), self.generator.get_state()
        buffers = {name: x.clone() for name, x in self.model.named_buffers()}  # steps that are remembered among them
        self.optimizer.zero_grad()
        loss = self.model(batch["frames"], batch["t"], batch["k"], generator=self.generator).loss
        loss.backward()
        whole = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        self.generator.set_state(state)
        self.model.load_state_dict(buffers, strict=False)
        same(self.cut(batch), loss.detach(), 1e-4, "loss of the step in parts")
        parts = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        same(parts, whole, 1e-3, "gradient of the step in parts")


class _Clock:
    """Adds up the milliseconds of named parts."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.begin()

    def begin(self) -> None:
        self.mark = time.perf_counter()

    def count(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[part] += (now - self.mark) * 1e3
        self.mark = now


def _prepared() -> Any:
    """The digits and their name, in a process set up as training programs are; None where there are none."""
    found = digits()
    if found is None:
        print("  neither MNIST nor scikit-learn is at hand: left out")
    else:
        prepare_process()
    return found


def training_step(repeats: int, warm_up: float = WARM_UP) -> list[Row]:
    """Steps per second of the preset with each solver, and the share of data, encoder, flow, decoder and optimizer.

    Each solver trains a model of its own for a while before it is timed, since the evaluations that an adaptive solver
    needs depend on what the flow has learned. Freed memory is kept, as in all training programs, by the whole process.
    """
    found = _prepared()
    if found is None:
        return []
    dataset, name = found
    trainers = {solver: Trainer(options, dataset) for solver, options in SOLVERS.items()}
    steps: dict[str, int] = {}
    for solver, trainer in trainers.items():
        trainer.check_cut()
        end, steps[solver] = time.monotonic() + warm_up, 0
        while time.monotonic() < end:
            trainer.step()
            steps[solver] += 1
    formats = {form: Trainer(SOLVERS["euler"], dataset, form) for form in FORMATS}
    timed = {name: _several(trainer.step) for name, trainer in (trainers | formats).items()}
    times = interleaved(timed, repeats, at_least=0.0)
    rates = {solver: readings.rate(_STEPS, "steps/s") for solver, readings in times.items()}
    rows = []
    for solver, trainer in trainers.items():
        row = Row("training", f"{name}, {solver}", rates[solver])
        if solver != "euler":
            row.other, row.other_name = rates["euler"], "euler"
            row.target = Target(0.75, "at least") if solver.startswith("dopri5") else None
        row.notes = {"evaluations a solve": trainer.nfe(), f"steps in {warm_up:g} s before": steps[solver]}
        rows.append(row)
    rows += [Row("training", f"{name}, euler, {form}", rates[form], rates["euler"], "euler") for form in FORMATS]
    readings = {solver: [] for solver in trainers}
    for _ in range(max(repeats, 1)):
        for solver, trainer in trainers.items():
            readings[solver].append(_mean([trainer.parts() for _ in range(_STEPS)]))
    return rows + [row for solver, turns in readings.items() for row in _shares(solver, turns)]


def adaptive_step(repeats: int, warm_up: float = 4 * WARM_UP) -> list[Row]:
    """Steps per second of the preset ``mnist-small``, solved adaptively, against unit Euler steps of the same model."""
    found = _prepared()
    if found is None:
        return []
    dataset, name = found
    own = "its own solver"
    trainers = {
        side: Trainer(how, dataset, None, "mnist-small") for side, how in ((own, None), ("euler", SOLVERS["euler"]))
    }
    for trainer in trainers.values():
        trainer.check_cut()
        end = time.monotonic() + warm_up
        while time.monotonic() < end:
            trainer.step()
    times = interleaved({side: _several(trainer.step) for side, trainer in trainers.items()}, repeats, at_least=0.0)
    ours, euler = (times[side].rate(_STEPS, "steps/s") for side in (own, "euler"))
    row = Row("adaptive", f"mnist-small on {name}, {own}", ours, euler, "euler", target=Target(0.85, "at least"))
    row.notes = {"evaluations a solve": trainers[own].nfe(), "by Euler steps": trainers["euler"].nfe()}
    turns = [_mean([trainers[own].parts() for _ in range(_STEPS)]) for _ in range(max(repeats, 1))]
    return [row, *_shares(own, turns, "adaptive")]


def _several(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_STEPS):
            step()

    return run


def _mean(turns: list[dict[str, float]]) -> dict[str, float]:
    return {part: sum(turn[part] for turn in turns) / len(turns) for part in PARTS}


def _shares(solver: str, turns: list[dict[str, float]], group: str = "parts") -> list[Row]:
    rows = []
    whole = Readings([sum(turn.values()) for turn in turns])
    for part in PARTS:
        row = Row(group, f"{solver}: {part}", Readings([turn[part] for turn in turns]), whole, "whole step")
        if part == "data":
            row.target = Target(0.10)
        if part == "flow" and solver.startswith("dopri5"):
            row.target = Target(0.30)
        rows.append(row)
    return rows
