"""Pictures and animations as files, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor._files import replacing
from flowfactor.errors import require
from flowfactor.plot.grid import checked_range, enlarge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALETTE_PIXELS = 2**20  # as many pixels as the palette is chosen from, at most


def save(picture: NDArray | Tensor | Figure, path: str | os.PathLike[str], *, scale: int = 1, dpi: float = 150) -> Path:
    """Writes a picture or a figure as PNG, first under a temporary name.

    Args:
        picture: An array or tensor ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``, floats in [0, 1] or uint8; or a
            matplotlib figure.
        path: Where to write it; the folder must exist and the name end in ``.png``.
        scale: Each pixel of an array becomes a square of this many pixels a side.
        dpi: Pixels per inch of a figure.

    Returns:
        The path.

    Raises:
        ImportError: If Pillow (for an array) is not installed.
        FileNotFoundError: If the folder does not exist.
        TypeError: If it is no picture.
        ValueError: If a shape, the values, a setting or the name do not fit.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(torch.rand(28, 28, 3), f"{folder}/noise.png").name
        'noise.png'
    """
    target = _checked_path(path, ".png")
    check_count("scale", scale)
    if callable(getattr(picture, "savefig", None)):
        if not dpi > 0:
            raise ValueError(f"dpi must be positive, got {dpi!r}")
        with replacing(target) as part:
            picture.savefig(part, format="png", dpi=dpi)  # pyright: ignore[reportAttributeAccessIssue]
        return target
    values = _bytes(picture, "the picture", (2, 3))
    image = require("PIL.Image", extra="plot").fromarray(enlarge(values, scale))
    with replacing(target) as part:
        image.save(part, format="PNG", optimize=True)
    return target


def to_gif(
    frames: NDArray | Tensor, path: str | os.PathLike[str], *, fps: float = 10, scale: int = 1, loop: bool = True
) -> Path:
    """Writes frames as an animated GIF.

    All frames share one palette, chosen from their own colours, so that still parts do not flicker and the file stays
    small; there is no dithering.

    Args:
        frames: ``[T, H, W, 3]`` (or 1), floats in [0, 1] or uint8, such as `traversal_frames` returns.
        path: Where to write it; the folder must exist and the name end in ``.gif``.
        fps: Frames per second, at most 50. GIF counts in hundredths of a second, and the nearest is taken.
        scale: Each pixel becomes a square of this many pixels a side.
        loop: Whether to repeat for ever rather than to play once.

    Returns:
        The path.

    Raises:
        ImportError: If Pillow is not installed.
        FileNotFoundError: If the folder does not exist.
        TypeError: If they are no frames.
        ValueError: If a shape, the values, a setting or the name do not fit.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_gif(torch.rand(4, 28, 28, 3), f"{folder}/noise.gif", fps=20).name
        'noise.gif'
    """
    target = _checked_path(path, ".gif")
    if not 0 < fps <= 50:
        raise ValueError(f"fps must lie between 0 and 50, which is as fast as viewers play a GIF; got {fps!r}")
    check_count("scale", scale)
    values = _bytes(frames, "frames", (4,))
    image = require("PIL.Image", extra="plot")
    palette = _palette(values)
    pictures = [
        image.fromarray(enlarge(frame, scale)).quantize(palette=palette, dither=image.Dither.NONE) for frame in values
    ]
    options = {"loop": 0} if loop else {}
    with replacing(target) as part:
        pictures[0].save(
            part,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=10 * max(2, round(100 / fps)),
            optimize=True,
            **options,
        )
    return target


def _palette(frames: NDArray[np.uint8]) -> Any:
    image = require("PIL.Image", extra="plot")
    pixels = frames.reshape(-1, 3)
    colours = np.unique(pixels, axis=0)
    if len(colours) > 256:
        colours = pixels[:: -(-len(pixels) // _PALETTE_PIXELS)]
    # A few colours are listed once each and kept exactly; of many, the frequent ones get the finer shades.
    return image.fromarray(colours[None]).quantize(256, method=image.Quantize.MEDIANCUT, dither=image.Dither.NONE)


def _bytes(values: object, what: str, ndims: tuple[int, ...]) -> NDArray[np.uint8]:
    """Checks pictures [(T,) H, W(, C)], floats in [0, 1] or bytes, and makes them bytes [(T,) H, W, 3]."""
    expected = " or ".join({2: "[H, W]", 3: "[H, W, 3]", 4: "[T, H, W, 3]"}[n] for n in ndims)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{what} must be an array or a tensor {expected}, got {type(values).__name__}")
    if values.ndim not in ndims or values.size == 0 or (values.ndim > 2 and values.shape[-1] not in (1, 3)):
        mend = "; the channels come last" if values.ndim > 2 and values.shape[-3] in (1, 3) else ""
        raise ValueError(f"{what} must have shape {expected} and not be empty, got {list(values.shape)}{mend}")
    if values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.floating):
            raise TypeError(f"{what} must hold floats in [0, 1] or uint8, got {values.dtype}")
        values = np.rint(checked_range(values, what) * 255).astype(np.uint8)
    if values.ndim == 2:
        values = values[..., None]
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:-1], 3)))


def _checked_path(path: str | os.PathLike[str], suffix: str) -> Path:
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise ValueError(f"the file's name must end in {suffix}, got {target.name!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; create it first")
    return target
