"""Exact Laplacians over D and hidden sizes: flowfactor, plain columns of the Jacobian, torch.func's Hessian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import flowfactor as ff
from benchmarks.plain import PlainPotential
from benchmarks.problem import relative, same
from benchmarks.timing import Row, Target, interleaved

_BATCH = 512
_DIMS, _HIDDEN = (2, 8, 32, 64, 324), (64, 128)


def over_sizes(repeats: int, dims: tuple[int, ...] = _DIMS, hidden: tuple[int, ...] = _HIDDEN) -> list[Row]:
    """Forward and backward of the Laplacian's sum, to states and parameters, on one thread.

    flowfactor's side is the divergence of the gradient field, which works out the gradient as well.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for h in hidden for dim in dims for row in _rows(repeats, dim, h)]
    finally:
        torch.set_num_threads(threads)


def _rows(repeats: int, dim: int, hidden: int, batch: int = _BATCH) -> list[Row]:
    torch.manual_seed(0)
    potential = ff.potentials.MLPPotential(dim, hidden=(hidden, hidden), init_scale=1.0)
    field, plain = ff.fields.GradientField(potential), PlainPotential(potential)
    z, t = torch.randn(batch, dim).requires_grad_(), torch.tensor(0.7)
    hessian = torch.func.vmap(torch.func.hessian(lambda z: plain(z, t)))

    sides = {
        "ours": (lambda: field.divergence(z, t), potential),
        "plain columns": (lambda: plain.laplacian(z, t), plain),
        "torch.func Hessian": (lambda: hessian(z).diagonal(dim1=-2, dim2=-1).sum(-1), plain),
    }
    found = {name: _with_gradient(side, z) for name, (side, _) in sides.items()}
    for name in list(sides)[1:]:
        for mine, theirs, what in zip(found["ours"], found[name], ("Laplacian", "Laplacian's gradient"), strict=True):
            same(mine, theirs, 1e-3, f"{what}, {name}")
    weights = {name: p.grad for name, p in potential.named_parameters(recurse=False)}
    for name, other in plain.named_weights().items():
        mine = weights[name]
        # Both plain sides have gone back through the same module: its gradients count twice.
        if mine is not None and other.grad is not None and relative(2 * mine.flatten(), other.grad.flatten()) > 1e-3:
            raise RuntimeError(f"Laplacian: the sides differ in d/d{name}")
    calls = {name: _back_and_forth(side, part, z) for name, (side, part) in sides.items()}
    times = interleaved(calls, repeats)
    what = f"exact Laplacian both ways, D={dim}, H={hidden}"
    return [
        Row("sizes", what, times["ours"], times[other], other, target)
        for other, target in (("plain columns", Target(1.0)), ("torch.func Hessian", None))
    ]


def _with_gradient(side: Callable[[], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z.grad = None
    laplacian = side()
    laplacian.sum().backward()
    assert z.grad is not None
    return laplacian.detach(), z.grad


def _back_and_forth(side: Callable[[], Tensor], part: torch.nn.Module, z: Tensor) -> Callable[[], None]:
    def call() -> None:
        part.zero_grad()
        z.grad = None
        side().sum().backward()

    return call
