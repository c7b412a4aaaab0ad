"""Makes the parts of a model from plain settings: names, sizes and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flowfactor._checks import check_count
from flowfactor.context import ContextSize
from flowfactor.encoders import AugmentedEncoder, ConvDecoder, ConvEncoder
from flowfactor.fields import Field, FreeField, GradientField, HelmholtzField, SolenoidalField
from flowfactor.potentials import (
    ConvexPotential,
    DisplacementPotential,
    MLPPotential,
    PaperPotential,
    Potential,
    ResNetPotential,
    Stationary,
)
from flowfactor.priors import Augmented, Diffusion, GaussianMixture, Prior, StandardNormal, VampPrior
from flowfactor.registry import BUILT_IN, declare, make, split

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
    time_features: int | None = None,
) -> Potential:
    """Makes the potential of a name, with its options where a mapping has them; raises ValueError for unknown ones."""
    name, options = split("potential", given)
    if name == "stationary":
        if time_features:
            raise ValueError(
                f"the potential 'stationary' has no time features: give time_features=0, got {time_features}"
            )
        inner = options.pop("potential", "mlp")
        own = split("potential", inner)[0] not in BUILT_IN["potential"]  # whose time nobody else knows about
        phi = make_potential(inner, dim, num_flows, hidden, activation, generator, context, rest, None if own else 0)
        return make("potential", {"name": name, **options}, potential=phi)
    if name == "displacement" and not options.get("rest", rest):
        raise ValueError("the potential 'displacement' moves dimensions at rest, and there are none: give augment_dim")
    sizes = {
        "mlp": {"hidden": hidden, "activation": activation},
        "convex": {"hidden": hidden},
        "resnet": {"width": hidden[0]},
        "displacement": {"hidden": hidden[0], "rest": rest},
    }
    known = {"dim": dim, "num_flows": num_flows, "generator": generator, "context": context}
    return make("potential", {"name": name, **sizes.get(name, {}), **_timed(time_features), **options}, **known)


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
    time_features: int | None = None,
    turning: Sequence[int | str] | None = None,
) -> Field:
    """Makes the field of a name; raises ValueError where a name is unknown, or the parts take no context and it has one."""

    def potential_of_its_own() -> Potential:
        return make_potential(potential, dim, num_flows, hidden, activation, generator, context, rest, time_features)

    name, timed = _without_options("field", field), _timed(time_features)
    if skew is not None and name != "helmholtz":
        raise ValueError(
            f'skew={skew!r} makes the divergence-free part of a Helmholtz field: give field="helmholtz" too'
        )
    if turning is not None and name != "helmholtz":
        raise ValueError(
            f"turning={turning!r} says which flows have the divergence-free part of a Helmholtz field, and the field is "
            f'{name!r}: leave it out, or give field="helmholtz"'
        )
    if name == "helmholtz":
        acting = None if turning is None else _indices(turning)
        if skew is None:
            streams = SolenoidalField(dim, num_flows, sum(hidden), generator=generator, context=context, **timed)
            return HelmholtzField(potential_of_its_own(), streams, turning=acting)
        one, other = potential_of_its_own(), potential_of_its_own()
        return HelmholtzField(one, other, skew=skew, turning=acting, generator=generator)
    if name == "gradient":
        return GradientField(potential_of_its_own())
    if name == "free":
        return FreeField(dim, num_flows, hidden, generator=generator, context=context, **timed)
    name, options = split("field", field)
    named = {"name": name, **timed, **options}
    return make("field", named, dim=dim, num_flows=num_flows, generator=generator, context=context)


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


def _timed(time_features: int | None) -> dict[str, Any]:
    """The option of a part for its time features, where it is not left to the part."""
    return {} if time_features is None else {"time_features": time_features}


def _indices(turning: Sequence[int | str]) -> Any:
    """Flows by their index, as the field takes and checks them; raises ValueError for names, which a model does not know."""
    if isinstance(turning, list | tuple) and any(isinstance(flow, str) for flow in turning):
        raise ValueError(
            f"turning={turning!r} names flows, which a model knows by their index alone: give indices, such as [1, 2]. "
            "Names of the data's transformations will do where a configuration is trained"
        )
    return turning


def _without_options(kind: str, given: str | Mapping[str, Any]) -> Any:
    """The name of a part, whose options are refused unless it is the user's own."""
    name, options = split(kind, given)
    if options and name in BUILT_IN[kind]:
        raise ValueError(f"the {kind} {name!r} has no options of its own, got {', '.join(options)}")
    return name


declare(
    "potential", mlp=MLPPotential, resnet=ResNetPotential, convex=ConvexPotential, paper=PaperPotential,
    displacement=DisplacementPotential, stationary=Stationary,
)  # fmt: skip
