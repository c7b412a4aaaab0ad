"""The check of whole numbers that a user gives."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, value: Any, least: int = 1, note: str = "") -> int:
    """Checks a number of things.

    Args:
        name: What it is called, for the message.
        value: The number, of any integer type.
        least: The smallest that will do.
        note: What else to say where it does not fit.

    Returns:
        The number.

    Raises:
        TypeError: If it is no integer; True and False are none.
        ValueError: If it is too small.

    Example:
        >>> check_count("steps", 8)
        8
    """
    end = f" ({note})" if note else ""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}{end}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}{end}")
    return count


def check_optional_count(name: str, value: Any, least: int = 1) -> int | None:
    """Checks a number of things that may also be None; raises what `check_count` raises.

    Example:
        >>> check_optional_count("frames_per_step", None)
    """
    return None if value is None else check_count(name, value, least)
