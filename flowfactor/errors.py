"""Errors that flowfactor raises, the guard for optional dependencies, and names that have changed."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Reason = Literal["nan", "blowup", "stiff", "steps", "underflow"]


class FlowSolveError(RuntimeError):
    """A solve of a latent flow failed.

    The message says where the solve stopped and what to try; the attributes carry the same facts for programs.

    Args:
        message: What happened and what to try.
        reason: ``"nan"`` (the field became NaN or infinite), ``"blowup"`` (the state runs off to infinity),
            ``"stiff"`` (steps are held tiny by stability),
            ``"steps"`` (the step limit was reached) or ``"underflow"`` (the step fell below what the time can resolve).
        time: Time at which the solve stopped, in frames.
        step: Number of accepted steps before it stopped.
        sample: Index of the first bad sample in the batch, or None where no single sample is to blame.

    Example:
        >>> import flowfactor as ff
        >>> raise ff.FlowSolveError("blew up", reason="nan", time=0.5, step=3, sample=(0,))
        Traceback (most recent call last):
        ...
        flowfactor.errors.FlowSolveError: blew up
    """

    def __init__(
        self, message: str, *, reason: Reason, time: float, step: int, sample: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.time = time
        self.step = step
        self.sample = sample

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles with the details, so that the error of a worker process arrives whole."""
        details = {"reason": self.reason, "time": self.time, "step": self.step, "sample": self.sample}
        return partial(type(self), **details), self.args


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it.

    Args:
        module: Dotted name, for example ``"PIL.Image"``.
        extra: The extra of flowfactor that installs it, for example ``"plot"``.

    Returns:
        The imported module.

    Raises:
        ImportError: If it is not installed; the message names the extra.

    Example:
        >>> require("math", extra="plot").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise  # the package is there but one of its own dependencies is not: its message is the better one
        raise ImportError(
            f"{package} is needed here and is not installed. It comes with an extra: pip install 'flowfactor[{extra}]'"
        ) from error


def renamed(module: str, names: Mapping[str, str], stacklevel: int = 2) -> Callable[[str], Any]:
    """Makes a module's ``__getattr__`` that gives old names their new meaning, with a `DeprecationWarning`.

    Args:
        module: The module's name.
        names: New names, which the module has, by old ones.
        stacklevel: Calls up from the function to the line that is warned of.

    Returns:
        The function, which raises `AttributeError` for any other name.

    Example:
        >>> get = renamed("math", {"squareroot": "sqrt"})
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     get("squareroot")(9.0), str(told[0].message)
        (3.0, 'math.squareroot is now math.sqrt; the old name goes in the next release')
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        message = f"{module}.{name} is now {module}.{new}; the old name goes in the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
        return getattr(sys.modules[module], new)

    return get


def renamed_arguments(**names: str) -> Callable[[type[T]], type[T]]:
    """Makes a class take arguments under former names too, with a `DeprecationWarning`: decorates the class.

    What was saved under a former name loads without one (see ``renamed_arguments`` of the class).

    Args:
        **names: New names by old ones.

    Returns:
        A decorator of the class.

    Example:
        >>> @renamed_arguments(colour="hue")
        ... class Paint:
        ...     def __init__(self, hue=0.0):
        ...         self.hue = hue
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     Paint(colour=0.5).hue, str(told[0].message)
        (0.5, 'colour is called hue now; the old name goes in the next release')
    """

    def decorate(cls: type[T]) -> type[T]:
        init: Any = cls.__init__

        @functools.wraps(init)
        def wrapped(self: T, *args: Any, **kwargs: Any) -> None:
            for old in [name for name in kwargs if name in names]:
                new = names[old]
                if new in kwargs:
                    raise ValueError(
                        f"{old} is the former name of {new}: give one, got {kwargs[old]} and {kwargs[new]}"
                    )
                message = f"{old} is called {new} now; the old name goes in the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            init(self, *args, **kwargs)

        cls.__init__ = wrapped
        cls.renamed_arguments = names  # type: ignore[attr-defined]
        return cls

    return decorate
