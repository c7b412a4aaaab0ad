"""The prior of sparse weights: spikes that persist, times slabs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import HalfNormal, Laplace, LogNormal
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor._config import Configured
from flowfactor.encoders.sparse_weights import SLABS, SlabName, SparseSample, SparseWeights


class SpikeAndSlab(Configured, nn.Module):
    r"""Spike-and-slab prior of the weights of K flows over the intervals of a sequence, with Markov spikes.

    $$g_s^k = b_s^k\, w_s^k, \quad b_0^k \sim \mathrm{B}(\rho), \quad
      b_s^k \sim \mathrm{B}\bigl(b_{s-1}^k\, \pi_1 + (1 - b_{s-1}^k)\, \pi_0\bigr), \quad w_s^k \sim \mathrm{slab}$$

    after the prior of sparse transformation analysis (Song et al. 2025, arXiv 2410.05564): a flow that acts goes on
    acting, few act at once. Flows are independent. Slabs are half-normal (weights of one sign) or Laplace (both signs).
    The scale of the slab is fixed: weights multiply fields whose scale is learned, and only the product would be
    determined.

    Args:
        num_flows: K.
        initial: $\rho$, probability that a flow acts in the first interval.
        persistence: $\pi_1$, probability that it acts on where it acted.
        onset: $\pi_0$, probability that it sets in where it did not act; None for the value that makes ``initial`` the
            probability of every interval, $\rho (1 - \pi_1) / (1 - \rho)$.
        slab: ``"half_normal"`` or ``"laplace"``.
        scale: Scale of the slab.
        learned: Whether the three probabilities are parameters, shared by all flows.

    Raises:
        TypeError: If ``num_flows`` is no integer.
        ValueError: If a probability is not strictly between 0 and 1, the scale is not positive or the slab is unknown.

    Example:
        >>> prior = SpikeAndSlab(3, initial=0.25, persistence=0.9)
        >>> prior.marginals(4)[:, 0]                                # stationary: 0.25 in every interval
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> prior.sample((5,), steps=4).weights.shape
        torch.Size([5, 4, 3, 1])
    """

    def __init__(
        self,
        num_flows: int,
        *,
        initial: float = 0.3,
        persistence: float = 0.95,
        onset: float | None = None,
        slab: SlabName = "half_normal",
        scale: float = 1.0,
        learned: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_flows", num_flows)
        for name, value in (("initial", initial), ("persistence", persistence)):
            _check_probability(name, value)
        if onset is None:
            onset = initial * (1 - persistence) / (1 - initial)
            if not onset < 1:
                raise ValueError(
                    f"no onset keeps a rate of {initial} with persistence {persistence}: raise persistence, or give onset"
                )
        _check_probability("onset", onset)
        if slab not in SLABS:
            raise ValueError(f"unknown slab {slab!r}: choose one of {', '.join(map(repr, SLABS))}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.num_flows, self.slab, self.scale, self.learned = num_flows, slab, float(scale), bool(learned)
        self._fill_in(onset=onset)
        logits = torch.tensor([math.log(p / (1 - p)) for p in (initial, persistence, onset)])
        self.logits = nn.Parameter(logits, requires_grad=self.learned)

    @property
    def initial(self) -> Tensor:
        """Probability that a flow acts in the first interval, a scalar."""
        return torch.sigmoid(self.logits[0])

    @property
    def persistence(self) -> Tensor:
        """Probability that a flow acts on, a scalar."""
        return torch.sigmoid(self.logits[1])

    @property
    def onset(self) -> Tensor:
        """Probability that a flow sets in, a scalar."""
        return torch.sigmoid(self.logits[2])

    def marginals(self, steps: int) -> Tensor:
        """Probabilities that each flow acts in each interval, ``[steps, K]``."""
        now, every = self.initial, []
        for _ in range(check_count("steps", steps)):
            every.append(now)
            now = now * self.persistence + (1 - now) * self.onset
        return torch.stack(every).unsqueeze(-1).expand(steps, self.num_flows)

    def sample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        steps: int,
        controls: int = 1,
        generator: torch.Generator | None = None,
    ) -> SparseSample:
        """Draws weights of a sequence.

        Args:
            sample_shape: Leading sample shape.
            steps: T, the number of intervals.
            controls: C, slabs per flow.
            generator: Source of the draws.

        Returns:
            Spikes ``[*sample, T, K]``, slabs and weights ``[*sample, T, K, C]``.

        Raises:
            ValueError: If ``steps`` is not positive.
        """
        like = self.logits
        shape = (*sample_shape, self.num_flows)
        with torch.no_grad():
            spikes, p = [], self.initial.expand(shape)
            for _ in range(check_count("steps", steps)):
                now = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device) < p
                spikes.append(now.to(like.dtype))
                p = torch.where(now, self.persistence, self.onset)
            b = torch.stack(spikes, -2)
            event = (*b.shape, controls)
            w = torch.randn(event, generator=generator, dtype=like.dtype, device=like.device).abs()
            if self.slab == "laplace":
                u = torch.rand((2, *event), generator=generator, dtype=like.dtype, device=like.device)
                w = (1 - u).log().diff(dim=0).squeeze(0)  # the difference of two exponentials
            w = self.scale * w
        return SparseSample(b, w, b.unsqueeze(-1) * w)

    def log_prob(self, sample: SparseSample, counted: Tensor | None = None) -> Tensor:
        """Log probability of hard spikes, plus the log density of the slabs that act, in nats.

        Args:
            sample: A draw with hard spikes.
            counted: Which intervals count ``[*batch, T]``, none after the first that does not; None for all.

        Returns:
            Sums over T, K and C, ``[*sample]``.
        """
        b, w = sample.spikes, sample.slab
        self._check_flows(b.shape[-1])
        scale = self.logits.new_tensor(self.scale)
        if self.slab == "laplace":
            log_slab = Laplace(torch.zeros_like(scale), scale, validate_args=False).log_prob(w)
        else:
            log_slab = HalfNormal(scale, validate_args=False).log_prob(w)
        slab = _counted(b * log_slab.sum(-1), counted)
        return (self._expected_log_prior(b, counted) + slab.sum(-2)).sum(-1)

    def kl(self, q: SparseWeights, counted: Tensor | None = None) -> Tensor:
        r"""KL[q(g)|p(g)] per sequence, in closed form.

        $$\sum_k \Bigl\{ \sum_s E \ln q(b_s) - E \ln p(b_0) - \sum_{s>0} E \ln p(b_s|b_{s-1})
          + \sum_s q(b_s = 1)\, KL[q(w_s)|p(w_s)] \Bigr\}$$

        The chain's expectation is exact, since the spikes of q are independent; a slab counts where its spike is 1.

        Args:
            q: The posterior, batch ``[*batch]``.
            counted: Which intervals count ``[*batch, T]``, none after the first that does not, as where a sequence is
                shorter than others; None for all.

        Returns:
            Divergences ``[*batch]``, in nats.

        Raises:
            ValueError: If q has other flows, or slabs that the prior gives no density.
        """
        self._check_flows(q.spike_logits.shape[-1])
        on = q.spike_probs
        log_q = on * F.logsigmoid(q.spike_logits) + (1 - on) * F.logsigmoid(-q.spike_logits)
        spikes = _counted(log_q, counted).sum(-2) - self._expected_log_prior(on, counted)
        slab = _counted(on * self.slab_kl(q.slab).sum(-1), counted).sum(-2)
        return (spikes + slab).sum(-1)

    def slab_kl(self, q: Laplace | LogNormal) -> Tensor:
        r"""KL of a slab from the prior's, elementwise, in nats.

        Laplace: $\ln(\beta/b) + \bigl(|\mu| + b\, e^{-|\mu|/b}\bigr)/\beta - 1$. Log-normal against half-normal:
        $E w^2 / 2\beta^2 - \tfrac12 \ln(2/\pi\beta^2) - m - \tfrac12 \ln(2\pi e\, \sigma^2)$ with
        $E w^2 = e^{2m + 2\sigma^2}$.

        Args:
            q: A Laplace for a Laplace prior, a LogNormal for a half-normal one.

        Returns:
            Divergences of q's batch shape.

        Raises:
            ValueError: If q is of the other kind.
        """
        wanted = Laplace if self.slab == "laplace" else LogNormal
        if not isinstance(q, wanted):
            raise ValueError(
                f"a {self.slab} prior goes with a {wanted.__name__} posterior, got {type(q).__name__}; "
                f'make the encoder with slab="{self.slab}"'
            )
        if isinstance(q, Laplace):
            size = q.loc.abs()
            ratio = (size + q.scale * torch.exp(-size / q.scale)) / self.scale
            return ratio - 1 + math.log(self.scale) - q.scale.log()
        second = torch.exp(2 * q.loc + 2 * q.scale.square()) / (2 * self.scale**2)
        log_half = 0.5 * math.log(2 / math.pi) - math.log(self.scale)
        return second - log_half - q.loc - 0.5 * math.log(2 * math.pi * math.e) - q.scale.log()

    def _expected_log_prior(self, on: Tensor, counted: Tensor | None = None) -> Tensor:
        """E ln p(b) of independent spikes with probabilities ``on [*batch, T, K]`` (0 or 1 for given ones)."""
        yes, no = F.logsigmoid(self.logits), F.logsigmoid(-self.logits)
        first = on[..., 0, :] * yes[0] + (1 - on[..., 0, :]) * no[0]
        before, now = on[..., :-1, :], on[..., 1:, :]
        kept = before * (now * yes[1] + (1 - now) * no[1])
        begun = (1 - before) * (now * yes[2] + (1 - now) * no[2])
        if counted is not None:
            first, counted = counted[..., :1] * first, counted[..., 1:]
        return first + _counted(kept + begun, counted).sum(-2)

    def _check_flows(self, num_flows: int) -> None:
        if num_flows != self.num_flows:
            raise ValueError(f"the prior has {self.num_flows} flows and the weights {num_flows}")


def _counted(each: Tensor, counted: Tensor | None) -> Tensor:
    """Terms ``[*batch, T, K]`` of all intervals, 0 where they do not count."""
    return each if counted is None else counted.unsqueeze(-1) * each


def _check_probability(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} must be a probability strictly between 0 and 1, got {value!r}")
