"""A data set of one's own: a dot that moves to the right or down."""

import torch

import flowfactor as ff


@ff.register_dataset("dots")
class Dots(ff.data.SequenceDataset):
    """Sequences of a soft dot on a dark ground.

    Args:
        split: ``"train"`` or ``"test"``.
        steps: Steps T of a sequence.
        size: Height and width of a frame.
        count: Number of dots.
    """

    def __init__(self, split: str, steps: int = 8, *, size: int = 8, count: int = 24):
        self.flow_names, self.image_shape = ("right", "down"), (1, size, size)
        self.t = torch.arange(steps + 1.0)
        generator = torch.Generator().manual_seed(1 if split == "train" else 2)
        self.start = size / 2 * torch.rand(count, 2, generator=generator)

    def __len__(self):
        return len(self.start)

    def _frames(self, indices, k):
        way = torch.eye(2)[k] * self.image_shape[1] / 2 / (len(self.t) - 1)
        centre = self.start[indices, None] + self.t[:, None] * way[:, None]  # [B, T+1, 2]
        x, y = ((torch.arange(self.image_shape[1]) - centre[..., i, None]).square() for i in (0, 1))
        return {"frames": torch.exp(-(y[..., :, None] + x[..., None, :]) / 2).unsqueeze(2)}

    def _select(self, indices):
        self.start = self.start[indices]
