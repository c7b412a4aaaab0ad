"""How fast data are made: what a training step waits for before it can begin."""

from __future__ import annotations

import time

import torch

import flowfactor as ff
from benchmarks.timing import Readings, Row, Target, interleaved
from flowfactor.data import SequenceDataset
from flowfactor.data.base import Batch


def digits() -> tuple[SequenceDataset, str] | None:
    """Training sequences of coloured digits: MNIST where it is at hand, else scikit-learn's; None where neither is."""
    try:
        return ff.data.MNIST(), "MNIST"
    except FileNotFoundError:
        try:
            return ff.data.Digits(), "scikit-learn's digits (no MNIST at hand)"
        except ImportError:
            return None


class Stream:
    """Batches without an end, as a training takes them."""

    def __init__(self, dataset: SequenceDataset, batch_size: int) -> None:
        self.loader = dataset.loader(batch_size, generator=torch.Generator().manual_seed(0))
        self.batches = iter(self.loader)

    def __call__(self) -> Batch:
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)


def scenes(repeats: int, batch_size: int = 64) -> list[Row]:
    """Images that `Scenes` draws in a second: random scenes, stratified over the factors that move."""
    begin = time.perf_counter()
    dataset = ff.data.Scenes()
    seconds = time.perf_counter() - begin
    stream = Stream(dataset, batch_size)
    count = stream()["frames"].shape[:2].numel()
    times = interleaved({"batch": stream}, repeats, at_least=0.5)["batch"]
    size = "x".join(map(str, dataset.image_shape[1:]))
    row = Row("data", f"Scenes, {size}, batch {batch_size}", times.rate(count, "images/s"))
    row.target = Target(30_000, "at least", "value")
    row.notes = {"made once, s": seconds}
    return [row]


def sequences(repeats: int, batch_size: int = 96) -> list[Row]:
    """Images of digit sequences made in a second: three transformations, drawn when a batch is asked for."""
    found = digits()
    if found is None:
        print("  neither MNIST nor scikit-learn is at hand: left out")
        return []
    dataset, name = found
    stream = Stream(dataset, batch_size)
    count = stream()["frames"].shape[:2].numel()
    times = interleaved({"batch": stream}, repeats, at_least=0.3)["batch"]
    rate: Readings = times.rate(count, "images/s")
    return [Row("data", f"{name}, batch {batch_size}", rate, notes={"batch, ms": str(times)})]
