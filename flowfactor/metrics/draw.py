"""Which elements a limit takes."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfactor._checks import check_count, check_optional_count


def draw_elements(count: int, limit: int | None, seed: int = 0) -> Tensor:
    """Draws so many of a number of elements at random, without replacement.

    The first ones would not do: in grids of factors neighbours are near-copies of one scene, and elsewhere files are often
    sorted. The draw depends on the numbers and the seed alone, on no device and not on PyTorch's global state; a
    smaller limit takes some of what a larger one takes.

    Args:
        count: Number of elements.
        limit: How many to take; None for all.
        seed: Seed of the draw.

    Returns:
        Their indices, ascending, on the CPU.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If the limit is below 1.

    Example:
        >>> draw_elements(3, None).tolist(), draw_elements(3, 8).tolist(), len(draw_elements(1000, 8, seed=1))
        ([0, 1, 2], [0, 1, 2], 8)
    """
    limit, seed = check_optional_count("limit", limit), check_count("seed", seed, -(2**63))
    if limit is None or limit >= count:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:limit].sort().values
