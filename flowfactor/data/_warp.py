"""Images read through homographies, by bilinear interpolation; black outside their frame."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Reads every image [B, C, H, W] through every homography [S, 3, 3]: [B, S, C, H, W]."""
    batch, channels, height, width = images.shape
    count = len(matrices)
    grid = _grid_of(tuple(matrices.flatten().tolist()), height, width, images.dtype).to(images.device)
    grid = grid.reshape(1, count * height, width, 2)
    # One grid serves all images: as channels of one picture they share its weights, which is some ten times as fast.
    # Threads take pictures, not channels: two for each.
    most = min(2 * torch.get_num_threads(), batch * channels)
    parts = next((count for count in range(most, 0, -1) if batch * channels % count == 0), 1)
    stacked = images.reshape(parts, batch * channels // parts, height, width)
    grid = grid.expand(parts, -1, -1, -1)
    frames = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)
    return frames.reshape(batch, channels, count, height, width).transpose(1, 2)


@functools.lru_cache(maxsize=64)  # a data set asks for the same few grids in every batch; they are never written to
def _grid_of(matrices: tuple[float, ...], height: int, width: int, dtype: torch.dtype) -> Tensor:
    return _grid(torch.tensor(matrices, dtype=torch.float64).reshape(-1, 3, 3), height, width).to(dtype)


def warp_each(images: Tensor, matrices: Tensor) -> Tensor:
    """Reads every image through homographies of its own.

    Args:
        images: Images [B, C, H, W].
        matrices: Homographies [B, S, 3, 3] as `Geometric.matrices` gives them, float64.

    Returns:
        Transformed images [B, S, C, H, W].

    Example:
        >>> images = torch.rand(2, 1, 8, 8)
        >>> still = torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3)
        >>> torch.allclose(warp_each(images, still), images[:, None].expand(2, 4, 1, 8, 8))
        True
    """
    batch, count = matrices.shape[:2]
    channels, height, width = images.shape[1:]
    # The frames of one image stand below each other in one grid, so that the image itself is not repeated.
    # In the images' own precision, unlike a grid that serves a whole batch: here the grid is most of the work.
    flat = matrices.flatten(0, 1)
    plain = bool((flat[:, 2] == flat.new_tensor([0.0, 0.0, 1.0])).all())
    laid = (_affine_grid if plain else _grid)(flat.to(images), height, width)
    grid = laid.reshape(batch, count * height, width, 2)
    frames = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)
    return frames.reshape(batch, channels, count, height, width).transpose(1, 2)


def _grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Gives the points [N, H W, 2] of the image that homographies [N, 3, 3] lead to, in `grid_sample`'s units."""
    like = {"dtype": matrices.dtype, "device": matrices.device}
    x = torch.arange(width, **like) - (width - 1) / 2
    y = torch.arange(height, **like) - (height - 1) / 2
    points = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width, **like)])
    source = matrices @ points.reshape(3, -1)
    depth = source[:, 2]
    # Behind the camera (depth <= 0) there is nothing to see: such points are read outside the frame.
    scale = torch.tensor([2 / width, 2 / height], **like)[:, None]
    grid = torch.where((depth > 0)[:, None], source[:, :2] / depth.clamp_min(1e-12)[:, None] * scale, 4.0)
    return grid.clamp(-4, 4).mT


def _affine_grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """As `_grid`, for homographies without perspective: a sum of what a column gives and what a row gives."""
    like = {"dtype": matrices.dtype, "device": matrices.device}
    x = (torch.arange(width, **like) - (width - 1) / 2) * matrices[:, :2, :1] + matrices[:, :2, 2:]
    y = (torch.arange(height, **like) - (height - 1) / 2) * matrices[:, :2, 1:2]
    # As complex numbers the two coordinates of a point lie side by side, as the sampler reads them: one pass writes all.
    across = torch.complex(x[:, 0] * (2 / width), x[:, 1] * (2 / height))
    down = torch.complex(y[:, 0] * (2 / width), y[:, 1] * (2 / height))
    return torch.view_as_real(across[:, None] + down[:, :, None]).clamp_(-4, 4)
