"""How a model's flows run backwards, and act together and one after another, on test data that can give the truth."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from torch import Tensor

from flowfactor.data import CombinedImages, CombinedScenes, CombinedSequences, FactorSequences, TransformedImages
from flowfactor.data.base import SequenceDataset
from flowfactor.errors import FlowSolveError
from flowfactor.metrics import NoLatentFlowError, composition_error, equivariance_error
from flowfactor.metrics.draw import draw_elements

_REASONS = (ValueError, TypeError, NotImplementedError, NoLatentFlowError, FlowSolveError)


def combining(model: Any, test: SequenceDataset, limit: int, seed: int) -> dict[str, Any]:
    """Measures flows in other ways than one at a time and forward.

    Args:
        model: The model, its flows in the order of the data's transformations.
        test: The test split.
        limit: Sequences of each figure, drawn at random.
        seed: Seed of the draws.

    Returns:
        ``start`` and ``count``; ``single``, ``backward``, ``superpose`` and ``switch``, each with the error E and that of
        ``doing_nothing`` by transformation, or by pair of these (``"a+b"``); and of pairs ``over_singles``, E over the mean
        of the two flows' own on the same starts. Where sequences begin anywhere, also ``untouched``: E from the first
        amounts, at the same pace. What cannot be had is ``{"missing": reason}``.
    """
    made: dict[str, Any] = {"start": test.begins, "count": limit, "seed": seed}
    ways = {"single": (None, "forward"), "backward": (None, "backward")}
    ways |= {"untouched": ("first", "forward")} if test.begins == "any" else {}
    for name, (start, direction) in ways.items():
        run: Any = {"start": start, "direction": direction}
        try:
            error = equivariance_error(model, test, **run, limit=limit, seed=seed)
        except _REASONS as reason:
            made[name] = {"missing": str(reason)}
            continue
        made[name] = {
            "error": dict(zip(test.flow_names, error.mean.tolist(), strict=True)),
            "doing_nothing": dict(zip(test.flow_names, error.doing_nothing.tolist(), strict=True)),
        }
    return made | {mode: _pairs(model, test, mode, made["single"], limit, seed) for mode in ("superpose", "switch")}


def _pairs(
    model: Any, test: SequenceDataset, mode: str, single: dict[str, Any], limit: int, seed: int
) -> dict[str, Any]:
    """The errors of pairs of flows."""
    if "missing" in single:
        return single
    try:
        data = _combined(test, mode, limit, seed)
        found = _by_pair(model, data, limit)
    except _REASONS as reason:
        return {"missing": str(reason)}
    own = single["error"]
    over = {pair: error / max(sum(own[name] for name in names) / 2, 1e-12) for pair, (names, error, _) in found.items()}
    return {
        "error": {pair: error for pair, (_, error, _) in found.items()},
        "doing_nothing": {pair: nothing for pair, (_, _, nothing) in found.items()},
        "over_singles": over,
    }


def _combined(test: SequenceDataset, mode: str, limit: int, seed: int) -> CombinedSequences:
    """Test sequences in which transformations combine, some ``limit`` of each pair."""
    wanted = limit * max(len(list(combinations(range(test.num_flows), 2))), 1)
    if isinstance(test, TransformedImages):
        rows = draw_elements(len(test), min(wanted, len(test)), seed)
        return CombinedImages.of(test.running(direction="forward").subset(rows), modes=(mode,), seed=seed)
    if isinstance(test, FactorSequences):
        return CombinedScenes(test.running(direction="forward"), wanted, modes=(mode,), seed=seed)
    raise ValueError(
        f"{type(test).__name__} cannot tell what several transformations at once would show; transformed images and "
        "grids of factors can"
    )


def _by_pair(model: Any, data: CombinedSequences, limit: int) -> dict[str, tuple[list[str], float, float]]:
    """E and that of doing nothing of the sequences of each pair, with the names of its two."""
    active: Tensor = (data.weights > 0).any(1).cpu()
    found = {}
    for pair in combinations(range(data.num_flows), 2):
        rows = (active[:, list(pair)].all(1)).nonzero().flatten()[:limit]
        if len(rows):
            names = [data.flow_names[flow] for flow in pair]
            error = composition_error(model, data.subset(rows))
            found["+".join(names)] = names, float(error), error.doing_nothing
    if not found:
        raise ValueError("no two transformations combine in these data")
    return found


def missing(reason: str) -> dict[str, Any]:
    """What `combining` says where it was not asked for, or there is nothing to measure."""
    return {name: {"missing": reason} for name in ("single", "backward", "superpose", "switch")}
