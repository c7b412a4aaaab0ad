"""The antisymmetric maps of divergence-free fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SkewForms(nn.Module):
    """K antisymmetric matrices J_k: learned, given, or the canonical pairing (None).

    Only the entries above the diagonal are parameters, so that each of them matters.

    Args:
        kind: ``"learned"``, ``"canonical"`` or a tensor ``[D, D]`` or ``[K, D, D]``.
        dim: D.
        num_flows: K.
        generator: Source of the initial entries.
    """

    fixed: Tensor | None

    def __init__(self, kind: str | Tensor, dim: int, num_flows: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.dim, self.num_flows = dim, num_flows
        fixed = None
        self.upper: nn.Parameter | None = None
        if isinstance(kind, Tensor):
            if kind.shape not in ((dim, dim), (num_flows, dim, dim)):
                raise ValueError(f"skew must be [{dim}, {dim}] or [{num_flows}, {dim}, {dim}], got {list(kind.shape)}")
            if kind.requires_grad:
                raise ValueError('a skew that is given is fixed: give skew.detach(), or skew="learned" to learn one')
            fixed = (0.5 * (kind - kind.mT)).detach().expand(num_flows, dim, dim).clone()
        elif kind == "learned" and dim > 1:
            self.upper = nn.Parameter(torch.randn(num_flows, dim * (dim - 1) // 2, generator=generator) / dim**0.5)
        elif kind not in ("learned", "canonical"):
            raise ValueError(f'skew must be "learned", "canonical" or a tensor, got {kind!r}')
        self.register_buffer("fixed", fixed)

    def forward(self) -> Tensor | None:
        """The matrices ``[K, D, D]``, or None for the canonical pairing."""
        if self.upper is None:
            return self.fixed
        i, j = torch.triu_indices(self.dim, self.dim, 1, device=self.upper.device)
        J = self.upper.new_zeros(self.num_flows, self.dim, self.dim)
        J = J.index_put((torch.arange(self.num_flows, device=J.device).unsqueeze(-1), i, j), self.upper)
        return J - J.mT

    def matrices(self, like: Tensor) -> Tensor:
        """The matrices ``[K, D, D]``, of the dtype and device of ``like``, the canonical ones too."""
        forms = self()
        if forms is not None:
            return forms
        return canonical(torch.eye(self.dim, dtype=like.dtype, device=like.device)).mT.expand(self.num_flows, -1, -1)


def canonical(gradient: Tensor) -> Tensor:
    """Maps ``(g_1, g_2)`` to ``(g_2, -g_1)``, the two halves of the coordinates; an odd last one rests."""
    half = gradient.shape[-1] // 2
    first, second, rest = gradient.split([half, half, gradient.shape[-1] - 2 * half], -1)
    return torch.cat([second, -first, torch.zeros_like(rest)], -1)
