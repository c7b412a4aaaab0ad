"""Sequences at a model's door: frames with their times, contexts and masks, checked once and as flows take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor.context import Context, ContextSize, resolve_context
from flowfactor.control import times
from flowfactor.models.checks import check_frames


@dataclass(frozen=True)
class Inputs:
    """Checked sequences.

    Attributes:
        frames: Frames ``[B, T+1, C, H, W]``; those that are missing are 0.
        t: Times ``[T+1]``, or ``[T+1, B]`` where each sequence has its own, and rests from its last observed frame on.
        context: Features ``[B, C]``, or such a tensor for each name; None for none.
        mask: Which frames were observed ``[B, T+1]``; None where all were.
    """

    frames: Tensor
    t: Tensor
    context: Context | None = None
    mask: Tensor | None = None

    def rows(self, row: Tensor | None) -> tuple[Tensor, Context | None]:
        """Times and context of the sequences ``row [N]``; None for all, in order."""
        if row is None:
            return self.t, self.context
        t = self.t if self.t.ndim == 1 else self.t[:, row]
        return t, None if self.context is None else rows_of(self.context, row)

    def seen(self, row: Tensor | None = None) -> dict[str, Tensor]:
        """The mask ``[T+1, N]`` of the sequences ``row [N]`` as an argument by name, where there is one."""
        if self.mask is None:
            return {}
        return {"mask": (self.mask if row is None else self.mask[row]).mT}

    def repeated(self, count: int) -> Tensor:
        """The times of so many paths of each sequence: ``[T+1]``, or ``[T+1, count, B]``."""
        return self.t if self.t.ndim == 1 else self.t.unsqueeze(1).expand(-1, count, -1)

    def shown(self) -> Tensor:
        """The frames, with the last that was observed before in place of each that is missing."""
        return self.frames if self.mask is None else last_observed(self.frames, self.mask)

    def part(self, begin: int, end: int) -> Inputs:
        """The stretch of all sequences from frame ``begin`` up to ``end``."""
        mask = None if self.mask is None else self.mask[:, begin:end]
        return Inputs(self.frames[:, begin:end], self.t[begin:end], self.context, mask)


def check_inputs(
    model: object,
    frames: object,
    t: object,
    context: Context | None,
    mask: Tensor | None,
    event: tuple[int, ...] | None,
    size: ContextSize,
) -> Inputs:
    """Checks what a model is handed.

    Args:
        model: The model, whose class messages name.
        frames: Sequences ``[B, T+1, C, H, W]``.
        t: Times ``[T+1]`` or ``[B, T+1]``.
        context: The context, for a model that takes one.
        mask: Which frames were observed ``[B, T+1]``; what is in the others is never read.
        event: Expected ``(C, H, W)``; None where any will do.
        size: The context that the model takes.

    Returns:
        The inputs.

    Raises:
        TypeError: If something is of another kind.
        ValueError: If something is missing, unexpected, or does not fit.
    """
    checked, when = check_frames(frames, t, event, own_times=True)
    named = resolve_context(context, size, checked.shape[:1], like=checked, part=type(model).__name__)
    if mask is None:
        return Inputs(checked, when, named)
    check_mask(mask, checked)
    if bool(mask.all()):
        return Inputs(checked, when, named)
    return Inputs(blanked(checked, mask), resting_after_last(when, mask), named, mask)


def check_mask(mask: object, frames: Tensor) -> None:
    """Checks a mask of sequences ``[B, T+1, ...]``; raises TypeError or ValueError where it does not fit."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of booleans [B, T+1], True where a frame was observed, got {got}")
    if mask.shape != frames.shape[:2]:
        raise ValueError(f"mask must have an entry a frame, shape {list(frames.shape[:2])}, got {list(mask.shape)}")
    if mask.device != frames.device:
        raise ValueError(f"the mask is on {mask.device} and the frames on {frames.device}; move one with .to(...)")
    if not bool(mask[:, 0].all()):
        first = int((~mask[:, 0]).nonzero()[0])
        raise ValueError(
            f"the first frame of sequence {first} is missing, from which its latent is inferred: begin each sequence with a "
            "frame that was observed"
        )


def blanked(frames: Tensor, mask: Tensor) -> Tensor:
    """Frames ``[B, T+1, ...]`` with 0 in place of those that a mask ``[B, T+1]`` leaves out, whatever they hold."""
    return frames.masked_fill(~mask.reshape(*mask.shape, *[1] * (frames.ndim - 2)), 0)


def last_observed(frames: Tensor, mask: Tensor) -> Tensor:
    """Frames ``[B, T+1, ...]`` with the last that was observed before in place of those that a mask leaves out.

    Example:
        >>> last_observed(torch.tensor([[1.0, float("nan"), 3.0, 4.0]]), torch.tensor([[True, False, True, False]]))
        tensor([[1., 1., 3., 3.]])
    """
    step = torch.arange(mask.shape[1], device=mask.device)
    index = torch.where(mask, step, 0).cummax(1).values
    return frames[torch.arange(len(frames), device=frames.device).unsqueeze(1), index]


def resting_after_last(t: Tensor, mask: Tensor) -> Tensor:
    """Times, with that of the last observed frame of each sequence in place of those after it: nothing is known of these.

    Args:
        t: Times ``[T+1]`` or ``[T+1, B]``.
        mask: Which frames were observed ``[B, T+1]``.

    Returns:
        Times ``[T+1, B]``, or those that were given where all sequences are observed at their end.

    Example:
        >>> resting_after_last(torch.arange(3.0), torch.tensor([[True, False, True], [True, True, False]])).mT
        tensor([[0., 1., 2.],
                [0., 1., 1.]])
    """
    if bool(mask[:, -1].all()):
        return t
    step = torch.arange(len(t), device=mask.device)
    last = torch.where(mask, step, 0).amax(1)
    own = t.unsqueeze(1).expand(-1, len(mask)) if t.ndim == 1 else t
    return own.gather(0, torch.minimum(step.unsqueeze(1), last))


def clock(t: Any, x: Tensor, event_ndim: int) -> Tensor:
    """The times of a transformation as flows take them.

    Args:
        t: Times ``[T]``, or those of each image ``[*batch, T]``.
        x: Images ``[*batch, ...]``.
        event_ndim: How many of their dimensions are not the batch's.

    Returns:
        Times ``[T]``, or ``[T, *batch]``.

    Raises:
        ValueError: If each image has its own and they are not as many.
    """
    when = times(t, x)
    if when.ndim < 2:
        return when
    batch = x.shape[: x.ndim - event_ndim]
    if when.shape[:-1] != batch:
        raise ValueError(
            f"t must hold times [T], or those of each of the images {[*batch, 'T']}; got shape {list(when.shape)}"
        )
    return when.movedim(-1, 0)


def beside(batch: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What a batch holds of these names, as arguments by name: ``context`` and ``mask``, where it has them.

    Example:
        >>> beside({"frames": 1, "context": 2}, "context", "mask")
        {'context': 2}
    """
    return {name: batch[name] for name in names if batch.get(name) is not None}


def rows_of(context: Context, rows: Tensor) -> Context:
    """The context of some of the samples ``[N, C]``; one without a batch is that of all."""
    if isinstance(context, Mapping):
        return {name: part if part.ndim == 1 else part[rows.to(part.device)] for name, part in context.items()}
    return context if context.ndim == 1 else context[rows.to(context.device)]


def refuse_missing(batch: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where frames of a batch are missing, for what needs them all."""
    mask = batch.get("mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError(f"{what} compares all frames, and the mask says that {int((~mask).sum())} are missing")


def shown(batch: Mapping[str, Any]) -> Tensor:
    """The frames of a batch, with the last that was observed before in place of each that its mask says is missing."""
    mask = batch.get("mask")
    return batch["frames"] if mask is None else last_observed(batch["frames"], mask)


def refuse_beside(model: object, **given: Any) -> None:
    """Raises ValueError, by the names of the model and of what it was given, where it was given what it cannot use."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"a {type(model).__name__} takes no {' and no '.join(names)}: leave it out, or take a model with a latent flow "
            "that does, such as build_vae(..., context=C)"
        )
