"""The benchmarks: each checks that its sides compute the same, then times them in turns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flowfactor as ff
from benchmarks.plain import PlainFlow, PlainPotential
from benchmarks.timing import Ratio, Timing, interleaved
from flowfactor.potentials.base import rademacher_like
from flowfactor.regularizers import HamiltonJacobi, NegativeSquare

BATCH = 128
TOLERANCE = 1e-5


@dataclass
class Row:
    """One line of the table."""

    name: str
    ours: Timing
    other: Timing | None = None
    other_name: str = ""
    target: str = ""
    met: bool | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> Ratio | None:
        return None if self.other is None else Ratio.of(self.other, self.ours)


def train_step(dim: int, divergence: str, repeats: int) -> list[Row]:
    """Forward and backward of an adaptive solve with log-determinants, in all three gradient modes.

    Like against like: ``norm="batch"`` steers by the error that torchdiffeq measures, so both sides take the same
    steps. direct and checkpoint stand against plain ``odeint``, adjoint against plain ``odeint_adjoint``.
    """
    torch.manual_seed(0)
    potential = ff.potentials.MLPPotential(dim, hidden=(64, 64), init_scale=1.0 if dim > 100 else 0.1)
    z0 = torch.randn(BATCH, dim)
    t = torch.arange(8.0)
    probe = rademacher_like(z0, torch.Generator().manual_seed(1)) if divergence == "hutchinson" else None
    plain = PlainFlow(PlainPotential(potential), probe)
    outcomes: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    counts: dict[str, int] = {}

    def step(name: str, module: nn.Module, solve: Callable[[Tensor], tuple[Tensor, Tensor]], w1: nn.Parameter) -> None:
        module.zero_grad()
        z = z0.clone().requires_grad_()
        path, log_det = solve(z)
        (path.square().mean() - log_det.mean()).backward()
        assert z.grad is not None and w1.grad is not None
        outcomes[name] = (path.detach(), log_det.detach(), z.grad, w1.grad.reshape(-1, dim).clone())

    def ours(gradient: Any, norm: Any = "batch") -> Callable[[], None]:
        solver = ff.Solver("dopri5", rtol=TOLERANCE, atol=TOLERANCE, gradient=gradient, norm=norm)
        flow = ff.LatentFlow(potential, solver, divergence=divergence)  # type: ignore[arg-type]
        name = f"{gradient}/{norm}"

        def solve(z: Tensor) -> tuple[Tensor, Tensor]:
            path = flow(z, t, log_det=True, generator=torch.Generator().manual_seed(1))
            counts[name] = path.stats.nfe
            assert path.log_det is not None
            return path.z, path.log_det

        return lambda: step(name, flow, solve, potential.w1)

    def theirs(adjoint: bool) -> Callable[[], None]:
        name = "plain odeint_adjoint" if adjoint else "plain odeint"

        def solve(z: Tensor) -> tuple[Tensor, Tensor]:
            plain.nfe = 0
            result = plain.solve(z, t, TOLERANCE, adjoint=adjoint)
            counts[name] = plain.nfe
            return result

        return lambda: step(name, plain, solve, plain.potential.first.weight)  # type: ignore[arg-type]

    sides = {f"{mode}/batch": ours(mode) for mode in ("direct", "checkpoint", "adjoint")}
    sides["direct/sample"] = ours("direct", "sample")
    sides |= {"plain odeint": theirs(False), "plain odeint_adjoint": theirs(True)}
    for side in sides.values():
        side()
    for name in sides:
        # Same steps, same numbers. The others choose steps of their own (checkpoint lands on every output, adjoint solves
        # an equation of its own, norm="sample" holds the worst sample to the tolerance): they agree to the accuracy that
        # the tolerance buys, about 2e-3 of the log-determinant, which is one column in D + 1 of the error norm.
        bound = 1e-3 if name == "direct/batch" else 5e-3
        for a, b, what in zip(outcomes[name], outcomes["plain odeint"], ("z", "log_det", "dz0", "dW1"), strict=True):
            same(a, b, bound, f"{name} {what}")
    timings = interleaved(sides, repeats)
    rows = []
    for name in list(sides)[:4]:
        other = "plain odeint_adjoint" if name.startswith("adjoint") else "plain odeint"
        row = Row(f"train step, D={dim}, {divergence}, {name}", timings[name], timings[other], other)
        row.notes = {"nfe": counts[name], "nfe_other": counts[other]}
        assert row.ratio is not None
        row.target, row.met = "1.5 times faster", row.ratio.median >= 1.5
        rows.append(row)
    return rows


def exact_laplacian(repeats: int, dim: int = 64) -> list[Row]:
    """The exact Laplacian of `MLPPotential` against the trace of torch.func's Hessian.

    flowfactor's side gives value, gradient and time derivative as well.
    """
    torch.manual_seed(0)
    potential = ff.potentials.MLPPotential(dim, hidden=(64, 64), init_scale=1.0)
    plain = PlainPotential(potential)
    z, t = torch.randn(BATCH, dim), torch.tensor(0.7)
    hessian = torch.func.vmap(torch.func.hessian(lambda z: plain(z, t)))

    def ours() -> Tensor:
        laplacian = potential.derivatives(z, t, laplacian="exact").laplacian
        assert laplacian is not None
        return laplacian

    def theirs() -> Tensor:
        return hessian(z).diagonal(dim1=-2, dim2=-1).sum(-1)

    same(ours().detach(), theirs().detach(), 1e-4, "Laplacian")

    def without_graph(side: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(side)

    def with_backward(side: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: side().mean().backward()

    rows = []
    for name, wrap in (("forward", without_graph), ("forward + backward", with_backward)):
        timings = interleaved({"ours": wrap(ours), "torch.func": wrap(theirs)}, repeats)
        row = Row(f"exact Laplacian, D={dim}, {name}", timings["ours"], timings["torch.func"], "torch.func hessian")
        assert row.ratio is not None
        row.target, row.met = "10 times faster", row.ratio.median >= 10
        rows.append(row)
    return rows


def paper_step(repeats: int, dim: int = 324, flows: int = 3, steps: int = 8) -> list[Row]:
    """The paper's flow in training: unit Euler steps, value, gradient, HJ residual and Laplacian; share of GEMM peak.

    Matrix products that the mathematics needs, in multiply-adds a sample and stage, all widths equal to D:
      W1 z, W2 h1                      values                        2 D^2
      W2' delta2, W1' delta1           gradient                      2 D^2
      W2 (s1 * W1 e)                   Laplacian along the probe e   1 D^2   (W1 e itself: once a solve)
      F [z; t]                         force, hidden size H          H (D + 1)
    Backward, each product costs two more of its size (one for each factor); W1 e one more (the probe needs none). The
    time embedding depends on t alone: 3 D^2 a flow and stage for its value, 3 D^2 for its time derivative, over no
    batch; with its backward about 1 % of the whole, and left out. So a step is
      B T (3 (5 D^2 + H (D + 1))) + B 2 D^2   multiply-adds, twice that in operations.
    """
    torch.manual_seed(0)
    potential = ff.potentials.PaperPotential(dim, num_flows=flows)
    force = NegativeSquare(dim)
    hamilton_jacobi = HamiltonJacobi(force)

    def value(evaluation: Any) -> Tensor:
        return evaluation.value

    value.needs = ("potential", "value")  # type: ignore[attr-defined]
    costs = {"hj": hamilton_jacobi, "value": value}
    flow = ff.LatentFlow(potential, ff.Solver("euler"), divergence="hutchinson")
    z0, t = torch.randn(BATCH, dim), torch.arange(steps + 1.0)
    index = torch.arange(BATCH) % flows

    def step() -> tuple[Tensor, Tensor]:
        flow.zero_grad()
        force.zero_grad()
        z = z0.clone().requires_grad_()
        path = flow(z, t, index, log_det=True, costs=costs, generator=torch.Generator().manual_seed(1))
        assert path.log_det is not None
        loss = path.z.square().mean() - path.log_det[-1].mean() + sum(c[-1].mean() for c in path.costs.values())
        loss.backward()
        assert z.grad is not None
        return loss.detach(), z.grad

    _check_paper_step(potential, force, z0, t, index, step)
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    small, weight = torch.randn(BATCH // flows, dim), torch.randn(dim, dim)
    timings = interleaved({"step": step, "product": lambda: a @ b, "small product": lambda: small @ weight}, repeats)
    hidden = force.first.out_features
    count = 2 * (BATCH * steps * 3 * (5 * dim**2 + hidden * (dim + 1)) + BATCH * 2 * dim**2)
    peak = 2 * n**3 / timings["product"].median / 1e6  # G operations a second
    rate = count / timings["step"].median / 1e6
    row = Row(f"paper's flow step, K={flows}, T={steps}, D={dim}, Euler", timings["step"])
    row.notes = {
        "gemm_gflop": count / 1e9,
        "gflops": rate,
        "machine_gflops": peak,
        "share_of_peak": rate / peak,
        "small_product_gflops": 2 * (BATCH // flows) * dim**2 / timings["small product"].median / 1e6,
    }
    return [row]


def _check_paper_step(
    potential: nn.Module,
    force: nn.Module,
    z0: Tensor,
    t: Tensor,
    index: Tensor,
    step: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    """Writes the step out with autograd and compares loss and gradient."""
    probe = rademacher_like(z0, torch.Generator().manual_seed(1))
    start = z0.clone().requires_grad_()
    z, log_det, residual, value, squares = start, 0.0, 0.0, 0.0, [start.square().mean()]
    for now in t[:-1]:
        time = now.expand(len(z)).clone().requires_grad_()
        u = potential(z, time, index)
        gradient, rate = torch.autograd.grad(u.sum(), (z, time), create_graph=True)
        (along,) = torch.autograd.grad((gradient * probe).sum(), z, create_graph=True)
        log_det = log_det + (along * probe).sum(-1)
        residual = residual + (rate + 0.5 * gradient.square().sum(-1) - force(z, time)).square()
        value = value + u
        z = z + gradient
        squares.append(z.square().mean())
    loss = torch.stack(squares).mean() - log_det.mean() + residual.mean() + value.mean()  # type: ignore[union-attr]
    found = step()
    same(found[0], loss.detach(), 1e-4, "paper step's loss")
    same(found[1], torch.autograd.grad(loss, start)[0], 1e-3, "paper step's gradient")


def import_time(repeats: int) -> list[Row]:
    """Time of ``import flowfactor`` in a fresh process that already has torch, torchdiffeq and geomloss."""
    code = (
        "import time, torch, torchdiffeq, geomloss; begin = time.perf_counter(); import flowfactor; "
        "print((time.perf_counter() - begin) * 1e3)"
    )
    times = []
    for i in range(repeats + 1):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        if i:  # the first one may compile byte code
            times.append(float(run.stdout))
    row = Row("import flowfactor, beyond its dependencies", Timing(times))
    row.target, row.met = "at most 300 ms", row.ours.median <= 300
    return [row]


def same(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Stops the benchmark unless both sides agree, relative to the size of the second."""
    error = float((a - b).norm() / b.norm())
    if not error <= tolerance:
        raise RuntimeError(f"{what}: the two sides differ by {error:.2g} relative, more than {tolerance:g}")
