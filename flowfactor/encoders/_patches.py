"""Cutting frames into patches and joining patches to frames, forth and back with one copy each."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flowfactor._functorch import is_plain

_WHOLE = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
_LARGEST = max(_WHOLE)


# torch's PixelUnshuffle leaves an empty batch as it is, whatever the sizes; these two take any batch.
class Cut(nn.Module):
    """Cuts frames [*batch, C, H, W] into patches [*batch, C * P * P, H / P, W / P], channels last in memory."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(_cut(x, self.patch), "... h w c -> ... c h w")

    def extra_repr(self) -> str:
        return str(self.patch)


class Join(nn.Module):
    """Joins patches [*batch, C * P * P, H, W] to frames [*batch, C, H * P, W * P]: the inverse of `Cut`.

    Gradients arrive channels last: products of a position's patches want them so.
    """

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return _join(rearrange(x, "... c h w -> ... h w c"), self.patch)

    def extra_repr(self) -> str:
        return str(self.patch)


def _cut(x: Tensor, patch: int) -> Tensor:
    """[*batch, C, H, W] as [*batch, H / P, W / P, C * P * P]."""
    return _Move.apply(x, patch, False) if _suits(x, patch) else _cut_plainly(x, patch)


def _join(x: Tensor, patch: int) -> Tensor:
    """The inverse of `_cut`."""
    return _Move.apply(x, patch, True) if _suits(x, patch) else _join_plainly(x, patch)


def _cut_plainly(x: Tensor, patch: int) -> Tensor:
    return rearrange(x, "... c (h p) (w q) -> ... h w (c p q)", p=patch, q=patch)


def _join_plainly(x: Tensor, patch: int) -> Tensor:
    return rearrange(x, "... h w (c p q) -> ... c (h p) (w q)", p=patch, q=patch)


def _suits(x: Tensor, patch: int) -> bool:
    """Whether the rows of a patch can be moved whole, outside of transforms that would have to look inside."""
    return patch > 1 and min(patch * x.element_size(), _LARGEST) in _WHOLE and x.numel() > 0 and is_plain()


class _Move(torch.autograd.Function):
    """A row of a patch is moved in pieces of up to 16 bytes: half of what copying single numbers costs, or less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, patch: int, join: bool) -> Tensor:
        ctx.patch, ctx.join = patch, join
        whole, kind = _WHOLE[min(patch * x.element_size(), _LARGEST)], x.dtype
        aligned = all(stride % patch == 0 for stride in (*x.stride()[:-1], x.storage_offset()))
        # Clones, since what counts as contiguous may have any stride along dimensions of size 1.
        x = x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
        rows = x.unflatten(-1, (x.shape[-1] // patch, patch)).view(whole)
        order = "... h w (c p) m -> ... c h p w m" if join else "... c (h p) w m -> ... h w c p m"
        moved = rearrange(rows, order, p=patch).clone(memory_format=torch.contiguous_format).view(kind).flatten(-2)
        return moved.flatten(-3, -2) if join else moved.flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (_cut if ctx.join else _join)(grads[0], ctx.patch), None, None
