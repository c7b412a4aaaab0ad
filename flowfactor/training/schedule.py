"""How the learning rate moves, by steps or by time (on the wall, or the processor's)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flowfactor.errors import renamed


@dataclass(frozen=True)
class LearningRateSchedule:
    """A learning rate's factor as a function of progress, which steps or minutes measure.

    With w the share of warm-up and p the progress, the factor is p / w up to w, and then constant, or half a cosine,
    (1 + cos(pi (p - w) / (1 - w))) / 2, which is zero at the end: at the last step, or at the end of the time.

    Args:
        steps: Length in steps, or None.
        minutes: Length in minutes, or None. With both, the one that is nearer to its end decides.
        warmup: Share of the length, in [0, 1), over which the factor rises from zero.
        kind: ``"cosine"`` or ``"constant"``.

    Raises:
        ValueError: If neither length is given, or an argument is out of range.

    Example:
        >>> schedule = LearningRateSchedule(minutes=10, warmup=0.1)
        >>> [round(schedule(schedule.progress(step=1, seconds=s)), 3) for s in (0, 30, 60, 330, 600)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    steps: int | None = None
    minutes: float | None = None
    warmup: float = 0.0
    kind: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("the training has no end: give steps, minutes, or both")
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), got {self.warmup!r}")
        if self.kind not in ("cosine", "constant"):
            raise ValueError(f"the schedule is 'cosine' or 'constant', got {self.kind!r}")

    def progress(self, step: float, seconds: float) -> float:
        """Gives the progress: 0 at the beginning, 1 or more at the end.

        Args:
            step: Steps taken.
            seconds: Seconds of training so far.

        Returns:
            The progress.
        """
        by_steps = step / self.steps if self.steps is not None else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return max(by_steps, by_time)

    def __call__(self, progress: float) -> float:
        """Gives the factor of the learning rate at a progress."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        if self.kind == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


__getattr__ = renamed(__name__, {"Schedule": "LearningRateSchedule"})  # pickles also hold the old name
