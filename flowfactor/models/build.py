"""Builds models from plain settings: names, sizes and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flowfactor._checks import check_count
from flowfactor._config import named
from flowfactor.context import ContextSize, context_size
from flowfactor.encoders import AugmentedEncoder, ConvDecoder, ConvEncoder, FactorEncoder, PairEncoder
from flowfactor.fields import Field, FreeField, GradientField, HelmholtzField, SolenoidalField
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.estimators import FactorEstimator
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.sparse import SparseTransformationVAE
from flowfactor.objectives import Objective
from flowfactor.potentials import (
    ConvexPotential,
    DisplacementPotential,
    MLPPotential,
    PaperPotential,
    Potential,
    ResNetPotential,
)
from flowfactor.priors import Augmented, Diffusion, GaussianMixture, Prior, StandardNormal, VampPrior
from flowfactor.registry import BUILT_IN, declare, make, split
from flowfactor.solver import Solver

SUPERVISIONS = ("full", "weak")

_PSEUDO_INPUTS = 50


def build_vae(
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    field: str | Mapping[str, Any] = "helmholtz",
    potential: str | Mapping[str, Any] = "mlp",
    hidden: Sequence[int] = (128, 128),
    activation: str = "logcosh",
    skew: str | None = None,
    context: int | Mapping[str, int] = 0,
    augment_dim: int = 0,
    augment_scale: float = 0.05,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    prior: str | Mapping[str, Any] = "normal",
    solver: Mapping[str, Any] | None = None,
    divergence: Any = "exact",
    probes: int = 1,
    supervision: str = "full",
    num_frames: int | None = None,
    factor_encoder: Mapping[str, Any] | None = None,
    estimator: FactorEstimator | str | Mapping[str, Any] = "balanced",
    objective: Objective | str | Mapping[str, Any] = "path",
    tau: float | None = None,
    anneal_steps: int | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> FlowFactorizedVAE:
    r"""Builds a `FlowFactorizedVAE` with convolutional encoder and decoder.

    Parts of your own that are registered (see `flowfactor.register_potential`) are named like the others. Where a part has
    options, a mapping takes the place of its name: ``potential={"name": "well", "depth": 2.0}``.

    Args:
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K.
        latent_dim: D, the dimensions that the encoder writes.
        field: ``"helmholtz"``, ``"gradient"`` or ``"free"`` (a velocity network without potential).
        potential: ``"mlp"``, ``"resnet"``, ``"convex"``, ``"paper"`` or ``"displacement"`` (into dimensions at rest).
        hidden: The two hidden sizes of the networks (the residual network takes the first).
        activation: Activation of the ``mlp`` potential.
        skew: What the divergence-free part of a Helmholtz field is made of: None for a `SolenoidalField` of as many ridge
            functions as the networks have hidden units; ``"canonical"`` or ``"learned"`` for $J\nabla h$ of a stream
            potential h, with such a J.
        context: C, the number of features of each sequence that steer its flow (a class, a speed, an embedding), or such a
            number for each name; 0 for none. The encoder and the decoder do not see them.
        augment_dim: A, the number of dimensions at rest: the encoder does not write them, they start at a narrow normal
            around zero under posterior and prior alike, the flow (of dimension D + A) writes them, and the decoder reads
            them (`flowfactor.encoders.AugmentedEncoder`): room in which a gradient flow does what it cannot without curl. 0
            for none. Under ``marginal`` take a ``diffusion`` prior with it: one that does not spread holds the room at rest
            in every frame.
        augment_scale: The standard deviation of these dimensions at the start.
        encoder: Keyword arguments of `ConvEncoder`; ``{"architecture": "paper"}`` for the paper's. With a ``name`` among
            them, those of the registered encoder.
        decoder: Keyword arguments of `ConvDecoder`, likewise.
        likelihood: ``"bernoulli"``, ``"gaussian"``, or a likelihood's config.
        prior: ``"normal"``, ``"mixture"``, ``"vamp"`` (of 50 pseudo-inputs), ``"diffusion"`` or ``"diffusion-mixture"``.
        solver: Keyword arguments of `Solver`. Where None: unit Euler steps under ``path``, where any map gives a true
            bound, and unit rk4 steps under ``marginal``, whose bound needs the log-determinant of the map itself.
        divergence: ``"exact"`` or ``"hutchinson"``.
        probes: The number of probes of such an estimate.
        supervision: ``"full"`` where k is given with every sequence, ``"weak"`` where it is inferred, by a `FactorEncoder`.
        num_frames: T+1, the number of frames of a sequence; needed for weak supervision.
        factor_encoder: Keyword arguments of `FactorEncoder`, likewise.
        estimator: ``"balanced"``, ``"gumbel"``, ``"enumerate"``, or a mapping with the name and settings of one.
        objective: The bound, ``"path"`` or ``"marginal"``.
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
    made_encoder, made_decoder = make_autoencoder(
        image_shape, latent_dim, encoder, decoder, likelihood, augment_dim, augment_scale
    )
    made_field = make_field(
        field,
        potential,
        latent_dim + augment_dim,
        num_flows,
        tuple(hidden),
        activation,
        skew,
        generator,
        context,
        augment_dim,
    )
    _check_steered(made_field, context, f"the field {field!r} of the potential {potential!r}")
    bound = named(Objective, objective)
    if solver is None:
        # A step size, so that the map does not depend on the times that are asked for.
        solver = {"method": "rk4" if bound.log_det else "euler", "step_size": 1.0}
    if supervision not in SUPERVISIONS:
        raise ValueError(f"supervision must be one of {SUPERVISIONS}, got {supervision!r}")
    if supervision == "weak" and num_frames is None:
        raise ValueError(
            "weak supervision looks at whole sequences: give num_frames, the number of their frames (T + 1)"
        )
    sizes = {"num_flows": num_flows, "num_frames": num_frames, **frame_shape(image_shape)}
    return FlowFactorizedVAE(
        made_encoder,
        made_decoder,
        LatentFlow(made_field, Solver(**solver), divergence, probes=probes),
        make_prior(prior, made_encoder, image_shape, latent_dim, num_flows, generator),
        objective=bound,
        factor_encoder=make_coder(FactorEncoder, factor_encoder, **sizes) if supervision == "weak" else None,
        estimator=_estimator(estimator, tau, anneal_steps),
        **settings,
    )


def build_sparse_vae(
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    field: str | Mapping[str, Any] = "helmholtz",
    potential: str | Mapping[str, Any] = "mlp",
    hidden: Sequence[int] = (128, 128),
    activation: str = "logcosh",
    skew: str | None = None,
    context: int | Mapping[str, int] = 0,
    augment_dim: int = 0,
    augment_scale: float = 0.05,
    control: str = "single",
    slab: str = "half_normal",
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    pair_encoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    prior: str | Mapping[str, Any] = "normal",
    solver: Mapping[str, Any] | None = None,
    divergence: Any = "exact",
    probes: int = 1,
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
        context: As in `build_vae`.
        augment_dim: As in `build_vae`.
        augment_scale: As in `build_vae`.
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
        probes: The number of probes of such an estimate.
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
    made_encoder, made_decoder = make_autoencoder(
        image_shape, latent_dim, encoder, decoder, likelihood, augment_dim, augment_scale
    )
    chosen: dict[str, Any] = {"controls": 1 if control == "single" else 2, "slab": slab, **(pair_encoder or {})}
    pairs = make_coder(PairEncoder, chosen, num_flows=num_flows, **frame_shape(image_shape))
    made_field = make_field(
        field,
        potential,
        latent_dim + augment_dim,
        num_flows,
        tuple(hidden),
        activation,
        skew,
        generator,
        context,
        augment_dim,
    )
    _check_steered(made_field, context, f"the field {field!r} of the potential {potential!r}")
    made_solver = Solver(**(solver or {"method": "euler", "step_size": 1.0}))
    flow = LatentFlow(made_field, made_solver, divergence, probes=probes)
    made_prior = make_prior(prior, made_encoder, image_shape, latent_dim, num_flows, generator)
    return SparseTransformationVAE(made_encoder, made_decoder, flow, pairs, made_prior, **settings)


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


def make_coder(default: Callable[..., Any], given: Mapping[str, Any] | None, **known: Any) -> Any:
    """Makes what encodes or decodes: of the default class, unless the name of a registered one is given.

    Args:
        default: The class.
        given: Its keyword arguments, or a name and options.
        **known: The sizes.

    Returns:
        The module.
    """
    if given is not None and "name" in given:
        return make("encoder", given, **known)
    return default(**known, **(given or {}))


def make_autoencoder(
    image_shape: Sequence[int],
    latent_dim: int,
    encoder: Mapping[str, Any] | None,
    decoder: Mapping[str, Any] | None,
    likelihood: str | Mapping[str, Any],
    augment_dim: int = 0,
    augment_scale: float = 0.05,
) -> tuple[Any, Any]:
    """Makes an encoder and a decoder of the same sizes, convolutional unless others are named; with room at rest if any."""
    shape = frame_shape(image_shape)
    made = make_coder(ConvEncoder, encoder, latent_dim=latent_dim, **shape)
    if check_count("augment_dim", augment_dim, 0):
        made = AugmentedEncoder(made, augment_dim, augment_scale)
    dim = latent_dim + augment_dim
    return made, make_coder(ConvDecoder, decoder, latent_dim=dim, **shape, likelihood=likelihood)


def make_potential(
    given: str | Mapping[str, Any],
    dim: int,
    num_flows: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "logcosh",
    generator: torch.Generator | None = None,
    context: ContextSize = 0,
    rest: int = 0,
) -> Potential:
    """Makes the potential of a name, with its options where a mapping has them; raises ValueError for unknown ones."""
    name, options = split("potential", given)
    if name == "displacement" and not options.get("rest", rest):
        raise ValueError("the potential 'displacement' moves dimensions at rest, and there are none: give augment_dim")
    sizes = {
        "mlp": {"hidden": hidden, "activation": activation},
        "convex": {"hidden": hidden},
        "resnet": {"width": hidden[0]},
        "displacement": {"hidden": hidden[0], "rest": rest},
    }
    known = {"dim": dim, "num_flows": num_flows, "generator": generator, "context": context}
    return make("potential", {"name": name, **sizes.get(name, {}), **options}, **known)


def make_field(
    field: str | Mapping[str, Any],
    potential: str | Mapping[str, Any],
    dim: int,
    num_flows: int,
    hidden: Sequence[int],
    activation: str,
    skew: str | None,
    generator: torch.Generator | None,
    context: ContextSize = 0,
    rest: int = 0,
) -> Field:
    """Makes the field of a name; raises ValueError where a name is unknown, or the parts take no context and it has one."""

    def potential_of_its_own() -> Potential:
        return make_potential(potential, dim, num_flows, hidden, activation, generator, context, rest)

    name = _without_options("field", field)
    if name == "helmholtz":
        if skew is None:
            streams = SolenoidalField(dim, num_flows, sum(hidden), generator=generator, context=context)
            return HelmholtzField(potential_of_its_own(), streams)
        return HelmholtzField(potential_of_its_own(), potential_of_its_own(), skew=skew, generator=generator)
    if name == "gradient":
        return GradientField(potential_of_its_own())
    if name == "free":
        return FreeField(dim, num_flows, hidden, generator=generator, context=context)
    return make("field", field, dim=dim, num_flows=num_flows, generator=generator, context=context)


def _check_steered(made: Field, context: ContextSize, parts: str) -> None:
    """Raises ValueError where parts of the user's own do not take the context that is asked for."""
    if made.context_size != context_size(context):
        raise ValueError(
            f"context={context!r} is asked for, but {parts} takes {made.context_size or 'none'}: give its constructor the "
            "argument context, and hand it on to the base class"
        )


def make_prior(
    prior: str | Mapping[str, Any],
    encoder: Any,
    image_shape: Sequence[int],
    latent_dim: int,
    num_flows: int,
    generator: torch.Generator | None,
) -> Prior:
    """Makes the prior of a name; raises ValueError where it is unknown."""
    name = _without_options("prior", prior)
    has_room = isinstance(encoder, AugmentedEncoder)
    codes = encoder.encoder if has_room else encoder
    base: Any = StandardNormal(latent_dim)
    if name in ("mixture", "diffusion-mixture"):
        base = GaussianMixture(latent_dim, generator=generator)
    elif name == "vamp":
        base = VampPrior(codes, count=_PSEUDO_INPUTS, shape=image_shape, generator=generator)
    elif name == "augmented":
        raise ValueError(
            "room at rest is asked for beside the prior's name: augment_dim=A with prior='normal', or another"
        )
    elif name not in ("normal", "diffusion"):
        base = make("prior", prior, dim=latent_dim, num_flows=num_flows, encoder=codes, generator=generator)
    if has_room:
        base = Augmented(base, *encoder.at_rest)
    return Diffusion(base, num_flows) if name in ("diffusion", "diffusion-mixture") else base


def _without_options(kind: str, given: str | Mapping[str, Any]) -> Any:
    """The name of a part, whose options are refused unless it is the user's own."""
    name, options = split(kind, given)
    if options and name in BUILT_IN[kind]:
        raise ValueError(f"the {kind} {name!r} has no options of its own, got {', '.join(options)}")
    return name


def _estimator(estimator: Any, tau: float | None, anneal_steps: int | None) -> Any:
    """The settings of an estimator; those of the balanced one may stand beside its name."""
    if not isinstance(estimator, (str, Mapping)):
        return estimator
    name, options = split("estimator", estimator)
    if name == "balanced":  # a preset's temperature must not be in the way of another estimator
        given = {"tau": tau, "anneal_steps": anneal_steps}
        options |= {key: value for key, value in given.items() if value is not None}
    return {"name": name, **options}


declare(
    "potential", mlp=MLPPotential, resnet=ResNetPotential, convex=ConvexPotential, paper=PaperPotential,
    displacement=DisplacementPotential,
)  # fmt: skip
