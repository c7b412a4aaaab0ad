"""Small films of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(count: int, seed: int = 0, shape: tuple[int, ...] = (8, 12)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_pictures(folder: Path, frames: np.ndarray, ending: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{step}{ending}")
    return folder


def write_pages(file: Path, frames: np.ndarray) -> Path:
    """One file of several pictures: GIF, TIFF, WEBP or animated PNG, by its ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in frames]
    lossless = {"lossless": True} if file.suffix == ".webp" else {}
    first.save(file, save_all=True, append_images=others, **lossless)
    return file


def write_array(file: Path, frames: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, frames=frames)
    else:
        np.save(file, frames)
    return file


def write_video(file: Path, frames: np.ndarray, codec: str = "ffv1") -> Path:
    """A video of grey [T, H, W] or colour [T, H, W, 3]; by default without loss (.mkv)."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    grey = frames.ndim == 3
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = ("gray" if grey else "bgr0") if codec == "ffv1" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray" if grey else "rgb24")))
        container.mux(stream.encode())
    return file
