"""The folders of runs and benchmarks: what the files in them are called, whose they are, and whether a run may begin."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowfactor._files import replacing

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes apart there
    fcntl = None

CONFIG, CHECKPOINT, MODEL, METRICS, TENSORBOARD = "config.yaml", "last.ckpt", "model", "metrics.csv", "tensorboard"
PREVIOUS, BEST = "previous.ckpt", "best.ckpt"
RESULT, EVALUATION, TRAVERSAL, ANIMATION = "result.json", "evaluation.json", "traversal.png", "transformations.gif"
GRID = "grid.png"
"""In the folder of any run; those of the last line say what its model does."""

DATA = "data.json"
"""In the folder of any run: what tells its data from others of the same name."""

SETTINGS, FIGURES, ERROR, LOG = "settings.json", "benchmark.json", "error.txt", "log.txt"
"""In the folder of a benchmark's run, in addition to those of any run."""

REPORT, FIGURE = "report.md", "report.png"
"""In the folder of a benchmark."""

LIST = "flowfactor.json"
"""In any of these folders: which of the files in it are flowfactor's. Nothing else is deleted or replaced."""

OF_THE_MODEL = (RESULT, EVALUATION, TRAVERSAL, ANIMATION, GRID)
"""What tells of the model that lies in the folder."""

OF_A_TRAINING = (CONFIG, DATA, CHECKPOINT, PREVIOUS, BEST, METRICS)
"""What a training writes from its first checkpoint on."""

OF_A_MODEL = (MODEL, f"{MODEL}/config.json", f"{MODEL}/model.safetensors")
OF_TENSORBOARD = (TENSORBOARD, f"{TENSORBOARD}/hparams.yaml")
"""Folders and what lies in them; TensorBoard's own files are told by the mark of the list in their names."""

OF_A_RUN = (*OF_A_TRAINING, *OF_A_MODEL, *OF_TENSORBOARD, *OF_THE_MODEL)
OF_A_BENCHMARKS_RUN = (SETTINGS, FIGURES, ERROR, LOG)

_KNOWN = frozenset((*OF_A_RUN, *OF_A_BENCHMARKS_RUN, REPORT, FIGURE))
_FOLDERS = (MODEL, TENSORBOARD)


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


class ForeignFilesError(FileExistsError):
    """A folder holds files by names that flowfactor would write, which nothing shows to be its own."""


@dataclass
class _List:
    """What `LIST` says: the kind of the folder, its files, and the mark in the names of TensorBoard's."""

    kind: str = ""
    files: set[str] = field(default_factory=set)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def write(self, folder: Path) -> None:
        content = {"written_by": "flowfactor", "kind": self.kind, "mark": self.mark, "files": sorted(self.files)}
        write_text(folder / LIST, json.dumps(content, indent=2) + "\n")


def _read(folder: Path) -> _List | None:
    """The list of a folder, or None where there is none of ours; names that flowfactor does not write do not count."""
    found = _json(folder / LIST)
    if found.get("written_by") != "flowfactor":
        return None
    kind, mark, files = found.get("kind"), found.get("mark"), found.get("files")
    if not (isinstance(kind, str) and isinstance(mark, str) and mark.isalnum() and isinstance(files, list)):
        return None
    return _List(kind, {name for name in files if isinstance(name, str) and name in _KNOWN}, mark)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def kind_of(folder: Path) -> str:
    """The kind of run that a folder of ours holds; empty where it is none of ours."""
    listed = _read(folder)
    return "" if listed is None else listed.kind


def mark_of(folder: Path) -> str:
    """What stands at the end of the names of TensorBoard's files of a folder's run."""
    listed = _read(folder)
    if listed is None:
        raise FileNotFoundError(f"{folder} holds no {LIST}")
    return listed.mark


def foreign(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that lie in a folder and that no list shows to be ours."""
    listed = _read(folder)
    known = set() if listed is None else listed.files | {LIST}
    return [name for name in (*names, LIST) if name not in known and os.path.lexists(folder / name)]


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raises where names are taken in a folder by what is not ours.

    Raises:
        ForeignFilesError: With the names.
    """
    _refuse(folder, foreign(folder, names))


def _refuse(folder: Path, taken: list[str]) -> None:
    if taken:
        shown = [name for name in taken if name.partition("/")[0] not in taken or "/" not in name]
        raise ForeignFilesError(
            f"{folder} holds {', '.join(shown)}, which no {LIST} there shows to be flowfactor's, so nothing is touched: "
            f"choose another output, or move them away; what a release that kept no {LIST} wrote you can delete yourself"
        )


def own(folder: Path, *names: str, kind: str | None = None) -> None:
    """Puts names on a folder's list before they are first written.

    Args:
        folder: The folder.
        *names: Names of flowfactor's, relative to it.
        kind: What kind of folder it is from now on; None leaves that as it is.

    Raises:
        ForeignFilesError: If one of them is there and is not on the list.
    """
    check_free(folder, names)
    listed = _read(folder)
    made = _List() if listed is None else _List(listed.kind, set(listed.files), listed.mark)
    made.files.update(names)
    made.kind = made.kind if kind is None else kind
    if made != listed:
        made.write(folder)


def remove(folder: Path, names: Iterable[str], keep: Iterable[str] = ()) -> None:
    """Removes those of the names that are on a folder's list, folders only where they are empty.

    Args:
        folder: The folder.
        names: The names, which are then off the list too.
        keep: Names that stay on the list, since they are about to be written anew.
    """
    listed = _read(folder)
    if listed is None:
        return
    chosen = listed.files & set(names)
    for name in sorted(chosen, key=lambda name: ("/" not in name, name in _FOLDERS)):
        path = folder / name
        if path.parent != folder and path.parent.is_symlink():  # what lies elsewhere is none of ours
            continue
        if name == TENSORBOARD and not path.is_symlink():
            for events in path.glob(f"events.out.tfevents.*.{listed.mark}"):
                events.unlink(missing_ok=True)
        if name in _FOLDERS:
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # a file of the user's is in it
                    path.rmdir()
        elif path.is_symlink() or path.is_file():
            path.unlink()
    gone = {name for name in chosen.difference(keep) if not os.path.lexists(folder / name)}
    if gone and gone == listed.files:
        (folder / LIST).unlink()
    elif gone:
        _List(listed.kind, listed.files - gone, listed.mark).write(folder)


@contextlib.contextmanager
def owned(folder: Path, *names: str) -> Iterator[None]:
    """Has names on a folder's list while they are written; what has not been written then is off it again."""
    own(folder, *names)
    try:
        yield
    finally:
        _unlist(folder, names)


def settle(folder: Path) -> None:
    """Takes off a folder's list what is not there."""
    _unlist(folder, _KNOWN)


def _unlist(folder: Path, names: Iterable[str]) -> None:
    with contextlib.suppress(
        OSError
    ):  # a longer list does no harm, and why the names are not there is reported elsewhere
        remove(folder, [name for name in names if not os.path.lexists(folder / name)])


def sweep(folder: Path) -> None:
    """Removes what a process that died left half written under the temporary names of listed files."""
    listed = _read(folder)
    for path in [] if listed is None else [folder / name for name in listed.files]:
        for part in path.parent.glob(f".{path.name}.????????.part"):
            part.unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a training or its result."""
    return holds_checkpoint(folder) or (folder / RESULT).exists()


def resume_command(folder: Path, imports: Iterable[str] = ()) -> str:
    """The command that goes on with the run in a folder, from wherever it is given."""
    return f"flowfactor train {shlex.quote(str((folder / CONFIG).absolute()))} --resume{import_options(imports)}"


def import_options(imports: Iterable[str]) -> str:
    """The options by which a command on a run may import what it was made with."""
    return "".join(f" --import {shlex.quote(entry)}" for entry in imports)


def run_folder(path: Path) -> Path | None:
    """The folder of the run that a file of settings lies in, or None: a run may have been copied or moved.

    Args:
        path: The file.

    Returns:
        Its folder, where a checkpoint or the list of a run lies beside it.
    """
    beside = holds_checkpoint(path.parent) or (path.parent / LIST).is_file()
    return path.parent if path.name == CONFIG and beside else None


def holds_checkpoint(folder: Path) -> bool:
    """Whether there is something to resume in a folder; it may be damaged."""
    return any((folder / name).is_file() for name in (CHECKPOINT, PREVIOUS, BEST))


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises where a run cannot begin, or be resumed, in a folder (see `prepare`)."""
    if resume and overwrite:
        raise ValueError("resume goes on with a run and overwrite begins it anew: choose one of them")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output {folder} is a file: choose a folder")
    if not resume:
        check_free(folder, OF_A_RUN)
        if not overwrite and holds_run(folder):
            with claimed(folder):  # where another process is at work there, that is what to say
                pass
            raise FileExistsError(f"{folder} holds a run: resume it, overwrite it, or choose another output")
        return
    if not holds_checkpoint(folder):
        raise FileNotFoundError(f"there is nothing to resume: {folder} holds no {CHECKPOINT}")
    adopted = without_list(folder)
    _refuse(folder, [name for name in foreign(folder, OF_A_RUN) if name not in adopted])


def without_list(folder: Path) -> set[str]:
    """What a run of a release that kept no list has left in a folder, as far as the contents show it.

    Returns:
        The names; none where the checkpoint is none of flowfactor's, or a list says whose it is.
    """
    if CHECKPOINT not in foreign(folder, [CHECKPOINT]) or not _is_checkpoint(folder / CHECKPOINT):
        return set()
    names = {CONFIG, CHECKPOINT, *OF_TENSORBOARD}  # that the settings are those of the run, `prepare` checks
    for name in (RESULT, EVALUATION):
        versions = _json(folder / name).get("versions")
        if isinstance(versions, dict) and "flowfactor" in versions:
            names.add(name)
    if {"model", "parts", "settings"} <= set(_json(folder / OF_A_MODEL[1])):
        names.update(OF_A_MODEL)
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError), (folder / METRICS).open(encoding="utf-8") as table:
        if {"step", "learning_rate", "seconds"} <= set(table.readline().strip().split(",")):
            names.add(METRICS)
    return names


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint that flowfactor wrote; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(n.endswith("/data.pkl") and b"flowfactor" in archive.read(n) for n in archive.namelist())
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError):
        return False


def adopt(folder: Path) -> None:
    """Puts what a run of a release without a list left in a folder on a list."""
    names = without_list(folder)
    if names:
        listed = _read(folder) or _List()
        listed.files |= {name for name in names if os.path.lexists(folder / name)}
        listed.write(folder)


def check_writable(folder: Path, size: int = 0) -> None:
    """Proves that files can be written in a folder, by one of a unique name that is gone at once.

    Args:
        folder: The folder, which need not exist: then it is the nearest one above it.
        size: Bytes that will be needed.

    Raises:
        OSError: If it cannot be written in, or has not so much space.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a folder", str(place))
    folders = [place, *(place / name for name in _FOLDERS if place == folder.absolute())]
    for inside in filter(Path.is_dir, folders):
        probe = inside / f".probe.{uuid.uuid4().hex[:8]}.part"
        try:
            probe.write_bytes(bytes(4096))
        except OSError as error:
            error.filename = str(inside)
            raise
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
    free = shutil.disk_usage(place).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free", str(folder))
