"""Weighted row norms of a Jacobian: the form over pairs against the Jacobian written out, and all its derivatives."""

import pytest
import torch
from torch import Tensor

from flowfactor.networks import row_norms
from flowfactor.networks.row_norms import weighted_row_norms


def written_out(s: Tensor, m: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    jacobian = w2.unsqueeze(-3) @ (s.unsqueeze(-1) * w1.unsqueeze(-3))
    return (m * jacobian.square().sum(-1)).sum(-1)


def ours(s: Tensor, m: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return weighted_row_norms(w2, w1)(s, m)


def inputs(h1: int, stack: tuple[int, ...] = (2,)) -> tuple[Tensor, ...]:
    shapes = [(3, h1), (3, 4), (h1, 5), (4, h1)]
    return tuple(torch.randn(*stack, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("limit", [0, 1 << 21], ids=["jacobian", "pairs"])
@pytest.mark.parametrize("h1", [1, 2, 3, 6, 7])
def test_both_ways_agree_with_the_jacobian(h1: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_norms, "_FORM_LIMIT", limit)
    x = inputs(h1)
    found, expected = ours(*x), written_out(*x)
    torch.testing.assert_close(found, expected)
    bar = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, x, bar), torch.autograd.grad(expected, x, bar))


@pytest.mark.parametrize("h1", [2, 3, 4])
def test_first_and_second_derivatives_in_both_modes(h1: int) -> None:
    x = inputs(h1, ())
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, x, check_fwd_over_rev=True)


@pytest.mark.filterwarnings("error")
def test_torch_func_transforms_compose() -> None:
    s, m, w1, w2 = (x.detach() for x in inputs(4, ()))
    many = torch.randn(6, *s.shape, dtype=torch.float64)

    def through(function: object) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda s: function(s, m, w1, w2).sum()))(many)

    torch.testing.assert_close(through(ours), through(written_out))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w2: ours(s, m, w1, w2).sum()))(w2)
    expected = torch.func.jacrev(torch.func.jacrev(lambda w2: written_out(s, m, w1, w2).sum()))(w2)
    torch.testing.assert_close(hessian, expected)
