"""The folders of runs and benchmarks: what the files in them are called, and whether a run may begin there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flowfactor._files import replacing

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes apart there
    fcntl = None

CONFIG, CHECKPOINT, MODEL, METRICS, TENSORBOARD = "config.yaml", "last.ckpt", "model", "metrics.csv", "tensorboard"
RESULT, EVALUATION, TRAVERSAL, ANIMATION = "result.json", "evaluation.json", "traversal.png", "transformations.gif"
"""In the folder of any run; those of the second line say what its model does."""

DATA = "data.json"
"""In the folder of any run: what tells its data from others of the same name."""

SETTINGS, FIGURES, ERROR, LOG = "settings.json", "benchmark.json", "error.txt", "log.txt"
"""In the folder of a benchmark's run, beside those of any run."""

REPORT, FIGURE = "report.md", "report.png"
"""In the folder of a benchmark."""

OF_THE_MODEL = (RESULT, EVALUATION, TRAVERSAL, ANIMATION)
"""What tells of the model that lies in the folder."""


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class BusyError(FileExistsError):
    """Another process works in the folder of a run."""


_claimed: set[Path] = set()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other processes from working in it meanwhile; the system ends the claim of a dead one.

    Args:
        folder: The folder; a part of this process's work may claim it again.

    Raises:
        BusyError: If another process has claimed it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if fcntl is None or place in _claimed:
        yield
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process works in {folder}: wait until it has ended, or choose another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        _claimed.add(place)
        yield
    finally:
        _claimed.discard(place)
        os.close(descriptor)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises where a run cannot begin, or be resumed, in a folder (see `prepare`)."""
    if resume and overwrite:
        raise ValueError("resume goes on with a run and overwrite begins it anew: choose one of them")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output {folder} is a file: choose a folder")
    checkpoint = folder / CHECKPOINT
    if not resume:
        if not overwrite and (checkpoint.exists() or (folder / RESULT).exists()):
            raise FileExistsError(f"{folder} holds a run: resume it, overwrite it, or choose another output")
        return
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is nothing to resume: {folder} holds no {CHECKPOINT}")


def clear(folder: Path) -> None:
    """Removes what an earlier run left that this one would not replace at once."""
    for name in (CHECKPOINT, METRICS, DATA, FIGURES, *OF_THE_MODEL):
        (folder / name).unlink(missing_ok=True)
    for name in (MODEL, TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)
