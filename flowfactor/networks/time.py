"""Time features of the built-in potentials and fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowfactor.networks.batched import matmul, outer

Times: TypeAlias = "Sequence[float] | Tensor"
"""Times of S stages: one for all samples, or one for each, ``[S, G, n]``."""


class TimeFeatures(nn.Module):
    """Sines and cosines of time, with their time derivatives.

    Frequencies fall geometrically from 1 to ``1 / time_scale`` radians a frame, so that the features tell apart
    neighbouring frames as well as the two ends of a long sequence.

    Args:
        size: Number of features, even; 0 for a part that does not depend on time.
        time_scale: The longest time scale, in frames: the slowest feature is sin(t / time_scale).
    """

    frequencies: Tensor

    def __init__(self, size: int, time_scale: float = 100.0) -> None:
        super().__init__()
        if size < 0 or size % 2:
            raise ValueError(
                f"time_features must be an even number of at least 2, or 0 for a part without time, got {size}"
            )
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
    """What several layers of G networks add to their products: linear maps of time features, and a bias.

    For the stages of a solve in one product, where all samples share their time; a bias with a row for each sample, which a
    context makes of it, is added once a stage. Without time features there is the bias alone, whatever the time.

    Args:
        features: The features.
        layers: Weights ``[G, H, size]`` (None without features) and bias ``[G, 1 or n, H]`` of each layer, and the width
            up to which zeros fill its terms.
    """

    def __init__(self, features: TimeFeatures, layers: Sequence[tuple[Tensor | None, Tensor, int]]) -> None:
        self.features, self.widths = features, [width for _, _, width in layers]
        self.known: tuple[Tensor, Tensor] | None = None
        weights = [F.pad(v, (0, 0, 0, width - v.shape[-2])) for v, _, width in layers if v is not None]
        self.timeless = not weights
        biases = [F.pad(b, (0, width - b.shape[-1])) for _, b, width in layers]
        self.rows = [b if b.shape[-2] != 1 else None for b in biases]
        self.always = [b if b.shape[-2] == 1 else None for b in biases]
        if weights:
            self.weights = torch.cat(weights, -2).mT
            self.bias = torch.cat([b if b.shape[-2] == 1 else torch.zeros_like(b[:, :1]) for b in biases], -1)

    def __call__(self, ts: Times) -> list[Any]:
        """For each of S stages at ``ts``, what `add_to` takes: the terms ``[G, 1, width]`` of all layers, or features."""
        if self.timeless:
            return [self.always] * len(ts)
        f = self.features_at(ts)
        if f.ndim == 4:  # samples at times of their own: their features, and a one for the bias
            return list(F.pad(f, (0, 1), value=1.0).unbind(1))
        c = torch.bmm(f.expand(len(self.bias), *f.shape), self.weights).add_(self.bias).unsqueeze(2)
        return list(zip(*(layer.unbind(1) for layer in c.split(self.widths, -1)), strict=True))

    def features_at(self, ts: Times) -> Tensor:
        """The features of the stages, ``[S, size]``, or ``[G, S, n, size]`` of samples at times of their own."""
        if isinstance(ts, Tensor):
            if self.known is None or self.known[0] is not ts:  # each layer asks for those of all stages
                self.known = ts, self.features(ts.to(self.bias.dtype).transpose(0, 1), derivative=False)[0]
            return self.known[1]
        return self.features(self.bias.new_tensor(ts), derivative=False)[0]

    @cached_property
    def with_bias(self) -> list[Tensor]:
        """Weights of each layer with its bias below them, ``[G, size + 1, width]``."""
        return [x.contiguous() for x in torch.cat([self.weights, self.bias], -2).split(self.widths, -1)]

    def product(self, layer: int, x: Tensor, weight: Tensor, terms: Any) -> Tensor:
        """``x [G, n, i] @ weight [G, i, width]`` and the terms of a layer at a stage."""
        # A product and a sum in place cost half of `baddbmm` where a sum is broadcast.
        rows = self.rows[layer]
        out = matmul(x, weight) if rows is None else torch.baddbmm(rows, x, weight)
        if isinstance(terms, Tensor):
            return out.baddbmm_(terms, self.with_bias[layer])
        return out if terms[layer] is None else out.add_(terms[layer])

    def gradients(self, layer: int, bar: Tensor, ts: Times) -> dict[str, Tensor]:
        """The cotangents of a layer's weights ``v`` and bias ``b``, of those of its terms at all stages ``[G, S, n, H]``."""
        of_rows = None if self.rows[layer] is None else bar.sum(1)
        if self.timeless:
            return {"b": bar.sum((1, 2)).unsqueeze(1) if of_rows is None else of_rows}
        f = self.features_at(ts)
        if f.ndim == 4:
            return {"v": outer(bar, f), "b": bar.sum((1, 2)).unsqueeze(1) if of_rows is None else of_rows}
        per_stage = bar.sum(2)
        return {"v": per_stage.mT @ f, "b": per_stage.sum(1, keepdim=True) if of_rows is None else of_rows}
