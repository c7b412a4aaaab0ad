"""Runs that take a second: their settings, as a configuration and as arguments, and data for them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from flowfactor.training import Config, load_config

SIZES = {
    "latent_dim": 4,
    "hidden": [8, 8],
    "frames_per_step": 2,
    "encoder": {"widths": [8]},
    "decoder": {"widths": [8]},
}
TINY = [
    *("--data.steps", "2", "--data.limit", "12", "--model.latent_dim", "4", "--model.hidden", "[8,8]"),
    *("--model.encoder", "{widths: [8]}", "--model.decoder", "{widths: [8]}", "--train.batch_size", "6"),
]


def small_run(output: Path, model: dict[str, Any] = SIZES, method: str = "ours", **train: Any) -> Config:
    """Eight steps on digits, unless the settings of the training say otherwise."""
    options = {"steps": 8, "batch_size": 6, "log_every": 2, "tensorboard": False, "progress": False}
    options |= {"evaluate_limit": 4, "likelihood_limit": 6, "likelihood_samples": 2}
    data = {"name": "digits", "steps": 2, "limit": 21}
    return Config.from_dict(
        {"data": data, "model": model, "method": method, "train": options | train, "output": str(output)}
    )


def write_mnist(folder: Path, count: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes(), 1))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(count))
    return folder


Snapshot = dict[str, bytes | None]
"""What lies in a folder: the bytes of every file, and None for a folder."""


def snapshot(folder: Path) -> Snapshot:
    """Reads all that lies in a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def small_demo(preset: str) -> Config:
    """The settings of a training of the demo, made small: three steps."""
    values = load_config(preset).as_dict()
    values["data"] |= {"steps": 2, "limit": 12}
    values["model"] |= SIZES
    values["train"] |= {"minutes": 60.0, "steps": 3, "batch_size": 6, "evaluate_limit": 2, "likelihood_limit": 0}
    values["train"] |= {"progress": False, "threads": 1}
    return Config.from_dict(values)
