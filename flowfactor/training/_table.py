"""The table of a training, ``metrics.csv``: a row for every log entry, which a resumed run goes on with."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from flowfactor._files import replacing


class TableLogger(Logger):
    """Writes a row of numbers for every log entry, at once, and never rewrites in place what is there.

    Args:
        path: The file.
        step: The step that the training goes on from; rows after it, and one that was half written, go. None begins anew.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = TableLogger(Path(folder) / "metrics.csv")
        ...     table.log_metrics({"loss": 1.5}, step=50)
        ...     (Path(folder) / "metrics.csv").read_text().split()
        ['loss,step', '1.5,50']
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        super().__init__()
        self.path, self.step = path, step
        self._columns: list[str] | None = None
        self._newline = "\r\n"

    @property
    def name(self) -> str:
        """No name of its own: the folder is that of the run."""
        return ""

    @property
    def version(self) -> str:
        """No version, likewise."""
        return ""

    @property
    def log_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    save_dir = log_dir

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Leaves them out: a run keeps them as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends a row."""
        row = {name: float(value) for name, value in metrics.items()} | ({} if step is None else {"step": step})
        if self._columns is None:
            self._columns = self._begin()
        if new := sorted(row.keys() - set(self._columns)):
            self._widen(new)
        with self.path.open("ab") as file:  # unbuffered but for this one write
            file.write(self._line([row.get(name, "") for name in self._columns]))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Takes rows that do not belong to the state away also where nothing more was logged."""
        if self._columns is None and self.step is not None:
            self._columns = self._begin()

    def _begin(self) -> list[str]:
        """Takes up an earlier table, up to the step that the training goes on from, and gives its columns."""
        if self.step is None or not self.path.exists():
            with replacing(self.path) as part:
                part.write_bytes(b"")
            return []
        before = self.path.read_bytes()
        kept = trim(before, self.step)
        if kept != before:
            with replacing(self.path) as part:
                part.write_bytes(kept)
        first = kept.partition(b"\n")[0].decode()
        self._newline = "\n" if first and not first.endswith("\r") else "\r\n"
        return next(csv.reader([first]), [])

    def _widen(self, new: list[str]) -> None:
        """Adds columns: empty in the rows that are there."""
        old = self._columns or []
        self._columns = sorted([*old, *new])
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = [dict(zip(old, row, strict=False)) for row in list(csv.reader(file))[1:]]
        lines = [
            self._line(self._columns),
            *(self._line([row.get(name, "") for name in self._columns]) for row in rows),
        ]
        with replacing(self.path) as part:
            part.write_bytes(b"".join(lines))

    def _line(self, values: list[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator=self._newline).writerow(values)
        return text.getvalue().encode()


def check_table(path: Path) -> None:
    """Checks that a run can go on with its table.

    Args:
        path: The file, which need not exist.

    Raises:
        ValueError: If it is damaged, with its name.
    """
    if not path.exists():
        return
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is damaged: byte {error.start} is no text. Move it away to go on without the rows of before"
        ) from error


def trim(table: bytes, step: int) -> bytes:
    r"""Leaves out the rows of a table that come after a step, and one that was not written to its end.

    Args:
        table: The table; its first line names the columns.
        step: The last step to stay.

    Returns:
        The table, its line ends as they were.

    Example:
        >>> trim(b"loss,step\r\n3.0,2\r\n2.5,4\r\n2.", 2)
        b'loss,step\r\n3.0,2\r\n'
    """
    head, *rows = table.splitlines(keepends=True) or [b""]
    names = head.decode(errors="replace").strip().split(",")
    if not head.endswith(b"\n"):
        return b""
    if "step" not in names:
        return table
    index = names.index("step")
    kept = [head]
    for row in rows:
        cells = row.split(b",")
        whole = row.endswith(b"\n") and len(cells) == len(names)
        if whole and cells[index].strip().isdigit() and int(cells[index]) <= step:
            kept.append(row)
    return b"".join(kept)
