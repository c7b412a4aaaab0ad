"""How a model's flows move: along the gradient of a potential or not, straight or not, and by what the sample is or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowfactor._evaluating import evaluating
from flowfactor.control import Control
from flowfactor.data import SequenceDataset
from flowfactor.fields.evaluation import Evaluation
from flowfactor.latent_flow import LatentFlow
from flowfactor.metrics._checks import check_flows
from flowfactor.metrics.equivariance import NoLatentFlowError, every_flow, latent_path
from flowfactor.metrics.estimates import MeanInterval
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.models.inputs import beside
from flowfactor.models.protocols import MovesCodes
from flowfactor.path import FlowPath
from flowfactor.solve.problem import Cost
from flowfactor.solver import Solver


@dataclass(frozen=True)
class PathFigure(MeanInterval):
    """A figure of the paths of every flow.

    Attributes:
        mean: The figure, ``[K]``: a ratio of means over samples.
        standard_error: Its standard error, ``[K]``, by the delta method.
        count: Number of paths that each is based on; the smallest, where recorded sequences are not as many of each.
        flow_names: Names of the flows, where the data set has them.
        limit: The most images that were to be drawn; None where all were taken.
        seed: Seed of that draw.

    `low` to `high` are normal intervals with 95% confidence.
    """

    mean: Tensor
    standard_error: Tensor
    count: int
    flow_names: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "flows": list(self.flow_names),
            "mean": self.mean.tolist(),
            "standard_error": self.standard_error.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "count": self.count,
            "limit": self.limit,
            "seed": self.seed,
        }


@torch.no_grad()
def gradient_share(
    model: MovesCodes, data: SequenceDataset, *, limit: int | None = None, seed: int = 0, batch_size: int = 256
) -> PathFigure:
    r"""How much of a flow's squared speed its potential carries, along the flow's own paths.

    $$\frac{E \int |\nabla u|^2 dt}{E \int |\nabla u|^2 + |v - \nabla u|^2\, dt}$$

    1 for the flow of a `flowfactor.fields.GradientField`. For a `flowfactor.fields.HelmholtzField` $v - \nabla u$ is the
    part without divergence: where this is far below 1, what is asked of u, the Hamilton-Jacobi equation above all, says
    little about the flow. The denominator is $E \int |v|^2$ where the two parts are orthogonal in the mean; it does not
    shrink where they cancel, so that this is a share.

    Args:
        model: The model, with ``encode``, ``num_flows`` and a `flowfactor.LatentFlow` ``flow`` whose field has a potential.
            Paths start at the means of the posteriors of first frames.
        data: Sequences of known transformations; take the test split.
        limit: Draw so many images at random, the same for every flow (recorded sequences: so many of each); None for all.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The share of each flow, ``[K]``, in [0, 1].

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If its field has no potential, nothing moves, or the model has other flows than the data set.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8), field="gradient")
        >>> ff.metrics.gradient_share(model, data).mean
        tensor([1.])
    """
    field = flow_of(model).field
    if not field.has_potential:
        raise ValueError(
            f"the flow follows a {type(field).__name__}, which has no potential whose gradient could carry it: take a "
            "GradientField or a HelmholtzField"
        )
    costs = {"gradient": _SquaredGradient(), "rest": _SquaredRest()}

    def shares(start: Start) -> tuple[Tensor, Tensor]:
        done = follow(model, start, costs=costs).costs
        return done["gradient"][-1], done["gradient"][-1] + done["rest"][-1]

    return _ratio(model, data, shares, limit, seed, batch_size)


@torch.no_grad()
def arc_over_chord(
    model: MovesCodes, data: SequenceDataset, *, limit: int | None = None, seed: int = 0, batch_size: int = 256
) -> PathFigure:
    r"""How bent a flow's paths are: their length relative to the distance between their ends; 1 is straight.

    $$\frac{E \int |v|\, dt}{E\, |z_T - z_0|}$$

    Paths of dynamic optimal transport are straight (Benamou and Brenier 2000). Those that return to their start have no
    bound. Where a model has no `flowfactor.LatentFlow` but a ``path``, the length is that of the polygon through its states.

    Args:
        model: The model, with ``encode``, ``num_flows`` and latent paths (``flow``, or ``path(z0, t, control)``).
        data: Sequences of known transformations; take the test split.
        limit: As for `gradient_share`.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The ratio of each flow, ``[K]``, at least 1 up to the solver's error.

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If nothing moves, or the model has other flows than the data set.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> bool(ff.metrics.arc_over_chord(model, data).mean >= 0.999)
        True
    """
    whole = isinstance(getattr(model, "flow", None), LatentFlow)

    def lengths(start: Start) -> tuple[Tensor, Tensor]:
        if whole:
            path = follow(model, start, costs={"length": Speed()})
            z, arc = path.z, path.costs["length"][-1]
        else:
            z = latent_path(model, start.z0, start.t, start.control, **start.named)
            arc = z.diff(dim=0).norm(dim=-1).sum(0)
        return arc, displaced(z)[-1].norm(dim=-1)

    return _ratio(model, data, lengths, limit, seed, batch_size)


@torch.no_grad()
def translation_share(
    model: MovesCodes,
    data: SequenceDataset,
    *,
    coded: bool = False,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> PathFigure:
    r"""The share of a flow's mean squared displacement that is the same for all samples.

    $$\frac{\sum_{t=1}^T |E\, (z_t - z_0)|^2}{\sum_{t=1}^T E\, |z_t - z_0|^2}$$

    At 1 the flow moves every sample alike: it tells the decoder the time, and nothing about what it transforms. An
    equivariance error from the untouched start does not show it, for a decoder can do the rest. With N samples, N
    unrelated displacements have a share of 1/N.

    Args:
        model: The model, with ``encode``, ``num_flows`` and latent paths (``flow``, or ``path(z0, t, control)``).
        data: Sequences of known transformations; take the test split.
        coded: Whether to look at the first ``model.code_dim`` dimensions alone, those that the encoder writes, where the
            model says how many these are. The decoder reads all of them.
        limit: As for `gradient_share`.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The share of each flow, ``[K]``, in [0, 1].

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If nothing moves, or the model has other flows than the data set.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> vae = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> clock = ff.metrics.TraversalModel(vae, [ff.metrics.Traversal(3, 2.0)], span=2)
        >>> ff.metrics.translation_share(clock, data).mean
        tensor([1.])
    """
    dims = slice(getattr(model, "code_dim", None) if coded else None)
    moved: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    for k, start in starts(model, data, limit, seed, batch_size):
        z = latent_path(model, start.z0, start.t, start.control, **start.named)
        moved[k].append(displaced(z[..., dims])[1:].double())
    found = []
    for k, parts in enumerate(moved):
        way = torch.cat(parts, 1)  # [T, N, D]
        common, squares = way.mean(1, keepdim=True), way.square().sum((0, 2))
        share = common.square().sum() / moving(squares.mean(), k)
        influence = 2 * (common * (way - common)).sum((0, 2)) - share * (squares - squares.mean())
        found.append((share, error_of_mean(influence) / squares.mean(), way.shape[1]))
    return _figure(found, data, limit, seed)


class Start(NamedTuple):
    """Where the paths of some sequences start.

    Attributes:
        z0: The means of the posteriors of their first frames, ``[B, D]``.
        t: Times ``[T]``, or those of each sequence ``[T, B]``.
        control: Which flow acts in each.
        named: The context, by its name, where the data have one.
        batch: The sequences.
    """

    z0: Tensor
    t: Tensor
    control: Control
    named: dict[str, Any]
    batch: dict[str, Any]


def starts(
    model: MovesCodes, data: SequenceDataset, limit: int | None, seed: int, batch_size: int
) -> Iterator[tuple[int, Start]]:
    """The starts of the paths of every flow, from every image or from so many drawn, batch by batch."""
    check_flows(model, data)
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size, seed):
            t = batch["t"] if batch["t"].ndim == 1 else batch["t"].mT
            z0 = model.encode(batch["frames"][:, 0]).mean
            yield k, Start(z0, t, batch["k"], beside(batch, "context"), batch)


def flow_of(model: object) -> LatentFlow:
    """The latent flow of a model; NoLatentFlowError where it has none."""
    flow = getattr(model, "flow", None)
    if not isinstance(flow, LatentFlow):
        raise NoLatentFlowError(
            f"a {type(model).__name__} has no latent flow: what is asked here is measured along the paths of a "
            "flowfactor.LatentFlow, which a model has as its flow"
        )
    return flow


def follow(
    model: object, start: Start, *, solver: Solver | None = None, costs: Mapping[str, Cost] | None = None
) -> FlowPath:
    """Follows a model's flow, by another solver than the one that acts where it is given."""
    flow = copy(flow_of(model))
    if solver is not None:
        flow.solver, flow.evaluation_solver = solver, None
    own = getattr(model, "own_control", None)  # that of a model whose flows were matched
    control = start.control if own is None else own(start.control)
    return flow(start.z0, start.t, control, costs=costs, **start.named)


def displaced(z: Tensor) -> Tensor:
    """How far the states of paths ``[T, B, D]`` are from their starts; 0 where that is a rounding, of a dense output say."""
    way = z - z[0]
    rounding = 16 * torch.finfo(z.dtype).eps * z[0].norm(dim=-1, keepdim=True)
    return way.masked_fill(way.norm(dim=-1, keepdim=True) <= rounding, 0)


def moving(way: Tensor, k: int) -> Tensor:
    """A mean way of flow k, which must not be zero; raises ValueError."""
    if not bool(way > 0):
        raise ValueError(f"flow {k} moves nothing: there is nothing that a figure of its paths could be relative to")
    return way


class Speed:
    """The running cost |v|, whose integral is the length of a path."""

    many_stages = True

    def __call__(self, evaluation: Evaluation) -> Tensor:
        """|v|, ``[*batch]``."""
        return evaluation.velocity.norm(dim=-1)


class _SquaredGradient:
    needs = ("potential",)
    many_stages = True

    def __call__(self, evaluation: Evaluation) -> Tensor:
        assert evaluation.gradient is not None
        return evaluation.gradient.square().sum(-1)


class _SquaredRest:
    needs = ("potential",)
    many_stages = True

    def __call__(self, evaluation: Evaluation) -> Tensor:
        assert evaluation.gradient is not None
        return (evaluation.velocity - evaluation.gradient).square().sum(-1)


def _ratio(
    model: MovesCodes,
    data: SequenceDataset,
    measure: Callable[[Start], tuple[Tensor, Tensor]],
    limit: int | None,
    seed: int,
    batch_size: int,
) -> PathFigure:
    """The ratio of two means over paths, for every flow."""
    each: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(data.num_flows)]
    for k, start in starts(model, data, limit, seed, batch_size):
        each[k].append(measure(start))
    found = []
    for k, parts in enumerate(each):
        above, below = (torch.cat(x).double() for x in zip(*parts, strict=True))
        ratio = above.mean() / moving(below.mean(), k)
        found.append((ratio, error_of_mean(above - ratio * below) / below.mean(), len(below)))
    return _figure(found, data, limit, seed)


def _figure(
    found: Sequence[tuple[Tensor, Tensor, int]], data: SequenceDataset, limit: int | None, seed: int
) -> PathFigure:
    means, errors, counts = zip(*found, strict=True)
    names = tuple(getattr(data, "flow_names", ()))
    return PathFigure(torch.stack(means).float(), torch.stack(errors).float(), min(counts), names, limit, seed)
