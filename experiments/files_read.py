"""The files that flowfactor reads, as `experiments.mutations` damages them: how good ones are made, and what reads them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowfactor.comparison import choose_variants, plan_benchmark, write_report
from flowfactor.comparison.worker import execute
from flowfactor.data import MNIST, Falcor3D, Sequences, Shapes3D
from flowfactor.models import build_model, load_pretrained
from flowfactor.training import Config, EvaluationConfig, load_config, prepare


@dataclass(frozen=True)
class Kind:
    """One kind of file: how a good one is made, which file is mutated, and what reads it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    share: float = 1.0


def _digits(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def _make_idx(folder: Path, zipped: bool = False) -> Path:
    images = struct.pack(">4I", 0x803, 6, 28, 28) + _digits().tobytes()
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 6) + bytes(6))
    path = folder / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(images, mtime=0) if zipped else images)
    return path


def _make_npz(folder: Path) -> Path:
    np.savez(folder / "kmnist-train-labels.npz", np.zeros(6, np.uint8))
    np.savez_compressed(folder / "kmnist-train-imgs.npz", _digits())
    return folder / "kmnist-train-imgs.npz"


def _states(*sizes: int) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), -1).reshape(-1, len(sizes))


def _make_npy(folder: Path) -> Path:
    from PIL import Image

    labels = _states(2, 2, 2, 1, 1, 1, 1) / 2
    (folder / "images").mkdir()
    for n in range(len(labels)):
        Image.fromarray(np.full((4, 4, 3), n * 9, np.uint8)).save(folder / "images" / f"{n:06}.png")
    with (folder / "train-rec.labels").open("wb") as file:
        np.save(file, labels)
    return folder / "train-rec.labels"


def _make_h5(folder: Path) -> Path:
    import h5py

    states = _states(3, 2, 2, 2, 1, 1)
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        pictures = np.random.default_rng(0).integers(0, 256, (len(states), 4, 4, 3), dtype=np.uint8)
        file.create_dataset("images", data=pictures, chunks=(4, 4, 4, 3), compression="gzip")
        file["labels"] = states.astype(float)
    return folder / "3dshapes.h5"


def _make_pictures(folder: Path, suffix: str = ".png") -> Path:
    from PIL import Image

    for name in ("a", "b"):
        (folder / "turn" / name).mkdir(parents=True)
        for n in range(3):
            Image.fromarray(_digits()[n]).save(folder / "turn" / name / f"{n}{suffix}")
    return folder / "turn" / "a" / f"1{suffix}"


def _make_model(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    return build_model("ours", (1, 8, 8), 2, 4, hidden=(8, 8), **sizes).save_pretrained(folder) / name


def _settings(folder: Path) -> Config:
    model = {"latent_dim": 4, "hidden": [8, 8], "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    train = {
        "steps": 2,
        "log_every": 1,
        "checkpoint_steps": 1,
        "schedule": "constant",
        "batch_size": 6,
        "tensorboard": False,
        "progress": False,
        "accelerator": "cpu",
    }
    data = {"name": "digits", "steps": 2, "limit": 12}
    return Config.from_dict({"data": data, "model": model, "train": train, "output": str(folder)})


def _make_settings(folder: Path) -> Path:
    import yaml

    (folder / "my.yaml").write_text(yaml.safe_dump(_settings(folder / "run").as_dict()))
    return folder / "my.yaml"


def _make_film(folder: Path, suffix: str) -> Path:
    for name in ("turn", "grow"):
        (folder / "films" / name).mkdir(parents=True)
        for n in range(2):
            path = folder / "films" / name / f"film{n}{suffix}"
            if suffix == ".npz":
                np.savez_compressed(path, frames=_digits(3))
            else:
                np.save(path, _digits(3))
    return folder / "films" / "turn" / f"film1{suffix}"


def _make_run(folder: Path, name: str, alone: bool = False) -> Path:
    prepare(_settings(folder)).fit(measure=False)
    for other in ("previous.ckpt", "best.ckpt") if alone else ():
        (folder / other).unlink(missing_ok=True)
    return folder / name


def _read_run(folder: Path) -> Any:
    """Goes on with a run, and gives its weights and, but for the seconds, its table."""
    config = _settings(folder)
    config.train.steps = 3
    run = prepare(config, resume=True)
    run.fit(measure=False)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return _hash(run.model.state_dict()), [(row.get("step"), row.get("loss")) for row in rows]


def _plan(folder: Path) -> Any:
    counts: dict[str, Any] = {"images": 2, "likelihood_images": 2, "likelihood_samples": 2, "search_images": 2}
    evaluation = EvaluationConfig(**counts, latent_images=2, factor_samples=0, vp_images=0, resamples=0)
    return plan_benchmark(
        _settings(folder), choose_variants(["ours"]), folder, seeds=(0, 1), workers=0, threads=1, evaluation=evaluation
    )


def _make_benchmark(folder: Path, name: str) -> Path:
    if not _plan(folder).run(tell=lambda line: None):
        raise RuntimeError("the benchmark failed")
    return folder / "ours-seed0" / name


def _read_report(folder: Path) -> str:
    return write_report(folder)[0].read_text()


def _read_worker(folder: Path) -> Any:
    return execute(folder / "ours-seed0")["figures"]  # type: ignore[index]


def _read_data(data: Any) -> Any:
    batch = data.batch(list(range(len(data))), 0 if data.fixed_k is None else None)
    return data.flow_names, hashlib.sha256(batch["frames"].numpy().tobytes()).hexdigest()


def _read_model(folder: Path) -> Any:
    model = load_pretrained(folder)
    return _hash(model.state_dict()), model.config()


def _hash(state: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


KINDS: dict[str, Kind] = {
    "idx": Kind(_make_idx, lambda folder: _read_data(MNIST(folder, steps=1))),
    "gz": Kind(lambda folder: _make_idx(folder, True), lambda folder: _read_data(MNIST(folder, steps=1))),
    "npz": Kind(_make_npz, lambda folder: _read_data(MNIST(folder, steps=1))),
    "npy": Kind(_make_npy, lambda folder: _read_data(Falcor3D(folder, "all", vary=("light_x",), steps=1))),
    "h5": Kind(_make_h5, lambda folder: _read_data(Shapes3D(folder, "all", vary=("floor_hue",), steps=1))),
    "png": Kind(_make_pictures, lambda folder: _read_data(Sequences(folder))),
    "gif": Kind(lambda folder: _make_pictures(folder, ".gif"), lambda folder: _read_data(Sequences(folder))),
    "settings": Kind(_make_settings, lambda folder: load_config(folder / "my.yaml").as_dict()),
    "config": Kind(lambda folder: _make_model(folder, "config.json"), lambda folder: _read_model(folder)),
    "weights": Kind(
        lambda folder: _make_model(folder, "model.safetensors"),
        lambda folder: _read_model(folder),
    ),
    "own npy": Kind(lambda folder: _make_film(folder, ".npy"), lambda folder: _read_data(Sequences(folder / "films"))),
    "own npz": Kind(lambda folder: _make_film(folder, ".npz"), lambda folder: _read_data(Sequences(folder / "films"))),
    "checkpoint": Kind(lambda folder: _make_run(folder, "last.ckpt"), _read_run, share=0.5),
    "only checkpoint": Kind(lambda folder: _make_run(folder, "last.ckpt", True), _read_run),
    "data.json": Kind(lambda folder: _make_run(folder, "data.json"), _read_run, share=0.5),
    "list": Kind(lambda folder: _make_run(folder, "flowfactor.json"), _read_run, share=0.5),
    "metrics.csv": Kind(lambda folder: _make_run(folder, "metrics.csv"), _read_run, share=0.5),
    "benchmark plan": Kind(
        lambda folder: _make_benchmark(folder, "settings.json"),
        lambda folder: [run.finished for run in _plan(folder).runs],
        share=0.5,
    ),
    "benchmark.json": Kind(lambda folder: _make_benchmark(folder, "benchmark.json"), _read_report, share=0.5),
    "settings.json": Kind(lambda folder: _make_benchmark(folder, "settings.json"), _read_worker, share=0.2),
    "result.json": Kind(lambda folder: _make_benchmark(folder, "result.json"), _read_worker, share=0.2),
}
