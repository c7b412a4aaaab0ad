"""Flows of every kind against a plain integration in float64: `python -m benchmarks.properties --cases 5000 --seed 0`.

Hypothesis draws a number, and the number a case, so that all kinds are about as frequent: fields, precisions, shapes, times
(of all samples or of each), controls, contexts, solvers, gradient modes, divergences and costs. The reference knows one flow
at a time (`flow_velocity`, `flow_potential`), takes many small Runge-Kutta steps by autograd, and shares no
code with the engine. A case passes if states, log-determinants, costs and gradients agree, or if it is refused by a message
that is expected.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import flowfactor as ff
from flowfactor.context import joined
from flowfactor.potentials.base import rademacher_like

P, F = ff.potentials, ff.fields
REFUSALS = ("needs a potential, and", r'gradient="checkpoint" gives the switching times of a Schedule no gradient')
# Methods with their settings, and how far they may be from the reference in float64, relative to 1 + its largest entry.
METHODS: dict[str, tuple[dict[str, float], float]] = {
    "dopri5": ({"rtol": 1e-8, "atol": 1e-8}, 1e-4),
    "dopri8": ({"rtol": 1e-8, "atol": 1e-8}, 1e-4),
    "bosh3": ({"rtol": 1e-6, "atol": 1e-6}, 1e-3),
    "rk4": ({"step_size": 0.05}, 1e-3),
    "heun3": ({"step_size": 0.05}, 5e-3),
    "midpoint": ({"step_size": 0.05}, 2e-2),
    "heun2": ({"step_size": 0.05}, 2e-2),
    "euler": ({"step_size": 0.01}, 0.1),
}
CONTEXTS: dict[str, Any] = {"none": 0, "of each": 3, "of all": 3, "by name": {"pose": 2, "kind": 1}}
STEPS = 8  # of the reference, between two times


def mlp(dim: int, flows: int, context: Any) -> ff.potentials.Potential:
    return P.MLPPotential(dim, flows, (5, 4), rank=2, time_features=4, init_scale=1.0, context=context)


def _shift(context: Any) -> Tensor | float:
    return 0.0 if context is None else joined(context).sum(-1)


class _OwnPotential(P.Potential):
    def __init__(self, dim: int, flows: int, context: Any) -> None:
        super().__init__(dim, flows, context)
        self.direction = torch.nn.Parameter(0.7 * torch.randn(flows, dim))

    def flow_potential(self, z: Tensor, t: Tensor, k: int, context: Any = None) -> Tensor:
        return torch.sin(z @ self.direction[k] + t + _shift(context))


class _OwnField(F.Field):
    def __init__(self, dim: int, flows: int, context: Any) -> None:
        super().__init__(dim, flows, context)
        self.matrix = torch.nn.Parameter(0.7 * torch.randn(flows, dim, dim))

    def flow_velocity(self, z: Tensor, t: Tensor, k: int, context: Any = None) -> Tensor:
        return torch.tanh(z @ self.matrix[k]) * torch.cos(t + _shift(context)).unsqueeze(-1)


class _Wave(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.direction = torch.nn.Parameter(0.7 * torch.randn(dim))

    def forward(self, z: Tensor, t: Tensor, context: Any = None) -> Tensor:
        return torch.sin(z @ self.direction + t + _shift(context))


def _modules(dim: int, flows: int, context: Any) -> ff.potentials.Potential:
    return P.from_module([_Wave(dim) for _ in range(flows)], dim, context=context)


PARTS: dict[str, Callable[[int, int, Any], Any]] = {
    "mlp": mlp,
    "convex": lambda d, k, c: P.ConvexPotential(d, k, (5, 4), context=c),
    "paper": lambda d, k, c: P.PaperPotential(d, k, context=c),
    "resnet": lambda d, k, c: P.ResNetPotential(d, k, width=5, depth=2, context=c),
    "shallow resnet": lambda d, k, c: P.ResNetPotential(d, k, width=5, depth=1, context=c),
    "quadratic": lambda d, k, c: P.QuadraticPotential(d, k, context=c),
    "own potential": _OwnPotential,
    "modules": _modules,
    "skew": lambda d, k, c: F.SkewGradientField(mlp(d, k, c)),
    "helmholtz": lambda d, k, c: F.HelmholtzField(mlp(d, k, c), mlp(d, k, c)),
    "mixed helmholtz": lambda d, k, c: F.HelmholtzField(mlp(d, k, c), F.SolenoidalField(d, k, 5)),
    "solenoidal": lambda d, k, c: F.SolenoidalField(d, k, 5, rank=2, time_features=4, init_scale=1.0, context=c),
    "free": lambda d, k, c: F.FreeField(d, k, (5, 4), rank=2, time_features=4, init_scale=1.0, context=c),
    "own field": _OwnField,
}
COSTS: dict[str, Any] = {
    "hj": ff.regularizers.HamiltonJacobi(),
    "action": ff.regularizers.TransportCost(),
    "own": lambda e: e.velocity.square().sum(-1) * (1 + e.z[..., 0].sin()),
}


@dataclass
class Case:
    """What was drawn."""

    part: str
    dtype: torch.dtype
    dim: int
    flows: int
    batch: tuple[int, ...]
    t: list[float]
    tensor_times: bool
    control: str
    method: str
    gradient: str
    engine: str
    divergence: str | None
    costs: list[str]
    inverse: bool
    clocks: str
    context: str
    number: int


def drawn(number: int) -> Case:
    """The case of a number."""
    of = random.Random(number)
    t, sign = [of.uniform(-1, 1)], of.choice([1, -1])
    for _ in range(of.randint(1, 3)):
        t.append(t[-1] + sign * of.uniform(0.1, 0.5))
    return Case(
        of.choice(sorted(PARTS)), of.choice([torch.float64, torch.float32]), of.choice([2, 3, 4]), of.randint(1, 3),
        of.choice([(), (1,), (4,), (5,), (3, 2), (0,)]), t, of.random() < 0.5,
        of.choice(["int", "index", "weights", "schedule", "learned"]), of.choice(sorted(METHODS)),
        of.choice(["direct", "adjoint", "checkpoint"]), of.choice(["auto", "general"]),
        of.choice([None, "exact", "hutchinson"]), of.sample(sorted(COSTS), of.choice([0, 0, 1, 1, 2, 3])), of.random() < 0.5,
        of.choice(["of all", "stretched", "irregular"]), of.choice(sorted(CONTEXTS)), number,
    )  # fmt: skip


cases = st.integers(0, 2**31 - 1).map(drawn)


def times_of(case: Case, generator: torch.Generator) -> Tensor:
    """The times of each sample, ``[T, *batch]``: one grid for all, stretched and shifted, or any with rests."""
    t = torch.tensor(case.t, dtype=torch.float64).reshape(-1, *[1] * len(case.batch)).expand(-1, *case.batch)
    if case.clocks == "of all" or not case.batch:
        return t
    signs = torch.randint(2, case.batch, generator=generator) * 2.0 - 1
    if case.clocks == "stretched":
        return t[0] + (t - t[0]) * signs * (0.3 + torch.rand(case.batch, generator=generator, dtype=torch.float64))
    steps = torch.rand((len(t) - 1, *case.batch), generator=generator, dtype=torch.float64) * 0.4 + 0.05
    steps = steps * (torch.rand(steps.shape, generator=generator) < 0.7) * signs
    return torch.cat([t[:1], t[0] + steps.cumsum(0)])


def context_of(case: Case, generator: torch.Generator) -> tuple[Any, list[Tensor]]:
    """The context, and its tensors."""
    size = CONTEXTS[case.context]
    if case.context == "none":
        return None, []
    if isinstance(size, dict):
        found = {n: torch.randn(*case.batch, c, generator=generator).to(case.dtype) for n, c in size.items()}
        return found, [x.requires_grad_() for x in found.values()]
    batch = () if case.context == "of all" else case.batch
    one = torch.randn(*batch, size, generator=generator).to(case.dtype).requires_grad_()
    return one, [one]


class Reference:
    """The solve of a case by small steps, from one-hot weights of every sample."""

    def __init__(self, case: Case, part: Any, probe: Tensor, context: Any) -> None:
        self.case, self.part, self.probe = case, part, probe
        self.beside = [] if context is None else [context]
        self.potential = part if isinstance(part, P.Potential) else getattr(part, "potential", None)

    def mixed(self, function: Callable, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Sum over the flows of their own values, by weights ``[*batch, K]``."""
        found = [function(z, t.expand(z.shape[:-1]), k, *self.beside) for k in range(self.case.flows)]
        return torch.stack([(w[..., k] if v.ndim < z.ndim else w[..., k, None]) * v for k, v in enumerate(found)]).sum(
            0
        )

    def rates(self, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Rates of z, of the log-determinant and of the costs."""
        z, t = z + 0, t + torch.zeros(z.shape[:-1], dtype=z.dtype)
        for x in (z, t):
            if not x.requires_grad:
                x.requires_grad_()
        gradient, time = torch.zeros_like(z), torch.zeros_like(t)
        if self.potential is not None:
            u = self.mixed(self.potential.flow_potential, z, t, w)
            gradient, time = torch.autograd.grad(
                u.sum(), (z, t), create_graph=True, allow_unused=True, materialize_grads=True
            )
        v = gradient if isinstance(self.part, P.Potential) else self.mixed(self.part.flow_velocity, z, t, w)
        out = [v]
        if self.case.divergence:
            eyes = [self.probe] if self.case.divergence == "hutchinson" else torch.eye(z.shape[-1]).to(z)
            how: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
            moved = v
            if self.case.divergence == "hutchinson" and not isinstance(
                self.part, (P.Potential, F.FreeField, _OwnField)
            ):
                # Known to have no divergence, the other part of these fields takes no part in the estimate.
                moved = gradient if isinstance(self.part, F.HelmholtzField) else 0 * v
            rows = [torch.autograd.grad(moved, z, e.expand_as(v), **how)[0] for e in eyes]
            out.append(torch.stack([(row * e).sum(-1, keepdim=True) for row, e in zip(rows, eyes, strict=True)]).sum(0))
        energy = v.square().sum(-1)
        known = {
            "hj": (time + 0.5 * gradient.square().sum(-1)).square(),
            "action": energy / 2,
            "own": energy * (1 + z[..., 0].sin()),
        }
        return torch.cat([*out, *(known[name].unsqueeze(-1) for name in self.case.costs)], -1)

    def end(self, z: Tensor, pieces: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """The packed states at the ends of pieces ``(from [*batch], to [*batch], weights)``."""
        y = torch.cat([z, z.new_zeros(*z.shape[:-1], bool(self.case.divergence) + len(self.case.costs))], -1)
        path = [y]
        for a, b, w in pieces:
            h, signs = ((b - a) / STEPS).unsqueeze(-1), torch.ones_like(y)
            signs[..., self.case.dim + bool(self.case.divergence) :] = torch.where(b > a, 1.0, -1.0).to(y).unsqueeze(-1)

            def rate(t: Tensor, y: Tensor, w: Tensor = w, signs: Tensor = signs) -> Tensor:
                return signs * self.rates(y[..., : self.case.dim], t, w)

            for i in range(STEPS):
                t, half = a + i * h.squeeze(-1), h.squeeze(-1) / 2
                k1 = rate(t, y)
                k2 = rate(t + half, y + h / 2 * k1)
                k3 = rate(t + half, y + h / 2 * k2)
                y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + 2 * half, y + h * k3))
            path.append(y)
        return path


def _controls(case: Case, generator: torch.Generator) -> tuple[Any, Any, Tensor | None, list[Tensor]]:
    """The control, a function from its own tensors to pieces, the learned time, and leaves in both precisions."""
    index = torch.randint(case.flows, case.batch, generator=generator)
    hot = torch.nn.functional.one_hot(index, case.flows).double()
    weights = 0.5 * torch.randn(*case.batch, case.flows, generator=generator).double().to(case.dtype)
    first = torch.zeros_like(hot)
    first[..., 0] = 1.0
    middle = torch.tensor(case.t[0] + 0.618 * (case.t[-1] - case.t[0])).to(case.dtype)
    if case.control in ("schedule", "learned"):
        learned = middle.requires_grad_(case.control == "learned")
        return ff.Schedule([(-10.0, index), (learned, 0)]), [hot, first], learned, []
    if case.control == "weights":
        weights.requires_grad_()
        return weights, [weights], None, [weights]
    return (0, [first], None, []) if case.control == "int" else (index, [hot], None, [])


def _loss(results: list[Tensor]) -> Tensor:
    return torch.stack([(x * torch.arange(x.numel()).cos().reshape(x.shape).to(x)).sum() for x in results]).sum()


def check(case: Case) -> str:
    """Runs a case; returns what kind of end it took, and raises AssertionError where it is wrong."""
    torch.manual_seed(case.number)
    generator = torch.Generator().manual_seed(case.number)
    # Its sinusoids of time come in pairs.
    size = CONTEXTS[case.context]
    part = PARTS[case.part](case.dim + case.dim % 2 if case.part == "paper" else case.dim, case.flows, size)
    case.dim = part.dim
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
    part = part.to(case.dtype)
    z = (0.7 * torch.randn(*case.batch, case.dim, generator=generator)).to(case.dtype).requires_grad_()
    control, weights, switch, leaves = _controls(case, generator)
    t = times_of(case, generator)
    context, features = context_of(case, generator)
    options, tolerance = METHODS[case.method]
    if case.dtype == torch.float32:
        tolerance = max(tolerance, 5e-3)
        options = {name: max(value, 1e-5) for name, value in options.items()}
    leaves = [
        z,
        *features,
        *leaves,
        *([switch] if switch is not None and switch.requires_grad else []),
        *part.parameters(),
    ]
    own = copy.deepcopy(part).double()
    try:
        solver = ff.Solver(case.method, gradient=case.gradient, engine=case.engine, **options)  # pyright: ignore
        flow = ff.LatentFlow(part, solver, divergence=case.divergence or "exact")  # pyright: ignore
        times = t if case.clocks != "of all" else torch.tensor(case.t).double() if case.tensor_times else case.t
        path = (flow.inverse if case.inverse else flow)(
            z, times, control, context=context, log_det=case.divergence is not None,
            costs={name: COSTS[name] for name in case.costs}, generator=torch.Generator().manual_seed(case.number),
        )  # fmt: skip
        log_det = [] if path.log_det is None else [path.log_det]
        found = [path.z, *log_det, *(path.costs[name] for name in case.costs)]
        gradients = torch.autograd.grad(_loss(found), leaves, allow_unused=True, materialize_grads=True)
    except (ValueError, TypeError, RuntimeError) as error:
        assert any(re.search(known, str(error)) for known in REFUSALS), f"{case}\n{type(error).__name__}: {error}"
        return "refused"
    probe = rademacher_like(z.detach(), torch.Generator().manual_seed(case.number)).double()
    path_of = t.flip(0) if case.inverse else t
    wide = {n: x.double() for n, x in context.items()} if isinstance(context, dict) else context
    wide = wide.double() if isinstance(wide, Tensor) else wide
    pieces, outputs = _pieces(path_of, [w.double() for w in weights], switch)
    ys = Reference(case, own, probe, _spread(wide, case.batch)).end(z.double(), pieces)
    y = torch.stack([ys[i] for i in outputs])
    expected = [y[..., : case.dim], *y[..., case.dim :].unbind(-1)]
    mirrored = [*leaves[: len(leaves) - len(list(part.parameters()))], *own.parameters()]
    wanted = torch.autograd.grad(_loss(expected), mirrored, allow_unused=True, materialize_grads=True)
    for name, a, b in [
        *(("result", a, b) for a, b in zip(found, expected, strict=True)),
        *(("gradient", a, b) for a, b in zip(gradients, wanted, strict=True)),
    ]:
        limit = tolerance * (1 + float(b.detach().abs().max() if b.numel() else 0)) * (5 if name == "gradient" else 1)
        wrong = float((a.double() - b).detach().abs().max()) if b.numel() else 0.0
        assert wrong <= limit, f"{case}\n{name} of shape {list(b.shape)} is wrong by {wrong:.2e}, more than {limit:.2e}"
    return path.stats.engine or "at rest"


def _spread(context: Any, batch: tuple[int, ...]) -> Any:
    if isinstance(context, dict):
        return {name: x.expand(*batch, x.shape[-1]) for name, x in context.items()}
    return context if context is None else context.expand(*batch, context.shape[-1])


def _pieces(
    t: Tensor, weights: list[Tensor], switch: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[int]]:
    """The stretches ``(from, to, weights)`` of each sample, and after how many of them the outputs are."""
    if switch is None:
        return [(a, b, weights[0]) for a, b in zip(t[:-1], t[1:], strict=True)], list(range(len(t)))
    pieces, s = [], switch.double()
    for a, b in zip(t[:-1], t[1:], strict=True):
        cut = torch.minimum(torch.maximum(s, torch.minimum(a, b)), torch.maximum(a, b))
        up = (b >= a).unsqueeze(-1)
        pieces.append((a, cut, torch.where(up, weights[0], weights[1])))
        pieces.append((cut, b, torch.where(up, weights[1], weights[0])))
    return pieces, list(range(0, len(pieces) + 1, 2))


def run(count: int, number: int) -> Counter[tuple[str, str]]:
    """Checks so many cases, and counts what they were and how they ended; raises AssertionError at a wrong one."""
    counts: Counter[tuple[str, str]] = Counter()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=False, phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(cases)
    def one(case: Case) -> None:
        end = check(case)
        kinds = {"times": case.clocks, "context": case.context, "dtype": str(case.dtype), "engine": case.engine}
        kinds |= {"part": case.part, "control": case.control, "method": case.method, "gradient": case.gradient}
        counts.update([("end", end), ("divergence", str(case.divergence)), *kinds.items()])

    one()
    return counts


def main() -> None:
    """Checks the cases that the command line asks for, and prints a table of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for (axis, value), count in sorted(run(arguments.cases, arguments.seed).items()):
        print(f"{axis:12} {value:16} {count:6}")


if __name__ == "__main__":
    main()
