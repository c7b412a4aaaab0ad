"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in a file's folder, which takes the file's place where the block ends without an error.

    Nothing else ever sees the file half written, not even after a loss of power: the contents are on the disk before the
    name is, and the name before this returns. After an error the old one is still there, and the temporary one is gone.
    An error of the file system names the file, also where the system does not (as when a disk is full).

    Args:
        path: The file, which need not exist.

    Yields:
        Where to write instead.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename) == str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        # It is gone already, or was never made; on a read-only disk that is an error.
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk now; where it cannot do that, it is left out.

    Raises:
        OSError: If the disk is full or broken, which some file systems tell here first.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":  # no names to wait for there
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, cure: str = "") -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
        path: The file.
        cure: What to do about a damaged one.

    Returns:
        The object.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged; the message has its name.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}){cure}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds {type(found).__name__}, not an object{cure}")
    return found
