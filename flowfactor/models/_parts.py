"""What the builders make models of, by names and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowfactor.encoders import ConvDecoder, ConvEncoder
from flowfactor.fields import Field, FreeField, GradientField, HelmholtzField, SolenoidalField
from flowfactor.potentials import ConvexPotential, MLPPotential, PaperPotential, Potential, ResNetPotential
from flowfactor.priors import Diffusion, GaussianMixture, Prior, StandardNormal, VampPrior

FIELDS = ("helmholtz", "gradient", "free")
POTENTIALS = ("mlp", "resnet", "convex", "paper")
PRIORS = ("normal", "mixture", "vamp", "diffusion", "diffusion-mixture")

_PSEUDO_INPUTS = 50


def frame_shape(image_shape: Sequence[int]) -> dict[str, Any]:
    """The sizes of frames as encoders and decoders take them.

    Args:
        image_shape: ``(C, H, W)``.

    Returns:
        The keyword arguments ``channels`` and ``image_size``.

    Raises:
        ValueError: If there are not three sizes.

    Example:
        >>> frame_shape((3, 28, 32))
        {'channels': 3, 'image_size': (28, 32)}
    """
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {tuple(image_shape)}")
    channels, height, width = image_shape
    return {"channels": channels, "image_size": (height, width)}


def make_autoencoder(
    image_shape: Sequence[int],
    latent_dim: int,
    encoder: Mapping[str, Any] | None,
    decoder: Mapping[str, Any] | None,
    likelihood: str | Mapping[str, Any],
) -> tuple[ConvEncoder, ConvDecoder]:
    """Makes a convolutional encoder and decoder of the same sizes, with further settings of each."""
    shape = frame_shape(image_shape)
    made = ConvEncoder(latent_dim, **shape, **(encoder or {}))
    return made, ConvDecoder(latent_dim, **shape, likelihood=likelihood, **(decoder or {}))


def make_potential(
    name: str,
    dim: int,
    num_flows: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "logcosh",
    generator: torch.Generator | None = None,
    *,
    known: Sequence[str] = POTENTIALS,
) -> Potential:
    """Makes the potential of a name; raises ValueError where it is none of the ``known``."""
    if name not in known:
        raise ValueError(f"potential must be one of {tuple(known)}, got {name!r}")
    if name == "convex":
        return ConvexPotential(dim, num_flows, hidden, generator=generator)
    if name == "resnet":
        return ResNetPotential(dim, num_flows, width=hidden[0], generator=generator)
    if name == "paper":
        return PaperPotential(dim, num_flows, generator=generator)
    return MLPPotential(dim, num_flows, hidden, activation=activation, generator=generator)


def make_field(
    field: str,
    potential: str,
    dim: int,
    num_flows: int,
    hidden: Sequence[int],
    activation: str,
    skew: str | None,
    generator: torch.Generator | None,
) -> Field:
    """Makes the field of a name; raises ValueError where a name is unknown."""

    def make() -> Potential:
        return make_potential(potential, dim, num_flows, hidden, activation, generator)

    if field == "helmholtz":
        if skew is None:
            return HelmholtzField(make(), SolenoidalField(dim, num_flows, sum(hidden), generator=generator))
        return HelmholtzField(make(), make(), skew=skew, generator=generator)
    if field == "gradient":
        return GradientField(make())
    if field == "free":
        return FreeField(dim, num_flows, hidden, generator=generator)
    raise ValueError(f"field must be one of {FIELDS}, got {field!r}")


def make_prior(
    prior: str,
    encoder: ConvEncoder,
    image_shape: Sequence[int],
    num_flows: int,
    generator: torch.Generator | None,
) -> Prior:
    """Makes the prior of a name; raises ValueError where it is unknown."""
    dim = encoder.latent_dim
    if prior == "normal":
        return StandardNormal(dim)
    if prior == "mixture":
        return GaussianMixture(dim, generator=generator)
    if prior == "vamp":
        return VampPrior(encoder, count=_PSEUDO_INPUTS, shape=image_shape, generator=generator)
    if prior == "diffusion":
        return Diffusion(StandardNormal(dim), num_flows)
    if prior == "diffusion-mixture":
        return Diffusion(GaussianMixture(dim, generator=generator), num_flows)
    raise ValueError(f"prior must be one of {PRIORS}, got {prior!r}")
