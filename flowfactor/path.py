"""What a solve returns: the path and how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class SolveStats:
    """How a solve went.

    Attributes:
        nfe: Evaluations of the field on the way forward.
        nfe_backward: Evaluations on the way back (adjoint and checkpoint), counted as backward passes run.
        accepted: Accepted steps.
        rejected: Rejected steps.
        method: The solver's method.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    method: str = ""

    def add(self, other: SolveStats) -> None:
        """Counts what another solve took."""
        for name in ("nfe", "nfe_backward", "accepted", "rejected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class FlowPath:
    r"""A path along a latent flow, time first.

    Attributes:
        t: Times ``[T]``, in frames, in the order in which they were asked for.
        z: States ``[T, *batch, D]``; ``z[0]`` is the state the solve began with.
        log_det: $\ln |\det \partial z_t / \partial z_{t_0}|$, ``[T, *batch]``; None where it was not asked for.
        costs: Running costs by name, each integrated from ``t[0]`` to ``t[i]`` along the path, ``[T, *batch]``. They
            are path integrals over elapsed time: positive costs add up in either direction of time.
        stats: Evaluations and steps.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=torch.eye(2)))
        >>> path = flow(torch.ones(1, 2), [0.0, 1.0], log_det=True)
        >>> round(path.log_det[-1].item(), 4)     # tr S = 2
        2.0
    """

    t: Tensor
    z: Tensor
    log_det: Tensor | None = None
    costs: dict[str, Tensor] = field(default_factory=dict)
    stats: SolveStats = field(default_factory=SolveStats)
