r"""The adjoint of sums $v = \nabla u + \sum_i v_i$ whose other parts have no divergence.

Parts of one kind are evaluated together where that can be: as the groups of one adjoint, those of the first part, then
those of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfactor.networks.stage_adjoint import ClosedForm, Outputs, Pullback, Residuals, StageAdjoint, Stages, TimeTerms
from flowfactor.networks.time import Times


def sum_of(parts: Sequence[ClosedForm]) -> ClosedForm:
    """The closed form of a sum whose first part is the gradient of a potential: one stack where all are of one kind."""
    if len(parts) == 1 or not _alike(parts):
        return ClosedForm({}, lambda _: SumAdjoint([part.build(part.stack) for part in parts], has_potential=True))
    # Of what only some parts have, J, the identity stands in for the others.
    names = dict.fromkeys(name for part in parts for name in part.stack)
    stack = {name: torch.cat([_tensor(part, name, parts) for part in parts]) for name in names}
    return ClosedForm(stack, lambda stack: StackedSumAdjoint(parts[0].build(stack), len(parts)))


def _shapes(part: ClosedForm) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in part.stack.items() if name != "skew"}


def _alike(parts: Sequence[ClosedForm]) -> bool:
    """Whether one adjoint can evaluate all parts."""
    first = parts[0]
    return first.kind is not None and all(p.kind == first.kind and _shapes(p) == _shapes(first) for p in parts)


def _tensor(part: ClosedForm, name: str, parts: Sequence[ClosedForm]) -> Tensor:
    if name in part.stack:
        return part.stack[name]
    like = next(other.stack[name] for other in parts if name in other.stack)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


def _without_potential(want: frozenset[str], velocity: Tensor) -> Outputs:
    out = {"velocity": velocity} if "velocity" in want else {}
    return out | ({"divergence": torch.zeros_like(velocity[..., 0])} if "divergence" in want else {})


class SumAdjoint(StageAdjoint):
    """A sum of parts, one by one.

    Args:
        parts: The parts.
        has_potential: Whether the first one is the gradient of a potential, of which value, gradient, time derivative and
            divergence come; there are none otherwise.
    """

    def __init__(self, parts: Sequence[StageAdjoint], has_potential: bool) -> None:
        self.parts, self.has_potential = parts, has_potential
        self.inputs = [x for part in parts for x in part.inputs]
        self.own_times = all(part.own_times for part in parts)

    def time_terms(self, ts: Times) -> list[TimeTerms]:
        return list(zip(*(part.time_terms(ts) for part in self.parts), strict=True))

    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        if len(self.parts) == 1:
            total, residuals = self.parts[0].velocity(z, terms[0], out)
            return total, (z, [residuals])
        found = [part.velocity(z, term) for part, term in zip(self.parts, terms, strict=True)]
        return add_up([velocity for velocity, _ in found], out), (z, [residuals for _, residuals in found])

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        if self.has_potential:
            return self.parts[0].divergence([found[0] for _, found in residuals])
        z, _ = residuals[0]
        return z.new_zeros(len(residuals), *z.shape[:-1])

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        pairs = zip(self.parts, zip(*(found for _, found in residuals), strict=True), strict=True)
        return SumStages([part.stack(own, ts) for part, own in pairs], self.has_potential)

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        functions, begin = [], 0
        for part in self.parts:
            functions.append(part.by_autograd(inputs[begin : begin + len(part.inputs)]))
            begin += len(part.inputs)

        def evaluate(z: Tensor, t: Tensor) -> Outputs:
            found = [function(z, t) for function in functions]
            velocity = add_up([out["velocity"] for out in found])
            if self.has_potential:
                return {**found[0], "velocity": velocity}
            return _without_potential(frozenset({"velocity", "divergence"}), velocity)

        return evaluate


class SumStages(Stages):
    """Stages of a `SumAdjoint`."""

    def __init__(self, parts: Sequence[Stages], has_potential: bool) -> None:
        self.parts, self.has_potential = parts, has_potential
        self.z = parts[0].z

    def outputs(self, want: frozenset[str]) -> Outputs:
        first = self.parts[0].outputs(want | {"velocity"} if self.has_potential else frozenset({"velocity"}))
        rest = [part.outputs(frozenset({"velocity"}))["velocity"] for part in self.parts[1:]]
        velocity = add_up([first["velocity"], *rest])
        return {**first, "velocity": velocity} if self.has_potential else _without_potential(want, velocity)

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        shared = {name: x for name, x in cotangents.items() if name == "velocity"}
        each = [cotangents if self.has_potential else shared, *[shared] * (len(self.parts) - 1)]
        parts = [s.pullback(c, parameters=parameters) for s, c in zip(self.parts, each, strict=True)]
        return SumPullback(self, parts, parameters)


class SumPullback(Pullback):
    """The adjoint of the stages of a `SumAdjoint`."""

    def __init__(self, stages: Stages, parts: Sequence[Pullback], parameters: bool) -> None:
        super().__init__(stages.z.shape[1], parts[0].direct, parameters)
        self.parts = parts

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        return add_up([part.pull(at, cotangent) for part in self.parts])

    def _gradients(self) -> list[Tensor | None]:
        return [gradient for part in self.parts for gradient in part.gradients()]


class StackedSumAdjoint(StageAdjoint):
    """A sum of parts that are the groups of one adjoint; the first is the gradient of a potential.

    Args:
        single: The adjoint of all parts, for states ``[P G, n, D]``.
        parts: P.
    """

    def __init__(self, single: StageAdjoint, parts: int) -> None:
        self.single, self.parts = single, parts
        self.inputs, self.own_times = single.inputs, single.own_times

    def times(self, ts: Times) -> Times:
        """The times of the groups of all parts."""
        return torch.cat([ts] * self.parts, 1) if isinstance(ts, Tensor) else ts

    def time_terms(self, ts: Times) -> list[TimeTerms]:
        return self.single.time_terms(self.times(ts))

    def total(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum over all parts."""
        return torch.sum(x.reshape(self.parts, -1, *x.shape[1:]), 0, out=out)

    def velocity(self, z: Tensor, terms: TimeTerms, out: Tensor | None = None) -> tuple[Tensor, Residuals]:
        velocity, residuals = self.single.velocity(torch.cat([z] * self.parts), terms)
        return self.total(velocity, out), residuals

    def divergence(self, residuals: Sequence[Residuals]) -> Tensor:
        return self.single.divergence(residuals).chunk(self.parts, 1)[0]

    def stack(self, residuals: Sequence[Residuals], ts: Times) -> Stages:
        return StackedSumStages(self, self.single.stack(residuals, self.times(ts)))

    def by_autograd(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Outputs]:
        function = self.single.by_autograd(inputs)

        def evaluate(z: Tensor, t: Tensor) -> Outputs:
            out = function(torch.cat([z] * self.parts), torch.cat([t] * self.parts) if t.ndim else t)
            own = {name: x.chunk(self.parts)[0] for name, x in out.items()}
            return {**own, "gradient": own["velocity"], "velocity": self.total(out["velocity"])}

        return evaluate


class StackedSumStages(Stages):
    """Stages of a `StackedSumAdjoint`."""

    def __init__(self, adjoint: StackedSumAdjoint, single: Stages) -> None:
        self.adjoint, self.single = adjoint, single
        self.z = single.z.chunk(adjoint.parts)[0]

    def outputs(self, want: frozenset[str]) -> Outputs:
        out = self.single.outputs(want | {"velocity"})
        own = {name: x.chunk(self.adjoint.parts)[0] for name, x in out.items()}
        own |= {"gradient": own["velocity"], "velocity": self.adjoint.total(out["velocity"])}
        return {name: x for name, x in own.items() if name in want}

    def pullback(self, cotangents: Outputs, *, parameters: bool = True) -> Pullback:
        return StackedSumPullback(self, cotangents, parameters)


class StackedSumPullback(Pullback):
    """The adjoint of the stages of a `StackedSumAdjoint`."""

    def __init__(self, stages: StackedSumStages, cotangents: Outputs, parameters: bool) -> None:
        self.adjoint, parts = stages.adjoint, stages.adjoint.parts
        first, rest = dict(cotangents), {name: x for name, x in cotangents.items() if name == "velocity"}
        if "gradient" in first:  # the velocity of the first part
            gradient = first.pop("gradient")
            first["velocity"] = first["velocity"] + gradient if "velocity" in first else gradient
        every = {n: torch.cat([x, *[rest.get(n, torch.zeros_like(x))] * (parts - 1)]) for n, x in first.items()}
        self.single = stages.single.pullback(every, parameters=parameters)
        direct = self.single.direct
        super().__init__(stages.z.shape[1], None if direct is None else direct.chunk(parts)[0], parameters)

    def _pull(self, at: int | slice, cotangent: Tensor) -> Tensor:
        return self.adjoint.total(self.single.pull(at, torch.cat([cotangent] * self.adjoint.parts)))

    def _gradients(self) -> list[Tensor | None]:
        return self.single.gradients()


def add_up(pieces: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The sum of at least one tensor, into ``out`` if given."""
    total = pieces[0]
    for piece in pieces[1:]:
        total = torch.add(total, piece, out=out)
    return total
