"""Rebuilding priors from their configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowfactor.priors.base import GaussianPrior, Prior
from flowfactor.priors.diffusion import Diffusion
from flowfactor.priors.static import GaussianMixture, StandardNormal, VampPrior

_STATIC: dict[str, Callable[..., GaussianPrior]] = {
    "standard_normal": StandardNormal,
    "gaussian_mixture": GaussianMixture,
    "vamp": VampPrior,
}


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
    options = dict(config)
    name = options.pop("name", None)
    if name == "diffusion":
        base = build(options.pop("base"), encoder)
        return Diffusion(base, **options)  # pyright: ignore[reportArgumentType]  # Diffusion checks its base
    if name not in _STATIC:
        raise ValueError(f"unknown prior {name!r}: choose one of {', '.join(map(repr, [*_STATIC, 'diffusion']))}")
    if name == "vamp":
        if encoder is None:
            raise ValueError("a VampPrior is rebuilt with its model's encoder: build(config, encoder)")
        options["encoder"] = encoder
    return _STATIC[name](**options)
