"""What stands beside the frames of recordings: own times, masks of what was observed, and contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.arrays import as_tensor
from flowfactor.data.readers.arrayfiles import CONTAINERS, read_arrays

NAMES = ("t", "mask", "context")
_PARTS = "context/"


@dataclass
class Beside:
    """Times, mask and context as a user or a file gives them; None for none.

    Attributes:
        t: Times of each recording ``[R, L]`` or a list of R rows. Times that all sequences share, ``[T+1]``, are none.
        mask: Which frames were observed, likewise.
        context: Features of each recording ``[R, C]``, or such an array for each name.
    """

    t: Any = None
    mask: Any = None
    context: Any = None

    def or_else(self, other: Beside) -> Beside:
        """The same, with what another has where this has none."""
        return Beside(*(o if own is None else own for own, o in zip(vars(self).values(), vars(other).values())))  # noqa: B905


def is_common(t: Any) -> bool:
    """Whether times are those of all sequences, ``[T+1]``, not a row for each.

    Example:
        >>> is_common([0.0, 1.0]), is_common([[0.0, 1.0], [0.0, 2.0]])
        (True, False)
    """
    if isinstance(t, (Tensor, np.ndarray)):
        return t.ndim == 1
    return not any(hasattr(row, "__len__") and np.ndim(row) for row in t)


def named_among(arrays: Mapping[str, Any]) -> Beside:
    """What a file's arrays hold beside frames: ``t``, ``mask`` and ``context``, or ``context/NAME`` for each name.

    Args:
        arrays: The arrays by name.

    Returns:
        What is there.

    Example:
        >>> sorted(named_among({"context/pose": np.zeros((2, 3)), "frames": np.zeros(1)}).context)
        ['pose']
    """
    parts = {name.removeprefix(_PARTS): array for name, array in arrays.items() if name.startswith(_PARTS)}
    found = {name: arrays[name] for name in NAMES if name in arrays}
    return Beside(**({"context": parts} if parts else {}) | found)


def beside_films(films: Sequence[tuple[Path, int]]) -> Beside:
    """What the files of films hold beside their frames.

    Args:
        films: The file of each film, and the number of sequences in it. Other files than containers hold nothing beside.

    Returns:
        Rows for all sequences of the films.

    Raises:
        ValueError: If some of the films have a part and others have not.
    """
    each = []
    for path, count in films:
        held = read_arrays(path, only=_is_beside) if path.suffix.lower() in CONTAINERS and path.is_file() else {}
        # A film of one sequence has its own times [T+1], mask [T+1] and features [C].
        each.append({name: as_tensor(value)[None] if count == 1 else as_tensor(value) for name, value in held.items()})
    names = sorted({name for held in each for name in held})
    for name in names:
        for (path, _), held in zip(films, each, strict=True):
            if name not in held:
                first = next(film for (film, _), other in zip(films, each, strict=True) if name in other)
                raise ValueError(f"{path} holds no {name!r}, but {first} does: give it in every file or in none")
    contexts = [name for name in names if name.partition("/")[0] == "context"]
    joined: dict[str, Any] = {name: _stacked(name, [held[name] for held in each], films) for name in contexts}
    rows = {name: [row for held in each for row in held[name]] for name in names if name not in contexts}
    return named_among(joined | rows)


def _is_beside(name: str) -> bool:
    return name in NAMES or name.startswith(_PARTS)


def _stacked(name: str, parts: Sequence[Tensor], films: Sequence[tuple[Path, int]]) -> Tensor:
    for (path, _), part in zip(films, parts, strict=True):
        if part.ndim != 2 or part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{path}: {name!r} has shape {list(part.shape[1:])}, expected [C] as in {films[0][0]}, whose is "
                f"{list(parts[0].shape[1:])}"
            )
    return torch.cat(list(parts))


def checked_mask(mask: Any, lengths: Sequence[int], names: Sequence[str]) -> Tensor:
    """Checks a mask: which frames of recordings were observed.

    Args:
        mask: A row of booleans, or of 0 and 1, for each recording.
        lengths: Frames of each recording.
        names: What they are called in messages.

    Returns:
        The mask of all frames, one recording after another ``[F]``.

    Raises:
        ValueError: If it does not fit.
    """

    def check(row: Tensor, name: str) -> Tensor:
        if not bool(((row == 0) | (row == 1)).all()):
            raise ValueError(f"{name}: mask must hold booleans, True where a frame was observed, got {row.tolist()}")
        return row.bool()

    return _flat("mask", mask, lengths, names, check)


def checked_times(t: Any, lengths: Sequence[int], names: Sequence[str], seen: Tensor | None) -> Tensor:
    """Checks the times of recordings.

    Args:
        t: A row of times for each recording.
        lengths: Frames of each recording.
        names: What they are called in messages.
        seen: The mask of all frames ``[F]``, or None. Times after the last frame that was observed are not looked at: they
            become those of that frame.

    Returns:
        The times of all frames, one recording after another ``[F]``, float32.

    Raises:
        ValueError: If they do not fit, are not finite, or decrease.
    """
    masks = iter([None] * len(lengths) if seen is None else seen.split(list(lengths)))

    def check(row: Tensor, name: str) -> Tensor:
        row, own = row.to(torch.float32), next(masks)
        if own is not None and bool(own.any()):
            last = int(own.nonzero()[-1])
            row = torch.cat([row[: last + 1], row[last].expand(len(row) - last - 1)])
        if not bool(row.isfinite().all()) or bool((row.diff() < 0).any()):
            raise ValueError(f"{name}: t must be finite and must not decrease, one time a frame; got {row.tolist()}")
        return row

    return _flat("t", t, lengths, names, check)


def checked_context(context: Any, names: Sequence[str]) -> Tensor | dict[str, Tensor]:
    """Checks contexts: features of each recording.

    Args:
        context: Numbers ``[R, C]``, or such an array for each name.
        names: What the recordings are called in messages.

    Returns:
        The same as float32 tensors.

    Raises:
        TypeError: If it holds no numbers.
        ValueError: If it does not fit, or is not finite.
    """
    if isinstance(context, Mapping):
        if not context:
            raise ValueError("context={} names no features: leave it out")
        return {str(name): _features(f"context[{name!r}]", part, names) for name, part in context.items()}
    return _features("context", context, names)


def _features(what: str, context: Any, names: Sequence[str]) -> Tensor:
    features = _tensor(what, context).to(torch.float32)
    if features.ndim != 2 or len(features) != len(names) or not features.shape[1]:
        hint = "; give one feature each as [N, 1]" if features.shape == (len(names),) else ""
        raise ValueError(
            f"{what} must have a row of features for each of the {len(names)} sequences, shape [{len(names)}, C]; got "
            f"{list(features.shape)}{hint}"
        )
    bad = ~features.isfinite().all(1)
    if bool(bad.any()):
        raise ValueError(f"{names[int(bad.nonzero()[0])]}: {what} holds NaN or infinity")
    return features


def _flat(
    what: str, rows: Any, lengths: Sequence[int], names: Sequence[str], check: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """Checks a row for each recording, and lays them end to end; a table as wide as the longest has rows to spare."""
    table = isinstance(rows, (Tensor, np.ndarray))
    if len(rows) != len(lengths) or (table and rows.ndim != 2):
        got = list(rows.shape) if table else f"{len(rows)} rows"
        raise ValueError(f"{what} must have a row for each of the {len(lengths)} sequences, got {got}")
    made = []
    for row, length, name in zip(rows, lengths, names, strict=True):
        own = _tensor(f"{name}: {what}", row)
        if own.ndim != 1 or (len(own) != length and len(own) != max(lengths)):
            raise ValueError(f"{name}: {what} has shape {list(own.shape)}, but there are {length} frames")
        made.append(check(own[:length], name))
    return torch.cat(made)


def _tensor(what: str, values: Any) -> Tensor:
    try:
        return as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must hold numbers: {error}") from None
