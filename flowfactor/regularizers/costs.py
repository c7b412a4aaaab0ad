"""Running costs: integrated along the path, in the same solve, from what a stage already evaluated."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from flowfactor.fields.evaluation import Evaluation
from flowfactor.networks.overrides import hooked, overridden
from flowfactor.registry import Recorded

Force = Callable[[Tensor, Tensor], Tensor]


def _changed(part: nn.Module, owner: type[nn.Module], *methods: str) -> str | None:
    """Why a part may compute something else than its class says: overridden methods, or hooks."""
    refusal = overridden(part, owner, methods)
    if refusal is not None:
        return refusal.reason
    return f"this {type(part).__name__} has forward hooks" if hooked(part) else None


class NegativeSquare(Recorded, nn.Module):
    r"""A force $f(z, t) = -g(z, t)^2 \le 0$ with a small network g (Song et al. 2023, section 3.2).

    A force of this sign lets a potential lose energy but never gain it: the generalised Hamilton-Jacobi equation
    $\partial_t u + \tfrac12 |\nabla u|^2 = f \le 0$ then still describes dynamic optimal transport, with a sink.

    Args:
        dim: D.
        hidden: Size of the hidden layer.
        generator: Source of the initial weights.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> force = ff.regularizers.NegativeSquare(dim=4)
        >>> bool((force(torch.randn(10, 4), torch.tensor(0.5)) <= 0).all())
        True
    """

    def __init__(self, dim: int, hidden: int = 64, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be positive, got {dim} and {hidden}")
        self.dim = dim
        self.first = nn.Linear(dim + 1, hidden)
        self.second = nn.Linear(hidden, 1)
        for layer in (self.first, self.second):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, z: Tensor, t: float | Tensor) -> Tensor:
        """The force at ``z [*batch, D]`` and ``t`` (scalar or ``[*batch]``), shape ``[*batch]``."""
        time = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(z.shape[:-1]).unsqueeze(-1)
        return -self.second(torch.tanh(self.first(torch.cat([z, time], -1)))).squeeze(-1).square()


class HamiltonJacobi(Recorded, nn.Module):
    r"""The squared Hamilton-Jacobi residual $r^2$ with $r = \partial_t u + \tfrac12|\nabla u|^2 - f$, per sample.

    Paths of a potential that solves the equation with $f = 0$ are straight and of constant speed: they are dynamic
    optimal transport between their own ends (Benamou and Brenier 2000). Norms are summed over D. For a Helmholtz field
    the residual is that of its potential u.

    Args:
        force: f(z, t) with ``[*batch]`` values, such as `NegativeSquare`; None for the plain equation, f = 0. One of your
            own may promise ``many_stages = True``, as a running cost may (see `LatentFlow`): solves are faster then.

    Example:
        >>> import torch, flowfactor as ff
        >>> flow = ff.LatentFlow(ff.potentials.MLPPotential(dim=3))
        >>> path = flow(torch.zeros(2, 3), [0.0, 1.0], costs={"hj": ff.regularizers.HamiltonJacobi()})
        >>> path.costs["hj"].shape
        torch.Size([2, 2])
    """

    needs = ("potential", "time")

    @property
    def one_stage_reason(self) -> str | None:
        """Why it takes one stage of a solve at a time; None where `many_stages` holds."""
        force, changed = self.force, _changed(self, HamiltonJacobi, "forward", "residual")
        if changed or force is None or getattr(force, "many_stages", False):
            return changed
        if isinstance(force, NegativeSquare):
            return _changed(force, NegativeSquare, "forward")
        kind = "function" if isinstance(force, FunctionType) else type(force).__name__
        return f"its force is a {kind}, which may depend on more than parameters, not a NegativeSquare"

    @property
    def many_stages(self) -> bool:
        """Whether several stages of a solve can be evaluated at once, and parameters are all that is captured."""
        return self.one_stage_reason is None

    def __init__(self, force: Force | None = None) -> None:
        super().__init__()
        if force is not None and not callable(force):
            raise TypeError(f"force must be a callable f(z, t) or None, got {type(force).__name__}")
        self.force = force

    def residual(self, evaluation: Evaluation) -> Tensor:
        """The residual r, ``[*batch]``; raises TypeError for a field without potential."""
        if evaluation.gradient is None or evaluation.time is None:
            raise TypeError("the Hamilton-Jacobi residual needs a field with a potential and its time derivative")
        r = evaluation.time + 0.5 * evaluation.gradient.square().sum(-1)
        return r if self.force is None else r - self.force(evaluation.z, evaluation.t)

    def forward(self, evaluation: Evaluation) -> Tensor:
        """The squared residual, ``[*batch]``."""
        return self.residual(evaluation).square()


class TransportCost(Recorded, nn.Module):
    r"""The kinetic energy $\tfrac12 |v|^2$, whose integral is the action (Benamou and Brenier 2000).

    For a gradient field it is $\tfrac12|\nabla u|^2$.

    Example:
        >>> import torch, flowfactor as ff
        >>> drift = ff.fields.from_module(lambda z, t: torch.ones_like(z), dim=2)
        >>> path = ff.LatentFlow(drift)(torch.zeros(1, 2), [0.0, 3.0], costs={"action": ff.regularizers.TransportCost()})
        >>> round(path.costs["action"][-1].item(), 4)      # 3 frames at speed^2 = 2
        3.0
    """

    @property
    def one_stage_reason(self) -> str | None:
        """Why it takes one stage of a solve at a time; None where `many_stages` holds."""
        return _changed(self, TransportCost, "forward")

    @property
    def many_stages(self) -> bool:
        """Whether several stages of a solve can be evaluated at once, and nothing is captured."""
        return self.one_stage_reason is None

    def forward(self, evaluation: Evaluation) -> Tensor:
        """Half the squared speed, ``[*batch]``."""
        return 0.5 * evaluation.velocity.square().sum(-1)


class Solenoidal(Recorded, nn.Module):
    r"""The squared speed $|v - \nabla u|^2$ of the part of a field that its potential does not carry, per sample.

    For a `HelmholtzField` that part is the one without divergence, and its integral is what the field would save in action,
    at most, as the gradient of its potential alone. Without it a Helmholtz field is free to leave everything to that part:
    what a Hamilton-Jacobi residual asks of u then says nothing about the flow (`flowfactor.metrics.gradient_share` measures
    how much it says). It is zero for a `GradientField`; a field without potential is refused.

    Example:
        >>> import torch, flowfactor as ff
        >>> u, h = (ff.potentials.QuadraticPotential(2, S=torch.eye(2)) for _ in range(2))
        >>> flow = ff.LatentFlow(ff.fields.HelmholtzField(u, h, skew="canonical"))      # v = z + J z, |z| = e^t
        >>> path = flow(torch.tensor([[1.0, 0.0]]), [0.0, 1.0], costs={"rest": ff.regularizers.Solenoidal()})
        >>> round(path.costs["rest"][-1].item(), 2)                                     # (e^2 - 1) / 2
        3.19
    """

    needs = ("potential",)

    @property
    def one_stage_reason(self) -> str | None:
        """Why it takes one stage of a solve at a time; None where `many_stages` holds."""
        return _changed(self, Solenoidal, "forward")

    @property
    def many_stages(self) -> bool:
        """Whether several stages of a solve can be evaluated at once, and nothing is captured."""
        return self.one_stage_reason is None

    def forward(self, evaluation: Evaluation) -> Tensor:
        """The squared speed, ``[*batch]``; raises TypeError for a field without potential."""
        if evaluation.gradient is None:
            raise TypeError("Solenoidal needs a field with a potential, whose gradient it compares the velocity with")
        return (evaluation.velocity - evaluation.gradient).square().sum(-1)


class Acceleration(Recorded, nn.Module):
    r"""The squared acceleration $|Dv/Dt|^2$ along the path, $Dv/Dt = \partial_t v + (\partial v/\partial z)\,v$, per sample.

    It is zero where paths are straight and of constant speed, as those of dynamic optimal transport are (Benamou and Brenier
    2000). For a gradient field $Dv/Dt = \nabla(\partial_t u + \tfrac12|\nabla u|^2)$, the gradient of the residual of
    `HamiltonJacobi`: it vanishes with that, and does not see a residual that depends on time alone, which bends nothing. It
    takes fields without potential too; straight paths of a field that is no gradient need not be optimal.

    It costs about three evaluations more a stage, of all stages at once where the field has closed forms. A solve
    with ``compile=True`` refuses it.

    Example:
        >>> import torch, flowfactor as ff
        >>> turn = ff.fields.from_module(lambda z, t: torch.stack([-z[:, 1], z[:, 0]], -1), dim=2)
        >>> bend = {"bend": ff.regularizers.Acceleration()}
        >>> path = ff.LatentFlow(turn)(torch.tensor([[2.0, 0.0]]), [0.0, 3.0], costs=bend)
        >>> round(path.costs["bend"][-1].item(), 2)        # 3 frames on a circle of radius 2, at speed 2
        12.0
    """

    needs = ("acceleration",)

    @property
    def one_stage_reason(self) -> str | None:
        """Why it takes one stage of a solve at a time; None where `many_stages` holds."""
        return _changed(self, Acceleration, "forward")

    @property
    def many_stages(self) -> bool:
        """Whether several stages of a solve can be evaluated at once, and nothing is captured."""
        return self.one_stage_reason is None

    def forward(self, evaluation: Evaluation) -> Tensor:
        """The squared acceleration, ``[*batch]``; raises TypeError where the evaluation carries none."""
        if evaluation.acceleration is None:
            raise TypeError("Acceleration needs that of a solve; hand it to LatentFlow as one of its costs")
        return evaluation.acceleration.square().sum(-1)


class JacobianNorm(Recorded, nn.Module):
    r"""The squared Frobenius norm $|\partial v/\partial z|_F^2$, which keeps a flow easy to solve.

    Estimated without bias by $|\epsilon^\top \partial v/\partial z|^2$ with the solve's first Rademacher probe (Finlay et
    al., ICML 2020, eq. 10). It differentiates the field once more, which costs about one further evaluation a stage.

    Example:
        >>> import torch, flowfactor as ff
        >>> decay = ff.fields.from_module(lambda z, t: -2 * z, dim=3)
        >>> path = ff.LatentFlow(decay)(torch.ones(1, 3), [0.0, 1.0], costs={"jac": ff.regularizers.JacobianNorm()})
        >>> round(path.costs["jac"][-1].item(), 3)         # |-2 I|^2 = 12
        12.0
    """

    needs = ("probe",)

    def forward(self, evaluation: Evaluation) -> Tensor:
        """The estimate, ``[*batch]``; raises TypeError where the evaluation carries no probe."""
        if evaluation.probe is None or evaluation.velocity_at is None:
            raise TypeError("JacobianNorm needs the probe of a solve; hand it to LatentFlow as one of its costs")
        _, pull = torch.func.vjp(evaluation.velocity_at, evaluation.z)  # type: ignore[misc]
        return pull(evaluation.probe)[0].square().sum(-1)
