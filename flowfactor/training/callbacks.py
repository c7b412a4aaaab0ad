"""Lightning callbacks of a training run: progress and a graceful stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from typing import Any, TextIO

import lightning.pytorch as pl

from flowfactor.training.duration import format_duration
from flowfactor.training.module import FlowModule

ALWAYS_TOLD = ("loss", "reconstruction", "kl", "bound")
"""Terms of the progress that are told even where they are 0."""


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
    # Terms that a model leaves out are 0, and most models leave out most.
    parts += [f"{name} {value:.4g}" for name, value in latest.items() if value or name in ALWAYS_TOLD]
    return " | ".join(parts)


class GracefulStop(pl.Callback):
    """Ends the training after the current step when a signal asks for it, so that the last state can be saved.

    The signals are Ctrl-C's, SIGTERM, and SIGUSR1, which clusters send some time before they end a job. Until the training
    has ended they do nothing more, also where they come again or in the middle of a checkpoint, but for a second Ctrl-C,
    which interrupts at once. Lightning's own handlers of signals are left out: under SLURM they would save elsewhere and
    ask the cluster to start the job again.

    Attributes:
        stopped: Whether a signal came.

    Example:
        >>> GracefulStop().stopped
        False
    """

    def __init__(self) -> None:
        self.stopped = False
        numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", None))  # Windows has no SIGUSR1
        # Taken now, before Lightning puts handlers of its own: those must not come back after the training.
        self._old = {number: signal.getsignal(number) for number in numbers if number is not None}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listens to the signals; only a program's main thread can."""
        connector = getattr(trainer, "_signal_connector", None)  # there is no public way
        if connector is not None:
            connector.register_signal_handlers = lambda: None
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens again, to be sure of it whoever put a handler since."""
        self._listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the training where a signal came: of several processes at the next log entry, so that all agree."""
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

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._old:
                if number != signal.SIGINT or not self.stopped:
                    signal.signal(number, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopped = True
        if number == signal.SIGINT:  # whoever is in a hurry
            signal.signal(number, self._old[signal.SIGINT])
