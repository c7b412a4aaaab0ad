"""A model whose latents are its pixels, so that every metric's value is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import flowfactor as ff

SIZE = 4


class Pixels(nn.Module):
    """Encodes an image by its pixels, with a scale of 0.01."""

    def forward(self, x):
        mean = x.flatten(-3)
        return Independent(Normal(mean, torch.full_like(mean, 0.01)), 1)


class Unflatten(nn.Module):
    """Decodes the pixels."""

    def mean(self, z):
        return z.unflatten(-1, (1, SIZE, SIZE))

    def forward(self, z):
        return Independent(Normal(self.mean(z), 1.0), 3)


def patterns(num_flows: int) -> torch.Tensor:
    """What each flow adds to the pixels in one frame: a row of its own."""
    rows = torch.zeros(num_flows, SIZE, SIZE)
    rows[torch.arange(num_flows), torch.arange(num_flows)] = 0.05
    return rows.flatten(1)


@pytest.fixture
def pixel_model() -> Callable[..., ff.models.FlowFactorizedVAE]:
    def make(num_flows: int = 2, speed: float = 1.0) -> ff.models.FlowFactorizedVAE:
        steps = speed * patterns(num_flows)
        rows = [lambda z, t, step=step: step.expand_as(z) for step in steps]
        flow = ff.LatentFlow(ff.fields.from_module(rows, SIZE * SIZE), ff.Solver("euler", step_size=1.0))
        return ff.models.FlowFactorizedVAE(Pixels(), Unflatten(), flow)

    return make


@pytest.fixture
def seeded() -> Callable[[int], torch.Generator]:
    """Makes a new generator of a seed, to draw the same numbers again."""
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture
def brightened() -> Callable[..., torch.Tensor]:
    def frames(weights: torch.Tensor) -> torch.Tensor:
        """True frames [B, T+1, 1, 4, 4] under weights [B, T, K]."""
        progress = torch.cat([torch.zeros_like(weights[:, :1]), weights.cumsum(1)], 1)
        x0 = 0.4 * torch.rand(len(weights), 1, SIZE * SIZE)
        return (x0 + progress @ patterns(weights.shape[-1])).unflatten(-1, (1, SIZE, SIZE))

    return frames
