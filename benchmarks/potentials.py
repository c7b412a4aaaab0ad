"""One evaluation of a potential: exact Laplacians, and the paper's flow step against the machine's matrix products."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import flowfactor as ff
from benchmarks.peer import ROOT
from benchmarks.plain import PlainPotential
from benchmarks.problem import BATCH, same
from benchmarks.timing import Readings, Row, Target, interleaved
from flowfactor.control import resolve
from flowfactor.networks.probes import rademacher_like
from flowfactor.regularizers import HamiltonJacobi, NegativeSquare
from flowfactor.training import prepare_process


def hessian_trace(repeats: int, dim: int = 64) -> list[Row]:
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
    rows = []
    for name, wrap in (("forward", torch.no_grad()), ("forward and backward", _with_backward)):
        timings = interleaved({"ours": wrap(ours), "theirs": wrap(theirs)}, repeats)
        row = Row("laplacian", f"exact Laplacian, D={dim}, {name}", timings["ours"], timings["theirs"])
        row.other_name, row.target = "torch.func Hessian", Target(0.1) if dim == 64 else None
        rows.append(row)
    return rows


def over_gradient(repeats: int, dim: int = 324) -> list[Row]:
    """What the exact Laplacian adds to a stage: gradient and Laplacian against the gradient alone.

    Both are bound as a solver binds them, so that what the weights alone fix is worked out before.
    """
    torch.manual_seed(0)
    potential = ff.potentials.MLPPotential(dim, hidden=(64, 64), init_scale=1.0)
    z = torch.randn(BATCH, dim)
    t = torch.tensor(0.7)
    acting = resolve(0, (BATCH,), 1, dtype=z.dtype, device=z.device)

    def side(want: Iterable[str], laplacian: Any) -> Callable[[], Tensor]:
        bound = potential.bind(acting, (BATCH,), want=want, laplacian=laplacian)

        def call() -> Tensor:
            d = bound(z, t)
            assert d.gradient is not None
            return d.gradient if d.laplacian is None else d.gradient + d.laplacian.unsqueeze(-1)

        return call

    sides = {"both": side(("gradient", "laplacian"), "exact"), "gradient": side(("gradient",), None)}
    plain = PlainPotential(potential)
    exact = torch.func.vmap(torch.func.hessian(lambda z: plain(z, t)))(z[:8]).diagonal(dim1=-2, dim2=-1).sum(-1)
    found = (sides["both"]() - sides["gradient"]())[:8, 0]
    same(found.detach(), exact.detach(), 1e-3, "Laplacian")
    rows = []
    for name, wrap in (("forward", torch.no_grad()), ("forward and backward", _with_backward)):
        # The backward pass goes through what binding made: it is bound anew.
        wrapped = {
            "both": wrap(lambda: side(("gradient", "laplacian"), "exact")()),
            "gradient": wrap(lambda: side(("gradient",), None)()),
        }
        timings = interleaved(wrapped if name != "forward" else {n: wrap(s) for n, s in sides.items()}, repeats)
        row = Row("laplacian", f"gradient and exact Laplacian, D={dim}, {name}", timings["both"], timings["gradient"])
        row.other_name, row.target = "gradient alone", Target(2.0) if name == "forward" else None
        rows.append(row)
    return rows


def _with_backward(side: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: side().mean().backward()


def paper_problem(
    dim: int = 324, flows: int = 3, steps: int = 8
) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], None], float]:
    """The paper's flow in training: unit Euler steps, value, gradient, HJ residual and Laplacian.

    Matrix products that the mathematics needs, in multiply-adds a sample and stage, all widths equal to D:
      W1 z, W2 h1                      values                        2 D^2
      W2' delta2, W1' delta1           gradient                      2 D^2
      W2 (s1 * W1 e)                   Laplacian along the probe e   1 D^2   (W1 e itself: once a solve)
      F [z; t]                         force, hidden size H          H (D + 1)
    Backward, each product costs two more of its size (one for each factor); W1 e one more (the probe needs none). The
    time embedding depends on t alone: 3 D^2 a flow and stage for its value, 3 D^2 for its time derivative, over no
    batch; with its backward about 1 % of the whole, and left out. So a step is
      B T (3 (5 D^2 + H (D + 1))) + B 2 D^2   multiply-adds, twice that in operations.

    Returns:
        The step, a check of it, and the Gflop that it needs.
    """
    torch.manual_seed(0)
    potential = ff.potentials.PaperPotential(dim, num_flows=flows)
    force = NegativeSquare(dim)
    flow = ff.LatentFlow(potential, ff.Solver("euler"), divergence="hutchinson")
    costs = {"hj": HamiltonJacobi(force), "value": _Value()}
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

    hidden = force.first.out_features
    needed = 2 * (BATCH * steps * 3 * (5 * dim**2 + hidden * (dim + 1)) + BATCH * 2 * dim**2) / 1e9
    return step, lambda: _check_paper_step(potential, force, z0, t, index, step), needed


def paper_step(repeats: int, dim: int = 324, flows: int = 3, steps: int = 8) -> list[Row]:
    """The share of the machine's rate of large products at which `paper_problem` runs, in a process that trains."""
    prepare_process()
    step, check, needed = paper_problem(dim, flows, steps)
    check()
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    small, weight = torch.randn(BATCH // flows, dim), torch.randn(dim, dim)
    times = interleaved({"step": step, "product": lambda: a @ b, "small": lambda: small @ weight}, repeats, 0.2)
    rate = times["step"].rate(needed, "Gflop/s")
    peak = times["product"].rate(2 * n**3 / 1e9, "Gflop/s")
    row = Row("paper", f"paper's flow step, K={flows}, T={steps}, D={dim}, Euler", rate, peak)
    row.other_name, row.target = f"{n} x {n} product", Target(0.6, "at least")
    small_rate = times["small"].rate(2 * (BATCH // flows) * dim**2 / 1e9, "Gflop/s")
    shape = f"{BATCH // flows} x {dim} by {dim} x {dim}"
    row.notes = {"step, ms": str(times["step"]), "needed, Gflop": needed, f"{shape}, Gflop/s": small_rate.median}
    return [row]


class _Value(nn.Module):
    """The potential itself as a running cost, so that the step has to give its value."""

    needs = ("potential", "value")
    many_stages = True

    def forward(self, evaluation: Any) -> Tensor:
        return evaluation.value


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
    loss = torch.stack(squares).mean() - log_det.mean() + residual.mean() + value.mean()
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
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        if i:  # the first one may compile byte code
            times.append(float(run.stdout))
    name = "import flowfactor, beyond its dependencies"
    return [Row("import", name, Readings(times), target=Target(300, of="value"))]
