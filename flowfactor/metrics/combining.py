"""How a model's flows run backwards, and act together and one after another, on test data that can give the truth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from flowfactor._checks import check_optional_count
from flowfactor.data import CombinedImages, CombinedScenes, CombinedSequences, FactorSequences, TransformedImages
from flowfactor.data.base import SequenceDataset
from flowfactor.errors import FlowSolveError
from flowfactor.metrics.composition import composition_error
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.equivariance import NoLatentFlowError, equivariance_error
from flowfactor.models.protocols import Transforms

_REASONS = (ValueError, TypeError, NotImplementedError, NoLatentFlowError, FlowSolveError)
_TOGETHER = ("superpose", "switch", "together")


def combining_errors(
    model: Transforms, data: SequenceDataset, *, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The errors of flows in other ways than one at a time and forward: `equivariance_error` and `composition_error`.

    Everything begins where the sequences of the data do. Pairs and threes act at the pace of the single flows, so that in
    the same number of frames they go further than one alone.

    Args:
        model: A model with ``transform``, its flows in the order of the data's transformations.
        data: Sequences of one transformation each; take the test split. Pairs and threes of `TransformedImages` and its kin
            are known, and of grids of factors such as `Scenes`.
        limit: Draw about so many sequences of each figure at random; None for as many as there are elements.
        seed: Seed of the draws.

    Returns:
        JSON values. ``start`` and ``count``, where sequences begin and their limit. Errors E with a normal interval of 95%
        confidence, ``low`` to ``high``, and that of ``doing_nothing``, each a dictionary: by transformation those of
        ``single`` flows forward, and of these ``backward``, from the encoded last frame; by pair (``"a+b"``) those that are
        ``superpose``d all along and that ``switch`` midway, by three (``"a+b+c"``) those that act ``together``. These hold
        ``over_singles`` too, E over the mean of the single flows' own. Where sequences begin anywhere, also ``untouched``: E
        of single flows from the first amounts, at the same pace. What cannot be had is ``{"missing": reason}``.

    Raises:
        TypeError: If the limit is no integer.
        ValueError: If it is below 1.

    Example:
        >>> import torch, flowfactor as ff
        >>> flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
        >>> data = ff.data.TransformedImages(torch.rand(6, 1, 8, 8), flows, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> found = combining_errors(model, data)
        >>> list(found["backward"]["error"]), list(found["superpose"]["over_singles"])
        (['turn', 'grow'], ['turn+grow'])
        >>> found["together"]["missing"]
        'three at once take three transformations that combine, and these data have 2'
    """
    limit = check_optional_count("limit", limit) or len(data)
    made: dict[str, Any] = {"start": data.begins, "count": limit, "seed": seed}
    ways = {"single": (None, "forward"), "backward": (None, "backward")}
    ways |= {"untouched": ("first", "forward")} if data.begins == "any" else {}
    for name, (start, direction) in ways.items():
        run: Any = {"start": start, "direction": direction}
        try:
            error = equivariance_error(model, data, **run, limit=limit, seed=seed)
        except _REASONS as reason:
            made[name] = {"missing": str(reason)}
            continue
        figures = {"error": error.mean, "low": error.low, "high": error.high, "doing_nothing": error.doing_nothing}
        made[name] = {
            figure: dict(zip(data.flow_names, map(_finite, values.tolist()), strict=True))
            for figure, values in figures.items()
        }
    return made | {mode: _several(model, data, mode, made["single"], limit, seed) for mode in _TOGETHER}


def not_combined(reason: str) -> dict[str, Any]:
    """What `combining_errors` says where it was not asked for, or there is nothing to measure.

    Args:
        reason: The reason.

    Returns:
        ``{"missing": reason}`` under every name.
    """
    return {name: {"missing": reason} for name in ("single", "backward", *_TOGETHER)}


def _several(
    model: Transforms, data: SequenceDataset, mode: str, single: dict[str, Any], limit: int, seed: int
) -> dict[str, Any]:
    """The errors of several flows in a sequence."""
    if "missing" in single:
        return single
    made: dict[str, dict[str, Any]] = {"error": {}, "low": {}, "high": {}, "doing_nothing": {}, "over_singles": {}}
    try:
        sets = _threes(data, limit, seed) if mode == "together" else _pairs(data, mode, limit, seed)
        for flows, combined in sets:
            found, names = composition_error(model, combined), [data.flow_names[flow] for flow in flows]
            own = sum(single["error"][name] for name in names) / len(names)
            values = (found.error.value, found.error.low, found.error.high, found.doing_nothing)
            for figure, value in zip(made, (*values, float(found) / max(own, 1e-12)), strict=True):
                made[figure]["+".join(names)] = _finite(value)
    except _REASONS as reason:
        return {"missing": str(reason)}
    return made


def _pairs(
    data: SequenceDataset, mode: str, limit: int, seed: int
) -> Iterator[tuple[tuple[int, ...], CombinedSequences]]:
    """Pairs of transformations, each with sequences in which they combine; raises ValueError where none do."""
    pairs = list(combinations(range(data.num_flows), 2))
    combined = _combined(data, mode, limit * max(len(pairs), 1), seed)
    active: Tensor = (combined.weights > 0).any(1).cpu()
    rows = {pair: active[:, list(pair)].all(1).nonzero().flatten()[:limit] for pair in pairs}
    if not any(map(len, rows.values())):
        raise ValueError("no two transformations combine in these data")
    yield from ((pair, combined.subset(own)) for pair, own in rows.items() if len(own))


def _threes(data: SequenceDataset, limit: int, seed: int) -> Iterator[tuple[tuple[int, ...], CombinedSequences]]:
    """Threes of transformations, each with sequences in which all act; raises ValueError where none do."""
    apart = [{*pair} for pair in getattr(data, "apart", ())]
    threes = [three for three in combinations(range(data.num_flows), 3) if not any(pair <= {*three} for pair in apart)]
    if not threes:
        raise ValueError(f"three at once take three transformations that combine, and these data have {data.num_flows}")
    combined = _combined(data, "superpose", limit, seed)
    for three in threes:
        weights = torch.zeros(data.num_steps, data.num_flows)
        weights[:, list(three)] = 1.0
        yield three, combined.weighted(weights)


def _combined(data: SequenceDataset, mode: str, count: int, seed: int) -> CombinedSequences:
    """At most so many sequences in which two transformations combine."""
    if isinstance(data, TransformedImages):
        rows = draw_elements(len(data), min(count, len(data)), seed)
        return CombinedImages.of(data.running(direction="forward").subset(rows), modes=(mode,), seed=seed)
    if isinstance(data, FactorSequences):
        return CombinedScenes(data.running(direction="forward"), count, modes=(mode,), seed=seed)
    raise ValueError(
        f"{type(data).__name__} cannot tell what several transformations at once would show; transformed images and "
        "grids of factors can"
    )


def _finite(value: float) -> float | None:
    """None for the NaN that an interval of a single sample has: JSON has none."""
    return value if value == value else None
