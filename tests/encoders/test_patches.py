"""Cutting frames into patches and joining them: both ways of moving numbers agree, whatever the layout."""

from __future__ import annotations

import pytest
import torch

from flowfactor.encoders import _patches
from flowfactor.encoders._patches import Cut, Join


def frames(layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = torch.zeros(x.numel() + 1, dtype=dtype)
    return {
        "plain": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "one of a sequence": torch.stack([x, -x], 1)[:, 0],
        "a part of a frame": torch.nn.functional.pad(x, (1, 2, 3, 0))[..., 3:, 1:-2],
        "off the grid of memory": flat[1:].view_as(x).copy_(x),
        "one frame of many": x.expand(1, 2, 3, 8, 12).movedim(0, 1),
        "repeated": x[:1].expand(2, 3, 8, 12),
    }[layout]


LAYOUTS = [
    "plain", "channels last", "one of a sequence", "a part of a frame", "off the grid of memory", "one frame of many",
    "repeated",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_moved_whole_are_numbers_moved_one_by_one(
    layout: str, patch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = frames(layout, dtype)
    cut = Cut(patch)(x)
    assert patch == 1 or cut.movedim(-3, -1).is_contiguous()
    torch.testing.assert_close(Join(patch)(cut), x, rtol=0, atol=0)
    monkeypatch.setattr(_patches, "_suits", lambda x, patch: False)
    torch.testing.assert_close(cut, Cut(patch)(x), rtol=0, atol=0)


@pytest.mark.parametrize("module", [Cut(2), Join(2)])
def test_both_have_gradients_of_any_order(module: torch.nn.Module) -> None:
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("module", [Cut(2), Join(2)])
def test_transforms_and_forward_derivatives_reach_through(module: torch.nn.Module) -> None:
    x, v = torch.randn(2, 3, 4, 4, 6)
    torch.testing.assert_close(torch.vmap(module)(x), module(x))
    torch.testing.assert_close(torch.func.jvp(module, (x,), (v,))[1], module(v))
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), 2 * x)
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, v))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, module(v))
