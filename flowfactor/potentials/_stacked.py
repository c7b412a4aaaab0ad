"""The base of the potentials that hold K stacked networks and know their derivatives in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from flowfactor.control import ResolvedControl
from flowfactor.networks.batching import Stack, layout_of, run
from flowfactor.networks.stacked import own_tensors
from flowfactor.potentials.base import EVENT_NDIMS, BoundPotential, Derivatives, Laplacian, Potential

EVALUATION = ("flow_potential", "bind", "_bind_stack", "_stack")
"""The methods that decide what a stacked potential computes."""


class StackedPotential(Potential):
    """A potential of K stacked networks; a subclass binds one stack (`_bind_stack`)."""

    def _stack(self) -> Stack:
        """The tensors of all K networks by name, each ``[K, ...]``."""
        return own_tensors(self)

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """Closed-form derivatives of the networks in ``stack``, whose leading dimension may have been selected away."""
        raise NotImplementedError

    def bind(
        self, control: ResolvedControl, batch_shape: Sequence[int], *, want: Iterable[str],
        laplacian: Laplacian | None = None, probe: Tensor | None = None,
    ) -> BoundPotential:  # fmt: skip
        """Fixes control, weights and probe for a solve (see `Potential.bind`)."""
        layout = layout_of(control, batch_shape, self.num_flows)
        stacks = layout.select(self._stack())
        probes = [None] * len(stacks) if probe is None else layout.scatter(probe)
        wanted = frozenset(want)
        functions = [self._bind_stack(s, wanted, laplacian, e) for s, e in zip(stacks, probes, strict=True)]
        return lambda z, t: Derivatives(**run(layout, functions, z, t, EVENT_NDIMS))
