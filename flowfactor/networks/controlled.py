"""What potentials and fields share: K parts of dimension D, under a control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowfactor._checks import check_count
from flowfactor._tensors import check_dense
from flowfactor.context import Context, ContextSize, context_size, features_of, resolve_context
from flowfactor.control import Control, ResolvedControl, resolve_at, times
from flowfactor.registry import Recorded


class Controlled(Recorded, nn.Module):
    """A module of K parts that act on states of size D, chosen by a control.

    Args:
        dim: D.
        num_flows: K.
        context: C, the number of features of each sample that steer it (see `flowfactor.context`), or a number for each
            name; 0 for none.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If it is too small.
    """

    def __init__(self, dim: int, num_flows: int = 1, context: ContextSize = 0) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.num_flows = check_count("num_flows", num_flows)
        self.context_size = context_size(context)

    @property
    def context_dim(self) -> int:
        """C, the number of all features of the context together; 0 for a part that takes none."""
        return features_of(self.context_size)

    one_method: ClassVar[str]
    """The method by which a subclass says what a part computes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What a subclass says in its one method holds, also where the class it derives from binds closed forms instead.
        if getattr(cls, "one_method", None) in vars(cls) and not {"bind", "_bind_stack"} & vars(cls).keys():
            base = next(kind for kind in cls.__mro__ if "one_method" in vars(kind))
            cls.bind = base.bind

    def binds_one_method(self) -> bool:
        """Whether a bound part is evaluated by its one method, not by closed forms."""
        base: Any = next(kind for kind in type(self).__mro__ if "one_method" in vars(kind))
        return type(self).bind is base.bind

    def _bind_in_closed_form(self) -> Any:
        """The `bind` of the closest ancestor that does not go by its one method; None where there is none."""
        kinds = type(self).__mro__
        base: Any = next(kind for kind in kinds if "one_method" in vars(kind))
        return next((vars(k)["bind"] for k in kinds if "bind" in vars(k) and vars(k)["bind"] is not base.bind), None)

    def _one(self, k: int, context: Context | None) -> Callable[[Tensor, Tensor], Any]:
        """What a subclass says that part k computes, as a function of state and time."""
        method = getattr(self, self.one_method)
        if context is None:
            return lambda z, t: method(z, t, k)
        return lambda z, t: method(z, t, k, context)

    def _checked(
        self, z: Tensor, t: float | Tensor, control: Control, context: Context | None
    ) -> tuple[Tensor, ResolvedControl]:
        """Checks the arguments of an evaluation; returns the time as a tensor, and control and context at that time."""
        check_state(z, self.dim, self)
        t = times(t, z)
        if t.ndim and t.shape != z.shape[:-1]:
            raise ValueError(f"t must be a scalar or one time per sample {list(z.shape[:-1])}, got {list(t.shape)}")
        resolved = resolve_at(control, t, z.shape[:-1], self.num_flows, dtype=z.dtype, device=z.device)
        return t, replace(resolved, context=self.resolve_context(context, z))

    def resolve_context(self, context: Context | None, z: Tensor) -> Context | None:
        """Checks a context and spreads it over the batch of the states ``z [*batch, D]``.

        Raises:
            TypeError: If it is of another kind or dtype.
            ValueError: If it is missing, unexpected or does not fit.
        """
        return resolve_context(context, self.context_size, z.shape[:-1], like=z, part=type(self).__name__)


def check_state(z: object, dim: int, module: nn.Module) -> None:
    """Checks that ``z`` is a floating-point state ``[*batch, dim]`` that fits a module's parameters.

    Args:
        z: The state.
        dim: D.
        module: Whose parameters it has to fit in dtype and device.

    Raises:
        TypeError: If it is no floating-point tensor or of another dtype than the parameters.
        ValueError: If its last dimension is not ``dim`` or it lies on another device.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"a state must be a tensor [*batch, {dim}], got {type(z).__name__}")
    check_dense("a state", z)
    if not z.is_floating_point():
        raise TypeError(f"a state must be of a floating-point dtype, got {z.dtype}; convert it with .float()")
    if z.ndim == 0 or z.shape[-1] != dim:
        raise ValueError(f"a state must have shape [*batch, {dim}], got {list(z.shape)}")
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return
    if parameter.device != z.device:
        raise ValueError(f"the state is on {z.device} and the parameters on {parameter.device}; move one with .to(...)")
    if parameter.dtype != z.dtype and not torch.is_autocast_enabled(z.device.type):
        raise TypeError(f"the state is {z.dtype} and the parameters are {parameter.dtype}; convert one with .to(...)")
