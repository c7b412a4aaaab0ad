"""How much paths bend between their frames, read off the frames alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowfactor.control import Control, Schedule, times
from flowfactor.registry import Recorded


class Bending(Recorded, nn.Module):
    r"""The bending energy $\int |\ddot z|^2\,dt$ of paths by second differences of their frames, per sample.

    With $h_i = t_{i+1} - t_i$, each frame between two others counts by the time around it,

    $$\sum_{i=1}^{T-1} \frac{h_{i-1} + h_i}{2}\,|a_i|^2, \qquad
      a_i = \frac{2}{h_{i-1} + h_i} \Big(\frac{z_{i+1} - z_i}{h_i} - \frac{z_i - z_{i-1}}{h_{i-1}}\Big) ,$$

    and $a_i$ is the mean of the acceleration $\ddot z$ around the frame, weighted by a hat over both intervals: nothing but
    constant velocity from frame to frame makes it zero. Frames that lie on a line at constant speed are what dynamic optimal
    transport asks of a path (Benamou and Brenier 2000; displacement interpolation, McCann 1997). `Acceleration` measures
    the same in the solve at about three evaluations of the field a stage; this one evaluates nothing, and does not see what
    bends and bends back between two frames.

    Example:
        >>> import torch, flowfactor as ff
        >>> t = torch.arange(4.0)
        >>> thrown = torch.stack([t, 3 * t - t.square()], -1).unsqueeze(1)       # acceleration -2, at two inner frames
        >>> ff.regularizers.Bending()(thrown, t)
        tensor([8.])
    """

    def forward(self, z: Tensor, t: Tensor, control: Control = 0) -> Tensor:
        """Measures paths.

        Args:
            z: Paths ``[T+1, *batch, D]``, in order of time, such as those of a `FlowPath`.
            t: Their times in frames, monotone, ``[T+1]`` or ``[T+1, *batch]``. Frames beside a pause (times that repeat, as
                those of a sequence that rests) do not count.
            control: What acted. Of a `Schedule` frames do not count where it switches at them or beside them, for there a
                path may bend.

        Returns:
            Energies ``[*batch]``, summed over D; 0 for fewer than three frames.

        Raises:
            ValueError: If times do not fit the paths.
        """
        t = times(t, z)
        if z.ndim < 2 or t.shape not in (z.shape[:1], z.shape[:-1]):
            raise ValueError(
                f"Bending takes paths [T+1, *batch, D] and their times [T+1] or [T+1, *batch], got {list(z.shape)} and "
                f"{list(t.shape)}"
            )
        h = t.diff(dim=0).abs().reshape(len(t) - 1, *(t.shape[1:] or [1] * (z.ndim - 2)), 1)
        before, after, moving = h[:-1], h[1:], (h[:-1] > 0) & (h[1:] > 0)
        before, after = torch.where(moving, before, 1), torch.where(moving, after, 1)
        steps = z.diff(dim=0)
        bend = 2 * (steps[1:] / after - steps[:-1] / before) / (before + after)
        counts = (before + after) / 2 * (moving & _is_one_piece(t, control, moving))
        return (counts * bend.square()).sum((0, -1))


def _is_one_piece(t: Tensor, control: Control, like: Tensor) -> Tensor:
    """Whether no switch lies between the frames before and after each inner frame, as ``like [T-1, ..., 1]``."""
    apart = torch.ones_like(like)
    if isinstance(control, Schedule):
        low, high = torch.minimum(t[:-2], t[2:]), torch.maximum(t[:-2], t[2:])
        for start in control.starts:
            if math.isfinite(start):
                apart &= ~((low < start) & (start < high)).reshape(like.shape)
    return apart
