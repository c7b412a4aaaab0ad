"""The logs of a training: opened only when the run has its folder, so that until then an earlier run is left as it is."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from flowfactor.training._table import TableLogger
from flowfactor.training.checkpoints import Found
from flowfactor.training.folder import METRICS, TENSORBOARD, mark_of

_QUIET = (
    ".*does not have many workers.*",  # batches are made whole by the data set: workers would only copy them
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*defined a `validation_step` but have no.*",
    ".*LeafSpec.*",  # deprecations of PyTorch's that Lightning has not followed yet
    ".*all_gather is deprecated.*",
)


class HeldBack(Logger):
    """Holds metrics back until there is somewhere to write them.

    Args:
        folder: The folder in which that will be.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rows: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        """It has no name."""
        return ""

    @property
    def version(self) -> str:
        """It has no version."""
        return ""

    @property
    def log_dir(self) -> str:
        """The folder."""
        return str(self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps them."""
        self.rows.append((dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """There is nothing to keep of them: they are in the configuration."""


class LateLoggers(pl.Callback):
    """Opens the loggers of a resumed run at its start, and those of a new one with its first checkpoint (`open`).

    It has to stand after the callback that writes checkpoints.

    Args:
        resumed: Whether the run is resumed.
        make: Makes the loggers.
    """

    def __init__(self, resumed: bool, make: Callable[[], list[Logger]]) -> None:
        self.resumed, self._make = resumed, make

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens those of a resumed run."""
        if self.resumed:
            self.open(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Opens those of a new run in the processes that write no checkpoint."""
        self.open(trainer)

    def open(self, trainer: pl.Trainer) -> None:
        """Opens them, if they are not, and hands over what was held back.

        Before the first checkpoint has its name: what comes before a checkpoint is not logged again after it.
        """
        held = [logger for logger in trainer.loggers if isinstance(logger, HeldBack)]
        if held:
            trainer.loggers = self._make()
            for metrics, step in held[0].rows:
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step)


def open_loggers(folder: Path, tensorboard: bool, found: Found | None) -> list[Logger]:
    """Opens the table of a run, and TensorBoard's log if it is installed.

    Args:
        folder: Folder of the run.
        tensorboard: Whether TensorBoard's log is asked for.
        found: The checkpoint that the training goes on from: what was logged after it will come once more.

    Returns:
        The loggers.
    """
    step = None if found is None else found.step
    loggers: list[Logger] = [TableLogger(folder / METRICS, step)]
    if tensorboard:
        # Where it is not installed, the table alone has to do.
        with contextlib.suppress(ModuleNotFoundError):
            options: dict[str, Any] = {"default_hp_metric": False, "purge_step": None if step is None else step + 1}
            if rank_zero_only.rank == 0:  # who alone writes
                options["filename_suffix"] = f".{mark_of(folder)}"  # shows whose the file is
            loggers.append(TensorBoardLogger(folder, name="", version=TENSORBOARD, **options))
    return loggers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's tips and its warnings about what is meant to be so to itself."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _QUIET:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
