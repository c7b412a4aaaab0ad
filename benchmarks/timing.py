"""Timing on a machine that others share: sides take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Readings:
    """Repeated readings of one quantity, one for each turn.

    Attributes:
        values: The readings, in the order they were taken.
        unit: What they are in; milliseconds unless said otherwise.
    """

    values: Sequence[float]
    unit: str = "ms"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, other: Readings) -> Readings:
        """How many times the other this is, turn by turn."""
        return Readings([a / b for a, b in zip(self.values, other.values, strict=True)], "")

    def rate(self, count: float, unit: str) -> Readings:
        """What is done in a second, where ``count`` of it is done in the milliseconds read."""
        return Readings([1e3 * count / value for value in self.values], unit)

    def as_dict(self) -> dict[str, Any]:
        low, high = min(self.values), max(self.values)
        return {"unit": self.unit, "median": self.median, "min": low, "max": high, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(min(self.values))}..{short(max(self.values))})"


def short(value: float) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


@dataclass(frozen=True)
class Target:
    """What a row is asked to show.

    Attributes:
        limit: The number.
        sense: ``"at most"`` or ``"at least"``.
        of: ``"ratio"`` of both sides, or ``"value"`` of ours.
    """

    limit: float
    sense: str = "at most"
    of: str = "ratio"

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.sense == "at most" else value >= self.limit

    def __str__(self) -> str:
        number = f"{self.limit:,.0f}" if self.limit >= 100 else f"{self.limit:.3g}"
        return f"{self.sense} {number}"


@dataclass
class Row:
    """One line of a table.

    Attributes:
        group: The table.
        name: What was measured.
        ours: flowfactor's readings.
        other: The peer's, or None.
        other_name: Who the peer is.
        target: What is asked; None where the row is there to compare.
        notes: Further figures.
    """

    group: str
    name: str
    ours: Readings
    other: Readings | None = None
    other_name: str = ""
    target: Target | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> Readings | None:
        """Ours over the peer's, turn by turn."""
        return None if self.other is None else self.ours.over(self.other)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        readings = self.ratio if self.target.of == "ratio" else self.ours
        return None if readings is None else self.target.met_by(readings.median)

    def as_dict(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "ours": self.ours.as_dict(),
            "against": self.other_name,
            "other": self.other.as_dict() if self.other else None,
            "ratio": self.ratio.as_dict() if self.ratio else None,
            "target": str(self.target or ""),
            "met": self.met,
            "notes": self.notes,
        }


class Side(Protocol):
    """Something that can be timed by turns, here or in another process."""

    def prepare(self, at_least: float) -> None: ...

    def reading(self) -> float: ...


class Here:
    """Times a function in this process; a short one is called several times a reading."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.calls = 1

    def prepare(self, at_least: float) -> None:
        self.call()  # warm-up: allocator, thread pool, lazy imports
        self.calls = 1
        self.calls = max(1, round(at_least * 1e3 / self.reading()))

    def reading(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - begin) / self.calls * 1e3


def interleaved(
    sides: Mapping[str, Callable[[], object] | Side], repeats: int, at_least: float = 0.05
) -> dict[str, Readings]:
    """Times several sides in turns A, B, B, A, so that load from outside falls on all of them alike.

    Args:
        sides: What to run, by name.
        repeats: Number of turns.
        at_least: Seconds that one reading should last; short sides are called several times a reading.

    Returns:
        Milliseconds of each side, with one reading a turn.
    """
    ready: dict[str, Side] = {n: s if hasattr(s, "reading") else Here(s) for n, s in sides.items()}
    for side in ready.values():
        side.prepare(at_least)
    values: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(repeats):
        for name in list(ready) if turn % 2 == 0 else reversed(ready):
            values[name].append(ready[name].reading())
    return {name: Readings(v) for name, v in values.items()}
