"""Time features of the built-in potentials and fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeFeatures(nn.Module):
    """Sines and cosines of time, with their time derivatives.

    Frequencies fall geometrically from 1 to ``1 / time_scale`` radians a frame, so that the features tell apart
    neighbouring frames as well as the two ends of a long sequence.

    Args:
        size: Number of features, even.
        time_scale: The longest time scale, in frames: the slowest feature is sin(t / time_scale).
    """

    frequencies: Tensor

    def __init__(self, size: int, time_scale: float = 100.0) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise ValueError(f"time_features must be an even number of at least 2, got {size}")
        self.size, self.time_scale = size, time_scale
        self.register_buffer("frequencies", self._frequencies().float(), persistent=False)

    def _frequencies(self) -> Tensor:
        exponents = torch.linspace(0.0, 1.0, self.size // 2, dtype=torch.float64)  # one alone is 0
        return torch.exp(-math.log(self.time_scale) * exponents)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeFeatures:
        super()._apply(fn, recurse)
        # Written anew, or a model that was in half precision once would keep rounded frequencies.
        self.frequencies = self._frequencies().to(self.frequencies)
        return self

    def forward(self, t: Tensor, *, derivative: bool) -> tuple[Tensor, Tensor | None]:
        """Features ``[*t or 1, size]`` and, where asked for, their derivatives of the same shape."""
        frequencies = self.frequencies.to(t.dtype)
        angle = (t.unsqueeze(-1) if t.ndim else t.reshape(1, 1)) * frequencies
        sin, cos = angle.sin(), angle.cos()
        features = torch.cat([sin, cos], -1)
        if not derivative:
            return features, None
        return features, torch.cat([cos * frequencies, -sin * frequencies], -1)


class StageTerms:
    """Linear maps of time features that several layers of G networks take, for the stages of a solve in one product.

    Args:
        features: The features.
        layers: Weights ``[G, H, size]`` and bias ``[G, 1, H]`` of each layer, and the width that zeros fill its terms up to.
    """

    def __init__(self, features: TimeFeatures, layers: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        self.features, self.widths = features, [width for _, _, width in layers]
        weights = [F.pad(v, (0, 0, 0, width - v.shape[-2])) for v, _, width in layers]
        self.weights = torch.cat(weights, -2).mT
        self.bias = torch.cat([F.pad(b, (0, width - b.shape[-1])) for _, b, width in layers], -1)

    def __call__(self, ts: Sequence[float]) -> list[tuple[Tensor, ...]]:
        """The terms of all layers ``[G, 1, width]`` at each of the times ``ts``."""
        f, _ = self.features(self.bias.new_tensor(ts), derivative=False)
        c = torch.bmm(f.expand(len(self.bias), *f.shape), self.weights).add_(self.bias).unsqueeze(2)
        return list(zip(*(layer.unbind(1) for layer in c.split(self.widths, -1)), strict=True))
