"""What every prior shares: Gaussian components, and the distribution that is built from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal

from flowfactor._checks import check_count
from flowfactor._config import Named
from flowfactor.control import Control, broadcast, control_shape, times
from flowfactor.encoders.likelihoods import Event

# Scales are softplus(parameter) + floor: a component that shrinks onto one latent would have unbounded density.
MIN_SCALE = 1e-3


class Prior(Named, nn.Module):
    """Base of the priors: a density p_t(z) over latents for every time, as a torch Distribution.

    Args:
        dim: D.

    Example:
        >>> from flowfactor.priors import StandardNormal
        >>> prior = StandardNormal(3)
        >>> isinstance(prior, Prior), prior.dim
        (True, 3)
    """

    kind_of_part = "prior"
    unwritten = ("generator", "encoder")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)

    @property
    def at_rest(self) -> tuple[int, float] | None:
        """How many dimensions, the last, start at N(0, s^2) as room at rest, and s (see `Augmented`); None for none."""
        return None

    def at(self, t: float | Tensor, control: Control = 0) -> Distribution:
        """Distribution of the latents at time t.

        Args:
            t: Time in frames: a number, a scalar tensor or [*batch].
            control: An int, a LongTensor [*batch], weights [*batch, K] or a Schedule of these.

        Returns:
            A Distribution with event shape [D]; its batch shape is what t and the control broadcast to.

        Raises:
            ValueError: If the shapes of t and the control do not broadcast.
            TypeError: If the control is none of the kinds above.
        """
        raise NotImplementedError


class GaussianPrior(Prior):
    """Base of the priors that are Gaussian mixtures and do not change over time.

    A subclass implements `components`; `at` follows from it, and so does everything that `Diffusion` does with it.

    Args:
        dim: D.

    Example:
        >>> import torch
        >>> class Shifted(GaussianPrior):
        ...     def components(self):
        ...         return Components(torch.zeros(1), torch.ones(1, self.dim), torch.ones(1, self.dim))
        >>> Shifted(2).at(0.0).mean
        tensor([1., 1.])
    """

    def components(self) -> Components:
        """The M Gaussian components: log-weights [M], means [M, D] and variances [M, D]."""
        raise NotImplementedError

    def at(self, t: float | Tensor, control: Control = 0) -> Distribution:
        """Distribution of the latents, the same at every time: t and control only set the batch shape."""
        components = self.components()
        shape = broadcast(times(t, components.means).shape, control_shape(control))
        return components.distribution(components.means.new_zeros(()).expand(shape))


@dataclass(frozen=True)
class Components:
    r"""Gaussians with diagonal covariance whose mixture is a prior.

    Attributes:
        log_weights: [M], up to a constant.
        means: [M, D].
        variances: [M, D].

    Example:
        >>> import torch
        >>> two = Components(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> two.distribution(torch.tensor([0.0, 3.0])).variance.squeeze(-1)  # 1 + added, and 1 between the means
        tensor([2., 5.])
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def distribution(self, added: Tensor) -> Distribution:
        """The mixture, each component widened by independent Gaussian noise.

        Args:
            added: Variance to add in every direction, [*batch].

        Returns:
            A Distribution with batch shape [*batch] and event shape [D]: an `Event` of Normals (which has rsample) for
            one component, a `Mixture` for more.
        """
        scales = (self.variances + added[..., None, None]).sqrt()
        means = self.means.expand_as(scales)
        if self.means.shape[0] == 1:
            return Event(Normal(means.squeeze(-2), scales.squeeze(-2)), 1)
        return Mixture(Categorical(logits=self.log_weights), Event(Normal(means, scales), 1))


class Mixture(MixtureSameFamily):
    """torch's MixtureSameFamily of diagonal Gaussians, which draws only the component that it keeps.

    Its log_prob also takes an empty batch, as that of `Event` does.

    Example:
        >>> import torch
        >>> components = Event(Normal(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1)), 1)
        >>> Mixture(Categorical(torch.ones(2)), components).sample((5,)).shape
        torch.Size([5, 1])
    """

    def sample(self, sample_shape: Sequence[int] | Size = ()) -> Tensor:
        """Draws [*sample_shape, *batch, D]."""
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            index = self.mixture_distribution.expand(self.batch_shape).sample(Size(sample_shape))
            index = index[..., None, None].expand(*shape[:-1], 1, shape[-1])
            normal = self.component_distribution
            means, scales = (
                moment.expand(*shape[:-1], *moment.shape[-2:]).gather(-2, index).squeeze(-2)
                for moment in (normal.mean, normal.stddev)
            )
            return torch.normal(means, scales)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [*sample, *batch] of values [*sample, *batch, D], in nats."""
        each = self.component_distribution.log_prob(value.unsqueeze(-2))
        return (each + self.mixture_distribution.logits).logsumexp(-1)
