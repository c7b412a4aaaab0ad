"""What a solve returns: the path and how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

Engine: TypeAlias = Literal["", "closed form", "general", "mixed"]


@dataclass
class SolveStats:
    """How a solve went. Two are equal where they took the same work by the same method, whichever engine ran.

    Attributes:
        nfe: Evaluations of the field, forward.
        nfe_backward: Evaluations in backward passes (adjoint and checkpoint), counted as these run.
        accepted: Accepted steps.
        rejected: Rejected steps.
        method: The solver's method.
        engine: What ran: ``"closed form"`` (steps and adjoint written out), ``"general"`` (torchdiffeq and autograd),
            ``"mixed"`` where both ran, each on some stretches of a schedule; empty where there was nothing to solve.
        reason: Why the general engine ran where it did; empty where it did not.
        reason_backward: Why a backward pass of a solve in closed form ran on the general engine, written when it does;
            empty where none did.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(dim=2), ff.Solver("rk4"))
        >>> flow(torch.zeros(3, 2), [0.0, 1.0]).stats.engine
        'closed form'
        >>> speed = lambda evaluation: evaluation.velocity.norm(dim=-1)
        >>> stats = flow(torch.zeros(3, 2), [0.0, 1.0], costs={"speed": speed}).stats
        >>> stats.engine, stats.reason
        ('general', "cost 'speed' takes one stage at a time: it does not promise many_stages = True")
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    method: str = ""
    engine: Engine = field(default="", compare=False)
    reason: str = field(default="", compare=False)
    reason_backward: str = field(default="", compare=False)

    def add(self, other: SolveStats) -> None:
        """Counts what another solve took."""
        for name in ("nfe", "nfe_backward", "accepted", "rejected"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ran(other.engine, other.reason)

    def ran(self, engine: Engine, reason: str = "") -> None:
        """Notes which engine solved a stretch, and why it was the general one."""
        if engine:
            self.engine = engine if self.engine in ("", engine) else "mixed"
        if reason not in self.reason:
            self.reason = f"{self.reason}; {reason}" if self.reason else reason


@dataclass(frozen=True)
class FlowPath:
    r"""A path along a latent flow, time first.

    Attributes:
        t: Times ``[T]``, or ``[T, *batch]`` of samples at times of their own, in frames, as they were asked for.
        z: States ``[T, *batch, D]``; ``z[0]`` is the state the solve began with, or ``z[start]`` where it began inside.
        log_det: $\ln |\det \partial z_t / \partial z_s|$, ``[T, *batch]``, with s the time the solve began at, ``t[0]`` if
            nothing else was asked for; None where it was not asked for.
        costs: Running costs by name, each integrated from ``t[0]`` to ``t[i]`` along the path, ``[T, *batch]``. They
            are path integrals over elapsed time: positive costs add up in either direction of time.
        stats: Evaluations and steps, and which engine took them.
        start: At which of the times the solve began: an index, or those of the samples ``[*batch]``; None where it began
            between two of them.

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
    start: int | Tensor | None = 0
