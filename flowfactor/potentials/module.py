"""Potentials made of modules that the user already has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from flowfactor.context import Context, ContextSize
from flowfactor.potentials.base import Potential


class ModulePotential(Potential):
    """K potentials, each a module or function of the user's; made by `from_module`."""

    def __init__(self, modules: Sequence[Callable[..., Tensor]], dim: int, context: ContextSize = 0) -> None:
        parts = list_of_modules(modules)
        super().__init__(dim, len(parts), context)
        self.parts = parts

    def flow_potential(self, z: Tensor, t: Tensor, k: int, context: Context | None = None) -> Tensor:
        """Calls the k-th module."""
        return self.parts[k](z, t) if context is None else self.parts[k](z, t, context)


class FunctionModule(nn.Module):
    """Lets a plain function stand where a module is held; it owns no parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, t: Tensor, *context: Context) -> Tensor:
        """Calls the function."""
        return self.function(z, t, *context)


def list_of_modules(modules: Sequence[Callable[..., Tensor]]) -> nn.ModuleList:
    """Holds modules as they are and wraps plain functions; raises TypeError for anything else."""
    if not modules:
        raise ValueError("at least one module is needed, got none")
    for module in modules:
        if not callable(module):
            raise TypeError(f"a module is called as m(z, t); {type(module).__name__} cannot be called")
        names = _arguments(module)
        if names[:1] and names[0] in _TIMES and len(names) > 1 and names[1] not in _TIMES:
            raise ValueError(
                f"a module is called as m(z, t), state first; this one takes ({', '.join(names[:2])}): swap them, for "
                "example from_module(lambda z, t: module(t, z), dim)"
            )
    return nn.ModuleList([m if isinstance(m, nn.Module) else FunctionModule(m) for m in modules])


_TIMES = ("t", "time", "times")


def _arguments(module: Callable[..., Tensor]) -> list[str]:
    """The names of a callable's positional arguments; none where they cannot be known."""
    try:
        signature = inspect.signature(module.forward if isinstance(module, nn.Module) else module)
    except (TypeError, ValueError):
        return []
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, one in signature.parameters.items() if one.kind in positional]


def from_module(
    module: Callable[..., Tensor] | Sequence[Callable[..., Tensor]], dim: int, *, context: ContextSize = 0
) -> Potential:
    """Makes a potential of any module, or K potentials of a list of K modules.

    Derivatives come from automatic differentiation (torch.func), which works under no_grad, inside other torch.func
    transforms and for inputs that need no gradient. The exact Laplacian costs D reverse passes.

    Args:
        module: A module or function called as ``m(z [*batch, D], t [*batch]) -> [*batch]``, or a list of K of them. It
            must treat samples independently of each other. With one flow for all it sees the batch as given; under a
            control with one flow per sample it sees the samples of its own flow alone, as ``[n, D]``.
        dim: D.
        context: C, the number of features of a context, which modules then take as their third argument,
            ``m(z, t, context [*batch, C])``; or a number for each name, for a mapping of tensors. 0 for none.

    A solve refuses modules in training mode that draw at random or look at the whole batch (BatchNorm, Dropout, ...); random
    numbers that a ``forward`` draws by itself it cannot see: draw them once a solve, outside.

    Returns:
        The potential.

    Raises:
        TypeError: If something in it cannot be called.
        ValueError: If the list is empty, or a module takes the time first.

    Example:
        >>> import torch, flowfactor as ff
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1))
        >>> u = ff.potentials.from_module(lambda z, t: net(z).squeeze(-1), dim=2)
        >>> u.derivatives(torch.zeros(3, 2), 0.0, laplacian="exact").gradient.shape
        torch.Size([3, 2])
    """
    if isinstance(module, (nn.ModuleList, list, tuple)):
        return ModulePotential(list(module), dim, context)
    if not callable(module):
        raise TypeError(f"from_module takes a module or a list of modules, got {type(module).__name__}")
    return ModulePotential([module], dim, context)
