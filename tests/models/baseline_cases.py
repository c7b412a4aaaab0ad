"""Small models and batches that the tests of methods and baselines share."""

from __future__ import annotations

import torch

from flowfactor.models import build_baseline

SMALL = {"encoder": {"widths": [8]}, "decoder": {"widths": [8]}}


def make(name: str, latent_dim: int = 4, **settings):
    torch.manual_seed(0)
    return build_baseline(name, (1, 8, 8), 2, latent_dim, **SMALL, **settings)


def batch(steps: int = 4):
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(6, steps + 1, 1, 8, 8, generator=generator)
    return frames, torch.arange(steps + 1), torch.tensor([0, 0, 0, 1, 1, 1])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
