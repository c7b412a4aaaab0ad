"""What a training step of a model gives."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The terms of an objective: batch means, in nats per sequence (regularizers in their own units).

    Attributes:
        loss: What to minimise: the weighted sum.
        reconstruction: E ln p(x|z), summed over frames.
        kl: The divergence between posterior and prior.
        hj: The squared Hamilton-Jacobi residual, mean over time. With ``regularize_every`` above 1 it is 0 in most steps of
            a training and that many times as large in the others; evaluation shows it as it is.
        start: |grad u(z_0, 0)|^2, likewise.
        bound: reconstruction - kl - kl_factor, all unweighted: the lower bound itself.
        kl_factor: KL[q(k|x) | p(k)], mean over sequences; 0 where k is given.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    hj: Tensor
    start: Tensor
    bound: Tensor
    kl_factor: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def plain(cls, reconstruction: Tensor, kl: Tensor, loss: Tensor | None = None) -> Terms:
        """The terms of a model without flow; the loss is the negative bound where it is not given."""
        zero, bound = kl.new_zeros(()), reconstruction - kl
        return Terms(-bound if loss is None else loss, reconstruction, kl, zero, zero, bound)

    def as_dict(self) -> dict[str, Tensor]:
        """The terms by name, detached."""
        return {f.name: getattr(self, f.name).detach() for f in fields(self)}


@dataclass(frozen=True)
class Begin:
    """What all flows of a sequence share: z_0, and its divergence (path) or log-density (marginal), [B]."""

    z0: Tensor
    density: Tensor


@dataclass(frozen=True)
class Pieces:
    """The terms of each solve, [N], or of each sequence under each flow, [B, K]."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    hj: Tensor
    start: Tensor

    def table(self, row: Tensor, flow: Tensor, shape: torch.Size) -> Pieces:
        """Sorts N solves into a table [B, K], 0 where nothing was solved."""
        return Pieces(*(x.new_zeros(shape).index_put((row, flow), x) for x in vars(self).values()))

    def expected(self, log_q: Tensor) -> Pieces:
        """Expectations over q(k|x), [B]."""
        return Pieces(*((log_q.exp() * x).sum(-1) for x in vars(self).values()))
