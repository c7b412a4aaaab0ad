"""Codes tied to their flow: where a path arrives, against the code of the frame that is there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowfactor.models.inputs import Inputs
from flowfactor.models.protocols import Encodes, code_of
from flowfactor.regularizers import LatentEquivariance


def other_frames(
    given: Inputs, generator: torch.Generator | None = None, reference: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Draws another frame of each sequence than the one that its path begins with, among those that were observed.

    Args:
        given: Sequences of T+1 frames.
        generator: Source of the draw.
        reference: The frame that the path begins with, an index or one a sequence ``[B]``.

    Returns:
        Indices ``[B]``, and which sequences have another frame ``[B]``; the index of one that has none says nothing.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False, True], [True, False, False]])
        >>> other_frames(Inputs(torch.rand(2, 3, 1, 8, 8), torch.arange(3.0), mask=mask))
        (tensor([2, ...]), tensor([ True, False]))
    """
    frames = given.frames
    odds = frames.new_ones(frames.shape[:2]) if given.mask is None else given.mask.to(frames)
    step = torch.arange(frames.shape[1], device=frames.device)
    first = torch.as_tensor(reference, device=frames.device).reshape(-1, 1)
    odds = odds.masked_fill(step == first, 0)
    found = odds.any(1)
    drawn = torch.multinomial(odds + (~found).unsqueeze(1), 1, generator=generator)  # somewhere, where there is none
    return drawn.squeeze(1), found


def code_error(
    model: Encodes,
    given: Inputs,
    z: Tensor,
    generator: torch.Generator | None = None,
    row: Tensor | None = None,
    reference: int | Tensor = 0,
) -> Tensor:
    """How far paths are from the codes of the frames they pass: at one other frame of each sequence, drawn at random.

    Every sequence has one frame encoded, whatever the number of its paths; nothing is solved.

    Args:
        model: What encodes.
        given: Sequences of T+1 frames.
        z: Their paths ``[T+1, N, D]``, in the order of the frames.
        generator: Source of the draw.
        row: Which sequence each path is of, ``[N]``; None where the N paths are those of the N sequences.
        reference: The frame that each sequence's path begins with, an index or one a sequence ``[B]``.

    Returns:
        Squared distances ``[N]`` between state and mean of the posterior, summed over the dimensions that the encoder
        writes (`flowfactor.regularizers.LatentEquivariance`); 0 where no other frame was observed.
    """
    if len(z) < 2:
        return z.new_zeros(z.shape[1])
    index, found = other_frames(given, generator, reference)
    each = torch.arange(len(index), device=index.device)
    q: Distribution = model.encode(given.frames[each, index])
    mean, place = q.mean, torch.arange(z.shape[1], device=z.device)
    if row is not None:
        index, found, mean = index[row], found[row], mean[row]
    states = z[index, place]
    return found * LatentEquivariance()(code_of(model, states), code_of(model, mean))
