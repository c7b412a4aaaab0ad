r"""The adjoint of potentials $u = \varphi(z, t) - E t$, by that of $\varphi$: gradients and Laplacians are the same.

Of what reaches values and time derivatives, $\bar E = -\sum (\dot{\bar u} + t\,\bar u)$; the rest passes on to $\varphi$.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfactor.networks.stage_adjoint import Outputs, Pullback, Residuals, StageAdjoint, Stages, TimeTerms
from flowfactor.networks.time import Times


class StationaryAdjoint(StageAdjoint):
    """See the module.

    Args:
        single: The adjoint of phi.
        energy: The energies E, ``[G, 1]``.
    """

    def __init__(self, single: StageAdjoint, energy: Tensor) -> None:
        self.single, self.energy, self.own_times = single, energy, single.own_times
        self.inputs = [*single.inputs, *([energy] if energy.requires_grad else [])]

    def time_terms(self, ts: Times) -> list[TimeTerms]:
        return self.single.time_terms(ts)

    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        return self.single.velocity(z, terms, out)

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        return self.single.divergence(residuals)

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        t = ts.transpose(0, 1) if isinstance(ts, Tensor) else self.energy.new_tensor(ts).reshape(1, -1, 1)
        return StationaryStages(self, self.single.stack(residuals, ts), t)

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        own = len(self.single.inputs)
        single, energy = self.single.by_autograd(inputs[:own]), inputs[own] if len(inputs) > own else self.energy
        return lambda z, t: with_energy(single(z, t), energy, t)


def with_energy(out: Outputs, energy: Tensor, t: Tensor) -> Outputs:
    """What is known of phi, as it is of phi - E t."""
    more = Outputs()
    if "value" in out:
        more["value"] = out["value"] - energy * t
    if "time" in out:
        more["time"] = out["time"] - energy
    return {**out, **more}


class StationaryStages(Stages):
    """Stages of a `StationaryAdjoint`, at times ``t`` that broadcast to ``[G, S, n]``."""

    def __init__(self, adjoint: StationaryAdjoint, single: Stages, t: Tensor) -> None:
        self.adjoint, self.single, self.t, self.z = adjoint, single, t, single.z

    def outputs(self, want: frozenset[str]) -> Outputs:
        return with_energy(self.single.outputs(want), self.adjoint.energy.detach().unsqueeze(1), self.t)

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return StationaryPullback(self, cotangents, parameters)


class StationaryPullback(Pullback):
    """The adjoint of the stages of a `StationaryAdjoint`."""

    def __init__(self, stages: StationaryStages, cotangents: Outputs, parameters: bool) -> None:
        self.single = stages.single.pullback(cotangents, parameters=parameters)
        super().__init__(stages.z.shape[1], self.single.direct, parameters)
        self.learned, self.of_energy = stages.adjoint.energy.requires_grad, torch.zeros_like(stages.adjoint.energy)
        for name, factor in (("time", torch.ones_like(stages.t)), ("value", stages.t)):
            if name in cotangents:
                self.of_energy -= (cotangents[name] * factor).sum((1, 2)).unsqueeze(-1)

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        return self.single.pull(at, cotangent)

    def _gradients(self) -> list[Tensor | None]:
        return [*self.single.gradients(), *([self.of_energy] if self.learned else [])]
