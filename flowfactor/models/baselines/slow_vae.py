"""SlowVAE: a VAE whose latents change sparsely from one frame to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace

from flowfactor import objectives
from flowfactor._checks import check_optional_count
from flowfactor.control import Control
from flowfactor.models.baselines.base import Weigh
from flowfactor.models.baselines.vae import VAE
from flowfactor.models.checks import check_positive, check_weight
from flowfactor.models.terms import Terms


class SlowVAE(VAE):
    r"""A VAE with a Laplace transition prior between neighbouring frames (Klindt et al., ICLR 2021, section 4).

    With $p(z_0) = N(0, I)$ and $p(z_t|z_{t-1}) = \prod_d \frac\lambda2 \exp(-\lambda |z_{t,d} - z_{t-1,d}|)$ and
    posteriors $q(z_t|x_t)$ of single frames, the loss of a pair of neighbouring frames is

    $$-E \ln p(x_{t-1}, x_t|z_{t-1}, z_t) + \beta\, KL[q(z_{t-1}|x_{t-1}) | p(z_{t-1})] +
      \gamma\, E_{q(z_{t-1})} KL[q(z_t|x_t) | p(z_t|z_{t-1})],$$

    averaged over both orders of the pair as in the authors' code. The last term is in closed form, over both posteriors
    (see `transition_divergence`; the authors' code puts the mean of $q(z_{t-1})$ in for its draw). A training step takes
    ``frames_per_step`` neighbouring frames of each sequence, 2 being the pair of the paper, and is scaled to the number
    of frames of a sequence.

    In evaluation mode the terms are those of the whole chain $z_0 \to z_1 \to \dots$, and ``bound`` and `log_likelihood`
    are true lower bounds of the sequence's log-likelihood under it; with two frames the chain is the paper's pair.
    There is no model of what a transformation does: `transform` leaves the latent where it is.

    Args:
        encoder: As in `VAE`; its posterior must have independent normal coordinates.
        decoder: As in `VAE`.
        num_flows: K, how many transformations the data have.
        rate: The rate lambda of the Laplace prior.
        beta: Weight of the divergence from the normal prior.
        gamma: Weight of the divergence from the transition prior.
        frames_per_step: Neighbouring frames of a sequence to use in a training step, at least 2; None for all.

    Raises:
        TypeError: If encoder or decoder has no ``latent_dim``.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("slow-vae", (1, 8, 8), num_flows=2, latent_dim=4)
        >>> model(torch.rand(6, 5, 1, 8, 8), torch.arange(5), 0).loss.backward()
    """

    objective = "chain"
    _settings = ("num_flows", "rate", "beta", "gamma", "frames_per_step")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_flows: int = 1,
        *,
        rate: float = 6.0,
        beta: float = 1.0,
        gamma: float = 10.0,
        frames_per_step: int | None = 2,
    ) -> None:
        super().__init__(encoder, decoder, num_flows)
        self.frames_per_step = check_optional_count("frames_per_step", frames_per_step, 2)
        self.rate = check_positive("rate", rate)
        self.beta = check_weight("beta", beta)
        self.gamma = check_weight("gamma", gamma)

    def forward(
        self, frames: Tensor, t: Tensor, k: Control | None = 0, *, generator: torch.Generator | None = None
    ) -> Terms:
        """The terms of the objective on a batch of sequences: of pairs while training, of the chain in evaluation.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1], of at least 2 frames.
            t: Times ``[T+1]``, in frames; neighbours count as such whatever their distance in time.
            k: Which transformation acts; checked and ignored, and may be None.
            generator: Source of all draws.

        Returns:
            The terms, batch means, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        frames, t = self._checked(frames, t, k, generator)
        if frames.shape[1] < 2:
            raise ValueError("SlowVAE learns from pairs of neighbouring frames: sequences need at least 2 frames")
        x = self._run(frames, generator)
        q = self.encode(x)
        z = objectives.draw(q, generator=generator)
        log_p = self.decoder(z).log_prob(x)
        normal = objectives.start_divergence(q, self.prior, z, 0)
        forth = transition_divergence(q, self.rate, slice(1, None), slice(None, -1))
        if not self.training:
            return self._gathered(log_p.sum(0).mean(), normal[0].mean(), forth.sum(0).mean())
        back = transition_divergence(q, self.rate, slice(None, -1), slice(1, None))
        # Each pair in both orders, mean over pairs; then from the two frames of a pair to all of a sequence.
        scale = 0.5 * frames.shape[1]
        pairs = [scale * (term[1:] + term[:-1]).mean() for term in (log_p, 0.5 * normal)]
        return self._gathered(pairs[0], pairs[1], scale * 0.5 * (forth + back).mean())

    def _gathered(self, reconstruction: Tensor, normal: Tensor, transition: Tensor) -> Terms:
        loss = self.beta * normal + self.gamma * transition - reconstruction
        return Terms.plain(reconstruction, normal + transition, loss)

    def _run(self, frames: Tensor, generator: torch.Generator | None) -> Tensor:
        """Neighbouring frames ``[n, B, C, H, W]``, from a place of each sequence's own while training."""
        batch, total = frames.shape[:2]
        wanted = total if self.frames_per_step is None or not self.training else min(self.frames_per_step, total)
        begin = torch.randint(total - wanted + 1, (batch,), generator=generator, device=frames.device)
        index = begin + torch.arange(wanted, device=frames.device).unsqueeze(-1)
        return frames[torch.arange(batch, device=frames.device), index]

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        q, start = self.encode(frames), self.prior.at(0.0)

        def weigh(size: tuple[int]) -> Tensor:
            z = objectives.draw(q, size, generator)  # [S, B, T+1, D]
            step = Laplace(z.new_zeros(()), z.new_tensor(1 / self.rate))
            log_p = start.log_prob(z[..., 0, :]) + step.log_prob(z.diff(dim=-2)).sum((-2, -1))
            return log_p + (self.decoder(z).log_prob(frames) - q.log_prob(z)).sum(-1)

        return weigh


def transition_divergence(q: Distribution, rate: float, current: slice, previous: slice) -> Tensor:
    r"""$E_{q(z_{t-1})} KL[q(z_t) | \mathrm{Laplace}(z_{t-1}, 1/\lambda)]$ in closed form, ``[T, *batch]``, in nats.

    The difference $z_t - z_{t-1}$ is normal with mean m and variance $s^2 = \sigma_t^2 + \sigma_{t-1}^2$, and
    $E|N(m, s^2)| = s\sqrt{2/\pi}\, e^{-m^2/2s^2} + m\,\mathrm{erf}(m/s\sqrt2)$, so that per coordinate the divergence is
    $-\ln\frac\lambda2 + \lambda E|N(m, s^2)| - \frac12\ln 2\pi e\,\sigma_t^2$ (Klindt et al. 2021, appendix A, has it for
    a fixed $z_{t-1}$).

    Args:
        q: Posterior of independent normals with batch ``[N, *batch]``, frames first.
        rate: The rate lambda.
        current: Which frames are z_t.
        previous: Which frames are z_{t-1}.

    Returns:
        Divergences, summed over coordinates.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> q = Independent(Normal(torch.zeros(2, 1), torch.ones(2, 1)), 1)
        >>> transition_divergence(q, 1.0, slice(1, None), slice(None, -1))   # ln 2 + 2/sqrt(pi) - ln(2 pi e) / 2
        tensor([0.4026])
    """
    mean, std = q.mean, q.stddev
    m = mean[current] - mean[previous]
    s = (std[current].square() + std[previous].square()).sqrt()
    distance = s * math.sqrt(2 / math.pi) * torch.exp(-0.5 * (m / s).square()) + m * torch.erf(m / s / math.sqrt(2))
    entropy = 0.5 * math.log(2 * math.pi * math.e) + std[current].log()
    return (rate * distance - math.log(rate / 2) - entropy).sum(-1)
