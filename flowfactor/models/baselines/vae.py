"""Autoencoders of single frames: VAE and beta-VAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowfactor import objectives
from flowfactor._checks import check_optional_count
from flowfactor.control import Control
from flowfactor.models.baselines.base import Baseline, Weigh
from flowfactor.models.checks import check_weight
from flowfactor.models.terms import Terms


class VAE(Baseline):
    r"""A variational autoencoder of single frames (Kingma and Welling, ICLR 2014).

    Every frame of a sequence counts by itself, with the prior N(0, I); by their equation 3,

    $$\sum_t \ln p(x_t) \ge \sum_t E_{q(z_t|x_t)} \ln p(x_t|z_t) - KL[q(z_t|x_t) \,|\, p(z_t)] .$$

    The sum bounds the log-likelihood of the sequence under frames that are independent, so it can be compared with
    bounds of sequence models. The model says nothing about transformations: `transform` leaves the latent where it is,
    as Song et al. (NeurIPS 2023, section 4.1) measure a VAE. Times and labels are checked and otherwise ignored.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        num_flows: K, how many transformations the data have.
        frames_per_step: How many frames of a sequence to use in a training step, drawn anew each time and weighted so
            that the bound stays unbiased; None for all.

    Raises:
        TypeError: If encoder or decoder has no ``latent_dim``.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("vae", (1, 8, 8), num_flows=2, latent_dim=4)
        >>> frames = torch.rand(6, 5, 1, 8, 8)                     # 6 sequences of 5 frames
        >>> terms = model(frames, torch.arange(5), 0)
        >>> terms.loss.backward()
        >>> model.log_likelihood(frames, torch.arange(5), 0, samples=8).shape
        torch.Size([6])
    """

    objective = "frame"
    has_transformation = False
    _settings = ("num_flows", "frames_per_step")

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, num_flows: int = 1, *, frames_per_step: int | None = None
    ) -> None:
        super().__init__(encoder, decoder, num_flows)
        self.frames_per_step = check_optional_count("frames_per_step", frames_per_step)

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: None = None
    ) -> Tensor:
        """The reconstruction of images, at every time: this model knows no transformation.

        Args:
            x0: Images ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone.
            control: Which transformation is meant; checked and ignored.
            context: Refused: a baseline knows none.

        Returns:
            Frames ``[B, T, C, H, W]``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        when = self._checked_transform(x0, t, control, context)
        still = self.decode(self.encode(x0).mean)
        return still.unsqueeze(1).expand(-1, len(when), -1, -1, -1)

    def forward(
        self, frames: Tensor, t: Tensor, k: Control | None = 0, *, generator: torch.Generator | None = None
    ) -> Terms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames.
            k: Which transformation acts; checked and ignored, and may be None.
            generator: Source of all draws.

        Returns:
            The terms, batch means, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        frames, t = self._checked(frames, t, k, generator)
        x, weight = self._chosen(frames, generator)
        q = self.encode(x)
        z = objectives.draw(q, generator=generator)
        reconstruction = weight * self.decoder(z).log_prob(x).sum(0).mean()
        kl = weight * objectives.start_divergence(q, self.prior, z, 0).sum(0).mean()
        return self._terms(reconstruction, kl, z, weight, generator)

    def _chosen(self, frames: Tensor, generator: torch.Generator | None) -> tuple[Tensor, float]:
        """The frames of a step ``[n, B, C, H, W]``, and the weight of each."""
        batch, total = frames.shape[:2]
        wanted = self.frames_per_step if self.training else None
        index, weight = objectives.choose_frames(total, wanted, batch, frames.device, generator)
        return frames[torch.arange(batch, device=frames.device), index], weight

    def _terms(
        self, reconstruction: Tensor, kl: Tensor, z: Tensor, weight: float, generator: torch.Generator | None
    ) -> Terms:
        return Terms.plain(reconstruction, kl)

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        q, prior = self.encode(frames), self.prior.at(0.0)

        def weigh(size: tuple[int]) -> Tensor:
            z = objectives.draw(q, size, generator)
            return self.decoder(z).log_prob(frames) + prior.log_prob(z) - q.log_prob(z)

        return weigh


class BetaVAE(VAE):
    r"""A VAE whose divergence weighs more, for latents that disentangle (Higgins et al., ICLR 2017, eq. 4).

    The loss is $\sum_t -E \ln p(x_t|z_t) + \beta\, KL[q(z_t|x_t) | p(z_t)]$; ``terms.bound`` and `log_likelihood` remain
    those of the VAE, with weight 1.

    Args:
        encoder: As in `VAE`.
        decoder: As in `VAE`.
        num_flows: K, how many transformations the data have.
        beta: Weight of the divergence; 1 gives the VAE.
        frames_per_step: As in `VAE`.

    Raises:
        TypeError: If encoder or decoder has no ``latent_dim``.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("beta-vae", (1, 8, 8), num_flows=2, latent_dim=4, beta=8.0)
        >>> terms = model(torch.rand(6, 5, 1, 8, 8), torch.arange(5), 0)
        >>> bool(torch.isclose(terms.loss, 8 * terms.kl - terms.reconstruction))
        True
    """

    _settings = ("num_flows", "beta", "frames_per_step")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_flows: int = 1,
        *,
        beta: float = 4.0,
        frames_per_step: int | None = None,
    ) -> None:
        super().__init__(encoder, decoder, num_flows, frames_per_step=frames_per_step)
        self.beta = check_weight("beta", beta)

    def _terms(
        self, reconstruction: Tensor, kl: Tensor, z: Tensor, weight: float, generator: torch.Generator | None
    ) -> Terms:
        return Terms.plain(reconstruction, kl, self.beta * kl - reconstruction)
