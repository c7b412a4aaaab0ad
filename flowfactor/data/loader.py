"""A loader of sequences that can be resumed in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Generator
from torch.utils.data import IterableDataset, get_worker_info

from flowfactor.data.base import Batch, SequenceDataset


class SequenceLoader(IterableDataset[Batch]):
    """Epochs of stratified batches, with a position that can be saved and restored.

    Every ``iter()`` begins a new epoch, whose draws depend on the seed and the number of the epoch alone. After
    `load_state_dict` the next ``iter()`` goes on behind the last batch that had been handed out. Batches are made
    whole, in the iterating process; where that should happen elsewhere, put the loader into
    ``torch.utils.data.DataLoader(loader, batch_size=None, num_workers=n)``, whose workers share out the batches (the
    position is then the workers' and cannot be saved).

    Args:
        dataset: Where the sequences come from.
        batch_size: Sequences per batch.
        seed: Seed of all epochs.
        stratified: See `SequenceDataset.batches`.
        shuffle: See `SequenceDataset.batches`.
        drop_last: See `SequenceDataset.batches`.
        rank: Which process this is.
        world_size: Number of processes; each takes every world_size-th batch, all equally many.

    Raises:
        ValueError: If there is no rank such as `rank`, or the data set is too small for a batch of each process.

    Example:
        >>> import torch
        >>> import flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(64, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 80)}, steps=4)
        >>> loader = data.loader(16, generator=torch.Generator().manual_seed(0))
        >>> batches = iter(loader)
        >>> seen = next(batches)["frames"]
        >>> state = loader.state_dict()
        >>> state["epoch"], state["batch"], len(loader)
        (0, 1, 4)
        >>> again = data.loader(16)
        >>> again.load_state_dict(state)
        >>> torch.equal(next(iter(again))["frames"], next(batches)["frames"])
        True
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        batch_size: int,
        *,
        seed: int = 0,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got {rank=} and {world_size=}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.stratified, self.shuffle, self.drop_last = stratified, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._epoch, self._position = -1, 0
        self._resumed = False
        # The number of batches is the same in every epoch: it depends on counts alone.
        self._length = len(self._plan(0)) // world_size
        if not self._length:
            raise ValueError(
                f"{len(dataset)} elements do not make one batch of {batch_size} for each of {world_size} processes"
            )

    def __len__(self) -> int:
        """Batches per epoch (of this process)."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Begins a new epoch, or goes on with the one that was loaded."""
        if not self._resumed or self._position >= self._length:
            self._epoch, self._position = self._epoch + 1, 0
        self._resumed = False
        return self._run(self._epoch, self._position)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        mine = self._plan(epoch)[self.rank :: self.world_size][: self._length]
        worker = get_worker_info()
        if worker is not None:
            mine, start = mine[worker.id :: worker.num_workers], 0
        for position in range(start, len(mine)):
            batch = self.dataset.batch(*mine[position])
            if epoch == self._epoch:  # an older iterator, still held by someone, must not move the position
                self._position = position + 1
            yield batch

    def _plan(self, epoch: int) -> list[tuple[Any, Any]]:
        # Far-apart odd multiples keep the epochs of neighbouring seeds from meeting.
        generator = Generator().manual_seed((self.seed + epoch * 0x9E3779B97F4A7C15) % 2**63)
        return self.dataset.plan(
            self.batch_size,
            generator=generator,
            stratified=self.stratified,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )

    def state_dict(self) -> dict[str, int]:
        """Gives the position as plain numbers: ``seed``, ``epoch``, ``batch`` (handed out in it), ``batch_size``."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "batch": self._position,
            "batch_size": self.batch_size,
            "length": self._length,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes up a position that `state_dict` gave.

        Args:
            state: The position.

        Raises:
            ValueError: If it belongs to a loader with another batch size or another number of batches.
        """
        missing = {"seed", "epoch", "batch", "batch_size", "length"} - set(state)
        if missing:
            raise ValueError(f"not the state of a loader of sequences: it lacks {', '.join(sorted(missing))}")
        for name, own in (("batch_size", self.batch_size), ("length", self._length)):
            if state[name] != own:
                raise ValueError(f"the saved loader had {name} {state[name]}, this one has {own}: make them agree")
        self.seed, self._epoch, self._position = int(state["seed"]), int(state["epoch"]), int(state["batch"])
        self._resumed = self._epoch >= 0
