"""Lightning callbacks of a training run: checkpoints, progress and a graceful stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl

from flowfactor._files import replacing
from flowfactor.training._duration import format_duration
from flowfactor.training.module import FlowModule


class LastCheckpoint(pl.Callback):
    """Keeps the latest state of a training in one file, which is whole at any moment.

    Args:
        path: The file.
        minutes: Minutes between checkpoints.
        steps: Steps between checkpoints, or None.
        first: Called when the first checkpoint, which is then made after the first step, is written and about to take its
            place; None for no such call.

    Example:
        >>> LastCheckpoint("runs/a/last.ckpt", minutes=5).path.name
        'last.ckpt'
    """

    def __init__(
        self,
        path: str | Path,
        minutes: float = 5.0,
        steps: int | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.minutes, self.steps, self._first = Path(path), minutes, steps, first
        self._saved_at = 0.0
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time to."""
        due = self._first is not None or (self.steps is not None and trainer.global_step % self.steps == 0)
        if trainer.world_size == 1:
            due = due or self._late
        elif trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # All processes save together, so one clock counts, and it is asked rarely.
            due = due or trainer.strategy.broadcast(self._late)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves at the end, also where the training was stopped."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self.minutes

    def save(self, trainer: pl.Trainer) -> None:
        """Saves to a temporary file, which then takes the place of the last one; all processes have to call it."""
        # The first process alone writes; the others take part in gathering the state.
        with replacing(self.path) if trainer.is_global_zero else contextlib.nullcontext(self.path) as path:
            try:
                trainer.save_checkpoint(path)
            except OSError as error:
                if error.errno is not None:  # Lightning writes elsewhere first, and the system may name that file
                    error.filename, error.filename2 = str(self.path), None
                raise
            if self._first is not None and trainer.is_global_zero:
                self._first()
        self._first = None
        trainer.strategy.barrier()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


class Progress(pl.Callback):
    """A line that tells how far the training is, rewritten on a terminal and repeated rarely elsewhere.

    Args:
        every: Steps between updates.
        stream: Where to write; standard error where None.
        seconds: Shortest time between two lines where the stream is no terminal.

    Example:
        >>> Progress(every=50).every
        50
    """

    def __init__(self, every: int = 50, stream: TextIO | None = None, seconds: float = 15.0) -> None:
        self.every, self.stream, self.seconds = every, stream, seconds
        self._written = float("-inf")
        self._width = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the line when it is time to."""
        if trainer.global_step % self.every or not trainer.is_global_zero or not isinstance(pl_module, FlowModule):
            return
        stream = self.stream or sys.stderr
        if stream.isatty() or time.monotonic() - self._written >= self.seconds:
            self._written = time.monotonic()
            self._write(stream, describe(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the last line."""
        if trainer.is_global_zero and isinstance(pl_module, FlowModule):
            stream = self.stream or sys.stderr
            self._write(stream, describe(pl_module))
            if stream.isatty():
                stream.write("\n")

    def _write(self, stream: TextIO, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more, which is no reason to end a training
            if stream.isatty():
                stream.write("\r" + line.ljust(self._width))
                self._width = len(line)
            else:
                stream.write(line + "\n")
            stream.flush()


def describe(module: FlowModule) -> str:
    """Describes the state of a training in one line: progress, time left, speed and the terms last logged.

    Args:
        module: The module in training.

    Returns:
        The line.
    """
    progress, elapsed = module.progress, module.elapsed
    parts = [f"{min(progress, 1):4.0%}", f"step {module.global_step:,}"]
    if 0 < progress < 1:
        parts.append(f"{format_duration(elapsed * (1 - progress) / progress)} left")
    latest = dict(module.latest)
    speed = latest.pop("steps_per_second", None)
    if speed is not None:
        parts.append(f"{speed:.1f} steps/s")
    parts += [f"{name} {value:.4g}" for name, value in latest.items()]
    return " | ".join(parts)


class GracefulStop(pl.Callback):
    """Ends the training behind the current step when it is interrupted, so that the last state can be saved.

    A second interruption is not held back.

    Attributes:
        stopped: Whether an interruption came.

    Example:
        >>> GracefulStop().stopped
        False
    """

    def __init__(self) -> None:
        self.stopped = False
        # Taken now, before Lightning puts handlers of its own: those must not come back behind the training.
        self._old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to interruptions; only a program's main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._old:
                signal.signal(number, self._stop)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the training where an interruption came: of several processes at the next log entry, so that all agree."""
        if trainer.world_size > 1:
            if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
                return
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        if self.stopped:
            trainer.should_stop = True

    def restore(self) -> None:
        """Gives the signals back to whoever had them when this object was made."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._old.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        self.restore()
