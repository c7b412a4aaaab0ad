"""Timing on a machine that others share: sides take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Wall times of one side, in milliseconds."""

    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def as_dict(self) -> dict:
        return {"median_ms": self.median, "min_ms": min(self.times), "max_ms": max(self.times), "times_ms": self.times}

    def __str__(self) -> str:
        return f"{self.median:.3g} ({min(self.times):.3g}..{max(self.times):.3g})"


@dataclass(frozen=True)
class Ratio:
    """How many times longer one side takes than the other, turn by turn."""

    ratios: list[float]

    @classmethod
    def of(cls, slow: Timing, fast: Timing) -> Ratio:
        return cls([a / b for a, b in zip(slow.times, fast.times, strict=True)])

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def as_dict(self) -> dict:
        return {"median": self.median, "min": min(self.ratios), "max": max(self.ratios)}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.ratios):.2f}..{max(self.ratios):.2f})"


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, at_least: float = 0.05) -> dict[str, Timing]:
    """Times several sides in turns A, B, A, B, so that load from outside falls on all of them alike.

    Args:
        sides: What to run, by name.
        repeats: Number of turns.
        at_least: Seconds that one reading should last; short sides are called several times a reading.

    Returns:
        A timing for each side, with one reading a turn.
    """
    calls = {}
    for name, side in sides.items():
        side()  # warm-up: allocator, thread pool, lazy imports
        begin = time.perf_counter()
        side()
        calls[name] = max(1, round(at_least / (time.perf_counter() - begin)))
    readings: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                side()
            readings[name].append((time.perf_counter() - begin) / calls[name] * 1e3)
    return {name: Timing(times) for name, times in readings.items()}
