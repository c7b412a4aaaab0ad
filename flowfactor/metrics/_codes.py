"""Checks and histograms of codes and labels, shared by the disentanglement metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_COLLAPSED = 1e-12  # variance up to which a dimension counts as constant, as in disentanglement_lib


def check_codes(codes: Any, labels: Any, least: int = 2) -> tuple[Tensor, Tensor, list[int]]:
    """Checks codes [N, D] and labels [N, F].

    Args:
        codes: Codes, real numbers.
        labels: Values of the factors; each column discrete, of any real numbers.
        least: The fewest samples allowed.

    Returns:
        Codes float64 [N, D], with 0 for dimensions of a variance up to 1e-12 (rounding, which
        binning would enlarge); classes int64 [N, F] (each column's distinct values numbered in ascending order), and
        the number of classes of each factor; all on the CPU.

    Raises:
        TypeError: If one is no array of real numbers.
        ValueError: If a shape does not fit, a value is not finite, or a factor is constant or continuous.
    """
    codes, labels = _matrix(codes, "codes", "[N, D]"), _matrix(labels, "labels", "[N, F]")
    if len(codes) != len(labels):
        raise ValueError(f"there are {len(codes)} codes but {len(labels)} labels: give one row of labels a code")
    if len(codes) < least:
        raise ValueError(f"at least {least} samples are needed, got {len(codes)}")
    columns, counts = [], []
    for factor, column in enumerate(labels.unbind(1)):
        values, classes = column.unique(return_inverse=True)
        if len(values) < 2:
            raise ValueError(f"factor {factor} has the same value in all samples: leave it out of the labels")
        if len(values) > len(column) / 2:
            raise ValueError(
                f"factor {factor} takes {len(values)} distinct values in {len(column)} samples: these metrics need "
                "discrete factors; round or bin its values first, or give more samples"
            )
        columns.append(classes)
        counts.append(len(values))
    collapsed = codes.var(0) <= _COLLAPSED
    return codes.masked_fill(collapsed, 0.0), torch.stack(columns, 1), counts


def _matrix(values: Any, name: str, shape: str) -> Tensor:
    if not isinstance(values, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a tensor or an array {shape}, got {type(values).__name__}")
    tensor = torch.as_tensor(values)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    tensor = tensor.detach().to("cpu", torch.float64)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return tensor


def discretise(codes: Tensor, bins: int) -> Tensor:
    """Numbers the bin of each code: equal widths between each dimension's least and greatest value.

    Args:
        codes: Codes [N, D].
        bins: Number of bins.

    Returns:
        Bins int64 [N, D], from 0; a constant dimension is all 0.

    Example:
        >>> discretise(torch.tensor([[0.0, 1.0], [0.49, 1.0], [1.0, 1.0]]), 2).T.tolist()
        [[0, 0, 1], [0, 0, 0]]
    """
    low, high = codes.aminmax(dim=0)
    width = (high - low).clamp(min=torch.finfo(codes.dtype).tiny)
    return ((codes - low) / width * bins).long().clamp(0, bins - 1)


def joint_histograms(binned: Tensor, classes: Tensor, bins: int, counts: list[int]) -> list[Tensor]:
    """Counts how often each bin of each dimension meets each class of each factor.

    Args:
        binned: Bins [N, D].
        classes: Classes [N, F].
        bins: Number of bins.
        counts: Number of classes of each factor.

    Returns:
        For each factor, counts float64 [D, bins, classes].
    """
    dims = binned.shape[1]
    cell = binned + bins * torch.arange(dims)
    return [
        torch.bincount((cell * count + classes[:, f : f + 1]).flatten(), minlength=dims * bins * count)
        .reshape(dims, bins, count)
        .double()
        for f, count in enumerate(counts)
    ]


def gap(scores: Tensor) -> Tensor:
    """The greatest less the second greatest score over the dimensions: [D, F] to [F]; one dimension leaves no second."""
    if len(scores) < 2:
        return scores[0]
    best = scores.topk(2, dim=0).values
    return best[0] - best[1]
