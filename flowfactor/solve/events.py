"""Where a path meets an event: each sample is followed until a function of its own changes sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.path import SolveStats
from flowfactor.solve.problem import Cost
from flowfactor.transforms import one_time

Event: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_MOST = 60  # refinements of a bracket; bisection alone would be through by then


@dataclass(frozen=True)
class EventPath:
    r"""Where each sample was stopped.

    Attributes:
        t: Time of each sample's event, ``[*batch]``, in frames; the last time where it had none.
        z: States there, ``[*batch, D]``.
        happened: Whether there was an event, ``[*batch]``.
        log_det: $\ln |\det \partial z_t / \partial z_{t_0}|$ at fixed t, ``[*batch]``; None where it was not asked for.
        costs: Running costs by name, integrated up to there, ``[*batch]``.
        stats: What the solve that led there took, without the search.
    """

    t: Tensor
    z: Tensor
    happened: Tensor
    log_det: Tensor | None = None
    costs: dict[str, Tensor] = field(default_factory=dict)
    stats: SolveStats = field(default_factory=SolveStats)


class Events:
    """What `LatentFlow` does until something happens. It calls itself and its ``velocity``."""

    def until(
        self: Any, z0: Tensor, event: Event, t_max: float, control: Control = 0, *, context: Context | None = None,
        t0: float = 0.0, log_det: bool = False, costs: Mapping[str, Cost] | None = None, checks: int = 32,
        generator: torch.Generator | None = None,
    ) -> EventPath:  # fmt: skip
        r"""Follows each sample until its event: the first change of sign of $g(z_t, t)$ after ``t0``.

        The sign is looked at ``checks`` times on the way, evenly spread; the first change is then narrowed down to rounding.
        A function that changes its sign twice between two looks goes unseen: raise ``checks`` for it. One that is 0 at the
        start has no sign there, and no event before it has had one; to go on from a state that was found, begin a little
        later, or ask for the sign on the other side: rounding leaves it to either.

        Gradients are those of the event's own time, by the implicit function theorem (Chen, Amos and Nickel, ICLR 2021,
        eq. 9): $dt^* = -(\partial g/\partial z\,dz + dg) / (\partial g/\partial z\,v + \partial g/\partial t)$, in all of
        ``t``, ``z``, the log-determinant and the costs.

        Args:
            z0: States at ``t0``, ``[*batch, D]``.
            event: $g$, called with states ``[*batch, D]`` and times ``[*batch]``; one number a sample, ``[*batch]``.
            t_max: When to stop samples without an event, in frames; it may lie before ``t0``.
            control: Which flow acts.
            context: What steers it.
            t0: The start, in frames.
            log_det: Whether to carry the log-determinant.
            costs: Running costs.
            checks: How often the sign is looked at.
            generator: Source of Hutchinson's probes.

        Returns:
            Where each sample was stopped.

        Raises:
            TypeError: As a solve, or if the event gives no tensor or ``checks`` is no integer.
            ValueError: As a solve, or if the event gives another shape, dtype or NaN, if it only touches 0, where its time
                has no gradient, or if ``t0`` or ``t_max`` asks for one.
            FlowSolveError: If a solve fails.

        Example:
            >>> import torch, flowfactor as ff
            >>> growth = ff.LatentFlow(ff.fields.from_module(lambda z, t: z, dim=1))
            >>> z0 = torch.tensor([[0.5], [0.25], [0.01]])
            >>> found = growth.until(z0, lambda z, t: z[..., 0] - 1, t_max=2.0)      # z_t = e^t z_0 reaches 1
            >>> found.t.round(decimals=3), found.happened
            (tensor([0.6930, 1.3860, 2.0000]), tensor([ True,  True, False]))
        """
        if not callable(event):
            raise TypeError(f"an event is called as g(z [*batch, D], t [*batch]); got {type(event).__name__}")
        if isinstance(z0, Tensor) and z0.ndim == 1:  # times of each of no samples would be those of all
            more = {"context": context, "t0": t0, "log_det": log_det, "costs": costs, "checks": checks}
            path = self.until(z0.unsqueeze(0), _of_one(event), t_max, control, **more, generator=generator)
            integrals = {name: cost[0] for name, cost in path.costs.items()}
            last = None if path.log_det is None else path.log_det[0]
            return EventPath(path.t[0], path.z[0], path.happened[0], last, integrals, path.stats)
        for name, time in (("t0", t0), ("t_max", t_max)):
            if isinstance(one_time(name, time), Tensor):
                raise ValueError(
                    f"{name} has no gradient in until, only the event's own time has: give {name}.detach()"
                )
        begin, end = float(t0), float(t_max)
        if begin == end:
            raise ValueError(f"t_max must differ from t0, got {end:g} for both")
        how = {"context": context, "generator": generator}
        with torch.no_grad():
            found, happened = _search(self, z0, event, begin, end, check_count("checks", checks), control, how)
        clocks = torch.stack([torch.full_like(found, begin), found])
        if torch.is_grad_enabled():
            z = self(z0, clocks, control, **how).z[-1]
            if z.requires_grad or _value(event, z, found).requires_grad:
                found = _with_gradient(self, event, z, found, happened, control, context)
                clocks = torch.stack([clocks[0], found])
        path = self(z0, clocks, control, **how, log_det=log_det, costs=costs)
        last = None if path.log_det is None else path.log_det[-1]
        integrals = {name: cost[-1] for name, cost in path.costs.items()}
        return EventPath(found.to(path.z.dtype), path.z[-1], happened, last, integrals, path.stats)


def _search(
    flow: Any, z0: Tensor, event: Event, begin: float, end: float, checks: int, control: Control, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The time of each sample's first event, and whether there was one."""
    wide = torch.float64 if z0.device.type != "mps" else torch.float32
    grid = torch.linspace(begin, end, checks + 1, dtype=wide, device=z0.device)
    states = flow(z0, grid, control, **how).z
    values = torch.stack([_value(event, z, t.expand(z.shape[:-1])) for z, t in zip(states, grid, strict=True)])
    signs = values.sign()
    turns = (signs[:-1] * signs[1:] < 0) | ((signs[:-1] != 0) & (signs[1:] == 0))
    happened = turns.any(0)
    first = turns.to(torch.int8).argmax(0)
    low, high = grid[first], grid[first + 1]
    start, since = _at(states, first), low
    g_low, g_high = (_at(values.unsqueeze(-1), i).squeeze(-1).to(wide) for i in (first, first + 1))
    # Closer to the start of a bracket than this, no solve can tell two times apart.
    least = 256 * torch.finfo(z0.dtype).eps * max(abs(begin), abs(end))
    for step in range(_MOST):
        open_ = happened & ((high - low).abs() > least / 64) & (g_high != 0)
        if not bool(open_.any()):
            break
        # The secant, with the value of an end that stays halved (Illinois); every third time the middle, which is sure.
        share = (g_low / (g_low - g_high)).nan_to_num(0.5).clamp(0.02, 0.98) if step % 3 else 0.5
        middle = low + (high - low) * share
        middle = torch.where(open_, middle, high)
        near = (middle - since).abs() < least
        z = flow(start, torch.stack([since, torch.where(near | ~open_, since, middle)]), control, **how).z[-1]
        g = _value(event, z, middle).to(wide)
        before = g * g_low > 0
        g_high = torch.where(open_, torch.where(before, g_high / 2, g), g_high)
        high = torch.where(open_ & ~before, middle, high)
        g_low = torch.where(open_, torch.where(before, g, g_low / 2), g_low)
        low = torch.where(open_ & before, middle, low)
    found = torch.where(happened, high, grid[-1])
    return torch.where((found - begin).abs() < least, grid[0], found), happened


def _with_gradient(
    flow: Any, event: Event, z: Tensor, t: Tensor, happened: Tensor, control: Control, context: Context | None
) -> Tensor:
    """Event times with the gradient that the states ``z`` there, and the event's own tensors, give them."""
    at, when = z.detach().requires_grad_(), t.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = _value(event, at, when)
        slopes = (None, None)
        if value.requires_grad:
            slopes = torch.autograd.grad(value.sum(), [at, when], allow_unused=True)
    with torch.no_grad():
        velocity = flow.velocity(z.detach(), t.to(z.dtype), control, context=context)
    along = torch.zeros_like(t) if slopes[0] is None else (slopes[0] * velocity).sum(-1).to(t)
    rate = along if slopes[1] is None else along + slopes[1]
    flat = happened & ((rate == 0) | ~rate.isfinite())
    if bool(flat.any()):
        raise ValueError(
            f"the event of sample {flat.nonzero()[0].tolist()} only touches 0 (its rate there is 0), so that its time has "
            "no gradient: solve under torch.no_grad(), or take an event that crosses 0"
        )
    shift = -_value(event, z, t).to(t) / torch.where(happened, rate, 1)
    return t + torch.where(happened, shift - shift.detach(), 0)


def _of_one(event: Event) -> Event:
    """An event of one state ``[D]`` for a batch of it."""

    def of_batch(z: Tensor, t: Tensor) -> Any:
        g = event(z[0], t[0])
        return g.unsqueeze(0) if isinstance(g, Tensor) and g.ndim == 0 else g

    return of_batch


def _value(event: Event, z: Tensor, t: Tensor) -> Tensor:
    g = event(z, t.to(z.dtype))
    if not isinstance(g, Tensor):
        raise TypeError(f"an event must return a tensor [*batch], got {type(g).__name__}")
    if g.shape != z.shape[:-1] or not g.is_floating_point():
        raise ValueError(
            f"an event must return one floating-point number a sample, shape {list(z.shape[:-1])}; got {g.dtype} "
            f"{list(g.shape)}"
        )
    if not bool(torch.isfinite(g.detach()).all()):
        raise ValueError(f"the event is NaN or infinite, first at t={float(t.flatten()[0]):g}")
    return g


def _at(x: Tensor, index: Tensor) -> Tensor:
    """``x [T, *batch, E]`` at an index of each sample ``[*batch]``."""
    return x.gather(0, index.reshape(1, *index.shape, 1).expand(1, *x.shape[1:])).squeeze(0)
