"""What goes wrong on the command line, and how that is reported."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ImportError,
    ConnectionError,
)
"""What preparing a command may raise about what the user gave; the message says how to mend it."""

FILE_ERROR, INTERRUPTED = 74, 130
"""Exit codes: a file could not be read or written (EX_IOERR of sysexits.h), and Ctrl-C."""

_CURES = {
    errno.ENOSPC: "make room there, or choose another place (--output)",
    errno.EDQUOT: "make room there, or choose another place (--output)",
    errno.EROFS: "choose a place that can be written (--output)",
    errno.EACCES: "get the permission, or choose another place (--output)",
    errno.EPERM: "get the permission, or choose another place (--output)",
}


def fail(command: str, error: Exception) -> NoReturn:
    """Tells an error and ends the program.

    Args:
        command: The command.
        error: What went wrong.

    Raises:
        SystemExit: With code 2.
    """
    _tell(command, f"error: {error}")
    raise SystemExit(2)


def guarded(command: str, run: Callable[[], int]) -> int:
    """Runs a command, and tells in one line where a file fails it, a training diverges, or it is interrupted.

    Args:
        command: Its name.
        run: The command.

    Returns:
        Its exit code; 1 after a training that diverged, 74 after an error with a file, 130 after an interruption.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _tell(command, f"interrupted. {error}".rstrip(" ."))
        return INTERRUPTED
    except FloatingPointError as error:
        _tell(command, f"error: {error}")
        return 1
    except BrokenPipeError:  # whoever read the output has what it wanted
        _discard(sys.stdout)
        return FILE_ERROR
    except OSError as error:
        _tell(command, f"error: {describe(error)}")
        _discard(sys.stdout)
        return FILE_ERROR


def say(text: str) -> None:
    """Prints, and goes on where nobody reads: what has been worked out is still to be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _tell("", f"error: the output cannot be written: {error.strerror}")
        _discard(sys.stdout)


def describe(error: OSError) -> str:
    """Says in one line which file could not be read or written, why, and what to do.

    Args:
        error: What the system told.

    Returns:
        The line.

    Example:
        >>> describe(OSError(errno.ENOSPC, "No space left on device", "runs/a/last.ckpt"))
        'runs/a/last.ckpt: No space left on device: make room there, or choose another place (--output)'
    """
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    named = [] if error.filename is None else [os.fsdecode(error.filename)]
    cure = _CURES.get(error.errno)
    return ": ".join([*named, error.strerror, *([] if cure is None else [cure])])


def _tell(command: str, text: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere left to tell it
        print(f"flowfactor {command}".rstrip() + f": {text}", file=sys.stderr, flush=True)


def _discard(stream: TextIO) -> None:
    """Sends what is still printed nowhere, so that Python's last flush does not fail once more."""
    with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
