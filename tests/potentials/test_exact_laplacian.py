"""Exact Laplacians, whichever way they are taken, against the trace of a Hessian by autograd; first and second gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.networks import row_norms
from flowfactor.networks.batching import Layout
from flowfactor.potentials import resnet

P = ff.potentials
MAKERS: dict[str, Callable[[int, int, int], ff.potentials.Potential]] = {
    "mlp": lambda D, h1, h2: P.MLPPotential(D, 2, (h1, h2), init_scale=1.0),
    "mlp-tanh": lambda D, h1, h2: P.MLPPotential(D, 2, (h1, h2), rank=0, activation="tanh", init_scale=1.0),
    "convex": lambda D, h1, h2: P.ConvexPotential(D, 2, (h1, h2), init_scale=1.0),
    "paper": lambda D, h1, h2: P.PaperPotential(min(D + D % 2, 64), 2),
    "resnet-1": lambda D, h1, h2: P.ResNetPotential(D, 2, width=h1, init_scale=1.0),
    "resnet-2": lambda D, h1, h2: P.ResNetPotential(D, 2, width=h2, depth=2, init_scale=1.0),
}
# D, H1, H2: columns up to D = H1 / 2, pairs from there on; a residual network of two layers has columns up to D = 4 H2 / 3.
SIZES = [
    (1, 7, 5),
    (2, 5, 9),
    (3, 17, 4),
    (8, 9, 16),
    (8, 33, 12),
    (33, 65, 20),
    (33, 65, 12),
    (64, 32, 31),
    (324, 33, 17),
]


def traced(u: P.Potential, z: Tensor, t: float, k: Tensor) -> Tensor:
    """The Laplacian by a backward pass of the gradient for each dimension, with its graph."""
    (gradient,) = torch.autograd.grad(u(z, t, k).sum(), z, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(z.shape[1])]
    return torch.stack(rows).sum(0)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    if expected is None or found is None:
        assert (found is None or not found.any()) and (expected is None or not expected.any())
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_laplacian_and_its_gradients_are_those_of_the_hessian_s_trace(name: str, sizes: tuple[int, int, int]) -> None:
    u = MAKERS[name](*sizes).double()
    z = torch.randn(2, u.dim, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1, 0])
    expected = traced(u, z, 0.7, k)
    found = u.derivatives(z, 0.7, k, laplacian="exact").laplacian
    assert found is not None
    close(found, expected)
    bar = torch.tensor([1.3, -0.4], dtype=torch.float64)
    leaves = [z, *u.parameters()]
    wanted = torch.autograd.grad(expected, leaves, bar, allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(found, leaves, bar, allow_unused=True), wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "mlp-tanh", "paper"])
def test_closed_form_solves_carry_the_same_laplacian(name: str, sizes: tuple[int, int, int]) -> None:
    u = MAKERS[name](*sizes).double()
    adjoint = ff.fields.GradientField(u).stage_adjoint(Layout((4,), range(2)), frozenset(), "exact", None)
    assert not isinstance(adjoint, ff.networks.stage_adjoint.NoClosedForm)
    z = torch.randn(2, 2, u.dim, dtype=torch.float64)
    k = torch.tensor([0, 0, 1, 1])
    leaf = z.reshape(4, -1).clone().requires_grad_()
    expected = traced(u, leaf, 0.7, k)
    with torch.no_grad():
        _, residuals = adjoint.velocity(z, adjoint.time_terms([0.7])[0])
        close(adjoint.divergence([residuals])[0].flatten(), expected)
        bar = torch.randn(2, 1, 2, dtype=torch.float64)
        pullback = adjoint.stack([residuals], [0.7]).pullback({"divergence": bar})
        z_bar = pullback.pull(0, torch.zeros_like(z))
        z_bar = z_bar if pullback.direct is None else z_bar + pullback.direct[:, 0]
        found = pullback.gradients()
    wanted = torch.autograd.grad(expected, [leaf, *adjoint.inputs], bar.flatten(), allow_unused=True)
    close(z_bar.reshape(4, -1), wanted[0])
    for mine, theirs in zip(found, wanted[1:], strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("sizes", [(1, 5, 3), (2, 7, 3), (7, 3, 2)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "convex", "resnet-1", "resnet-2"])
def test_gradients_of_gradients(name: str, sizes: tuple[int, int, int]) -> None:
    u = MAKERS[name](*sizes).double()
    z = torch.randn(2, u.dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: u.derivatives(z, 0.7, 1, laplacian="exact").laplacian, z)


def test_columns_are_what_small_states_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("pairs of a state of two numbers")

    monkeypatch.setattr(row_norms, "Pairs", refuse)
    u = MAKERS["mlp"](2, 64, 64)
    ff.LatentFlow(u, ff.Solver("euler"))(torch.randn(3, 2), [0.0, 1.0], log_det=True).log_det[-1].sum().backward()  # type: ignore[index]
    for name in ("convex", "resnet-1"):
        MAKERS[name](2, 64, 64).derivatives(torch.randn(3, 2), 0.0, laplacian="exact")
    monkeypatch.setattr(resnet, "_by_matrices", refuse)
    MAKERS["resnet-2"](2, 64, 64).derivatives(torch.randn(3, 2), 0.0, laplacian="exact")
    with pytest.raises(AssertionError, match="two numbers"):
        MAKERS["resnet-2"](33, 12, 12).derivatives(torch.randn(3, 33), 0.0, laplacian="exact")
    with pytest.raises(AssertionError, match="two numbers"):
        MAKERS["mlp"](64, 64, 64).derivatives(torch.randn(3, 64), 0.0, laplacian="exact")
