"""Rebuilding priors from their configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowfactor.encoders import AugmentedEncoder
from flowfactor.priors.augmented import Augmented
from flowfactor.priors.base import Prior
from flowfactor.priors.diffusion import Diffusion
from flowfactor.priors.static import GaussianMixture, StandardNormal, VampPrior
from flowfactor.registry import declare, make, split

declare(
    "prior",
    standard_normal=StandardNormal,
    gaussian_mixture=GaussianMixture,
    vamp=VampPrior,
    diffusion=Diffusion,
    augmented=Augmented,
)


def build(config: Mapping[str, Any], encoder: Callable[[Tensor], Any] | None = None) -> Prior:
    """Rebuilds the architecture of a prior; its parameters come from a state dict.

    Args:
        config: A prior's `config`.
        encoder: The model's encoder, which a `VampPrior` borrows.

    Returns:
        The prior.

    Raises:
        ValueError: If the name is unknown, or a VampPrior is given no encoder.

    Example:
        >>> build({"name": "diffusion", "base": {"name": "standard_normal", "dim": 4}, "num_flows": 3}).dim
        4
    """
    name, options = split("prior", config)
    if name == "augmented" and isinstance(encoder, AugmentedEncoder):
        encoder = encoder.encoder  # the base is of codes alone
    if isinstance(options.get("base"), Mapping):
        options["base"] = build(options["base"], encoder)
    if name == "vamp" and encoder is None:
        raise ValueError("a VampPrior is rebuilt with its model's encoder: build(config, encoder)")
    return make("prior", {"name": name, **options}, encoder=encoder)
