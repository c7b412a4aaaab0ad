"""What goes wrong on the command line, and how that is told."""

from __future__ import annotations

import sys
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
