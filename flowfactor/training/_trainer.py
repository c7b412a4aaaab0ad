"""The Trainer of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl

from flowfactor.training._cluster import environments, trains_alone
from flowfactor.training._logs import HeldBack, LateLoggers, open_loggers
from flowfactor.training._validation import Validation
from flowfactor.training.callbacks import GracefulStop, Progress
from flowfactor.training.checkpoints import Checkpoints, Found
from flowfactor.training.config import TrainConfig


def make_trainer(
    folder: Path,
    train: TrainConfig,
    resume: bool,
    stop: GracefulStop,
    found: Found | None = None,
    first: Callable[[], None] | None = None,
) -> pl.Trainer:
    """Makes the Trainer of a run, with its checkpoints, logs and validations.

    Args:
        folder: Folder of the run.
        train: The settings.
        resume: Whether the run is resumed.
        stop: What listens to signals.
        found: The checkpoint that the training goes on from.
        first: Called with the first checkpoint, see `Checkpoints`.

    Returns:
        The Trainer.
    """
    late = LateLoggers(resume, lambda: open_loggers(folder, train.tensorboard, found))

    def begin() -> None:
        if first is not None:
            first()
        late.open(trainer)

    resumed, every = None if found is None else found.path, train.validate_every
    callbacks: list[pl.Callback] = [stop]
    if every is not None:  # before what saves: its count belongs to the state
        callbacks.append(Validation(every, train.patience))
    callbacks += [
        Checkpoints(
            folder,
            train.checkpoint_minutes,
            train.checkpoint_steps,
            resumed,
            None if first is None else begin,
            validate_every=every,
        ),
        late,
    ]
    if train.progress:
        callbacks.append(Progress(train.log_every))
    trainer = pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.num_nodes,
        plugins=list(environments(train)),
        # Warm-ups, alternating losses and lazy regularizers leave parameters without gradient in some steps.
        strategy="auto" if trains_alone(train) else "ddp_find_unused_parameters_true",
        precision=train.precision,  # type: ignore[arg-type]
        max_steps=-1 if train.steps is None else train.steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=1 if every is None else None,
        gradient_clip_val=train.clip,
        log_every_n_steps=train.log_every,
        logger=HeldBack(folder),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return trainer
