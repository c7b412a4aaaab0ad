"""Room at rest: dimensions of a latent that the encoder does not write, and a flow does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from flowfactor._checks import check_count
from flowfactor._config import Configured
from flowfactor.encoders.likelihoods import Event


def check_rest(augment_dim: Any, scale: Any) -> tuple[int, float]:
    """Checks a number of dimensions at rest and the standard deviation that they start with.

    Example:
        >>> check_rest(8, 0.05)
        (8, 0.05)
    """
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not is_number or not 0 < scale < math.inf:
        raise ValueError(
            f"the scale of dimensions at rest must be a finite number above 0, got {scale!r}: they start at N(0, scale^2), "
            "and without width there is no density; 0.05 is narrow"
        )
    return check_count("augment_dim", augment_dim), float(scale)


class AugmentedEncoder(Configured, nn.Module):
    r"""A posterior with room at rest: $q(x, y|\text{frame}) = q(x|\text{frame})\, N(y; 0, s^2 I)$.

    Of the latent $z = (x, y)$ an encoder writes the code x, the first D dimensions. The A dimensions y of the room say
    nothing of the frame: they start at a narrow normal around zero, under the prior as well (`flowfactor.priors.Augmented`),
    so that they add nothing to the divergence. A flow of dimension D + A writes them, and a decoder reads all. In such room
    a gradient flow can move y anywhere: the potential $u = y \cdot f(x)$ moves it by $f(x)$, whatever f is (augmented
    neural ODEs, Dupont et al., NeurIPS 2019, where y starts at 0 exactly, and has no density).

    Args:
        encoder: Maps frames to an independent normal of codes, event ``[D]``, and has a ``latent_dim``, as those of
            flowfactor do.
        augment_dim: A.
        scale: The standard deviation s of y, in latent units.

    Attributes:
        latent_dim: D + A.
        code_dim: D.
        at_rest: A and s.

    Raises:
        TypeError: If the encoder has no ``latent_dim``, or A is no integer; of a call, if the posterior is none of
            independent normals.
        ValueError: If A is below 1 or the scale not positive.

    Example:
        >>> import torch
        >>> from flowfactor.encoders import MLPEncoder
        >>> encoder = AugmentedEncoder(MLPEncoder((1, 8, 8), latent_dim=4), augment_dim=2)
        >>> q = encoder(torch.rand(3, 1, 8, 8))
        >>> q.event_shape, q.mean[0, 4:], q.stddev[0, 4:]
        (torch.Size([6]), tensor([0., 0.], ...), tensor([0.0500, 0.0500], ...))
    """

    kind_of_part = "encoder"

    def __init__(self, encoder: nn.Module, augment_dim: int, scale: float = 0.05) -> None:
        super().__init__()
        size = getattr(encoder, "latent_dim", None)
        if not isinstance(size, int):
            raise TypeError(
                f"an encoder with room at rest must say the size of its codes as latent_dim; got {type(encoder).__name__}"
            )
        self.encoder = encoder
        self.at_rest = check_rest(augment_dim, scale)
        self.code_dim, self.latent_dim = size, size + self.at_rest[0]

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """The shape of one frame, (C, H, W), where the encoder says it; else None."""
        return getattr(self.encoder, "event_shape", None)

    def forward(self, x: Tensor) -> Independent:
        """Posterior q(z|x) of frames ``[*batch, C, H, W]``: independent normals, event ``[D + A]``."""
        q: Distribution = self.encoder(x)
        if not (isinstance(q, Independent) and isinstance(q.base_dist, Normal) and len(q.event_shape) == 1):
            raise TypeError(
                "room at rest stands beside a posterior of independent normals, Independent(Normal(mean, std), 1), got "
                f"{type(q).__name__} from {type(self.encoder).__name__}: leave augment_dim at 0 for such an encoder"
            )
        mean, std = q.base_dist.loc, q.base_dist.scale
        (count, scale), lead = self.at_rest, q.batch_shape
        means = torch.cat([mean, mean.new_zeros(*lead, count)], -1)
        return Event(Normal(means, torch.cat([std, std.new_full((*lead, count), scale)], -1)), 1)
