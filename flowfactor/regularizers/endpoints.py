"""Regularizers of the ends of a path."""

from __future__ import annotations

import geomloss
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.fields import Field, GradientField
from flowfactor.latent_flow import LatentFlow
from flowfactor.potentials.base import Potential
from flowfactor.registry import Recorded


class StartAtRest(Recorded, nn.Module):
    r"""$|\nabla u_c(z_0, t_0)|^2$, per sample: asks a flow to begin at rest (Song et al. 2023, section 3.2).

    For a field without potential it is $|v|^2$.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.QuadraticPotential(2, S=torch.eye(2))
        >>> ff.regularizers.StartAtRest()(u, torch.tensor([[3.0, 4.0]]))
        tensor([25.], grad_fn=<...>)
    """

    def forward(
        self,
        flow: LatentFlow | Field | Potential,
        z0: Tensor,
        control: Control = 0,
        t: float | Tensor = 0.0,
        *,
        context: Context | None = None,
    ) -> Tensor:
        """Measures the squared speed at the start.

        Args:
            flow: A flow, field or potential.
            z0: States ``[*batch, D]``.
            control: Which flow acts.
            t: Time of the start, in frames, a scalar or ``[*batch]``.
            context: What steers the flow, where it was built with a context.

        Returns:
            Squared norms ``[*batch]``.

        Raises:
            TypeError: If ``flow`` is none of these.
        """
        part = flow.field if isinstance(flow, LatentFlow) else flow
        potential = part if isinstance(part, Potential) else getattr(part, "potential", None)
        if isinstance(potential, Potential):
            part = GradientField(potential)  # asks for the gradient alone
        if not isinstance(part, Field):
            raise TypeError(f"StartAtRest takes a LatentFlow, Field or Potential, got {type(flow).__name__}")
        return part(z0, t, control, context=context).square().sum(-1)


class LatentEquivariance(Recorded, nn.Module):
    r"""Whether the code of one frame follows the flow to the code of another, per sample.

    $|\phi_{r \to s}(z_r) - \mathrm E[z|x_s]|^2$, summed over the dimensions that the encoder writes, of a state $z_r$ of
    frame r: its code, or a draw of $q(z|x_r)$, whose noise then counts as well, by the trace of its pushed covariance. It is
    zero where encoding and transforming commute, and its gradient reaches both the encoder and the flow. It is never
    negative, so that a bound less a multiple of it stays a bound.

    With ``distributions=True`` it is an estimate from the one draw $z_r$ of the divergence of the pushed posterior from
    that of the other frame,

    $$KL[\phi_\# q(z|x_r) \,|\, q(z|x_s)] = -H[q(z|x_r)] - E \ln|\det \partial\phi/\partial z_r| - E \ln q(\phi(z_r)|x_s) ,$$

    in nats: distances are weighed by how sure the encoder is, and noise costs nothing where both posteriors have the same.
    Without ``log_det`` the flow is taken to keep volumes, as divergence-free ones do; one that contracts may then have a
    negative value, and no bound is left.

    Args:
        distributions: Whether to compare distributions, not states with means.

    Example:
        >>> import torch, flowfactor as ff
        >>> from torch.distributions import Independent, Normal
        >>> turn = ff.LatentFlow(ff.fields.from_module(lambda z, t: torch.stack([-z[:, 1], z[:, 0]], -1), dim=2))
        >>> path = turn(torch.tensor([[3.0, 0.0]]), [0.0, torch.pi / 2])         # to (0, 3)
        >>> other = Independent(Normal(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)), 1)
        >>> ff.regularizers.LatentEquivariance()(path.z[-1], other).item()       # doctest: +NUMBER
        4.00
    """

    def __init__(self, distributions: bool = False) -> None:
        super().__init__()
        if not isinstance(distributions, bool):
            raise TypeError(f"distributions must be True or False, got {distributions!r}")
        self.distributions = distributions

    def forward(
        self,
        z: Tensor,
        posterior: Distribution | Tensor,
        start: Distribution | None = None,
        log_det: Tensor | None = None,
        *,
        code_dim: int | None = None,
    ) -> Tensor:
        r"""Compares states that a flow has reached with the posterior of the frames there.

        Args:
            z: States ``[*batch, D]`` of a path at frame s, such as ``path.z[s]``.
            posterior: q(z|x_s), batch ``[*batch]``, event ``[D]``; for distances its mean ``[*batch, D]`` will do.
            start: q(z|x_r), of which the path began with a draw; for ``distributions`` alone.
            log_det: Log-determinants of the flow from r to s, ``[*batch]``, such as ``path.log_det[s]``; likewise.
            code_dim: How many dimensions of a latent, the first, the encoder writes; None for all. Room at rest, which no
                encoder writes, is left out.

        Returns:
            Squared distances ``[*batch]``, or divergences in nats.

        Raises:
            TypeError: If distributions are to be compared and there are none, or, in some dimensions, none of independent
                normals.
            ValueError: If shapes do not match, ``start`` is missing, or there is what has no effect.
        """
        given = isinstance(posterior, Tensor)
        shape = posterior.shape if given else posterior.batch_shape + posterior.event_shape
        if shape != z.shape:
            raise ValueError(
                f"the states {list(z.shape)} and the posterior {list(shape)} that they are compared with must have one "
                "shape [*batch, D]"
            )
        if not self.distributions:
            if start is not None or log_det is not None:
                raise ValueError(
                    "start and log_det have no effect on a distance: give LatentEquivariance(distributions=True)"
                )
            mean = posterior if given else posterior.mean
            return (z - mean)[..., :code_dim].square().sum(-1)
        if given:
            raise TypeError("a divergence needs the posterior q(z|x_s) itself, not its mean alone")
        if start is None:
            raise ValueError("a divergence needs start, the posterior q(z|x_r) of which the path began with a draw")
        if log_det is not None and code_dim not in (None, z.shape[-1]):
            raise ValueError(
                "log_det is that of all dimensions, and code_dim leaves some out: leave one of the two away"
            )
        there, begun = (_coded(q, code_dim) for q in (posterior, start))
        divergence = -begun.entropy() - there.log_prob(z[..., :code_dim])
        return divergence if log_det is None else divergence - log_det


def _coded(q: Distribution, code_dim: int | None) -> Distribution:
    """The marginal of the first dimensions; TypeError where a posterior is not one of independent normals."""
    if code_dim in (None, q.event_shape[-1]):
        return q
    if not (isinstance(q, Independent) and isinstance(q.base_dist, Normal)):
        raise TypeError(
            f"the marginal of some dimensions is known of Independent(Normal(mean, std), 1), got {type(q).__name__}: "
            "compare all dimensions, or means, LatentEquivariance()"
        )
    return Independent(Normal(q.base_dist.loc[..., :code_dim], q.base_dist.scale[..., :code_dim]), 1)


class SinkhornMatch(Recorded, nn.Module):
    r"""The Sinkhorn divergence between two clouds of latents, for example pushed and encoded ones.

    $S_\varepsilon(\alpha, \beta) = OT_\varepsilon(\alpha, \beta) - \tfrac12 OT_\varepsilon(\alpha, \alpha) -
    \tfrac12 OT_\varepsilon(\beta, \beta)$ with the cost $|x - y|^p / p$ (Feydy et al., AISTATS 2019, eq. 3), computed by
    geomloss. It is zero if and only if the clouds agree, and its gradient moves one onto the other.

    Args:
        p: Exponent of the cost, 1 or 2.
        blur: Length scale $\varepsilon^{1/p}$ below which differences are blurred, in units of the latents.
        scaling: Ratio between successive scales of the solver in (0, 1); closer to 1 is more exact and slower.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> import torch, flowfactor as ff
        >>> x = torch.randn(64, 2)
        >>> match = ff.regularizers.SinkhornMatch(blur=0.01)
        >>> round(match(x, x + torch.tensor([2.0, 0.0])).item(), 2)     # a shift by 2 costs 2^2 / 2
        2.0
    """

    def __init__(self, p: int = 2, blur: float = 0.05, scaling: float = 0.8) -> None:
        super().__init__()
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p}")
        if not blur > 0 or not 0 < scaling < 1:
            raise ValueError(f"blur must be positive and scaling between 0 and 1, got {blur} and {scaling}")
        self._loss = geomloss.SamplesLoss(
            "sinkhorn", p=p, blur=blur, scaling=scaling, debias=True, backend="tensorized"
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compares two clouds.

        Args:
            x: Points ``[*batch, N, D]``.
            y: Points ``[*batch, M, D]``.

        Returns:
            Divergences ``[*batch]``.

        Raises:
            TypeError: If they are not of one floating-point dtype, on one device.
            ValueError: If the clouds are empty, hold NaN or infinity, or do not match in shape.
        """
        if x.ndim < 2 or y.ndim != x.ndim or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
            raise ValueError(
                f"clouds must be [*batch, N, D] and [*batch, M, D], got {list(x.shape)} and {list(y.shape)}"
            )
        if x.shape[-2] == 0 or y.shape[-2] == 0:
            raise ValueError("a cloud has no points")
        if not x.is_floating_point() or x.dtype != y.dtype or x.device != y.device:
            raise TypeError(
                f"clouds must be of one floating-point dtype, on one device; got {x.dtype} on {x.device} and {y.dtype} on "
                f"{y.device}"
            )
        for name, cloud in (("first", x), ("second", y)):
            if not bool(torch.isfinite(cloud.detach()).all()):
                raise ValueError(f"the {name} cloud holds NaN or infinity")
        batch = x.shape[:-2]
        # The cost is of differences: far from the origin their digits would be lost in the squares.
        centre = x.detach().mean(-2, keepdim=True)
        x, y = ((cloud - centre).reshape(-1, *cloud.shape[-2:]).contiguous() for cloud in (x, y))
        if not x.numel() or bool(
            (x == 0).all() & (y == 0).all()
        ):  # all in one point, which has no diameter to scale by
            return (x.sum((-2, -1)) + y.sum((-2, -1))).mul(0).reshape(batch)
        return torch.as_tensor(self._loss(x, y)).reshape(batch)
