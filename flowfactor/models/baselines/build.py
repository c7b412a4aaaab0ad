"""Builds baselines from plain settings, with the encoders and decoders of the flow model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowfactor.encoders import ConvEncoder
from flowfactor.models.baselines.base import Baseline
from flowfactor.models.baselines.factor_vae import FactorVAE
from flowfactor.models.baselines.paper_code import PaperCodeVAE
from flowfactor.models.baselines.po_flow import PoFlow
from flowfactor.models.baselines.slow_vae import SlowVAE
from flowfactor.models.baselines.topographic_vae import TopographicVAE
from flowfactor.models.baselines.vae import VAE, BetaVAE
from flowfactor.models.parts import frame_shape, make_autoencoder, make_coder, make_potential
from flowfactor.registry import BUILT_IN, split

BASELINES: Mapping[str, type[Baseline]] = {
    "vae": VAE,
    "beta-vae": BetaVAE,
    "factor-vae": FactorVAE,
    "slow-vae": SlowVAE,
    "topographic-vae": TopographicVAE,
    "po-flow": PoFlow,
    "paper-code": PaperCodeVAE,
}
"""The baselines by name."""

_POTENTIALS = ("paper", "mlp")
_OTHERS = set(BUILT_IN["potential"]) - set(_POTENTIALS)


def build_baseline(
    name: str,
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    potential: str | Mapping[str, Any] = "paper",
    frames_per_step: int | None = None,
    num_frames: int | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Baseline:
    """Builds a baseline with convolutional encoder and decoder, as `build_vae` makes them.

    Args:
        name: ``"vae"``, ``"beta-vae"``, ``"factor-vae"``, ``"slow-vae"``, ``"topographic-vae"``, ``"po-flow"`` or
            ``"paper-code"``.
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K, how many transformations the data have.
        latent_dim: D.
        encoder: Keyword arguments of `ConvEncoder`; ``{"architecture": "paper"}`` for the paper's.
        decoder: Keyword arguments of `ConvDecoder`.
        likelihood: ``"bernoulli"``, ``"gaussian"``, or a likelihood's config.
        potential: ``"paper"`` (as the papers have it), ``"mlp"`` or a registered one, for those that have potentials.
        frames_per_step: How many frames of a sequence to decode in a training step; the class's default where None.
            PoFlow decodes two whatever this says.
        num_frames: T+1, the number of frames of a sequence, for those that depend on it.
        generator: Source of the potentials' initial weights.
        **settings: Passed on to the model's class.

    Returns:
        The model.

    Raises:
        ValueError: If a name or setting is unknown or a size does not fit.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_baseline("slow-vae", (1, 16, 16), num_flows=2, latent_dim=8, gamma=5.0)
        >>> type(model).__name__, model.gamma
        ('SlowVAE', 5.0)
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}: choose one of {', '.join(map(repr, BASELINES))}")
    kind = BASELINES[name]
    parameters = inspect.signature(kind).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    if frames_per_step is not None and "frames_per_step" in known:
        settings["frames_per_step"] = frames_per_step
    if num_frames is not None and "num_frames" in known:
        settings["num_frames"] = num_frames
    if num_frames is not None and num_frames > 1 and "max_steps" in known:
        settings.setdefault("max_steps", num_frames - 1)
    made_encoder, made_decoder = make_autoencoder(image_shape, latent_dim, encoder, decoder, likelihood)
    parts: dict[str, Any] = {"encoder": made_encoder, "decoder": made_decoder}
    if kind is TopographicVAE:
        sizes = {"latent_dim": latent_dim, **frame_shape(image_shape)}
        parts["scale_encoder"] = make_coder(ConvEncoder, encoder, **sizes)
    if kind in (PoFlow, PaperCodeVAE):
        if split("potential", potential)[0] in _OTHERS:
            raise ValueError(f"potential must be one of {_POTENTIALS}, or one of your own, got {potential!r}")
        for part in ("potential", "force") if kind is PaperCodeVAE else ("potential",):
            parts[part] = make_potential(potential, latent_dim, num_flows, generator=generator)
    else:
        settings["num_flows"] = num_flows
    return kind(**parts, **settings)
