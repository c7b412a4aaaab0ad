"""How a flow is solved: the method, its tolerances, the engine, and how gradients are found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flowfactor.errors import renamed

ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
CLOSED_FORM_METHODS = ("dopri5", "dopri8", "bosh3", "euler", "midpoint", "heun2", "heun3", "rk4")
MULTISTEP_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams")
SCIPY_METHOD = "scipy_solver"
SOLVER_METHODS = (*ADAPTIVE_METHODS, *FIXED_METHODS, SCIPY_METHOD)

Gradient: TypeAlias = Literal["direct", "adjoint", "checkpoint"]
EngineChoice: TypeAlias = Literal["auto", "general", "closed form"]


@dataclass(frozen=True)
class Solver:
    """Settings of an ODE solve by the methods of torchdiffeq.

    Args:
        method: ``dopri5`` (default), ``dopri8``, ``bosh3``, ``fehlberg2`` or ``adaptive_heun`` choose their steps by
            the tolerances; ``euler``, ``midpoint``, ``heun2``, ``heun3``, ``rk4``, ``explicit_adams``,
            ``implicit_adams`` and ``fixed_adams`` take steps of ``step_size`` (``explicit_adams`` of order 5, since higher
            ones are unstable at usual steps; ``options={"max_order": 8}`` says otherwise); ``scipy_solver`` hands over to
            SciPy (no gradients but by the adjoint; choose SciPy's own method by ``options={"solver": "LSODA"}``).
            ``dopri5`` and ``bosh3`` read outputs off inside of their steps, by polynomials as accurate as these, and land on
            the last one and where a schedule switches; the other adaptive methods have no such polynomial and land on every
            output, so that many outputs cost them evaluations. What is read off need not be within the tolerance of a
            solve that lands, only of its order.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        gradient: How gradients are found. ``"direct"`` backpropagates through the solver's operations; ``"adjoint"``
            solves the continuous adjoint equation backwards in time, with memory that does not grow with the steps and
            gradients correct to the tolerance (Chen et al., NeurIPS 2018, algorithm 1); ``"checkpoint"`` keeps at most
            one state an output and replays the steps between them in the backward pass, with direct's gradient (not for
            the adams methods, whose steps depend on one another).
        norm: ``"sample"``: the step error is the worst sample's root mean square, so that a sample's accuracy does not
            depend on what it is batched with. ``"batch"``: the root mean square over the whole batch.
        step_size: Longest step of the fixed-step methods, in frames; None takes one step from each output time to the
            next. Steps land on output times exactly.
        max_steps: Attempted steps, over a whole solve, after which it is given up. A solve that is held back by
            stiffness and could not end within the limit is given up early.
        options: Further options for torchdiffeq's solver.
        compile: Whether `torch.compile` makes a program of the field, its divergence and the running costs: of one step
            for the methods of fixed steps (adams aside), which a solve repeats, else of one evaluation. It pays for
            potentials and fields of your own, whose derivatives come from automatic differentiation; those built in have
            closed forms, which it replaces. The first solve waits for the compiler, later processes for its cache. Goes
            with ``gradient="direct"``; gradients of gradients, and ``backward(retain_graph=True)``, cannot be had.
        remember_steps: Whether a flow in training mode plans its steps by those of the solve before, in the same direction:
            fewer evaluations, with a result that differs within the tolerance. In closed form, where steps land on the last
            time alone, the errors that it met say how few steps over the same time, or a part of it, keep within the
            tolerance, each with an equal share of the error; a step that fails hands over to the usual control. Elsewhere
            the first step alone is remembered, in place of looking for one and growing it. What is remembered are buffers of
            the flow, so that a training that goes on from a checkpoint is the same; in ``eval()`` mode nothing is
            remembered or used. For adaptive methods; the way back of ``gradient="adjoint"`` looks for its own first step.
        engine: What takes the steps. ``"auto"``: closed forms of the field's derivatives and of the solve's adjoint,
            without an autograd graph, where the field and the running costs have them; else the general engine,
            torchdiffeq and autograd. Both take the same steps with the same result, up to rounding; `SolveStats.engine`
            and `SolveStats.reason` say which one ran and why. ``"general"``: the general engine always. ``"closed form"``:
            a solve that would leave the closed form is refused with the reason.

    Raises:
        ValueError: If a setting is unknown or out of range.

    Example:
        >>> import flowfactor as ff
        >>> ff.Solver("rk4", step_size=0.25).adaptive
        False
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: Gradient = "direct"
    norm: Literal["sample", "batch"] = "sample"
    step_size: float | None = None
    max_steps: int = 100_000
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    compile: bool = False
    engine: EngineChoice = "auto"
    remember_steps: bool = False

    def __post_init__(self) -> None:
        if self.method not in SOLVER_METHODS:
            raise ValueError(f"unknown method {self.method!r}; torchdiffeq has {', '.join(SOLVER_METHODS)}")
        if self.gradient not in ("direct", "adjoint", "checkpoint"):
            raise ValueError(f'gradient must be "direct", "adjoint" or "checkpoint", got {self.gradient!r}')
        if self.gradient == "checkpoint" and self.method in MULTISTEP_METHODS:
            raise ValueError(
                f'gradient="checkpoint" replays single steps, and one of {self.method} depends on those before it: take '
                'gradient="direct" or "adjoint", or a method of one step such as rk4'
            )
        if self.norm not in ("sample", "batch"):
            raise ValueError(f'norm must be "sample" or "batch", got {self.norm!r}')
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
        if self.rtol == 0 and self.atol == 0:
            raise ValueError("rtol and atol cannot both be 0: no step would ever be accurate enough")
        if self.step_size is not None:
            if not (isinstance(self.step_size, (int, float)) and 0 < self.step_size < math.inf):
                raise ValueError(f"step_size must be a positive number of frames, got {self.step_size!r}")
            if self.adaptive:
                raise ValueError(
                    f"{self.method} chooses its steps by rtol and atol; step_size goes with {', '.join(FIXED_METHODS)}"
                )
        if "step_size" in self.options or "grid_constructor" in self.options:
            raise ValueError("options cannot hold step_size or grid_constructor: give Solver(step_size=...) instead")
        if not isinstance(self.compile, bool):
            raise ValueError(f"compile must be True or False, got {self.compile!r}")
        if self.compile and (self.gradient != "direct" or self.method == SCIPY_METHOD):
            raise ValueError(
                f'compile=True goes with gradient="direct" and a method of torch: the backward pass of a compiled program '
                f"consumes what other modes keep; got gradient={self.gradient!r} and method={self.method!r}"
            )
        self._check_memory()
        if self.engine not in ("auto", "general", "closed form"):
            raise ValueError(f'engine must be "auto", "general" or "closed form", got {self.engine!r}')
        if self.engine == "closed form":
            self._check_closed_form()
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {self.max_steps!r}")

    def _check_memory(self) -> None:
        if not isinstance(self.remember_steps, bool):
            raise ValueError(f"remember_steps must be True or False, got {self.remember_steps!r}")
        if self.remember_steps and self.method not in ADAPTIVE_METHODS:
            raise ValueError(
                f"remember_steps=True goes with {', '.join(ADAPTIVE_METHODS)}, which choose their steps; got "
                f"method={self.method!r}"
            )
        if self.remember_steps and "first_step" in self.options:
            raise ValueError("remember_steps=True chooses first steps itself: leave first_step out of options")

    def _check_closed_form(self) -> None:
        if self.method not in CLOSED_FORM_METHODS:
            raise ValueError(
                f'engine="closed form" goes with {", ".join(CLOSED_FORM_METHODS)}; got method={self.method!r}'
            )
        if self.compile or self.options:
            which = "compile=True" if self.compile else f"options={self.options!r}"
            raise ValueError(f'engine="closed form" does not go with {which}, which only the general engine can follow')

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method not in FIXED_METHODS

    def error_norm(self, steered: int) -> Any:
        """The norm of a step's error over the first ``steered`` columns of a state ``[*batch, S]``.

        It is detached: step sizes are chosen, not differentiated.
        """
        if self.norm == "batch":
            return lambda y: y.detach()[..., :steered].square().mean().sqrt()
        return lambda y: y.detach()[..., :steered].square().mean(-1).amax().sqrt()

    def grid(self, t: Tensor) -> Tensor:
        """The step times of a fixed-step method: equal steps of at most ``step_size`` between output times.

        Args:
            t: Output times ``[T]``.

        Returns:
            Step times ``[S]``, all output times among them.
        """
        if self.step_size is None:
            return t
        pieces = [t[:1]]
        for a, b in zip(t[:-1], t[1:], strict=True):
            # A hair of slack keeps 0.1-steps over one frame at ten, whatever the rounding.
            steps = max(1, math.ceil(abs(float((b - a).detach())) / self.step_size * (1 - 1e-6)))
            fractions = torch.arange(1, steps + 1, dtype=t.dtype, device=t.device) / steps
            pieces.append(torch.cat([(a + (b - a) * fractions)[:-1], b.reshape(1)]))
        return torch.cat(pieces)


__getattr__ = renamed(__name__, {"METHODS": "SOLVER_METHODS"})
