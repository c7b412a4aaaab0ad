"""Validation during a training: the data for it, cut out of the training split, and an end where it gains nothing more."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping

from flowfactor.data import SequenceDataset
from flowfactor.data.readers.sequences import Sequences


def hold_out(train: SequenceDataset, fraction: float, seed: int) -> tuple[SequenceDataset, SequenceDataset]:
    """Cuts some of the training data out for validation: a share of every label, whole groups of one's own sequences.

    Args:
        train: The training data.
        fraction: Share for validation.
        seed: Seed of the draw.

    Returns:
        What is left for training, and the data for validation.

    Raises:
        ValueError: If they cannot be divided so.

    Example:
        >>> import flowfactor as ff
        >>> [len(part) for part in hold_out(ff.data.Digits(), 0.1, 0)]
        [1351, 149]
    """
    try:
        if isinstance(train, Sequences):
            return train.split(fraction, seed)
        labels = train.fixed_k if train.fixed_k is not None else getattr(train, "labels", None)
        labels = torch.zeros(len(train)) if labels is None else labels.cpu()
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed % 2**63))
        piles = [order[labels[order] == label] for label in labels.unique()]
        # One at least of every label on both sides, where it has two; a single one is trained on.
        counts = [min(max(round(fraction * len(pile)), 1), len(pile) - 1) for pile in piles]
        held = torch.cat([pile[:count] for pile, count in zip(piles, counts, strict=True)])
        kept = torch.ones(len(train), dtype=torch.bool).index_fill(0, held, False)
        return train.subset(kept), train.subset(~kept)
    except ValueError as error:
        raise ValueError(
            f"no data for validation can be cut out of the training data (train.validation_fraction {fraction}): {error}"
        ) from error


class Validation(EarlyStopping):
    """Logs what a validation measured, and ends the training after so many validations that gained nothing.

    Lightning also validates where a training is stopped. That counts for nothing, so that a training which is interrupted
    and resumed goes as one that is not.

    Args:
        every: Steps between validations.
        patience: Validations without a lower ``val_loss`` after which the training ends; None for no such end.

    Example:
        >>> Validation(every=10, patience=3).exhausted
        False
    """

    def __init__(self, every: int, patience: int | None) -> None:
        super().__init__("val_loss", patience=2**62 if patience is None else patience, check_finite=False)
        self.every = every

    @property
    def exhausted(self) -> bool:
        """Whether so many validations have gained nothing."""
        return self.wait_count >= self.patience

    def told(self) -> str:
        """Says so."""
        best = float(self.best_score)
        return f"no lower val_loss in {self.patience} validations" + (f" ({best:.6g})" if math.isfinite(best) else "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves a training as it is that had ended so."""
        if self.exhausted:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs and judges a validation that was due."""
        if self._should_skip_check(trainer) or trainer.global_step % self.every:
            return
        measured = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in measured.items()}, trainer.global_step)
        super().on_validation_end(trainer, pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Judges after validations, never after an epoch, which has no end."""
        self._check_on_train_epoch_end = False

    def state_dict(self) -> dict[str, Any]:
        """Gives the count and the lowest loss: what more Lightning keeps depends on where a training was stopped."""
        return {"wait_count": self.wait_count, "best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up; the patience is the one that is asked for."""
        self.wait_count, self.best_score = state_dict["wait_count"], state_dict["best_score"]
