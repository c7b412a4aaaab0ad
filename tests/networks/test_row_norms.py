"""Weighted row norms of a Jacobian: each way against the Jacobian written out, all derivatives, and which way is taken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from flowfactor.networks import row_norms
from flowfactor.networks.row_norms import Columns, Jacobians, Pairs, RowNorms, weighted_row_norms

WAYS: list[type[RowNorms]] = [Columns, Pairs, Jacobians]


def written_out(s: Tensor, m: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    jacobian = w2.unsqueeze(-3) @ (s.unsqueeze(-1) * w1.unsqueeze(-3))
    return (m * jacobian.square().sum(-1)).sum(-1)


def by(way: type[RowNorms], s: Tensor, m: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return way(w2, w1)(s, m)


def inputs(h1: int, stack: tuple[int, ...] = (2,), dim: int = 5) -> tuple[Tensor, ...]:
    shapes = [(3, h1), (3, 4), (h1, dim), (4, h1)]
    return tuple(torch.randn(*stack, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("h1", [1, 2, 3, 6, 7])
def test_every_way_agrees_with_the_jacobian(h1: int, dim: int, way: type[RowNorms]) -> None:
    x = inputs(h1, dim=dim)
    found, expected = by(way, *x), written_out(*x)
    torch.testing.assert_close(found, expected)
    bar = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, bar)
    torch.testing.assert_close(torch.autograd.grad(found, x, bar), wanted)
    s, m, w1, w2 = (v.detach() for v in x)
    torch.testing.assert_close(way(w2, w1).pull(s, m, bar, parameters=True), wanted)
    assert way(w2, w1).pull(s, m, bar, parameters=False)[2:] == (None, None)
    torch.testing.assert_close(way(w2, w1).pull(s, m, bar, parameters=False)[:2], wanted[:2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("h1", [2, 3, 4, 6])
def test_first_and_second_derivatives_in_both_modes(h1: int, way: type[RowNorms]) -> None:
    x = inputs(h1, (), 3)
    assert torch.autograd.gradcheck(partial(by, way), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(partial(by, way), x, check_fwd_over_rev=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("error")
def test_torch_func_transforms_compose(way: type[RowNorms]) -> None:
    s, m, w1, w2 = (x.detach() for x in inputs(4, ()))
    many = torch.randn(6, *s.shape, dtype=torch.float64)
    ours = partial(by, way)

    def through(function: object) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda s: function(s, m, w1, w2).sum()))(many)

    torch.testing.assert_close(through(ours), through(written_out))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w2: ours(s, m, w1, w2).sum()))(w2)
    expected = torch.func.jacrev(torch.func.jacrev(lambda w2: written_out(s, m, w1, w2).sum()))(w2)
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize(
    ("dim", "h1", "h2", "way"),
    [(2, 64, 64, Columns), (31, 64, 64, Columns), (64, 64, 64, Pairs), (324, 64, 64, Pairs), (2, 3, 512, Pairs),
     (8, 256, 256, Columns), (200, 256, 256, Jacobians), (324, 324, 324, Jacobians), (3, 1024, 2048, Jacobians)],
)  # fmt: skip
def test_the_way_with_the_fewest_multiply_adds_is_taken(dim: int, h1: int, h2: int, way: type[RowNorms]) -> None:
    taken = weighted_row_norms(torch.empty(h2, h1, device="meta"), torch.empty(h1, dim, device="meta"))
    assert type(taken) is way


def test_a_form_that_would_take_too_much_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(6, dim=2)
    before = weighted_row_norms(x[3], x[2])
    monkeypatch.setattr(row_norms, "_FORM_LIMIT", 0)
    after = weighted_row_norms(x[3], x[2])
    assert (type(before), type(after)) == (Columns, Jacobians)
    torch.testing.assert_close(before(*x[:2]), after(*x[:2]))
