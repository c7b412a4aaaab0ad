"""What acts between two neighbouring frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Laplace, LogNormal
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor._config import Configured
from flowfactor.encoders._stages import KERNEL, PATCH, WIDTH, make_plan, maps_patches, patches_encoder
from flowfactor.encoders.base import activation_layer, check_input
from flowfactor.encoders.sparse_weights import SLABS, SlabName, SparseWeights

# Beyond this a spike is on or off for every practical purpose, and its gradient would die.
MAX_LOGIT = 8.0
# Relative (log-normal) or absolute (Laplace) width of an untrained slab around 1, and bounds of the widths.
_WIDTH, _MIN_WIDTH, _MAX_WIDTH = 0.1, 0.01, 1.0


class PairEncoder(Configured, nn.Module):
    r"""Posterior $q(g_s|x_s, x_{s+1})$ of the weights of K flows, from each pair of neighbouring frames.

    A frame and its change to the next pass through the convolutions of `ConvEncoder`; two linear heads give each flow a
    spike logit and its slabs. It is the inference network of sparse transformation analysis (Song et al. 2025, arXiv
    2410.05564). Untrained slabs are about 1, whatever the frames.

    Args:
        num_flows: K.
        channels: C of a frame.
        image_size: H = W, or (H, W); both divisible by 4.
        widths: Channels of each stage, as in `ConvEncoder`; 32 each where None: every sequence has T pairs.
        controls: 1 for one weight a flow (single control), 2 for one each for the gradient part and the
            divergence-free part of its field (double control).
        slab: ``"half_normal"``, for weights of one sign, with a log-normal posterior; or ``"laplace"``, for both signs,
            with a Laplace posterior.
        hidden: Widths of the linear layers between the grid and the heads.
        strides: As in `ConvEncoder`.
        kernel_size: As in `ConvEncoder`.
        patch_size: As in `ConvEncoder`.
        residual: As in `ConvEncoder`.
        local: As in `ConvEncoder`.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size does not fit or a name is unknown.

    Example:
        >>> import torch
        >>> encoder = PairEncoder(num_flows=3, channels=1, image_size=8)
        >>> q = encoder(torch.rand(6, 5, 1, 8, 8))              # 6 sequences of 5 frames: 4 pairs each
        >>> q.spike_probs.shape, q.mean.shape
        (torch.Size([6, 4, 3]), torch.Size([6, 4, 3, 1]))
    """

    kind_of_part = "encoder"

    def __init__(
        self,
        num_flows: int,
        channels: int = 3,
        image_size: int | Sequence[int] = 28,
        widths: Sequence[int] | None = None,
        *,
        controls: int = 1,
        slab: SlabName = "half_normal",
        hidden: Sequence[int] = (64,),
        strides: Sequence[int] | None = None,
        kernel_size: int = KERNEL,
        patch_size: int = PATCH,
        residual: int = 0,
        local: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if slab not in SLABS:
            raise ValueError(f"unknown slab {slab!r}: choose one of {', '.join(map(repr, SLABS))}")
        if controls not in (1, 2):
            raise ValueError(f"controls must be 1 (single) or 2 (double control), got {controls!r}")
        self.num_flows, self.controls, self.slab = check_count("num_flows", num_flows), int(controls), slab
        shape = (kernel_size, patch_size, residual, local)
        plan = make_plan(2 * check_count("channels", channels), image_size, widths, strides, hidden, *shape, activation,
                         "patches")  # fmt: skip
        if widths is None:
            plan = replace(plan, widths=(WIDTH // 2,) * len(plan.widths))
        self.body, features = patches_encoder(plan, activation_layer(activation))
        self.event_shape = (channels, *plan.image)
        self._fill_in(**plan.chosen)
        self.spike_head = nn.Linear(features, num_flows)
        self.slab_head = nn.Linear(features, num_flows * self.controls * 2)
        # Strengths mean nothing before the flows do: they start at 1 for all, and the spikes decide first.
        nn.init.zeros_(self.slab_head.weight)
        nn.init.zeros_(self.slab_head.bias)

    def forward(self, frames: Tensor) -> SparseWeights:
        """The posterior of the weights over each interval between neighbouring frames.

        Args:
            frames: Sequences ``[*batch, T+1, C, H, W]`` in [0, 1], with at least two frames.

        Returns:
            The distribution, batch ``[*batch]`` and event ``[T, K, C]``.

        Raises:
            TypeError: If frames are not floating point or differ from the parameters' dtype.
            ValueError: If their shape does not fit.
        """
        names = ", ".join(map(str, self.event_shape))
        if isinstance(frames, Tensor) and (frames.ndim < 4 or frames.shape[-4] < 2):
            raise ValueError(
                f"frames must be [*batch, T+1, {names}] with at least two frames, got {list(frames.shape)}"
            )
        check_input(frames, self.event_shape, "frames", self)
        lead = (*frames.shape[:-4], frames.shape[-4] - 1)
        # Time first: neighbouring frames are then slices without copies.
        features = self.body[2:](self._first_layer(self.body[0](frames.movedim(-4, 0))).flatten(0, -4))
        features = features.unflatten(0, (lead[-1], *lead[:-1])).movedim(0, -2)
        logits = MAX_LOGIT * torch.tanh(self.spike_head(features) / MAX_LOGIT)
        place, width = self.slab_head(features).reshape(*lead, self.num_flows, self.controls, 2).unbind(-1)
        return SparseWeights(logits.reshape(*lead, self.num_flows), self._slab(place, width))

    def _first_layer(self, cut: Tensor) -> Tensor:
        """The first layer of every pair ``[T, *batch, C, H, W]``, of frames cut into patches ``[T+1, *batch, C, H, W]``.

        The layer is linear and its input a frame x and its change: ``A x + B (y - x) = (A - B) x + B y`` costs a product
        for each frame, and pairs are never laid out.
        """
        layer = self.body[1]
        if not maps_patches(layer):
            pairs = torch.cat([cut[:-1], cut[1:] - cut[:-1]], -3)
            return layer(pairs.flatten(0, -4)).unflatten(0, pairs.shape[:-3])
        of_frame, of_change = layer.weight.flatten(1).chunk(2, 1)
        patches = cut.movedim(-3, -1)  # channels are last in memory
        both = F.linear(patches[:-1], of_frame - of_change, layer.bias) + F.linear(patches[1:], of_change)
        return both.movedim(-1, -3)

    def _slab(self, place: Tensor, width: Tensor) -> Laplace | LogNormal:
        share = (_WIDTH - _MIN_WIDTH) / (_MAX_WIDTH - _MIN_WIDTH)
        scale = _MIN_WIDTH + (_MAX_WIDTH - _MIN_WIDTH) * torch.sigmoid(width + math.log(share / (1 - share)))
        if self.slab == "laplace":
            return Laplace(1 + place, scale, validate_args=False)
        median = F.softplus(place + math.log(math.expm1(1.0))) + 1e-3
        return LogNormal(median.log(), scale, validate_args=False)
