"""What is measured of a trained model: the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor._evaluating import evaluating
from flowfactor.data import FactorSequences, SequenceDataset
from flowfactor.errors import FlowSolveError
from flowfactor.metrics import (
    NoLatentFlowError,
    Traversal,
    TraversalModel,
    arc_over_chord,
    combining_errors,
    commutator_error,
    dci,
    equivariance_error,
    gradient_share,
    group_error,
    latent_equivariance_error,
    latent_traversal_error,
    log_likelihood,
    mig,
    sap,
    solver_gap,
    translation_share,
    vp_score,
)
from flowfactor.metrics.combining import not_combined
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.equivariance import every_unlabelled
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.metrics.matched import MatchedModel, match_flows, match_spikes
from flowfactor.models.inputs import shown
from flowfactor.models.protocols import InfersWeights, SequenceModel, code_of, infers_k, knows_transformations
from flowfactor.objectives import NoImportanceWeightsError

_NO_LABELS = {"missing": "the test sequences have no labels of what acts in them"}
_VP_REPEATS, _VP_STEPS = 2, 100
_UNLABELLED: Mapping[str, Callable[..., Any]] = {"commutator": commutator_error, "group": group_error}
_MOTION: Mapping[str, Callable[..., Any]] = {
    "gradient_share": gradient_share,
    "arc_over_chord": arc_over_chord,
    "translation_share": translation_share,
    "solver_gap": solver_gap,
    **_UNLABELLED,
}
"""Figures of how flows move, which are taken of every model that has them; some need no labels."""


def evaluate(
    model: SequenceModel,
    test: SequenceDataset,
    *,
    train: SequenceDataset | None = None,
    limit: int | None = None,
    likelihood_limit: int | None = None,
    samples: int = 64,
    search_images: int = 32,
    path_limit: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures a model on test sequences.

    The flows of a model that infers k are matched to the true transformations first, one to one and so that most
    sequences are inferred right; its other figures are then those of the matched flows. For a model without
    transformations the best single latent dimension and range of each is searched on training data, as in Song et al.
    (2023, section 4.1); see `flowfactor.metrics.latent_traversal_error`.

    Args:
        model: The model.
        test: The test split.
        train: The training split, for that search. Where None, such a model is measured as leaving latents as they are.
        limit: Sequences of each transformation for the equivariance error and the matching, drawn at random; None for
            all.
        likelihood_limit: Sequences for the likelihood, drawn at random; None for all, 0 to leave it out.
        samples: Samples of its importance-weighted bound.
        search_images: Training images of each transformation for the search.
        path_limit: The most sequences of each transformation for the figures of codes, of the flows' paths and of
            combinations, drawn at random; 0 leaves these out.
        seed: Seed of all draws.

    Returns:
        ``equivariance_error`` and ``doing_nothing`` by transformation's name, ``equivariance`` (all figures of
        `flowfactor.metrics.equivariance_error`) and ``log_likelihood`` (those of `flowfactor.metrics.log_likelihood`);
        for a model that infers k also ``factor_accuracy`` (the figures of `flowfactor.metrics.factor_accuracy`).
        Whether codes follow the flows: ``latent_equivariance`` (all figures of
        `flowfactor.metrics.latent_equivariance_error`: 0 where they do, 1 for leaving the code of the first frame as it is).
        How the flows move: ``gradient_share``, ``arc_over_chord``, ``translation_share`` and ``solver_gap``, all figures of
        the metric of that name; ``commutator`` and ``group``, those of `flowfactor.metrics.commutator_error` and
        `flowfactor.metrics.group_error`; or ``{"missing": reason}`` where a model or its field has none.
        ``combining``: E of flows run backwards, superposed, switched midway and three at once, where the test data can give
        the truth: what `flowfactor.metrics.combining_errors` gives, on at most ``path_limit`` sequences each.
        Where the sequences have no labels, there are no errors by transformation, but ``reconstruction``: the L1 norm
        between a frame and its reconstruction from the mean of the posterior, mean over the frames.
    """
    device = next(model.parameters()).device
    test = test.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    paths = path_limit if limit is None else min(limit, path_limit)
    if not test.num_flows:
        result = {"equivariance_error": {}, "doing_nothing": {}, "equivariance": _NO_LABELS}
        result |= dict.fromkeys(("latent_equivariance", *_MOTION), _NO_LABELS)
        result |= _motion(model, test, paths, seed, _UNLABELLED)
        result["combining"] = not_combined(_NO_LABELS["missing"])
        result["reconstruction"] = _reconstruction(model, test, limit, seed)
        if likelihood_limit != 0:
            result["log_likelihood"] = _bound(model, test, samples, likelihood_limit, seed, generator)
        return result
    result = {}
    measured: Any = model
    if infers_k(model):
        match = match_flows(model, test, limit=limit, seed=seed)
        result["factor_accuracy"] = match.as_dict()
        measured = MatchedModel(model.eval(), match.order)
    if train is not None and not knows_transformations(model):
        error = latent_traversal_error(model, train.to(device), test, images=search_images, limit=limit, seed=seed)
    else:
        error = equivariance_error(measured, test, limit=limit, seed=seed)
    result |= {
        "equivariance_error": dict(zip(test.flow_names, error.mean.tolist(), strict=True)),
        "doing_nothing": dict(zip(test.flow_names, error.doing_nothing.tolist(), strict=True)),
        "equivariance": error.as_dict(),
    }
    result["latent_equivariance"] = _latent(measured, test, paths, seed)
    result |= _motion(measured, test, paths, seed)
    result["combining"] = _combining(model, measured, test, paths, seed)
    if likelihood_limit != 0:
        per_flow = None if likelihood_limit is None else max(likelihood_limit // test.num_flows, 1)
        result["log_likelihood"] = _bound(measured, test, samples, per_flow, seed, generator)
    return result


def _combining(model: Any, measured: Any, test: SequenceDataset, limit: int, seed: int) -> dict[str, Any]:
    """How flows run backwards and combine, or the traversals that were found for a model without flows."""
    if not limit:
        return not_combined("not asked for")
    if not knows_transformations(model) and not isinstance(measured, TraversalModel):
        return not_combined("the method knows no transformations")
    return combining_errors(measured, test, limit=limit, seed=seed)


def _bound(
    model: Any, test: SequenceDataset, samples: int, limit: int | None, seed: int, generator: torch.Generator
) -> dict[str, Any]:
    """The importance-weighted bound, or the reason why a model's objective has none."""
    try:
        return log_likelihood(model, test, samples=samples, limit=limit, seed=seed, generator=generator).as_dict()
    except NoImportanceWeightsError as error:
        return {"missing": str(error)}


@dataclass
class EvaluationConfig:
    """How much to measure in a benchmark; the same for every run, as are the images, which are drawn at random.

    Args:
        images: Test images for the equivariance errors and the factor accuracy, under every transformation.
        likelihood_images: Test images for the likelihood, under every transformation; 0 leaves it out.
        likelihood_samples: Samples of its importance-weighted bound.
        latent_images: Test images for the latent equivariance error and for how flows move and combine, under every
            transformation; 0 leaves these out.
        search_images: Training images of each transformation: to search the best latent dimension of models without
            transformations on, and to match the flows of models that infer k on (ten times as many).
        factor_samples: Test pictures for the disentanglement metrics, where the data have factor labels; 0 leaves them
            out.
        vp_images: Test images for the VP score; 0 leaves it out.
        resamples: Bootstrap resamples for the intervals of the disentanglement metrics.
        seed: Seed of all draws; not that of the run, so that all runs are measured on the same images.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> EvaluationConfig(images=0)
        Traceback (most recent call last):
        ...
        ValueError: evaluate.images must be at least 1, got 0
    """

    images: int = 1000
    likelihood_images: int = 64
    likelihood_samples: int = 16
    latent_images: int = 200
    search_images: int = 16
    factor_samples: int = 2000
    vp_images: int = 300
    resamples: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if name in ("images", "likelihood_samples", "search_images") else 0
            check_count(f"evaluate.{name}", value, least)
        if self.resamples == 1:
            raise ValueError("evaluate.resamples must be 0 or at least 2: a single one shows no spread")


def measure(
    model: SequenceModel,
    train: SequenceDataset,
    test: SequenceDataset,
    settings: EvaluationConfig,
    seed: int | None = None,
    *,
    combined: SequenceDataset | None = None,
) -> dict[str, Any]:
    """Measures a model for a benchmark: every figure with its number of samples and its interval.

    As `evaluate`, with more figures. Flows of models that infer k are matched on training sequences here, so that the
    accuracy is that of a matching which has seen no test sequence.

    Args:
        model: The model.
        train: The training split, for the search and the matching alone.
        test: The test split.
        settings: How much to measure.
        seed: Seed of all draws; that of the settings where None.
        combined: Test sequences in which transformations combine, for the spikes of models that infer these; where None,
            they are those of the test split.

    Returns:
        The figures of ``equivariance``, ``likelihood``, ``factor_accuracy``, ``spikes``, ``mig``, ``dci``, ``sap``, ``vp``;
        as in `evaluate` ``latent_equivariance``, those of how flows move, ``commutator``, ``group``, ``combining`` (for a
        model without transformations of its best latent dimensions), and ``reconstruction`` of sequences without labels.
        What a model or data set does not have holds ``{"missing": reason}`` instead.
    """
    device = next(model.parameters()).device
    train, test = train.to(device), test.to(device)
    seed = settings.seed if seed is None else seed
    model.eval()
    figures: dict[str, Any] = {}
    measured: Any = model
    if not test.num_flows:
        names = ("factor_accuracy", "equivariance", "latent_equivariance", *_MOTION, "combining", "vp")
        figures = dict.fromkeys(names, _NO_LABELS)
        figures |= _motion(model, test, settings.latent_images, seed, _UNLABELLED)
        figures["reconstruction"] = _reconstruction(model, test, settings.images, seed)
        figures["likelihood"] = _likelihood(model, model, test, settings, seed)
        return figures | _disentanglement(model, test, settings, seed)
    if not infers_k(model):
        figures["factor_accuracy"] = {"missing": "k is given to this method, or unused by it"}
    else:
        order = match_flows(model, _single(train, test), limit=10 * settings.search_images, seed=seed).order
        figures["factor_accuracy"] = match_flows(model, test, limit=settings.images, seed=seed, order=order).as_dict()
        if isinstance(model, InfersWeights):
            seen = test if combined is None else combined.to(device)
            figures["spikes"] = match_spikes(model, seen, limit=settings.images, seed=seed, order=order).as_dict()
        measured = MatchedModel(model, order)
    if knows_transformations(model):
        figures["equivariance"] = equivariance_error(measured, test, limit=settings.images, seed=seed).as_dict()
    else:
        error = latent_traversal_error(
            model, _single(train, test), test, images=settings.search_images, limit=settings.images, seed=seed
        )
        figures["equivariance"] = error.as_dict()
        measured = TraversalModel(model, [Traversal(*found) for found in error.traversals], _span(test))
    figures["likelihood"] = _likelihood(model, measured, test, settings, seed)
    figures["latent_equivariance"] = _latent(measured, test, settings.latent_images, seed)
    figures |= _motion(measured, test, settings.latent_images, seed)
    figures["combining"] = _combining(model, measured, test, settings.latent_images, seed)
    figures["vp"] = _vp(measured, test, settings, seed)
    figures |= _disentanglement(model, test, settings, seed)
    return figures


@torch.no_grad()
def _reconstruction(model: SequenceModel, test: SequenceDataset, limit: int | None, seed: int) -> dict[str, Any]:
    """How far frames are from their reconstructions, over sequences without labels."""
    errors = []
    with evaluating(model):
        for _, batch in every_unlabelled(test, limit, 64, seed):
            frames, mask = shown(batch), batch.get("mask")
            made = model.decode(model.encode(frames.flatten(0, 1)).mean).view_as(frames)
            each = (frames - made).abs().flatten(2).sum(2)
            errors.append(each.mean(1) if mask is None else (mask * each).sum(1) / mask.sum(1))
    error = torch.cat(errors)
    return {"per_frame": float(error.mean()), "standard_error": float(error_of_mean(error)), "count": len(error)}


def _single(train: SequenceDataset, test: SequenceDataset) -> SequenceDataset:
    """The training sequences, or, where no transformation acts alone in these, the test sequences."""
    fixed = train.fixed_k
    return test if fixed is not None and bool((fixed < 0).all()) else train


def _span(data: SequenceDataset) -> float:
    return float((data.t[-1] - data.t[0]).abs())


def _latent(measured: Any, test: SequenceDataset, limit: int, seed: int) -> dict[str, Any]:
    """Whether codes follow the flows of a model, as far as it has flows."""
    return _tried(limit, lambda: latent_equivariance_error(measured, test, limit=limit, seed=seed).as_dict())


def _motion(
    measured: Any, test: SequenceDataset, limit: int, seed: int, figures: Mapping[str, Callable[..., Any]] = _MOTION
) -> dict[str, Any]:
    """How the flows of a model move, as far as it has flows and its field a potential."""
    return {
        name: _tried(limit, lambda measure=measure: measure(measured, test, limit=limit, seed=seed).as_dict())
        for name, measure in figures.items()
    }


def _tried(wanted: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A figure, or the reason why there is none."""
    if not wanted:
        return {"missing": "not asked for"}
    try:
        return work()
    except (ValueError, NoLatentFlowError, ImportError, FlowSolveError) as error:
        return {"missing": str(error)}


def _likelihood(
    model: SequenceModel, measured: Any, test: SequenceDataset, settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    if not hasattr(model, "log_likelihood"):
        return {"missing": "the model has no log_likelihood"}

    def work() -> dict[str, Any]:
        source = measured if isinstance(measured, MatchedModel) else model
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        count, limit = settings.likelihood_samples, settings.likelihood_images
        bound = log_likelihood(source, test, samples=count, limit=limit, seed=seed, generator=generator)
        if not math.isfinite(bound.per_frame):
            raise ValueError(f"the bound is {bound.per_frame}")
        return bound.as_dict()

    return _tried(settings.likelihood_images, work)


def _vp(measured: Any, test: SequenceDataset, settings: EvaluationConfig, seed: int) -> dict[str, Any]:
    """The VP score from test images, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def work() -> dict[str, Any]:
        index = draw_elements(len(test), settings.vp_images, seed)
        batches = [test.batch(part) for part in index.split(100)]
        images = torch.cat([batch["frames"][:, 0] for batch in batches])
        also = {"context": _together([batch["context"] for batch in batches])} if "context" in batches[0] else {}
        return vp_score(
            measured, images, test.t, repeats=_VP_REPEATS, steps=_VP_STEPS, generator=generator, **also
        ).as_dict()

    return _tried(settings.vp_images, work)


def _together(parts: Sequence[Any]) -> Any:
    """The contexts of several batches as one."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _disentanglement(
    model: SequenceModel, test: SequenceDataset, settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    names = ("mig", "dci", "sap")
    if not isinstance(test, FactorSequences):
        return {name: {"missing": "the data set has no factor labels"} for name in names}
    if not settings.factor_samples:
        return {name: {"missing": "not asked for"} for name in names}
    codes, labels, kept = _codes(model, test, settings.factor_samples, seed)
    draws = [torch.Generator().manual_seed(seed + offset) for offset in range(3)]
    count = settings.resamples
    measures: tuple[Callable[[], Any], ...] = (
        lambda: mig(codes, labels, resamples=count, generator=draws[0]),
        lambda: dci(codes, labels, method="fast", resamples=count, generator=draws[1]),
        lambda: sap(codes, labels, resamples=count, generator=draws[2]),
    )
    return {
        name: _tried(1, lambda work=work: work().as_dict() | {"factors": kept})
        for name, work in zip(names, measures, strict=True)
    }


@torch.no_grad()
def _codes(model: SequenceModel, test: FactorSequences, count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Posterior means of test pictures, and the states and names of the factors that are not constant in the split."""
    generator = torch.Generator().manual_seed(seed)
    codes, labels = [], []
    for size in [500] * (count // 500) + ([count % 500] if count % 500 else []):
        images, states = test.factor_samples(size, generator)
        codes.append(code_of(model, model.encode(images).mean))
        labels.append(states)
    label = torch.cat(labels)
    moving = [f for f in range(label.shape[1]) if len(label[:, f].unique()) > 1]
    return torch.cat(codes), label[:, moving], [test.factor_names[f] for f in moving]
