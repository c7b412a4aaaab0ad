r"""The closed-form protocol: what a velocity offers to a solve whose gradients are written out instead of recorded.

How a solve uses it (see `flowfactor.solve.closed_form`):

1. Forward. `StageAdjoint.time_terms` prepares what depends on time alone for some stages; `StageAdjoint.velocity` evaluates
   one stage and returns its *residuals* beside the velocity: whatever a gradient will need. The solver keeps those of the
   steps that it accepts and drops the others; the object keeps nothing, so that stages may be evaluated in any order, as
   often as need be, and forgotten at any time.
2. `StageAdjoint.stack` joins the residuals of S stages to `Stages`: a value that never changes. `Stages.outputs` gives
   value, gradient, time derivative, velocity and divergence at all of these stages at once, for running costs and
   log-determinants, on which no step depends.
3. Backward. `Stages.pullback` takes the cotangents $\bar y$ of these outputs and gives a `Pullback`. Its ``direct`` is what
   reaches the states without passing a velocity that a later stage depends on. `Pullback.pull` maps the cotangent
   $\lambda$ of the velocity at a stage to that of the state there,
   $\bar z = (\partial v/\partial z)^\top \lambda + \ldots$; only this has to go from stage to stage, from the last to the
   first (or, for the continuous adjoint, wherever its solver asks). When every stage has been pulled once,
   `Pullback.gradients` gives the cotangents of all `StageAdjoint.inputs` by a few large products over all stages.

Each step is a method of what the step before it returned, so that they cannot be called out of order; what types cannot
rule out, a `Pullback` refuses: a stage pulled twice, or gradients before all stages were pulled.

Shapes: states of a stage are ``[G, n, D]``, n samples for each of G groups (`flowfactor.networks.batching`), those of S
stages ``[G, S, n, D]``; numbers lack the last dimension. Everything but `StageAdjoint.by_autograd` runs without autograd.

A part without closed form gives a `NoClosedForm` instead, whose reason reaches the user. The short way to a closed form of
one's own is `flowfactor.networks.VjpAdjoint`: two functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowfactor.networks.batching import Stack
from flowfactor.networks.time import Times

Outputs: TypeAlias = dict[str, Tensor]
"""Results at a stage, or their cotangents, by name: ``velocity, divergence``, of a potential ``value, gradient, time``."""

Residuals: TypeAlias = Any
"""What one stage leaves for its gradient; only the `StageAdjoint` that made it looks inside."""

TimeTerms: TypeAlias = Any
"""What `StageAdjoint.velocity` needs to know about the time of a stage; opaque as well."""


@dataclass(frozen=True)
class NoClosedForm:
    """Why something is not solved by closed forms, so that the general engine solves it.

    Attributes:
        reason: In words for users, such as ``"Mine overrides flow_potential of MLPPotential"``.
    """

    reason: str


class StageAdjoint(ABC):
    """A velocity bound for one solve, with its adjoint in closed form.

    Attributes:
        inputs: The tensors that gradients have to reach.
        own_times: Whether samples may be at times of their own: then times ``ts`` may also be a tensor ``[S, G, n]``, and
            the time ``t`` of a function that `by_autograd` gives a tensor ``[G, n]``.
    """

    inputs: list[Tensor]
    own_times: bool = False

    @abstractmethod
    def time_terms(self, ts: Times) -> list[TimeTerms]:
        """What depends on time alone at the stages of times ``ts``, one entry a stage, worked out together."""

    @abstractmethod
    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        """The velocity at one stage.

        Args:
            z: States ``[G, n, D]``.
            terms: The stage's entry of `time_terms`.
            out: Where the velocity goes, if given.

        Returns:
            The velocity ``[G, n, D]`` and the residuals.
        """

    @abstractmethod
    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        """The divergences ``[S, G, n]`` at S stages, from the residuals of each."""

    @abstractmethod
    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        """Joins the residuals of S stages, which were at the times ``ts``."""

    @abstractmethod
    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        """The same velocity as operations that autograd follows, as a function of tensors in place of `inputs`."""


class Stages(ABC):
    """What is known at S stages.

    Attributes:
        z: Their states ``[G, S, n, D]``.
    """

    z: Tensor

    @abstractmethod
    def outputs(self, want: frozenset[str]) -> Outputs:
        """What of ``want`` there is, at all stages: ``[G, S, n]``, vectors ``[G, S, n, D]``."""

    @abstractmethod
    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        """Begins the adjoint of these stages.

        Args:
            cotangents: Cotangents of what `outputs` gives; those of the velocity come beside those that `Pullback.pull`
                will be given. What is missing is zero.
            parameters: Whether `Pullback.gradients` will be asked for; without it, less has to be computed.
        """


class Pullback(ABC):
    """The adjoint of S stages under way.

    Args:
        stages: S.
        direct: Cotangent of z that `pull` does not give, ``[G, S, n, D]``; None for zero.
        parameters: Whether `gradients` can be given.
    """

    def __init__(self, stages: int, direct: Tensor | None = None, parameters: bool = True) -> None:
        self.direct = direct
        self._parameters, self._pulled = parameters, [False] * stages

    def pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        """Pulls a cotangent of the velocity back to the states.

        Args:
            at: A stage, or some.
            cotangent: The cotangent ``[G, n, D]``, of some stages ``[G, S', n, D]``.

        Returns:
            The cotangent of z, of the same shape.

        Raises:
            RuntimeError: If one of these stages has been pulled before.
        """
        stages = range(len(self._pulled))[at]
        for stage in [stages] if isinstance(stages, int) else stages:
            if self._pulled[stage]:
                raise RuntimeError(f"stage {stage} was pulled before: take a new pullback of the stages")
            self._pulled[stage] = True
        return self._pull(at, cotangent)

    def gradients(self) -> list[Tensor | None]:
        """The cotangents of `StageAdjoint.inputs`; None for zero.

        Raises:
            RuntimeError: If a stage has not been pulled yet, or the pullback was made without ``parameters``.
        """
        if not self._parameters:
            raise RuntimeError("this pullback was made with parameters=False, which leaves out what gradients need")
        if not all(self._pulled):
            raise RuntimeError(f"stage {self._pulled.index(False)} has to be pulled before gradients are asked for")
        return self._gradients()

    @abstractmethod
    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor: ...

    @abstractmethod
    def _gradients(self) -> list[Tensor | None]: ...


Bound: TypeAlias = Callable[[Stack], Callable[[Tensor, Tensor], Outputs]]
"""Binds parameters by name as operations that autograd follows."""


class NetworkAdjoint(StageAdjoint):
    """The adjoint of stacked networks: what all of them have in common.

    Args:
        stack: Parameters by name, each ``[G, ...]``.
        bind: The same networks by autograd.
    """

    def __init__(self, stack: Stack, bind: Bound) -> None:
        self.tensors, self.bind = stack, bind
        self.p = {name: value.detach() for name, value in stack.items()}
        self.names = [name for name, value in stack.items() if value.requires_grad]
        self.inputs = [stack[name] for name in self.names]

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        return self.bind({**self.tensors, **dict(zip(self.names, inputs, strict=True))})


@dataclass
class ClosedForm:
    """How the adjoint of a part is made: the parameters that act, and what they are given to.

    Attributes:
        stack: The parameters by name, each ``[G, ...]``.
        build: Makes the adjoint, of parameters such as ``stack``.
        kind: Parts of one kind, with parameters of the same shapes, can be evaluated together; None for those that cannot.
        takes_skew: Whether ``build``, of a potential, takes ``"skew"`` ``[G, D, D]`` as one more parameter: a map J for the
            velocity J grad u instead of grad u.
        outputs: The parameters that the velocity is linear in: where these are 0, it is 0. Empty where nobody says which.
    """

    stack: Stack
    build: Callable[[Stack], StageAdjoint]
    kind: tuple[Any, ...] | None = None
    takes_skew: bool = False
    outputs: tuple[str, ...] = ()


def stacked(residuals: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Residuals of S stages, tensors ``[G, n, .]`` each, as tensors ``[G, S, n, .]``; one for what is the same tensor."""
    made: dict[tuple[int, ...], Tensor] = {}
    every = list(zip(*residuals, strict=True))
    keys = [tuple(map(id, x)) for x in every]
    for key, x in zip(keys, every, strict=True):
        if key not in made:
            made[key] = torch.stack(x, 1)
    return [made[key] for key in keys]


def with_velocity(
    bound: Callable[[Tensor, Tensor], Outputs], skew: Tensor | None
) -> Callable[[Tensor, Tensor], Outputs]:
    """The velocity (J) grad u beside what a bound potential gives, whose Laplacian is called divergence."""

    def evaluate(z: Tensor, t: Tensor) -> Outputs:
        out = bound(z, t)
        if "laplacian" in out:
            out["divergence"] = out.pop("laplacian")
        out["velocity"] = out["gradient"] if skew is None else out["gradient"] @ skew.mT
        return out

    return evaluate
