"""Fully connected encoders and decoders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from flowfactor._checks import check_count
from flowfactor.encoders.base import Decoder, GaussianEncoder, activation_layer, dense, sizes
from flowfactor.encoders.likelihoods import Likelihood


def _event(name: str, features: int | Sequence[int]) -> tuple[int, ...]:
    return (check_count(name, features),) if isinstance(features, (int, np.integer)) else sizes(name, features, least=1)


class MLPEncoder(GaussianEncoder):
    """Posterior q(z|x) by linear layers, for vectors or small images.

    Args:
        in_features: Width of a vector, or the shape (C, H, W) of a frame, which is flattened.
        latent_dim: D.
        hidden: Widths of the hidden layers; () gives a linear encoder.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1 or the activation is unknown.

    Example:
        >>> import torch
        >>> encoder = MLPEncoder((1, 8, 8), latent_dim=4)
        >>> posterior = encoder(torch.rand(2, 5, 1, 8, 8))
        >>> posterior.batch_shape, posterior.event_shape
        (torch.Size([2, 5]), torch.Size([4]))
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
    ) -> None:
        event = _event("in_features", in_features)
        hidden = sizes("hidden", hidden)
        widths = (math.prod(event), *hidden)
        super().__init__(latent_dim, event, widths[-1])
        self.body = dense(widths, activation_layer(activation))

    def features(self, x: Tensor) -> Tensor:
        """Features [N, hidden[-1]] of inputs [N, *event]."""
        return self.body(x.flatten(1))


class MLPDecoder(Decoder):
    """Likelihood p(x|z) by linear layers, for vectors or small images.

    Args:
        latent_dim: D.
        out_features: Width of a vector, or the shape (C, H, W) of a frame.
        hidden: Widths of the hidden layers; () gives a linear decoder.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.
        likelihood: `Bernoulli` (default) or `Gaussian`, its name or its config. Vectors that are not in [0, 1] want
            ``Gaussian(bounded=False)``.
        initial_mean: Mean of the untrained decoder, such as the data's average pixel: sets the last bias.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1, the activation or likelihood is unknown, or the likelihood cannot have
            the initial mean.

    Example:
        >>> import torch
        >>> decoder = MLPDecoder(4, (1, 8, 8))
        >>> decoder(torch.randn(2, 5, 4)).log_prob(torch.rand(2, 5, 1, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        latent_dim: int,
        out_features: int | Sequence[int],
        hidden: Sequence[int] = (256, 256),
        *,
        activation: str = "relu",
        likelihood: Likelihood | str | Mapping[str, Any] | None = None,
        initial_mean: float | None = None,
    ) -> None:
        event = _event("out_features", out_features)
        hidden = sizes("hidden", hidden)
        super().__init__(latent_dim, event, likelihood)
        widths = (latent_dim, *hidden)
        last = nn.Linear(widths[-1], math.prod(event))
        self._start_at(last.bias, initial_mean)
        self.body = nn.Sequential(*dense(widths, activation_layer(activation)), last)

    def outputs(self, z: Tensor) -> Tensor:
        """Raw outputs [N, *event] of latents [N, D]."""
        return self.body(z).unflatten(1, self.event_shape)
