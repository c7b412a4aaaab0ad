"""Finds the step at which a training diverges, and keeps its batch for whoever wants to look at it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowfactor._files import replacing

_CURE = (
    "Lower the learning rate (train.learning_rate), clip the gradient (train.clip), or warm up longer (train.warmup)"
)


@dataclass
class _Step:
    """What a step began with, and what came of it."""

    step: int
    batch: Any
    states: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    finite: Tensor | None = None
    arrived: Any = None

    def is_finite(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.finite is None or bool(self.finite.all())


class Watch:
    """Looks at the loss and the gradient of every step.

    On a CPU it does so before the optimizer moves the weights. An accelerator is not waited for: its answer to a step is
    read two steps later, when it has long been there.

    Args:
        lag: How many steps later; None for what suits the device.
    """

    def __init__(self, lag: int | None = None) -> None:
        self._lag, self._steps = lag, deque[_Step]()

    def begin(self, step: int, batch: Any, generator: torch.Generator | None) -> None:
        """Notes what a step begins with."""
        states = {"global_state": torch.get_rng_state()}
        if generator is not None:
            states["generator_state"] = generator.get_state()
        self._steps.append(_Step(step, batch, states))

    def terms(self, terms: Mapping[str, Tensor]) -> None:
        """Notes the terms of the step, on the device."""
        self._steps[-1].terms = dict(terms)

    def end(self, parameters: Iterable[tuple[str, nn.Parameter]], gradients: bool, folder: Path, rank: str) -> None:
        """Looks at what is known by now; the gradient counts where asked for.

        Raises:
            FloatingPointError: If a step diverged.
        """
        if not self._steps:
            return
        now = self._steps[-1]
        named = [(name, p.grad) for name, p in parameters if p.grad is not None] if gradients else []
        largest = [now.terms["loss"].abs().float()] if "loss" in now.terms else []
        largest += [value.float() for value in _largest([gradient for _, gradient in named])]
        if largest:
            self._send(now, torch.stack(largest).isfinite())
        lag = self._lag
        if lag is None:
            lag = 2 if largest and largest[0].device.type != "cpu" else 0
        if lag == 0 and not now.is_finite():
            now.bad = [name for name, gradient in named if not bool(gradient.isfinite().all())]
        self.check(folder, rank, lag)
        while len(self._steps) > max(lag, 1):  # the latest one stays: what comes of its weights is seen after it
            self._steps.popleft()

    def check(self, folder: Path, rank: str, lag: int = 0) -> None:
        """Raises where a step that is at least so many steps old diverged (see `end`)."""
        for step in list(self._steps)[: len(self._steps) - lag]:
            if not step.is_finite():
                raise _error(step, _what(step), folder, rank)

    def error(self, what: str, folder: Path, rank: str) -> FloatingPointError:
        """The error of the latest step, which diverged as `what` says."""
        step = self._steps[-1] if self._steps else _Step(0, {}, {})
        return _error(step, what, folder, rank)

    @staticmethod
    def _send(step: _Step, finite: Tensor) -> None:
        """Has the answer come to the host by itself."""
        step.finite = finite
        if finite.device.type == "cuda":
            step.finite = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
            step.finite.copy_(finite, non_blocking=True)
            step.arrived = torch.cuda.Event()
            step.arrived.record()


def not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinities, found by one look at all of them."""
    floats = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    largest = _largest([tensor for _, tensor in floats])
    if not largest or bool(torch.stack([value.float() for value in largest]).isfinite().all()):
        return []
    return [name for (name, _), value in zip(floats, largest, strict=True) if not bool(value.isfinite())]


def _largest(tensors: list[Tensor]) -> list[Tensor]:
    """The largest size in each tensor: NaN or infinite where the tensor holds such."""
    return list(torch._foreach_norm(tensors, math.inf)) if tensors else []  # type: ignore[reportPrivateImportUsage]


def shown(names: list[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _what(step: _Step) -> str:
    values = {name: float(value) for name, value in step.terms.items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    # The loss and the bound are sums of the others, so these say more.
    own = [name for name in bad if name not in ("loss", "bound")] or bad
    if own:
        told = ", ".join(f"{name} became {'NaN' if math.isnan(values[name]) else 'infinite'}" for name in own)
        rest = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in bad)
        return told + (f" (beside {rest})" if rest else "")
    of = f" of {shown(step.bad)}" if step.bad else ""
    return f"the gradient{of} became NaN or infinite (the loss was {values.get('loss', math.nan):.4g})"


def _error(step: _Step, what: str, folder: Path, rank: str) -> FloatingPointError:
    try:
        saved = f"its batch and random states are in {_save(step, folder, rank)}"
    except OSError as error:
        saved = f"its batch could not be saved ({error})"
    return FloatingPointError(
        f"the training diverged at step {step.step}: {what}. {_CURE}; the checkpoints hold the state before; {saved}"
    )


def _save(step: _Step, folder: Path, rank: str) -> Path:
    """Writes the batch under a name that nothing has."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = step.batch if isinstance(step.batch, Mapping) else {"batch": step.batch}
    flat = {name: {"": value} if isinstance(value, Tensor) else value for name, value in batch.items()}
    flat = {
        name: parts for name, parts in flat.items() if isinstance(parts, Mapping)
    }  # such as a context of several names
    arrays = {
        f"{name}/{part}".rstrip("/"): value for name, parts in flat.items() for part, value in parts.items()
    } | step.states
    path, count = folder / f"diverged-step{step.step}{rank}.npz", 1
    while path.exists():
        count += 1
        path = folder / f"diverged-step{step.step}{rank}-{count}.npz"
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, step=step.step, **{name: _array(value) for name, value in arrays.items()})
    return path


def _array(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
