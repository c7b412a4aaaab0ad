"""The checks of whole numbers and of names that a user gives."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words that offer what a name may have been meant to be, for the end of a message; none where nothing is near.

    Args:
        name: The name that is not known.
        known: Those that are.

    Returns:
        The words, with a colon before them.

    Example:
        >>> did_you_mean("mnist-smal", ["demo", "mnist-small"]), did_you_mean("moon", ["demo"])
        (': did you mean mnist-small?', '')
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


def choices(name: str, known: Iterable[str]) -> str:
    """Words that say which names there are, after the one that may have been meant.

    Example:
        >>> choices("tran", ["train", "demo"]), choices("moon", ["train", "demo"])
        (': did you mean train? Choose among train, demo', ': choose among train, demo')
    """
    known = list(known)
    near = did_you_mean(name, known)
    return f"{near} Choose among {', '.join(known)}" if near else f": choose among {', '.join(known)}"
