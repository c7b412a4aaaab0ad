"""Durations in words."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Writes a duration as people do.

    Args:
        seconds: The duration.

    Returns:
        Minutes and seconds, with hours where there are any.

    Example:
        >>> format_duration(75), format_duration(7384.2)
        ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
