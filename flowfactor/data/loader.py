"""A loader of sequences that can be resumed in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from flowfactor.data.epochs import Batch


class Planned(Protocol):
    """What a loader needs of a data set: its size, the plan of an epoch, and the batches in it."""

    def __len__(self) -> int:
        """Number of elements."""
        ...

    def plan(
        self, batch_size: int, *, generator: Generator, stratified: bool, shuffle: bool, drop_last: bool
    ) -> list[tuple[Any, ...]]:
        """The elements and flows of every batch of an epoch, and what else is drawn."""
        ...

    @property
    def batch(self) -> Callable[..., Batch]:
        """Makes one batch of what the plan says, handed over argument by argument."""
        ...


class SequenceLoader(IterableDataset[Batch]):
    """Epochs of stratified batches, with a position that can be saved and restored.

    Every ``iter()`` begins a new epoch, whose draws depend on the seed and the number of the epoch alone. After
    `load_state_dict` the next ``iter()`` goes on after the last batch that had been handed out. Batches are made
    whole, in the iterating process; where that should happen elsewhere, iterate over ``loader.dataloader(num_workers=n)``:
    the same epochs in the same order, which count in this loader, whose position can be saved as before. The workers of a
    plain ``DataLoader`` would each count epochs of their own, and are refused.

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
        >>> workers = loader.dataloader(num_workers=0)     # or more, to make batches in other processes
        >>> first, second = ([batch["k"].tolist() for batch in workers] for epoch in range(2))
        >>> loader.state_dict()["epoch"]
        2
    """

    def __init__(
        self,
        dataset: Planned,
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
        """Begins a new epoch, or goes on with the one that was loaded.

        Raises:
            RuntimeError: If this is a copy in the worker of a DataLoader.
        """
        if get_worker_info() is not None:
            # A worker's copy would begin with the same epoch whenever workers are started anew.
            raise RuntimeError(
                "a SequenceLoader in the workers of a DataLoader would repeat its epoch for ever: iterate over "
                "loader.dataloader(num_workers=n), which has the workers make the batches of this loader's epochs"
            )
        return self._counted(self._begin(), (self.dataset.batch(*drawn) for drawn in self._ahead()))

    def dataloader(self, num_workers: int = 0, **settings: Any) -> DataLoader[Batch]:
        """Gives a DataLoader whose workers make the batches of this loader's epochs, in order.

        Args:
            num_workers: Number of processes; 0 makes batches in this one.
            settings: Further arguments of ``DataLoader``, such as ``persistent_workers`` or ``prefetch_factor``.

        Returns:
            The DataLoader; each ``iter()`` of it begins an epoch of this loader or goes on with the one loaded, and
            `state_dict` counts the batches that it handed out, not those that workers have made ahead.

        Raises:
            ValueError: If a setting is this loader's own.
        """
        own = {"batch_size", "batch_sampler", "sampler", "shuffle", "drop_last", "collate_fn"} & set(settings)
        if own:
            raise ValueError(f"{', '.join(sorted(own))} cannot be given: batches are this loader's")
        return _Workers(self, num_workers, settings)

    def _begin(self) -> int:
        """Takes up the next epoch, or the one that was loaded; returns its number."""
        if not self._resumed or self._position >= self._length:
            self._epoch, self._position = self._epoch + 1, 0
        self._resumed = False
        return self._epoch

    def _ahead(self) -> list[tuple[Any, ...]]:
        """What the batches from the position to the end of the epoch hold."""
        return self._plan(self._epoch)[self.rank :: self.world_size][self._position : self._length]

    def _counted(self, epoch: int, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Hands batches on, and moves the position with them."""
        for position, batch in enumerate(batches, self._position):
            if epoch == self._epoch:  # an older iterator, still held by someone, must not move the position
                self._position = position + 1
            yield batch

    def _plan(self, epoch: int) -> list[tuple[Any, ...]]:
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


class _Made(Dataset[Batch]):
    """Batches by what they hold."""

    def __init__(self, dataset: Planned) -> None:
        self.dataset = dataset

    def __getitem__(self, drawn: tuple[Any, ...]) -> Batch:
        return self.dataset.batch(*drawn)


class _Plan(Sampler[Any]):
    """What the coming batches of a loader hold: drawn in the process of the loader, wherever they are made."""

    def __init__(self, loader: SequenceLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader._ahead())

    def __len__(self) -> int:
        return len(self.loader)


class _Workers(DataLoader[Batch]):
    """Has workers make the batches of a loader, whose epochs and position count in the loader itself."""

    def __init__(self, loader: SequenceLoader, num_workers: int, settings: dict[str, Any]) -> None:
        made: Dataset[Batch] = _Made(loader.dataset)
        super().__init__(made, batch_size=None, sampler=_Plan(loader), num_workers=num_workers, **settings)
        self._loader = loader

    def state_dict(self) -> dict[str, int]:
        """The loader's position, by which Lightning knows that it can be resumed."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes up a position."""
        self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._loader._begin()
        return self._loader._counted(epoch, iter(super().__iter__()))
