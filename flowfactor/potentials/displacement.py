"""A potential whose flow solves the Hamilton-Jacobi equation where it is used: displacement into dimensions at rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowfactor._checks import check_count
from flowfactor.context import ContextSize
from flowfactor.networks.batching import Layout, Stack
from flowfactor.networks.displacement_adjoint import DisplacementAdjoint, displacement
from flowfactor.networks.overrides import overridden
from flowfactor.networks.stacked import enter_context, one_or_no_time, own_tensors, uniform
from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.potentials._stacked import EVALUATION, StackedPotential
from flowfactor.potentials.base import Laplacian


class DisplacementPotential(StackedPotential):
    r"""K potentials that move dimensions at rest along straight lines, at constant speed.

    The state is z = (x, y), and y, the last ``rest`` dimensions, starts at (or very near) 0 at time 0:

    $$u_k(z, t) = f_k(x) \cdot y - \tfrac{t}{2}\,|f_k(x)|^2, \qquad
      f_k(x) = \varepsilon\,(W_2 \tanh(W_1 x + b_1) + b_2) .$$

    Its gradient is $(J^\top (y - t f_k),\, f_k)$, J the Jacobian of $f_k$, so that a state (x, 0) moves to (x, t f_k(x)):
    displacement interpolation (McCann, 1997) between the ends of its path. Along such paths

    $$\partial_t u + \tfrac12 |\nabla u|^2 = \tfrac12 |J^\top (y - t f_k)|^2 = 0 :$$

    the Hamilton-Jacobi equation of dynamic optimal transport (Benamou and Brenier, 2000) holds by construction, without a
    penalty. States near them are drawn towards them, $\dot e = -t J J^\top e$ for $e = y - t f_k$, which no solver should
    find stiff: the small scale $\varepsilon$ keeps J so. The dimensions at rest come from augmented neural ODEs (Dupont et
    al., NeurIPS 2019); x does not move, so that such a flow tells what reads z how far to go and in which direction, and is
    no map of codes onto codes: see `MLPPotential` for that.

    Without time, $u_k = f_k(x) \cdot y$, y moves at $f_k(x)$ and x at $J^\top y$: straight only where J or y is small, and
    the equation holds no more.

    Args:
        dim: D, the size of a state.
        num_flows: K.
        rest: A, how many of its dimensions are at rest, the last ones.
        hidden: H, the hidden units of f.
        scale: $\varepsilon$, the scale of f; not learned.
        time_features: 1, the time in its formula; 0 for $u_k = f_k(x) \cdot y$, which does not depend on time.
        context: C, the number of features of a context, which enters the hidden units; or a number for each name.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive, or ``rest`` leaves no other dimension.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.DisplacementPotential(dim=6, num_flows=2, rest=2)
        >>> z = torch.cat([torch.randn(5, 4), torch.zeros(5, 2)], -1)
        >>> path = ff.LatentFlow(u)(z, [0.0, 1.0, 2.0], 1)
        >>> bool((path.z[2] - 2 * path.z[1] + path.z[0]).abs().max() < 1e-5)      # straight
        True
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        *,
        rest: int,
        hidden: int = 128,
        scale: float = 0.05,
        time_features: int = 1,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        check_count("rest", rest)
        check_count("hidden", hidden)
        if rest >= dim:
            raise ValueError(f"rest must leave a dimension that is not at rest: give less than dim={dim}, got {rest}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.rest, self.scale = rest, float(scale)
        self.time_features = one_or_no_time(time_features, "t")
        K, g = num_flows, generator
        self.w1 = uniform((K, hidden, dim - rest), dim - rest, generator=g)
        self.b1 = nn.Parameter(torch.zeros(K, 1, hidden))
        self.w2 = uniform((K, rest, hidden), hidden, generator=g)
        self.b2 = nn.Parameter(torch.zeros(K, 1, rest))
        enter_context(self, "b1", generator=g)

    def _stack(self) -> Stack:
        stack = own_tensors(self)
        return stack | {name: self.scale * stack[name] for name in ("w2", "b2")}

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        return displacement(stack, want, laplacian, probe, bool(self.time_features))

    def closed_form(
        self, layout: Layout, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> ClosedForm | NoClosedForm:
        """See `Potential.closed_form`."""
        timed, refusal = bool(self.time_features), overridden(self, DisplacementPotential, EVALUATION)
        if refusal is not None:
            return refusal

        def build(stack: Stack) -> DisplacementAdjoint:
            return DisplacementAdjoint(
                stack, lambda p: displacement(p, want | {"gradient"}, laplacian, probe, timed), laplacian, probe, timed
            )

        return ClosedForm(layout.select(self._stack())[0], build)
