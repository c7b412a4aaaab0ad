r"""Hutchinson's probes (Hutchinson 1990): $\mathrm{tr}\,A = \mathrm{E}\,e^\top A\,e$, estimated by the mean over P probes e.

Parts are handed all probes of a sample in one vector, ``[*batch, P D]``, the first one first: one is that vector itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Probes:
    """The probes of some samples, and what closed forms do with them.

    Attributes:
        e: The probes: ``[*stack, n, D]`` of one each, ``[*stack, n, P, D]`` of several. What belongs to a probe has such an
            axis P, what belongs to a sample has none.
        count: P.

    Args:
        probe: ``[*stack, n, P D]``.
        dim: D.
    """

    def __init__(self, probe: Tensor, dim: int) -> None:
        self.count = probe.shape[-1] // dim
        self.e = probe if self.count == 1 else probe.unflatten(-1, (self.count, dim))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight`` of something of each probe and weights ``[*stack, i, j]``."""
        if self.count == 1:
            return x @ weight
        return (x.flatten(-3, -2) @ weight).unflatten(-2, x.shape[-3:-1])

    def spread(self, x: Tensor) -> Tensor:
        """Something of a sample, so that it broadcasts over the sample's probes."""
        return x if self.count == 1 else x.unsqueeze(-2)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the probes of a sample."""
        return x if self.count == 1 else x.mean(-2)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the probes of a sample."""
        return x if self.count == 1 else x.sum(-2)


def draw_probes(z: Tensor, probes: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Draws probes of independent, equally likely signs, of the dtype and device of ``z``: ``[P, *batch, D]``."""
    signs = torch.randint(0, 2, (probes, *z.shape), generator=generator, device=z.device, dtype=torch.int8)
    return signs.to(z.dtype).mul_(2).sub_(1)


def rademacher_like(z: Tensor, generator: torch.Generator | None = None, probes: int = 1) -> Tensor:
    """Draws probes (see `draw_probes`) as parts take them: ``[*batch, P D]`` for states ``z [*batch, D]``."""
    return given_probes(draw_probes(z, probes, generator), z)


def given_probes(probe: Tensor, z: Tensor) -> Tensor:
    """A probe ``[*batch, D]`` of a user's, or several ``[P, *batch, D]``, as parts take them.

    Raises:
        ValueError: If shape, dtype or device do not match the states ``[*batch, D]``.
    """
    several = probe.ndim == z.ndim + 1 and len(probe) > 0
    shape = probe.shape[1:] if several else probe.shape
    if shape != z.shape or probe.dtype != z.dtype or probe.device != z.device:
        raise ValueError(
            f"the probe must match the state: expected {list(z.shape)} of {z.dtype} on {z.device} (of several probes "
            f"[P, {', '.join(map(str, z.shape))}]), got {list(probe.shape)} of {probe.dtype} on {probe.device}"
        )
    if not several:
        return probe
    return probe[0] if len(probe) == 1 else probe.movedim(0, -2).flatten(-2)


def first_probe(probe: Tensor | None, dim: int) -> Tensor | None:
    """The first of the probes ``[*batch, P D]``, which is what costs see."""
    return probe if probe is None or probe.shape[-1] == dim else probe[..., :dim]


def check_probes(probes: object, kind: str | None) -> int:
    """Checks a number of probes for an estimate; raises ValueError, or TypeError where it is no whole number."""
    if not isinstance(probes, int) or isinstance(probes, bool):
        raise TypeError(f"probes must be a whole number, got {probes!r}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if probes > 1 and kind != "hutchinson":
        raise ValueError(f'{probes} probes are for the estimate "hutchinson", and {kind!r} takes none: leave them out')
    return probes
