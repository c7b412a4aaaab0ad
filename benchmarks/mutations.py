"""Seeded damage to every file that flowfactor reads: python -m benchmarks.mutations --count 5000 --seed 0.

Each case writes a good file, mutates it, and reads it by a public entry point, in a process of its own that has limits of
time and memory. Good outcomes are a right result, another result without an error (of formats without a checksum), and
a refusal (ValueError, TypeError or OSError) whose message names the file. All else is a failure: another exception, a
message without the file, a hang, a process that dies, or code that was run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowfactor.data import MNIST, Falcor3D, Sequences, Shapes3D
from flowfactor.models import build_model, load_pretrained
from flowfactor.training import (
    Config,
    EvaluationConfig,
    choose_variants,
    load_config,
    plan_benchmark,
    prepare,
    write_report,
)
from flowfactor.training.worker import execute

SECONDS, MEMORY = 20, 3 * 2**30
CANARY = "canary"
_SPAWNING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")


@dataclass(frozen=True)
class Kind:
    """One kind of file: how a good one is made, which file is mutated, and what reads it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    share: float = 1.0


class Payload:
    """What a malicious pickle holds: unpickled, it makes a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


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

_VALUES = (
    *("null", "-1", "1e999", "NaN", "true", '"x"', "[]", "{}", "[[1], {}]", "1000000000000", "0.5", "''", "~", "0"),
    *("!!python/object/apply:os.mkdir [canary]", "&a [*a]", "2026-01-01", '"\\ud800"', "'1e-3'"),
)


def mutate(content: bytes, draw: random.Random, canary: str) -> bytes:
    """Damages a file's content.

    Args:
        content: The content.
        draw: The source of chance.
        canary: What a payload would make.

    Returns:
        The damaged content.
    """
    made = bytearray(content)
    at = draw.randrange(len(made)) if draw.random() < 0.5 else draw.randrange(min(len(made), 200))
    way = draw.randrange(11)
    if way == 0:
        for _ in range(draw.choice((1, 1, 1, 8))):
            made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del made[at:]
    elif way == 2:
        made += draw.randbytes(draw.choice((1, 64, 5000)))
    elif way == 3:
        other = draw.randrange(len(made))
        made[at], made[other] = made[other], made[at]
    elif way == 4:
        made[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", draw.randbytes(4)))
    elif way == 5:
        made[at : at + draw.choice((8, 64, 512))] = bytes(draw.choice((8, 64, 512)))
    elif way == 6:
        made = bytearray(
            draw.choice((b"", b"[" * 50_000, b'{"a":' * 50_000, draw.randbytes(300), b"\x89PNG\r\n\x1a\n"))
        )
    elif way == 7:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
        made = bytearray(draw.choice((pickle.dumps(Payload(canary)), buffer.getvalue())))
    elif way == 8:
        buffer = io.BytesIO()
        torch.save({"state_dict": Payload(canary)}, buffer)
        made = bytearray(buffer.getvalue())
    else:
        made = bytearray(_mutate_text(bytes(made), draw, canary))
    return bytes(made)


def _mutate_text(content: bytes, draw: random.Random, canary: str) -> bytes:
    """Replaces a value or a key of text; of other content, a run of bytes."""
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        at = draw.randrange(len(content))
        return content[:at] + draw.randbytes(12) + content[at + 12 :]
    places = [n for n, line in enumerate(lines) if ":" in line]
    if not places:  # a table
        n = draw.randrange(len(lines))
        cells = lines[n].split(",")
        cells[draw.randrange(len(cells))] = draw.choice(_VALUES)
        return "\r\n".join([*lines[:n], ",".join(cells), *lines[n + 1 :], ""]).encode()
    n = draw.choice(places)
    key, _, value = lines[n].partition(":")
    if draw.random() < 0.7:
        lines[n] = f"{key}: {draw.choice(_VALUES).replace('canary', canary)}{',' if value.endswith(',') else ''}"
    else:
        lines[n] = f"{key[: len(key) // 2]}zz{key[len(key) // 2 :]}:{value}"
    return "\n".join(lines).encode()


def outcome(kind: Kind, good: Any, folder: Path, canary: Path) -> tuple[str, str]:
    """Reads a mutated file, and says what came of it: good outcomes are the first three."""
    spawned: list[str] = []
    _hooked.append(spawned)
    told = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = "right" if kind.read(folder) == good else "other"
    except (ValueError, TypeError, OSError) as error:
        told = f"{type(error).__name__}: {error}"
        result = "refused" if str(folder) in str(error) else "NOT NAMED"
    except BaseException as error:  # whatever it is, it is what this looks for
        told, result = f"{type(error).__name__}: {error}", "RAW"
    finally:
        _hooked.clear()
    if canary.exists() or spawned:
        return "CODE RUN", told or str(spawned)
    return result, told


_hooked: list[list[str]] = []


def _audit(event: str, arguments: Any) -> None:
    if _hooked and event in _SPAWNING:
        _hooked[-1].append(event)


def _work(cases: list[tuple[int, str]], seed: int, masters: dict[str, Path], goods: dict[str, Any], pipe: Any) -> None:
    """Runs cases in turn, in a process of its own."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(_audit)
    sys.stderr = io.StringIO()
    for number, name in cases:
        draw = random.Random(f"{seed}-{number}")
        with tempfile.TemporaryDirectory() as place:
            folder, canary = Path(place) / "case", Path(place) / CANARY
            shutil.copytree(masters[name].parent if masters[name].is_file() else masters[name], folder)
            victim = folder / _victims[name]
            victim.write_bytes(mutate(victim.read_bytes(), draw, str(canary)))
            pipe.send((number, *outcome(KINDS[name], goods[name], folder, canary)))
    pipe.send(None)


_victims: dict[str, Path] = {}


def run(count: int, seed: int, kinds: list[str]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs the cases.

    Args:
        count: Their number.
        seed: Seed of all damage.
        kinds: Names in `KINDS`.

    Returns:
        The number of cases by kind and outcome, and a line for every failure.
    """
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    draw = random.Random(seed)
    names = draw.choices(kinds, [KINDS[name].share for name in kinds], k=count)
    cases = list(enumerate(names))
    with tempfile.TemporaryDirectory() as place:
        masters, goods = {}, {}
        for name in kinds:
            master = Path(place) / name
            master.mkdir()
            _victims[name] = KINDS[name].make(master).relative_to(master)
            copy = Path(place) / f"{name}-read"
            shutil.copytree(master, copy)
            masters[name], goods[name] = master, KINDS[name].read(copy)
        context = multiprocessing.get_context("fork")
        while cases:
            ours, theirs = context.Pipe(False)
            worker = context.Process(target=_work, args=(cases, seed, masters, goods, theirs))
            worker.start()
            theirs.close()
            done = _collect(ours, cases, counts, failures)
            worker.kill()
            worker.join()
            cases = cases[done:]
    return counts, failures


def _collect(pipe: Any, cases: list[tuple[int, str]], counts: Counter[tuple[str, str]], failures: list[str]) -> int:
    """Takes outcomes until the worker ends, hangs or dies; gives the number of cases that are done with."""
    for done, (number, name) in enumerate(cases):
        try:
            made = pipe.recv() if pipe.poll(SECONDS) else (number, "HANG", "")
        except EOFError:
            made = (number, "DIED", "")
        _, result, told = made
        counts[name, result] += 1
        if result.isupper():
            failures.append(f"{name} case {number}: {result} {told[:300]}")
        if result in ("HANG", "DIED"):
            return done + 1
    return len(cases)


def main() -> int:
    """Runs the cases that the command line asks for, and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    asked = parser.parse_args()
    counts, failures = run(asked.count, asked.seed, asked.kinds)
    print("\n".join(failures))
    for (name, result), number in sorted(counts.items()):
        print(f"{name:15} {result:10} {number}")
    print(f"{sum(counts.values())} cases, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
