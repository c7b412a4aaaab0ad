"""Whether two flows can change places: the Lie bracket of their velocities."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor, nn

from flowfactor._checks import check_optional_count
from flowfactor.context import Context
from flowfactor.control import ResolvedControl, times
from flowfactor.fields import Field, GradientField
from flowfactor.latent_flow import LatentFlow
from flowfactor.networks.unsteady import refuse_unsteady
from flowfactor.potentials.base import Potential
from flowfactor.registry import Recorded


class Commutator(Recorded, nn.Module):
    r"""$|[v_i, v_j]|^2$, per sample and mean over pairs of flows: asks flows to give the same in either order.

    $$[v_i, v_j] = \frac{\partial v_j}{\partial z}\, v_i - \frac{\partial v_i}{\partial z}\, v_j$$

    is the Lie bracket of two velocities. The flows of two fields without time commute, $\phi^i_s \circ \phi^j_t = \phi^j_t
    \circ \phi^i_s$ wherever both are defined, if and only if it is zero everywhere (Lee, Introduction to Smooth Manifolds,
    2nd ed., theorem 9.44); a flow of $v_i + v_j$ is then one after the other, so that commuting flows also superpose.
    For small times $\phi^j_t \phi^i_s z - \phi^i_s \phi^j_t z = s t\, [v_i, v_j](z)$ up to higher orders. Of fields with
    time it compares velocities at the same time, which is less than what their flows would need.

    Both terms are forward derivatives of the velocities along each other: exact, whatever the field is, about five
    evaluations of the field a pair and no solve. Gradients reach parameters, states and context.

    Args:
        pairs: Pairs ``(i, j)`` of different flows; all K (K - 1) / 2 where None.
        draw: How many of the pairs to take in a call, drawn anew each time without replacement; the expectation is the mean
            over all pairs. None for all.

    Raises:
        TypeError: If a pair is no pair of integers.
        ValueError: If there are no pairs, a pair is of a flow and itself or negative, one occurs twice, or ``draw`` is not
            positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> shift_and_scale = [lambda z, t: torch.ones_like(z), lambda z, t: 0.5 * z]
        >>> field = ff.fields.from_module(shift_and_scale, dim=2)
        >>> ff.regularizers.Commutator()(field, torch.randn(3, 2))      # |(1/2, 1/2)|^2, wherever it is
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, pairs: Iterable[tuple[int, int]] | None = None, draw: int | None = None) -> None:
        super().__init__()
        self.pairs = None if pairs is None else _checked_pairs(pairs)
        self.draw = check_optional_count("draw", draw)

    def forward(
        self,
        flow: LatentFlow | Field | Potential,
        z: Tensor,
        t: float | Tensor = 0.0,
        *,
        context: Context | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Measures how far pairs of flows are from commuting.

        Args:
            flow: A flow, field or potential (of which the gradient counts), with at least two flows.
            z: States ``[*batch, D]``.
            t: Time in frames, a scalar or ``[*batch]``.
            context: What steers the flow, where it was built with a context.
            generator: Source of the pairs, where ``draw`` says so.

        Returns:
            Squared norms ``[*batch]``, summed over D, mean over pairs.

        Raises:
            TypeError: If ``flow`` is none of these, or an argument has the wrong type.
            ValueError: If there is one flow alone, a flow of a pair does not exist, an argument does not fit, or a module of
                the field is in training mode and draws at random or looks at the whole batch.
        """
        field = field_of(flow, "Commutator")
        pairs = self._chosen(field.num_flows, generator)
        return torch.stack([b.square().sum(-1) for b in brackets(field, z, t, pairs, context=context)]).mean(0)

    def _chosen(self, flows: int, generator: torch.Generator | None) -> list[tuple[int, int]]:
        """The pairs of one call."""
        if flows < 2:
            raise ValueError("Commutator compares two flows, and there is one alone (num_flows=1): leave it out")
        pairs = list(combinations(range(flows), 2)) if self.pairs is None else self.pairs
        if max(map(max, pairs)) >= flows:
            raise ValueError(f"Commutator has pairs of flows {pairs}, and there are flows 0 to {flows - 1}")
        if self.draw is None or self.draw >= len(pairs):
            return pairs
        device = None if generator is None else generator.device
        return [pairs[i] for i in torch.randperm(len(pairs), generator=generator, device=device)[: self.draw].tolist()]


def brackets(
    field: Field, z: Tensor, t: float | Tensor, pairs: Iterable[tuple[int, int]], *, context: Context | None = None
) -> list[Tensor]:
    """The Lie brackets $[v_i, v_j]$ of pairs of flows, at states ``z [*batch, D]`` and a time: ``[*batch, D]`` each."""
    refuse_unsteady(field, asked="its Lie brackets ask it")
    pairs = list(pairs)
    t = times(t, z)
    velocity = {k: field(z, t, k, context=context) for k in sorted({k for pair in pairs for k in pair})}  # checks all
    acting = field.resolve_context(context, z)
    bound = {k: field.bind(ResolvedControl(k, context=acting), z.shape[:-1]) for k in velocity}

    def along(k: int, direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda z: bound[k](z, t).velocity, (z,), (direction,))[1]

    return [along(j, velocity[i]) - along(i, velocity[j]) for i, j in pairs]


def field_of(flow: object, asking: str) -> Field:
    """The field of a flow, or of a potential; raises TypeError where it is none of these."""
    field = flow.field if isinstance(flow, LatentFlow) else flow
    field = GradientField(field) if isinstance(field, Potential) else field
    if not isinstance(field, Field):
        raise TypeError(f"{asking} takes a LatentFlow, Field or Potential, got {type(flow).__name__}")
    return field


def _checked_pairs(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for pair in pairs:
        whole = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(k) is int for k in pair)
        if not whole:
            raise TypeError(f"a pair must be two flows (i, j) by their index, got {pair!r}")
        if min(pair) < 0 or pair[0] == pair[1]:
            raise ValueError(f"a pair must be two different flows, counted from 0, got {tuple(pair)}")
        found.append((pair[0], pair[1]))
    if not found or len(set(map(frozenset, found))) < len(found):
        raise ValueError(f"pairs must name at least one pair, and each once in either order, got {found}")
    return found
