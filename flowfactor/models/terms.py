"""What a training step of a model gives."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace

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
        solenoidal: The squared speed of what is not the gradient of the potential, like ``hj``; 0 without a weight.
        acceleration: The squared acceleration |Dv/Dt|^2, likewise.
        code: The squared distance between a path and the code of a frame that it passes; 0 without a weight.
        commutator: |[v_i, v_j]|^2, mean over pairs of flows and over frames, likewise.
        solver_error: The squared error estimate of a step of a solver, mean over time, likewise.
        bending: The squared second differences of a path's frames, mean over time, likewise.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    hj: Tensor
    start: Tensor
    bound: Tensor
    kl_factor: Tensor = field(default_factory=lambda: torch.zeros(()))
    solenoidal: Tensor = field(default_factory=lambda: torch.zeros(()))
    acceleration: Tensor = field(default_factory=lambda: torch.zeros(()))
    code: Tensor = field(default_factory=lambda: torch.zeros(()))
    commutator: Tensor = field(default_factory=lambda: torch.zeros(()))
    solver_error: Tensor = field(default_factory=lambda: torch.zeros(()))
    bending: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def plain(cls, reconstruction: Tensor, kl: Tensor, loss: Tensor | None = None) -> Terms:
        """The terms of a model without flow; the loss is the negative bound where it is not given."""
        zero, bound = kl.new_zeros(()), reconstruction - kl
        return Terms(-bound if loss is None else loss, reconstruction, kl, zero, zero, bound)

    def as_dict(self) -> dict[str, Tensor]:
        """The terms by name, detached."""
        return {f.name: getattr(self, f.name).detach() for f in fields(self)}


@dataclass(frozen=True)
class SequenceTerms:
    """The terms of each solve ``[N]``, of each sequence ``[B]``, or of each sequence under each flow ``[B, K]``.

    Attributes:
        loss: What to minimise.
        reconstruction: As in `Terms`, like those that follow.
        kl: The divergence between posterior and prior.
        hj: The squared Hamilton-Jacobi residual.
        start: The squared speed at the start.
        kl_factor: KL[q(k|x) | p(k)]; 0 where k is given.
        solenoidal: The squared speed of what is not the gradient of the potential; 0 where left out.
        acceleration: The squared acceleration, likewise.
        code: The squared distance between a path and a code, likewise.
        commutator: |[v_i, v_j]|^2, likewise.
        solver_error: The squared error estimate of a step, likewise.
        bending: The squared second differences of a path's frames, likewise.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    hj: Tensor
    start: Tensor
    kl_factor: Tensor
    solenoidal: Tensor = field(default_factory=lambda: torch.zeros(()))
    acceleration: Tensor = field(default_factory=lambda: torch.zeros(()))
    code: Tensor = field(default_factory=lambda: torch.zeros(()))
    commutator: Tensor = field(default_factory=lambda: torch.zeros(()))
    solver_error: Tensor = field(default_factory=lambda: torch.zeros(()))
    bending: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.default_factory is not MISSING):  # left out, 0 for each
            value = getattr(self, name)
            if isinstance(value, Tensor) and not value.ndim:
                object.__setattr__(self, name, value.to(self.kl).expand_as(self.kl))

    def with_factor(self, kl_factor: Tensor) -> SequenceTerms:
        """The same with the divergence of q(k|x), which is part of the loss."""
        return replace(self, loss=self.loss + kl_factor, kl_factor=kl_factor)

    def table(self, row: Tensor, flow: Tensor, shape: torch.Size) -> SequenceTerms:
        """Sorts N solves into a table ``[B, K]``, 0 where nothing was solved."""
        return SequenceTerms(*(x.new_zeros(shape).index_put((row, flow), x) for x in vars(self).values()))

    def expected(self, log_q: Tensor) -> SequenceTerms:
        """Expectations of a table over q(k|x), ``[B]``."""
        return SequenceTerms(*((log_q.exp() * x).sum(-1) for x in vars(self).values()))

    def mean(self) -> Terms:
        """The terms of the batch."""
        made = {name: value.mean() for name, value in vars(self).items()}
        return Terms(bound=made["reconstruction"] - made["kl"] - made["kl_factor"], **made)
