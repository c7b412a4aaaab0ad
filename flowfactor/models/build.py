"""Builds models from plain settings: names, sizes and options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowfactor._config import named
from flowfactor.context import ContextSize, context_size
from flowfactor.encoders import FactorEncoder, PairEncoder
from flowfactor.fields import Field
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.estimators import FactorEstimator
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.parts import frame_shape, make_autoencoder, make_coder, make_field, make_prior
from flowfactor.models.sparse import SparseTransformationVAE
from flowfactor.objectives import Objective
from flowfactor.registry import split
from flowfactor.solver import Solver

SUPERVISIONS = ("full", "weak")

ADAPTIVE: Mapping[str, Any] = {"method": "bosh3", "rtol": 3e-3, "atol": 3e-3, "norm": "batch"}
"""The solver in training of models that are given none: looser, and a decoder learns the solver's errors."""

ACCURATE: Mapping[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}
"""Their solver in ``eval()`` mode: what becomes of a picture then hardly depends on those beside it."""

HJ_WEIGHT, BENDING_WEIGHT = 0.13, 0.04
"""What the Hamilton-Jacobi equation and bending weigh in a gradient field that is given no weights, per value of a frame."""

_WEIGHTS = (
    *("hj_weight", "start_weight", "solenoidal_weight", "acceleration_weight", "bending_weight"),
    *("relative_weights", "force"),
)


def build_vae(
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int = 48,
    *,
    field: str | Mapping[str, Any] = "gradient",
    potential: str | Mapping[str, Any] = "mlp",
    hidden: Sequence[int] = (128, 128),
    activation: str = "logcosh",
    skew: str | None = None,
    turning: Sequence[int | str] | None = None,
    time_features: int | None = None,
    context: int | Mapping[str, int] = 0,
    augment_dim: int | None = None,
    augment_scale: float = 0.05,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    likelihood: str | Mapping[str, Any] = "bernoulli",
    prior: str | Mapping[str, Any] = "normal",
    solver: Mapping[str, Any] | None = None,
    evaluation_solver: Mapping[str, Any] | None = None,
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
        field: ``"gradient"``, ``"helmholtz"`` (which has a divergence-free part too, for orbits that close: hues and angles
            that start anywhere on their circle) or ``"free"`` (a velocity network without potential).
        potential: ``"mlp"``, ``"resnet"``, ``"convex"``, ``"paper"``, ``"displacement"`` (into dimensions at rest) or
            ``"stationary"`` (`Stationary`, of ``{"name": "stationary", "potential": "mlp", "energy": 0.1}``, without time).
        hidden: The two hidden sizes of the networks (the residual network takes the first).
        activation: Activation of the ``mlp`` potential.
        skew: What the divergence-free part of a Helmholtz field is made of: None for a `SolenoidalField` of as many ridge
            functions as the networks have hidden units; ``"canonical"`` or ``"learned"`` for $J\nabla h$ of a stream
            potential h, with such a J.
        turning: Which flows have the divergence-free part of a Helmholtz field, by their index: those whose orbits close;
            None for all. The others are gradients, exactly. Where a run is trained, names of the data's transformations
            will do: ``[rotation, colouring]``.
        time_features: The number of time features of potential and divergence-free part, or of the free field; 0 for a field
            that does not depend on time, whose flows are one-parameter groups. The parts' own numbers where None.
        context: C, the number of features of each sequence that steer its flow (a class, a speed, an embedding), or such a
            number for each name; 0 for none. The encoder and the decoder do not see them.
        augment_dim: A, the number of dimensions at rest: the encoder does not write them, they start at a narrow normal
            around zero under posterior and prior alike, the flow (of dimension D + A) writes them, and the decoder reads
            them (`flowfactor.encoders.AugmentedEncoder`): room in which a gradient flow does what it cannot without curl. 0
            for none. Where None: 2 D for gradient fields under ``path``, else none. Under ``marginal`` take a ``diffusion``
            prior with it: one that does not spread holds the room at rest in every frame.
        augment_scale: The standard deviation of these dimensions at the start.
        encoder: Keyword arguments of `ConvEncoder`; ``{"architecture": "paper"}`` for the paper's. With a ``name`` among
            them, those of the registered encoder.
        decoder: Keyword arguments of `ConvDecoder`, likewise.
        likelihood: ``"bernoulli"``, ``"gaussian"``, or a likelihood's config.
        prior: ``"normal"``, ``"mixture"``, ``"vamp"`` (of 50 pseudo-inputs), ``"diffusion"`` or ``"diffusion-mixture"``.
        solver: Keyword arguments of `Solver`. Where None: bosh3 at 3e-3 over the batch under
            ``path``; and unit rk4 steps under ``marginal``, whose bound needs the log-determinant of the map itself.
        evaluation_solver: Keyword arguments of the `Solver` of ``eval()`` mode: of validation, measurements, transformations
            and loaded models. Where None as in training; dopri5 at 1e-5 where that is not given under ``path`` either.
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
        **settings: Passed on to `FlowFactorizedVAE`. Where no weight is among them, a gradient field under ``path`` gets the
            plain Hamilton-Jacobi equation (``force=None``) at 0.13 times the number of values of a frame and bending at 0.04
            times it, which keep its paths straight, and no start at rest; without time, of which that equation asks for
            rest, there is no default.

    Returns:
        The model.

    Raises:
        ValueError: If a name is unknown or a size does not fit.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_vae((1, 16, 16), num_flows=2, latent_dim=8)
        >>> type(model.flow.field).__name__, model.flow.dim, model.flow.solver.method
        ('GradientField', 24, 'bosh3')
    """
    bound = named(Objective, objective)
    gradient_path = not bound.log_det and split("field", field)[0] == "gradient"
    if augment_dim is None:
        augment_dim = 2 * latent_dim if gradient_path else 0
    has_equation = time_features != 0 or split("potential", potential)[0] == "stationary"
    if gradient_path and has_equation and not settings.keys() & set(_WEIGHTS):
        size = math.prod(image_shape)
        weights = {"hj_weight": HJ_WEIGHT * size, "bending_weight": BENDING_WEIGHT * size, "start_weight": 0.0}
        settings |= {**weights, "force": None}
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
        time_features,
        turning,
    )
    _check_steered(made_field, context, f"the field {field!r} of the potential {potential!r}")
    made_solver, other = _solvers(solver, evaluation_solver, bound.log_det)
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
        LatentFlow(made_field, made_solver, divergence, probes=probes, evaluation_solver=other),
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
    turning: Sequence[int | str] | None = None,
    time_features: int | None = None,
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
    evaluation_solver: Mapping[str, Any] | None = None,
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
        turning: As in `build_vae`, by index: what a flow carries is found by training.
        time_features: As in `build_vae`.
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
        solver: As in `build_vae`, where None for the path bound.
        evaluation_solver: As in `build_vae`.
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
        time_features,
        turning,
    )
    _check_steered(made_field, context, f"the field {field!r} of the potential {potential!r}")
    made_solver, other = _solvers(solver, evaluation_solver)
    flow = LatentFlow(made_field, made_solver, divergence, probes=probes, evaluation_solver=other)
    made_prior = make_prior(prior, made_encoder, image_shape, latent_dim, num_flows, generator)
    return SparseTransformationVAE(made_encoder, made_decoder, flow, pairs, made_prior, **settings)


def _solvers(
    training: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None, log_det: bool = False
) -> tuple[Solver, Solver | None]:
    """The solvers of training and of evaluation, for a bound with or without log-determinants."""
    if training is None and log_det:
        # A step size, so that the map does not depend on the times that are asked for.
        training = {"method": "rk4", "step_size": 1.0}
    elif training is None:
        training, evaluation = ADAPTIVE, ACCURATE if evaluation is None else evaluation
    return Solver(**training), None if evaluation is None else Solver(**evaluation)


def _check_steered(made: Field, context: ContextSize, parts: str) -> None:
    """Raises ValueError where parts of the user's own do not take the context that is asked for."""
    if made.context_size != context_size(context):
        raise ValueError(
            f"context={context!r} is asked for, but {parts} takes {made.context_size or 'none'}: give its constructor the "
            "argument context, and hand it on to the base class"
        )


def _estimator(estimator: Any, tau: float | None, anneal_steps: int | None) -> Any:
    """The settings of an estimator; those of the balanced one may stand beside its name."""
    if not isinstance(estimator, (str, Mapping)):
        return estimator
    name, options = split("estimator", estimator)
    if name == "balanced":  # a preset's temperature must not be in the way of another estimator
        given = {"tau": tau, "anneal_steps": anneal_steps}
        options |= {key: value for key, value in given.items() if value is not None}
    return {"name": name, **options}
