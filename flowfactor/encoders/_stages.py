"""Sizes and layers of the convolutional encoders and decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from flowfactor._checks import check_count
from flowfactor.encoders._patches import Cut, Join
from flowfactor.encoders.base import activation_layer, dense, sizes

ARCHITECTURES = ("patches", "paper")
UPSAMPLES = ("shuffle", "transpose")
_COARSEST = 8  # grids larger than this are halved: the linear layer that spans the grid would dominate otherwise
PATCHES = (1, 2, 4, 8)
PATCH, KERNEL = 4, 1
WIDTH, PAPER_WIDTH = 64, 32


@dataclass(frozen=True)
class Plan:
    """Checked sizes that an encoder and its mirror share."""

    channels: int
    image: tuple[int, int]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    hidden: tuple[int, ...]
    kernel: int
    patch: int
    residual: int
    local: bool
    activation: str
    architecture: str
    skip: bool = False

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Grid before the first stage and after each, an odd side rounded up where it is halved."""
        grids = [(self.image[0] // self.patch, self.image[1] // self.patch)]
        for stride in self.strides:
            height, width = grids[-1]
            grids.append((-(-height // stride), -(-width // stride)))
        return grids

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a frame."""
        return (self.channels, *self.image)

    @property
    def chosen(self) -> dict[str, Any]:
        """What constructors leave open or take in several forms, as it was decided."""
        return {"image_size": self.image, "widths": self.widths, "strides": self.strides}


def _image(image_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (image_size, image_size) if isinstance(image_size, (int, np.integer)) else tuple(image_size)
    if len(pair) != 2:
        raise ValueError(f"image_size must be one number or (height, width), got {image_size!r}")
    height, width = (check_count("image_size", side) for side in pair)
    if height % 4 or width % 4:
        nearest = tuple(4 * max(1, round(side / 4)) for side in (height, width))
        raise ValueError(
            f"image_size must be divisible by 4, got {height} x {width}: pad, crop or resize the frames, "
            f"for example to {nearest[0]} x {nearest[1]} (size= and fit= of flowfactor.data.Sequences, data.options.size)"
        )
    return height, width


def _default_strides(grid: tuple[int, int], stages: int | None) -> tuple[int, ...]:
    """Strides that keep the finest grid in the first stage and halve in later ones down to the coarsest."""
    halvings, side = 0, max(grid)
    while side > _COARSEST:
        halvings, side = halvings + 1, -(-side // 2)
    if stages is None:
        stages = halvings + 1
    halvings = min(halvings, stages - 1)
    return (1,) * (stages - halvings) + (2,) * halvings


def make_plan(
    channels: int,
    image_size: int | Sequence[int],
    widths: Sequence[int] | None,
    strides: Sequence[int] | None,
    hidden: Sequence[int],
    kernel_size: int,
    patch_size: int,
    residual: int,
    local: bool,
    activation: str,
    architecture: str,
    skip: bool = False,
) -> Plan:
    """Checks the arguments that `ConvEncoder` and `ConvDecoder` share, and fills in the defaults."""
    check_count("channels", channels)
    image = _image(image_size)
    hidden = sizes("hidden", hidden)
    activation_layer(activation)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(map(repr, ARCHITECTURES))}")
    if architecture == "paper":
        widths = _paper_widths(widths)
        options = (tuple(strides or ()), hidden, kernel_size, patch_size, residual, local, skip)
        if options != ((), (), KERNEL, PATCH, 0, False, False):
            raise ValueError(
                "architecture='paper' fixes hidden, strides, kernel_size, patch_size, residual, local and skip: "
                "leave them out, or choose architecture='patches'"
            )
        return Plan(channels, image, widths, (), (), kernel_size, patch_size, 0, False, activation, architecture)
    if check_count("kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that a grid keeps its size, got {kernel_size}")
    if check_count("patch_size", patch_size) not in PATCHES:
        raise ValueError(f"patch_size must be 1, 2, 4 or 8, got {patch_size}")
    if image[0] % patch_size or image[1] % patch_size:
        raise ValueError(
            f"frames of {image[0]} x {image[1]} cannot be cut into patches of {patch_size} x {patch_size}: choose a "
            "patch_size that divides both sides, or pad or resize the frames"
        )
    if residual != 0:
        check_count("residual", residual)
    if skip and not hidden:
        raise ValueError("skip=True needs hidden layers to go past: give hidden, such as (256,), or leave skip out")
    grid = (image[0] // patch_size, image[1] // patch_size)
    given = None if widths is None else sizes("widths", widths, least=1)
    if strides is None:
        strides = _default_strides(grid, None if given is None else len(given))
    strides = sizes("strides", strides, least=1)
    if given is None:
        given = (WIDTH,) * len(strides)
    if len(strides) != len(given) or not set(strides) <= {1, 2}:
        raise ValueError(f"strides must hold a 1 or a 2 for each of the {len(given)} widths, got {list(strides)}")
    if local and strides[0] != 1:
        raise ValueError(f"local=True needs a first stage of stride 1, got strides {list(strides)}")
    return Plan(
        channels,
        image,
        given,
        strides,
        hidden,
        kernel_size,
        patch_size,
        residual,
        bool(local),
        activation,
        architecture,
        bool(skip),
    )


def _paper_widths(widths: Sequence[int] | None) -> tuple[int, ...]:
    d = PAPER_WIDTH
    widths = (d, 2 * d, 3 * d, 2 * d, 2 * d) if widths is None else sizes("widths", widths)
    if len(widths) != 5:
        raise ValueError(f"architecture='paper' has five widths, for example (d, 2d, 3d, 2d, 2d), got {list(widths)}")
    return tuple(widths)


def _paper_kernels(image: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel of the paper's third layer, and the grid that it leaves: 7 and 1 x 1 at 28 x 28."""
    kernel = (min(7, image[0] // 4), min(7, image[1] // 4))
    return kernel, (image[0] // 4 - kernel[0] + 1, image[1] // 4 - kernel[1] + 1)


class _FromGrid(nn.Module):
    """Views a flat batch [N, H * W * C] as grids [N, C, H, W], channels last in memory, as convolutions like."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h w c) -> n c h w", h=self.grid[0], w=self.grid[1])


class _ToFlat(nn.Module):
    """The inverse of `_FromGrid`: no copy where the grid is channels last already."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "n c h w -> n (h w c)")


class _Upsample(nn.Module):
    """Doubles a grid, by a low-resolution convolution and a shuffle or a transposed one, and crops it to a size."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int, grid: tuple[int, int], how: str) -> None:
        super().__init__()
        if how == "shuffle":
            self.doubling = nn.Sequential(nn.Conv2d(fan_in, 4 * fan_out, kernel, padding=kernel // 2), Join(2))
        else:
            self.doubling = nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.doubling(x)[..., : self.grid[0], : self.grid[1]]


class _Skip(nn.Module):
    """x beside f(x), joined along the last dimension: what follows sees both."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], -1)


class LocalLinear(nn.Module):
    """A linear map with weights of its own at every position of a grid [N, C, H, W]."""

    def __init__(self, fan_in: int, fan_out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        positions, bound = grid[0] * grid[1], fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(positions, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(positions, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias, rearrange(x, "n c h w -> (h w) n c"), self.weight)
        return rearrange(y, "(h w) n c -> n c h w", h=self.grid[0])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[2]}, grid={self.grid}"


class _Residual(nn.Module):
    """x + f(x), f a small network that all positions of a grid share."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 1), activation(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def maps_patches(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is one and the same linear map of every patch."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride == (1, 1)


def patches_encoder(plan: Plan, activation: Callable[[], nn.Module]) -> tuple[nn.Sequential, int]:
    """Layers of the patches encoder, and the width of their features."""
    layers: list[nn.Module] = [Cut(plan.patch)]
    fan_in = plan.channels * plan.patch**2
    for i, (width, stride) in enumerate(zip(plan.widths, plan.strides, strict=True)):
        # A kernel of 1 would skip three of four positions where the grid is halved.
        kernel = max(plan.kernel, 3) if stride == 2 else plan.kernel
        if i == 0 and plan.local:
            layers += [LocalLinear(fan_in, width, plan.grids[0]), activation()]
        else:
            layers += [nn.Conv2d(fan_in, width, kernel, stride, kernel // 2), activation()]
        fan_in = width
    layers += [_Residual(fan_in, activation) for _ in range(plan.residual)]
    height, width = plan.grids[-1]
    flat = (fan_in * height * width, *plan.hidden)
    if plan.skip:
        return nn.Sequential(*layers, _ToFlat(), _Skip(dense(flat, activation))), flat[0] + flat[-1]
    return nn.Sequential(*layers, _ToFlat(), *dense(flat, activation)), flat[-1]


def patches_decoder(plan: Plan, latent_dim: int, activation: Callable[[], nn.Module], upsample: str) -> nn.Sequential:
    """Layers of the patches decoder, the mirror of `patches_encoder`."""
    grids = plan.grids
    height, width = grids[-1]
    flat = (latent_dim, *reversed(plan.hidden), plan.widths[-1] * height * width)
    if plan.skip:
        beside = (flat[0] + flat[-2], flat[-1])
        first = nn.Sequential(_Skip(dense(flat[:-1], activation)), *dense(beside, activation))
    else:
        first = dense(flat, activation)
    layers: list[nn.Module] = [*first, _FromGrid(grids[-1])]
    layers += [_Residual(plan.widths[-1], activation) for _ in range(plan.residual)]
    pixels = plan.channels * plan.patch**2
    for i in reversed(range(len(plan.widths))):
        fan_in, fan_out = plan.widths[i], plan.widths[i - 1] if i else pixels
        if i == 0 and plan.local:
            layers.append(LocalLinear(fan_in, fan_out, grids[0]))
        elif plan.strides[i] == 2:
            layers.append(_Upsample(fan_in, fan_out, plan.kernel, grids[i], upsample))
        else:
            layers.append(nn.Conv2d(fan_in, fan_out, plan.kernel, padding=plan.kernel // 2))
        if i:
            layers.append(activation())
    return nn.Sequential(*layers, Join(plan.patch))


def paper_encoder(plan: Plan, activation: Callable[[], nn.Module]) -> tuple[nn.Sequential, int]:
    """Layers of the paper's encoder, and the width of their features."""
    kernel, (height, width) = _paper_kernels(plan.image)
    a, b, c, d, e = plan.widths
    convolutions = [
        nn.Conv2d(plan.channels, a, 4, 2, 1),
        nn.Conv2d(a, b, 4, 2, 1),
        nn.Conv2d(b, c, kernel),
        nn.Conv2d(c, d, 1),
        nn.Conv2d(d, e, 1),
    ]
    layers = [layer for convolution in convolutions for layer in (convolution, activation())]
    return nn.Sequential(*layers, _ToFlat()), e * height * width


def paper_decoder(plan: Plan, latent_dim: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Layers of the paper's decoder, the mirror of `paper_encoder`."""
    kernel, (height, width) = _paper_kernels(plan.image)
    a, b, c, d, e = plan.widths
    convolutions = [
        nn.ConvTranspose2d(e, d, 1),
        nn.ConvTranspose2d(d, c, 1),
        nn.ConvTranspose2d(c, b, kernel),
        nn.ConvTranspose2d(b, a, 4, 2, 1),
    ]
    layers = [layer for convolution in convolutions for layer in (convolution, activation())]
    first = (*dense((latent_dim, e * height * width), activation), _FromGrid((height, width)))
    return nn.Sequential(*first, *layers, nn.ConvTranspose2d(a, plan.channels, 4, 2, 1))
