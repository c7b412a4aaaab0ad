"""What a training step of a model gives."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The terms of an objective: batch means, in nats per sequence (regularizers in their own units).

    Attributes:
        loss: What to minimise: the weighted sum.
        reconstruction: E ln p(x|z), summed over frames.
        kl: The divergence between posterior and prior.
        hj: The squared Hamilton-Jacobi residual, mean over time.
        start: |grad u(z_0, 0)|^2.
        bound: reconstruction - kl, both unweighted: the lower bound itself.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    hj: Tensor
    start: Tensor
    bound: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """The terms by name, detached."""
        return {f.name: getattr(self, f.name).detach() for f in fields(self)}
