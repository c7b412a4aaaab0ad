"""Products over stages and samples at once: ``[K, S, n, .]`` for S stages of n samples under K networks."""

from __future__ import annotations

import torch
from torch import Tensor

Products = dict[str, Tensor]


def flat(x: Tensor) -> Tensor:
    """``[K, S, n, H]`` as ``[K, S n, H]``; three dimensions stay."""
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x [K, (S,) n, i] @ weight [K, i, j]``, all samples of a network in one product."""
    if x.ndim == 3:
        return torch.bmm(x, weight) if out is None else torch.bmm(x, weight, out=out)
    result = torch.bmm(flat(x), weight).reshape(*x.shape[:-1], weight.shape[-1])
    if out is None:
        return result
    return out.copy_(result)


_SMALL = 2**14


def transposed(weight: Tensor) -> Tensor:
    """Weights ``[K, j, i]`` as ``[K, i, j]``: small ones as they are multiplied fastest, large ones where they lie."""
    return weight.mT.contiguous() if weight[0].numel() < _SMALL else weight.mT


def outer(x: Tensor, y: Tensor) -> Tensor:
    """The sum over stages and samples of outer products, ``[K, i, j]``."""
    return torch.bmm(flat(x).mT, flat(y))


def add(x: Tensor | None, y: Tensor) -> Tensor:
    """The sum, where None is zero."""
    return y if x is None else x + y


def sum_into(total: Products, name: str, value: Tensor) -> None:
    """Adds to what is there under a name, if anything is."""
    total[name] = total[name] + value if name in total else value


def outer_into(total: Products, name: str, x: Tensor, y: Tensor) -> None:
    """Adds the `outer` of x and y to what is there under a name, in the memory of the new product."""
    value = outer(x, y)
    total[name] = value.add_(total[name]) if name in total else value
