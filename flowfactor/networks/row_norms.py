r"""Weighted norms of the rows of a Jacobian, which is what the exact Laplacian of a network with hidden layers costs most.

$$r = \sum_k m_k\,|(W_2\,\mathrm{diag}(s)\,W_1)_k|^2$$
for $W_1$ of shape H1 x D and $W_2$ of shape H2 x H1, in the cheapest of three ways:

- `Columns`: $r = \sum_{k,d} m_k\,(\sum_i s_i\,W_{1id} W_{2ki})^2$, one product with a form of the weights alone, of
  H1 H2 D multiply-adds a sample.
- `Pairs`: $r = \sum_{k,i,j} m_k\, W_{2ki} W_{2kj} G_{ij}\, s_i s_j$ with the Gram matrix $G = W_1 W_1^\top$, whatever D is.
  The form is symmetric in i and j. With the pairs (i, i + d mod H1), d = 0 ... H1/2, every unordered pair occurs once, and
  the products $s_i s_{i+d}$ are a product of s with shifted views of itself: one large product over the pairs remains, of
  H1 H2 (H1/2 + 1) multiply-adds.
- `Jacobians`: one matrix a sample, where such a form would take too much memory.

So columns are cheaper up to D = H1/2, and measured times cross there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

_FORM_LIMIT = 1 << 22  # entries of a form up to which it pays

Pulled = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


class RowNorms(ABC):
    r"""The map $(s, m) \mapsto \sum_k m_k |(W_2 \mathrm{diag}(s) W_1)_k|^2$, bound to its weights.

    Args:
        w2: ``[*stack, H2, H1]``.
        w1: ``[*stack, H1, D]``.
    """

    def __init__(self, w2: Tensor, w1: Tensor) -> None:
        self.w2, self.w1 = w2, w1

    @abstractmethod
    def __call__(self, s: Tensor, m: Tensor) -> Tensor:
        """The norms ``[*stack, n]`` of ``s [*stack, n, H1]`` and ``m [*stack, n, H2]``, which autograd can follow."""

    def pull(self, s: Tensor, m: Tensor, bar: Tensor, *, parameters: bool) -> Pulled:
        """The cotangents of s, m and, where asked for, of both weights (w1, w2), of those of the norms ``[*stack, n]``."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ((s, m, self.w1, self.w2) if parameters else (s, m))]
            norms = type(self)(leaves[3], leaves[2]) if parameters else self
            found = torch.autograd.grad(norms(leaves[0], leaves[1]), leaves, bar)
        return (*found, None, None) if not parameters else found  # type: ignore[return-value]


def weighted_row_norms(w2: Tensor, w1: Tensor) -> RowNorms:
    """Binds the weights in the cheapest way.

    Args:
        w2: ``[*stack, H2, H1]``.
        w1: ``[*stack, H1, D]``.
    """
    h2, h1, dim = *w2.shape[-2:], w1.shape[-1]
    columns, pairs = h2 * h1 * dim, h2 * h1 * (h1 // 2 + 1)
    if min(columns, pairs) > _FORM_LIMIT:
        return Jacobians(w2, w1)
    return Columns(w2, w1) if columns < pairs else Pairs(w2, w1)


class Columns(RowNorms):
    """Through the columns of the Jacobian, all of one product."""

    def __init__(self, w2: Tensor, w1: Tensor) -> None:
        super().__init__(w2, w1)
        self.form = (w1.unsqueeze(-1) * w2.mT.unsqueeze(-2)).flatten(-2)  # [*stack, H1, D H2]

    def columns(self, s: Tensor) -> Tensor:
        """The transposed Jacobians ``[*stack, n, D, H2]``."""
        return (s @ self.form).unflatten(-1, (self.w1.shape[-1], self.w2.shape[-2]))

    def __call__(self, s: Tensor, m: Tensor) -> Tensor:
        return (self.columns(s).square().sum(-2) * m).sum(-1)

    def pull(self, s: Tensor, m: Tensor, bar: Tensor, *, parameters: bool) -> Pulled:
        columns, each = self.columns(s), bar.unsqueeze(-1)
        m_bar = columns.square().sum(-2).mul_(each)
        columns_bar = columns.mul_((2 * each * m).unsqueeze(-2)).flatten(-2)
        s_bar = columns_bar @ self.form.mT
        if not parameters:
            return s_bar, m_bar, None, None
        form_bar = (s.mT @ columns_bar).unflatten(-1, (self.w1.shape[-1], self.w2.shape[-2]))
        w1_bar = (form_bar @ self.w2.mT.unsqueeze(-1)).squeeze(-1)
        return s_bar, m_bar, w1_bar, (self.w1.unsqueeze(-2) @ form_bar).squeeze(-2).mT


class Pairs(RowNorms):
    """Through the products of all pairs of entries of s."""

    def __init__(self, w2: Tensor, w1: Tensor) -> None:
        super().__init__(w2, w1)
        gram = w1 @ w1.mT
        self.places, self.counts = _places(gram)
        self.weights = (gram.flatten(-2).index_select(-1, self.places) * self.counts).unsqueeze(
            -1
        )  # [*stack, pairs, 1]
        self.form = (_pairs(w2) * self.weights).mT  # [*stack, H2, pairs]

    def __call__(self, s: Tensor, m: Tensor) -> Tensor:
        return ((self.form @ _pairs(s)) * m.mT).sum(-2)

    def pull(self, s: Tensor, m: Tensor, bar: Tensor, *, parameters: bool) -> Pulled:
        pairs, each = _pairs(s), bar.unsqueeze(-1)
        m_bar = (self.form @ pairs).mT * each
        rows_bar = each * m
        s_bar = _gathered(self.form.mT @ rows_bar.mT, s)
        if not parameters:
            return s_bar, m_bar, None, None
        form_bar = pairs @ rows_bar  # [*stack, pairs, H2]
        gram_bar = torch.zeros_like(self.w1 @ self.w1.mT).flatten(-2)
        gram_bar[..., self.places] = (form_bar * _pairs(self.w2)).sum(-1) * self.counts
        gram_bar = gram_bar.unflatten(-1, (s.shape[-1], s.shape[-1]))
        return s_bar, m_bar, (gram_bar + gram_bar.mT) @ self.w1, _gathered(form_bar.mul_(self.weights), self.w2)


class Jacobians(RowNorms):
    """Through a matrix of each sample: its columns, or its product with the Gram matrix of W_1 where that is smaller."""

    def __call__(self, s: Tensor, m: Tensor) -> Tensor:
        h1, dim = self.w1.shape[-2:]
        if dim <= h1:
            columns = (s.unsqueeze(-2) * self.w1.mT.unsqueeze(-3)).flatten(-3, -2) @ self.w2.mT  # [*stack, n D, H2]
            return (columns.unflatten(-2, (-1, dim)).square().sum(-2) * m).sum(-1)
        jacobian = self.w2.unsqueeze(-3) * s.unsqueeze(-2)  # [*stack, n, H2, H1]
        gram = (self.w1 @ self.w1.mT).unsqueeze(-3)
        return (((jacobian @ gram) * jacobian).sum(-1) * m).sum(-1)


def _pairs(x: Tensor) -> Tensor:
    """Products ``x_i x_{i+d}`` of the columns of ``x [*stack, n, H]``, ``[*stack, (H // 2 + 1) H, n]`` with d first."""
    x = x.mT.contiguous()
    if torch.compiler.is_compiling():  # one graph for all batch sizes, which a Function with an unrolled loop is not
        return (_shifted(x) * x.unsqueeze(-3)).flatten(-3, -2)
    return _Pairs.apply(x).flatten(-3, -2)


def _gathered(bar: Tensor, x: Tensor) -> Tensor:
    """The pull of `_pairs`: the cotangent of ``x``, of that of its pairs."""
    h = x.shape[-1]
    return _Gathered.apply(bar.unflatten(-2, (h // 2 + 1, h)), x.mT.contiguous()).mT


def _places(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pairs stand in the flat Gram matrix, in the order of `_pairs`, and how often each counts."""
    h = gram.shape[-1]
    i = torch.arange(h, device=gram.device)
    d = torch.arange(h // 2 + 1, device=gram.device).unsqueeze(-1)
    # (i, i) stands for itself; at d = H / 2 each pair comes by both of its ends.
    counts = torch.where((d == 0) | (2 * d == h), 1.0, 2.0).to(gram).expand(-1, h).flatten()
    return (i * h + (i + d) % h).flatten(), counts


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
