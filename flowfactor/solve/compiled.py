"""Compiled solves: a solve of fixed steps repeats one compiled step, any other calls one compiled evaluation.

Unrolling a whole solve would compile as long as it is deep, and anew for every number of steps. One step is one program for
all of them, and for all batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributions import Distribution
from torchdiffeq._impl.odeint import SOLVERS

from flowfactor._functorch import is_plain
from flowfactor.fields.base import Field
from flowfactor.solver import FIXED_METHODS, MULTISTEP_METHODS, Solver

RHS = Callable[[Tensor, Tensor], Tensor]
ONE_STEP_METHODS = tuple(method for method in FIXED_METHODS if method not in MULTISTEP_METHODS)
_UNPERTURBED: Any = SimpleNamespace(perturb=False)  # all that torchdiffeq's steps ask of their solver


def _evaluate(rhs: RHS, t: Tensor, y: Tensor) -> Tensor:
    return rhs(t, y)


def _step(kind: Any, rhs: RHS, t: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """The state at ``e``, by torchdiffeq's step from ``t``."""
    return y + kind._step_func(_UNPERTURBED, lambda t, y, perturb=None: rhs(t, y), t, e - t, e, y)[0]


class Program:
    """What is compiled for the solves of one field."""

    def __init__(self) -> None:
        self.evaluate = _compile(_evaluate)
        self.step = _compile(_step)

    @staticmethod
    def rolls(solver: Solver) -> bool:
        """Whether the method's steps can be taken one by one: torchdiffeq's options know other steps."""
        return solver.method in ONE_STEP_METHODS and not solver.options

    def roll(self, method: str, rhs: RHS, y: Tensor, grid: Tensor, t: Tensor) -> Tensor:
        """Takes the steps of a grid.

        Args:
            method: The method.
            rhs: The right-hand side.
            y: State at the start, ``[*batch, S]``.
            grid: Where steps begin and end.
            t: Times on the grid that are wanted, the first and the last among them, ``[T]``.

        Returns:
            States ``[T, *batch, S]``.
        """
        wanted, path = set(t.tolist()), [y]
        times = [time.clone() for time in grid]  # a view would have the program depend on the number of steps
        for i, end in enumerate(grid[1:].tolist(), 1):
            y = self.step(SOLVERS[method], rhs, times[i - 1], times[i], y)
            if end in wanted:
                path.append(y)
        return torch.stack(path)


_programs: WeakKeyDictionary[Field, Program] = WeakKeyDictionary()


def program_of(field: Field) -> Program | None:
    """The field's program; None where another compiler, a transform or a forward derivative has to see what it does."""
    if not is_plain():
        return None
    if field not in _programs:
        _programs[field] = Program()
    return _programs[field]


def _compile(function: Any) -> Any:
    # torch.compile counts programs by a function's code, and from the ninth on runs uncompiled: each field has its own copy.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    validates = Distribution._validate_args
    # The compiler would build three programs, for six seconds, to try the instructions that torch itself runs by here.
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    compiled = torch.compile(own, dynamic=True, options={"cpp.vec_isa_ok": True} if known else None)
    # The first call in a process stops all of torch's distributions from checking their parameters.
    Distribution.set_default_validate_args(validates)
    return compiled
