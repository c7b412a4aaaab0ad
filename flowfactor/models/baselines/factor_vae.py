"""FactorVAE: a VAE whose code is pushed to independent coordinates by a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor.models.baselines.vae import VAE
from flowfactor.models.checks import check_weight
from flowfactor.models.terms import Terms


@dataclass(frozen=True)
class FactorVAETerms(Terms):
    """The terms of `FactorVAE`.

    Attributes:
        total_correlation: The discriminator's estimate of TC(q(z)), in nats per frame.
        discriminator: The discriminator's own loss, part of ``loss``; ln 2 where it cannot tell the codes apart.
    """

    total_correlation: Tensor = field(default_factory=lambda: torch.zeros(()))
    discriminator: Tensor = field(default_factory=lambda: torch.zeros(()))


class FactorVAE(VAE):
    r"""A VAE with a penalty on the total correlation of its code (Kim and Mnih, ICML 2018, eq. 2 and algorithm 2).

    The loss of the autoencoder is $-\sum_t \mathrm{ELBO}(x_t) + \gamma \sum_t TC(q(z))$ with
    $TC(q(z)) = KL[q(z) | \prod_j q(z_j)]$ estimated by the density-ratio trick (eq. 3),
    $TC \approx E_{q(z)} \ln \frac{D(z)}{1 - D(z)}$. The discriminator D learns to tell codes from codes whose coordinates
    are permuted over the batch (algorithm 1), each coordinate by itself. As in the paper, one half of the batch gives the
    codes and the other half those to be permuted; here every second sequence, since batches come sorted by k.

    Two players, one loss: ``terms.loss`` is the sum of the autoencoder's loss and the discriminator's. The discriminator
    enters the first with its weights held fixed, and the codes enter the second detached, so that ``loss.backward()``
    gives each player the gradient of its own loss and nothing else. An Adam over all parameters is then two Adams, since
    it treats every parameter by itself; `parameter_groups` gives the discriminator the betas of the paper, and
    `flowfactor.training.FlowModule` takes them up. (Only a clip of the gradient's norm would join the two.)

    Args:
        encoder: As in `VAE`.
        decoder: As in `VAE`.
        num_flows: K, how many transformations the data have.
        gamma: Weight of the total correlation.
        hidden: Widths of the discriminator's hidden layers (the paper: six of 1000).
        frames_per_step: As in `VAE`.

    Raises:
        TypeError: If encoder or decoder has no ``latent_dim``.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("factor-vae", (1, 8, 8), num_flows=2, latent_dim=4, hidden=(32, 32))
        >>> optimizer = torch.optim.Adam(model.parameter_groups(), lr=1e-3)
        >>> terms = model(torch.rand(6, 5, 1, 8, 8), torch.arange(5), 0)
        >>> terms.loss.backward()
        >>> terms.total_correlation.shape
        torch.Size([])
    """

    _settings = ("num_flows", "gamma", "hidden", "frames_per_step")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_flows: int = 1,
        *,
        gamma: float = 10.0,
        hidden: Sequence[int] = (1000,) * 6,
        frames_per_step: int | None = None,
    ) -> None:
        super().__init__(encoder, decoder, num_flows, frames_per_step=frames_per_step)
        self.gamma = check_weight("gamma", gamma)
        self.hidden = tuple(check_count("hidden", width) for width in hidden)
        widths = (self.latent_dim, *self.hidden)
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        self.discriminator = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for one optimiser: the autoencoder, and the discriminator with betas (0.5, 0.9)."""
        own = set(self.discriminator.parameters())
        return [
            {"params": [p for p in self.parameters() if p not in own]},
            {"params": list(self.discriminator.parameters()), "betas": (0.5, 0.9), "weight_decay": 0.0},
        ]

    def total_correlation(self, z: Tensor) -> Tensor:
        r"""The estimate of TC(q(z)) from codes ``[N, D]``: the mean of $\ln D/(1-D)$, in nats.

        Gradients reach the codes and not the discriminator.
        """
        fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, fixed, (z,)).mean()

    def discriminator_loss(self, codes: Tensor, others: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The discriminator's cross-entropy between codes and permuted codes (algorithm 2).

        Args:
            codes: Codes ``[N, D]``.
            others: Further codes ``[M, D]``, whose coordinates are permuted.
            generator: Source of the permutations.

        Returns:
            The loss, with gradients to the discriminator alone.
        """
        real = self.discriminator(codes.detach())
        permuted = self.discriminator(permute_coordinates(others.detach(), generator))
        # softplus(-l) = -ln D and softplus(l) = -ln(1 - D), of the logit l.
        return 0.5 * (F.softplus(-real).mean() + F.softplus(permuted).mean())

    def _terms(
        self, reconstruction: Tensor, kl: Tensor, z: Tensor, weight: float, generator: torch.Generator | None
    ) -> Terms:
        if z.shape[1] < 2:
            raise ValueError("FactorVAE needs at least 2 sequences in a batch: it permutes codes over the batch")
        codes, others = z[:, ::2].flatten(0, 1), z[:, 1::2].flatten(0, 1)
        total_correlation = self.total_correlation(codes)
        discriminator = self.discriminator_loss(codes, others, generator)
        # The penalty is added to every frame's ELBO, and the terms are sums over frames.
        loss = kl - reconstruction + self.gamma * weight * len(z) * total_correlation + discriminator
        zero = kl.new_zeros(())
        bound = reconstruction - kl
        return FactorVAETerms(
            loss, reconstruction, kl, zero, zero, bound,
            total_correlation=total_correlation, discriminator=discriminator,
        )  # fmt: skip


def permute_coordinates(codes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Permutes each coordinate over the batch by itself: a draw from the product of the marginals (algorithm 1).

    Args:
        codes: Codes ``[N, D]``.
        generator: Source of the permutations.

    Returns:
        Codes ``[N, D]``, each column a permutation of its column.

    Example:
        >>> import torch
        >>> codes = torch.arange(6.0).reshape(3, 2)
        >>> permute_coordinates(codes).sort(0).values.tolist() == codes.tolist()
        True
    """
    order = torch.rand(codes.shape, generator=generator, device=codes.device).argsort(0)
    return codes.gather(0, order)
