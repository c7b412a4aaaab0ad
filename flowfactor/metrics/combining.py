"""How a model's flows run backwards, and act together and one after another, on test data that can give the truth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch

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

    All are measured on the same elements, and begin where the sequences of the data do. Pairs and threes act at the pace of
    the single flows, so that at once they go further than one alone.

    Args:
        model: A model with ``transform``, its flows in the order of the data's transformations.
        data: Sequences of one transformation each; take the test split. Pairs and threes of `TransformedImages` and its kin
            are known, and of grids of factors such as `Scenes`.
        limit: Draw so many elements at random; None for all.
        seed: Seed of that draw, and of when flows switch.

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
        'this takes 3 transformations that combine in a sequence, and the data have no such 3 among turn, grow'
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
        for flows, combined in _sets(data, mode, limit, seed):
            found, names = composition_error(model, combined), [data.flow_names[flow] for flow in flows]
            own = sum(single["error"][name] for name in names) / len(names)
            values = (found.error.value, found.error.low, found.error.high, found.doing_nothing)
            for figure, value in zip(made, (*values, float(found) / max(own, 1e-12)), strict=True):
                made[figure]["+".join(names)] = _finite(value)
    except _REASONS as reason:
        return {"missing": str(reason)}
    return made


def _sets(
    data: SequenceDataset, mode: str, limit: int, seed: int
) -> Iterator[tuple[tuple[int, ...], CombinedSequences]]:
    """Pairs or threes of transformations, with sequences of the elements of the single ones in which they combine."""
    plain = _combined(data, limit, seed)
    size, steps = 3 if mode == "together" else 2, data.num_steps
    apart = [{*pair} for pair in getattr(data, "apart", ())]
    sets = [some for some in combinations(range(data.num_flows), size) if not any(pair <= {*some} for pair in apart)]
    if not sets:
        raise ValueError(
            f"this takes {size} transformations that combine in a sequence, and the data have no such {size} among "
            f"{', '.join(data.flow_names)}"
        )
    if mode == "switch" and steps < 2:
        raise ValueError("a switch midway needs at least 2 steps, got 1")
    generator = torch.Generator().manual_seed(seed)
    midway = torch.randint(1, max(steps, 2), (len(plain), 1), generator=generator)
    swapped = torch.rand(len(plain), 1, generator=generator) < 0.5
    acts_first = (torch.arange(steps) < midway) ^ swapped
    for some in sets:
        weights = torch.zeros(len(plain), steps, data.num_flows)
        weights[..., list(some)] = 1.0
        if mode == "switch":
            weights[..., some[0]], weights[..., some[1]] = acts_first.float(), (~acts_first).float()
        yield some, plain.weighted(weights)


def _combined(data: SequenceDataset, limit: int, seed: int) -> CombinedSequences:
    """The elements that `equivariance_error` draws, as sequences in which transformations can combine."""
    if not isinstance(data, TransformedImages | FactorSequences):
        raise ValueError(
            f"{type(data).__name__} cannot tell what several transformations at once would show; transformed images and "
            "grids of factors can"
        )
    part = data.running(direction="forward").subset(draw_elements(len(data), limit, seed))
    make = CombinedImages.of if isinstance(part, TransformedImages) else CombinedScenes.of
    return make(part, modes=("single",))  # type: ignore[arg-type]


def _finite(value: float) -> float | None:
    """None for the NaN that an interval of a single sample has: JSON has none."""
    return value if value == value else None
