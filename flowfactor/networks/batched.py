"""Products over stages and samples at once: ``[K, S, n, .]`` for S stages of n samples under K networks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flowfactor._functorch import is_plain

Products = dict[str, Tensor]
_LARGE, _WIDE = 2**21, 128  # multiply-adds of a network, and widths, that make good oneDNN's calls, one for each
_SMALL = 2**14  # numbers in a matrix up to which it is turned round in memory once, to be multiplied faster
_CPUINFO = Path("/proc/cpuinfo")


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies faster than MKL, which torch takes: MKL leaves AVX-512 of AMD's processors unused.

    torch has no public way to it for float32; where its operator is absent or has changed, products stay with MKL.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
    if not (wide and _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text(errors="replace")):
        return False
    x, weight = torch.ones(2, 3), torch.arange(12.0).reshape(4, 3)
    try:
        return torch.equal(_by_onednn(x[None], weight.mT[None])[0], x @ weight.mT)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _by_onednn(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`matmul` by a call for each network."""
    linear = torch.ops.mkldnn._linear_pointwise
    pairs = zip(x.unbind(0), weight.mT.unbind(0), strict=True)
    found = [linear(rows, columns, None, "none", [], "") for rows, columns in pairs]
    return found[0].unsqueeze(0) if out is None and len(found) == 1 else torch.stack(found, out=out)


def _by_hand(x: Tensor, weight: Tensor) -> bool:
    """Whether these are numbers that oneDNN takes, and nothing follows the product: its operator has no derivative."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    numbers = (
        x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    )
    return numbers and not recorded and is_plain() and bool(torch.backends.mkldnn.enabled)


def matmul(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x [K, n, i] @ weight [K, i, j]`` by what multiplies fastest."""
    n, (i, j) = x.shape[1], weight.shape[1:]
    if min(i, j) >= _WIDE and n * i * j >= _LARGE and _by_hand(x, weight) and prefers_onednn():
        return _by_onednn(x, weight, out)
    return torch.bmm(x, weight) if out is None else torch.bmm(x, weight, out=out)


def flat(x: Tensor) -> Tensor:
    """``[K, S, n, H]`` as ``[K, S n, H]``; three dimensions stay."""
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x [K, (S,) n, i] @ weight [K, i, j]``, all samples of a network in one product."""
    if x.ndim == 3:
        return matmul(x, weight, out)
    result = matmul(flat(x), weight).reshape(*x.shape[:-1], weight.shape[-1])
    if out is None:
        return result
    return out.copy_(result)


def transposed(weight: Tensor) -> Tensor:
    """Weights ``[K, j, i]`` as ``[K, i, j]``: small ones as they are multiplied fastest, large ones where they lie."""
    return weight.mT.contiguous() if weight[0].numel() < _SMALL else weight.mT


def outer(x: Tensor, y: Tensor) -> Tensor:
    """The sum over stages and samples of outer products, ``[K, i, j]``."""
    return matmul(flat(x).mT, flat(y))


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
