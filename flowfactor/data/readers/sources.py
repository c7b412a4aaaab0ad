"""Where recorded sequences come from: arrays, lists, folders and files, read into frames with labels and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.arrays import as_tensor, check_axes, in_order, parse_layout, pictures_tensor
from flowfactor.data.checks import check_range
from flowfactor.data.fitting import Look, with_channels
from flowfactor.data.readers.arrayfiles import CONTAINERS, frames_among, read_arrays
from flowfactor.data.readers.beside import (
    Beside,
    beside_films,
    checked_context,
    checked_mask,
    checked_times,
    is_common,
    named_among,
)
from flowfactor.data.readers.films import ArrayFilm, Film, open_film
from flowfactor.data.readers.folders import find_films, list_folder
from flowfactor.data.readers.reading import read_films


@dataclass
class Source:
    """Recordings, one after another.

    Attributes:
        frames: All frames [F, C, H, W].
        lengths: Frames of each recording.
        names: Names of the recordings.
        labels: Their classes, -1 for none.
        flow_names: Names of the classes.
        groups: Their groups.
        are_groups_given: Whether a folder or the user said what belongs together.
        t: Times that all sequences share, not yet checked; None where there are none, or each has its own.
        when: The own times of all frames [F], or None.
        seen: Which of all frames were observed [F], or None for all.
        context: The features of each recording [R, C], or such a tensor for each name; or None.
    """

    frames: Tensor
    lengths: list[int]
    names: list[str]
    labels: Tensor
    flow_names: tuple[str, ...]
    groups: list[str]
    are_groups_given: bool
    t: Any = None
    when: Tensor | None = None
    seen: Tensor | None = None
    context: Tensor | dict[str, Tensor] | None = None


def read_source(
    source: Any,
    look: Look,
    *,
    layout: str | None,
    levels: str | None,
    group: Any,
    k: Any,
    flow_names: Sequence[str] | None,
    beside: Beside,
    is_cut: bool,
) -> Source:
    """Reads what a user gives as sequences; see `flowfactor.data.Sequences` for arguments and errors.

    Args:
        source: Array, folder, file, or a list of one kind.
        look: What frames are to look like.
        layout: The order of arrays' axes.
        levels: What the levels of a folder are.
        group: What belongs together.
        k: Labels.
        flow_names: Names of the labels.
        beside: Times, mask and context.
        is_cut: Whether sequences may differ in length: they are cut into windows, or padded.

    Returns:
        The recordings.
    """
    axes = None if layout is None else parse_layout(layout)
    is_folder = isinstance(source, (str, Path)) and not Path(source).expanduser().is_file()
    if levels is not None and not is_folder:
        raise ValueError(f"levels={levels!r} names the levels of a folder, and the source is none: leave it out")
    groups: list[str] | None = None
    if is_folder:
        found = find_films(source, levels, group if isinstance(group, str) else None, axes=axes, is_cut=is_cut)
        frames, lengths, names, owner = _read(found.films, found.names, look, is_cut)
        beside = beside.or_else(_beside(found.films))
        groups = None if found.groups is None else [found.groups[n] for n in owner]
        if k is None and found.classes is not None:
            k, flow_names = [found.classes[n] for n in owner], flow_names or found.class_names
    elif isinstance(source, (str, Path)):
        own = _file(Path(source).expanduser(), axes, look, is_cut, k, group, beside)
        frames, lengths, names, k, group, beside = own
        owner = list(range(len(lengths)))
    elif isinstance(source, (Tensor, np.ndarray)):
        frames, lengths = _array(source, axes, look, is_cut, mask=beside.mask)
        names = [f"sequence {n}" for n in range(len(lengths))]
        owner = list(range(len(lengths)))
    elif (stacked := _stacked(source := list(source), axes)) is not None:
        frames, lengths = _array(stacked, ("n", *_film_axes(stacked[0].ndim, axes)), look, is_cut, mask=beside.mask)
        names = [f"sequence {n}" for n in range(len(lengths))]
        owner = list(range(len(lengths)))
    else:
        films = _listed(source, axes, is_cut)
        frames, lengths, names, owner = _read(films, [str(film.path) for film in films], look, is_cut)
        beside = beside.or_else(_beside(films))
    labels, flow_names = check_labels(k, flow_names, len(lengths))
    if isinstance(group, str) and not is_folder:
        raise ValueError(f"group={group!r} is looked for in the paths of a folder: give one group's name a sequence")
    if group is not None and not isinstance(group, str):
        groups = _checked_groups(group, len(lengths))
    own = [names[n] for n in _first(owner)]
    made = Source(frames, lengths, names, labels, flow_names, groups or own, groups is not None)
    _lay_beside(made, beside, is_cut)
    return made


def _lay_beside(made: Source, beside: Beside, is_cut: bool) -> None:
    """Checks times, mask and context, and lays them beside the recordings."""
    t, lengths = beside.t, made.lengths
    if t is not None and is_common(t) and is_cut and len(set(lengths)) == 1 and len(t) == lengths[0]:
        t = as_tensor(t).expand(len(lengths), -1)  # the times of whole recordings, which are cut
    seen = made.seen = None if beside.mask is None else checked_mask(beside.mask, lengths, made.names)
    if t is None or is_common(t):
        made.t = t
    else:
        made.when = checked_times(t, lengths, made.names, seen)
    made.context = None if beside.context is None else checked_context(beside.context, made.names)


def _beside(films: Sequence[Film]) -> Beside:
    return beside_films([(film.path, film.sequences) for film in films])


def _first(owner: Sequence[int]) -> list[int]:
    """For each recording, the first one of the same film."""
    first: dict[int, int] = {}
    return [first.setdefault(film, n) for n, film in enumerate(owner)]


def _read(
    films: Sequence[Film], names: Sequence[str], look: Look, is_cut: bool
) -> tuple[Tensor, list[int], list[str], list[int]]:
    """Reads films: the frames, and for each recording in them its length, its name and the film's number."""
    frames, counts = read_films(films, look, is_cut=is_cut)
    lengths, told, owner = [], [], []
    for n, (film, count) in enumerate(zip(films, counts, strict=True)):
        lengths += [count // film.sequences] * film.sequences
        told += [names[n]] if film.sequences == 1 else [f"{names[n]}[{part}]" for part in range(film.sequences)]
        owner += [n] * film.sequences
    return frames, lengths, told, owner


def _file(
    file: Path, axes: tuple[str, ...] | None, look: Look, is_cut: bool, k: Any, group: Any, beside: Beside
) -> tuple[Tensor, list[int], list[str], Any, Any, Beside]:
    """Reads one file: a film, or an array of sequences with what an ``.npz`` or ``.h5`` says of them beside it."""
    film = open_film(file, axes=axes, is_cut=is_cut)
    if not isinstance(film, ArrayFilm):
        frames, lengths = read_films([film], look, is_cut=is_cut)
        return frames, lengths, [file.name], k, group, beside
    held = read_arrays(file)
    array = frames_among(held, file)
    if axes is None and array.ndim == 4 and array.shape[1] in (1, 3, 4) and "k" not in held:
        raise ValueError(
            f"{file}: {list(array.shape)} may be one film in {array.shape[1]} channels or sequences of {array.shape[1]} "
            "grey frames: say layout='t c h w' or 'n t h w'"
        )
    if axes is None and array.ndim == 3:
        axes = ("t", "h", "w")
        check_axes(array.shape, axes, f"{file}:", is_cut=is_cut)
    if file.suffix.lower() in CONTAINERS:
        k, group = held.get("k") if k is None else k, held.get("group") if group is None else group
        beside = beside.or_else(_of_one(named_among(held)) if "n" not in (axes or "n") else named_among(held))
    frames, lengths = _array(array, axes, look, is_cut, str(file), beside.mask)
    return frames, lengths, [f"{file.name}[{n}]" for n in range(len(lengths))], k, group, beside


def _of_one(beside: Beside) -> Beside:
    """What a file of one sequence says: its mask [T+1] and features [C] are those of one row."""
    mask, context = (
        np.asarray(x)[None] if x is not None and np.ndim(x) == 1 else x for x in (beside.mask, beside.context)
    )
    if isinstance(context, dict):
        context = {name: part[None] if np.ndim(part) == 1 else part for name, part in context.items()}
    return Beside(beside.t, mask, context)


def _listed(parts: list[Any], axes: tuple[str, ...] | None, is_cut: bool) -> list[Film]:
    if not parts:
        raise ValueError("there are no sequences: the list is empty")
    if all(isinstance(part, (str, Path)) for part in parts):
        return [list_folder(part, axes=axes, is_cut=is_cut) for part in parts]
    for part in parts:
        if not isinstance(part, (Tensor, np.ndarray)):
            raise TypeError(
                f"sequences are an array, a folder, or a list of either, got {type(part).__name__} in place of an array"
            )
    _film_axes(parts[0].ndim, axes)
    return [ArrayFilm(Path(f"sequence {n}"), part, axes=axes, is_cut=is_cut) for n, part in enumerate(parts)]


def _stacked(parts: list[Any], axes: tuple[str, ...] | None) -> Tensor | None:
    """Stacks arrays of one shape and type, which then are as one array; None if they are not that."""
    if not parts or not all(isinstance(part, (Tensor, np.ndarray)) for part in parts) or "n" in (axes or ()):
        return None
    if len({(type(part), tuple(part.shape), part.dtype) for part in parts}) > 1:
        return None
    own = _film_axes(parts[0].ndim, axes)
    if axes is None:
        check_axes(tuple(parts[0].shape), own, "each sequence")
    return torch.stack([pictures_tensor(part) for part in parts])


def _film_axes(dimensions: int, axes: tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None and dimensions not in (3, 4):
        raise ValueError(
            f"each sequence of a list is [T+1, H, W] or [T+1, C, H, W], got one of {dimensions} dimensions"
        )
    return axes if axes is not None else ("t", "h", "w") if dimensions == 3 else ("t", "c", "h", "w")


def _default_axes(shape: Sequence[int], what: str, is_cut: bool) -> tuple[str, ...]:
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(
            f"{what} must be [N, T+1, H, W] or [N, T+1, C, H, W] with at least one, got {list(shape)}; for another order "
            "of axes say layout=, such as 't n h w'"
        )
    axes = ("n", "t", "h", "w") if len(shape) == 4 else ("n", "t", "c", "h", "w")
    check_axes(tuple(shape), axes, what, is_cut=is_cut)
    return axes


def _array(
    array: Any, axes: tuple[str, ...] | None, look: Look, is_cut: bool, file: str = "", mask: Any = None
) -> tuple[Tensor, list[int]]:
    """Takes an array: without a copy where nothing about it changes. Frames that a mask leaves out may hold anything."""
    what = f"{file}: frames" if file else "frames"
    axes = _default_axes(array.shape, what, is_cut) if axes is None else axes
    frames = in_order(pictures_tensor(array), axes, what)
    if not frames.numel():
        raise ValueError(f"{what} must be at least one, got shape {list(array.shape)}")
    seen = None if mask is None or not frames.is_floating_point() else torch.as_tensor(mask)
    if seen is not None and seen.shape == frames.shape[:2]:  # any other is refused when it is checked
        frames = frames.masked_fill((seen == 0).to(frames.device)[:, :, None, None, None], 0)
    check_range(frames, what)
    count, length = frames.shape[:2]
    frames = frames.flatten(0, 1)
    frames = with_channels(frames, look.channels, what) if look.channels is not None else frames
    if look.size is not None:
        frames = torch.cat([look.fitted(part, what) for part in frames.split(1024)])
    return frames, [length] * count


def _checked_groups(group: Any, count: int) -> list[str]:
    groups = [str(name) for name in (group.tolist() if isinstance(group, (Tensor, np.ndarray)) else group)]
    if len(groups) != count:
        raise ValueError(f"there are {count} sequences, but {len(groups)} groups: give one a sequence")
    return groups


def check_labels(k: Any, names: Sequence[str] | None, count: int) -> tuple[Tensor, tuple[str, ...]]:
    """Checks labels and names.

    Args:
        k: Labels, or None.
        names: Names of the transformations, or None.
        count: Number of sequences.

    Returns:
        The labels [count] (-1 without labels) and K names.

    Raises:
        ValueError: If they do not fit.
    """
    if k is None:
        if names is not None:
            raise ValueError("flow_names were given, but no labels k to which they belong")
        return torch.full((count,), -1), ()
    labels = as_tensor(k if isinstance(k, Tensor) else np.asarray(k)).cpu()
    if labels.shape != (count,):
        raise ValueError(f"there are {count} sequences, but the labels k have shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise ValueError(f"labels k must be integers from 0, got {labels.dtype} from {labels.min().item()}")
    flows = int(labels.max()) + 1 if names is None else len(names)
    names = [f"flow_{flow}" for flow in range(flows)] if names is None else names
    if int(labels.max()) >= flows:
        raise ValueError(f"labels k go up to {int(labels.max())}, but there are only {flows} flow_names")
    return labels.long(), tuple(names)
