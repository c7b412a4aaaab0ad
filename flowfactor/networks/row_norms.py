r"""Weighted norms of the rows of a Jacobian, which is what the exact Laplacian of a network with hidden layers costs most.

$$r = \sum_k m_k\,|(W_2\,\mathrm{diag}(s)\,W_1)_k|^2 = \sum_{k,i,j} m_k\, W_{2ki} W_{2kj} G_{ij}\, s_i s_j,
  \qquad G = W_1 W_1^\top .$$
The form is symmetric in i and j. With the pairs (i, i + d mod H), d = 0 ... H/2, every unordered pair occurs once, and the
products $s_i s_{i+d}$ are a product of s with shifted views of itself: one large matrix product over the pairs remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RowNorms = Callable[[Tensor, Tensor], Tensor]
_FORM_LIMIT = 1 << 21  # entries of the precomputed form, H2 x H1 (H1 / 2 + 1), up to which it pays


def weighted_row_norms(w2: Tensor, gram: Tensor) -> RowNorms:
    r"""Binds $(s, m) \mapsto \sum_k m_k |(W_2 \mathrm{diag}(s) W_1)_k|^2$ for the Gram matrix of W_1.

    Args:
        w2: ``[*stack, H2, H1]``.
        gram: $W_1 W_1^\top$, ``[*stack, H1, H1]``.

    Returns:
        A function of ``s [*stack, n, H1]`` and ``m [*stack, n, H2]`` that returns ``[*stack, n]``.
    """
    h2, h1 = w2.shape[-2:]
    if h2 * h1 * (h1 // 2 + 1) > _FORM_LIMIT:

        def rows(s: Tensor, m: Tensor) -> Tensor:
            jacobian = w2.unsqueeze(-3) * s.unsqueeze(-2)  # [*stack, n, H2, H1]
            return (((jacobian @ gram.unsqueeze(-3)) * jacobian).sum(-1) * m).sum(-1)

        return rows

    form = (_pairs(w2) * _pair_weights(gram)).mT  # [*stack, H2, pairs]

    def through_pairs(s: Tensor, m: Tensor) -> Tensor:
        return ((form @ _pairs(s)) * m.mT).sum(-2)

    return through_pairs


def _pairs(x: Tensor) -> Tensor:
    """Products ``x_i x_{i+d}`` of the columns of ``x [*stack, n, H]``, ``[*stack, (H // 2 + 1) H, n]`` with d first."""
    x = x.mT.contiguous()
    if torch.compiler.is_compiling():  # one graph for all batch sizes, which a Function with an unrolled loop is not
        return (_shifted(x) * x.unsqueeze(-3)).flatten(-3, -2)
    return _Pairs.apply(x).flatten(-3, -2)


def _pair_weights(gram: Tensor) -> Tensor:
    """The entries of the Gram matrix in the order of `_pairs`, ``[*stack, pairs, 1]``, so that each pair counts as often."""
    h = gram.shape[-1]
    i = torch.arange(h, device=gram.device)
    d = torch.arange(h // 2 + 1, device=gram.device).unsqueeze(-1)
    # (i, i) stands for itself; at d = H / 2 each pair comes by both of its ends.
    twice = torch.where((d == 0) | (2 * d == h), 1.0, 2.0).to(gram).expand(-1, h).flatten()
    return (gram.flatten(-2).index_select(-1, (i * h + (i + d) % h).flatten()) * twice).unsqueeze(-1)


def _shifted(x: Tensor) -> Tensor:
    """Views ``[*stack, H // 2 + 1, H, n]`` of ``x [*stack, H, n]``, the d-th shifted by d."""
    h = x.shape[-2]
    return torch.cat([x, x[..., : h // 2, :]], -2).unfold(-2, h, 1).mT


def _mixed(x: Tensor, y: Tensor) -> Tensor:
    """``x_i y_{i+d} + y_i x_{i+d}``."""
    return x.unsqueeze(-3) * _shifted(y) + y.unsqueeze(-3) * _shifted(x)


class _Pairs(torch.autograd.Function):
    """``y_{d,i} = x_i x_{i+d}``, whose backward pass runs over shifts: autograd's would gather and scatter."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        shifted = _shifted(x)
        # Left to itself, the product takes an order of dimensions from the views that flattening would have to copy.
        return torch.mul(shifted, x.unsqueeze(-3), out=x.new_empty(shifted.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> Tensor:
        return _Gathered.apply(y_bar, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _mixed(x, x_dot)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _Pairs.apply(x.movedim(in_dims[0], 0)), 0


class _Gathered(torch.autograd.Function):
    """``sum_d (y_{d,i} x_{i+d} + y_{d,i-d} x_{i-d})``, the pull of `_Pairs`; for fixed y it is symmetric in x."""

    @staticmethod
    def forward(y: Tensor, x: Tensor) -> Tensor:
        h, half = x.shape[-2], x.shape[-2] // 2
        rows, shifted = y.unbind(-3), _shifted(x).unbind(-3)
        own = 2 * rows[0] * x
        wrapped = own.new_zeros(*own.shape[:-2], h + half, own.shape[-1])
        places = wrapped.unfold(-2, h, 1).mT.unbind(-3)
        for row, other, place in zip(rows[1:], shifted[1:], places[1:], strict=True):
            own.addcmul_(row, other)
            place.addcmul_(row, x)
        own += wrapped[..., :h, :]
        own[..., :half, :] += wrapped[..., h:, :]
        return own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, Tensor]:
        y, x = ctx.saved_tensors
        return _mixed(x, bar), _Gathered.apply(y, bar)

    @staticmethod
    def jvp(ctx: Any, y_dot: Tensor | None, x_dot: Tensor | None) -> Tensor:
        y, x = ctx.saved_tensors
        parts = [] if y_dot is None else [_Gathered.apply(y_dot, x)]
        parts += [] if x_dot is None else [_Gathered.apply(y, x_dot)]
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], y: Tensor, x: Tensor) -> tuple[Tensor, int]:
        both = [
            v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
            for v, dim in zip((y, x), in_dims, strict=True)
        ]
        return _Gathered.apply(*both), 0
