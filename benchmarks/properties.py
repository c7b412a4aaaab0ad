"""Flows of every kind against a plain integration in float64: `python -m benchmarks.properties --cases 5000 --seed 0`.

One integer draws field, precision, shape, times (common or each sample's own), context, control, solver, gradient mode,
divergence and costs, every axis evenly. The reference knows one flow at a time (`flow_velocity`, `flow_potential`), takes
small Runge-Kutta steps by autograd from output to output, and shares no code with the engine. A case passes if states,
log-determinants and costs at all times and the gradients agree, or if it is refused by a message that is expected.

Euler and Heun's method take one step from output to output (or switch), and so does the reference then: they agree to
rounding, also under times of each sample. The continuous adjoint's gradients are those of the flow and not of such steps,
so they are left out there. Other methods of fixed step size take steps no longer than it for any sample, and are close to
the flow itself.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.property_parts import CONTEXTS, PARTS
from flowfactor.context import Context
from flowfactor.potentials.base import rademacher_like

P = ff.potentials
REFUSALS = ("needs a potential, and", r'gradient="checkpoint" gives the switching times of a Schedule no gradient')
# Methods with their settings, and how far they may be from the reference in float64, relative to 1 + its largest entry.
METHODS: dict[str, tuple[dict[str, float], float]] = {
    "dopri5": ({"rtol": 1e-8, "atol": 1e-8}, 1e-4),
    "dopri8": ({"rtol": 1e-8, "atol": 1e-8}, 1e-4),
    "bosh3": ({"rtol": 1e-6, "atol": 1e-6}, 1e-3),
    "rk4": ({"step_size": 0.05}, 1e-3),
    "adaptive_heun": ({"rtol": 1e-5, "atol": 1e-5}, 5e-3),
    "fehlberg2": ({"rtol": 1e-5, "atol": 1e-5}, 5e-3),
    "euler": ({}, 1e-8),
    "heun2": ({}, 1e-8),
    "heun3": ({"step_size": 0.05}, 5e-3),
    "midpoint": ({"step_size": 0.02}, 1e-2),
}
ONE_STEP = ("euler", "heun2")
STEPS = 4  # of the reference, between two outputs
AXES = ("part", "times", "context", "control", "method", "gradient", "divergence")
TIMES = ("list", "tensor", "affine", "general", "repeats", "mixed")
COSTS: dict[str, Any] = {
    "hj": ff.regularizers.HamiltonJacobi(),
    "action": ff.regularizers.TransportCost(),
    "own": lambda e: e.velocity.square().sum(-1) * (1 + e.z[..., 0].sin()),
}


class InaccurateError(AssertionError):
    """A result or gradient is off."""


@dataclass
class Case:
    """What was drawn."""

    part: str
    dtype: torch.dtype
    dim: int
    flows: int
    batch: tuple[int, ...]
    t: list[float]
    times: str
    context: str
    control: str
    method: str
    gradient: str
    engine: str
    divergence: str | None
    costs: list[str]
    inverse: bool
    number: int


CLOSED = ("free", "helmholtz", "mlp", "paper", "skew", "solenoidal")
NO_POTENTIAL = ("free", "module-field", "own-field", "skew", "solenoidal")


def drawn(number: int) -> Case:
    """The case of an integer."""
    r = random.Random(number)
    pick = r.choice
    t, way = [r.uniform(-1, 1)], pick([1, -1])
    for _ in range(r.randint(1, 3)):
        t.append(t[-1] + way * r.uniform(0.1, 0.5))
    part = pick([*sorted(PARTS), *CLOSED])  # these have closed forms
    costs = r.sample(["action", "hj"], pick([0, 0, 1, 2])) + ["own"] * (r.random() < 0.2)
    if "hj" in costs and part in NO_POTENTIAL and r.random() < 0.9:
        costs.remove("hj")  # or most such cases would be refused
    return Case(
        part, pick([torch.float64, torch.float32]), pick([2, 3, 4]), pick([1, 2, 3]),
        pick([*[(), (1,), (4,), (3, 2)] * 3, (0,)]), t, pick(TIMES), pick(sorted(CONTEXTS)),
        pick([*["int", "index", "weights", "schedule"] * 2, "learned"]), pick(sorted(METHODS)),
        pick(["direct", "adjoint", "checkpoint"]), pick(["auto", "auto", "general"]), pick([None, "exact", "hutchinson"]),
        costs, pick([False, True]), number,
    )  # fmt: skip


class Reference:
    """The solve of a case by small steps, from one-hot weights of every sample."""

    def __init__(self, case: Case, part: Any, probe: Tensor, context: Context | None, steps: int) -> None:
        self.case, self.part, self.probe, self.context = case, part, probe, context
        self.steps = 1 if case.method in ONE_STEP else steps
        self.potential = part if isinstance(part, P.Potential) else getattr(part, "potential", None)

    def mixed(self, function: Callable, z: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """Sum over the flows of their own values, by weights ``[*batch, K]``."""
        found = [function(z, t, k, self.context) for k in range(self.case.flows)]
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
            if self.case.divergence == "hutchinson" and self.case.part in ("skew", "solenoidal", "helmholtz"):
                # Known to have no divergence, the other part of these fields takes no part in the estimate.
                moved = gradient if self.case.part == "helmholtz" else 0 * v
            rows = [torch.autograd.grad(moved, z, e.expand_as(v), **how)[0] for e in eyes]
            out.append(torch.stack([(row * e).sum(-1, keepdim=True) for row, e in zip(rows, eyes, strict=True)]).sum(0))
        energy = v.square().sum(-1)
        known = {
            "hj": (time + 0.5 * gradient.square().sum(-1)).square(),
            "action": energy / 2,
            "own": energy * (1 + z[..., 0].sin()),
        }
        return torch.cat([*out, *(known[name].unsqueeze(-1) for name in self.case.costs)], -1)

    def outputs(self, z: Tensor, t: Tensor, control: list[Tensor], switch: Tensor | None) -> Tensor:
        """The packed states at times ``t [T, *batch]``; `control` holds the weights before and after the switch."""
        y = torch.cat([z, z.new_zeros(*z.shape[:-1], bool(self.case.divergence) + len(self.case.costs))], -1)
        found, ascending = [y], t[-1] >= t[0]
        for a, b in zip(t[:-1], t[1:], strict=True):
            if switch is None:
                y = self.moved(y, a, b, control[0])
            else:
                middle = torch.minimum(torch.maximum(switch, torch.minimum(a, b)), torch.maximum(a, b))
                y = self.moved(y, a, middle, torch.where(ascending.unsqueeze(-1), control[0], control[1]))
                y = self.moved(y, middle, b, torch.where(ascending.unsqueeze(-1), control[1], control[0]))
            found.append(y)
        return torch.stack(found)

    def moved(self, y: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        """The packed state at ``b``, from that at ``a``; costs grow along either direction."""
        steps = self.steps
        h, signs = ((b - a) / steps).unsqueeze(-1), torch.ones_like(y)
        signs[..., self.case.dim + bool(self.case.divergence) :] = torch.where(b >= a, 1.0, -1.0).to(y).unsqueeze(-1)

        def rate(part: float, y: Tensor) -> Tensor:
            return signs * self.rates(y[..., : self.case.dim], a + part * (b - a), w)

        for i in range(steps):
            now, half, end = i / steps, (i + 0.5) / steps, (i + 1) / steps
            k1 = rate(now, y)
            if self.case.method == "euler":
                y = y + h * k1
            elif self.case.method == "heun2":
                y = y + h / 2 * (k1 + rate(end, y + h * k1))
            else:
                k2 = rate(half, y + h / 2 * k1)
                k3 = rate(half, y + h / 2 * k2)
                y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(end, y + h * k3))
        return y


def _times(case: Case, generator: torch.Generator) -> Tensor:
    """The times ``[T]``, or ``[T, *batch]`` of each sample, in float64."""
    t = torch.tensor(case.t, dtype=torch.float64)
    if case.times in ("list", "tensor") or not case.batch:
        return t
    size, steps = case.batch, t.diff().reshape(-1, *[1] * len(case.batch))
    start = t[0] + 0.3 * torch.randn(size, generator=generator).double()
    if case.times == "affine":
        stretch = 0.3 + torch.rand(size, generator=generator).double()
    else:
        stretch = 0.3 + torch.rand((len(steps), *size), generator=generator).double()
    if case.times == "repeats":
        stretch = stretch * (torch.rand(stretch.shape, generator=generator) < 0.6)
    elif case.times == "mixed":
        stretch = stretch * (2 * torch.randint(2, size, generator=generator) - 1)
    return torch.cat([start.unsqueeze(0), start + (stretch * steps).cumsum(0)])


def _context(case: Case, generator: torch.Generator) -> tuple[Context | None, list[Tensor]]:
    """The context as it is handed over, and its tensors."""
    size = CONTEXTS[case.context]
    batch = () if case.context == "broadcast" else case.batch

    def one(features: int) -> Tensor:
        return torch.randn(*batch, features, generator=generator).to(case.dtype).requires_grad_()

    if isinstance(size, int):
        whole = one(size) if size else None
        return whole, [] if whole is None else [whole]
    named = {name: one(features) for name, features in size.items()}
    return named, list(named.values())


def _controls(case: Case, generator: torch.Generator) -> tuple[Any, Any, Tensor | None, list[Tensor]]:
    """The control, a function from its own tensors to pieces, the learned time, and leaves in both precisions."""
    index = torch.randint(case.flows, case.batch, generator=generator)
    hot = torch.nn.functional.one_hot(index, case.flows).double()
    weights = torch.randn(*case.batch, case.flows, generator=generator).double().to(case.dtype)
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
    """Sines of the results, each over its largest entry: the sine of a large number would say little of its gradient."""
    scaled = [x / (1 + x.detach().abs().max()) if x.numel() else x for x in results]
    return torch.stack([x.sin().sum() for x in scaled]).sum()


def check(case: Case) -> str:
    """Runs a case; returns what kind of end it took, and raises AssertionError where it is wrong.

    One that is off is run again with finer steps on both sides, by which what comes of steps shrinks and a mistake does not.
    """
    try:
        return _checked(case, 1)
    except InaccurateError:
        if case.method in ONE_STEP:
            raise
        return _checked(case, 4)


def _checked(case: Case, finer: int) -> str:
    torch.manual_seed(case.number)
    generator = torch.Generator().manual_seed(case.number)
    # Its sinusoids of time come in pairs.
    dim = case.dim + case.dim % 2 if case.part == "paper" else case.dim
    part = PARTS[case.part](dim, case.flows, CONTEXTS[case.context])
    case = replace(case, dim=dim)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
    part = part.to(case.dtype)
    z = (0.7 * torch.randn(*case.batch, dim, generator=generator)).to(case.dtype).requires_grad_()
    control, weights, switch, leaves = _controls(case, generator)
    context, features = _context(case, generator)
    t = _times(case, generator)
    leaves = [z, *leaves, *features, *([switch] if switch is not None and switch.requires_grad else [])]
    own = copy.deepcopy(part).double()
    try:
        engine, found, gradients = _solved(case, part, z, t, control, context, [*leaves, *part.parameters()], finer)
    except Exception as error:  # a refusal is known by its message, whatever else is raised is wrong
        assert any(re.search(known, str(error)) for known in REFUSALS), f"{case}\n{type(error).__name__}: {error}"
        return "refused"
    probe = rademacher_like(z.detach(), torch.Generator().manual_seed(case.number)).double()
    spread = [c.double().expand(*case.batch, c.shape[-1]) for c in features]
    wide = dict(zip(context, spread, strict=True)) if isinstance(context, dict) else next(iter(spread), None)
    each = (t.flip(0) if case.inverse else t).reshape(len(t), *(t.shape[1:] or [1] * len(case.batch)))
    moment = None if switch is None else switch.double()
    hot = [w.double() for w in weights]
    reference = Reference(case, own, probe, wide, STEPS * finer)
    y = reference.outputs(z.double(), each.expand(len(t), *case.batch), hot, moment)
    expected = [y[..., :dim], *y[..., dim:].unbind(-1)]
    wanted = torch.autograd.grad(
        _loss(expected), [*leaves, *own.parameters()], allow_unused=True, materialize_grads=True
    )
    _compare(case, "result", found, expected, finer)
    if case.method not in ONE_STEP or case.gradient != "adjoint":
        _compare(case, "gradient", gradients, wanted, finer)
    return engine


def _solved(
    case: Case, part: Any, z: Tensor, t: Tensor, control: Any, context: Context | None, leaves: list[Tensor], finer: int
) -> tuple[str, list[Tensor], Sequence[Tensor]]:
    """What took the solve, its results and their gradients."""
    options = {
        name: value / (finer if name == "step_size" else finer**4) for name, value in METHODS[case.method][0].items()
    }
    if case.dtype == torch.float32:
        options = {name: max(value, 1e-5) for name, value in options.items()}
    solver = ff.Solver(case.method, gradient=case.gradient, engine=case.engine, **options)  # pyright: ignore[reportArgumentType]
    flow = ff.LatentFlow(part, solver, divergence=case.divergence or "exact")  # pyright: ignore[reportArgumentType]
    path = (flow.inverse if case.inverse else flow)(
        z, case.t if case.times == "list" else t, control, context=context, log_det=case.divergence is not None,
        costs={name: COSTS[name] for name in case.costs}, generator=torch.Generator().manual_seed(case.number),
    )  # fmt: skip
    found = [path.z, *([] if path.log_det is None else [path.log_det]), *(path.costs[name] for name in case.costs)]
    gradients = torch.autograd.grad(_loss(found), leaves, allow_unused=True, materialize_grads=True)
    return path.stats.engine or "at rest", found, gradients


def _compare(case: Case, name: str, found: Sequence[Tensor], expected: Sequence[Tensor], finer: int) -> None:
    tolerance = METHODS[case.method][1]
    if case.dtype == torch.float32:
        tolerance = max(tolerance, 5e-3) * finer  # rounding does not shrink
    for a, b in zip(found, expected, strict=True):
        limit = tolerance * (1 + float(b.detach().abs().max() if b.numel() else 0)) * (5 if name == "gradient" else 1)
        wrong = float((a.double() - b).detach().abs().max()) if b.numel() else 0.0
        if not wrong <= limit:
            raise InaccurateError(
                f"{case}\n{name} of shape {list(b.shape)} is wrong by {wrong:.2e}, more than {limit:.2e}"
            )


def run(count: int, number: int, first: int = 0, wrong: list[str] | None = None) -> Counter[tuple[str, str]]:
    """Checks so many cases of a seed, and counts what they were and how they ended.

    Wrong ones are counted and told in `wrong`, or raise AssertionError where it is None.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for i in range(first, first + count):
        case = drawn(1_000_000 * number + i)
        try:
            end = check(case)
        except AssertionError as error:
            if wrong is None:
                raise
            wrong.append(str(error))
            end = "wrong"
        kinds = {name: str(getattr(case, name)) for name in AXES}
        counts.update([("end", end), *kinds.items()])
    return counts


def main() -> None:
    """Checks the cases that the command line asks for, and prints a table of them; ends with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="where to begin among the cases of the seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong: list[str] = []
    for (axis, value), count in sorted(run(arguments.cases, arguments.seed, arguments.first, wrong).items()):
        print(f"{axis:12} {value:16} {count:6}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
