"""Priors that do not change over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor.priors.base import MIN_SCALE, Components, GaussianPrior

# Pseudo-inputs start at least this far inside [0, 1]: at the very ends the sigmoid's gradient vanishes.
_MARGIN = 0.01


def inverse_softplus(x: float) -> float:
    """The number whose softplus is x > 0, accurate for small and large x.

    Example:
        >>> round(inverse_softplus(math.log(2)), 6)
        0.0
    """
    return x + math.log(-math.expm1(-x))


class StandardNormal(GaussianPrior):
    """The standard normal prior N(0, I).

    Args:
        dim: D.

    Raises:
        TypeError: If dim is not an integer.
        ValueError: If dim is below 1.

    Example:
        >>> import torch
        >>> StandardNormal(2).at(0.0).log_prob(torch.zeros(2))  # -ln(2 pi)
        tensor(-1.8379)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("_zero", torch.zeros(()), persistent=False)  # carries dtype and device

    _zero: Tensor

    def components(self) -> Components:
        """One component: mean 0 and variance 1."""
        zeros = self._zero.expand(1, self.dim)
        return Components(self._zero.expand(1), zeros, zeros + 1)


class GaussianMixture(GaussianPrior):
    r"""A learned mixture of Gaussians: \(p(z) = \sum_m w_m\, N(z; \mu_m, \mathrm{diag}(\sigma_m^2))\).

    It starts close to the standard normal: equal weights, means drawn from N(0, spread I) and variances 1 - spread, so
    that the whole has variance 1. Weights are a softmax; scales are softplus(parameter) + 0.001, the floor since a
    component that collapsed onto one latent would have unbounded density.

    Args:
        dim: D.
        components: M.
        spread: Share of the initial unit variance that lies between the means, in (0, 1).
        generator: Draws the initial means.

    Raises:
        TypeError: If dim or components is not an integer.
        ValueError: If dim or components is below 1, or spread is not in (0, 1).

    Example:
        >>> import torch
        >>> prior = GaussianMixture(4, components=10, generator=torch.Generator().manual_seed(0))
        >>> prior.at(0.0).log_prob(torch.randn(5, 4)).shape
        torch.Size([5])
        >>> prior.weights.sum()
        tensor(1.0000, grad_fn=<SumBackward0>)
    """

    def __init__(
        self, dim: int, components: int = 10, *, spread: float = 0.5, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim)
        check_count("components", components)
        if not 0 < spread < 1:
            raise ValueError(f"spread must lie strictly between 0 and 1, got {spread}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(math.sqrt(spread) * torch.randn(components, dim, generator=generator))
        start = max(math.sqrt(1 - spread) - MIN_SCALE, MIN_SCALE)
        self.raw_scales = nn.Parameter(torch.full((components, dim), inverse_softplus(start)))

    @property
    def weights(self) -> Tensor:
        """Weights [M], which sum to 1."""
        return self.logits.softmax(-1)

    @property
    def scales(self) -> Tensor:
        """Standard deviations [M, D]."""
        return F.softplus(self.raw_scales) + MIN_SCALE

    def components(self) -> Components:
        """The M components."""
        return Components(self.logits, self.means, self.scales.square())


class VampPrior(GaussianPrior):
    r"""The variational mixture of posteriors: \(p(z) = \frac{1}{M} \sum_m q(z \mid u_m)\).

    Tomczak and Welling, VAE with a VampPrior (AISTATS 2018), equation 9. The pseudo-inputs u_m are learned and kept in
    [0, 1] as sigmoids of parameters.

    The encoder is borrowed: it is used, and gradients flow into it, but it is neither among this module's parameters
    nor in its state dict, since the model that owns it trains, moves and saves it.

    Args:
        encoder: Maps inputs [M, *event] to an Independent Normal over latents [D], as `ConvEncoder` does.
        pseudo_inputs: Initial pseudo-inputs [M, *event] in [0, 1], for example training frames. They are moved 0.01
            away from 0 and 1, where the sigmoid's gradient would vanish.
        count: M, where pseudo_inputs is None: they start as noise.
        shape: Shape of one input, for example (C, H, W), where pseudo_inputs is None.
        generator: Draws the noise.

    Raises:
        TypeError: If the encoder returns something else than an Independent Normal with event shape [D].
        ValueError: If pseudo_inputs are outside [0, 1] or empty, or both or neither of pseudo_inputs and count with
            shape are given.

    Example:
        >>> import torch
        >>> from flowfactor.encoders import MLPEncoder
        >>> prior = VampPrior(MLPEncoder((1, 8, 8), latent_dim=4), count=5, shape=(1, 8, 8))
        >>> prior.at(0.0).log_prob(torch.randn(3, 4)).shape
        torch.Size([3])
    """

    unwritten = ("generator", "encoder", "pseudo_inputs")

    def __init__(
        self,
        encoder: Callable[[Tensor], Any],
        pseudo_inputs: Tensor | None = None,
        *,
        count: int | None = None,
        shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        raw = _raw_pseudo_inputs(pseudo_inputs, count, shape, generator)
        with torch.no_grad():
            mean = _posterior(encoder, torch.sigmoid(raw)).mean
        super().__init__(mean.shape[-1])
        self._borrowed = (encoder,)  # a tuple hides it from nn.Module: see the docstring
        self.raw_pseudo_inputs = nn.Parameter(raw)
        self._fill_in(count=len(raw), shape=raw.shape[1:])

    @property
    def encoder(self) -> Callable[[Tensor], Any]:
        """The borrowed encoder."""
        return self._borrowed[0]

    @property
    def at_rest(self) -> tuple[int, float] | None:
        """The room at rest of the encoder's posteriors, where they have some."""
        return getattr(self.encoder, "at_rest", None)

    @property
    def pseudo_inputs(self) -> Tensor:
        """Pseudo-inputs [M, *event] in [0, 1]."""
        return torch.sigmoid(self.raw_pseudo_inputs)

    def components(self) -> Components:
        """The posteriors of the M pseudo-inputs: one pass of the encoder."""
        posterior = _posterior(self.encoder, self.pseudo_inputs)
        return Components(posterior.mean.new_zeros(len(self.raw_pseudo_inputs)), posterior.mean, posterior.variance)


def _raw_pseudo_inputs(
    pseudo_inputs: Tensor | None, count: int | None, shape: Sequence[int] | None, generator: torch.Generator | None
) -> Tensor:
    """Initial parameters, whose sigmoids are the pseudo-inputs."""
    if (pseudo_inputs is None) == (count is None or shape is None) or (pseudo_inputs is not None and (count or shape)):
        raise ValueError(
            "give either pseudo_inputs [M, *event] or both count and shape, got "
            f"pseudo_inputs={'None' if pseudo_inputs is None else list(pseudo_inputs.shape)}, {count=}, {shape=}"
        )
    if pseudo_inputs is None:
        assert count is not None and shape is not None  # checked above
        check_count("count", count)
        return torch.randn(count, *shape, generator=generator)
    if not pseudo_inputs.is_floating_point() or pseudo_inputs.ndim < 2 or not len(pseudo_inputs):
        raise ValueError(
            f"pseudo_inputs must be floats [M, *event] with M at least 1, "
            f"got {pseudo_inputs.dtype} {list(pseudo_inputs.shape)}"
        )
    if not bool(((pseudo_inputs >= 0) & (pseudo_inputs <= 1)).all()):
        low, high = pseudo_inputs.min().item(), pseudo_inputs.max().item()
        raise ValueError(f"pseudo_inputs must lie in [0, 1], got {low:g} to {high:g}: scale them as the frames are")
    return torch.logit(pseudo_inputs.detach().clamp(_MARGIN, 1 - _MARGIN))


def _posterior(encoder: Callable[[Tensor], Any], inputs: Tensor) -> Independent:
    posterior = encoder(inputs)
    normal = isinstance(posterior, Independent) and isinstance(posterior.base_dist, Normal)
    if not normal or len(posterior.event_shape) != 1 or posterior.batch_shape != inputs.shape[:1]:
        raise TypeError(
            "the encoder must map inputs [M, *event] to Independent(Normal(mean, std), 1) with mean [M, D], "
            f"got {posterior!r}"
        )
    return posterior
