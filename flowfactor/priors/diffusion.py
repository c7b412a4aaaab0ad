"""The prior path of the diffusion equation, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor.control import Control, PieceControl, Schedule, broadcast, resolve, times
from flowfactor.priors.base import GaussianPrior, Prior
from flowfactor.priors.static import inverse_softplus


class Diffusion(Prior):
    r"""A prior that diffuses from a base: \(\partial_t p = D_k \nabla^2 p\), with p_0 the base.

    This is the prior path of Song et al. (NeurIPS 2023), \(\psi^k = -D_k \ln p\): a random walk whose rate is
    learned for each flow. The heat kernel adds variance 2 D_k t to every Gaussian component, so the density is exact
    at every time:

    \[p_t(z) = \sum_m w_m\, N\big(z; \mu_m, \mathrm{diag}(\sigma_m^2) + 2 \textstyle\int_0^t D_{c(s)}\, ds\, I\big).\]

    Weights c superpose the rates, D_c = sum_k c_k D_k; a Schedule integrates them over its pieces.

    D_k >= 0 is a softplus. It starts near 0 as in the paper, but not at 0, where the softplus would pass no gradient.

    Args:
        base: The prior at t = 0, any `GaussianPrior`.
        num_flows: K.
        init: Initial D_k > 0, in squared latent units per frame: one number, or one for each flow.

    Raises:
        TypeError: If the base has no Gaussian components.
        ValueError: If num_flows is below 1, or an initial rate is not positive and finite.

    Example:
        >>> import torch
        >>> from flowfactor.priors import StandardNormal
        >>> prior = Diffusion(StandardNormal(2), num_flows=3, init=(0.5, 1.0, 2.0))
        >>> prior.at(3.0, torch.tensor([0, 1, 2])).variance[:, 0]  # 1 + 2 * D_k * 3
        tensor([ 4.0000,  7.0000, 13.0000], grad_fn=...)
    """

    def __init__(self, base: GaussianPrior, num_flows: int, init: float | Sequence[float] = 0.01) -> None:
        if not isinstance(base, GaussianPrior):
            raise TypeError(
                "base must be a GaussianPrior such as StandardNormal, GaussianMixture or VampPrior, "
                f"got {type(base).__name__}"
            )
        super().__init__(base.dim)
        check_count("num_flows", num_flows)
        rates = [float(rate) for rate in init] if isinstance(init, Sequence) else [float(init)] * num_flows
        if len(rates) != num_flows or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(
                f"init must be one positive number or {num_flows} of them, one for each flow, got {init!r}; "
                "a flow whose latents barely diffuse may start at 0.001"
            )
        self.base = base
        self.num_flows = num_flows
        self._fill_in(init=rates)
        like = next((x for x in (*base.parameters(), *base.buffers()) if x.is_floating_point()), torch.zeros(()))
        raw = torch.tensor([inverse_softplus(rate) for rate in rates], dtype=like.dtype, device=like.device)
        self.raw_diffusivity = nn.Parameter(raw)

    @property
    def at_rest(self) -> tuple[int, float] | None:
        """The room at rest of the base, which diffuses as all dimensions do."""
        return self.base.at_rest

    @property
    def diffusivity(self) -> Tensor:
        """D_k [K], in squared latent units per frame."""
        return F.softplus(self.raw_diffusivity)

    def added_variance(self, t: float | Tensor, control: Control = 0) -> Tensor:
        r"""Variance that diffusion has added by time t: \(2 \int_0^t D_{c(s)} ds\).

        Args:
            t: Time in frames, not negative: a number, a scalar tensor or [*batch].
            control: An int, a LongTensor [*batch], weights [*batch, K] or a Schedule of these.

        Returns:
            The variance, of the shape [*batch] that t and the control broadcast to.

        Raises:
            ValueError: If t is negative, if weights make the rate negative (the heat equation does not run backwards),
                if a Schedule starts after 0, or if shapes or indices do not fit.
            TypeError: If the control is of no known kind or dtype.
        """
        rates = self.diffusivity
        t = times(t, rates)
        if not bool((t >= 0).all()):
            raise ValueError(
                f"t must not be negative, got {t.min().item():g}: the prior starts from its base at t=0 and the heat "
                "equation does not run backwards"
            )
        if not isinstance(control, Schedule):
            rate = self._rate(rates, control)
            broadcast(rate.shape, t.shape)
            return 2 * self._forwards(rate, control) * t
        control.at(0.0)  # says so where the schedule starts later
        total = torch.zeros_like(t)
        for spent, piece in zip(control.spent(t, t.new_zeros(())), control.controls, strict=True):
            rate = self._rate(rates, piece)
            shape = broadcast(rate.shape, total.shape)
            # A piece that no sample reaches is not charged for a rate that never acts.
            rate = self._forwards(rate, piece) if bool((spent > 0).any()) else rate
            total = (total + rate * spent).expand(shape)
        return 2 * total

    def at(self, t: float | Tensor, control: Control = 0) -> Distribution:
        """Distribution of the latents at time t.

        Args:
            t: Time in frames, not negative: a number, a scalar tensor or [*batch].
            control: An int, a LongTensor [*batch], weights [*batch, K] or a Schedule of these.

        Returns:
            A Distribution with event shape [D]; its batch shape is what t and the control broadcast to.

        Raises:
            ValueError: As `added_variance`.
            TypeError: As `added_variance`.
        """
        return self.base.components().distribution(self.added_variance(t, control))

    def _rate(self, rates: Tensor, control: PieceControl) -> Tensor:
        """D_c, [] or [*batch], not yet checked for its sign."""
        resolved = resolve(control, None, self.num_flows, dtype=rates.dtype, device=rates.device)
        if resolved.weights is not None:
            return (resolved.weights * rates).sum(-1)
        return rates[resolved.index]

    def _forwards(self, rate: Tensor, control: PieceControl) -> Tensor:
        """Refuses negative rates; those that cancel up to rounding become 0."""
        if not (isinstance(control, Tensor) and control.is_floating_point()):
            return rate  # one flow's own rate, positive by construction
        scale = (control.abs() * self.diffusivity.detach()).sum(-1)
        if bool((rate < -8 * torch.finfo(rate.dtype).eps * scale).any()):
            raise ValueError(
                f"these weights give a negative diffusivity sum_k c_k D_k, {rate.min().item():g} at worst: the heat "
                f"equation does not run backwards. D = {[round(d, 6) for d in self.diffusivity.tolist()]}; use weights "
                "whose sum with these is not negative, or a static prior"
            )
        return rate.clamp(min=0)
