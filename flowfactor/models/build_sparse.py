"""Builds a model of sparse transformations from plain settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowfactor.encoders import PairEncoder
from flowfactor.latent_flow import LatentFlow
from flowfactor.models._parts import frame_shape, make_autoencoder, make_field, make_prior
from flowfactor.models.sparse import SparseTransformationVAE
from flowfactor.solver import Solver


def build_sparse_vae(
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    field: str = "helmholtz",
    potential: str = "mlp",
    hidden: Sequence[int] = (128, 128),
    activation: str = "logcosh",
    skew: str | None = None,
    control: str = "single",
    slab: str = "half_normal",
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    pair_encoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    prior: str = "normal",
    solver: Mapping[str, Any] | None = None,
    divergence: Any = "exact",
    generator: torch.Generator | None = None,
    **settings: Any,
) -> SparseTransformationVAE:
    """Builds a `SparseTransformationVAE` with convolutional encoders and decoder.

    Args:
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K.
        latent_dim: D.
        field: As in `build_vae`.
        potential: As in `build_vae`.
        hidden: As in `build_vae`.
        activation: As in `build_vae`.
        skew: As in `build_vae`.
        control: ``"single"`` for one weight a flow, ``"double"`` for one each for the gradient part and the
            divergence-free part of a Helmholtz field.
        slab: ``"half_normal"`` for weights of one sign, ``"laplace"`` for both.
        encoder: Keyword arguments of `ConvEncoder`.
        decoder: Keyword arguments of `ConvDecoder`.
        pair_encoder: Keyword arguments of `PairEncoder`.
        likelihood: As in `build_vae`.
        prior: As in `build_vae`.
        solver: Keyword arguments of `Solver`; unit Euler steps where None.
        divergence: ``"exact"`` or ``"hutchinson"``.
        generator: Source of the flow's initial weights.
        **settings: Passed on to `SparseTransformationVAE`.

    Returns:
        The model.

    Raises:
        ValueError: If a name is unknown or a size does not fit.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_sparse_vae((1, 16, 16), num_flows=2, latent_dim=8, control="double")
        >>> model.controls
        2
    """
    if control not in ("single", "double"):
        raise ValueError(f'control must be "single" or "double", got {control!r}')
    made_encoder, made_decoder = make_autoencoder(image_shape, latent_dim, encoder, decoder, likelihood)
    chosen: dict[str, Any] = {"controls": 1 if control == "single" else 2, "slab": slab, **(pair_encoder or {})}
    pairs = PairEncoder(num_flows, **frame_shape(image_shape), **chosen)
    made_field = make_field(field, potential, latent_dim, num_flows, tuple(hidden), activation, skew, generator)
    flow = LatentFlow(made_field, Solver(**(solver or {"method": "euler", "step_size": 1.0})), divergence)
    made_prior = make_prior(prior, made_encoder, image_shape, num_flows, generator)
    return SparseTransformationVAE(made_encoder, made_decoder, flow, pairs, made_prior, **settings)
