"""The check of whole numbers that a user gives."""

from __future__ import annotations


def check_count(name: str, value: object, least: int = 1) -> int:
    """Checks a number of things.

    Args:
        name: What it is called, for the message.
        value: The number.
        least: The smallest that will do.

    Returns:
        The number.

    Raises:
        TypeError: If it is no integer; True and False are none.
        ValueError: If it is too small.

    Example:
        >>> check_count("steps", 8)
        8
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_optional_count(name: str, value: object, least: int = 1) -> int | None:
    """Checks a number of things that may also be None; raises what `check_count` raises.

    Example:
        >>> check_optional_count("frames_per_step", None)
    """
    return None if value is None else check_count(name, value, least)
