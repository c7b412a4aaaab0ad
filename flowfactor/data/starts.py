"""Where sequences begin and which way they run: drawn for each element by a hash, whatever it is drawn with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import choices
from flowfactor.data.compose import Compose
from flowfactor.data.transforms import Geometric

Start: TypeAlias = Literal["first", "any"]
Direction: TypeAlias = Literal["forward", "both", "backward"]

_ODD = np.uint64(0x9E3779B97F4A7C15)


class Draw(NamedTuple):
    """What is drawn for a batch beside its elements: the seed of their starts, and which way all of them run."""

    seed: int = 0
    is_backward: bool = False


@dataclass(frozen=True)
class Way:
    """Where a transformation can be and how fast it goes, in the coordinate in which equal steps have equal effects.

    Attributes:
        low: The lowest coordinate; on a circle, where the amounts begin.
        high: The highest; on a circle, the same place once round.
        step: How far it goes from one frame to the next; negative where amounts fall.
        is_circle: Whether there are no ends.
    """

    low: float
    high: float
    step: float
    is_circle: bool


def check_start(start: object, direction: object) -> None:
    """Raises ValueError unless start and direction are such."""
    for name, value, known in (("start", start, ("first", "any")), ("direction", direction, DIRECTIONS)):
        if value not in known:
            raise ValueError(f"{name} is {', '.join(map(repr, known))}, got {value!r}{choices(str(value), known)}")


DIRECTIONS: tuple[Direction, ...] = ("forward", "both", "backward")


def way_of(name: str, transform: Any, amounts: Tensor, limits: Sequence[float] | None) -> Way:
    """Finds where a transformation can begin, and its pace.

    Args:
        name: What it is called in messages.
        transform: The transformation.
        amounts: Its amounts from the first frame to the last [T+1], float64.
        limits: The range of its amounts; None for its circle, or what is usual for its kind.

    Returns:
        The way.

    Raises:
        ValueError: If it has no range or pace, or its steps do not fit into its range.
    """
    coordinates = coordinate_of(transform, amounts)
    step = pace_of(name, coordinates, amounts)
    first, total = float(coordinates[0]), step * (len(amounts) - 1)
    circle = getattr(transform, "circle", None)
    if limits is not None:
        low, high = _checked_limits(name, transform, limits)
    elif circle is not None:
        return Way(first, first + float(circle), step, True)
    elif isinstance(transform, Geometric | Compose):
        low, high = first - abs(total), first + abs(total)  # as far again on the other side of the start
    else:
        raise ValueError(
            f"start='any' begins {name!r} anywhere in its range, and {transform!r} has none: give ranges={{{name!r}: "
            "(low, high)}, in its amounts"
        )
    if high - low < abs(total) * (1 - 1e-9):
        raise ValueError(
            f"the {len(amounts) - 1} steps of {name!r} do not fit into its range {_amounts(transform, low, high)}: they "
            f"need as much as from {amounts[0]:g} to {amounts[-1]:g}"
        )
    return Way(low, high, step, False)


def pace_of(name: str, coordinates: Tensor, amounts: Tensor) -> float:
    """How far a transformation goes at each step [T+1]; raises ValueError where that is not the same, or nothing."""
    steps = coordinates.diff()
    step = float((coordinates[-1] - coordinates[0]) / len(steps))
    if step == 0 or bool(((steps - step).abs() > 1e-6 * max(1.0, float(coordinates.abs().max()))).any()):
        raise ValueError(
            f"{name!r} is to go on at one pace from wherever it is, but its amounts {amounts.tolist()} have none: give it "
            "as (transform, start, end)"
        )
    return step


def _checked_limits(name: str, transform: Any, limits: Sequence[float]) -> tuple[float, float]:
    pair = torch.as_tensor(limits, dtype=torch.float64)
    if pair.shape != (2,) or not bool(pair.isfinite().all()) or not bool(pair[0] < pair[1]):
        raise ValueError(f"the range of {name!r} is (low, high) with low < high, got {limits!r}")
    coordinates = coordinate_of(transform, pair)
    if not bool(coordinates.isfinite().all()):
        raise ValueError(f"the range of {name!r} holds amounts that {transform!r} does not have, got {limits!r}")
    return float(coordinates[0]), float(coordinates[1])


def _amounts(transform: Any, low: float, high: float) -> str:
    ends = amount_of(transform, torch.tensor([low, high], dtype=torch.float64)).tolist()
    return f"{ends[0]:g} to {ends[1]:g}"


def checked_ranges(ranges: Mapping[str, Sequence[float]] | None, names: Sequence[str]) -> dict[str, Sequence[float]]:
    """Raises ValueError where ranges name what is no transformation; returns them as a dictionary."""
    given = dict(ranges or {})
    for name in given:
        if name not in names:
            raise ValueError(f"ranges names {name!r}{choices(name, tuple(names))}")
    return given


def coordinate_of(transform: Any, amounts: Tensor) -> Tensor:
    """The coordinate of amounts in which equal steps have equal effects; that of a plain function is its amount."""
    own = getattr(transform, "coordinate", None)
    return amounts if own is None else own(amounts)


def amount_of(transform: Any, coordinates: Tensor) -> Tensor:
    """The inverse of `coordinate_of`."""
    own = getattr(transform, "amount", None)
    return coordinates if own is None else own(coordinates)


def uniforms(seed: int, elements: Tensor, count: int) -> Tensor:
    """Draws numbers for elements: those of an element depend on the seed and on which it is, and on nothing else.

    Args:
        seed: Seed.
        elements: Which elements [B], int64.
        count: Numbers K of each.

    Returns:
        Numbers in [0, 1), uniform and independent: [B, K], float64.

    Example:
        >>> both = uniforms(3, torch.tensor([5, 8]), 2)
        >>> torch.equal(uniforms(3, torch.tensor([8]), 2)[0], both[1])
        True
    """
    with np.errstate(over="ignore"):
        key = _mixed(np.asarray([seed % 2**64], dtype=np.uint64))
        key = _mixed(key + elements.cpu().numpy().astype(np.uint64) * _ODD)
        drawn = _mixed(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _ODD)
    return torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_states(ways: Sequence[Way], drawn: Tensor, travelled: Tensor) -> Tensor:
    """Places the starts of sequences so that they stay in the ranges of all transformations.

    Args:
        ways: Those of K transformations.
        drawn: Numbers in [0, 1) [B, K].
        travelled: How far each goes in the whole sequence [B, K], with its sign.

    Returns:
        Coordinates of the states at the lower end of time [B, K], float64.
    """
    low, high = (torch.tensor([getattr(way, end) for way in ways], dtype=torch.float64) for end in ("low", "high"))
    lines = torch.tensor([not way.is_circle for way in ways])
    taken = travelled.double() * lines
    return low + (-taken).clamp_min(0) + drawn * (high - low - taken.abs())
