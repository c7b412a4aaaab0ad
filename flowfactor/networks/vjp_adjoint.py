"""A closed form of one's own: two functions, what a part evaluates to and its vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from flowfactor.networks.batching import Stack
from flowfactor.networks.stage_adjoint import NetworkAdjoint, Outputs, Pullback, Stages

Evaluate: TypeAlias = Callable[[Stack, Tensor, Tensor, frozenset[str]], Outputs]
Vjp: TypeAlias = Callable[[Stack, Tensor, Tensor, Outputs], tuple[Tensor, Stack]]

_ALL = frozenset({"velocity", "divergence", "value", "gradient", "time"})


class VjpAdjoint(NetworkAdjoint):
    r"""The adjoint of a part whose evaluation $y(p, z, t)$ and vector-Jacobian product are written down.

    Nothing is kept between the two: the product sees parameters, states and times again. (What shares work between them
    implements `flowfactor.networks.stage_adjoint` itself.)

    Args:
        stack: Parameters by name, each ``[G, ...]``.
        evaluate: ``(p, z [G, n, D], t [n], want) -> y``: what of ``velocity [G, n, D]``, ``divergence [G, n]`` and, of a
            potential, ``value [G, n]``, ``gradient [G, n, D]``, ``time [G, n]`` is wanted, by name; more does no harm. Of
            operations that autograd can follow.
        vjp: ``(p, z, t, cotangents) -> (z_bar, p_bar)``: $\bar z = (\partial y/\partial z)^\top \bar y$, ``[G, n, D]``, and
            the same of every parameter by name. Cotangents $\bar y$ that are zero may be missing.

    Example:
        >>> import torch
        >>> def evaluate(p, z, t, want):                                        # v = r z, of r [G, 1, 1]
        ...     return {"velocity": p["r"] * z}
        >>> def vjp(p, z, t, cotangents):
        ...     bar = cotangents["velocity"]
        ...     return p["r"] * bar, {"r": (z * bar).sum((1, 2), keepdim=True)}
        >>> adjoint = VjpAdjoint({"r": torch.full((1, 1, 1), 2.0, requires_grad=True)}, evaluate, vjp)
        >>> v, residuals = adjoint.velocity(torch.ones(1, 3, 2), adjoint.time_terms([0.0])[0])
        >>> pullback = adjoint.stack([residuals], [0.0]).pullback({})
        >>> pullback.pull(0, torch.ones(1, 3, 2)).unique(), pullback.gradients()
        (tensor([2.]), [tensor([[[6.]]])])
    """

    def __init__(self, stack: Stack, evaluate: Evaluate, vjp: Vjp) -> None:
        super().__init__(stack, lambda p: lambda z, t: evaluate(p, z, t.expand(z.shape[-2]), _ALL))
        self.evaluate, self.vjp = evaluate, vjp

    def at(self, z: Tensor, t: float, name: str) -> Tensor:
        """One result at one stage."""
        found = self.evaluate(self.p, z, z.new_full(z.shape[-2:-1], t), frozenset({name}))
        if name not in found:
            raise ValueError(
                f"evaluate of a VjpAdjoint gives {', '.join(found) or 'nothing'}, and the solve wants {name!r}"
            )
        return found[name]

    def time_terms(self, ts: Sequence[float]) -> list[float]:
        return list(ts)

    def velocity(self, z: Tensor, terms: float, out: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, float]]:
        velocity = self.at(z, terms, "velocity")
        return velocity if out is None else out.copy_(velocity), (z, terms)

    def divergence(self, residuals: Sequence[tuple[Tensor, float]]) -> Tensor:
        return torch.stack([self.at(z, t, "divergence") for z, t in residuals])

    def stack(self, residuals: Sequence[tuple[Tensor, float]], ts: Sequence[float]) -> Stages:
        return VjpStages(self, torch.stack([z for z, _ in residuals], 1), ts)


class VjpStages(Stages):
    """Stages of a `VjpAdjoint`, to whose functions they are so many more samples."""

    def __init__(self, adjoint: VjpAdjoint, z: Tensor, ts: Sequence[float]) -> None:
        self.adjoint, self.z = adjoint, z
        self.t = z.new_tensor(ts).repeat_interleave(z.shape[2])

    def outputs(self, want: frozenset[str]) -> Outputs:
        found = self.adjoint.evaluate(self.adjoint.p, self.z.flatten(1, 2), self.t, want)
        return {name: x.unflatten(1, self.z.shape[1:3]) for name, x in found.items() if name in want}

    def vjp(self, cotangents: Outputs, at: slice = slice(None)) -> tuple[Tensor, Stack]:
        """Vector-Jacobian products at some stages, cotangents ``[G, S', n(, D)]``."""
        z, bars = self.z[:, at], {name: x.flatten(1, 2) for name, x in cotangents.items()}
        t = self.t.reshape(self.z.shape[1:3])[at].flatten()
        z_bar, p_bar = self.adjoint.vjp(self.adjoint.p, z.flatten(1, 2), t, bars)
        return z_bar.unflatten(1, z.shape[1:3]), p_bar

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return VjpPullback(self, cotangents, parameters)


class VjpPullback(Pullback):
    """The adjoint of the stages of a `VjpAdjoint`."""

    def __init__(self, stages: VjpStages, cotangents: Outputs, parameters: bool) -> None:
        direct = stages.vjp(cotangents)[0] if cotangents else None
        super().__init__(stages.z.shape[1], direct, parameters)
        self.stages, self.cotangents = stages, cotangents
        self.pulled = torch.zeros_like(stages.z)

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        self.pulled[:, at] = cotangent
        if isinstance(at, slice):
            return self.stages.vjp({"velocity": cotangent}, at)[0]
        at = range(self.pulled.shape[1])[at]
        return self.stages.vjp({"velocity": cotangent.unsqueeze(1)}, slice(at, at + 1))[0].squeeze(1)

    def _gradients(self) -> list[Tensor | None]:
        given = self.cotangents.get("velocity")
        velocity = self.pulled if given is None else self.pulled + given
        p_bar = self.stages.vjp({**self.cotangents, "velocity": velocity})[1]
        return [p_bar.get(name) for name in self.stages.adjoint.names]
