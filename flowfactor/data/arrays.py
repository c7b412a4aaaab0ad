"""Arrays as they come: byte orders, strides, and which axis is which."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

_MANY_FRAMES = 100  # a default layout with more frames than that, and more than sequences, looks swapped
_CHANNELS = (1, 2, 3, 4)


def as_tensor(array: Any) -> Tensor:
    """Makes a tensor of an array of any byte order, strides and flags, which `torch.from_numpy` partly refuses.

    Args:
        array: A tensor, an array, or what NumPy makes an array of. 16-bit numbers without a sign become floating point
            in [0, 1], as bytes would, for they are pictures; other integers that torch does not know become int64.

    Returns:
        The tensor; it shares the array's memory where it can.

    Raises:
        TypeError: If the elements are no numbers.

    Example:
        >>> as_tensor(np.arange(3, dtype=">i4")[::-1])
        tensor([2, 1, 0], dtype=torch.int32)
    """
    if isinstance(array, Tensor):
        return array.detach()
    array = np.asarray(array)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise TypeError(f"an array of numbers is expected, got one of {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def pictures_tensor(array: Any) -> Tensor:
    """Makes a tensor of pictures: as `as_tensor`, but 16-bit numbers from 0 to 65535 become float32 from 0 to 1.

    Args:
        array: A tensor or an array of pictures.

    Returns:
        The tensor.

    Raises:
        TypeError: If the elements are no numbers.

    Example:
        >>> pictures_tensor(np.array([0, 65535], dtype=np.uint16))
        tensor([0., 1.])
    """
    if isinstance(array, Tensor):
        return array.detach().to(torch.float32) / 65535 if array.dtype == torch.uint16 else array.detach()
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.astype(np.float32) / 65535)
    return as_tensor(array)


def parse_layout(layout: Any) -> tuple[str, ...]:
    """Reads the names of axes, such as ``"n t h w"``.

    Args:
        layout: One letter an axis: n sequences, t frames, c channels, h height, w width; with spaces between or without.

    Returns:
        The letters.

    Raises:
        ValueError: If it is no such layout.

    Example:
        >>> parse_layout("t n h w")
        ('t', 'n', 'h', 'w')
    """
    axes = tuple(str(layout).replace(" ", ""))
    if len(set(axes)) < len(axes) or not set("thw") <= set(axes) <= set("ntchw"):
        raise ValueError(
            "layout names every axis of the frames once: t (frames), h and w, perhaps n (sequences) and c (channels), "
            f"as in 'n t h w' or 't n h w c'; got {layout!r}"
        )
    return axes


def in_order(frames: Any, axes: tuple[str, ...], what: str) -> Any:
    """Brings the axes of frames into the order [N, T, C, H, W]; an axis that the layout lacks has size 1.

    Args:
        frames: A tensor or an array.
        axes: Its layout, from `parse_layout`.
        what: What the frames are called in the message.

    Returns:
        The same elements, [N, T, C, H, W].

    Raises:
        ValueError: If there are more or fewer axes than the layout has.

    Example:
        >>> in_order(np.zeros((20, 7, 4, 5)), parse_layout("t n h w"), "frames").shape
        (7, 20, 1, 4, 5)
    """
    if frames.ndim != len(axes):
        raise ValueError(f"{what} have shape {list(frames.shape)}, but the layout {' '.join(axes)!r} {len(axes)} axes")
    there = [axis if axis in axes else "1" for axis in "ntchw"]
    return rearrange(frames, f"{' '.join(axes)} -> {' '.join(there)}")


def check_axes(shape: tuple[int, ...], axes: tuple[str, ...], what: str, *, is_cut: bool = False) -> None:
    """Refuses pictures whose axes look as if they were in another order than the one that is taken by default.

    Args:
        shape: Their shape.
        axes: The default layout.
        what: What they are called in the message.
        is_cut: Whether long sequences are cut into windows, so that many frames are no wonder.

    Raises:
        ValueError: If they look so; the message says how to tell the layout.

    Example:
        >>> check_axes((20, 10000, 64, 64), ("n", "t", "h", "w"), "frames")
        Traceback (most recent call last):
        ...
        ValueError: frames [20, 10000, 64, 64] would be 20 sequences of 10000 frames each: if the first axis is the
        frames', give layout='t n h w'; if they are that long, layout='n t h w', or cut them by window=
    """
    size = dict(zip(axes, shape, strict=True))
    seen = f"{what} {list(shape)}"
    own = " ".join(axes)
    if looks_channels_last(shape, axes):
        other = own.replace("c h w", "h w c") if "c" in axes else "t h w c"
        raise ValueError(
            f"{seen} look channels-last: if they are, give layout={other!r}; if the last axis is the width, {own!r}"
        )
    frames, count, channels = size.get("t", 2), size.get("n", 0), size.get("c", 1)
    if "t" in size and "c" in size and channels > 4 and frames in (1, 3):
        other = own.replace("t c", "c t")
        raise ValueError(
            f"{seen} would be sequences of {frames} frames with {channels} channels: if these are {channels} frames, "
            f"give layout={other!r}; if not, layout={own!r}"
        )
    if "n" in size and frames > count and frames >= _MANY_FRAMES and not is_cut:
        other = own.replace("n t", "t n")
        raise ValueError(
            f"{seen} would be {count} sequences of {frames} frames each: if the first axis is the frames', give "
            f"layout={other!r}; if they are that long, layout={own!r}, or cut them by window="
        )


def looks_channels_last(shape: tuple[int, ...], axes: tuple[str, ...]) -> bool:
    """Tells whether the last axis is as short as channels are, while those before it are as long as sides of pictures.

    Args:
        shape: Shape of pictures.
        axes: The axes that they are taken for, the width last.

    Returns:
        Whether they look channels-last.

    Example:
        >>> looks_channels_last((10, 28, 28, 1), ("n", "c", "h", "w"))
        True
    """
    size = dict(zip(axes, shape, strict=True))
    if size["w"] not in _CHANNELS or size["h"] <= 4:
        return False
    # [N, T, C, H, W] with few channels is in order, however narrow; without channels the axis before is a side too.
    return size["c"] not in _CHANNELS if "c" in size else size.get("t", 0) > 4
