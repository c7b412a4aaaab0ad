"""The encoder that tells which transformation acts in a sequence."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Categorical

from flowfactor._checks import check_count
from flowfactor._config import Configured
from flowfactor.encoders._stages import KERNEL, PATCH, make_plan, maps_patches, patches_encoder
from flowfactor.encoders.base import activation_layer, flatten_batch

_WIDTH = 32


class FactorEncoder(Configured, nn.Module):
    r"""Posterior q(k|x_0..x_T) over which of K transformations acts in a sequence, by convolutions.

    As in Song et al. (NeurIPS 2023, section 3.3) it sees all frames at once, stacked as channels. Beside the first
    frame come the changes from each frame to the next, which hold the same information and show a transformation
    directly, where the frames mostly show what is transformed. Stages and linear layers are those of `ConvEncoder`.

    Args:
        num_flows: K.
        num_frames: T+1, the number of frames of a sequence, at least 2.
        channels: C.
        image_size: H = W, or (H, W); both divisible by 4.
        widths: Channels of each stage; 32 each where None, with as many stages as the image size asks for.
        hidden: Widths of the linear layers between the grid and the logits.
        strides: 1 or 2 for each stage; where None, the last stages halve the grid until it is 8 x 8 or smaller.
        kernel_size: Odd size of the convolutions.
        patch_size: 1, 2, 4 or 8: side of the patches that the frames are cut into.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``. Of as few hidden units as here, ``"relu"`` may lose too
            many at large learning rates to tell the transformations apart.
        frames_seen: How many of the frames it sees, from the first to the last at even distances; all where None. A
            transformation shows in three frames as in nine, at a third of the cost.
        looks: The former name of ``frames_seen``, deprecated.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size does not fit, a name is unknown, or ``looks`` and ``frames_seen`` are both given.

    Example:
        >>> import torch
        >>> encoder = FactorEncoder(num_flows=3, num_frames=9, channels=3, image_size=28)
        >>> q = encoder(torch.rand(16, 9, 3, 28, 28))
        >>> q.probs.shape
        torch.Size([16, 3])
    """

    kind_of_part = "encoder"
    #: Arguments that saved models may have under a former name.
    renamed_arguments: ClassVar = {"looks": "frames_seen"}

    def __init__(
        self,
        num_flows: int,
        num_frames: int,
        channels: int = 3,
        image_size: int | Sequence[int] = 28,
        widths: Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (32,),
        strides: Sequence[int] | None = None,
        kernel_size: int = KERNEL,
        patch_size: int = PATCH,
        activation: str = "silu",
        frames_seen: int | None = None,
        looks: int | None = None,
    ) -> None:
        super().__init__()
        self.num_flows = check_count("num_flows", num_flows)
        self.num_frames = check_count("num_frames", num_frames)
        if num_frames < 2:
            raise ValueError(
                f"num_frames must be at least 2, since one frame shows no transformation, got {num_frames}"
            )
        if looks is not None:
            if frames_seen is not None:
                raise ValueError(f"looks is the former name of frames_seen: give one, got {looks} and {frames_seen}")
            warnings.warn("looks is called frames_seen now", DeprecationWarning, stacklevel=2)
            frames_seen = looks
        if frames_seen is None:
            seen = range(num_frames)
        elif 2 <= check_count("frames_seen", frames_seen) <= num_frames:
            seen = [round(i * (num_frames - 1) / (frames_seen - 1)) for i in range(frames_seen)]
        else:
            raise ValueError(
                f"frames_seen must lie between 2 and num_frames = {num_frames}, or be None, got {frames_seen}"
            )
        self._seen = seen
        stacked = check_count("channels", channels) * len(seen)
        shape = (strides, hidden, kernel_size, patch_size, 0, False, activation, "patches")
        plan = make_plan(stacked, image_size, widths, *shape)
        if widths is None:  # to tell K transformations apart takes less than to rebuild a frame
            plan = make_plan(stacked, image_size, (_WIDTH,) * len(plan.widths), *shape)
        self.event_shape = (num_frames, channels, *plan.image)
        self._fill_in(**plan.chosen, frames_seen=frames_seen, looks=None)
        self.body, features = patches_encoder(plan, activation_layer(activation))
        self.head = nn.Linear(features, num_flows)

    def forward(self, frames: Tensor) -> Categorical:
        """Posterior q(k|x_0..x_T).

        Args:
            frames: Sequences [*batch, T+1, C, H, W], floating point, in [0, 1].

        Returns:
            A Categorical over K with batch shape [*batch].

        Raises:
            TypeError: If frames are not floating point or differ from the parameters' dtype.
            ValueError: If the trailing dimensions are not (T+1, C, H, W).
        """
        flat = flatten_batch(frames, self.event_shape, "sequences", self)
        logits = self.head(self.body[2:](self._first_layer([flat[:, i] for i in self._seen])))
        # Log-probabilities in float32 at least: under autocast the head gives halves.
        logits = logits.to(frames.dtype).reshape(*frames.shape[:-4], self.num_flows)
        return Categorical(logits=logits, validate_args=False)

    def _first_layer(self, frames: Sequence[Tensor]) -> Tensor:
        """The first layer, of the first of some frames ``[N, C, H, W]`` and the changes from each to the next.

        The layer is linear: ``A x + B (y - x) = (A - B) x + B y`` costs a product for each frame, and changes are never
        laid out.
        """
        cut, layer = self.body[0], self.body[1]
        if not maps_patches(layer):
            seen = torch.stack(list(frames), 1)
            seen = torch.cat([seen[:, :1], seen.diff(dim=1)], 1)
            return layer(cut(rearrange(seen, "n t c h w -> n (t c) h w")))
        of_changes = rearrange(layer.weight, "w (t f) 1 1 -> t f w", t=len(frames))
        of_frames = torch.cat([of_changes[:-1] - of_changes[1:], of_changes[-1:]])
        total = layer.bias
        assert total is not None
        for frame, weight in zip(frames, of_frames, strict=True):
            patches = cut(frame)
            total = torch.addmm(total, rearrange(patches, "n f h w -> (n h w) f"), weight)
        return rearrange(total, "(n h w) c -> n c h w", h=patches.shape[-2], w=patches.shape[-1])
