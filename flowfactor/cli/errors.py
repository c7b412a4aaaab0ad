"""What goes wrong on the command line, and how that is told."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

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


def fail(command: str, error: Exception) -> NoReturn:
    """Tells an error and ends the program.

    Args:
        command: The command.
        error: What went wrong.

    Raises:
        SystemExit: With code 2.
    """
    print(f"flowfactor {command}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def warnings_in_a_line(command: str) -> Iterator[None]:
    """Has warnings told in one line each, without the place in the code.

    Args:
        command: The command.
    """
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"flowfactor {command}: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
