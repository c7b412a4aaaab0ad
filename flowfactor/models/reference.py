"""The reference frame of a sequence: the one that is encoded, and from which the flow is followed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from flowfactor.models.inputs import Inputs
from flowfactor.objectives import Objective


@dataclass(frozen=True)
class Begin:
    """What all flows of a sequence share.

    Attributes:
        z: The state at the reference frame, ``[B, D]``.
        start: What `Objective.begin` makes of it, ``[B]``.
        frame: The reference frame: one for all, or one of each sequence ``[B]``.
    """

    z: Tensor
    start: Tensor
    frame: int | Tensor = 0

    def rows(self, row: Tensor | None) -> Begin:
        """That of the sequences ``row [N]``; None for all, in order."""
        if row is None:
            return self
        return Begin(self.z[row], self.start[row], self.frame[row] if isinstance(self.frame, Tensor) else self.frame)


def check_reference(reference: object, objective: Objective) -> Literal["first", "random"]:
    """Checks which frame of a sequence is to be encoded in training.

    Args:
        reference: ``"first"`` or ``"random"``.
        objective: The bound, which has to hold for it.

    Returns:
        The same.

    Raises:
        ValueError: If it is none of these, or the objective does not say that it holds for every frame.
    """
    if reference not in ("first", "random"):
        raise ValueError(f'reference must be "first" or "random", got {reference!r}')
    if reference == "random" and not objective.any_reference:
        raise ValueError(
            f'reference="random" encodes any frame, and the objective {objective} does not say that it holds for another '
            f"than the first: give the class {type(objective).__name__} any_reference = True where its divergence takes "
            'path.z[path.start] for the draw, or take reference="first"'
        )
    return cast(Literal["first", "random"], reference)


def reference_frame(given: Inputs, generator: torch.Generator | None = None) -> int | Tensor:
    """Draws the reference frame, each as likely as any other that was observed.

    Args:
        given: Sequences of T+1 frames.
        generator: Source of the draw.

    Returns:
        One index for all sequences, since a solve that all of them begin at the same frame is the cheaper; where frames are
        missing, one for each ``[B]``.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False, False], [True, False, False]])
        >>> reference_frame(Inputs(torch.rand(2, 3, 1, 8, 8), torch.arange(3.0), mask=mask))
        tensor([0, 0])
    """
    if given.mask is not None:
        return torch.multinomial(given.mask.float(), 1, generator=generator).squeeze(1)
    return int(torch.randint(given.frames.shape[1], (), generator=generator, device=given.frames.device))


def frame_at(frames: Tensor, frame: int | Tensor) -> Tensor:
    """One frame ``[B, ...]`` of each of the sequences ``[B, T+1, ...]``."""
    return (
        frames[:, frame] if isinstance(frame, int) else frames[torch.arange(len(frames), device=frames.device), frame]
    )


def without(given: Inputs, frame: int | Tensor) -> Inputs:
    """The sequences as if one frame had not been observed: an index for all, or one of each sequence ``[B]``."""
    frames = given.frames
    step = torch.arange(frames.shape[1], device=frames.device)
    other = (step != torch.as_tensor(frame, device=frames.device).reshape(-1, 1)).expand(frames.shape[:2])
    return replace(given, mask=other if given.mask is None else other & given.mask)
