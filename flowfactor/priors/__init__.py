"""Priors p_t(z) over latents: modules that return torch Distributions."""

from flowfactor.priors._build import build
from flowfactor.priors.augmented import Augmented
from flowfactor.priors.base import Components, GaussianPrior, Mixture, Prior
from flowfactor.priors.diffusion import Diffusion
from flowfactor.priors.spike_slab import SpikeAndSlab
from flowfactor.priors.static import GaussianMixture, StandardNormal, VampPrior

__all__ = [
    "Augmented",
    "Components",
    "Diffusion",
    "GaussianMixture",
    "GaussianPrior",
    "Mixture",
    "Prior",
    "SpikeAndSlab",
    "StandardNormal",
    "VampPrior",
    "build",
]
