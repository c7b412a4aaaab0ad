"""The order of names: numbers count as numbers, with their decimals and signs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from flowfactor.data.readers.films import ARRAYS, VIDEOS
from flowfactor.data.readers.pictures import PICTURES

_ENDINGS = (*PICTURES, *ARRAYS, *VIDEOS)  # they are no part of a name, and what they begin with no decimal point

# A sign stands at the beginning or after one of these; elsewhere a dash separates: f-1, f-2, 2024-01-05.
_SIGN = r"(?:(?<=[_=(\[, ])|^)[-+\u2212]"
# One decimal point, in no chain of them (1.2.3, 2024.01.05) and in no version (v1.9, v1.10); 1e-3 with its sign only.
_DECIMAL = r"(?<![\d.])(?<![^a-z]v)(?<!^v)\d+\.\d+(?!\.?\d)(?:e[-+]\d+)?"
_WHOLE = r"\d+(?:e[-+]\d+)?"
_WITH_POINTS = re.compile(rf"((?:{_SIGN})?(?:{_DECIMAL}|{_WHOLE}))")
_WITHOUT = re.compile(rf"((?:{_SIGN})?{_WHOLE})")


def natural_key(path: Path, *, decimals: bool = True) -> list[tuple[Decimal, str]]:
    """Sorts names as people do: frame2 before frame10, t0.25 before t0.5, rot_-20 before rot_-10.

    - A single point between digits is a decimal point: ``t0.25``. In chains of several (``2024.01.05``) and after a
      ``v`` (``v1.10``) it separates whole numbers.
    - A dash or plus before digits is a sign at the beginning of the name and after ``_ = ( [ ,`` or a space. After a
      letter or a digit it separates: ``f-1``, ``f-2``, ``2024-01-05``.
    - An exponent counts with its sign only: ``1e-3``.

    Args:
        path: A file or folder; its name counts, without the ending of a picture or film.
        decimals: Whether points can be decimal points.

    Returns:
        A key for `sorted`.

    Example:
        >>> [path.name for path in sorted(map(Path, ["f10.png", "f9.png"]), key=natural_key)]
        ['f9.png', 'f10.png']
        >>> [path.name for path in sorted(map(Path, ["rot_5", "rot_-10", "rot_-20"]), key=natural_key)]
        ['rot_-20', 'rot_-10', 'rot_5']
    """
    name = path.name.lower()
    parts = (_WITH_POINTS if decimals else _WITHOUT).split(name.removesuffix(_ending(path)))
    # Texts and numbers alternate, so that the same place always compares like with like; the name itself breaks ties.
    key = [(_number(part), "") if place % 2 else (Decimal(0), part) for place, part in enumerate(parts)]
    return [*key, (Decimal(0), path.name)]


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorts the files or folders of one place by `natural_key`.

    Where points as decimal points would make two of the names equal (``take1.1`` and ``take1.10``), they separate
    whole numbers in all of them.

    Args:
        paths: The files or folders.

    Returns:
        The same in order.

    Example:
        >>> [path.name for path in natural_order(map(Path, ["take1.10", "take1.9", "take1.1"]))]
        ['take1.1', 'take1.9', 'take1.10']
    """
    paths = list(paths)

    def count(decimals: bool) -> int:
        # All of a key but its last entry, which is the name itself, with the ending that a name may share.
        return len({(*natural_key(path, decimals=decimals)[:-1], _ending(path)) for path in paths})

    decimals = count(True) >= count(False)
    return sorted(paths, key=lambda path: natural_key(path, decimals=decimals))


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    return ending if ending in _ENDINGS else ""


def _number(text: str) -> Decimal:
    return Decimal(text.replace("\u2212", "-"))
