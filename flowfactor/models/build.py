"""Builds a flow-factorized model from plain settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowfactor.encoders import FactorEncoder
from flowfactor.latent_flow import LatentFlow
from flowfactor.models._parts import frame_shape, make_autoencoder, make_field, make_prior
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.solver import Solver

SUPERVISIONS = ("full", "weak")


def build_vae(
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    field: str = "helmholtz",
    potential: str = "mlp",
    hidden: Sequence[int] = (128, 128),
    activation: str = "logcosh",
    skew: str | None = None,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    prior: str = "normal",
    solver: Mapping[str, Any] | None = None,
    divergence: Any = "exact",
    supervision: str = "full",
    num_frames: int | None = None,
    factor_encoder: Mapping[str, Any] | None = None,
    estimator: str | Mapping[str, Any] = "balanced",
    tau: float | None = None,
    anneal_steps: int | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> FlowFactorizedVAE:
    r"""Builds a `FlowFactorizedVAE` with convolutional encoder and decoder.

    Args:
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K.
        latent_dim: D.
        field: ``"helmholtz"``, ``"gradient"`` or ``"free"`` (a velocity network without potential).
        potential: ``"mlp"``, ``"resnet"``, ``"convex"`` or ``"paper"``.
        hidden: The two hidden sizes of the networks (the residual network takes the first).
        activation: Activation of the ``mlp`` potential.
        skew: What the divergence-free part of a Helmholtz field is made of: None for a `SolenoidalField` of as many ridge
            functions as the networks have hidden units; ``"canonical"`` or ``"learned"`` for $J\nabla h$ of a stream
            potential h, with such a J.
        encoder: Keyword arguments of `ConvEncoder`; ``{"architecture": "paper"}`` for the paper's.
        decoder: Keyword arguments of `ConvDecoder`.
        likelihood: ``"bernoulli"``, ``"gaussian"``, or a likelihood's config.
        prior: ``"normal"``, ``"mixture"``, ``"vamp"`` (of 50 pseudo-inputs), ``"diffusion"`` or ``"diffusion-mixture"``.
        solver: Keyword arguments of `Solver`. Where None: unit Euler steps under ``path``, where any map gives a true
            bound, and unit rk4 steps under ``marginal``, whose bound needs the log-determinant of the map itself.
        divergence: ``"exact"`` or ``"hutchinson"``.
        supervision: ``"full"`` where k is given with every sequence, ``"weak"`` where it is inferred, by a `FactorEncoder`.
        num_frames: T+1, the number of frames of a sequence; needed for weak supervision.
        factor_encoder: Keyword arguments of `FactorEncoder`.
        estimator: ``"balanced"``, ``"gumbel"``, ``"enumerate"``, or a mapping with the name and settings of one.
        tau: Temperature, in nats, with which the balanced estimator begins; its default where None. The other
            estimators have none.
        anneal_steps: Training steps over which it falls; its default where None.
        generator: Source of the flow's initial weights.
        **settings: Passed on to `FlowFactorizedVAE`.

    Returns:
        The model.

    Raises:
        ValueError: If a name is unknown or a size does not fit.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_vae((1, 16, 16), num_flows=2, latent_dim=8, field="gradient")
        >>> type(model.flow.field).__name__
        'GradientField'
    """
    made_encoder, made_decoder = make_autoencoder(image_shape, latent_dim, encoder, decoder, likelihood)
    made_field = make_field(field, potential, latent_dim, num_flows, tuple(hidden), activation, skew, generator)
    if solver is None:
        # A step size, so that the map does not depend on the times that are asked for.
        solver = {"method": "rk4" if settings.get("objective") == "marginal" else "euler", "step_size": 1.0}
    flow = LatentFlow(made_field, Solver(**solver), divergence)
    made_factor = _factor(supervision, num_flows, num_frames, frame_shape(image_shape), factor_encoder)
    return FlowFactorizedVAE(
        made_encoder,
        made_decoder,
        flow,
        make_prior(prior, made_encoder, image_shape, num_flows, generator),
        factor_encoder=made_factor,
        estimator=_estimator(estimator, tau, anneal_steps),
        **settings,
    )


def _factor(
    supervision: str, num_flows: int, num_frames: int | None, shape: dict[str, Any], options: Mapping[str, Any] | None
) -> FactorEncoder | None:
    if supervision not in SUPERVISIONS:
        raise ValueError(f"supervision must be one of {SUPERVISIONS}, got {supervision!r}")
    if supervision == "full":
        return None
    if num_frames is None:
        raise ValueError(
            "weak supervision looks at whole sequences: give num_frames, the number of their frames (T + 1)"
        )
    return FactorEncoder(num_flows, num_frames, **shape, **(options or {}))


def _estimator(estimator: str | Mapping[str, Any], tau: float | None, anneal_steps: int | None) -> dict[str, Any]:
    made = {"name": estimator} if isinstance(estimator, str) else dict(estimator)
    given = {name: value for name, value in (("tau", tau), ("anneal_steps", anneal_steps)) if value is not None}
    # A preset's temperature must not be in the way of another estimator.
    return made | given if made.get("name") == "balanced" else made
