"""How the command line tells warnings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


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
