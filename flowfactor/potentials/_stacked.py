"""The base of the potentials that hold K stacked networks and know their derivatives in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flowfactor._layout import Stack, layout_of, run
from flowfactor.control import ResolvedControl
from flowfactor.potentials.base import EVENT_NDIMS, BoundPotential, Derivatives, Laplacian, Potential


class StackedPotential(Potential):
    """A potential of K stacked networks; a subclass binds one stack (`_bind_stack`)."""

    def _stack(self) -> Stack:
        """The tensors of all K networks by name, each ``[K, ...]``."""
        raise NotImplementedError

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """Closed-form derivatives of the networks in ``stack``, whose leading dimension may have been selected away."""
        raise NotImplementedError

    def bind(
        self,
        control: ResolvedControl,
        batch_shape: Sequence[int],
        *,
        want: Iterable[str],
        laplacian: Laplacian | None = None,
        probe: Tensor | None = None,
    ) -> BoundPotential:
        """Fixes control, weights and probe for a solve (see `Potential.bind`)."""
        layout = layout_of(control, batch_shape, self.num_flows)
        stacks = layout.select(self._stack())
        probes = [None] * len(stacks) if probe is None else layout.scatter(probe)
        wanted = frozenset(want)
        functions = [self._bind_stack(s, wanted, laplacian, e) for s, e in zip(stacks, probes, strict=True)]
        return lambda z, t: Derivatives(**run(layout, functions, z, t, EVENT_NDIMS))


def own_tensors(module: nn.Module) -> Stack:
    """What a module's own parameters are to its formulas, by name; parametrized and pruned ones included."""
    names = [name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False)]
    if is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    return {name: getattr(module, name) for name in names}


def uniform(
    shape: Sequence[int], fan_in: int, gain: float = 1.0, generator: torch.Generator | None = None
) -> nn.Parameter:
    """A parameter drawn uniformly with variance ``gain^2 / fan_in`` (LeCun et al. 1998)."""
    bound = gain * math.sqrt(3.0 / fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


def check_sizes(name: str, sizes: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """Checks a tuple of positive layer sizes; raises ValueError otherwise."""
    sizes = tuple(sizes)
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 1 for s in sizes)
    if not whole or (count is not None and len(sizes) != count):
        wanted = "positive integers" if count is None else f"{count} positive integers"
        raise ValueError(f"{name} must be {wanted}, got {sizes}")
    return tuple(int(s) for s in sizes)
