"""Fields as a solve uses them: what `TwoLayerTape` is to a potential, for the fields that potentials drive.

A field tape works on states ``[K, n, D]`` that are sorted by flow (see `flowfactor.networks.batching.Rows`); records of
S stages are ``[K, S, n, .]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from flowfactor.fields._skew import canonical
from flowfactor.fields.base import Evaluation
from flowfactor.networks.two_layer_adjoint import Stages, TwoLayerTape
from flowfactor.potentials.base import PotentialTape

Found = list[tuple[Tensor, ...]]
Form: TypeAlias = "Tensor | str | None"
"""J: matrices ``[K, D, D]``, ``"canonical"`` for the canonical pairing, or None where the part is a velocity already."""


class FieldTape:
    r"""$v = \nabla u + \sum_i J_i \nabla h_i$, each part optional.

    Args:
        potential: The tape of u; None for none.
        streams: The tape of every h_i with its J.
        divergent: Whether the only stream is a velocity with a divergence of its own.
    """

    def __init__(
        self,
        potential: PotentialTape | None,
        streams: Sequence[tuple[PotentialTape, Form]] = (),
        divergent: bool = False,
    ) -> None:
        self.parts = [*([] if potential is None else [potential]), *(part for part, _ in streams)]
        self.has_potential = potential is not None
        self.diverges = self.has_potential or divergent
        forms = [form for _, form in streams]
        self.forms = [form.detach() if isinstance(form, Tensor) else form for form in forms]
        self.learned = [isinstance(form, Tensor) and form.requires_grad for form in forms]
        self.shared = _alike(self.parts)
        self.tapes: list[TwoLayerTape]
        if self.shared:  # one tape for all, whose groups are those of the first part, then those of the next
            names = self.parts[0].stack
            every = {name: torch.cat([part.stack[name].detach() for part in self.parts]) for name in names}
            learns = {name: any(part.stack[name].requires_grad for part in self.parts) for name in names}
            stack = {name: value.requires_grad_(learns[name]) for name, value in every.items()}
            self.tapes = [self.parts[0].build(stack, self._turn_all(_turn), self._turn_all(_turn_back))]
        else:
            own = [self.parts[0].build(self.parts[0].stack)] if self.has_potential else []
            turned = self.parts[self.has_potential :]
            pairs = zip(turned, self.forms, strict=True)
            self.tapes = own + [p.build(p.stack, partial(_turn, form=J), partial(_turn_back, form=J)) for p, J in pairs]
        self.names = [[name for name, value in part.stack.items() if value.requires_grad] for part in self.parts]
        #: The tensors that gradients have to reach.
        self.inputs = [part.stack[n] for part, names in zip(self.parts, self.names, strict=True) for n in names]
        self.inputs += [form for form in forms if isinstance(form, Tensor) and form.requires_grad]

    @property
    def z(self) -> Tensor:
        """The states of all stages that were taken, ``[K, S, n, D]``."""
        return self._split(self.tapes[0].z)[0]

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """What belongs to each part, of something that a tape gave."""
        return x.chunk(len(self.parts)) if self.shared else [x]

    def _turn_all(self, turn: Callable[[Tensor, Form], Tensor]) -> Callable[[Tensor], Tensor]:
        def turned(x: Tensor) -> Tensor:
            pieces = x.chunk(len(self.parts))
            rest = zip(pieces[self.has_potential :], self.forms, strict=True)
            return torch.cat([*pieces[: self.has_potential], *(turn(piece, form) for piece, form in rest)])

        return turned

    def _sum(self, pieces: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The sum over all parts of what each tape gave."""
        if self.shared:
            x = pieces[0]
            return torch.sum(x.reshape(len(self.parts), -1, *x.shape[1:]), 0, out=out)
        total = pieces[0]
        for piece in pieces[1:]:
            total = torch.add(total, piece, out=out)
        return total

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Evaluation]:
        """The same field by autograd, as a function of tensors in place of `inputs`."""
        rest = iter(inputs)
        functions = []
        for part, names in zip(self.parts, self.names, strict=True):
            functions.append(part.rebind({**part.stack, **{name: next(rest) for name in names}}))
        forms = [next(rest) if own else form for form, own in zip(self.forms, self.learned, strict=True)]

        def velocity_of(z: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            found = [function(z, t) for function in functions]
            turned = found[self.has_potential :]
            parts = [_turn(f["gradient"], form) for f, form in zip(turned, forms, strict=True)]
            own = found[0] if self.diverges else {}
            total = [own["gradient"], *parts] if self.has_potential else parts
            return own, sum(total[1:], total[0])

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            own, velocity = velocity_of(z, t)
            divergence = own.get("laplacian") if self.diverges else torch.zeros_like(z[..., 0])
            gradient = own.get("gradient") if self.has_potential else None
            return Evaluation(
                z, t, velocity, divergence, own.get("value"), gradient, own.get("time"),
                velocity_at=lambda z: velocity_of(z, t)[1],
            )  # fmt: skip

        return evaluate

    def terms(self, ts: Sequence[float], like: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """The time terms of some stages: what `velocity` takes, one entry a stage."""
        found = [tape.terms(list(ts), like) for tape in self.tapes]
        return [list(stage) for stage in zip(*found, strict=True)]

    def velocity(
        self, z: Tensor, terms: list[tuple[Tensor, Tensor]], record: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Found]:
        """The velocity at one stage, written into ``out`` if given, and what was found on the way."""
        if len(self.parts) == 1:
            velocity, noted = self.tapes[0].gradient(z, terms[0], record, out)
            return velocity, [noted]
        if self.shared:
            z = torch.cat([z] * len(self.parts))
        found = [tape.gradient(z, term, record) for tape, term in zip(self.tapes, terms, strict=True)]
        return self._sum([velocity for velocity, _ in found], out), [noted for _, noted in found]

    def divergence(self, found: Sequence[Found]) -> Tensor:
        """The divergences at some stages ``[S, K, n]``, from what `velocity` found there."""
        if not self.diverges:
            z = self._split(found[0][0][0])[0]
            return z.new_zeros(len(found), *z.shape[:-1])
        return self.tapes[0].laplacians([f[0] for f in found]).transpose(0, 1)

    def begin_block(self, shared: bool) -> None:
        """Drops all records, but for the last one where the next step begins with it (``shared``)."""
        for tape in self.tapes:
            tape.records = tape.records[-1:] if shared else []

    def forget(self, keep: int) -> None:
        """Drops the records of all but the first ``keep`` stages."""
        for tape in self.tapes:
            del tape.records[keep:]

    def take(self, ts: list[float]) -> None:
        """Stacks the records of all stages, which were at the times ``ts``."""
        for tape in self.tapes:
            tape.take(ts)

    def put(self, found: Sequence[Found], ts: list[float]) -> None:
        """Makes what `velocity` found at some stages, at the times ``ts``, the record."""
        for i, tape in enumerate(self.tapes):
            tape.records = [stage[i] for stage in found]
            tape.take(ts)

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        """``velocity`` and what of ``value, gradient, time, laplacian`` is wanted, at all stages."""
        own = want if self.has_potential else want & {"laplacian"} if self.diverges else frozenset()
        found = [self.tapes[0].outputs(own | {"gradient"})]
        found += [tape.outputs(frozenset({"gradient"})) for tape in self.tapes[1:]]
        out = {name: self._split(x)[0] for name, x in found[0].items()}
        out["velocity"] = self._sum([x["gradient"] for x in found])
        if not self.has_potential:
            del out["gradient"]
            if "laplacian" in want and not self.diverges:
                out["laplacian"] = torch.zeros_like(out["velocity"][..., 0])
        return out

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        """Prepares the way back (see `TwoLayerTape.begin`); a cotangent of ``velocity`` reaches every part."""
        own = dict(cotangents)
        self.of_velocity = own.pop("velocity", None)
        if not self.diverges:
            own = {}
        if self.shared:
            others = len(self.parts) - 1
            own = {name: torch.cat([x, x.new_zeros(others * len(x), *x.shape[1:])]) for name, x in own.items()}
        direct = self.tapes[0].begin(own, weights=weights)
        for tape in self.tapes[1:]:
            tape.begin({}, weights=weights)
        return None if direct is None else self._split(direct)[0]

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity, beside those given to `begin`."""
        if self.of_velocity is not None:
            lam = lam + self.of_velocity[at]
        if self.shared:
            lam = torch.cat([lam] * len(self.parts))
        return self._sum([tape.pull(at, lam) for tape in self.tapes])

    def gradients(self, lam: Tensor) -> list[Tensor | None]:
        """The gradients of `inputs`, after every stage has been pulled with ``lam [K, S, n, D]``."""
        found = [tape.gradients() for tape in self.tapes]
        if self.shared:
            pieces = {name: self._split(x) for name, x in found[0].items()}
            found = [{name: x[i] for name, x in pieces.items()} for i in range(len(self.parts))]
        out: list[Tensor | None] = [own.get(n) for own, names in zip(found, self.names, strict=True) for n in names]
        if any(self.learned):
            lam = lam if self.of_velocity is None else lam + self.of_velocity
            turned = self._split(self.tapes[0].plain_gradient()) if self.shared else self.tapes
            for part, learned in zip(turned[self.has_potential :], self.learned, strict=True):
                if learned:
                    g = part if isinstance(part, Tensor) else part.plain_gradient()
                    out.append(torch.bmm(lam.flatten(1, 2).mT, g.flatten(1, 2)))
        return out


def _alike(parts: Sequence[PotentialTape]) -> bool:
    """Whether the parts can share one tape."""
    first = parts[0]
    shapes = {name: value.shape for name, value in first.stack.items()}
    return len(parts) > 1 and all(
        part.kind is not None
        and part.kind == first.kind
        and {name: value.shape for name, value in part.stack.items()} == shapes
        for part in parts
    )


def _turn(g: Tensor, form: Form) -> Tensor:
    if not isinstance(form, Tensor):
        return g if form is None else canonical(g)
    return g @ (form.mT if g.ndim == 3 else form.mT.unsqueeze(1))


def _turn_back(lam: Tensor, form: Form) -> Tensor:
    if not isinstance(form, Tensor):
        return lam if form is None else canonical(lam).neg_()
    return lam @ (form if lam.ndim == 3 else form.unsqueeze(1))
