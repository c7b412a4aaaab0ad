"""What a solve remembers of the one before it: how long a first step may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.8
"""Share of the step found best that the next solve begins with: other samples may ask for shorter ones, and a step that is
tried in vain costs more than a step that is a little short."""


class StepMemory(nn.Module):
    """Sizes of first steps, for solves forward and back in time, in frames; 0 where nothing is known.

    They are a buffer, so that a training that goes on from a checkpoint takes the steps that it would have taken.
    """

    sizes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.zeros(2))

    def recall(self, sign: float) -> float | None:
        """The first step of a solve forward (``sign`` 1) or back (-1); None where it has to be found."""
        return float(self.sizes[int(sign < 0)]) or None

    def note(self, sign: float, size: float) -> None:
        """Keeps that steps of ``size`` would have been good at the start of a solve."""
        self.sizes[int(sign < 0)] = SHARE * size

    def misled(self, times: Sequence[float]) -> bool:
        """Forgets what a solve over some times began with and failed; says whether that was anything."""
        which = int(times[-1] < times[0])
        was = bool(self.sizes[which])
        self.sizes[which] = 0.0
        return was

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Weights that were trained without a memory have none.
        state_dict.setdefault(f"{prefix}sizes", torch.zeros_like(self.sizes))
        super()._load_from_state_dict(state_dict, prefix, *rest)
