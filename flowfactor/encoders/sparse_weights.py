"""Sparse weights of flows: a spike that says whether a flow acts, times a slab that says how strongly."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Categorical, Laplace, LogNormal
from torch.nn import functional as F

Slab: TypeAlias = "Laplace | LogNormal"
SlabName: TypeAlias = Literal["half_normal", "laplace"]
SLABS: tuple[SlabName, ...] = ("half_normal", "laplace")


class SparseSample(NamedTuple):
    """A draw of sparse weights.

    Attributes:
        spikes: 0 or 1 (in between where relaxed), ``[*sample, *batch, T, K]``.
        slab: Strengths ``[*sample, *batch, T, K, C]``.
        weights: What multiplies the fields: ``spikes * slab / unit``, ``[*sample, *batch, T, K, C]``.
    """

    spikes: Tensor
    slab: Tensor
    weights: Tensor


class SparseWeights:
    r"""Distribution of the weights of K flows over T intervals: $g_s^k = b_s^k\, w_s^k$, spike times slab.

    Spikes are independent Bernoullis, and slabs are independent given them: a log-normal (weights of one sign) or a
    Laplace (weights of both signs). Where a spike is 0 the slab does not matter; it is then taken to follow the prior,
    so that it costs nothing. C counts the controls of a flow: 1, or 2 where the gradient part and the divergence-free
    part of a field have a slab each.

    Args:
        spike_logits: Logits of the spikes, ``[*batch, T, K]``.
        slab: Distribution of the slabs, batch shape ``[*batch, T, K, C]``.
        unit: What a slab is divided by to give a weight, ``[K, C]``; None for 1.

    Raises:
        TypeError: If ``slab`` is no Laplace or LogNormal.
        ValueError: If the shapes do not match.

    Example:
        >>> import torch
        >>> from torch.distributions import Laplace
        >>> logits = torch.tensor([[4.0, -4.0]])                             # one interval, two flows
        >>> q = SparseWeights(logits, Laplace(torch.ones(1, 2, 1), 0.1 * torch.ones(1, 2, 1)))
        >>> q.mean.squeeze(-1)
        tensor([[0.9820, 0.0180]])
        >>> q.rsample(temperature=0.5).weights.shape
        torch.Size([1, 2, 1])
    """

    def __init__(self, spike_logits: Tensor, slab: Slab, unit: Tensor | None = None) -> None:
        if not isinstance(slab, (Laplace, LogNormal)):
            raise TypeError(f"slab must be a torch Laplace or LogNormal, got {type(slab).__name__}")
        if spike_logits.ndim < 2 or slab.batch_shape[:-1] != spike_logits.shape:
            raise ValueError(
                f"spike_logits must be [*batch, T, K] and the slab [*batch, T, K, C], got {list(spike_logits.shape)} "
                f"and {list(slab.batch_shape)}"
            )
        if unit is not None and unit.shape != slab.batch_shape[-2:]:
            raise ValueError(f"unit must have shape {list(slab.batch_shape[-2:])}, got {list(unit.shape)}")
        self.spike_logits, self.slab, self.unit = spike_logits, slab, unit

    @property
    def batch_shape(self) -> Size:
        """``[*batch]``."""
        return self.spike_logits.shape[:-2]

    @property
    def event_shape(self) -> Size:
        """``[T, K, C]``."""
        return self.slab.batch_shape[-3:]

    @property
    def spike_probs(self) -> Tensor:
        """Probabilities that each flow acts, ``[*batch, T, K]``."""
        return torch.sigmoid(self.spike_logits)

    @property
    def slab_strength(self) -> Tensor:
        """Expected size of a slab, E|w|, ``[*batch, T, K, C]``."""
        if isinstance(self.slab, LogNormal):
            return self.slab.mean
        size = self.slab.loc.abs()
        return size + self.slab.scale * torch.exp(-size / self.slab.scale)

    @property
    def mean(self) -> Tensor:
        """Expected weights E g, ``[*batch, T, K, C]``."""
        return self._weights(self.spike_probs, self.slab.mean)

    @property
    def strength(self) -> Tensor:
        """Expected size of the weights, E|g|, ``[*batch, T, K, C]``."""
        return self._weights(self.spike_probs, self.slab_strength)

    def factor(self) -> Categorical:
        """Which flow dominates: the shares of the flows in the expected |g| over all intervals, ``[*batch]``."""
        total = self.strength.sum((-3, -1))
        # Where nothing acts, no flow is more likely than another.
        return Categorical(probs=total + torch.finfo(total.dtype).tiny ** 0.5)

    def rsample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        temperature: float | Tensor = 0.5,
        hard: bool = True,
        generator: torch.Generator | None = None,
    ) -> SparseSample:
        r"""Draws weights with gradients, the spikes' by the binary concrete relaxation.

        $\tilde b = \sigma\bigl((\ell + \ln u - \ln(1 - u)) / \tau\bigr)$ (Maddison et al., ICLR 2017, eq. 20). With
        ``hard`` the value is the exact Bernoulli draw $[\tilde b > 1/2]$ and the gradient that of $\tilde b$.

        Args:
            sample_shape: Leading sample shape.
            temperature: $\tau > 0$. Smaller is less biased and noisier.
            hard: Whether spikes are exactly 0 or 1.
            generator: Source of the draws.

        Returns:
            Spikes, slabs and weights.

        Raises:
            ValueError: If the temperature is not positive.
        """
        if not float(temperature) > 0:
            raise ValueError(f"temperature must be positive, got {float(temperature)}")
        logits = self.spike_logits
        u = torch.rand((*sample_shape, *logits.shape), generator=generator, dtype=logits.dtype, device=logits.device)
        soft = torch.sigmoid((logits + torch.logit(u, eps=torch.finfo(u.dtype).eps)) / temperature)
        spikes = (soft > 0.5).to(soft) + (soft - soft.detach()) if hard else soft
        slab = self._draw_slab(sample_shape, generator)
        return SparseSample(spikes, slab, self._weights(spikes, slab))

    def sample(self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None) -> SparseSample:
        """Draws weights without gradients; spikes are exactly 0 or 1."""
        with torch.no_grad():
            return self.rsample(sample_shape, temperature=1.0, generator=generator)

    def log_prob(self, sample: SparseSample, counted: Tensor | None = None) -> Tensor:
        """Log probability of hard spikes, plus the log density of the slabs that act, in nats.

        Args:
            sample: A draw with hard spikes.
            counted: Which intervals count ``[*batch, T]``; None for all.

        Returns:
            Sums over T, K and C, ``[*sample, *batch]``.
        """
        spikes = sample.spikes
        log_p = spikes * F.logsigmoid(self.spike_logits) + (1 - spikes) * F.logsigmoid(-self.spike_logits)
        each = log_p + spikes * self.slab.log_prob(sample.slab).sum(-1)
        return (each if counted is None else counted.unsqueeze(-1) * each).sum((-2, -1))

    def in_units(self, unit: Tensor) -> SparseWeights:
        """The same distribution with weights ``spikes * slab / unit``, for a ``unit [K, C]``."""
        return SparseWeights(self.spike_logits, self.slab, unit)

    def _weights(self, spikes: Tensor, slab: Tensor) -> Tensor:
        weights = spikes.unsqueeze(-1) * slab
        return weights if self.unit is None else weights / self.unit

    def _draw_slab(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        loc, scale = self.slab.loc, self.slab.scale
        shape = (*sample_shape, *loc.shape)
        if isinstance(self.slab, LogNormal):
            noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
            return torch.exp(loc + scale * noise)
        # By inversion; u stays off -1/2, where the logarithm is infinite.
        u = torch.rand(shape, generator=generator, dtype=loc.dtype, device=loc.device) - 0.5
        return loc - scale * u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - torch.finfo(u.dtype).eps))
