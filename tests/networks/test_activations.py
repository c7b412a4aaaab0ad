"""Activations where no derivatives are taken of them."""

from __future__ import annotations

import pytest
import torch

from flowfactor.networks.activations import ACTIVATIONS, quick_tanh


def test_quick_tanh_is_off_by_a_rounding_of_one() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e-6, 90.0, -90.0, 3e38, -torch.inf])])
    exact = x.double().tanh()
    assert (quick_tanh(x).double() - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps
    block = torch.stack([x, x], -1)
    part = block[..., 0]
    assert quick_tanh(part, out=part) is part and torch.equal(block[..., 1], x)
    torch.testing.assert_close(part, quick_tanh(x), rtol=0, atol=3e-7)
    assert quick_tanh(torch.tensor([torch.nan])).isnan().all()


def test_double_precision_is_that_of_torch() -> None:
    x = torch.tensor([1e-12, 0.3, -4.0], dtype=torch.float64)
    assert torch.equal(quick_tanh(x), x.tanh())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_both_bases_agree(name: str) -> None:
    a = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(ACTIVATIONS[name].quick_base(a), ACTIVATIONS[name].base(a), rtol=0, atol=3e-7)
