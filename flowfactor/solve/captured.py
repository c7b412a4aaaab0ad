"""Finds the tensors that a function captures and that gradients have to reach.

The adjoint and checkpoint modes cut the autograd graph around a solve, so they need every tensor on which the field
depends: parameters, but also context tensors, weights and forces that a closure or an attribute holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flowfactor._functorch import is_wrapped, unwrapped


class _Recorder(TorchFunctionMode):
    """Notes every tensor that enters an operation, needs a gradient and was not made by an earlier operation."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {id(x): x for x in inputs}
        self.entered: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.made and _is_plain(x) and x.requires_grad:
                self.entered.setdefault(id(x), x)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            while isinstance(x, Tensor) and id(x) not in self.entered:
                self.made[id(x)] = x
                if not is_wrapped(x):
                    break
                x = unwrapped(x)  # as a transform of torch.func hands it out
        return out


def captured_tensors(function: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Lists the tensors, other than its arguments, through which gradients of ``function(t, y)`` must flow.

    Intermediate tensors (a context that an encoder made) are kept as they are where that is sound, so that their own
    graph is walked once and not at every stage. Where one captured tensor depends on another, a gradient through both
    would count twice; then the leaves of the whole graph are returned instead.

    Args:
        function: ``(t, y) -> dy/dt``.
        t: A time at which it is evaluated.
        y: A state.

    Returns:
        The tensors; empty where nothing needs a gradient.
    """
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        t = t.detach().to(y.dtype)
        with _Recorder((t, y)) as recorder:
            out = function(t, y)
    if out.grad_fn is None:
        return ()
    entered = list(recorder.entered.values())
    edges = {(x.grad_fn, x.output_nr): x for x in entered if x.grad_fn is not None}
    found, leaves = _walk(out.grad_fn, edges)
    below: dict[int, Tensor] = {}
    overlap = False
    for x in found:
        others = {edge: other for edge, other in edges.items() if other is not x}
        inner, inner_leaves = _walk(x.grad_fn, others)
        # What depends on the state was made by the field, out of sight of the recorder (torch.func unwraps its results).
        overlap |= bool(inner) or id(y) in inner_leaves or any(key in leaves for key in inner_leaves)
        below |= inner_leaves
    for tensors in (leaves, below):
        tensors.pop(id(y), None)
    if overlap:
        return tuple((leaves | below).values())
    return (*leaves.values(), *found)


class Watch:
    """What a field was at a solve, for the gradient modes that evaluate it again in the backward pass.

    Args:
        rhs: The right-hand side.
        t: A time of the solve.
        y: The state there.
        parts: The modules in it: the field, and costs that are modules.
        mode: The gradient mode, for messages.
    """

    def __init__(
        self, rhs: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, parts: Iterable[Any], mode: str
    ) -> None:
        self.rhs, self.t, self.y, self.mode = rhs, t.detach(), y.detach(), mode
        self.captured = captured_tensors(rhs, t, y)
        modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
        self.training = [(module, module.training) for module in modules]

    def guard(self, ys: Tensor) -> Tensor:
        """The states, whose backward pass is refused where its gradients would be others than those of the solve."""
        return _Guard.apply(self, ys) if ys.requires_grad else ys

    def check(self) -> None:
        """Raises RuntimeError where the backward pass would not see what the solve saw."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f'gradient="{self.mode}" has no gradients of gradients for a field that the general engine solves: take '
                'gradient="direct"'
            )
        for module, was in self.training:
            if module.training != was:
                names = ("evaluation", "training")
                raise RuntimeError(
                    f"{type(module).__name__} was in {names[was]} mode in the solve and is in {names[not was]} mode in its "
                    f'backward pass, and gradient="{self.mode}" evaluates it again: call backward first, or take '
                    'gradient="direct"'
                )
        if {id(x) for x in captured_tensors(self.rhs, self.t, self.y)} != {id(x) for x in self.captured}:
            raise RuntimeError(
                "the field depends on other tensors than in the solve (one of its attributes was replaced, or "
                f'torch.func.functional_call has ended), and gradient="{self.mode}" evaluates it again: call backward '
                'first, or take gradient="direct"'
            )


class _Guard(torch.autograd.Function):
    """The identity, whose backward pass checks first."""

    @staticmethod
    def forward(ctx: Any, watch: Watch, ys: Tensor) -> Tensor:
        ctx.watch = watch
        return ys.view_as(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.check()
        return None, grads[0]


def _walk(start: Any, edges: dict[tuple[Any, int], Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Walks a graph down to the given edges: the tensors met there, and the leaves met otherwise."""
    met: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    seen = {start}
    stack = [start]
    if hasattr(start, "variable"):
        leaves[id(start.variable)] = start.variable
    while stack:
        for node, number in stack.pop().next_functions:
            if node is None:
                continue
            if (node, number) in edges:
                x = edges[(node, number)]
                met[id(x)] = x
            elif hasattr(node, "variable"):
                leaves[id(node.variable)] = node.variable
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return list(met.values()), leaves


def _is_plain(x: Tensor) -> bool:
    return not is_wrapped(x)
