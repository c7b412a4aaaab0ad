"""What data sets share whose frames are made of what is drawn for a batch."""

from __future__ import annotations

import copy

from torch import Tensor

from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.starts import Draw


class FramesOfDraws(SequenceDataset):
    """Sequences whose `_frames` looks at `_draws` for their starts and their direction."""

    _draws = Draw()

    def _drawn(self, indices: Tensor, k: Tensor, draw: Draw) -> Batch:
        part = copy.copy(self)  # so that a subclass may make frames of its own, and still hand this on
        part._draws = draw
        return part._frames(indices, k)
