"""Fields as a solve uses them: what `TwoLayerTape` is to a potential, for the fields that potentials drive.

A field tape works on states ``[K, n, D]`` that are sorted by flow (see `flowfactor._rows.Rows`); records of S stages are
``[K, S, n, .]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfactor.fields._skew import canonical
from flowfactor.fields.base import Evaluation
from flowfactor.potentials._tape import Stages, TwoLayerTape
from flowfactor.potentials.base import PotentialTape

Found = list[tuple[Tensor, ...]]


class FieldTape:
    r"""$v = \nabla u + \sum_i J_i \nabla h_i$, each part optional.

    Args:
        potential: The tape of u; None for none.
        streams: The tape of every h_i with its J ``[K, D, D]`` (None for the canonical pairing).
    """

    def __init__(
        self, potential: PotentialTape | None, streams: Sequence[tuple[PotentialTape, Tensor | None]] = ()
    ) -> None:
        self.parts = [*([] if potential is None else [potential]), *(part for part, _ in streams)]
        self.first: TwoLayerTape | None = None if potential is None else potential.tape
        self.tapes: list[TwoLayerTape] = [part.tape for part in self.parts]
        self.turned = [part.tape for part, _ in streams]
        self.names = [[name for name, value in part.stack.items() if value.requires_grad] for part in self.parts]
        forms = [form for _, form in streams]
        self.forms = [None if form is None else form.detach() for form in forms]
        self.learned = [form is not None and form.requires_grad for form in forms]
        #: The tensors that gradients have to reach.
        self.inputs = [part.stack[n] for part, names in zip(self.parts, self.names, strict=True) for n in names]
        self.inputs += [form for form in forms if form is not None and form.requires_grad]

    def rebind(self, inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Evaluation]:
        """The same field by autograd, as a function of tensors in place of `inputs`."""
        rest = iter(inputs)
        functions = []
        for part, names in zip(self.parts, self.names, strict=True):
            functions.append(part.rebind({**part.stack, **{name: next(rest) for name in names}}))
        forms = [next(rest) if own else form for form, own in zip(self.forms, self.learned, strict=True)]

        def velocity_of(z: Tensor, t: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            found = [function(z, t) for function in functions]
            turned = found if self.first is None else found[1:]
            parts = [_turn(f["gradient"], form) for f, form in zip(turned, forms, strict=True)]
            own = {} if self.first is None else found[0]
            total = parts if self.first is None else [own["gradient"], *parts]
            return own, sum(total[1:], total[0])

        def evaluate(z: Tensor, t: Tensor) -> Evaluation:
            own, velocity = velocity_of(z, t)
            divergence = torch.zeros_like(z[..., 0]) if self.first is None else own.get("laplacian")
            return Evaluation(
                z, t, velocity, divergence, own.get("value"), own.get("gradient"), own.get("time"),
                velocity_at=lambda z: velocity_of(z, t)[1],
            )  # fmt: skip

        return evaluate

    def terms(self, ts: Sequence[float], like: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
        """The time terms of some stages: what `velocity` takes, one entry a stage."""
        found = [tape.terms(list(ts), like) for tape in self.tapes]
        return [list(stage) for stage in zip(*found, strict=True)]

    def velocity(self, z: Tensor, terms: list[tuple[Tensor, Tensor]], record: bool) -> tuple[Tensor, Found]:
        """The velocity at one stage, and what was found on the way."""
        found: Found = []
        total: Tensor | None = None
        for i, (tape, term) in enumerate(zip(self.tapes, terms, strict=True)):
            g, noted = tape.gradient(z, term, record)
            found.append(noted)
            if tape is not self.first:
                g = _turn(g, self.forms[i - (self.first is not None)])
            total = g if total is None else total + g
        assert total is not None
        return total, found

    def divergence(self, found: Sequence[Found]) -> Tensor:
        """The divergences at some stages ``[S, K, n]``, from what `velocity` found there."""
        z = found[0][0][0]
        if self.first is None:
            return z.new_zeros(len(found), *z.shape[:-1])
        return self.first.laplacians([f[0] for f in found]).transpose(0, 1)

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
        out: dict[str, Tensor] = {}
        if self.first is not None:
            out = self.first.outputs(want | {"gradient"})
            velocity = out["gradient"]
        else:
            velocity = torch.zeros_like(self.turned[0].z)
            if "laplacian" in want:
                out["laplacian"] = velocity.new_zeros(velocity.shape[:-1])
        for tape, form in zip(self.turned, self.forms, strict=True):
            velocity = velocity + _turn(tape.outputs(frozenset({"gradient"}))["gradient"], form)
        out["velocity"] = velocity
        return out

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        """Prepares the way back (see `TwoLayerTape.begin`); a cotangent of ``velocity`` reaches every part."""
        own = dict(cotangents)
        self.of_velocity = own.pop("velocity", None)
        direct = self.first.begin(own, weights=weights) if self.first is not None else None
        for tape in self.turned:
            tape.begin({}, weights=weights)
        return direct

    def pull(self, at: Stages, lam: Tensor) -> Tensor:
        """The cotangent of z for a cotangent ``lam`` of the velocity, beside those given to `begin`."""
        if self.of_velocity is not None:
            lam = lam + self.of_velocity[at]
        total: Tensor | None = None if self.first is None else self.first.pull(at, lam)
        for tape, form in zip(self.turned, self.forms, strict=True):
            back = tape.pull(at, _turn_back(lam, form))
            total = back if total is None else total + back
        assert total is not None
        return total

    def gradients(self, lam: Tensor) -> list[Tensor | None]:
        """The gradients of `inputs`, after every stage has been pulled with ``lam [K, S, n, D]``."""
        out: list[Tensor | None] = []
        for tape, names in zip(self.tapes, self.names, strict=True):
            found = tape.gradients()
            out += [found.get(name) for name in names]
        if any(self.learned) and self.of_velocity is not None:
            lam = lam + self.of_velocity
        for tape, learned in zip(self.turned, self.learned, strict=True):
            if learned:
                g = tape.outputs(frozenset({"gradient"}))["gradient"]
                out.append(torch.bmm(lam.flatten(1, 2).mT, g.flatten(1, 2)))
        return out


def _turn(g: Tensor, form: Tensor | None) -> Tensor:
    if form is None:
        return canonical(g)
    return g @ (form.mT if g.ndim == 3 else form.mT.unsqueeze(1))


def _turn_back(lam: Tensor, form: Tensor | None) -> Tensor:
    if form is None:
        return canonical(lam).neg_()
    return lam @ (form if lam.ndim == 3 else form.unsqueeze(1))
