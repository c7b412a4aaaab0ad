"""The Lightning data module of data sets of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flowfactor.data import SequenceDataset, SequenceLoader
from flowfactor.data.base import Batch


class _Endless(IterableDataset[Batch]):
    """Epoch after epoch of a loader without an end: for Lightning, which works at each end of an epoch, it is one."""

    def __init__(self, loader: SequenceLoader, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[Batch]:
        # A step takes one batch, so their number alone gives the position, however many batches are fetched ahead.
        epoch, batch = divmod(self.start, len(self.loader))
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "batch": batch})
        while True:
            yield from self.loader


class _Fixed(Dataset[Batch]):
    """The same batches in every epoch, so that epochs can be compared."""

    def __init__(self, dataset: SequenceDataset, rows: Sequence[Tensor]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        if self.dataset.runs == "both":  # by turns, as in training
            one = self.dataset.running(direction="backward" if index % 2 else "forward")
            return one.batch(self.rows[index])
        return self.dataset.batch(self.rows[index])


class SequenceData(pl.LightningDataModule):
    """A data set of sequences for Lightning's Trainer: epochs of stratified batches, sorted by transformation.

    Batches are made whole by the data set, in the training process. A checkpoint holds the position; it takes the
    Trainer's steps for the number of batches, so gradients must not be accumulated over several.

    Args:
        dataset: The training split.
        val: Sequences to validate on, all in every validation: `FlowModule` logs their ``val_loss``.
        test: Sequences for ``Trainer.test``.
        batch_size: Sequences per batch of each process.
        seed: Seed of the order of all epochs.
        stratified: Equal shares of all transformations in every batch.
        endless: One epoch without an end, for trainings that end by steps or minutes: Lightning works at each end.

    Raises:
        ValueError: If `batch_size` does not suit the data set.

    Example:
        >>> import flowfactor as ff
        >>> data = SequenceData(ff.data.Digits(), batch_size=6)
        >>> next(iter(data.train_dataloader()))["k"].tolist()
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        batch_size: int = 96,
        *,
        val: SequenceDataset | None = None,
        test: SequenceDataset | None = None,
        seed: int = 0,
        stratified: bool = True,
        endless: bool = False,
    ) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.seed, self.stratified = dataset, batch_size, seed, stratified
        self.val, self.test, self.endless = val, test, endless
        # Without a split Lightning is to find that there is no such loader, not an empty one.
        if val is None:
            self.val_dataloader = super().val_dataloader
        if test is None:
            self.test_dataloader = super().test_dataloader
        self._start = 0
        self._loader(0, 1)  # tells now what does not fit

    def train_dataloader(self) -> DataLoader[Batch]:
        """Gives the batches from the position on."""
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        loader = self._loader(rank, world)
        if self.endless:
            return DataLoader(_Endless(loader, self._start), batch_size=None)
        if self._start:
            epoch, batch = divmod(self._start, len(loader))
            loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": batch})
        return loader.dataloader()

    def val_dataloader(self) -> DataLoader[Batch]:
        """Gives the validation sequences, each once in a fixed order."""
        return self._whole(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Gives the test sequences, each once in a fixed order."""
        return self._whole(self.test)

    def _whole(self, dataset: Any) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        rows = torch.arange(len(dataset)).split(self.batch_size)
        return DataLoader(_Fixed(dataset, rows[rank::world] if len(rows) >= world else rows), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Gives the position: the number of batches taken, with the seed and the batch size that it belongs to."""
        start = self._start if self.trainer is None else self.trainer.global_step
        return {"start": start, "seed": self.seed, "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a position that `state_dict` gave.

        Raises:
            ValueError: If it belongs to another batch size.
        """
        if (before := state_dict["batch_size"]) != self.batch_size:
            raise ValueError(f"the saved data had batch_size {before}, these have {self.batch_size}: make them agree")
        self._start, self.seed = int(state_dict["start"]), int(state_dict["seed"])

    def reopen_epoch(self, loops: dict[str, Any]) -> None:
        """Has Lightning go on with an epoch that was stopped in its middle, which it counts among those that are done.

        Args:
            loops: The state of the loops of fitting in a checkpoint; it is changed.
        """
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        if self.endless or batches["is_last_batch"] or not 0 < batches["current"]["ready"] < self._length:
            return
        for counts in (epochs["total"], epochs["current"]):
            if counts["processed"] == counts["started"]:
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    @property
    def _length(self) -> int:
        return len(self._loader(0, 1 if self.trainer is None else self.trainer.world_size))

    def _loader(self, rank: int, world: int) -> SequenceLoader:
        return SequenceLoader(
            self.dataset, self.batch_size, seed=self.seed, stratified=self.stratified, rank=rank, world_size=world
        )
