"""Whether flows are what transformations are: a group each, and free to change places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowfactor._evaluating import evaluating
from flowfactor.data import SequenceDataset
from flowfactor.metrics.equivariance import every_unlabelled, latent_path
from flowfactor.metrics.estimates import MeanInterval
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.metrics.motion import PathFigure, displaced
from flowfactor.models.checks import check_positive
from flowfactor.models.inputs import beside
from flowfactor.models.protocols import MovesCodes

Space: TypeAlias = Literal["latents", "frames"]
"""Where distances are taken: L2 between latents, or L1 between decoded frames, as equivariance errors are."""


@dataclass(frozen=True)
class CommutatorError(MeanInterval):
    """By how much the order of two flows matters.

    Attributes:
        mean: The figure of each pair, ``[P]``: a ratio of means over samples.
        standard_error: Its standard error, ``[P]``, by the delta method.
        pairs: The pairs (i, j).
        count: Number of starts that each is based on.
        flow_names: Names of the flows, where the data set has them and as many.
        space: Where distances were taken.
        limit: The most sequences that were to be drawn; None where all were taken.
        seed: Seed of that draw.

    `low` to `high` are normal intervals with 95% confidence.
    """

    mean: Tensor
    standard_error: Tensor
    pairs: tuple[tuple[int, int], ...]
    count: int
    flow_names: tuple[str, ...] = ()
    space: Space = "latents"
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        figures = {name: getattr(self, name).tolist() for name in ("mean", "standard_error", "low", "high")}
        named = [[self.flow_names[k] for k in pair] for pair in self.pairs] if self.flow_names else self.pairs
        pairs = [list(pair) for pair in named]
        return {
            "pairs": pairs,
            **figures,
            "count": self.count,
            "space": self.space,
            "limit": self.limit,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class GroupError:
    """How far each flow is from a group of one parameter.

    Attributes:
        addition: Half the time and then half the time again, against all of it at once; relative to how far that goes.
        inverse: There and back, against where it began; likewise.
        reconstruction: The L1 error of the frame that comes back over that of the reconstruction: 1 where the way there and
            back costs nothing. None for a model without ``decode``, or without error.
        space: Where the distances of the first two were taken.
    """

    addition: PathFigure
    inverse: PathFigure
    reconstruction: PathFigure | None
    space: Space = "latents"

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        figures = {"addition": self.addition, "inverse": self.inverse, "reconstruction": self.reconstruction}
        return {**{name: f and f.as_dict() for name, f in figures.items()}, "space": self.space}


@torch.no_grad()
def commutator_error(
    model: MovesCodes,
    data: SequenceDataset,
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
    span: float | None = None,
    space: Space = "latents",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> CommutatorError:
    r"""By how much the order of two flows matters: how far apart both orders end, relative to how far they go.

    $$\frac{E\, |\phi^i \phi^j z - \phi^j \phi^i z|}
      {\tfrac12 E\, \bigl(|\phi^i \phi^j z - z| + |\phi^j \phi^i z - z|\bigr)}, \qquad z = \mathrm{E}[z | x_0]$$

    with $\phi^k$ the flow of k over the time of a sequence. 0 where flows commute, at most 2; two ends as far from each
    other as from the start have 1. Each flow runs from the first time of the sequence on, so that a flow with time sees the
    times of its training. True transformations commute where one changes what the other leaves as it is; rotating and
    shearing, say, do not, and then this should not be 0. For small times it is the size of the Lie bracket that
    `flowfactor.regularizers.Commutator` takes.

    Args:
        model: The model, with ``encode``, ``num_flows`` and latent paths (``flow``, or ``path(z0, t, control)``); for
            distances in frames also ``decode``.
        data: Sequences, of whose first frames the codes are the starts; take the test split. They need no labels.
        pairs: Pairs of flows; all where None.
        span: How long each flow acts, in frames; as long as a sequence of the data where None.
        space: ``"latents"`` for L2 distances of latents, with dimensions at rest where there are some; ``"frames"`` for L1
            distances of decoded frames.
        limit: Draw so many sequences at random; None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.

    Returns:
        The figure of each pair.

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If there is one flow alone, a pair does not exist, a setting does not fit, or nothing moves.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.Sequences(torch.rand(4, 3, 8, 8))
        >>> vae = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> shifts = ff.metrics.TraversalModel(vae, [ff.metrics.Traversal(0, 2.0), ff.metrics.Traversal(3, 1.0)], span=2)
        >>> found = ff.metrics.commutator_error(shifts, data)
        >>> found.pairs, bool(found.mean < 1e-5)
        (((0, 1),), True)
    """
    chosen = _checked_pairs(pairs, model.num_flows)
    each: list[list[tuple[Tensor, Tensor]]] = [[] for _ in chosen]
    for start in _starts(model, data, span, space, limit, seed, batch_size):
        first = {k: start.follow(start.z0, k) for k in sorted({k for pair in chosen for k in pair})}
        for parts, (i, j) in zip(each, chosen, strict=True):
            ends = start.follow(first[i], j), start.follow(first[j], i)
            gone = [start.distance(end, start.z0) for end in ends]
            parts.append((start.distance(*ends), (gone[0] + gone[1]) / 2))
    means, errors, counts = _ratios(each, lambda p: f"flows {chosen[p][0]} and {chosen[p][1]} move nothing")
    return CommutatorError(means, errors, tuple(chosen), counts, _names(model, data), space, limit, seed)


@torch.no_grad()
def group_error(
    model: MovesCodes,
    data: SequenceDataset,
    *,
    span: float | None = None,
    space: Space = "latents",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> GroupError:
    r"""How far each flow is from a group of one parameter, as a transformation without beginning is one.

    $$\frac{E\, |\phi_{s/2} \phi_{s/2} z - \phi_s z|}{E\, |\phi_s z - z|}, \qquad
      \frac{E\, |\phi_{-s} \phi_s z - z|}{E\, |\phi_s z - z|}, \qquad z = \mathrm{E}[z | x_0]$$

    Every flow starts at the first time of the sequence, each time that it is applied. Both are therefore 0, up to the
    solver's error, for a field without time, and say of a field with time how much it depends on that. The way back runs
    to times before the first, and not along the path of the way there, whose error is the solver's alone.

    Args:
        model: As for `commutator_error`.
        data: As for `commutator_error`.
        span: s, in frames; the time of a sequence where None.
        space: As for `commutator_error`.
        limit: As for `commutator_error`.
        seed: Seed of that draw.
        batch_size: Sequences per batch.

    Returns:
        Both figures of each flow, and what the way there and back costs in frames.

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If a setting does not fit, or a flow moves nothing.
        FlowSolveError: If a solve fails.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.Sequences(torch.rand(4, 3, 8, 8))
        >>> vae = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> shift = ff.metrics.TraversalModel(vae, [ff.metrics.Traversal(3, 2.0)], span=2)
        >>> found = ff.metrics.group_error(shift, data)
        >>> bool(found.addition.mean < 1e-5), bool(found.inverse.mean < 1e-5)
        (True, True)
    """
    flows = range(model.num_flows)
    adding, inverting, showing = ([[] for _ in flows] for _ in range(3))
    for start in _starts(model, data, span, space, limit, seed, batch_size):
        for k in flows:
            end = start.follow(start.z0, k)
            back = start.follow(end, k, -1.0)
            halves = start.follow(start.follow(start.z0, k, 0.5), k, 0.5)
            way = start.distance(end, start.z0)
            adding[k].append((start.distance(halves, end), way))
            inverting[k].append((start.distance(back, start.z0), way))
            if start.decode is not None:
                seen = (start.decode(z) for z in (back, start.z0))
                showing[k].append(tuple(_apart(x, start.x0) for x in seen))

    def figure(each: list[list[tuple[Tensor, Tensor]]], still: str) -> PathFigure:
        return PathFigure(*_ratios(each, still.format), _names(model, data), limit, seed)

    still = "flow {} moves nothing"
    exact = not all(showing) or any(not bool(below.any()) for parts in showing for _, below in parts)
    shown = None if exact else figure(showing, "")
    return GroupError(figure(adding, still), figure(inverting, still), shown, space)


class _Begun(NamedTuple):
    """Starts of a batch, and what can be done with them."""

    x0: Tensor
    z0: Tensor
    follow: Callable[..., Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor] | None


def _starts(
    model: Any, data: SequenceDataset, span: float | None, space: Space, limit: int | None, seed: int, batch_size: int
) -> Iterator[_Begun]:
    """Codes of first frames, batch by batch; their flows last a share of the span, from the first time on."""
    span = None if span is None else check_positive("span", span)
    decode = getattr(model, "decode", None)
    if space not in ("latents", "frames"):
        raise ValueError(f'space must be "latents" or "frames", got {space!r}')
    if space == "frames" and decode is None:
        raise ValueError(f'space="frames" compares decoded frames, and a {type(model).__name__} has no decode')
    with evaluating(model):
        for _, batch in every_unlabelled(data, limit, batch_size, seed):
            x0, t = batch["frames"][:, 0], batch["t"] if batch["t"].ndim == 1 else batch["t"].mT
            if not bool((t[-1] != t[0]).all()):
                raise ValueError(
                    "a sequence takes no time, in which a flow could move something: all its times are equal"
                )
            lasting = t[-1] - t[0] if span is None else span * (t[-1] - t[0]).sign()
            follow = partial(_follow, model, t[0], lasting, beside(batch, "context"))
            apart = _apart if space == "latents" else partial(_apart, decode=decode)
            yield _Begun(x0, model.encode(x0).mean, follow, apart, decode)


def _follow(
    model: object, t0: Tensor, span: Tensor, named: dict[str, Any], z: Tensor, k: int, share: float = 1.0
) -> Tensor:
    """Where flow k carries states ``[B, D]`` from ``t0`` on, in a share of the span."""
    path = latent_path(model, z, torch.stack([t0, t0 + share * span]).to(z), k, **named)
    return path[0] + displaced(path)[-1]


def _apart(a: Tensor, b: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Distances ``[B]``: L2 of latents ``[B, D]``, L1 of frames."""
    if decode is not None:
        a, b = decode(a), decode(b)
    return (a - b).double().flatten(1).norm(p=2 if a.ndim == 2 else 1, dim=1)


def _ratios(each: list[list[tuple[Tensor, Tensor]]], still: Callable[[int], str]) -> tuple[Tensor, Tensor, int]:
    """Ratios of means over samples, their standard errors, and the number of samples."""
    means, errors, count = [], [], 0
    for which, parts in enumerate(each):
        above, below = (torch.cat(x) for x in zip(*parts, strict=True))
        if not bool(below.mean() > 0):
            raise ValueError(f"{still(which)}: there is nothing that a distance could be relative to")
        means.append(above.mean() / below.mean())
        errors.append(error_of_mean(above - means[-1] * below) / below.mean())
        count = len(below)
    return torch.stack(means).float(), torch.stack(errors).float(), count


def _checked_pairs(pairs: Iterable[tuple[int, int]] | None, flows: int) -> list[tuple[int, int]]:
    if flows < 2:
        raise ValueError("an order takes two flows, and the model has one alone")
    if pairs is None:
        return list(combinations(range(flows), 2))
    found = [(int(i), int(j)) for i, j in pairs]
    if not found or any(i == j or not (0 <= i < flows and 0 <= j < flows) for i, j in found):
        raise ValueError(f"pairs must be of two different flows of 0 to {flows - 1}, at least one, got {found}")
    return found


def _names(model: MovesCodes, data: SequenceDataset) -> tuple[str, ...]:
    names = tuple(getattr(data, "flow_names", ()))
    return names if len(names) == model.num_flows else ()
