"""The prior of latents with room at rest."""

from __future__ import annotations

import torch

from flowfactor.encoders.augmented import check_rest
from flowfactor.priors.base import Components, GaussianPrior, Prior


class Augmented(GaussianPrior):
    r"""A prior with room at rest: $p(x, y) = p(x)\, N(y; 0, s^2 I)$, of latents $z = (x, y)$.

    x has the prior given, and y, the last A dimensions, starts at a narrow normal around zero, as in the posterior of a
    `flowfactor.encoders.AugmentedEncoder`: their divergence is 0. It is a Gaussian mixture where the prior given is one, so
    that `Diffusion` diffuses it in closed form, over all of z: y then has variance $s^2 + 2 D_k t$ at time t.

    Args:
        base: The prior of x, any `GaussianPrior`, with D dimensions.
        augment_dim: A.
        scale: The standard deviation s of y, in latent units.

    Attributes:
        dim: D + A.
        at_rest: A and s.

    Raises:
        TypeError: If the base has no Gaussian components, or A is no integer.
        ValueError: If A is below 1 or the scale not positive.

    Example:
        >>> from flowfactor.priors import Diffusion, StandardNormal
        >>> prior = Augmented(StandardNormal(2), augment_dim=1, scale=0.5)
        >>> prior.at(3.0).variance
        tensor([1.0000, 1.0000, 0.2500])
        >>> Diffusion(prior, num_flows=1, init=0.5).at(1.0).variance
        tensor([2.0000, 2.0000, 1.2500], grad_fn=...)
    """

    def __init__(self, base: GaussianPrior, augment_dim: int, scale: float = 0.05) -> None:
        if not isinstance(base, GaussianPrior):
            mend = "a prior of your own is one where it derives from GaussianPrior and gives its components"
            if isinstance(base, Prior) and isinstance(getattr(base, "base", None), GaussianPrior):
                mend = "one that diffuses does so over the room as well: Diffusion(Augmented(base, augment_dim), num_flows)"
            raise TypeError(
                "room at rest stands beside a GaussianPrior such as StandardNormal, GaussianMixture or VampPrior, got "
                f"{type(base).__name__}; {mend}"
            )
        rest = check_rest(augment_dim, scale)
        super().__init__(base.dim + rest[0])
        self.base, self._rest = base, rest

    @property
    def at_rest(self) -> tuple[int, float]:
        """A and s: how many dimensions, the last, start at rest, and their standard deviation."""
        return self._rest

    def components(self) -> Components:
        """The components of the base, each with the same narrow normal in the room."""
        inner, (count, scale) = self.base.components(), self.at_rest
        room = inner.means.new_zeros(len(inner.means), count)
        # Squared in the precision of the components: the root is then exactly the posterior's scale.
        variances = torch.cat([inner.variances, torch.full_like(room, scale).square()], -1)
        return Components(inner.log_weights, torch.cat([inner.means, room], -1), variances)
