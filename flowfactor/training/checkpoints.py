"""Checkpoints with digests: the last two and the best one of a training, and which of them to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from flowfactor._files import replacing, sync
from flowfactor.training.folder import BEST, CHECKPOINT, PREVIOUS

# A checkpoint is a zip archive, and the seal is the archive's comment: PyTorch reads past it, and it cannot get lost.
_SEAL = "\nflowfactor checkpoint, step {step:012d}, sha256 "
_BEFORE_DIGEST = len(_SEAL.format(step=0))
_SIZE = _BEFORE_DIGEST + 64
_END, _END_SIZE = b"PK\x05\x06", 22  # how an archive without a comment ends
_CHUNK = 2**22


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written."""


def seal(path: Path, step: int) -> None:
    """Adds the step and the digest of all that stands before it to a file that `torch.save` wrote.

    Args:
        path: The file.
        step: Number of steps of the training so far.

    Raises:
        ValueError: If the file is no zip archive without a comment, such as that of `torch.save`.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END_SIZE, 0))
        if not _unsealed(file.read()):
            raise ValueError(f"{path} is no archive that torch.save wrote")
        file.seek(size - 2)
        file.write(_SIZE.to_bytes(2, "little") + _SEAL.format(step=step).encode())
        digest = _digest(file, size + _BEFORE_DIGEST)
        file.write(digest.encode())


def check_seal(path: Path) -> int | None:
    """Checks a checkpoint by its digest, which covers every byte.

    Args:
        path: The file.

    Returns:
        Its step, or None where it is an archive without a digest, as earlier releases wrote it.

    Raises:
        DamagedCheckpointError: If it is not what was written; the message says what is wrong, without the file's name.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise DamagedCheckpointError("it is empty")
        file.seek(max(size - _SIZE, 0))
        end = file.read()
        if _unsealed(end[-_END_SIZE:]):
            return None
        told, found = end[:_BEFORE_DIGEST], end[_BEFORE_DIGEST:]
        digits = told[-len(", sha256 ") - 12 : -len(", sha256 ")]
        if len(end) < _SIZE or not digits.isdigit() or told != _SEAL.format(step=int(digits)).encode():
            raise DamagedCheckpointError(
                f"it does not end with a digest, so that it was cut off or changed ({size:,} bytes)"
            )
        if _digest(file, size - 64).encode() != found:
            raise DamagedCheckpointError("its contents do not have the digest that was written with them")
        return int(digits)


def _unsealed(end: bytes) -> bool:
    """Whether so many bytes end an archive that has no comment; those that end a sealed one are digits."""
    return end[:4] == _END and end[-2:] == b"\0\0"


def _digest(file: Any, size: int) -> str:
    """Digest of the first bytes of a file, which is written after them."""
    made = hashlib.sha256()
    file.seek(0)
    while size and (read := file.read(min(_CHUNK, size))):
        made.update(read)
        size -= len(read)
    return made.hexdigest()


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Attributes:
        path: The file.
        step: Number of steps of the training that it holds.
    """

    path: Path
    step: int


def newest_checkpoint(folder: Path, *, tell: bool = True) -> Found:
    """Finds the newest checkpoint of a run that is whole.

    Args:
        folder: Folder of the run.
        tell: Whether to warn of damaged ones, and of one that has no digest to tell.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is none.
        DamagedCheckpointError: If all are damaged, with their names and what is wrong.
    """
    damaged: list[str] = []
    for path in (folder / name for name in (CHECKPOINT, PREVIOUS, BEST)):
        if not path.is_file():
            continue
        try:
            step = check_seal(path)
            if step is None:
                step = _step_without_seal(path)
                damaged.append(f"{path} has no digest, as those of earlier releases: it is taken as it is")
        except DamagedCheckpointError as error:
            damaged.append(f"{path} is damaged: {error}")
            continue
        if tell:
            for line in damaged:
                used = "" if line.startswith(f"{path} ") else f"; going on from {path.name}, step {step:,}, instead"
                warnings.warn(line + used, stacklevel=2)
        return Found(path, step)
    if damaged:
        raise DamagedCheckpointError(
            f"no checkpoint of this run is whole: {'; '.join(damaged)}. Begin anew (overwrite), or put back a copy"
        )
    raise FileNotFoundError(f"there is nothing to resume: {folder} holds no {CHECKPOINT}")


def _step_without_seal(path: Path) -> int:
    try:
        return int(torch.load(path, weights_only=True, map_location="cpu")["global_step"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError) as error:
        raise DamagedCheckpointError(f"it has no digest and does not load ({type(error).__name__})") from None


class Checkpoints(pl.Callback):
    """Keeps the last two checkpoints of a training and the best one, each whole at any moment and with its digest.

    ``last.ckpt`` is the newest, ``previous.ckpt`` the one before it, and ``best.ckpt`` that of the lowest validation loss
    (``val_loss``) so far or, where the training logs none, of the lowest mean training loss since the checkpoint before.
    Where it is known when the training validates, a validation with a lower loss than all before is saved at once.

    Args:
        folder: Where they lie.
        minutes: Minutes between checkpoints.
        steps: Steps between checkpoints, or None.
        resumed: The checkpoint that the training goes on from.
        first: Called when the first checkpoint of a new training, which is then made after its first step, is written and
            about to take its place; None for no such call.
        validate_every: Steps between validations, or None where they are not known.

    Attributes:
        monitored: What ``best.ckpt`` was chosen by.
        best: Its lowest value so far.

    Example:
        >>> Checkpoints("runs/a", minutes=5).folder.name
        'a'
    """

    def __init__(
        self,
        folder: str | Path,
        minutes: float = 5.0,
        steps: int | None = None,
        resumed: Path | None = None,
        first: Callable[[], None] | None = None,
        *,
        validate_every: int | None = None,
    ) -> None:
        self.folder, self.minutes, self.steps, self._first = Path(folder), minutes, steps, first
        self.validate_every, self._due = validate_every, False
        self.monitored, self.best, self._best_step = "", math.inf, -1
        # What is not this training's, or damaged, must not take the place of a whole one.
        self._rotates = resumed is not None and resumed.name == CHECKPOINT
        self._resumed = resumed
        self._before: Path | None = None
        self._saved_at, self._saved_step = 0.0, -1
        self._losses: torch.Tensor | None = None
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """What the best one so far was."""
        return {"monitored": self.monitored, "best": self.best, "step": self._best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that up."""
        self.monitored, self.best = state_dict["monitored"], state_dict["best"]
        self._best_step = state_dict["step"]

    def told(self) -> dict[str, Any]:
        """Which checkpoint is the best one, and by what; its step is None where none was judged."""
        if self._best_step < 0:
            return {"step": None, "monitored": None, "value": None}
        return {"step": self._best_step, "monitored": self.monitored, "value": self.best}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock, and looks after the best checkpoint of a training that goes on."""
        self._saved_at = time.monotonic()
        if self._resumed is None or not trainer.is_global_zero:
            return
        best, held = self.folder / BEST, -1
        with contextlib.suppress(FileNotFoundError, DamagedCheckpointError):
            held = check_seal(best) or 0
        if self._best_step == trainer.global_step != held:
            _copy(self._resumed, best)
        elif held < 0:  # the best of those to come
            self.best, self._best_step = math.inf, -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time to."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            # Summed where it is: nothing is read back from the device. In double precision, so that no step is lost.
            loss = loss.detach().to(torch.float64 if loss.device.type != "mps" else torch.float32)
            self._losses = loss if self._losses is None else self._losses + loss
            self._count += 1
        due = self._first is not None or (self.steps is not None and trainer.global_step % self.steps == 0)
        if trainer.world_size == 1:
            due = due or self._late
        elif trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # All processes save together, so one clock counts, and it is asked rarely.
            due = due or trainer.strategy.broadcast(self._late)
        validated = self.validate_every is not None and trainer.global_step % self.validate_every == 0
        if validated and self._first is None:
            self._due = due  # the validation that comes belongs to the state
        elif due:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a state that is better than all before, and one that was due."""
        # Lightning also validates where a training is stopped, which an undisturbed one would not.
        if self.validate_every is None or trainer.global_step % self.validate_every or trainer.state.fn != "fit":
            return
        best = self._judge(trainer)
        if best or self._due:
            self.save(trainer, best)
        self._due = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves at the end, also where the training was stopped."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Takes the second name away that a checkpoint which could not be written has left."""
        if self._before is not None:
            self._before.unlink(missing_ok=True)

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self.minutes

    def save(self, trainer: pl.Trainer, best: bool | None = None) -> None:
        """Writes a checkpoint; all processes have to call it, and the first alone writes.

        At every moment, that of a loss of power included, one whole checkpoint at least lies under its name, and the last
        and the previous one are never the same file: the new one is whole before it takes the place of the last one, which
        is kept by a name of its own until it takes the place of the previous one.
        """
        if best is None:
            best = self.validate_every is None and self._judge(trainer)
        last = self.folder / CHECKPOINT
        with replacing(last) if trainer.is_global_zero else contextlib.nullcontext(last) as path:
            try:
                trainer.save_checkpoint(path)
            except OSError as error:
                if error.errno is not None:  # Lightning writes elsewhere first, and the system may name that file
                    error.filename, error.filename2 = str(last), None
                raise
            if trainer.is_global_zero:
                seal(path, trainer.global_step)
                if self._first is not None:
                    self._first()
                self._make_way(last)
        if self._before is not None:
            self._before.replace(self.folder / PREVIOUS)
            sync(self.folder)
            self._before = None
        if trainer.is_global_zero and best:
            _copy(last, self.folder / BEST)
        trainer.strategy.barrier()
        self._rotates, self._first = True, None
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self._losses, self._count = None, 0

    def _judge(self, trainer: pl.Trainer) -> bool:
        """Whether the state to be saved is the best so far; all processes agree."""
        value = trainer.callback_metrics.get("val_loss")
        monitored = "val_loss"
        if value is None:
            if self._losses is None:
                return False
            monitored, value = "mean training loss since the checkpoint before", self._losses / self._count
        value = float(trainer.strategy.reduce(value, reduce_op="mean") if trainer.world_size > 1 else value)
        if monitored != self.monitored:
            self.monitored, self.best = monitored, math.inf
        better = value < self.best
        if better:
            self.best, self._best_step = value, trainer.global_step
        return better

    def _make_way(self, last: Path) -> None:
        """Keeps the last checkpoint by a second name, before the new one takes its place."""
        if self._rotates:
            self._before = _second_name(last, self.folder / PREVIOUS)


def _second_name(source: Path, target: Path) -> Path:
    """A file under a temporary name for a target: a hard link, or a copy where the file system has none."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        temporary.hardlink_to(source)
    except OSError:
        try:
            shutil.copyfile(source, temporary)
            sync(temporary)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return temporary


def _copy(source: Path, target: Path) -> None:
    """Gives a file a second name, which replaces what had it."""
    if target.exists() and target.samefile(source):
        return
    temporary = _second_name(source, target)
    try:
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
